"""Write docs/api.md from the docstrings of the public functions and classes.

    python -m docs.make_api            # writes docs/api.md
    python -m docs.make_api --check    # changes nothing, and fails if docs/api.md is stale

A docstring may have sections (Args, Returns, Raises, Example) in Google's style, and fenced code.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


PAGE = Path(__file__).with_name("api.md")
# The public modules, and of those without `__all__` the names that are public.
MODULES: dict[str, tuple[str, ...]] = {
    "modeling_rebased": (),
    "modeling_rebased.configuration": ("config_names", "config_path"),
    "modeling_rebased.conversion": (),
    "modeling_rebased.training.byte_tokenizer": ("byte_tokenizer",),
    "modeling_rebased.eval.tasks": ("tasks_path",),
}
SECTIONS = {
    "Args:": "Arguments",
    "Attributes:": "Attributes",
    "Returns:": "Returns",
    "Raises:": "Raises",
    "Example:": "Example",
}
INTRODUCTION = """\
# API

This page lists the public functions and classes of the package with their arguments. You need it to call them from
your own code. `python -m docs.make_api` writes it from the docstrings, so do not edit it by hand.

In the shapes, B is the number of sequences, T the number of tokens, F the feature dimension per head and D the value
dimension per head. `H_q` counts query heads and `H_kv` counts key and value heads. Commands are described on the pages
for [training](training.md), [conversion](conversion.md) and [getting started](getting-started.md).
"""


def signature(name: str, function: Any) -> str:
    """Return the call of a function as Python code, one argument per line where it is long."""

    def text(annotation: Any) -> str:
        written = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        return re.sub(r"modeling_rebased\.[\w.]*\.(?=[A-Z])", "", written)  # a class of the package by its name alone

    found = inspect.signature(function)
    parts = []
    for parameter in found.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{parameter.name}: {text(parameter.annotation)}{default}")
    end = "" if found.return_annotation is inspect.Signature.empty else f" -> {text(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) < 100 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){end}"


def entries(lines: list[str]) -> Iterator[str]:
    """Yield the entries of a section as items of a list: an entry begins at the least indentation."""
    least = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    item: list[str] = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) == least and item:
            yield " ".join(item)
            item = []
        if line.strip():
            item.append(line.strip())
    if item:
        yield " ".join(item)


def as_markdown(docstring: str) -> str:
    """Return a docstring as Markdown."""
    lines = inspect.cleandoc(docstring).split("\n")
    out: list[str] = []
    i = 0
    while i < len(lines):
        title = SECTIONS.get(lines[i].strip())
        if title is None or lines[i] != lines[i].strip():
            out.append(lines[i])
            i += 1
            continue
        end = i + 1
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
            end += 1
        body = lines[i + 1 : end]
        out += ["", f"**{title}**", ""]
        if any(line.strip() for line in body):
            if title in ("Arguments", "Attributes", "Raises"):
                for item in entries(body):
                    out.append("- " + re.sub(r"^([\w`, *]+?)( \(|:)", _as_code, item))
            else:
                least = min(len(line) - len(line.lstrip()) for line in body if line.strip())
                out += [line[least:] for line in body]
        out.append("")
        i = end
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def _as_code(match: re.Match) -> str:
    names = ", ".join(f"`{name.strip().strip('`')}`" for name in match[1].split(","))
    return names + match[2]


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for module_name, public in MODULES.items():
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name}\n")
        for name in public or module.__all__:
            thing = getattr(module, name)
            parts.append(f"### {name}\n")
            if inspect.isfunction(thing):
                parts.append(f"```python\n{signature(name, thing)}\n```\n")
            parts.append(as_markdown(thing.__doc__) + "\n")
            forward = vars(thing).get("forward") if inspect.isclass(thing) else None
            if forward is not None and forward.__doc__ and "[`Generic" not in forward.__doc__:  # the library's own
                parts.append("`forward`:\n\n" + as_markdown(forward.__doc__) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Write the page, or with --check tell whether it is stale."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is stale")
    check = parser.parse_args(argv).check
    made = page()
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made
    if stale and check:
        sys.exit("docs/api.md is stale: run python -m docs.make_api")
    if stale:
        PAGE.write_text(made, encoding="utf-8")
        print("docs/api.md was written")


if __name__ == "__main__":
    main()
