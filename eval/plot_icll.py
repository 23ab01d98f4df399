"""Draw what models reach on in-context language learning from results of `rebased-icll`, and write it as a table.

    python -m modeling_rebased.eval.plot_icll output/icll.jsonl --output output

For each model, width and number of training examples the best learning rate counts. Of the rates those with the most
seeds are compared, by their means over seeds. Runs that were cut off count nowhere. Runs of different recipes, as with
other layers or automata, are refused. The dashed line is a 3-gram model that learns from the same example.

Writes icll.png and icll.md.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .plot_mad import best_runs, models_of, write_report
from .plot_style import color_of, label_of, new_figure, save


GROUP = ("train_examples", "hidden", "model")
MEASURES = {  # of the models, and of the 3-gram model
    "accuracy": ("share of legal greedy symbols", "accuracy_of_3gram"),
    "distance_to_automaton": ("distance to the automaton", "distance_of_3gram"),
    "distance_to_3gram": ("distance to the 3-gram model", None),
}


def mean(runs: list[dict[str, Any]], measure: str) -> float:
    """Return the mean of a measure over runs."""
    return statistics.fmean(run[measure] for run in runs)


def markdown(runs: list[dict[str, Any]]) -> str:
    """Return every measure as a table in Markdown, with the 3-gram model in the first row of each test."""
    names = " | ".join(name for name, _ in MEASURES.values())
    lines = [f"| training examples | width | model | seeds | best rate | {names} |"]
    lines.append("| --: | --: | --- | --: | --: |" + " --: |" * len(MEASURES))
    order = models_of(runs)
    best = best_runs(runs, GROUP)
    for reference in sorted({(run["accuracy_of_3gram"], run["distance_of_3gram"]) for run in runs}):
        lines.append(f"| | | 3-gram | | | {reference[0]:.3f} | {reference[1]:.3f} | 0.000 |")
    for examples, hidden, model in sorted(best, key=lambda key: (*key[:2], order.index(key[2]))):
        group = best[examples, hidden, model]
        values = " | ".join(f"{mean(group, measure):.3f}" for measure in MEASURES)
        lines.append(f"| {examples:,} | {hidden} | {label_of(model)} | {len(group)} | {group[0]['lr']:g} | {values} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: str | Path) -> None:
    """Draw a row of panels per number of training examples, one panel per measure, over the width."""
    from matplotlib.lines import Line2D

    best, models = best_runs(runs, GROUP), models_of(runs)
    rows = sorted({examples for examples, _, _ in best})
    widths = sorted({hidden for _, hidden, _ in best})
    figure, axes = new_figure(len(rows), len(MEASURES), 3.2, 3.0)
    for panels, examples in zip(axes, rows):
        for axis, (measure, (name, reference)) in zip(panels, MEASURES.items()):
            for i, model in enumerate(models):
                points = [(h, best[examples, h, model]) for h in widths if (examples, h, model) in best]
                color = color_of(model, models)
                shift = 0.1 * (i - (len(models) - 1) / 2)  # or equal models would hide one another
                places = [widths.index(hidden) + shift for hidden, _ in points]
                axis.plot(places, [mean(group, measure) for _, group in points], "o-", color=color, ms=6)
                for place, (_, group) in zip(places, points):
                    if len(group) > 1:
                        axis.plot([place] * len(group), [run[measure] for run in group], ".", color=color, alpha=0.5)
            if reference is not None:
                axis.axhline(mean(runs, reference), color="#888888", ls="--", lw=1)
            axis.set_xticks(range(len(widths)), [str(width) for width in widths])
            axis.set(xlabel="width", xlim=(-0.5, len(widths) - 0.5))
            axis.set_title(f"{name}\n{examples:,} training examples", fontsize=9)
            axis.grid(True, axis="y", alpha=0.25)
    handles = [Line2D([], [], marker="o", color=color_of(model, models), label=label_of(model)) for model in models]
    handles.append(Line2D([], [], color="#888888", ls="--", lw=1, label="3-gram model"))
    figure.legend(handles=handles, loc="outside right center", fontsize=9)
    save(figure, path)


def _usable(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if "distance_to_automaton" in run]


def main(argv: list[str] | None = None) -> None:
    """Read the runs, and write the table and the picture."""
    write_report("icll", __doc__, _usable, markdown, plot, argv)


if __name__ == "__main__":
    main()
