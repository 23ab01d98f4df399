"""Write a file or folder whole, or not at all; and the folder of a model."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def written(destination: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to that becomes `destination` when the block ends, and vanishes if the block fails.

    The path lies in a temporary folder beside `destination`, on the same file system. The last step is a rename, so
    `destination` never holds half of a file or folder. What it was before is replaced in that step. Where a folder is
    involved that takes two renames, with nothing under the name for a moment.
    """
    path = Path(os.path.abspath(destination))
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    new, old = temporary / path.name, temporary / f"{path.name}.old"
    try:
        yield new
        if path.is_dir() or (new.is_dir() and os.path.lexists(path)):
            os.replace(path, old)
        os.replace(new, path)
    finally:
        if os.path.lexists(old) and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def write_text(destination: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 whole, or not at all. Its folder is made if it is missing."""
    with written(destination) as path:
        path.write_text(text, encoding="utf-8")


def gathered_model(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel | None:
    """Return a plain copy of a trained model on the main process, and `None` on the others.

    Every process must call it. FSDP2 and tensor parallelism keep a part of each weight on each process, and FSDP2
    gives the model another class, whose code is torch's. The copy has whole weights on the CPU and the class that its
    configuration names, and the settings of generation. The weights are gathered one at a time, so a GPU never holds
    the whole model.

    Args:
        model: a causal language model, wrapped, compiled or sharded in any way that torch and accelerate know.
        dtype: of the copy's weights.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return None
    config = deepcopy(model.config)
    config.use_cache = True  # the Trainer turns it off
    if hasattr(config, "distributed_config"):  # of tensor parallelism: all processes would have to save the copy
        del config.distributed_config
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(config)
    copy.load_state_dict({name: weight.to(dtype) for name, weight in state.items()}, assign=True)
    copy.tie_weights()
    copy.generation_config = deepcopy(model.generation_config)
    return copy


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: ModelCard | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write what `from_pretrained(folder, trust_remote_code=True)` loads: all that the Hub would get.

    Args:
        folder: a new folder, such as a path from `written`.
        model: its weights, configuration, generation settings and code are written.
        tokenizer: written beside the model. It pads on the left and knows the length that the model was trained on.
        card: written as README.md.
        max_shard_size: of one safetensors file, in bytes or as "5GB".
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        # What generate continues is the end of each row. The library's own default is 1e30 tokens.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the latter is what is written
        longest = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        for name in ("is_local", "local_files_only"):  # how it was read, which the library would write too
            tokenizer.init_kwargs.pop(name, None)
        tokenizer.save_pretrained(folder)
    if card is not None:
        card.save(folder / "README.md")
