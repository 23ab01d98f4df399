"""The data of the `mqar` tasks: made from a seed, nothing is downloaded."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from datasets import Dataset


# lm-eval loads this file by its path. Its console script does not find a checkout that is not installed.
if importlib.util.find_spec("modeling_rebased") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from modeling_rebased.eval.tasks import check_words, checks_metadata
from modeling_rebased.training import mqar


@checks_metadata
def mqar_dataset(
    length: int,
    num_pairs: int,
    seed: int = 0,
    num_examples: int = 128,
    queries: int = 16,
    vocab_size: int = mqar.MQARSpec.vocab_size,
    **run: object,
) -> dict[str, Dataset]:
    """Return the test documents, one a query: the sequence up to and including the repeated key, and its value.

    Args:
        length, num_pairs: the task, set by each YAML file; `--metadata '{"length": 64, "num_pairs": 4}'` sets others.
        seed: of the test set; `--metadata '{"seed": 1}'` changes it, and likewise the next two.
        num_examples: sequences.
        queries: how many of a sequence's num_pairs queries are asked, chosen from the seed.
        vocab_size: of the task; keys and values are each half of it.
        **run: what lm-eval adds to the metadata of a run, among it the name of the model.

    Raises:
        ValueError: a size that the task cannot have, or a model that does not know the task's words.
    """
    spec = mqar.MQARSpec(length=length, num_pairs=num_pairs, vocab_size=vocab_size)
    check_words(mqar.symbols(spec.vocab_size), "vocab_size", run)
    examples = mqar.make_examples(spec, num_examples, seed=seed, split="test")
    chosen = mqar.query_subset(spec, num_examples, queries, seed=seed)
    ids = examples.input_ids().tolist()
    documents: dict[str, list] = {"text": [], "value": [], "example": [], "pair": []}
    for n, pairs in enumerate(chosen.tolist()):
        for pair in pairs:
            documents["text"].append(mqar.to_text(ids[n][: int(examples.positions[n, pair]) + 1]))
            documents["value"].append(str(int(examples.values[n, pair])))
            documents["example"].append(n)
            documents["pair"].append(pair)
    return {"test": Dataset.from_dict(documents)}
