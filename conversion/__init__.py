"""Convert checkpoints of other formats to this one and back.

Each command of `rebased-convert` (`cli.py`) is a function here, with the same arguments. docs/conversion.md says what
is exact and what is approximate.
"""

from .authors import from_authors, to_authors
from .based import from_based
from .fla import from_fla, load_attention, to_fla
from .hub import export
from .kernels import export_kernels
from .linearize import linearize
from .report import ConversionError, Report
from .to_rebased import to_rebased
from .verify import verify


__all__ = [
    "ConversionError",
    "Report",
    "export",
    "export_kernels",
    "from_authors",
    "from_based",
    "from_fla",
    "linearize",
    "load_attention",
    "to_authors",
    "to_fla",
    "to_rebased",
    "verify",
]
