"""The data and the measures of the `icll` task: made from a seed, nothing is downloaded."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset


# lm-eval loads this file by its path. Its console script does not find a checkout that is not installed.
if importlib.util.find_spec("modeling_rebased") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from modeling_rebased.eval.tasks import check_words, checks_metadata
from modeling_rebased.training import icll
from modeling_rebased.training.mqar import symbols as words
from modeling_rebased.training.mqar import to_text
from modeling_rebased.training.random_numbers import few_of


@checks_metadata
def icll_dataset(
    seed: int = 0,
    num_examples: int = 128,
    queries: int = 8,
    symbols: int = icll.ICLLSpec.symbols,
    max_states: int = icll.ICLLSpec.max_states,
    min_strings: int = icll.ICLLSpec.min_strings,
    max_strings: int = icll.ICLLSpec.max_strings,
    longest_string: int = icll.ICLLSpec.max_length,
    **run: object,
) -> dict[str, Dataset]:
    """Return the test documents: the text up to a place in a string, and two distributions of the next token there.

    Args:
        seed: of the test set; `--metadata '{"seed": 1}'` changes it, and likewise all that follows.
        num_examples: automata, with one example each.
        queries: how many places of an example are asked at most, chosen from the seed. No separator follows there.
        symbols, max_states, min_strings, max_strings: sizes of the task (training/icll.py).
        longest_string: most symbols in a string. `max_length` is a name of lm-eval's, for the length of a model.
        **run: what lm-eval adds to the metadata of a run, among it the name of the model.

    Raises:
        ValueError: a size that the task cannot have, or a model that does not know the task's words.
    """
    spec = icll.ICLLSpec(symbols, max_states, min_strings, max_strings, longest_string)
    check_words(words(spec.vocab_size), "symbols", run)
    examples = icll.make_examples(spec, num_examples, seed=seed, split="test")
    tokens, exact, ngram = examples.input_ids(), examples.next_tokens(), icll.ngram_next_tokens(examples)
    documents: dict[str, list] = {"text": [], "tokens": [], "automaton": [], "ngram": []}
    for n, t in few_of(examples.targets() >= 0, queries, seed=seed).nonzero().tolist():
        documents["text"].append(to_text(tokens[n, : t + 1].tolist()))
        documents["tokens"].append(words(spec.vocab_size))
        documents["automaton"].append(exact[n, t].tolist())
        documents["ngram"].append(ngram[n, t].tolist())
    return {"test": Dataset.from_dict(documents)}


def process_results(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return whether the most likely token is legal, and the distances of the model's distribution to the two."""
    likelihoods = [float(likelihood) for likelihood, _ in results]
    greedy = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    model = [math.exp(likelihood) for likelihood in likelihoods]
    return {
        "acc": float(doc["automaton"][greedy] > 0),
        "distance_to_automaton": sum(abs(p - q) for p, q in zip(model, doc["automaton"])),
        "distance_to_3gram": sum(abs(p - q) for p, q in zip(model, doc["ngram"])),
    }
