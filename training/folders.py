"""Write a file or folder whole, or not at all; and the folder of a model."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def written(destination: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to that becomes `destination` when the block ends, and vanishes if the block fails.

    The path lies in a temporary folder beside `destination`, on the same file system, so that the last step is a
    rename: nobody ever sees half of a file or folder. What `destination` was before is replaced in that step.
    """
    path = Path(os.path.abspath(destination))
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    old = temporary / f"{path.name}.old"
    complete = False
    try:
        yield temporary / path.name
        if path.exists() or path.is_symlink():
            os.replace(path, old)
        os.replace(temporary / path.name, path)
        complete = True
    finally:
        if not complete and (old.exists() or old.is_symlink()) and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        if not complete:
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


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
        tokenizer.padding_side = "left"
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        tokenizer.save_pretrained(folder)
    if card is not None:
        card.save(folder / "README.md")
