"""Draw Figure 1 of the ReBased paper from results of this repository: the accuracy on MQAR by length and hidden size.

    python -m modeling_rebased.eval.plot_mqar eval/results/mqar/*.jsonl --output eval/results/mqar

A cell is one model at one length and hidden size. Of its learning rates those with the most seeds are compared, and
the one with the highest mean accuracy counts. figure_1.md has the means of the other rates too. Runs of another recipe
than the paper's, such as another batch size or another goal, are cells of their own: they stand in figure_1.md under a
name that says so, and not in the picture of the paper's cells. A seed that was trained again, in another file, counts
once, with the mean of its runs. A run that was cut off before it reached its goal, in the paper 99%, is drawn nowhere.
Values read off the authors' figure stand beside these results. Runs that were planned for fewer epochs than the
paper's 64 and did not reach the goal are marked: they do not reproduce a cell.

Writes figure_1.png and figure_1.md (every cell), curves.png (accuracy by epoch where the task is hard) and
differences.md (ReBased against Based with a confidence interval). table_1.md is the ablation in the paper's own cells.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.folders import write_text
from modeling_rebased.training.peers import PEERS
from modeling_rebased.training.values import new_folder

from .plot_style import color_of, label_of, new_figure, save


LENGTHS = (128, 256, 512, 1024, 2048)
HIDDEN = (64, 128, 256, 512)
PAPER_PAIRS = {length: 16 if length == 128 else length // 4 for length in LENGTHS}

# Read off the authors' Figure 1. Of ReBased and Based, the cells that are not listed are 0.97 or above.
PUBLISHED: dict[str, dict[tuple[int, int], float]] = {
    "rebased": {
        (512, 64): 0.89,
        (1024, 64): 0.55,
        (1024, 128): 0.98,
        (2048, 64): 0.07,
        (2048, 128): 0.66,
        (2048, 256): 0.98,
    },
    "based": {
        (512, 64): 0.90,
        (1024, 64): 0.33,
        (1024, 128): 0.98,
        (2048, 64): 0.14,
        (2048, 128): 0.49,
        (2048, 256): 0.99,
    },
    "softmax": {(length, hidden): 1.0 for length in LENGTHS for hidden in HIDDEN},
}
# Models in the order in which pictures and tables show them. Figure 1 leaves out the variants and the ablation.
FIGURE_MODELS = ("rebased", "based", "softmax", *PEERS)
VARIANTS = ("rebased_3_heads", "based_3_heads", "rebased_6_heads", "rebased_head_norm", "rebased_floor")
ORDER = (*FIGURE_MODELS, *VARIANTS, "x2", "normalized", "gamma", "gamma_beta")
SEED_LINES = ("-", "--", ":", "-.", (0, (9, 3)))  # of the curves, by seed
PAPER_EPOCHS = 64
# The test of ReBased against Based, chosen before the cells of length 2,048 had five seeds: docs/associative-recall.md
DECIDING_CELLS = ((512, 64), (1024, 64), (2048, 64), (2048, 128))  # length and hidden size
DECIDING_SEEDS = (0, 1, 2, 3, 4)
DECIDING_RATE = 1e-2  # one rate for both models, so that the choice of the rate is no part of the comparison
DECIDING_LEVEL = 0.05 / len(DECIDING_CELLS)  # of the p value: 0.05 for all cells together
PAPER_GOAL = 0.99  # the accuracy at which the authors stop a run
# What runs of one cell have in common, with the paper's values and the words for another value
PAPER_RECIPE: dict[str, tuple[Any, str]] = {
    "batch_size": (512, "batch {}"),
    "train_examples": (100_000, "{} examples"),
    "dropout": (0.1, "dropout {}"),
    "weight_decay": (0.1, "weight decay {}"),
    "vocab_size": (8192, "vocabulary {}"),
    "stop_at": (PAPER_GOAL, "goal {}"),
    "bf16": (True, "float32"),
}


@dataclass
class Cell:
    """Hold the results of one model at one length and hidden size."""

    model: str
    length: int
    hidden: int
    pairs: int | None
    lr: float
    by_seed: dict[int, float]  # the accuracy of each seed, the mean of its runs
    rates: dict[float, dict[int, float]]  # the same for every learning rate, the chosen one among them
    recipe: str  # what differs from the paper's recipe, empty where nothing does
    runs: int  # more than seeds where some were repeated
    epochs: int  # the most that a seed trained
    complete: bool  # every seed trained the paper's epochs or reached its goal

    @property
    def accuracies(self) -> list[float]:
        """Return the accuracy of each seed, in the order of the seeds."""
        return list(self.by_seed.values())

    @property
    def mean(self) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def has_paper_task(self) -> bool:
        """Return whether the length has as many pairs as in the paper's Figure 1."""
        return self.pairs in (None, PAPER_PAIRS.get(self.length))

    @property
    def length_text(self) -> str:
        """Return the length as a table shows it, with the pairs where the paper has another number of them."""
        other = self.length in PAPER_PAIRS and not self.has_paper_task
        return f"{self.length:,}, {self.pairs} pairs" if other else f"{self.length:,}"

    @property
    def is_deciding(self) -> bool:
        """Return whether this is one of the cells of the test that was chosen beforehand."""
        return (self.length, self.hidden) in DECIDING_CELLS and self.has_paper_task and not self.recipe

    def at_rate(self, lr: float, seeds: Sequence[int]) -> Cell:
        """Return this cell at another of its learning rates, with those of the seeds that it has."""
        found = self.rates.get(lr, {})
        return replace(self, lr=lr, by_seed={seed: found[seed] for seed in seeds if seed in found})

    @property
    def label(self) -> str:
        """Return the model's name in a table, with what differs from the paper's recipe."""
        return ", ".join(filter(None, (label_of(self.model), self.recipe)))

    @property
    def paper(self) -> float | None:
        """Return the authors' number, where it was read off their figure, and task and recipe are theirs."""
        if self.recipe or not self.has_paper_task:
            return None
        return PUBLISHED.get(self.model, {}).get((self.length, self.hidden))

    @property
    def paper_text(self) -> str:
        """Return the authors' number as a table shows it, empty where they have none."""
        if self.paper is not None:
            return f"{self.paper:.2f}"
        theirs = not self.recipe and self.length in LENGTHS and self.hidden in HIDDEN
        theirs = theirs and self.has_paper_task and self.model in ("rebased", "based")
        return "≥ 0.97" if theirs else ""

    @property
    def other_rates(self) -> str:
        """Return the means of the rates that do not count, as a table shows them, with the numbers of seeds."""
        others = sorted((lr, seeds.values()) for lr, seeds in self.rates.items() if lr != self.lr)
        return "; ".join(f"{lr:g}: {statistics.fmean(values):.3f} ({len(values)})" for lr, values in others)


