"""The data of the `mad` tasks: made from a seed, nothing is downloaded."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from datasets import Dataset


# lm-eval loads this file by its path. Its console script does not find a checkout that is not installed.
if importlib.util.find_spec("modeling_rebased") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from modeling_rebased.eval.tasks import check_words, checks_metadata
from modeling_rebased.training import mad
from modeling_rebased.training.mqar import symbols, to_text
from modeling_rebased.training.random_numbers import few_of


@checks_metadata
def mad_dataset(
    mad_task: str,
    seed: int = 0,
    num_examples: int = 128,
    queries: int = 16,
    vocab_size: int | None = None,
    length: int | None = None,
    noise_vocab_size: int | None = None,
    noise: float | None = None,
    copy: int | None = None,
    **run: object,
) -> dict[str, Dataset]:
    """Return the test documents, one a question: the tokens before the answer, and the answer.

    Args:
        mad_task: one of MAD's, set by each YAML file.
        seed: of the test set; `--metadata '{"seed": 1}'` changes it, and likewise all that follows.
        num_examples: sequences.
        queries: how many of a sequence's questions are asked at most, chosen from the seed.
        vocab_size, length, noise_vocab_size, noise, copy: sizes of the task, by default the authors' base sizes.
        **run: what lm-eval adds to the metadata of a run, among it the name of the model.

    Raises:
        ValueError: a size that the task cannot have, or a model that does not know the task's words.
    """
    base = mad.BASE[mad_task]
    spec = mad.MADSpec(
        mad_task,
        base.vocab_size if vocab_size is None else vocab_size,
        base.length if length is None else length,
        base.noise_vocab_size if noise_vocab_size is None else noise_vocab_size,
        base.noise if noise is None else noise,
        base.copy if copy is None else copy,
    )
    check_words(symbols(spec.vocab_size), "vocab_size", run)
    tokens, targets = mad.make_examples(spec, num_examples, seed=seed, split="test")
    documents: dict[str, list] = {"text": [], "value": [], "example": [], "position": []}
    for n, t in few_of(targets >= 0, queries, seed=seed).nonzero().tolist():
        documents["text"].append(to_text(tokens[n, : t + 1].tolist()))
        documents["value"].append(to_text([int(targets[n, t])]))
        documents["example"].append(n)
        documents["position"].append(t)
    return {"test": Dataset.from_dict(documents)}
