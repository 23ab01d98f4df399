"""Write the tables and the picture of the language models that `language_models` measured.

    python -m modeling_rebased.eval.plot_language_models eval/results/language_models

reads FOLDER/MODEL.json of each model, and writes into FOLDER
    domains.csv, slices.csv, distance.csv, frequency.csv, positions.csv, speed.csv    one row per model and bin
    language_models.png    bits per byte by domain, loss of the slices, and loss by position
    curves.png             training loss by tokens

Models whose names differ in the seed alone, such as "rebased" and "rebased, seed 1", are seeds of one model. A bar is
their mean, with a line from the least to the largest, and each seed has its own curve.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.folders import written

from .plot_style import color_of, label_lines, label_of, new_figure, plain_log_axis, save


ORDER = ("rebased", "hybrid", "based", "softmax", "gated_deltanet", "mamba2", "rwkv7")


def read_models(folder: Path) -> list[dict[str, Any]]:
    """Return what was measured of each model, in the order of the tables; seeds of one model side by side."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [result for result in found if "domains" in result]
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(found, key=lambda result: (places.get(kind_of(result["model"]), len(ORDER)), result["model"]))


def kind_of(model: str) -> str:
    """Return the kind of a model, whose name may end in a seed: "rebased" for "rebased, seed 1"."""
    return model.split(",")[0]


def without_seed(model: str) -> str:
    """Return the name of a model without its seed: "rebased" for "rebased, seed 1"."""
    return re.sub(r", seed \d+$", "", model)


def seeds_of(models: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the seeds of each model by its name without the seed."""
    result: dict[str, list[dict[str, Any]]] = {}
    for found in models:
        result.setdefault(without_seed(found["model"]), []).append(found)
    return result


def tables(models: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each CSV file by its name."""
    result: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("domains", "slices", "distance", "frequency", "positions", "speed")
    }
    for found in models:
        model = {"model": found["model"]}
        for domain, row in found["domains"].items():
            result["domains"].append({**model, "parameters": found["parameters"], "domain": domain, **row})
        for domain, rows in found["slices"].items():
            result["slices"] += [{**model, "domain": domain, **row} for row in rows]
        for least, tokens, loss in found["by_distance"]:
            result["distance"].append({**model, "distance_from": least, "tokens": tokens, "loss": loss / tokens})
        for slice_, rows in found.get("by_frequency", {}).items():
            for least, tokens, loss in rows:
                row = {"slice": slice_, "occurrences_from": least, "tokens": tokens, "loss": loss / tokens}
                result["frequency"].append({**model, **row})
        for length, row in found.get("positions", {}).get("lengths", {}).items():
            for least, tokens, loss in row["bins"]:
                bin_ = {"length": int(length), "position_from": least, "tokens": tokens, "loss": loss / tokens}
                result["positions"].append({**model, **bin_})
        if "speed" in found:
            result["speed"].append({**model, "device": found["device"], **found["speed"]})
    return result