def read_runs(paths: list[str | Path]) -> list[dict[str, Any]]:
    """Read results, whatever the order of the files.

    Of the lines that one file has for a run, the newest counts. If several files hold the same run, every finished one
    is returned: a repeat stands beside the first. If all of them were cut off, the one that got furthest is returned.
    Lines that are no results, such as the timings of `train_mqar --time-steps`, are passed over.
    """
    newest: dict[tuple, dict[str, Any]] = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                run = json.loads(line)
            except json.JSONDecodeError:  # a line cut off by a kill
                continue
            if run.get("accuracy") is not None:
                newest[run["name"], recipe_of(run), run.get("loop"), str(path)] = run
    by_run: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for (name, recipe, loop, _), run in newest.items():
        if run not in by_run[name, recipe, loop]:  # a copy of a file is no repeat
            by_run[name, recipe, loop].append(run)
    runs = []
    for group in by_run.values():
        finished = [run for run in group if not run.get("stopped")]
        runs += finished or [max(group, key=lambda run: run["epochs_trained"])]
    return runs


def recipe_of(run: dict[str, Any]) -> str:
    """Return what differs from the paper's recipe in a run, in words, and nothing where nothing does."""
    different = []
    for name, (value, words) in PAPER_RECIPE.items():
        if (given := run.get(name, value)) != value:
            different.append(words.format(f"{given:,}"))
    return ", ".join(different)


