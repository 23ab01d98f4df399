"""What every conversion does with files: read untrusted checkpoints, write all or nothing, report what went where."""

import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.training import folders


# What a conversion knows of its source beyond the weights: the names and their order, so that the way back gives the
# very same file. Small, and of no use to a model that is only run.
RECORD = "conversion.json"
RECORD_TENSORS = "conversion.safetensors"

# Keys under which trainers keep the state_dict.
WRAPPERS = ("state_dict", "model_state_dict", "model")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Item = TypeVar("Item")
State = dict[str, torch.Tensor]


class ConversionError(ValueError):
    """An input or argument that cannot be converted. The message names it, what was given and what is allowed."""


def progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    """`items`, with a progress bar on a terminal."""
    return tqdm(items, desc=what, disable=None, leave=False)


@dataclass
class Report:
    """What a conversion did, or in a dry run would do.

    Attributes:
        source, destination: paths.
        rows: (name in the source, what it is, name in the destination), in the destination's order; "-" where a tensor
            has no counterpart.
        notes: what was inferred or assumed, a sentence each.
        dry_run: whether nothing was written.
        closing: the last line, instead of the usual one.
    """

    source: str
    destination: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    closing: str | None = None

    def map(self, source: str, tensor: torch.Tensor, destination: str) -> None:
        """Add a row: `source` becomes `destination`."""
        what = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        self.rows.append((source, what, destination))

    def __str__(self) -> str:
        lines = []
        if self.dry_run:
            width = max((len(source) for source, _, _ in self.rows), default=0)
            between = max((len(what) for _, what, _ in self.rows), default=0)
            lines += [f"{source:{width}}  {what:{between}}  -> {name}" for source, what, name in self.rows]
        lines += [f"note: {note}" for note in self.notes]
        if self.dry_run:
            lines.append(f"dry run: {self.destination} was not written")
        else:
            lines.append(self.closing or f"{len(self.rows)} tensors: {self.source} -> {self.destination}")
        return "\n".join(lines)


# ---------------------------------------------------------------- reading


def read_state_dict(source: str | os.PathLike, skip: str | None = None) -> tuple[State, str | None, list[str]]:
    """Read a checkpoint file without running anything in it.

    Args:
        source: a file of `torch.save` (read with `weights_only=True`) or a `.safetensors` file.
        skip: pattern found in the names of entries that are no weights, whatever they hold.

    Returns:
        The tensors in the file's order; the key they were wrapped in (one of `WRAPPERS`), if any; the other keys
        beside it, and those that were skipped.

    Raises:
        ConversionError: the file is missing, truncated, holds anything but plain tensors, or code.
    """
    path = Path(source)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "missing"
        raise ConversionError(
            f"SOURCE {str(path)!r} is {kind}; it must be a file of torch.save or a .safetensors file."
        )
    wrapper, beside = None, []
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        loaded = _load_pickle(path)
        if not isinstance(loaded, dict):
            raise ConversionError(
                f"SOURCE {str(path)!r} holds a {type(loaded).__name__}; it must hold a state_dict, or a dict with one "
                f"under {', '.join(map(repr, WRAPPERS))}."
            )
        wrapper = next((key for key in WRAPPERS if isinstance(loaded.get(key), dict)), None)
        if wrapper is not None:
            beside = [str(key) for key in loaded if key != wrapper]
            loaded = loaded[wrapper]
        state = dict(loaded)
    state = _without(state, skip, beside)
    check_tensors(state, str(path))
    return state, wrapper, beside


def _without(state: dict[Any, Any], skip: str | None, skipped: list[str]) -> dict[Any, Any]:
    """The entries in whose names the pattern `skip` is not found; the other names are added to `skipped`."""
    if skip is None:
        return state
    names = [name for name in state if isinstance(name, str) and re.search(skip, name)]
    skipped += names
    return {name: tensor for name, tensor in state.items() if name not in names}


