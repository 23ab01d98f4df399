"""Draw the accuracy on MAD's six tasks from results of `rebased-mad`, and write it as a table.

    python -m modeling_rebased.eval.plot_mad output/mad.jsonl --output output

As MAD's authors do, the best learning rate and weight decay count in each setting. A setting is the base sizes, or a
variation that was trained. The score of a task is the mean over its settings. Only the rates with the most seeds are
compared, by their means over seeds. Runs that were cut off do not count. Runs of different recipes, as with other
layers or another batch size, are refused.

Writes mad.png and mad.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.folders import write_text
from modeling_rebased.training.mad import TASKS
from modeling_rebased.training.values import new_folder

from .plot_mqar import read_runs
from .plot_style import STYLES, color_of, label_of, new_figure, save


SETTING = ("vocab_size", "length", "noise", "copy", "train_examples", "hidden")
# What all runs of a table have in common: of the model, the training, and the automata of ICLL
SHARED = (
    *("layers", "head", "epochs", "batch_size", "dropout", "test_examples", "data_seed", "stop_at", "bf16"),
    *("patience", "symbols", "max_states", "min_strings", "max_strings", "max_length"),
)


def best_runs(runs: list[dict[str, Any]], by: tuple[str, ...]) -> dict[tuple, list[dict[str, Any]]]:
    """Group finished runs by fields, and keep each group's best learning rate and weight decay, one run per seed."""
    groups: dict[tuple, dict[tuple, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        if not run.get("stopped"):
            groups[tuple(run[field] for field in by)][run["lr"], run["weight_decay"]][run["seed"]] = run

    def worth(seeds: dict[int, dict[str, Any]]) -> tuple[int, float]:
        return len(seeds), statistics.fmean(run["accuracy"] for run in seeds.values())

    return {group: list(max(rates.values(), key=worth).values()) for group, rates in groups.items()}


def models_of(runs: list[dict[str, Any]]) -> list[str]:
    """Return the models of runs in the order of the styles."""
    order = list(STYLES)
    return sorted({run["model"] for run in runs}, key=lambda model: order.index(model) if model in order else 99)


def scores(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the mean over seeds of each setting, by task and model.

    Of a task, those settings count that every model has which has the task at all.
    """
    best = best_runs(runs, ("task", "model", *SETTING))
    by_task: dict[str, dict[str, dict[tuple, float]]] = {task: defaultdict(dict) for task in TASKS}
    for (task, model, *setting), group in best.items():
        by_task[task][model][tuple(setting)] = statistics.fmean(run["accuracy"] for run in group)
    found = {}
    for task, by_model in by_task.items():
        shared = sorted(set.intersection(*(set(settings) for settings in by_model.values()))) if by_model else []
        if shared:
            found[task] = {model: [by_model[model][setting] for setting in shared] for model in by_model}
    return found


def markdown(runs: list[dict[str, Any]]) -> str:
    """Return the scores as a table in Markdown. The last row is the mean over tasks, of the models that have all."""
    found, models = scores(runs), models_of(runs)
    lines = ["| task | settings | " + " | ".join(label_of(model) for model in models) + " |"]
    lines.append("| --- | --: |" + " --: |" * len(models))
    means = {
        model: [statistics.fmean(of_task[model]) for of_task in found.values() if model in of_task] for model in models
    }
    for task, of_task in found.items():
        values = [f"{statistics.fmean(of_task[model]):.3f}" if model in of_task else "" for model in models]
        settings = len(next(iter(of_task.values())))
        lines.append(f"| {task.replace('_', ' ')} | {settings} | " + " | ".join(values) + " |")
    values = [f"{statistics.fmean(means[model]):.3f}" if len(means[model]) == len(found) else "" for model in models]
    return "\n".join([*lines, "| mean of tasks | | " + " | ".join(values) + " |"])


def plot(runs: list[dict[str, Any]], path: str | Path) -> None:
    """Draw a group of bars per task, one per model: the score, and a point for each setting."""
    found, models = scores(runs), models_of(runs)
    figure, axes = new_figure(1, 1, 1.2 * len(found) + 2.2, 3.2)
    axis = axes[0, 0]
    width = 0.8 / len(models)
    for i, of_task in enumerate(found.values()):
        for j, model in enumerate(models):
            if model not in of_task:
                continue
            x = i + (j - (len(models) - 1) / 2) * width
            axis.bar(x, statistics.fmean(of_task[model]), 0.9 * width, color=color_of(model, models), alpha=0.8)
            if len(of_task[model]) > 1:
                axis.plot([x] * len(of_task[model]), of_task[model], "o", color="#222222", ms=3, alpha=0.6)
    axis.set_xticks(range(len(found)), [task.replace("_", "\n") for task in found])
    axis.set(ylabel="accuracy", ylim=(0, 1.02))
    axis.grid(True, axis="y", alpha=0.25)
    from matplotlib.patches import Patch

    handles = [Patch(color=color_of(model, models), alpha=0.8, label=label_of(model)) for model in models]
    figure.legend(handles=handles, loc="outside right center", fontsize=9)
    save(figure, path)


def write_report(
    task: str,
    description: str | None,
    usable: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    markdown: Callable[[list[dict[str, Any]]], str],
    plot: Callable[[list[dict[str, Any]], Path], None],
    argv: list[str] | None,
) -> None:
    """Read the command line and the runs, and write the table and the picture of a task.

    Args:
        task: "mad" or "icll", the name of both files.
        description: the help of the command.
        usable: returns the runs that count, of all that are in the files.
        markdown, plot: make the table and the picture.
        argv: the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="JSONL", help=f"what rebased-{task} wrote")
    parser.add_argument("--output", type=new_folder, default=".", metavar="DIR", help="for the picture and the table")
    args = parser.parse_args(with_dashes(argv))
    try:
        runs = usable([run for run in read_runs(args.results) if not run.get("stopped")])
    except OSError as error:
        parser.error(str(error))
    if not runs:
        parser.error(f"no finished run in {', '.join(args.results)}")
    for field in SHARED:
        values = list(dict.fromkeys(str(run.get(field)) for run in runs))
        if len(values) > 1:
            parser.error(f"the runs have different {field}: {', '.join(values)}. Give files of one recipe at a time")
    folder = args.output
    table = markdown(runs)
    print(table)
    write_text(folder / f"{task}.md", table + "\n")
    plot(runs, folder / f"{task}.png")


def _usable(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    runs = [run for run in runs if run.get("task") in TASKS]
    return runs if scores(runs) else []


def main(argv: list[str] | None = None) -> None:
    """Read the runs, and write the table and the picture."""
    write_report("mad", __doc__, _usable, markdown, plot, argv)


if __name__ == "__main__":
    main()
