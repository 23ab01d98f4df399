"""Tables of docs/results.md: MAD, in-context language learning, language models and their corpus."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import Any

from modeling_rebased.eval import plot_icll, plot_mad
from modeling_rebased.eval.plot_language_models import without_seed
from modeling_rebased.eval.plot_mqar import read_runs
from modeling_rebased.eval.plot_style import label_of

from .form import RESULTS, ROOT, TABLES, down, results, shown, table


def finished(name: str) -> list[dict[str, Any]]:
    """Return the finished runs in a folder of results."""
    return [run for run in read_runs(sorted((RESULTS / name).glob("*.jsonl"))) if not run.get("stopped")]


TABLES |= {
    "mad-scores": lambda: plot_mad.markdown(finished("mad")),
    "icll": lambda: plot_icll.markdown(finished("icll")),
}


@shown("mad-fuzzy")
def mad_fuzzy() -> str:
    """Return the accuracy on fuzzy recall at its best epoch and at the last, a row per model."""
    runs = [run for run in finished("mad") if run["task"] == "fuzzy_recall"]
    rates = sorted({run["lr"] for run in runs})
    found: dict[str, dict[float, list[str]]] = defaultdict(dict)
    for run in runs:
        accuracies = [entry["accuracy"] for entry in run["history"]]
        found[label_of(run["model"])][run["lr"]] = [f"{max(accuracies):.3f}", f"{accuracies[-1]:.3f}"]
    rows = [[model, *(figure for rate in rates for figure in figures[rate])] for model, figures in found.items()]
    return table(["model", *(f"rate {rate:g}, {when}" for rate in rates for when in ("best", "end"))], rows)


@shown("small-models")
def small_models() -> str:
    """Return the figures of the three byte-level models of 6.65 million parameters."""
    figures = json.loads((ROOT / "checkpoints/english-6m/training_figures.json").read_text(encoding="utf-8"))
    parameters = {"english-6m": figures["parameters"], **figures["twins_parameters"]}
    names = {"english-6m": "ReBased", "english-6m-based": "Based", "english-6m-softmax": "softmax"}
    found = figures["heldout_english"]
    return down(
        ({"model": names[name], "parameters": parameters[name], **found[name]} for name in names),
        "model: {model} | parameters: {parameters:,} | bits per byte: {bits_per_byte:.3f} | "
        "byte perplexity: {byte_perplexity:.3f} | word perplexity: {word_perplexity:,.0f}",
    )


@shown("stories")
def stories() -> str:
    """Return the figures of the models of short stories, and of the judge's own stories."""
    figures = json.loads((ROOT / "checkpoints/stories-12m/training_figures.json").read_text(encoding="utf-8"))[
        "models"
    ]
    names = {"stories-12m": "ReBased", "stories-12m-based": "Based", "stories-12m-softmax": "softmax"}
    names["judge"] = "SmolLM2-135M-Instruct"
    judged = {row["model"]: row for row in results("stories/stories.csv")}
    rows = []
    for name, label in names.items():
        own = figures.get(name)
        size = f"{own['parameters']:,}" if own else "135 million"
        bits = own["eval_bits_per_byte"] if own else None
        rows.append({**judged.get(name, dict.fromkeys(judged["judge"])), "model": label, "size": size, "bits": bits})
    return down(
        rows,
        "model: {model} | parameters: {size} | bits per byte, held out: {bits:.4f} | ended: {ended:.1%} | "
        "persons: {persons:.1%} | repeated: {repeated:.1%} | perplexity: {perplexity:.1f} | words: {words:.0f} | "
        "copied: {copied:.0%}",
    )


@shown("slices")
def slices() -> str:
    """Return the losses by slice."""
    found = json.loads((RESULTS / "recall_slices/slices.json").read_text(encoding="utf-8"))
    return down(
        ({"model": model, **row} for model, each in found.items() for row in each["slices"]),
        "model: {model:name} | slice: {slice} | bytes: {tokens:,} | share: {share:.1%} | "
        "loss, nats per byte: {loss:.4f} | perplexity: {perplexity:.3f} | accuracy: {accuracy:.1%}",
        words=2,
    )


@shown("corpus-domains")
def corpus_domains() -> str:
    """Return the size of each domain of the mixed corpus, and of its held-out part."""
    domains: dict[str, dict[str, Any]] = {}
    for row in results("corpus/corpus.csv"):
        counts = {f"{row['part']}_{key}": value for key, value in row.items() if isinstance(value, int)}
        domains.setdefault(row["domain"], {}).update(counts)
    keys = next(iter(domains.values()))
    domains["all"] = {key: sum(row[key] for row in domains.values()) for key in keys}
    rows = []
    for name, row in domains.items():
        millions = {"bytes": row["train_bytes"] / 1e6, "tokens": row["train_tokens"] / 1e6}
        rows.append({"domain": name, **row, **millions})
    return down(
        rows,
        "domain: {domain} | packages: {train_packages} | documents: {train_documents:,} | "
        "million bytes: {bytes:.1f} | million tokens: {tokens:.1f} | held-out documents: {heldout_documents:,} | "
        "held-out tokens: {heldout_tokens:,}",
    )


