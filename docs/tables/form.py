"""Register what makes a table, read results, and write tables in Markdown."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from modeling_rebased.eval.plot_style import label_of
from modeling_rebased.eval.plots import read_csv


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"


TABLES: dict[str, Callable[[], str]] = {}  # what makes each table, by its name in a page


def shown(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Return a decorator that makes a function the one that writes the table NAME."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        TABLES[name] = function
        return function

    return register


def table(head: list[Any], rows: list[list[Any]], words: int = 1) -> str:
    """Return a table in Markdown, its first `words` columns flush left and the others flush right."""
    rule = ["---" if i < words else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, rule, *rows])


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, below 1 so many decimals, thousands apart; "" for `None`."""
    if value is None:
        return ""
    places = digits - len(str(int(abs(value)))) if abs(value) >= 1 else digits
    return f"{value:,.{max(0, places)}f}"


class Cells(string.Formatter):
    """Format the cells of a table.

    Beside Python's own formats, `{x:3sig}` gives three significant digits, `{x:name}` the name of a model or method,
    and `{x:yes}` yes or no. A field without a value gives an empty cell.
    """

    def format_field(self, value: Any, form: str) -> str:
        """Return the text of one field."""
        if value is None:
            return ""
        if form.endswith("sig"):
            return number(value, int(form.removesuffix("sig")))
        if form == "name":
            return label_of(value)
        if form == "yes":
            return "yes" if str(value) == "True" else "no"
        return super().format_field(value, form)


def cells_of(columns: str, rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows that `columns` describes: "heading: format of the fields | heading: ..."."""
    parts = [part.partition(": ") for part in columns.split(" | ")]
    forms = [form for _, _, form in parts]
    return [head for head, _, _ in parts], [[Cells().vformat(form, (), row) for form in forms] for row in rows]


def down(rows: Iterable[dict[str, Any]], columns: str, words: int = 1) -> str:
    """Return a table with one line per row of results. `cells_of` explains `columns`, and `table` explains `words`."""
    return table(*cells_of(columns, rows), words)


def across(rows: Iterable[dict[str, Any]], lines: str) -> str:
    """Return a table with one column per row of results. The first of `lines` is the heading (`cells_of`)."""
    names, found = cells_of(lines, rows)
    head, *values = ([name, *row] for name, row in zip(names, zip(*found)))
    return table(head, values)


def results(name: str) -> list[dict[str, Any]]:
    """Return the rows of a CSV file under eval/results."""
    return read_csv(RESULTS / name)
