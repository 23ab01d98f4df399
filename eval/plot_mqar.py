"""Figure 1 of the ReBased paper from our results: accuracy on MQAR over the hidden size, a panel a length.

    python -m modeling_rebased.eval.plot_mqar eval/results/mqar/*.jsonl --output eval/results/mqar

A point is the mean over seeds of the best learning rate's accuracy (the rate with the highest mean), a bar the lowest
and highest seed. A seed that was trained again, in another file, counts once, with the mean of its runs. Points read
off the authors' figure stand beside ours, hollow. Runs with fewer epochs than the paper's 64 that did not reach their
goal are marked: they do not reproduce a cell.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any


LENGTHS = (128, 256, 512, 1024, 2048)
HIDDEN = (64, 128, 256, 512)

# Read off the authors' Figure 1. The cells that are not listed are 0.97 or above for both; those are not drawn, since
# nothing more exact is known of them.
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
# The figure's models, then those that it shows where there are results of them, then what the curves alone show.
COLORS = {
    "rebased": "tab:red",
    "based": "tab:blue",
    "softmax": "tab:gray",
    "rebased_3_heads": "tab:green",
    "based_3_heads": "tab:purple",
    "rebased_6_heads": "tab:olive",
    "x2": "tab:orange",
    "normalized": "tab:brown",
    "gamma": "tab:pink",
    "gamma_beta": "tab:cyan",
}
WIDE_HEADS = ("rebased_3_heads", "based_3_heads")  # not the paper's
# Where ours of one hidden size are drawn, so that they do not hide one another: factors of it.
BESIDE = {"rebased": 0.96, "based": 1.04, "rebased_3_heads": 0.93, "based_3_heads": 1.07}
STYLES = {5e-4: "-.", 1e-3: ":", 3e-3: "-", 1e-2: "--"}  # of the curves, by learning rate
PAPER_EPOCHS = 64
PAPER_GOAL = 0.99  # the accuracy at which the authors stop a run


@dataclass
class Cell:
    """One model at one length and hidden size."""

    model: str
    length: int
    hidden: int
    lr: float
    accuracies: list[float]  # one a seed, the mean of its runs
    runs: int  # more than seeds where some were repeated
    epochs: int  # the most that a seed trained
    complete: bool  # every seed trained the paper's epochs or reached its goal

    @property
    def mean(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)


def read_runs(paths: list[str | Path]) -> list[dict[str, Any]]:
    """Read results, whatever the order of the files.

    Of the lines that one file has for a run, the newest counts. Files may hold the same run: every finished one is
    returned, a repeat beside the first; of those that were all cut off, the one that got furthest. Lines that are no
    results, such as the timings of `train_mqar --time-steps`, are passed over.
    """
    newest: dict[tuple, dict[str, Any]] = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                run = json.loads(line)
            except json.JSONDecodeError:  # a line cut off by a kill
                continue
            if run.get("accuracy") is not None:
                newest[run["name"], run.get("loop"), str(path)] = run
    by_run: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for (name, loop, _), run in newest.items():
        if run not in by_run[name, loop]:  # a copy of a file is no repeat
            by_run[name, loop].append(run)
    runs = []
    for group in by_run.values():
        finished = [run for run in group if not run.get("stopped")]
        runs += finished or [max(group, key=lambda run: run["epochs_trained"])]
    return runs


def seed_accuracies(runs: list[dict[str, Any]]) -> list[float]:
    """The accuracy of each seed, the mean of its runs."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        by_seed[run["seed"]].append(run["accuracy"])
    return [sum(by_seed[seed]) / len(by_seed[seed]) for seed in sorted(by_seed)]


def cells(runs: list[dict[str, Any]]) -> list[Cell]:
    """Choose each cell's best learning rate, among runs of the longest training that the cell has.

    Runs given up in a race or at a deadline count only where the cell has nothing else.
    """
    by_cell: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_cell[run["model"], run["length"], run["hidden"]].append(run)
    result = []
    for (model, length, hidden), group in sorted(by_cell.items()):
        finished = [run for run in group if not run.get("stopped")] or group
        epochs = max(run["epochs"] for run in finished)
        by_rate: dict[float, list[dict[str, Any]]] = defaultdict(list)
        for run in finished:
            if run["epochs"] == epochs:
                by_rate[run["lr"]].append(run)

        def mean(lr: float, by_rate=by_rate) -> float:
            accuracies = seed_accuracies(by_rate[lr])
            return sum(accuracies) / len(accuracies)

        lr = max(by_rate, key=mean)
        chosen = by_rate[lr]
        complete = all(run["epochs_trained"] >= PAPER_EPOCHS or run["accuracy"] >= PAPER_GOAL for run in chosen)
        trained = max(run["epochs_trained"] for run in chosen)
        result.append(Cell(model, length, hidden, lr, seed_accuracies(chosen), len(chosen), trained, complete))
    return result


