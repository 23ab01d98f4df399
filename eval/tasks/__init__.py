"""lm-eval tasks. `lm-eval run --include_path "$(rebased-tasks)" --tasks heldout_english ...` finds them."""

import argparse
import difflib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tasks_path() -> str:
    """Return the folder that lm-eval's `--include_path` wants."""
    return str(Path(__file__).resolve().parent)


def refuses_misspelt(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of documents that refuses a misspelt name in `--metadata`.

    lm-eval hands over `--model_args` too, so a name that is like none of the maker's own is left alone.

    Args:
        make: takes what lm-eval's `custom_dataset` gets. What it does not name is ignored.
    """
    kinds = {name: parameter.kind for name, parameter in inspect.signature(make).parameters.items()}
    known = [name for name, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(make)
    def checked(**given: Any) -> Any:
        for name in given:
            meant = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if meant:
                raise ValueError(f"--metadata has {name!r}, which the task does not know; it knows {meant[0]!r}")
        return make(**given)

    return checked


def main(argv: list[str] | None = None) -> None:
    """Print that folder; the console script `rebased-tasks` and `python -m modeling_rebased.eval.tasks`."""
    argparse.ArgumentParser("rebased-tasks", description="Print the folder of these lm-eval tasks.").parse_args(argv)
    print(tasks_path())
