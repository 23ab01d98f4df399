"""Tell the user about a conversion: its report, its errors and its progress."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from tqdm import tqdm


Item = TypeVar("Item")


class ConversionError(ValueError):
    """Signal an input or argument that cannot be converted: what it is, what was given and what is allowed."""


def sentence(error: Exception) -> str:
    """Return the message of an error of other code as a sentence, with one full stop."""
    return f"{str(error).rstrip('.')}."


def progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    """Yield `items`, with a progress bar on a terminal."""
    return tqdm(items, desc=what, disable=None, leave=False)


@dataclass
class Report:
    """Hold what a conversion did, or would do in a dry run.

    Attributes:
        source, destination: paths of the source and the destination.
        rows: (name in the source, what it is, name in the destination), in the destination's order. The name is "-"
            where a tensor has no counterpart.
        notes: sentences that each tell what was inferred or assumed.
        dry_run: whether nothing was written.
        closing: the last line of the report, instead of the usual one.
    """

    source: str
    destination: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    closing: str | None = None

    def map(self, source: str, tensor: torch.Tensor, destination: str) -> None:
        """Add a row that says that `source` becomes `destination`."""
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


def some(names: list[str]) -> str:
    """Return a list of names for a message: the first few, and how many more there are."""
    if not names:
        return "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
