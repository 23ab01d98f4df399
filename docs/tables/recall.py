"""Tables of docs/associative-recall.md, and of the same runs in docs/results.md."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections import defaultdict
from typing import Any

from modeling_rebased.eval.plot_mqar import (
    ABLATION,
    FIGURE_MODELS,
    HIDDEN,
    LENGTHS,
    PAPER_EPOCHS,
    PAPER_GOAL,
    PAPER_PAIRS,
    PUBLISHED,
    cells,
    differences,
    figure_cells,
    is_unfinished,
    markdown,
    read_runs,
    recipe_of,
    seed_accuracies,
)
from modeling_rebased.eval.plot_style import label_of
from modeling_rebased.training.mqar_runs import Run
from modeling_rebased.training.peers import PEERS

from .form import RESULTS, TABLES, across, down, shown, table


def mqar_runs() -> list[dict[str, Any]]:
    """Return all runs of the paper's recipe, as the figure takes them."""
    return [run for run in every_mqar_run() if not recipe_of(run)]


def whole_runs() -> list[dict[str, Any]]:
    """Return the runs of the paper's task and recipe that were planned for its 64 epochs, and were not cut off."""
    return [
        run
        for run in mqar_runs()
        if run["pairs"] == PAPER_PAIRS.get(run["length"]) and run["epochs"] == PAPER_EPOCHS and not is_unfinished(run)
    ]


def every_mqar_run() -> list[dict[str, Any]]:
    """Return all runs."""
    return read_runs(sorted((RESULTS / "mqar").glob("*.jsonl")))


TABLES |= {
    "mqar-cells": lambda: markdown(cells(every_mqar_run())),
    "mqar-differences": lambda: differences(cells(mqar_runs())),
}


@shown("mqar-figure")
def mqar_figure() -> str:
    """Return the means of the trained cells of Figure 1, with the authors' values and the numbers of seeds."""
    found = {(cell.length, cell.hidden, cell.model): cell for cell in figure_cells(cells(mqar_runs()))}
    models = [model for model in FIGURE_MODELS if any(model == key[2] for key in found)]
    head = ["length", "hidden"]
    for model in models:
        head += [label_of(model), *(["paper"] if model in PUBLISHED and model != "softmax" else [])]
    rows = []
    for length, hidden in itertools.product(LENGTHS, HIDDEN):
        if not any((length, hidden, model) in found for model in models):
            continue
        row = [f"{length:,}", hidden]
        for model in models:
            cell = found.get((length, hidden, model))
            row.append("" if cell is None else f"{cell.mean:.3f} ({len(cell.accuracies)})")
            if model in PUBLISHED and model != "softmax":
                theirs = PUBLISHED[model].get((length, hidden))
                row.append("≥ 0.97" if theirs is None else f"{theirs:.2f}")
        rows.append(row)
    return table(head, rows)


@shown("mqar-coverage")
def mqar_coverage() -> str:
    """Return how many seeds each model has at each of the two rates, for every size of Figure 1."""
    models, rates = ("rebased", "based", "softmax"), (3e-3, 1e-2)
    seeds: dict[tuple, set[int]] = defaultdict(set)
    for run in whole_runs():
        seeds[run["length"], run["hidden"], run["model"], run["lr"]].add(run["seed"])
    rows = []
    for length, hidden in itertools.product(LENGTHS, HIDDEN):
        found = [len(seeds[length, hidden, model, lr]) for model in models for lr in rates]
        trained = "whole" if min(found) >= 2 else "in part" if max(found) else "no"
        rows.append([f"{length:,}", hidden, trained, *(count or "" for count in found)])
    head = ["length", "hidden", "trained", *(f"{label_of(model)}, {lr:g}" for model in models for lr in rates)]
    return table(head, rows)


