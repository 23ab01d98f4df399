"""Read the values of a command line: what `type=` of argparse takes.

Where a value is not allowed, they say what is. argparse puts the argument's name before it. `one_line` shortens the
errors of other code for such a message.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _number(text: str, kind: type, allowed: str, holds: Callable[[Any], bool]) -> Any:
    """Read a number of a kind for which `holds` is true."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
    return value


def integer(text: str) -> int:
    """Read an integer."""
    return _number(text, int, "an integer", lambda value: True)


def count(text: str) -> int:
    """Read an integer of at least 1."""
    return _number(text, int, "an integer of at least 1", lambda value: value >= 1)


def natural(text: str) -> int:
    """Read an integer of at least 0."""
    return _number(text, int, "an integer of at least 0", lambda value: value >= 0)


def positive(text: str) -> float:
    """Read a positive number."""
    return _number(text, float, "a positive number", lambda value: 0 < value < math.inf)


def not_negative(text: str) -> float:
    """Read a number of at least 0."""
    return _number(text, float, "a number of at least 0", lambda value: 0 <= value < math.inf)


def fraction(text: str) -> float:
    """Read a number of at least 0 and less than 1."""
    return _number(text, float, "at least 0 and less than 1", lambda value: 0 <= value < 1)


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list]:
    """Return a reader of values with commas between them."""
    return lambda text: [kind(item) for item in text.split(",")]


def known_device(text: str) -> str:
    """Read the name of a device that PyTorch can compute on here."""
    gpus = torch.cuda.device_count()
    try:
        found = torch.device(text)
        if found.type != "cuda":  # whose memory is left to the process that computes
            torch.empty(0, device=found)
        elif (found.index or 0) >= gpus:
            raise RuntimeError
    except (RuntimeError, AssertionError, ImportError):  # as each kind has it
        allowed = "cpu" + "".join(f", cuda:{number}" for number in range(gpus)) + (" or cuda" if gpus else "")
        raise argparse.ArgumentTypeError(f"must be {allowed} here, got {text!r}") from None
    return text


def new_folder(text: str) -> Path:
    """Read the path of a folder to write into, which may be new."""
    path = Path(text)
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, or a new one, but {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a folder to write into, but {nearest} cannot be written")
    return path


def one_line(error: Exception) -> str:
    """Return the message of an error, which may have several lines, as one line."""
    return " ".join(str(error).split())