def markdown(found: list[Cell]) -> str:
    """Our cells as a table, the authors' number beside each."""
    lines = [
        "| length | hidden | model | ours, mean | lowest to highest | seeds | epochs | best rate | paper |",
        "| --: | --: | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for cell in sorted(found, key=lambda c: (c.length, c.hidden, c.model)):
        paper = PUBLISHED.get(cell.model, {}).get((cell.length, cell.hidden))
        if paper is not None:
            text = f"{paper:.2f}"
        else:
            text = "≥ 0.97" if cell.model in ("rebased", "based") else ""
        spread = f"{min(cell.accuracies):.3f} to {max(cell.accuracies):.3f}" if len(cell.accuracies) > 1 else ""
        seeds = len(cell.accuracies)
        count = f"{seeds}" if cell.runs == seeds else f"{seeds} ({cell.runs} runs)"
        epochs = f"{cell.epochs}" if cell.complete else f"{cell.epochs} of {PAPER_EPOCHS}"
        lines.append(
            f"| {cell.length} | {cell.hidden} | {cell.model} | {cell.mean:.3f} | {spread} | {count} "
            f"| {epochs} | {cell.lr:g} | {text} |"
        )
    return "\n".join(lines)


def plot(found: list[Cell], path: str | Path) -> None:
    """Draw the figure: ours filled, the authors' hollow and dashed, incomplete cells as triangles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {*PUBLISHED, *(cell.model for cell in found if cell.model in WIDE_HEADS)}
    colors = {model: color for model, color in COLORS.items() if model in shown}
    lengths = sorted(
        {cell.length for cell in found} | {length for points in PUBLISHED.values() for length, _ in points}
    )
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(3 * len(lengths), 3.4), sharey=True, layout="constrained")
    for axis, length in zip(axes, lengths):
        for model, color in colors.items():
            points = {h: a for (n, h), a in PUBLISHED.get(model, {}).items() if n == length}
            axis.plot(
                sorted(points), [points[h] for h in sorted(points)], "--o", color=color, mfc="white", alpha=0.6, lw=1
            )
            ours = sorted((c for c in found if c.model == model and c.length == length), key=lambda c: c.hidden)
            for shape, complete in (("o", True), ("^", False)):
                part = [cell for cell in ours if cell.complete == complete]
                axis.errorbar(
                    [cell.hidden * BESIDE.get(model, 1) for cell in part],
                    [cell.mean for cell in part],
                    yerr=[
                        [cell.mean - min(cell.accuracies) for cell in part],
                        [max(cell.accuracies) - cell.mean for cell in part],
                    ],
                    fmt=shape,
                    color=color,
                    capsize=3,
                )
        axis.set_xscale("log", base=2)
        axis.set(title=f"length {length}", xlabel="hidden size", xticks=HIDDEN, xticklabels=HIDDEN, ylim=(-0.03, 1.05))
        axis.set_xlim(HIDDEN[0] / 1.3, HIDDEN[-1] * 1.3)
    axes[0].set_ylabel("accuracy")
    handles = [pyplot.Line2D([], [], color=color, marker="o", ls="", label=model) for model, color in colors.items()]
    handles.append(pyplot.Line2D([], [], color="black", marker="o", ls="", label="ours"))
    if not all(cell.complete for cell in found if cell.model in shown):
        label = f"ours, fewer than {PAPER_EPOCHS} epochs"
        handles.append(pyplot.Line2D([], [], color="black", marker="^", ls="", label=label))
    label = "paper, read off its figure"
    handles.append(pyplot.Line2D([], [], color="black", marker="o", mfc="white", ls="--", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_curves(runs: list[dict[str, Any]], path: str | Path) -> None:
    """Draw accuracy over epochs, a panel a length and hidden size; dashes show the rate, pale runs were cut off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(run["length"], run["hidden"]) for run in runs})
    columns = min(2 if len(panels) == 4 else 3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.8 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis, (length, hidden) in zip(axes.flat, panels):
        here = [run for run in runs if (run["length"], run["hidden"]) == (length, hidden)]
        for run in here:
            axis.plot(
                [entry["epoch"] for entry in run["history"]],
                [entry["accuracy"] for entry in run["history"]],
                STYLES.get(run["lr"], "-"),
                color=COLORS.get(run["model"], "black"),
                alpha=0.4 if run.get("stopped") else 1,
            )
        axis.set(title=f"length {length}, hidden size {hidden}", xlabel="epoch", ylabel="accuracy", ylim=(-0.03, 1.03))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    drawn = {run["model"] for run in runs}
    handles = [
        pyplot.Line2D([], [], color=COLORS.get(model, "black"), label=model)
        for model in [*(model for model in COLORS if model in drawn), *sorted(drawn - COLORS.keys())]
    ]
    handles += [
        pyplot.Line2D([], [], color="black", ls=STYLES.get(lr, "-"), label=f"rate {lr:g}")
        for lr in sorted({run["lr"] for run in runs})
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3 * columns, len(handles)), fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read the runs and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="JSONL", help="what train_mqar wrote")
    parser.add_argument("--output", default=".", metavar="DIR", help="for figure_1.png, curves.png and figure_1.md")
    args = parser.parse_args(argv)
    runs = read_runs(args.results)
    if not runs:
        parser.error(f"no finished run in {', '.join(args.results)}")
    found = cells(runs)
    table = markdown(found)
    print(table)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figure_1.md").write_text(table + "\n", encoding="utf-8")
    plot(found, folder / "figure_1.png")
    plot_curves(runs, folder / "curves.png")


if __name__ == "__main__":
    main()
