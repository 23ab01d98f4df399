"""Read checkpoints without trusting any of them."""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_rebased import ReBasedConfig
from modeling_rebased.training.values import one_line

from .layout import State, check_against, check_names
from .report import ConversionError, progress, some


# Keys under which trainers keep the state_dict.
WRAPPERS = ("state_dict", "model_state_dict", "model")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def read_state_dict(source: str | os.PathLike, skip: str | None = None) -> tuple[State, str | None, list[str]]:
    """Read a checkpoint file without running anything in it.

    Args:
        source: a file of `torch.save` (read with `weights_only=True`) or a `.safetensors` file.
        skip: pattern found in the names of entries that are no weights, whatever they hold.

    Returns:
        The tensors in the file's order, the key that they were wrapped in (one of `WRAPPERS`), if any, and the other
        keys beside it and those that were skipped.

    Raises:
        ConversionError: the file is missing or truncated, or it holds code or anything but plain tensors.
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
    """Return the entries whose names do not match `skip`, and add the other names to `skipped`."""
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
    """Return the tensors of one `.safetensors` file, in the order of its names.

    Raises:
        ConversionError: the file is truncated or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{str(path)!r} is not a complete .safetensors file: {type(error).__name__}: {_first_line(error)}"
        ) from error


def check_tensors(state: dict[Any, Any], where: str) -> None:
    """Refuse everything but ordinary tensors of floating-point numbers.

    Raises:
        ConversionError: there is another entry; the message names it.
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
        The configuration, and the tensors by name. No tensor is missing or unknown, and all have the right shape. If
        the embeddings are tied, `lm_head.weight` is left out.

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
    """Return the configuration in `folder`.

    Raises:
        ConversionError: there is none, it belongs to another model, or it is impossible.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{str(folder)!r} has no config.json; it must be the folder of a ReBased model, as save_pretrained writes "
            "it."
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
        raise ConversionError(
            f"{str(folder / 'config.json')!r} is not a possible configuration: {one_line(error)}"
        ) from error


def read_weights(folder: Path, skip: str | None = None, skipped: list[str] | None = None) -> State:
    """Return all tensors of a folder's safetensors, in one file or in shards.

    Args:
        folder: a folder with `model.safetensors`, or with its shards and their index.
        skip: as in `read_state_dict`.
        skipped: list to which the names that are skipped are added.

    Raises:
        ConversionError: there are no tensors, a shard is missing, or the index names a file outside the folder.
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
            raise ConversionError(f"{str(index)!r} and its shards disagree about {some(wrong)}.")
    else:
        raise ConversionError(f"SOURCE {str(folder)!r} has neither model.safetensors nor an index of it.")
    state = _without(state, skip, skipped if skipped is not None else [])
    check_tensors(state, str(folder))
    return state


def load_model(model_class: Any, folder: str | os.PathLike, where: str, **options: Any) -> PreTrainedModel:
    """Return `model_class.from_pretrained(folder)`, and make sure that all weights come from the folder.

    With only a warning, the library makes up weights that it does not find, and passes over those without a place.

    Args:
        model_class: an Auto class or a model's own class.
        folder: a folder with safetensors, or with a GGUF file that `options` name.
        where: the argument and its value, for messages.
        options: arguments of `from_pretrained`.

    Raises:
        ConversionError: the weights are missing or truncated, or not exactly those that the configuration asks for.
    """
    try:
        model, found = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # the library's errors about weights are of many kinds
        raise ConversionError(f"The weights in {where} cannot be loaded: {error}") from error
    check_names(found["missing_keys"], found["unexpected_keys"], where)
    return model


def load_tokenizer(
    folder: Path, given: str | os.PathLike | None, config: ReBasedConfig
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in `given` or else in `folder`, or `None` if `folder` has none."""
    path = folder if given is None else Path(given)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        if given is not None:
            raise ConversionError(
                f"--tokenizer {str(path)!r} must be a folder with one of {', '.join(TOKENIZER_FILES)}."
            )
        return None
    try:
        tokens = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # each tokenizer class has its own errors
        raise ConversionError(f"The tokenizer in {str(path)!r} cannot be loaded: {error}") from error
    last = max(tokens.get_vocab().values(), default=0)
    if last >= config.vocab_size:
        raise ConversionError(
            f"The tokenizer in {str(path)!r} has the token id {last}, but the model's vocab_size is "
            f"{config.vocab_size}."
        )
    return tokens


def load_generation_config(
    folder: Path, config: ReBasedConfig, tokens: PreTrainedTokenizerBase | None
) -> GenerationConfig:
    """Return the settings in `folder`, or those that follow from its configuration, with the special tokens.

    Raises:
        ConversionError: the settings in `folder` are not valid.
    """
    if (folder / "generation_config.json").is_file():
        try:
            settings = GenerationConfig.from_pretrained(folder)
            settings.validate(strict=True)
        except Exception as error:  # ValueError, OSError and whatever odd values raise
            raise ConversionError(f"generation_config.json in {str(folder)!r} is not valid: {error}") from error
    else:
        settings = GenerationConfig.from_model_config(config)
    if tokens is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(settings, name) is None:
                setattr(settings, name, getattr(tokens, name))
    return settings


def _refusal(error: pickle.UnpicklingError) -> str:
    """Return why torch refuses a pickle, without its advice to load the file with weights_only=False."""
    said = str(error)
    found = re.search(r"GLOBAL [\w.]+", said) or re.search(r"(?<=WeightsUnpickler error:)\s*\S.*", said)
    return "weights only load failed" if found is None else found.group().strip()[:300]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