def write_tables(rows: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Write FOLDER/NAME.csv for each table that has rows, with numbers of six digits."""
    for name, table in rows.items():
        if not table:
            continue
        with (
            written(folder / f"{name}.csv") as path,
            open(path, "w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(
                file, list(dict.fromkeys(key for row in table for key in row)), lineterminator="\n"
            )
            writer.writeheader()
            for row in table:
                writer.writerow({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()})


def _grouped_bars(axis: Any, heights: dict[str, list[list[float]]], names: list[str]) -> None:
    """Draw a bar per model and name. `heights` has a list per model with the heights of each seed."""
    width = 0.8 / len(heights)
    for number, (model, seeds) in enumerate(heights.items()):
        places = [x + (number - (len(heights) - 1) / 2) * width for x in range(len(names))]
        means = [statistics.fmean(of) for of in zip(*seeds)]
        ends = [(mean - min(of), max(of) - mean) for mean, of in zip(means, zip(*seeds))]
        spread = {"yerr": list(zip(*ends)), "error_kw": {"lw": 1}} if len(seeds) > 1 else {}
        axis.bar(places, means, width * 0.92, color=color_of(model, heights), label=label_of(model), **spread)
    axis.set_xticks(range(len(names)), names)


def _lines(axis: Any, lines: dict[str, list[list[tuple[float, float]]]], **style: Any) -> list[tuple]:
    """Draw a line per seed of each model, and return the ends that `label_lines` takes, one per model."""
    ends = []
    for model, seeds in lines.items():
        color = color_of(model, lines)
        for points in seeds:
            axis.plot(*zip(*points), color=color, **style)
        if seeds:
            x = max(points[-1][0] for points in seeds)
            y = statistics.fmean(points[-1][1] for points in seeds)
            ends.append((x, y, label_of(model), color))
    return ends


def _by_position(found: dict[str, Any], length: str) -> list[tuple[float, float]]:
    """Return the loss by position in windows of this length."""
    bins = found["positions"]["lengths"][length]["bins"]
    return [(max(least, 64), loss / tokens) for least, tokens, loss in bins]


def plot(models: list[dict[str, Any]], path: Path) -> None:
    """Draw bits per byte by domain, the loss of the slices, and the loss by position in the longest windows."""
    figure, axes = new_figure(1, 3, 6.2, 4.2)
    domains, slices, positions = axes[0]
    groups = seeds_of(models)
    names = list(models[0]["domains"])
    bits = {
        model: [[found["domains"][name]["bits_per_byte"] for name in names] for found in seeds]
        for model, seeds in groups.items()
    }
    _grouped_bars(domains, bits, names)
    domains.set(ylabel="bits per byte", title="by domain")
    domains.tick_params(axis="x", labelrotation=20)
    domains.margins(y=0.25)
    domains.legend(fontsize=8, ncols=3, loc="upper center")

    kinds = list(dict.fromkeys(row["slice"] for found in models for row in found["slices"]["all"]))
    losses: dict[str, list[list[float]]] = {model: [] for model in groups}
    for found in models:  # one that was measured without the training text has no slice "known"
        by_kind = {row["slice"]: row["loss"] for row in found["slices"]["all"]}
        losses[without_seed(found["model"])].append([by_kind.get(kind, math.nan) for kind in kinds])
    _grouped_bars(slices, losses, kinds)
    slices.set(ylabel="loss, nats per token", title="by slice")

    lines: dict[str, list[list[tuple[float, float]]]] = {model: [] for model in groups}
    longest = 0
    for found in models:
        lengths = found.get("positions", {}).get("lengths", {})
        if lengths:
            longest = max(longest, *map(int, lengths))
            lines[without_seed(found["model"])].append(_by_position(found, max(lengths, key=int)))
    ends = _lines(positions, lines, marker="o", ms=4)
    if ends:
        shown = [x for seeds in lines.values() for points in seeds for x, _ in points]
        plain_log_axis(positions, "x", shown, sorted(set(shown))[::2])
        positions.set(
            xlabel="position from", ylabel="loss, nats per token", title=f"by position in {longest:,} tokens"
        )
        figure.canvas.draw()
        label_lines(positions, ends)
    save(figure, path)


def smoothed(values: Iterable[float], share: float = 0.8) -> list[float]:
    """Return the running mean in which each value counts 1 - share."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else share * result[-1] + (1 - share) * value)
    return result


def plot_curves(models: list[dict[str, Any]], path: Path) -> None:
    """Draw the training loss of each model over the tokens it has seen."""
    figure, axes = new_figure(1, 1, 7.0, 4.4)
    lines: dict[str, list[list[tuple[float, float]]]] = {model: [] for model in seeds_of(models)}
    for found in models:
        step = found.get("training", {}).get("tokens_per_step", 1)
        x = [row["step"] * step / 1e6 for row in found["curve"]]
        y = smoothed(row["loss"] for row in found["curve"])
        if x:
            lines[without_seed(found["model"])].append(list(zip(x, y)))
    ends = _lines(axes[0, 0], lines, lw=1.2)
    if ends:
        axes[0, 0].set_ylim(min(y for _, y, _, _ in ends) * 0.95, min(y for _, y, _, _ in ends) * 1.8)
        axes[0, 0].set(xlabel="million tokens", ylabel="training loss, nats per token (running mean)")
        figure.canvas.draw()
        label_lines(axes[0, 0], ends)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Write the tables and the pictures of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="of the files that language_models wrote")
    args = parser.parse_args(with_dashes(argv))
    models = read_models(args.folder)
    if not models:
        parser.error(f"{args.folder} holds no MODEL.json of language_models")
    write_tables(tables(models), args.folder)
    plot(models, args.folder / "language_models.png")
    plot_curves(models, args.folder / "curves.png")


if __name__ == "__main__":
    main()