@shown("mqar-rates")
def mqar_rates() -> str:
    """Return the accuracy of every finished run of the 12-head models where the task is hard, by rate and seed."""
    rows = []
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    runs = [run for run in whole_runs() if run["model"] in ("rebased", "based")]
    hard = {(run["length"], run["hidden"]) for run in runs if run["accuracy"] < PAPER_GOAL}
    for run in runs:
        if (run["length"], run["hidden"]) in hard:
            groups[run["length"], run["hidden"], -len(run["model"]), run["lr"]].append(run)
    for (length, hidden, _, lr), runs in sorted(groups.items()):
        by_seed = defaultdict(list)
        for run in runs:
            by_seed[run["seed"]].append(f"{run['accuracy']:.3f}")
        gpus = defaultdict(list)
        for run in runs:
            gpus["H200" if "H200" in run["device"] else "H100"].append(run["seed"])
        seen = "; ".join(f"{gpu}: {', '.join(map(str, sorted(set(seeds))))}" for gpu, seeds in sorted(gpus.items()))
        mean = statistics.fmean(seed_accuracies(runs).values())
        values = [" and ".join(by_seed.get(seed, [])) for seed in range(5)]
        rows.append([f"{length:,}", hidden, label_of(runs[0]["model"]), f"{lr:g}", *values, f"{mean:.3f}", seen])
    head = ["length", "hidden", "model", "rate", *(f"seed {seed}" for seed in range(5)), "mean", "GPU: seeds"]
    return table(head, rows, 3)


def curves() -> list[tuple[list[Any], list[dict[str, Any]]]]:
    """Return what names each finished run, and its epochs."""
    found = []
    for run in whole_runs():
        if run.get("history"):
            name = [run["length"], run["hidden"], label_of(run["model"]), f"{run['lr']:g}", run["seed"]]
            found.append((name, run["history"]))
    return sorted(found, key=lambda pair: pair[0][:2])


NAMES = ["length", "hidden", "model", "rate", "seed"]


@shown("mqar-falls")
def mqar_falls() -> str:
    """Return the epochs in which the accuracy fell by more than 0.1, with the epochs before and after."""
    rows = []
    for name, history in curves():
        for before, there, after in zip(history, history[1:], history[2:]):
            if there["accuracy"] < before["accuracy"] - 0.1:
                values = [f"{each['accuracy']:.3f}" for each in (before, there, after)]
                losses = [f"{each['loss']:.2f}" for each in (before, there, after)]
                rows.append([f"{name[0]:,}", *name[1:], there["epoch"], *values, *losses])
    head = [*NAMES, "epoch", "accuracy before", "in it", "after", "training loss before", "in it", "after"]
    return table(head, rows, 3)


@shown("mqar-declines")
def mqar_declines() -> str:
    """Return the runs that ended more than 0.02 below their best accuracy."""
    rows = []
    for name, history in curves():
        best, end = max(history, key=lambda epoch: epoch["accuracy"]), history[-1]
        if best["accuracy"] > end["accuracy"] + 0.02:
            row = [f"{name[0]:,}", *name[1:], best["epoch"], end["epoch"]]
            row += [f"{each['accuracy']:.3f}" for each in (best, end)]
            rows.append([*row, *(f"{each['loss']:.2f}" for each in (best, end))])
    head = [
        *NAMES,
        "best epoch",
        "last epoch",
        "best accuracy",
        "at the end",
        "training loss at the best",
        "at the end",
    ]
    return table(head, rows, 3)


@shown("mqar-ablation")
def mqar_ablation() -> str:
    """Return the ablation of the normalisation beside the paper's Table 1."""
    formulas = {
        "x2": "x",
        "normalized": "norm(x)",
        "gamma": "γ x",
        "gamma_beta": "γ x + β",
        "rebased": "γ norm(x) + β",
        "based": "x, in 1 + q·k + (q·k)²/2",
    }
    runs = [run for run in whole_runs() if (run["length"], run["hidden"], run["lr"]) == (512, 64, 3e-3)]
    rows = []
    for model, formula in formulas.items():
        seeds = seed_accuracies([run for run in runs if run["model"] == model])
        values = [f"{seeds[seed]:.3f}" for seed in (0, 1)]
        mean = statistics.fmean(seeds.values())
        rows.append([f"`{model}`", formula, *values, f"{mean:.3f}", *(f"{each:.2f}" for each in ABLATION[model])])
    return table(["model", "q and k", "seed 0", "seed 1", "mean", "paper, T = 256", "paper, T = 2,048"], rows, 2)