def is_unfinished(run: dict[str, Any]) -> bool:
    """Tell whether a run was cut off before it reached its goal."""
    return bool(run.get("stopped")) and run["accuracy"] < run.get("stop_at", PAPER_GOAL)


def seed_accuracies(runs: list[dict[str, Any]]) -> dict[int, float]:
    """Return the accuracy of each seed, the mean of its runs."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        by_seed[run["seed"]].append(run["accuracy"])
    return {seed: statistics.fmean(by_seed[seed]) for seed in sorted(by_seed)}


def cells(runs: list[dict[str, Any]]) -> list[Cell]:
    """Choose each cell's learning rate, among the finished runs of the longest training that the cell has.

    The rates with the most seeds are compared by their means over seeds: the best of many seeds at one rate would
    otherwise stand against a single lucky one at another.
    """
    by_cell: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if not is_unfinished(run):
            by_cell[run["model"], run["length"], run["hidden"], run.get("pairs"), recipe_of(run)].append(run)
    result = []
    for (model, length, hidden, pairs, recipe), group in by_cell.items():
        epochs = max(run["epochs"] for run in group)
        by_rate: dict[float, list[dict[str, Any]]] = defaultdict(list)
        for run in group:
            if run["epochs"] == epochs:
                by_rate[run["lr"]].append(run)

        rates = {lr: seed_accuracies(by_rate[lr]) for lr in sorted(by_rate)}
        # of equal rates the lowest
        _, _, lr = min((-len(seeds), -statistics.fmean(seeds.values()), lr) for lr, seeds in rates.items())
        chosen = by_rate[lr]
        complete = all(run["epochs_trained"] >= PAPER_EPOCHS or run["accuracy"] >= PAPER_GOAL for run in chosen)
        trained = max(run["epochs_trained"] for run in chosen)
        sizes = (model, length, hidden, pairs)
        result.append(Cell(*sizes, lr, rates[lr], rates, recipe, len(chosen), trained, complete))
    return sorted(result, key=lambda cell: (cell.length, cell.hidden, _place(cell.model), cell.recipe))


def _place(model: str) -> tuple[int, str]:
    """Return the sorting key of a model: its place in `ORDER`, then its name."""
    return (ORDER.index(model) if model in ORDER else len(ORDER), model)


def markdown(found: list[Cell]) -> str:
    """Return the cells as a table in Markdown, the authors' number beside each."""
    lines = [
        "| length | hidden | model | mean accuracy | lowest to highest seed | seeds | epochs | rate | paper "
        "| other rates: mean (seeds) |",
        "| --: | --: | --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for cell in found:
        spread = f"{min(cell.accuracies):.3f} to {max(cell.accuracies):.3f}" if len(cell.accuracies) > 1 else ""
        seeds = len(cell.accuracies)
        count = f"{seeds}" if cell.runs == seeds else f"{seeds} ({cell.runs} runs)"
        epochs = f"{cell.epochs}" if cell.complete else f"{cell.epochs} of {PAPER_EPOCHS}"
        lines.append(
            f"| {cell.length_text} | {cell.hidden} | {cell.label} | {cell.mean:.3f} | {spread} | {count} "
            f"| {epochs} | {cell.lr:g} | {cell.paper_text} | {cell.other_rates} |"
        )
    return "\n".join(lines)


@dataclass
class Difference:
    """Hold the mean of one sample less that of another, with Welch's 95% interval and the p value of no difference."""

    mean: float
    low: float
    high: float
    p_value: float


def welch(first: list[float], second: list[float]) -> Difference:
    """Compare the means of two samples whose variances may differ (Welch's t test, two-sided).

    Args:
        first: at least two numbers.
        second: at least two numbers.
    """
    from scipy.stats import ttest_ind

    test = ttest_ind(first, second, equal_var=False)
    interval = test.confidence_interval(0.95)
    mean = statistics.fmean(first) - statistics.fmean(second)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue))