def mean_of_seeds(values: list[float], digits: int = 3) -> str:
    """Return the mean of the seeds and, where there are several, half the distance of the least and the largest."""
    mean, half = statistics.fmean(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def by_model(rows: list[dict[str, Any]], kind: str, value: str) -> tuple[list[Any], list[list[str]]]:
    """Return the different values of column `kind`, and for each model its label and its mean `value` at each."""
    kinds = list(dict.fromkeys(row[kind] for row in rows))
    found: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[without_seed(row["model"])][row[kind]].append(row[value])
    return kinds, [[label_of(model), *(mean_of_seeds(of[kind]) for kind in kinds)] for model, of in found.items()]


def over_all(name: str) -> list[dict[str, Any]]:
    """Return the rows over all domains of slices.csv that are of this slice, or with "" of every slice."""
    rows = results("language_models/slices.csv")
    return [row for row in rows if row["domain"] == "all" and name in ("", row["slice"])]


def by_length() -> list[dict[str, Any]]:
    """Return the loss of each model over the same documents in windows of each length."""
    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in results("language_models/positions.csv"):
        total = sums[row["model"], row["length"]]
        total[0] += row["loss"] * row["tokens"]
        total[1] += row["tokens"]
    return [{"model": model, "length": n, "loss": loss / count} for (model, n), (loss, count) in sums.items()]


@shown("lm-domains")
def lm_domains() -> str:
    """Return bits per byte of each domain, and the perplexity over all domains."""
    rows = results("language_models/domains.csv")
    domains, lines = by_model(rows, "domain", "bits_per_byte")
    parameters = {label_of(row["model"]): f"{row['parameters']:,}" for row in rows}
    perplexities: dict[str, list[float]] = defaultdict(list)
    for row in over_all("all"):
        perplexities[label_of(row["model"])].append(row["perplexity"])
    return table(
        ["model", "parameters", *domains, "perplexity of all"],
        [[name, parameters[name], *bits, mean_of_seeds(perplexities[name], 2)] for name, *bits in lines],
    )


@shown("lm-lead")
def lm_lead() -> str:
    """Return how far ReBased is ahead of Based with each seed, beside the differences between seeds of one model."""
    cases: dict[str, dict[str, float]] = defaultdict(dict)  # the loss by model
    for row in over_all(""):
        cases["all tokens" if row["slice"] == "all" else f"{row['slice']} tokens"][row["model"]] = row["loss"]
    for row in results("language_models/distance.csv"):
        if row["distance_from"] >= 128:
            cases[f"recall at a distance from {row['distance_from']:,}"][row["model"]] = row["loss"]
    for row in by_length():
        cases[f"windows of {row['length']:,} tokens"][row["model"]] = row["loss"]
    rows = []
    for case, loss in cases.items():
        leads = [loss["based" + seed] - loss["rebased" + seed] for seed in ("", ", seed 1")]
        between = [abs(loss[model] - loss[f"{model}, seed 1"]) for model in ("rebased", "based")]
        rows.append([case, *(f"{lead:+.3f}" for lead in leads), *(f"{each:.3f}" for each in between)])
    heads = ["lead of ReBased, seed 0", "lead of ReBased, seed 1", "ReBased, between seeds", "Based, between seeds"]
    return table(["loss, nats per token", *heads], rows)


@shown("lm-slices")
def lm_slices() -> str:
    """Return the loss of each slice over all domains, and its share of the tokens."""
    rows = over_all("")
    slices, lines = by_model(rows, "slice", "loss")
    shares = {row["slice"]: f"{row['share']:.1%}" for row in rows}
    return table(["loss, nats per token", *slices], [*lines, ["share of tokens", *(shares[name] for name in slices)]])


@shown("lm-distance")
def lm_distance() -> str:
    """Return the loss of recall tokens by the distance to the earlier bigram."""
    rows = [row for row in results("language_models/distance.csv") if row["distance_from"] >= 8]
    distances, lines = by_model(rows, "distance_from", "loss")
    return table(["loss at a distance from", *(f"{distance:,}" for distance in distances)], lines)


@shown("lm-lengths")
def lm_lengths() -> str:
    """Return the loss of the same documents in windows of each length."""
    lengths, lines = by_model(by_length(), "length", "loss")
    return table(["tokens per window", *(f"{length:,}" for length in lengths)], lines)


@shown("lm-speed")
def lm_speed() -> str:
    """Return speed and memory of a training step of each model."""
    columns = "model: {model:name} | tokens per second: {training_tokens_per_second:,.0f} | "
    return down(results("language_models/speed.csv"), columns + "peak, GiB: {training_gib:.1f}")