@shown("mqar-variants")
def mqar_variants() -> str:
    """Return the runs with wider heads or another kernel beside those of the paper's model, a row per rate."""
    variants = ("rebased_3_heads", "based_3_heads", "rebased_6_heads", "rebased_head_norm", "rebased_floor")
    order = ("rebased", "based", *variants)
    runs = [run for run in whole_runs() if run["model"] in order]
    sizes = {(run["length"], run["hidden"]) for run in runs if run["model"] in variants}
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if (run["length"], run["hidden"]) in sizes:
            groups[run["length"], run["hidden"], order.index(run["model"]), run["lr"]].append(run)
    rows = []
    for (length, hidden, place, lr), group in sorted(groups.items()):
        config = Run(order[place], hidden, length, group[0]["pairs"], lr, 0).config()
        state = config.num_attention_heads * config.n_features * (config.head_dim + 1)
        if order[place] == "rebased_floor":
            state += config.num_attention_heads * config.head_dim
        seeds = list(seed_accuracies(group).values())
        spread = f"{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else ""
        heads = f"{config.num_attention_heads} of {config.feature_dim}"
        row = [f"{length:,}", hidden, label_of(order[place]), heads, f"{group[0]['parameters']:,}", f"{state:,}"]
        rows.append([*row, f"{lr:g}", len(seeds), f"{statistics.fmean(seeds):.3f}", spread])
    head = ["length", "hidden", "model", "heads", "parameters", "numbers in the state", "rate", "seeds", "mean"]
    return table([*head, "lowest to highest seed"], rows, 3)


@shown("mqar-peers")
def mqar_peers() -> str:
    """Return the peers beside the figure's models, at the sizes and the rates at which a peer was trained."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for run in whole_runs():
        if run["model"] in FIGURE_MODELS:
            groups[run["length"], run["hidden"], run["lr"], run["model"]].append(run)
    models = [model for model in FIGURE_MODELS if any(model == key[3] for key in groups)]
    rows = []
    for place in sorted({key[:3] for key in groups if key[3] in PEERS}):
        values = []
        for model in models:
            seeds = seed_accuracies(groups.get((*place, model), []))
            values.append(f"{statistics.fmean(seeds.values()):.3f} ({len(seeds)})" if seeds else "")
        rows.append([f"{place[0]:,}", place[1], f"{place[2]:g}", *values])
    return table(["length", "hidden", "rate", *map(label_of, models)], rows)


@shown("mqar-speed")
def mqar_speed() -> str:
    """Return how long whole trainings took, by GPU."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((RESULTS / "mqar").glob("triton-*.jsonl")):
        for run in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            alone = run["tokens_per_second"] > 2e7  # slower ones shared their GPU with other trainings
            if run["epochs_trained"] == 64 and alone:
                gpu = "H200" if "H200" in run["device"] else "H100"
                groups[run["length"], run["hidden"], run["model"], gpu].append(run)
    rows = []
    for (length, hidden, model, gpu), runs in sorted(groups.items()):
        seconds = sorted(run["seconds"] for run in runs)
        rates = sorted(run["tokens_per_second"] / 1e6 for run in runs)
        ranges = [
            f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
            for low, high in ((seconds[0], seconds[-1]), (rates[0], rates[-1]))
        ]
        rows.append([label_of(model), f"{length:,}", hidden, gpu, len(runs), *ranges])
    head = ["model", "length", "hidden", "GPU", "runs", "seconds for 64 epochs", "million tokens per second"]
    return table(head, rows)


@shown("mqar-steps")
def mqar_steps() -> str:
    """Return the time of one training step beside its floor."""
    rows = []
    for step in map(json.loads, (RESULTS / "mqar/steps.jsonl").read_text(encoding="utf-8").splitlines()):
        model, hidden, length = re.match(r"(\w+)-h(\d+)-l(\d+)", step["name"]).groups()
        floor = max(step["floor"]["operations_seconds"], step["floor"]["bytes_seconds"])
        seconds, rate = step["step_seconds"], step["tokens_per_second"] / 1e6
        figures = {"ms": 1e3 * seconds, "floor": 1e3 * floor, "share": floor / seconds, "all": 64 * 195 * seconds}
        rows.append({"model": model, "T": int(length), "hidden": hidden, "rate": rate, **figures})
    return down(
        rows,
        "model: {model:name} | length: {T:,} | hidden: {hidden} | step, ms: {ms:.1f} | floor, ms: {floor:.2f} | "
        "floor / step: {share:.0%} | million tokens per second: {rate:.1f} | 64 epochs, s: {all:.0f}",
    )


@shown("mqar-checkpoint")
def mqar_checkpoint() -> str:
    """Return the curve of the run that made checkpoints/mqar-d128."""
    run = json.loads((RESULTS / "mqar/checkpoint.jsonl").read_text(encoding="utf-8"))
    epochs = [entry for entry in run["history"] if entry["epoch"] in (1, 5, 6, 7, 8, 9, 10, 12, 17)]
    return across(epochs, "epoch: {epoch} | loss: {loss:.3f} | accuracy: {accuracy:.3f}")