def differences(found: list[Cell]) -> str:
    """Return a table in Markdown of ReBased less Based, for the sizes at which both have two seeds or more.

    A size at which both reach the goal of 99% is left out. Their runs stopped there, so a difference means nothing. A
    size at which every run of one model reached it has no interval, because that model's spread is cut off. The
    deciding cells are compared at `DECIDING_RATE`, the others at the rate that counts for each model. The last column
    says which model is ahead by the rule of `DECIDING_CELLS`.
    """
    lines = [
        "| length | hidden | rate | seeds | ReBased, mean ± standard deviation | Based, mean ± standard deviation "
        "| difference | in the paper | 95% interval | p | ahead |",
        "| --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --- |",
    ]
    found = [cell for cell in found if not cell.recipe]
    by_size = {(cell.model, cell.length, cell.hidden, cell.pairs): cell for cell in found}
    for cell in found:
        other = by_size.get(("based", cell.length, cell.hidden, cell.pairs))
        if cell.model != "rebased" or other is None:
            continue
        if cell.is_deciding:
            cell, other = (one.at_rate(DECIDING_RATE, DECIDING_SEEDS) for one in (cell, other))
        if min(len(cell.by_seed), len(other.by_seed)) < 2:
            continue
        lowest = [min(one.accuracies) for one in (cell, other)]
        if min(lowest) >= PAPER_GOAL:
            continue
        spread = [f"{one.mean:.3f} ± {statistics.stdev(one.accuracies):.3f}" for one in (cell, other)]
        rates = " and ".join(dict.fromkeys(f"{one.lr:g}" for one in (cell, other)))
        seeds = " and ".join(dict.fromkeys(f"{len(one.by_seed)}" for one in (cell, other)))
        paper = "" if cell.paper is None or other.paper is None else f"{cell.paper - other.paper:+.2f}"
        row = [cell.length_text, f"{cell.hidden}", rates, seeds, *spread, f"{cell.mean - other.mean:+.3f}", paper]
        if max(lowest) < PAPER_GOAL or cell.is_deciding:
            measured = welch(cell.accuracies, other.accuracies)
            row += [f"{measured.low:+.2f} to {measured.high:+.2f}", f"{measured.p_value:.2g}"]
            row += [ahead(cell, other, measured)]
        else:
            row += ["", "", ""]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def ahead(cell: Cell, other: Cell, measured: Difference) -> str:
    """Return which of two cells' models is ahead by the rule that was chosen beforehand."""
    if not cell.is_deciding:
        return ""
    if min(len(cell.by_seed), len(other.by_seed)) < len(DECIDING_SEEDS):
        return "too few seeds"
    if measured.p_value >= DECIDING_LEVEL:
        return "not decided"
    return label_of((cell if measured.mean > 0 else other).model)


ABLATION_HIDDEN = (16, 24, 32, 48)
ABLATION_PAIRS = 32
# The paper's Table 1 at lengths 256 and 2,048: the mean accuracy over four hidden sizes.
ABLATION = {
    "x2": (0.54, 0.44),
    "normalized": (0.57, 0.58),
    "gamma": (0.51, 0.48),
    "gamma_beta": (0.61, 0.60),
    "rebased": (0.63, 0.61),
    "based": (0.58, 0.51),
}


def ablation(found: list[Cell]) -> str:
    """Return the paper's Table 1 in Markdown: the mean over the hidden sizes, where all four have been trained."""
    lines = [
        "| length | model | mean over hidden sizes | " + " | ".join(map(str, ABLATION_HIDDEN)) + " | seeds | paper |",
        "| --: | --- | --: |" + " --: |" * (len(ABLATION_HIDDEN) + 2),
    ]
    own = [cell for cell in found if cell.pairs == ABLATION_PAIRS and not cell.recipe]
    by_size = {(cell.length, cell.model, cell.hidden): cell for cell in own}
    for i, length in enumerate((256, 2048)):
        for model, published in ABLATION.items():
            here = [by_size.get((length, model, hidden)) for hidden in ABLATION_HIDDEN]
            trained = [cell for cell in here if cell is not None]
            if len(trained) < len(here):
                continue
            mean = statistics.fmean(cell.mean for cell in trained)
            means = " | ".join(f"{cell.mean:.3f}" for cell in trained)
            seeds = min(len(cell.accuracies) for cell in trained)
            lines.append(f"| {length:,} | {label_of(model)} | {mean:.3f} | {means} | {seeds} | {published[i]:.2f} |")
    return "\n".join(lines)


