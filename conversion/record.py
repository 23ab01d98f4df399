"""Remember what a conversion needs to give back the very same file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .layout import State
from .reading import check_tensors, read_safetensors
from .report import ConversionError


# What a conversion knows of its source beyond the weights: the names and their order, so that the way back gives the
# very same file. Small, and of no use to a model that is only run.
RECORD = "conversion.json"
RECORD_TENSORS = "conversion.safetensors"


def write_record(folder: Path, record: dict[str, Any] | None, unused: State | None = None) -> None:
    """Write `RECORD`, and `RECORD_TENSORS` if there are any, into `folder`."""
    if record is not None:
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if unused:
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in unused.items()}
        save_file(own, folder / RECORD_TENSORS, metadata={"format": "pt"})


def read_record(folder: Path, source_format: str) -> tuple[dict[str, Any], State]:
    """Return the record that a conversion from `source_format` left in `folder`, or an empty one, and unused tensors.

    Raises:
        ConversionError: the record is damaged.
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


def from_record(record: dict[str, Any], state: State, unused: State) -> State | None:
    """Return the source's tensors under their own names and in their own order, by the record's `keys`.

    `keys` maps each name of the source to a name in `state`, or to null if the tensor is among `unused`. The result is
    `None` if there is no record, or if the model has changed since so that the record no longer fits.
    """
    keys = record.get("keys")
    if not isinstance(keys, dict) or set(filter(None, keys.values())) != set(state):
        return None
    if not {name for name, ours in keys.items() if ours is None} <= set(unused):
        return None
    return {name: unused[name] if ours is None else state[ours] for name, ours in keys.items()}
