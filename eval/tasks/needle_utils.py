"""The data of the `needle` tasks: made from a seed, nothing is downloaded."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from datasets import Dataset


# lm-eval loads this file by its path. Its console script does not find a checkout that is not installed.
if importlib.util.find_spec("modeling_rebased") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from modeling_rebased.conversion.recall import KINDS, item_text
from modeling_rebased.eval.tasks import checks_metadata


LINE = 25  # tokens of the repeated sentences, by the tokenizer of SmolLM2; others differ by one or two


@checks_metadata
def needle_dataset(distance: int, num_examples: int = 50, seed: int = 0, **_: object) -> dict[str, Dataset]:
    """Return the test documents: a request, the beginning of its answer, and the value that is asked for.

    Args:
        distance: about how many tokens stand between the value and the question.
        num_examples: documents per kind of value, which are a number and a name.
        seed: of the test set; `--metadata '{"seed": 1}'` changes it, and likewise all that follows.
        **_: what lm-eval adds to the metadata of a run.
    """
    first = seed * num_examples
    items = [item_text(kind, max(1, distance // LINE), first + i) for kind in KINDS for i in range(num_examples)]
    columns = dict(zip(("request", "beginning", "value"), map(list, zip(*items))))
    return {"test": Dataset.from_dict(columns)}