def figure_cells(found: list[Cell]) -> list[Cell]:
    """Return the cells that the paper's Figure 1 has, of its models and of their peers of today."""
    return [
        cell
        for cell in found
        if cell.model in FIGURE_MODELS
        and not cell.recipe
        and (cell.length in LENGTHS and cell.hidden in HIDDEN)
        and cell.has_paper_task
    ]


def line_of(recipe: str) -> str:
    """Return the line style of a recipe: solid for the paper's."""
    return "--" if recipe else "-"


def plot(found: list[Cell], path: str | Path) -> None:
    """Draw a panel per length with the hidden sizes side by side, as the authors do.

    A line joins the means of a model at neighbouring sizes, and each seed is a point. The authors' values stand behind
    as stars on a dashed line. Those that were only seen to be 0.97 or above are drawn at 0.985. A cell whose runs were
    planned for fewer epochs than the paper's, and did not reach its goal, is drawn pale.
    """
    from matplotlib.lines import Line2D

    lengths: Sequence[int] = LENGTHS
    sizes: Sequence[int] = HIDDEN
    shown = figure_cells(found)
    if not shown:  # none is the paper's
        shown = found
        lengths, sizes = sorted({cell.length for cell in found}), sorted({cell.hidden for cell in found})
    kinds = sorted({(cell.model, cell.recipe) for cell in shown}, key=lambda kind: (_place(kind[0]), kind[1]))
    labels = {(cell.model, cell.recipe): cell.label.replace(", ", ",\n") for cell in shown}
    figure, axes = new_figure(1, len(lengths), 2.75, 3.4, sharey=True)
    for axis, length in zip(axes[0], lengths):
        for i, (model, recipe) in enumerate(kinds):
            shift = min(0.16, 0.66 / len(kinds)) * (i - (len(kinds) - 1) / 2)
            color = color_of(model)
            theirs = [PUBLISHED.get(model, {}).get((length, hidden), 0.985) for hidden in sizes]
            if model in PUBLISHED and sizes is HIDDEN:
                axis.plot(range(len(sizes)), theirs, "*--", color=color, mfc="white", ms=9, lw=1, alpha=0.45, zorder=1)
            ours = [cell for cell in shown if (cell.model, cell.recipe, cell.length) == (model, recipe, length)]
            places = [sizes.index(cell.hidden) + shift for cell in ours]
            means = {cell.hidden: cell.mean for cell in ours}
            joined = [means.get(hidden, math.nan) for hidden in sizes]  # no line passes over a missing cell
            all_places = [place + shift for place in range(len(sizes))]
            axis.plot(all_places, joined, line_of(recipe), color=color, lw=1.8, zorder=3)
            for place, cell in zip(places, ours):
                alpha = 0.9 if cell.complete else 0.35
                axis.plot([place - 0.07, place + 0.07], [cell.mean] * 2, color=color, lw=4, alpha=alpha, zorder=4)
                axis.plot([place] * len(cell.by_seed), cell.accuracies, ".", color=color, ms=6, alpha=0.6, zorder=2)
        axis.set_title(f"length {length:,}", fontsize=10)
        axis.set_xticks(range(len(sizes)), [str(hidden) for hidden in sizes])
        axis.set(xlabel="hidden size", xlim=(-0.6, len(sizes) - 0.4), ylim=(-0.03, 1.04))
        axis.grid(True, axis="y", alpha=0.25)
    axes[0, 0].set_ylabel("accuracy")
    handles = [
        Line2D([], [], color=color_of(kind[0]), ls=line_of(kind[1]), lw=2, label=labels[kind]) for kind in kinds
    ]
    grey: dict[str, Any] = {"color": "#666666"}
    handles += [
        Line2D([], [], marker="_", ls="-", mew=4, ms=8, label="mean", **grey),
        Line2D([], [], marker=".", ls="", label="one seed", **grey),
        Line2D([], [], marker="*", ls="--", mfc="white", ms=9, label="paper", **grey),
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=9)
    save(figure, path)


