"""Write the tables and the picture of the language models that `language_models` measured.

    python -m modeling_rebased.eval.plot_language_models eval/results/language_models

reads FOLDER/MODEL.json of each model, and writes into FOLDER
    domains.csv, slices.csv, distance.csv, frequency.csv, positions.csv, speed.csv    one row per model and bin
    language_models.png    bits per byte by domain, loss of the slices, and loss by position
    curves.png             training loss by tokens
"""

from __future__ import annotations

import argparse
import csv
import json
import math
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


def _grouped_bars(axis: Any, models: list[dict[str, Any]], names: list[str], heights: dict[str, list[float]]) -> None:
    width = 0.8 / len(models)
    for number, found in enumerate(models):
        name = found["model"]
        places = [x + (number - (len(models) - 1) / 2) * width for x in range(len(names))]
        color = color_of(name, (each["model"] for each in models))
        axis.bar(places, heights[name], width * 0.92, color=color, label=label_of(name))
    axis.set_xticks(range(len(names)), names)


def plot(models: list[dict[str, Any]], path: Path) -> None:
    """Draw bits per byte by domain, the loss of the slices, and the loss by position in the longest windows."""
    figure, axes = new_figure(1, 3, 6.2, 4.2)
    domains, slices, positions = axes[0]
    names = list(models[0]["domains"])
    bits = {found["model"]: [found["domains"][name]["bits_per_byte"] for name in names] for found in models}
    _grouped_bars(domains, models, names, bits)
    domains.set(ylabel="bits per byte", title="by domain")
    domains.tick_params(axis="x", labelrotation=20)
    domains.margins(y=0.25)
    domains.legend(fontsize=8, ncols=3, loc="upper center")

    kinds = list(dict.fromkeys(row["slice"] for found in models for row in found["slices"]["all"]))
    losses = {}
    for found in models:  # one that was measured without the training text has no slice "known"
        by_kind = {row["slice"]: row["loss"] for row in found["slices"]["all"]}
        losses[found["model"]] = [by_kind.get(kind, math.nan) for kind in kinds]
    _grouped_bars(slices, models, kinds, losses)
    slices.set(ylabel="loss, nats per token", title="by slice")

    ends = []
    shown: list[float] = []
    longest = 0
    for found in models:
        lengths = found.get("positions", {}).get("lengths", {})
        if not lengths:
            continue
        longest = max(longest, *map(int, lengths))
        bins = lengths[max(lengths, key=int)]["bins"]
        points = [(max(least, 64), loss / tokens) for least, tokens, loss in bins]
        shown += [x for x, _ in points]
        color = color_of(found["model"], (each["model"] for each in models))
        positions.plot(*zip(*points), "o-", ms=4, color=color)
        ends.append((*points[-1], label_of(found["model"]), color))
    if ends:
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
    ends = []
    for found in models:
        curve = found["curve"]
        if not curve:
            continue
        step = found.get("training", {}).get("tokens_per_step", 1)
        x = [row["step"] * step / 1e6 for row in curve]
        y = smoothed(row["loss"] for row in curve)
        color = color_of(found["model"], (each["model"] for each in models))
        axes[0, 0].plot(x, y, lw=1.4, color=color)
        ends.append((x[-1], y[-1], label_of(found["model"]), color))
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
