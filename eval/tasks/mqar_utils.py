"""The data of the `mqar` tasks: made from a seed, nothing is downloaded.

lm-eval loads this file by its path, outside any package, so the generator beside the tasks is loaded the same way.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from datasets import Dataset


def _load_generator() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "mqar.py"
    name = "rebased_mqar_generator"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while it loads
        spec.loader.exec_module(module)
    return sys.modules[name]


def mqar_dataset(
    length: int, num_pairs: int, seed: int = 0, num_examples: int = 128, queries: int = 16, **_: object
) -> dict[str, Dataset]:
    """Return the test documents, one a query: the sequence up to and including the repeated key, and its value.

    Args:
        length, num_pairs: the task, set by each YAML file.
        seed: of the test set; `--metadata '{"seed": 1}'` changes it, and likewise the next two.
        num_examples: sequences.
        queries: how many of a sequence's num_pairs queries are asked, chosen from the seed.
        **_: what lm-eval adds to the metadata of a run.
    """
    mqar = _load_generator()
    spec = mqar.MQARSpec(length=int(length), num_pairs=int(num_pairs))
    examples = mqar.make_examples(spec, int(num_examples), seed=int(seed), split="test")
    chosen = mqar.query_subset(spec, int(num_examples), int(queries), seed=int(seed))
    ids = examples.input_ids().tolist()
    documents: dict[str, list] = {"text": [], "value": [], "example": [], "pair": []}
    for n, pairs in enumerate(chosen.tolist()):
        for pair in pairs:
            documents["text"].append(mqar.to_text(ids[n][: int(examples.positions[n, pair]) + 1]))
            documents["value"].append(str(int(examples.values[n, pair])))
            documents["example"].append(n)
            documents["pair"].append(pair)
    return {"test": Dataset.from_dict(documents)}