def plot_curves(runs: list[dict[str, Any]], path: str | Path) -> None:
    """Draw accuracy over epochs: models by colour, seeds by line, and a panel per size, pairs, rate and recipe.

    All panels have the same axes. Sizes at which every run reached the goal are left out, and runs that were cut off
    before it. A run without accuracies by epoch has no curve. Nothing is drawn if no run has one.
    """
    from matplotlib.lines import Line2D

    runs = [run for run in runs if run["history"] and not is_unfinished(run)]
    if not runs:
        return
    hard = {(run["length"], run["hidden"]) for run in runs if run["accuracy"] < PAPER_GOAL}
    runs = [run for run in runs if (run["length"], run["hidden"]) in hard] or runs

    def panel_of(run: dict[str, Any]) -> tuple[int, int, int, float, str]:
        pairs = run.get("pairs") or PAPER_PAIRS.get(run["length"], 0)
        return run["length"], run["hidden"], pairs, run["lr"], recipe_of(run)

    panels = sorted({panel_of(run) for run in runs})
    last = max(entry["epoch"] for run in runs for entry in run["history"])
    columns = min(len(panels), 4 if len(panels) % 4 == 0 else 3)
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(rows, columns, 3.6, 3.0, sharey=True)
    for axis, panel in zip(axes.flat, panels):
        length, hidden, pairs, lr, recipe = panel
        for run in runs:
            if panel_of(run) == panel:
                axis.plot(
                    [entry["epoch"] for entry in run["history"]],
                    [entry["accuracy"] for entry in run["history"]],
                    ls=SEED_LINES[run["seed"] % len(SEED_LINES)],
                    color=color_of(run["model"]),
                    lw=1.3,
                )
        axis.set(xlabel="epoch", xlim=(-0.03 * last, 1.03 * last), ylim=(-0.03, 1.03))
        other_pairs = "" if pairs == PAPER_PAIRS.get(length, 0) else f"{pairs} pairs"
        name = ", ".join(filter(None, (f"rate {lr:g}", other_pairs, recipe)))
        axis.set_title(f"length {length:,}, hidden size {hidden},\n{name}", fontsize=9)
        axis.grid(True, alpha=0.25)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    handles = [
        Line2D([], [], color=color_of(model), label=label_of(model))
        for model in sorted({run["model"] for run in runs}, key=_place)
    ]
    handles += [
        Line2D([], [], color="black", lw=1, ls=SEED_LINES[seed % len(SEED_LINES)], label=f"seed {seed}")
        for seed in sorted({run["seed"] for run in runs})
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=9, handlelength=3.2)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Read the runs and write the tables and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="JSONL", help="what train_mqar wrote")
    parser.add_argument(
        "--output", type=new_folder, default=".", metavar="DIR", help="for the pictures and the tables"
    )
    args = parser.parse_args(with_dashes(argv))
    try:
        runs = read_runs(args.results)
    except OSError as error:
        parser.error(str(error))
    found = cells(runs)
    if not found:
        parser.error(f"no finished run in {', '.join(args.results)}")
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"figure_1.md": markdown(found), "differences.md": differences(found), "table_1.md": ablation(found)}
    for name, table in tables.items():
        if table.count("\n") < 2:  # no two models with two seeds each, or no ablation
            continue
        print(table)
        write_text(folder / name, table + "\n")
    plot(found, folder / "figure_1.png")
    plot_curves(runs, folder / "curves.png")


if __name__ == "__main__":
    main()
