"""Write a checkpoint whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import GenerationConfig, PreTrainedTokenizerBase

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.training import folders

from .layout import State
from .record import write_record
from .report import ConversionError


@contextlib.contextmanager
def written(destination: str | os.PathLike, overwrite: bool = False, source: Any = None) -> Iterator[Path]:
    """Give a path to write to that becomes `destination` when the block ends, and vanishes if the block fails.

    Raises:
        ConversionError: `destination` exists and `overwrite` is false, or writing it would replace `source`.
    """
    with folders.written(check_destination(destination, overwrite, source)) as path:
        yield path


def check_destination(destination: str | os.PathLike, overwrite: bool = False, source: Any = None) -> Path:
    """Return the absolute path of `destination`, after checking that it may be written.

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
        record, unused: what the conversion back needs; see `RECORD`.
        generation_config: generation settings, instead of those that follow from the configuration.
        tokenizer, card: written beside the model.
        max_shard_size: in bytes, or as "5GB".
    """
    with torch.device("meta"):
        model = ReBasedForCausalLM(config)
    # Tensors of one file may be views of one another, which safetensors refuses.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(own, strict=False, assign=True)
    model.tie_weights()
    if generation_config is not None:
        model.generation_config = generation_config
    folders.save_model(folder, model, tokenizer, card, max_shard_size)
    write_record(folder, record, unused)


def write_state_dict(path: Path, state: State, wrapper: str | None = None) -> None:
    """Write tensors as `torch.save` does, or as safetensors if the name ends in ".safetensors"."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        save_file(own, path, metadata={"format": "pt"})
    else:
        torch.save(state if wrapper is None else {wrapper: state}, path)
