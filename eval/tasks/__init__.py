"""lm-eval tasks. `lm-eval run --include_path "$(rebased-tasks)" --tasks heldout_english ...` finds them."""

import argparse
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def tasks_path() -> str:
    """Return the folder that lm-eval's `--include_path` wants."""
    return str(Path(__file__).resolve().parent)


AT_LEAST_ONE = ("num_examples", "queries", "distance")


def checks_metadata(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of documents that refuses what it cannot use in `--metadata`: misspelt names, and no numbers.

    lm-eval hands over `--model_args` too, so a name that is like none of the maker's own is left alone. An argument
    with the annotation `int` or `float` arrives as such a number, and those of `AT_LEAST_ONE` are at least 1.

    Args:
        make: takes what lm-eval's `custom_dataset` gets. What it does not name is ignored.
    """
    parameters = inspect.signature(make, eval_str=True).parameters
    known = {
        name: parameter.annotation
        for name, parameter in parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }

    @functools.wraps(make)
    def checked(**given: Any) -> Any:
        for name, value in given.items():
            meant = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if meant:
                raise ValueError(f"--metadata has {name!r}, which the task does not know; it knows {meant[0]!r}")
            if known.get(name) in (int, int | None, float, float | None) and value is not None:
                given[name] = _number(name, value, whole=known[name] in (int, int | None))
        return make(**given)

    return checked


def _number(name: str, value: Any, whole: bool) -> int | float:
    """Return a value of the metadata as a number."""
    least = 1 if name in AT_LEAST_ONE else None
    try:
        number = value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or (whole and number != int(number)):
        raise ValueError(f"{name} in --metadata must be a {'whole ' if whole else ''}number, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} in --metadata must be at least {least}, got {value!r}")
    return int(number) if whole else number


def check_words(words: Sequence[str], option: str, run: Mapping[str, Any]) -> None:
    """Refuse a task of words that the model's tokenizer does not have, where that knows whole words and no others.

    Such a tokenizer (training.mqar.build_tokenizer) has the words of the task that its model was trained on. Of a word
    that it lacks it says "WordLevel error: Missing [UNK] token", and nothing of the task.

    Args:
        words: of the task.
        option: the name in `--metadata` that sets their number.
        run: what lm-eval adds to the metadata of a run, which is the model's arguments. A model that was handed over
            as an object is not among them, so it is not checked.

    Raises:
        ValueError: the tokenizer lacks a word of the task.
    """
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer

    name = run.get("tokenizer") or run.get("pretrained")
    if not isinstance(name, str):
        return
    source = {key: run[key] for key in ("revision", "subfolder") if run.get(key)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=bool(run.get("trust_remote_code", False)), **source
        )
    except (OSError, ValueError):  # lm-eval, which loads the model, says what is wrong with it
        return
    if not isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), WordLevel):
        return
    known = tokenizer.get_vocab()
    if missing := [word for word in words if word not in known]:
        raise ValueError(
            f"the task has {len(words)} words and the tokenizer of {name} only {len(known)}, without {missing[0]!r}: "
            f"--metadata must give the sizes that the model was trained on, here {option!r} above all; the model's "
            "card has the command"
        )


def main(argv: list[str] | None = None) -> None:
    """Print that folder; the console script `rebased-tasks` and `python -m modeling_rebased.eval.tasks`."""
    argparse.ArgumentParser(
        "rebased-tasks", description="Print the folder of these lm-eval tasks.", allow_abbrev=False
    ).parse_args(argv)
    print(tasks_path())