def _load_pickle(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch.load does not look at the checksums.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("the archive is compressed, which torch.save's are not")
                if (entry := archive.testzip()) is not None:
                    raise ValueError(f"{entry} does not fit its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            raise ConversionError(
                f"SOURCE {str(path)!r} was refused: it asks to import or run something, and only plain tensors, "
                "numbers, strings, lists and dicts are read. If you trust the file, save its state_dict alone: "
                f"torch.save(model.state_dict(), ...). torch says: {_refusal(error)}"
            ) from error
        raise ConversionError(
            f"SOURCE {str(path)!r} was refused: it is not a file of torch.save, or truncated, or it asks to import or "
            f"run something. torch says: {_refusal(error)}"
        ) from error
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ConversionError(
            f"SOURCE {str(path)!r} could not be read: it is not a file of torch.save, or truncated or damaged. torch "
            f"says: {type(error).__name__}: {_first_line(error)}"
        ) from error


def read_safetensors(path: Path) -> State:
    """The tensors of one `.safetensors` file, by its order of names.

    Raises:
        ConversionError: it is truncated or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{str(path)!r} is not a complete .safetensors file: {type(error).__name__}: {_first_line(error)}"
        ) from error


def check_tensors(state: dict[Any, Any], where: str) -> None:
    """Refuse whatever is not an ordinary tensor of floating-point numbers.

    Raises:
        ConversionError: naming the entry.
    """
    if not state:
        raise ConversionError(f"SOURCE {where!r} holds no tensors.")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ConversionError(f"SOURCE {where!r} has the key {name!r}; all keys must be strings.")
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{name!r} in {where!r} is a {type(tensor).__name__}; it must be a tensor.")
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise ConversionError(
                f"{name!r} in {where!r} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}; it must be "
                f"a dense tensor of {', '.join(map(str, DTYPES))}."
            )
        # A tensor with stride 0 can claim terabytes that the file does not hold.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConversionError(
                f"{name!r} in {where!r} claims the shape {list(tensor.shape)}, more numbers than the file holds."
            )


def load_folder(source: str | os.PathLike) -> tuple[ReBasedConfig, State]:
    """Read a ReBased model's folder, as `save_pretrained` writes it.

    Returns:
        The configuration, and the tensors by name, checked against it: none missing, none unknown, all of the right
        shape. Where the embeddings are tied `lm_head.weight` is left out.

    Raises:
        ConversionError: the folder is not a complete ReBased causal language model.
    """
    folder = Path(source)
    config = load_config(folder)
    state = read_weights(folder)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    check_against(config, state, str(folder))
    return config, state


def load_config(folder: Path) -> ReBasedConfig:
    """The configuration in `folder`.

    Raises:
        ConversionError: there is none, or it is another model's or impossible.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"SOURCE {str(folder)!r} has no config.json; it must be the folder of a ReBased model, as save_pretrained "
            "writes it."
        )
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (ValueError, AttributeError, OSError) as error:
        raise ConversionError(f"{str(folder / 'config.json')!r} is not a JSON object: {error}") from error
    if model_type != ReBasedConfig.model_type:
        raise ConversionError(
            f"{str(folder / 'config.json')!r} has model_type {model_type!r}; it must be {ReBasedConfig.model_type!r}."
        )
    try:
        return ReBasedConfig.from_pretrained(folder)
    except Exception as error:  # strict dataclasses raise errors of several kinds
        raise ConversionError(f"{str(folder / 'config.json')!r} is not a possible configuration: {error}") from error


def read_weights(folder: Path, skip: str | None = None, skipped: list[str] | None = None) -> State:
    """All tensors of a folder's safetensors, one file or sharded.

    Args:
        folder: with `model.safetensors`, or its shards and their index.
        skip: as in `read_state_dict`.
        skipped: the names that were skipped are added to it.

    Raises:
        ConversionError: there are none, a shard is missing or the index names a file outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        state = read_safetensors(single)
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{str(index)!r} is not an index of safetensors: {error}") from error
        state = {}
        for name in progress(names, "reading"):
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise ConversionError(f"{str(index)!r} names the shard {name!r}, which is not in the folder.")
            state |= read_safetensors(folder / name)
        if set(state) != set(weight_map):
            wrong = sorted(set(state) ^ set(weight_map))
            raise ConversionError(f"{str(index)!r} and its shards disagree about {_some(wrong)}.")
    else:
        raise ConversionError(f"SOURCE {str(folder)!r} has neither model.safetensors nor an index of it.")
    state = _without(state, skip, skipped if skipped is not None else [])
    check_tensors(state, str(folder))
    return state


def load_model(model_class: Any, folder: str | os.PathLike, where: str, **options: Any) -> PreTrainedModel:
    """`model_class.from_pretrained(folder)`, all of whose weights are the folder's.

    The library makes up weights that it does not find and passes over those that it has no place for, with a warning.

    Args:
        model_class: the library's, an Auto class or a model's own.
        folder: with safetensors, or a GGUF file that `options` name.
        where: the argument and its value, for messages.
        options: of `from_pretrained`.

    Raises:
        ConversionError: the weights are missing, truncated, or not just those that the configuration asks for.
    """
    try:
        model, found = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # the library's errors about weights are of many kinds
        raise ConversionError(f"The weights in {where} cannot be loaded: {error}") from error
    _check_names(found["missing_keys"], found["unexpected_keys"], where)
    return model


def make_config(**fields: Any) -> ReBasedConfig:
    """A configuration of what was found in a checkpoint.

    Raises:
        ConversionError: no model has these sizes.
    """
    try:
        return ReBasedConfig(**fields)
    except Exception as error:  # strict dataclasses raise errors of several kinds
        raise ConversionError(f"The checkpoint's sizes make no possible model: {error}") from error


def model_shapes(config: ReBasedConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of the model, without its memory; a tied `lm_head.weight` is left out."""
    with torch.device("meta"):
        model = ReBasedForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _check_names(missing: Iterable[str], unknown: Iterable[str], where: str) -> None:
    if missing or unknown:
        raise ConversionError(
            f"{where} does not fit its configuration: missing {_some(sorted(missing))}; unknown "
            f"{_some(sorted(unknown))}."
        )


