"""Compute the metrics of the `rebased_zeroshot` tasks: lm-eval's own, and as "score" the one that papers print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


# One (log-likelihood, is the greedy choice) for each continuation that was scored.
Results = Sequence[tuple[float, bool]]


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _multiple_choice(results: Results, choices: Sequence[str], gold: int, score: str) -> dict[str, float]:
    likelihoods = [float(likelihood) for likelihood, _ in results]
    metrics = {
        "acc": float(_best(likelihoods) == gold),
        "acc_norm": float(_best([x / len(c) for x, c in zip(likelihoods, choices)]) == gold),
    }
    return {"score": metrics[score], **metrics}


def lambada(doc: dict[str, Any], results: Results) -> dict[str, float]:
    """Score LAMBADA by whether the last word is the model's greedy choice."""
    likelihood, greedy = results[0]
    return {"score": float(greedy), "acc": float(greedy), "perplexity": float(likelihood)}


def hellaswag(doc: dict[str, Any], results: Results) -> dict[str, float]:
    """Score HellaSwag by accuracy, with the likelihood per character."""
    return _multiple_choice(results, doc["choices"], int(doc["label"]), "acc_norm")


def piqa(doc: dict[str, Any], results: Results) -> dict[str, float]:
    """Score PIQA by accuracy."""
    return _multiple_choice(results, [doc["sol1"], doc["sol2"]], int(doc["label"]), "acc")


def _arc(doc: dict[str, Any], results: Results, score: str) -> dict[str, float]:
    gold = doc["choices"]["label"].index(doc["answerKey"])
    return _multiple_choice(results, doc["choices"]["text"], gold, score)


def arc_easy(doc: dict[str, Any], results: Results) -> dict[str, float]:
    """Score ARC-easy by accuracy."""
    return _arc(doc, results, "acc")


def arc_challenge(doc: dict[str, Any], results: Results) -> dict[str, float]:
    """Score ARC-challenge by accuracy, with the likelihood per character."""
    return _arc(doc, results, "acc_norm")


def winogrande(doc: dict[str, Any], results: Results) -> dict[str, float]:
    """Score WinoGrande by accuracy."""
    # The options stand in the context and the end of the sentence is scored after each, so no length differs.
    likelihoods = [float(likelihood) for likelihood, _ in results]
    acc = float(_best(likelihoods) == {"1": 0, "2": 1}[doc["answer"]])
    return {"score": acc, "acc": acc}
