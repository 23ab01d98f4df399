"""Draw the pictures of results, and redraw all of them from the files under eval/results.

    python -m modeling_rebased.eval.plots eval/results

Each benchmark calls the function of its picture here. A model has one name and one colour in all pictures. The
pictures of associative recall, MAD, ICLL and the language models are drawn by `plot_mqar`, `plot_mad`, `plot_icll` and
`plot_language_models`. Names and colours are in `plot_style`.
"""

from __future__ import annotations

import argparse
import csv
import json
from itertools import product
from pathlib import Path
from typing import Any

from modeling_rebased.training.arguments import HelpFormatter, with_dashes

from . import plot_icll, plot_language_models, plot_mad, plot_mqar
from .plot_style import OTHERS, color_of, label_lines, label_of, new_figure, plain_log_axis, save


def plot_kernels(rows: list[dict[str, Any]], title: str, path: str | Path) -> None:
    """Draw the time of every method over the length, forward and with backward, with the time of memory alone.

    Args:
        rows: of kernels.csv: method, T, forward_ms, training_ms, floor_forward_ms, floor_training_ms.
        title: above both panels.
        path: the PNG.
    """
    figure, axes = new_figure(1, 2, 6.4, 4.2)
    lengths = sorted({row["T"] for row in rows})
    kinds = (("forward", "forward"), ("training", "forward and backward"))
    for axis, (kind, name) in zip(axes[0], kinds):
        plain_log_axis(axis, "x", lengths, lengths)
        floor = [row for row in rows if row["method"] == "rebased"]
        shown = [row[f"{kind}_ms"] for row in rows] + [row[f"floor_{kind}_ms"] for row in floor]
        plain_log_axis(axis, "y", shown)
        ends = []
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            x, y = [row["T"] for row in mine], [row[f"{kind}_ms"] for row in mine]
            color = color_of(method, (row["method"] for row in rows))
            axis.plot(x, y, marker="o", ms=4, lw=2.2 if method == "rebased" else 1.4, color=color)
            ends.append((x[-1], y[-1], label_of(method), color))
        if floor:
            x, y = [row["T"] for row in floor], [row[f"floor_{kind}_ms"] for row in floor]
            axis.plot(x, y, ls="--", color="#999999", lw=1.2)
            ends.append((x[-1], y[-1], "inputs and outputs\nmoved once", "#777777"))
        axis.set(xlabel="tokens in a sequence (T)", ylabel="milliseconds", title=name)
        figure.canvas.draw()
        label_lines(axis, ends, gap=0.08)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def plot_eager(rows: list[dict[str, Any]], title: str, path: str | Path) -> None:
    """Draw the time of the PyTorch backend and of the quadratic form over the number of tokens.

    Args:
        rows: of eager.csv: tokens, and milliseconds (or `None`) of each form.
        title: above both panels.
        path: the PNG.
    """
    figure, axes = new_figure(1, 2, 5.6, 4.0, sharey=True)
    lengths = [row["tokens"] for row in rows]
    values = [value for row in rows for name, value in row.items() if name != "tokens" and value]
    ends: list[list[tuple[float, float, str, str]]] = [[], []]
    for axis, suffix, name, mine in zip(axes[0], ("", " fwd+bwd"), ("forward", "forward and backward"), ends):
        plain_log_axis(axis, "x", lengths, lengths[::2])
        plain_log_axis(axis, "y", values)
        for form in ("chunked", "quadratic"):
            points = [(row["tokens"], row[form + suffix]) for row in rows if row.get(form + suffix)]
            if points:
                axis.plot(*zip(*points), marker="o", ms=4, lw=1.8, color=color_of(form))
                mine.append((*points[-1], label_of(form), color_of(form)))
        axis.set(xlabel="tokens in a sequence (T)", title=name)
    axes[0, 0].set_ylim(top=2.5 * max(values))
    figure.canvas.draw()
    for axis, mine in zip(axes[0], ends):  # now that both panels have settled their common limits
        label_lines(axis, mine)
    axes[0, 0].set_ylabel("milliseconds")
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def plot_models(training: list[dict[str, Any]], generation: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the speed of training over the length, and the time per generated token over the context, of whole models.

    Args:
        training: rows of training.csv: model, T, compiled, tokens_per_s.
        generation: rows of generation.csv: model, cache, batch, context, ms_per_token. Batch 1 is drawn.
        path: the PNG.
    """
    figure, axes = new_figure(1, 2, 5.6, 4.0)
    alone = [row for row in generation if row["batch"] == 1]
    panels = (
        (axes[0, 0], training, "T", "tokens_per_s", "compiled", {"True": "compiled", "False": "not compiled"}),
        (
            axes[0, 1],
            alone,
            "context",
            "ms_per_token",
            "cache",
            {"static": "static cache", "dynamic": "dynamic cache"},
        ),
    )
    for axis, rows, x, y, kind, names in panels:
        rows = [row for row in rows if row[y] == row[y]]  # not where memory ran out
        if not rows:
            continue
        lengths = sorted({row[x] for row in rows})
        apart = [at for i, at in enumerate(lengths) if i in (0, len(lengths) - 1) or at > 2 * lengths[i - 1]]
        plain_log_axis(axis, "x", lengths, apart)
        if y == "tokens_per_s":
            axis.set_ylim(0, 1.1 * max(row[y] for row in rows))
            axis.yaxis.set_major_formatter("{x:,.0f}")
        else:
            plain_log_axis(axis, "y", [row[y] for row in rows])
        ends = []
        for (model, value), style in zip(product(("rebased", "softmax"), names), ("-", "--", "-", "--")):
            of_line = (row for row in rows if row["model"].endswith(model) and str(row[kind]) == value)
            points = sorted((row[x], row[y]) for row in of_line)
            if points:
                axis.plot(*zip(*points), style, marker="o", ms=4, lw=1.8, color=color_of(model))
                ends.append((*points[-1], f"{label_of(model)}, {names[value]}", color_of(model)))
        figure.canvas.draw()
        label_lines(axis, ends)
    axes[0, 0].set(
        xlabel="tokens in a sequence (T)",
        ylabel="tokens per second",
        title="training step of 32,768 tokens or one sequence",
    )
    axes[0, 1].set(xlabel="tokens of context", ylabel="milliseconds per token", title="generate(), batch 1")
    save(figure, path)


def plot_context_parallel(rows: list[dict[str, Any]], rings: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the time per token of a training step over the length of its one sequence.

    Args:
        rows: rows of context_parallel.csv: gpu, gpus, tokens, us_per_token.
        rings: rows of ring.csv, of a softmax model with ring attention: gpus, tokens, us_per_token.
        path: the PNG.
    """
    figure, axes = new_figure(1, 1, 6.8, 4.0)
    axis = axes[0, 0]
    lines: list[tuple[str, str, list[dict[str, Any]]]] = []
    for number, gpus in enumerate(sorted({row["gpus"] for row in rows})):
        name = f"ReBased, {gpus} GPU{'s' if gpus > 1 else ''}"
        lines.append((name, OTHERS[number % len(OTHERS)], [row for row in rows if row["gpus"] == gpus]))
    if rings:
        lines.append((f"softmax, ring attention, {rings[0]['gpus']} GPUs", color_of("softmax"), rings))
    every = [row for _, _, found in lines for row in found]
    lengths = sorted({row["tokens"] for row in every})
    plain_log_axis(axis, "x", lengths, lengths)
    plain_log_axis(axis, "y", [row["us_per_token"] for row in every])
    ends = []
    for name, color, found in lines:
        found = sorted(found, key=lambda row: row["tokens"])
        x, y = [row["tokens"] for row in found], [row["us_per_token"] for row in found]
        axis.plot(x, y, marker="o", ms=4, lw=1.8, color=color)
        ends.append((x[-1], y[-1], name, color))
    title = f"training step of 150 million parameters, {rows[0]['gpu']}"
    axis.set(xlabel="tokens of a sequence", ylabel="microseconds per token", title=title)
    axis.set_ylim(top=1.5 * max(row["us_per_token"] for row in every))  # room for a name
    figure.canvas.draw()
    label_lines(axis, ends)
    save(figure, path)


def plot_several_gpus(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the speed of each GPU by the number of GPUs: as a share of that on the fewest GPUs, and in TFLOP/s.

    Args:
        rows: rows of training.csv of several GPUs: gpu, launch, gpus, parameters, tokens_per_s, tflops_per_gpu.
        path: the PNG.
    """
    rows = sorted(rows, key=lambda row: (row["parameters"], row["gpus"]))
    sizes = list(dict.fromkeys(row["parameters"] for row in rows))
    colors = [OTHERS[sizes.index(row["parameters"]) % len(OTHERS)] for row in rows]
    fewest = {row["parameters"]: row["tokens_per_s"] / row["gpus"] for row in reversed(rows)}
    shares = [row["tokens_per_s"] / row["gpus"] / fewest[row["parameters"]] for row in rows]
    names = {"one": "", "ddp": "DDP\n", "fsdp2": "FSDP2\n"}
    ticks = [
        f"{row['parameters'] / 1e6:,.0f}M\n{names[row['launch']]}{row['gpus']} GPU{'s' if row['gpus'] > 1 else ''}"
        for row in rows
    ]
    figure, axes = new_figure(1, 2, 1.0 + 0.8 * len(rows), 3.6)
    panels = (
        ("speed per GPU, against the fewest GPUs", shares, "{:.2f}"),
        ("TFLOP/s per GPU", [row["tflops_per_gpu"] for row in rows], "{:.0f}"),
    )
    for axis, (title, values, form) in zip(axes[0], panels):
        bars = axis.bar(range(len(rows)), values, 0.7, color=colors)
        axis.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=9)
        axis.set_xticks(range(len(rows)), ticks)
        axis.margins(y=0.12)
        axis.set_title(title, fontsize=10)
    figure.suptitle(f"training steps by rebased-train, {rows[0]['gpu']}", fontsize=10)
    save(figure, path)


def plot_slices(results: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Draw the loss of each slice, and that of recall tokens over the distance to the last occurrence.

    Args:
        results: by model, the contents of slices.json: "slices", a list of {"slice", "loss"}, and "by_distance",
            {distance: [tokens, sum of losses]}.
        path: the PNG.
    """
    figure, axes = new_figure(1, 2, 5.6, 4.0)
    left, right = axes[0]
    names = [row["slice"] for row in next(iter(results.values()))["slices"]]
    width = 0.8 / len(results)
    for i, (model, found) in enumerate(results.items()):
        color = color_of(model, results)
        loss = {row["slice"]: row["loss"] for row in found["slices"]}
        places = [x + (i - (len(results) - 1) / 2) * width for x in range(len(names))]
        heights = [loss.get(name, float("nan")) for name in names]
        bars = left.bar(places, heights, width * 0.94, color=color, label=label_of(model))
        left.bar_label(bars, fmt="%.2f", fontsize=7, color="#444444", padding=1)
    left.set_xticks(range(len(names)), [f"{name} tokens" for name in names])
    left.set(ylabel="loss, nats per token", title="by slice")
    left.margins(y=0.12)
    left.legend(loc="upper left", fontsize=9)

    distances = sorted({int(bin_) for found in results.values() for bin_ in found["by_distance"]})
    if distances:
        plain_log_axis(right, "x", distances, distances if len(distances) < 12 else distances[::2])
    ends = []
    for model, found in results.items():
        bins = sorted(found["by_distance"].items(), key=lambda item: int(item[0]))
        points = [(int(distance), total / tokens) for distance, (tokens, total) in bins]
        if points:
            right.plot(*zip(*points), "o-", ms=4, color=color_of(model, results))
            ends.append((*points[-1], label_of(model), color_of(model, results)))
    right.set(xlabel="tokens since the last occurrence", ylabel="loss, nats per token", title="recall tokens")
    figure.canvas.draw()
    label_lines(right, ends)
    save(figure, path)


def plot_students(curves: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the losses of the stages of distillation, a panel per stage.

    Args:
        curves: of results.json: model, stage, tokens and losses.
        path: the PNG.
    """
    stages = list(dict.fromkeys(curve["stage"] for curve in curves))
    names = {
        "transfer": ("stage transfer", "relative error of attention outputs"),
        "logits": ("stage logits", "loss, nats per token"),
        "long": ("stage long", "loss, nats per token"),
    }
    figure, axes = new_figure(1, len(stages), 5.6, 3.8)
    models = [curve["model"] for curve in curves]
    for axis, stage in zip(axes[0], stages):
        here = [curve for curve in curves if curve["stage"] == stage]
        plain_log_axis(axis, "y", [loss for curve in here for loss in curve["losses"]], _fine_ticks(here))
        ends = []
        for curve in here:
            color = color_of(curve["model"], models)
            millions = [tokens / 1e6 for tokens in curve["tokens"]]
            axis.plot(millions, curve["losses"], color=color)
            ends.append((millions[-1], curve["losses"][-1], label_of(curve["model"]), color))
        title, label = names.get(stage, (stage, "loss"))
        axis.set(xlabel="training tokens, millions", ylabel=label, title=title)
        figure.canvas.draw()
        label_lines(axis, ends, inside=False)
    save(figure, path)


def _fine_ticks(curves: list[dict[str, Any]]) -> list[float]:
    """Return ticks of a logarithmic axis whose values span less than a factor of ten."""
    losses = [loss for curve in curves for loss in curve["losses"]]
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = [step * 10.0**power for power in range(-5, 5) for step in steps]
    return [round(tick, 8) for tick in ticks if min(losses) / 1.1 <= tick <= max(losses) * 1.1]


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Read a CSV file: numbers as numbers, an empty cell as `None`."""

    def value(text: str) -> Any:
        try:
            return int(text)
        except ValueError:
            pass
        try:
            return float(text)
        except ValueError:
            return text or None

    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def kernels_title(rows: list[dict[str, Any]], machine: dict[str, Any], head_dim: int, tokens: int) -> str:
    """Return the title of a picture of kernels: the machine and all sizes."""
    features = next((row["F"] for row in rows if row["method"] == "rebased"), rows[0]["F"])
    heads = max(row["H"] for row in rows)
    return (
        f"{machine['gpu']}, bfloat16, {tokens:,} tokens in all, {heads} heads, "
        f"F = {features} features, D = {head_dim} values per head"
    )


def redraw(folder: Path) -> list[Path]:
    """Redraw the pictures of all files of results under a folder, and return their paths."""
    drawn = []
    for path in sorted(folder.glob("**/machine.json")):
        machine = json.loads(path.read_text(encoding="utf-8"))
        if (path.parent / "kernels.csv").is_file():
            rows = read_csv(path.parent / "kernels.csv")
            tokens = machine.get("tokens", 65536)
            title = kernels_title(rows, machine, machine.get("head_dim", 64), tokens)
            drawn.append(path.parent / "kernels.png")
            plot_kernels(rows, title, drawn[-1])
        if (path.parent / "eager.csv").is_file():
            drawn.append(path.parent / "eager.png")
            plot_eager(read_csv(path.parent / "eager.csv"), machine["title"], drawn[-1])
    for path in sorted(folder.glob("**/generation.csv")):
        if path.with_name("training.csv").is_file():  # the picture has a panel for each
            drawn.append(path.with_name("models.png"))
            plot_models(read_csv(path.with_name("training.csv")), read_csv(path), drawn[-1])
    for path in sorted(folder.glob("**/context_parallel.csv")):
        drawn.append(path.with_suffix(".png"))
        rings = path.with_name("ring.csv")
        plot_context_parallel(read_csv(path), read_csv(rings) if rings.exists() else [], drawn[-1])
    for path in sorted(folder.glob("several_gpus/*/training.csv")):
        drawn.append(path.with_name("several_gpus.png"))
        plot_several_gpus(read_csv(path), drawn[-1])
    for path in sorted(folder.glob("**/slices.json")):
        drawn.append(path.with_name("slices.png"))
        plot_slices(json.loads(path.read_text(encoding="utf-8")), drawn[-1])
    for path in sorted(folder.glob("**/results.json")):
        curves = json.loads(path.read_text(encoding="utf-8")).get("curves")
        if curves:
            drawn.append(path.with_name("curves.png"))
            plot_students(curves, drawn[-1])
    for runs in sorted({path.parent for path in folder.glob("**/*.jsonl") if path.parent.name == "mqar"}):
        plot_mqar.main([*map(str, sorted(runs.glob("*.jsonl"))), "--output", str(runs)])
        drawn += [runs / "figure_1.png", runs / "curves.png"]
    for name, program in (("mad", plot_mad), ("icll", plot_icll)):
        for runs in sorted({path.parent for path in folder.glob("**/*.jsonl") if path.parent.name == name}):
            program.main([*map(str, sorted(runs.glob("*.jsonl"))), "--output", str(runs)])
            drawn.append(runs / f"{name}.png")
    for path in sorted(folder.glob("**/domains.csv")):
        plot_language_models.main([str(path.parent)])
        drawn += [path.with_name("language_models.png"), path.with_name("curves.png")]
    return drawn


def main(argv: list[str] | None = None) -> None:
    """Redraw every picture under a folder of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("eval/results"), help="default: eval/results")
    folder = parser.parse_args(with_dashes(argv)).folder
    drawn = redraw(folder)
    if not drawn:
        parser.error(f"{folder} holds no files of results")
    print(*drawn, sep="\n")


if __name__ == "__main__":
    main()
