"""Tables of docs/conversion.md: the students of SmolLM2 beside their teacher."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from .form import RESULTS, down, shown, table


def students() -> dict[str, Any]:
    """Return results.json of the comparison of students with their teacher."""
    return json.loads((RESULTS / "conversion/smollm2-h100/results.json").read_text(encoding="utf-8"))


def perplexities() -> dict[tuple[str, str, str, int], float]:
    """Return perplexities by model, stage, file and length."""
    rows = students()["perplexity"]
    return {(row["model"], row["stage"], row["file"], row["length"]): row["perplexity"] for row in rows}


@shown("stages")
def stages() -> str:
    """Return held-out perplexity by stage at 1,024 tokens."""
    found = perplexities()
    tokens = {(row["model"], row["stage"]): row["tokens"] / 1e6 for row in students()["training"]}
    teacher = found["teacher", "", "heldout", 1024]
    found["teacher", "logits", "heldout", 1024] = teacher  # stands in the column of the finished students
    rows = []
    for model, goal in (("teacher", None), ("pure", 1.60), ("window", 1.25), ("hybrid", 1.10)):
        row: dict[str, Any] = {"model": model, "goal": goal}
        for stage in ("start", "transfer", "logits"):
            value = found.get((model, stage, "heldout", 1024))
            times = value and value / teacher
            row[stage] = {"perplexity": value, "times": times, "tokens": tokens.get((model, stage))}
        rows.append(row)
    return down(
        rows,
        "model: {model} | start: {start[perplexity]:3sig} | times teacher: {start[times]:.2f} | "
        "after transfer: {transfer[perplexity]:3sig} | times teacher: {transfer[times]:.2f} | "
        "after logits: {logits[perplexity]:3sig} | times teacher: {logits[times]:.2f} | goal: {goal:.2f} | "
        "million tokens of transfer: {transfer[tokens]:.1f} | of logits: {logits[tokens]:.1f}",
    )


@shown("registers")
def registers() -> str:
    """Return the finished students' perplexity by text and length, as a multiple of the teacher's."""
    found = perplexities()
    columns = [(file, length) for file in ("heldout", "linux-process") for length in (1024, 2048)]
    names = {"heldout": "held-out text", "linux-process": "Linux documentation"}
    rows = [
        [
            model,
            *(
                f"{found[model, 'logits', file, length] / found['teacher', '', file, length]:.2f}"
                for file, length in columns
            ),
        ]
        for model in ("pure", "window", "hybrid")
    ]
    return table(["model", *(f"{names[file]}, {length:,} tokens" for file, length in columns)], rows)


@shown("answers")
def answers() -> str:
    """Return how the teacher judges the answers."""
    return down(
        ({"model": name, **row} for name, row in students()["answers"].items()),
        "model: {model} | teacher's perplexity of the answers: {judged:.1f} | "
        "four-word runs said before: {repeated:.1%}",
    )


@shown("students-decoding")
def students_decoding() -> str:
    """Return memory and time of decoding after 32,768 tokens."""
    by_model: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in students()["speed"]:
        by_model[row["model"]][f"at_{row['batch']}"] = {**row, "cache_gib": row["cache_mib"] / 1024}
    return down(
        ({"model": model, **row} for model, row in by_model.items()),
        "model: {model} | cache at batch 1, MiB: {at_1[cache_mib]:.0f} | "
        "cache at batch 32, GiB: {at_32[cache_gib]:.1f} | peak at batch 32, GiB: {at_32[peak_gib]:.1f} | "
        "ms per step, batch 1: {at_1[ms]:.0f} | ms per step, batch 32: {at_32[ms]:.0f}",
    )


def mixed_text() -> dict[str, Any]:
    """Return results.json of the students that were trained on a mixed corpus and the teacher's samples."""
    return json.loads((RESULTS / "conversion/smollm2-h200/results.json").read_text(encoding="utf-8"))


@shown("mixed-stages")
def mixed_stages() -> str:
    """Return the students' perplexity after each stage, as a multiple of the teacher's, at 1,024 tokens."""
    results = mixed_text()
    short = [row for row in results["perplexity"] if row["length"] == 1024]
    found = {(row["model"], row["stage"], row["file"]): row["perplexity"] for row in short}
    training = {(row["model"], row["stage"]): row for row in results["training"]}
    rows = []
    for model in ("hybrid", "pure"):
        for stage in ("start", "transfer", "logits", "long"):
            row: dict[str, Any] = {"model": model, "stage": stage, "tokens": None, "rate": None}
            if (model, stage) in training:
                tokens, seconds = (training[model, stage][key] for key in ("tokens", "seconds"))
                row |= {"tokens": tokens / 1e6, "rate": tokens / seconds}
            for register in ("books", "changelogs"):
                file = f"{register}-1"
                row[register] = found[model, stage, file] / found["teacher", "", file]
            rows.append(row)
    return down(
        rows,
        "model: {model} | after stage: {stage} | million tokens: {tokens:.1f} | "
        "tokens per second: {rate:,.0f} | books: {books:.2f} | changelogs: {changelogs:.2f}",
    )


@shown("mixed-recall")
def mixed_recall() -> str:
    """Return the share of numbers and names that are recalled, by distance."""
    rows = mixed_text()["recall"]
    right = {(row["model"], row["kind"], row["distance"]): row["right"] for row in rows}
    columns = list(dict.fromkeys((row["kind"], row["distance"]) for row in rows))
    return table(
        ["model", *(f"{kind}, {distance:,}" for kind, distance in columns)],
        [[model, *(f"{right[(model, *each)]:.0%}" for each in columns)] for model in ("teacher", "hybrid", "pure")],
    )
