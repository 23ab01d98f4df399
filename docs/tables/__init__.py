"""Write the tables of README.md and docs/ from the files under eval/results.

    python -m docs.tables            # rewrites what stands between the markers of each table
    python -m docs.tables --check    # changes nothing, and fails if a page is stale

A page says `<!-- table: NAME -->` where the table NAME begins and `<!-- end of table -->` where it ends. Each
module has the tables of one page or two, and `form` has what all of them use.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from . import conversion, kernels, models, overview, recall, serving, training  # noqa: F401  which fill TABLES
from .form import ROOT, TABLES


MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """Return a page with its tables made anew."""

    def fill(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"there is no table {match[2]!r}; it must be one of {', '.join(sorted(TABLES))}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> None:
    """Rewrite the tables, or with --check tell which pages are stale."""
    parser = argparse.ArgumentParser(
        "python -m docs.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is stale")
    check = parser.parse_args(argv).check
    problems = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = rewritten(text)
        if made != text and check:
            problems.append(f"{page.name} has stale tables: run python -m docs.tables")
        elif made != text:
            page.write_text(made, encoding="utf-8")
            print(f"{page.name} was rewritten")
    if problems:
        sys.exit("\n".join(problems))
