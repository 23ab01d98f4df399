"""Checkpoints in and out: other formats to and from this one.

Each command of `rebased-convert` (`cli.py`) is a function here, with the same arguments. docs/conversion.md says what
is exact and what is not.
"""

from .authors import from_authors, to_authors
from .files import ConversionError, Report


__all__ = ["ConversionError", "Report", "from_authors", "to_authors"]