def check_against(config: ReBasedConfig, state: State, where: str) -> None:
    """Check that `state` has just the tensors that `config` asks for.

    Raises:
        ConversionError: naming the tensors that are missing, unknown or of a wrong shape.
    """
    shapes = model_shapes(config)
    _check_names(set(shapes) - set(state), set(state) - set(shapes), repr(where))
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ConversionError(
                f"{name!r} in {where!r} has the shape {list(state[name].shape)}; the configuration asks for "
                f"{list(shape)}."
            )


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def written(destination: str | os.PathLike, overwrite: bool = False, source: Any = None) -> Iterator[Path]:
    """Give a path to write to that becomes `destination` when the block ends, and vanishes if the block fails.

    Raises:
        ConversionError: `destination` exists and `overwrite` is false, or writing it would replace `source`.
    """
    with folders.written(check_destination(destination, overwrite, source)) as path:
        yield path


def check_destination(destination: str | os.PathLike, overwrite: bool = False, source: Any = None) -> Path:
    """The absolute path of `destination`, once it is certain that it may be written.

    Raises:
        ConversionError: as in `written`.
    """
    path = Path(os.path.abspath(destination))
    if not path.name:
        raise ConversionError(f"DESTINATION {str(destination)!r} cannot be written; give a new file or folder.")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise ConversionError(f"DESTINATION {str(path)!r} exists; give another or allow --overwrite.")
    if source is not None:
        inside = Path(source).resolve()
        if path.resolve() == inside or path.resolve() in inside.parents:
            raise ConversionError(
                f"DESTINATION {str(path)!r} is or holds SOURCE {str(source)!r}, which writing would destroy; give "
                "another."
            )
    return path


def write_model(
    folder: Path,
    config: ReBasedConfig,
    state: State,
    record: dict[str, Any] | None = None,
    unused: State | None = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: ModelCard | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write a model's folder: weights bit for bit, configuration, the model's code, and the record of the conversion.

    Args:
        folder: a new folder.
        config: the configuration.
        state: every tensor that `model_shapes` lists.
        record, unused: what the way back needs; see `RECORD`.
        generation_config: instead of the one that follows from the configuration.
        tokenizer, card: written beside the model.
        max_shard_size: in bytes, or as "5GB".
    """
    with torch.device("meta"):
        model = ReBasedForCausalLM(config)
    # Tensors of one file may be views of one another, which safetensors refuses.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(own, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = model.dtype
    if generation_config is not None:
        model.generation_config = generation_config
    folders.save_model(folder, model, tokenizer, card, max_shard_size)
    write_record(folder, record, unused)


def write_record(folder: Path, record: dict[str, Any] | None, unused: State | None = None) -> None:
    """Write `RECORD`, and `RECORD_TENSORS` if there are any, into `folder`."""
    from safetensors.torch import save_file

    if record is not None:
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if unused:
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in unused.items()}
        save_file(own, folder / RECORD_TENSORS, metadata={"format": "pt"})


def read_record(folder: Path, source_format: str) -> tuple[dict[str, Any], State]:
    """The record that a conversion from `source_format` left in `folder`, or an empty one; and its unused tensors.

    Raises:
        ConversionError: it is there and damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}, {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != source_format:
            return {}, {}
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{str(path)!r} is damaged ({error}); remove it to go without.") from error
    unused = {}
    if (folder / RECORD_TENSORS).is_file():
        unused = read_safetensors(folder / RECORD_TENSORS)
        check_tensors(unused, str(folder / RECORD_TENSORS))
    return record, unused


def write_state_dict(path: Path, state: State, wrapper: str | None = None) -> None:
    """Write tensors as `torch.save` does, or as safetensors where the name ends so."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        save_file(own, path, metadata={"format": "pt"})
    else:
        torch.save(state if wrapper is None else {wrapper: state}, path)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def from_record(record: dict[str, Any], state: State, unused: State) -> State | None:
    """The source's tensors under their own names and in their own order, by the record's `keys`.

    `keys` maps each name of the source to a name in `state`, or to null where the tensor is among `unused`. Returns
    `None` where there is no record or the model has changed since so that it no longer fits.
    """
    keys = record.get("keys")
    if not isinstance(keys, dict) or set(filter(None, keys.values())) != set(state):
        return None
    if not {name for name, ours in keys.items() if ours is None} <= set(unused):
        return None
    return {name: unused[name] if ours is None else state[ours] for name, ours in keys.items()}


def _refusal(error: pickle.UnpicklingError) -> str:
    """What torch objects to in a pickle, without its advice to load the file with weights_only=False."""
    said = str(error)
    found = re.search(r"GLOBAL [\w.]+", said) or re.search(r"(?<=WeightsUnpickler error:)\s*\S.*", said)
    return "weights only load failed" if found is None else found.group().strip()[:300]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _some(names: list[str]) -> str:
    """A list of names for a message: the first few and how many more."""
    if not names:
        return "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
