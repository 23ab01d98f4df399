"""Write the tables of README.md and docs/ from the files under eval/results.

    python -m docs.tables            # rewrites what stands between the markers of each table
    python -m docs.tables --check    # changes nothing, and fails if a page is stale

A page says `<!-- table: NAME -->` where the table NAME begins and `<!-- end of table -->` where it ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import string
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from modeling_rebased import ReBasedConfig
from modeling_rebased.configuration import config_path
from modeling_rebased.eval import plot_icll, plot_mad
from modeling_rebased.eval.plot_mqar import (
    ABLATION,
    FIGURE_MODELS,
    HIDDEN,
    LENGTHS,
    PAPER_GOAL,
    PUBLISHED,
    cells,
    differences,
    figure_cells,
    markdown,
    read_runs,
    seed_accuracies,
)
from modeling_rebased.eval.plot_style import label_of
from modeling_rebased.eval.plots import read_csv
from modeling_rebased.serving.plan import state_bytes
from modeling_rebased.training.mqar_runs import Run


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {}  # what makes each table, by its name in a page


def shown(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Return a decorator that makes a function the one that writes the table NAME."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        TABLES[name] = function
        return function

    return register


def table(head: list[Any], rows: list[list[Any]], words: int = 1) -> str:
    """Return a table in Markdown, its first `words` columns flush left and the others flush right."""
    rule = ["---" if i < words else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, rule, *rows])


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, below 1 so many decimals, thousands apart; "" for `None`."""
    if value is None:
        return ""
    places = digits - len(str(int(abs(value)))) if abs(value) >= 1 else digits
    return f"{value:,.{max(0, places)}f}"


class Cells(string.Formatter):
    """Format the cells of a table.

    Beside Python's own formats, `{x:3sig}` gives three significant digits, `{x:name}` the name of a model or method,
    and `{x:yes}` yes or no. A field without a value gives an empty cell.
    """

    def format_field(self, value: Any, form: str) -> str:
        """Return the text of one field."""
        if value is None:
            return ""
        if form.endswith("sig"):
            return number(value, int(form.removesuffix("sig")))
        if form == "name":
            return label_of(value)
        if form == "yes":
            return "yes" if str(value) == "True" else "no"
        return super().format_field(value, form)


def cells_of(columns: str, rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows that `columns` describes: "heading: format of the fields | heading: ..."."""
    parts = [part.partition(": ") for part in columns.split(" | ")]
    forms = [form for _, _, form in parts]
    return [head for head, _, _ in parts], [[Cells().vformat(form, (), row) for form in forms] for row in rows]


def down(rows: Iterable[dict[str, Any]], columns: str, words: int = 1) -> str:
    """Return a table with one line per row of results. `cells_of` explains `columns`, and `table` explains `words`."""
    return table(*cells_of(columns, rows), words)


def across(rows: Iterable[dict[str, Any]], lines: str) -> str:
    """Return a table with one column per row of results. The first of `lines` is the heading (`cells_of`)."""
    names, found = cells_of(lines, rows)
    head, *values = ([name, *row] for name, row in zip(names, zip(*found)))
    return table(head, values)


def results(name: str) -> list[dict[str, Any]]:
    """Return the rows of a CSV file under eval/results."""
    return read_csv(RESULTS / name)


# ---------------------------------------------------------------- kernels


def kernel_times(folder: str, kind: str) -> dict[str, dict[int, float]]:
    """Return milliseconds by method and length; `kind` is "forward" or "training"."""
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for row in results(f"kernels/{folder}"):
        times[row["method"]][row["T"]] = row[f"{kind}_ms"]
    return times


def kernels(folder: str, kind: str, floor: bool = False) -> str:
    """Return the times of all methods by length."""
    times = kernel_times(f"{folder}/kernels.csv", kind)
    if folder == "h100-f64":
        for name, found in kernel_times("h100-f64/retention.csv", kind).items():
            if name != "rebased":
                times[name] = found
    lengths = list(times["rebased"])
    rows = [[label_of(name), *(number(found.get(length)) for length in lengths)] for name, found in times.items()]
    if floor:
        first = results(f"kernels/{folder}/kernels.csv")[0][f"floor_{kind}_ms"]
        rows.append(["inputs and outputs moved once", *[number(first)] * len(lengths)])
    return table(["T", *(f"{length:,}" for length in lengths)], rows)


TABLES |= {
    "kernels-forward": lambda: kernels("h100", "forward", floor=True),
    "kernels-training": lambda: kernels("h100", "training", floor=True),
    "kernels-64-forward": lambda: kernels("h100-f64", "forward"),
    "kernels-64-training": lambda: kernels("h100-f64", "training"),
}


@shown("kernels-ratios")
def kernel_ratios() -> str:
    """Return how many times as fast ReBased is as the others, and its extra memory, for F = 16."""
    rows = []
    lengths = list(kernel_times("h100/kernels.csv", "forward")["rebased"])
    for kind, name in (("forward", "forward"), ("training", "forward and backward")):
        times = kernel_times("h100/kernels.csv", kind)
        for other in ("softmax", "fla parallel_rebased", "fla chunk_simple_gla"):
            ratios = [number(times[other][n] / times["rebased"][n], 2) if n in times[other] else "" for n in lengths]
            rows.append([f"{name}, {label_of(other)}", *ratios])
    memory = {row["T"]: row["extra_gib"] for row in results("kernels/h100/kernels.csv")[: len(lengths)]}
    rows.append(["extra memory of ReBased, GiB", *(f"{memory[n]:.2f}" for n in lengths)])
    return table(["T", *(f"{length:,}" for length in lengths)], rows)


@shown("kernels-64-memory")
def extra_memory_64() -> str:
    """Return the extra memory for F = 64."""
    rows = (row for row in results("kernels/h100-f64/kernels.csv") if row["method"] == "rebased")
    return across(rows, "T: {T:,} | extra memory of ReBased, GiB: {extra_gib:.2f}")


@shown("decode")
def decode() -> str:
    """Return the time of one token of one layer."""
    return across(
        results("generation/h100/decode.csv"),
        "batch: {batch} | one token, µs: {us:.1f} | the same, states by slot number, µs: {by_slot_us:.1f} | "
        "reading and writing the state once, µs: {floor_us:.1f}",
    )


def whole_models(name: str, **where: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of training.csv or generation.csv that have these values, by model without its size."""
    rows = results(f"generation/h100/{name}.csv")
    found = [row for row in rows if all(str(row[key]) == str(value) for key, value in where.items())]
    return {row["model"].removeprefix("150m-"): row for row in found}


@shown("models-training")
def models_training() -> str:
    """Return the training steps of whole models."""
    rows = []
    for length, compiled in sorted({(row["T"], row["compiled"]) for row in results("generation/h100/training.csv")}):
        found = whole_models("training", T=length, compiled=compiled)
        ours, softmax = found["rebased"], found["softmax"]
        ratio = ours["tokens_per_s"] / softmax["tokens_per_s"]
        rows.append({"ours": ours, "softmax": softmax, "ratio": ratio})
    return down(
        rows,
        "T: {ours[T]:,} | layers compiled: {ours[compiled]:yes} | ReBased: {ours[tokens_per_s]:,.0f} | "
        "softmax: {softmax[tokens_per_s]:,.0f} | ratio: {ratio:3sig} | ReBased, peak GiB: {ours[peak_gib]:.1f} | "
        "softmax, peak GiB: {softmax[peak_gib]:.1f}",
    )


@shown("models-generation")
def models_generation() -> str:
    """Return `generate()` of whole models."""
    rows = []
    for ours in results("generation/h100/generation.csv"):
        if ours["model"] == "150m-rebased":
            same = {key: ours[key] for key in ("batch", "context", "cache")}
            softmax = whole_models("generation", **same).get("softmax", dict.fromkeys(ours))
            # What is no number there could not be measured.
            rows.append({"ours": ours, "softmax": {k: None if v != v else v for k, v in softmax.items()}})
    return down(
        rows,
        "cache: {ours[cache]} | batch: {ours[batch]} | context: {ours[context]:,} | "
        "ms per step, ReBased: {ours[ms_per_token]:,.2f} | softmax: {softmax[ms_per_token]:,.2f} | "
        "ms for the context and 4 tokens, ReBased: {ours[first_4_ms]:,.0f} | softmax: {softmax[first_4_ms]:,.0f} | "
        "peak GiB, ReBased: {ours[peak_gib]:,.1f} | softmax: {softmax[peak_gib]:,.1f}",
    )


@shown("cpu-generation")
def cpu_generation() -> str:
    """Return `generate()` of small models on a CPU."""
    return down(
        results("generation/cpu/cpu.csv"),
        "model: {model} | fastest call, ms per token: {min_ms:.1f} | median: {median_ms:.1f} | "
        "tokens per second of the fastest: {tokens_per_s:,.0f}",
    )


@shown("loop")
def loop_of_generate() -> str:
    """Return the host time of a step of `generate()` in which nothing is computed."""
    return down(results("generation/cpu/loop.csv"), "part: {part} | µs per step: {us:.0f}")


@shown("convolution")
def convolution() -> str:
    """Return what the two forms of the short convolution give."""
    return down(
        results("generation/h100/convolution.csv"),
        "convolution: {convolution} | layers compiled: {compiled:yes} | tokens per second: {tokens_per_s:,.0f} | "
        "peak GiB: {peak_gib:.1f} | ms of a prefill: {prefill_ms:3sig}",
        words=2,
    )


@shown("models-changes")
def models_changes() -> str:
    """Return what each change of a training step gave."""
    columns = "step: {change} | tokens per second: {tokens_per_s:,.0f} | peak GiB: {peak_gib:.1f}"
    return down(results("generation/h100/changes.csv"), columns)


@shown("step")
def step_parts() -> str:
    """Return the GPU's work in a training step, by what it is for."""
    rows = sorted(results("generation/h100/step.csv"), key=lambda row: row["part"] == "other")
    total = {key: sum(row[key] or 0 for row in rows) for key in ("ms", "ms_in_mixed_precision")}
    return down(
        [*({key: value or None for key, value in row.items()} for row in rows), {"part": "sum", **total}],
        "part: {part} | bfloat16, forward and backward, ms: {ms:.1f} | "
        "rebased-train in mixed precision before the change, ms: {ms_in_mixed_precision:.1f}",
    )


@shown("first")
def first_calls() -> str:
    """Return the seconds of the first training step and of the first prefill, by version."""
    versions: dict[str, dict[str, Any]] = {}
    for row in results("generation/h100/first.csv"):
        versions.setdefault(row["version"], {"version": row["version"]})[row["what"]] = row["first_s"]
    return down(
        versions.values(),
        "version: {version} | first training step, 16,384 tokens: {step:3sig} | "
        "first prefill, 32,768 tokens: {prefill:3sig}",
    )


@shown("range")
def passes_for_range() -> str:
    """Return the times of attention with and without `normalized=True`, by version."""
    rows: dict[tuple, dict[str, Any]] = {}
    for row in results("kernels/h100/range.csv"):
        key = row["kernel"], row["version"], row["normalized"]
        rows.setdefault(key, {**row})[f"at_{row['T']}"] = row
    return down(
        rows.values(),
        "kernel: {kernel:name} | version: {version} | `normalized=True`: {normalized:yes} | "
        "forward, T = 2,048: {at_2048[forward_ms]:.2f} | "
        "forward and backward, T = 2,048: {at_2048[training_ms]:.2f} | "
        "forward, T = 8,192: {at_8192[forward_ms]:.2f} | "
        "forward and backward, T = 8,192: {at_8192[training_ms]:.2f}",
        words=3,
    )


@shown("train-lm")
def train_lm() -> str:
    """Return the speed of rebased-train."""
    rows = results("generation/h100/train-lm.csv")
    return down(
        ({**row, "model": row["model"].removeprefix("150m-")} for row in rows),
        "model: {model:name} | version: {version} | tokens per second: {tokens_per_s:,.0f} | ms per step: {ms:.1f} | "
        "peak GiB: {peak_gib:.1f}",
        words=2,
    )


@shown("loss-chunks")
def loss_chunks() -> str:
    """Return the time of the loss and its gradients by the size of a chunk."""
    return across(results("generation/h100/loss-chunks.csv"), "tokens per chunk: {chunk:,} | ms: {ms:.1f}")


@shown("counters")
def counters() -> str:
    """Return the hardware counters by kernel."""
    names = ["state sums of keys", "scan of key states", "forward", "dq", "state sums of queries"]
    names += ["scan of query states", "dk and dv"]
    rows = zip(names, results("kernels/h100/counters.csv"), strict=True)
    return down(
        ({**row, "kernel": name} for name, row in rows),
        "kernel: {kernel} | µs: {us:.0f} | shared memory and L1, %: {l1_pct:.0f} | L2, %: {l2_pct:.0f} | "
        "device memory, %: {dram_pct:.0f} | matrix units, %: {matrix_units_pct:.0f} | "
        "issue slots, %: {issue_slots_pct:.0f} | warps per multiprocessor: {warps_an_sm:.0f} | "
        "registers per thread: {registers:.0f}",
    )


@shown("versions")
def versions() -> str:
    """Return the time of all kernels of forward and backward together, by version of the kernels."""
    total: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in results("kernels/h100-versions/kernels.csv"):
        total[row["version"]][row["T"]] += row["us"]
    rows = [[name, *(f"{found[n]:,.0f}" for n in (2048, 8192, 131072))] for name, found in total.items()]
    return table(["version", "T = 2,048", "8,192", "131,072"], rows)


@shown("eager")
def eager() -> str:
    """Return the times of the PyTorch backend on a CPU."""
    return across(
        results("eager/eager.csv"),
        "T: {tokens:,} | forward, linear form: {chunked:2sig} | forward, quadratic form: {quadratic:2sig} | "
        "forward and backward, linear form: {chunked fwd+bwd:2sig} | "
        "forward and backward, quadratic form: {quadratic fwd+bwd:2sig}",
    )


# ---------------------------------------------------------------- serving


@shown("serving-plan")
def serving_plan() -> str:
    """Return how many requests of pure ReBased models fit into a pool of 60 GiB."""
    rows = []
    for name in ("english-6m", "150m-rebased", "360m-rebased", "1.3b-rebased"):
        held = state_bytes(ReBasedConfig.from_pretrained(config_path(name)))
        rows.append([f"`{name}`", number(held / 1e6), f"{60 * 2**30 // held:,}", f"{60 * 2**30 // (2 * held):,}"])
    return table(["configuration", "megabytes per request", "requests", "requests with prefix caching"], rows)


@shown("serving-memory")
def serving_memory() -> str:
    """Return the bytes that a request holds in vLLM, by the length of its context."""
    rows = results("serving/memory.csv")
    lengths = sorted({row["context_tokens"] for row in rows})

    def megabytes(model: str, cached: str, length: int) -> str:
        found = next(
            row
            for row in rows
            if (row["model"], str(row["prefix_caching"]), row["context_tokens"]) == (model, cached, length)
        )
        return number(found["bytes_per_request"] / 1e6)

    names = {"150m-rebased": "ReBased", "150m-hybrid": "ReBased and sliding windows", "150m-softmax": "softmax"}
    return table(
        ["model of 150M parameters", "prefix caching", *(f"{length:,} tokens" for length in lengths)],
        [
            [name, {"False": "off", "True": "on"}[cached], *(megabytes(model, cached, length) for length in lengths)]
            for model, name in names.items()
            for cached in ("False", "True")
        ],
        2,
    )


@shown("serving-speed")
def serving_speed() -> str:
    """Return the tokens per second of vLLM and of transformers on a CPU."""
    names = {"vllm": "vLLM", "transformers": "transformers' `generate`, one padded batch"}
    return down(
        ({**row, "engine": names[row["engine"]]} for row in results("serving/speed.csv")),
        "engine: {engine} | seconds, best of 3: {seconds_best_of_3:3sig} | "
        "seconds, worst of 3: {seconds_worst_of_3:3sig} | new tokens per second: {new_tokens_per_second:3sig}",
    )


# ---------------------------------------------------------------- associative recall


def mqar_runs() -> list[dict[str, Any]]:
    """Return all runs, as the figure takes them."""
    return read_runs(sorted((RESULTS / "mqar").glob("*.jsonl")))


TABLES |= {
    "mqar-cells": lambda: markdown(cells(mqar_runs())),
    "mqar-differences": lambda: differences(cells(mqar_runs())),
}


@shown("mqar-figure")
def mqar_figure() -> str:
    """Return the means of the cells of Figure 1, a row per size, with the authors' values and the numbers of seeds."""
    found = {(cell.length, cell.hidden, cell.model): cell for cell in figure_cells(cells(mqar_runs()))}
    models = [model for model in FIGURE_MODELS if any(model == key[2] for key in found)]
    head = ["length", "hidden"]
    for model in models:
        head += [label_of(model), *(["paper"] if model in PUBLISHED and model != "softmax" else [])]
    rows = []
    for length, hidden in itertools.product(LENGTHS, HIDDEN):
        row = [f"{length:,}", hidden]
        for model in models:
            cell = found.get((length, hidden, model))
            row.append("" if cell is None else f"{cell.mean:.3f} ({len(cell.accuracies)})")
            if model in PUBLISHED and model != "softmax":
                theirs = PUBLISHED[model].get((length, hidden))
                row.append("≥ 0.97" if theirs is None else f"{theirs:.2f}")
        rows.append(row)
    return table(head, rows)


@shown("mqar-rates")
def mqar_rates() -> str:
    """Return the accuracy of every finished run of the 12-head models where the task is hard, by rate and seed."""
    rows = []
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    finished_runs = [run for run in mqar_runs() if run["model"] in ("rebased", "based") and not run.get("stopped")]
    hard = {(run["length"], run["hidden"]) for run in finished_runs if run["accuracy"] < PAPER_GOAL}
    for run in finished_runs:
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
    runs = [run for run in mqar_runs() if (run["length"], run["hidden"], run["lr"]) == (512, 64, 3e-3)]
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
    runs = [run for run in mqar_runs() if run["model"] in order and not run.get("stopped")]
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
    shown = [entry for entry in run["history"] if entry["epoch"] in (1, 5, 6, 7, 8, 9, 10, 12, 17)]
    return across(shown, "epoch: {epoch} | loss: {loss:.3f} | accuracy: {accuracy:.3f}")


# ---------------------------------------------------------------- MAD and in-context language learning


def finished(name: str) -> list[dict[str, Any]]:
    """Return the finished runs in a folder of results."""
    return [run for run in read_runs(sorted((RESULTS / name).glob("*.jsonl"))) if not run.get("stopped")]


TABLES |= {
    "mad-scores": lambda: plot_mad.markdown(finished("mad")),
    "icll": lambda: plot_icll.markdown(finished("icll")),
}


@shown("mad-fuzzy")
def mad_fuzzy() -> str:
    """Return the accuracy on fuzzy recall at its best epoch and at the last."""
    rows = []
    for run in (run for run in finished("mad") if run["task"] == "fuzzy_recall"):
        best = max(run["history"], key=lambda entry: entry["accuracy"])
        last = run["history"][-1]
        figures = [f"{best['accuracy']:.3f}", f"{last['accuracy']:.3f}"]
        rows.append([label_of(run["model"]), f"{run['lr']:g}", best["epoch"], *figures])
    rows.sort(key=lambda row: float(row[1]))
    return table(["model", "rate", "best epoch", "accuracy there", "at the end"], rows)


# ---------------------------------------------------------------- language models


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
    for name, shown in names.items():
        own = figures.get(name)
        size = f"{own['parameters']:,}" if own else "135 million"
        bits = own["eval_bits_per_byte"] if own else None
        rows.append({**judged.get(name, dict.fromkeys(judged["judge"])), "model": shown, "size": size, "bits": bits})
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


# ---------------------------------------------------------------- conversion


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


# ---------------------------------------------------------------- the README


def recall_512() -> tuple[Any, Any]:
    """Return the cells of ReBased and Based at length 512 and hidden size 64."""
    found = {(cell.model, cell.length, cell.hidden): cell for cell in cells(mqar_runs())}
    return found["rebased", 512, 64], found["based", 512, 64]


@shown("overview")
def overview() -> str:
    """Return the one table of results of the README."""
    training = kernel_times("h100/kernels.csv", "training")
    step = whole_models("generation", batch=1, context=131072, cache="static")
    steps = whole_models("training", T=16384, compiled=True)
    split, ring = (
        next(x for x in results(f"context_parallel/h200/{name}.csv") if (x["gpus"], x["tokens"]) == (4, 131072))
        for name in ("context_parallel", "ring")
    )
    slices = [row for row in results("language_models/slices.csv") if row["domain"] == row["slice"] == "all"]
    losses = {row["model"]: row["loss"] for row in slices}
    ours, based = recall_512()
    found = perplexities()
    spread = [f"{cell.mean:.2f} ± {statistics.stdev(cell.accuracies):.2f}" for cell in (ours, based)]
    hybrid, teacher = (
        found[model, stage, "heldout", 1024] for model, stage in (("hybrid", "logits"), ("teacher", ""))
    )
    rows = [
        [
            "attention kernels, forward and backward at T = 32,768, ms",
            number(training["rebased"][32768], 2),
            f"softmax {number(training['softmax'][32768])}",
            "[kernels](docs/kernels.md)",
        ],
        [
            "training of 150M parameters at T = 16,384, layers compiled, tokens per second",
            f"{steps['rebased']['tokens_per_s']:,.0f}",
            f"softmax {steps['softmax']['tokens_per_s']:,.0f}",
            "[kernels](docs/kernels.md#whole-models)",
        ],
        [
            "the same over one sequence of 131,072 tokens on four H200, tokens per second",
            f"{split['tokens_per_s']:,.0f}",
            f"softmax, ring attention {ring['tokens_per_s']:,.0f}",
            "[training](docs/training.md#what-you-get)",
        ],
        [
            "`generate()` with a static cache after 131,072 tokens, 150M parameters, ms per token",
            f"{step['rebased']['ms_per_token']:.1f}",
            f"softmax {step['softmax']['ms_per_token']:.1f}",
            "[kernels](docs/kernels.md#whole-models)",
        ],
        [
            "its peak memory, GiB",
            f"{step['rebased']['peak_gib']:.1f}",
            f"softmax {step['softmax']['peak_gib']:.1f}",
            "[kernels](docs/kernels.md#whole-models)",
        ],
        [
            "language model of 150M parameters after 400M tokens, loss on held-out text in nats per token",
            f"{losses['rebased']:.3f}",
            f"Based {losses['based']:.3f}, softmax {losses['softmax']:.3f}",
            "[results](docs/results.md#150-million-parameters)",
        ],
        [
            f"associative recall, length 512, hidden size 64, accuracy of {len(ours.accuracies)} seeds",
            spread[0],
            f"Based {spread[1]}",
            "[results](docs/results.md#associative-recall-mqar)",
        ],
        [
            "SmolLM2-135M-Instruct converted (hybrid), perplexity of held-out text",
            f"{hybrid:.1f}",
            f"the original {teacher:.1f}",
            "[conversion](docs/conversion.md#smollm2-135m-instruct)",
        ],
    ]
    return table(["what was measured", "ReBased", "compared with", "details"], rows, 4)


@shown("several-gpus")
def several_gpus() -> str:
    """Return the speed of `train_lm` by the number of GPUs, against fewer GPUs with as many tokens per GPU."""
    launches = {"one": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}
    rows = []
    fewest: dict[int, float] = {}  # the speed per GPU on the fewest GPUs, by parameters
    for row in sorted(results("several_gpus/h200/training.csv"), key=lambda row: (row["parameters"], row["gpus"])):
        per_gpu = row["tokens_per_s"] / row["gpus"]
        share = per_gpu / fewest.setdefault(row["parameters"], per_gpu)
        more = {"millions": row["parameters"] / 1e6, "share": share, "peak": row["tflops_per_gpu"] / 790}
        rows.append({**row, **more, "launch": launches[row["launch"]]})
    return down(
        rows,
        "parameters: {millions:,.0f}M | launch: {launch} | GPUs: {gpus} | "
        "tokens per GPU and step: {tokens_per_gpu:,} | tokens per second: {tokens_per_s:,.0f} | "
        "share per GPU: {share:.3f} | TFLOP/s per GPU: {tflops_per_gpu:.0f} | of 790: {peak:.0%} | "
        "peak GiB per GPU: {peak_gib:.1f}",
        words=2,
    )


@shown("ddp-options")
def ddp_options() -> str:
    """Return what options of DistributedDataParallel change for four GPUs."""
    return down(
        results("several_gpus/h200/ddp-options.csv"),
        "option: {option} | ms per step: {ms:.1f} | tokens per second: {tokens_per_s:,.0f}",
        words=1,
    )


@shown("context-parallel")
def context_parallel() -> str:
    """Return the training steps whose sequence is split over GPUs, against one GPU with as many tokens per GPU."""
    found = results("context_parallel/h200/context_parallel.csv")
    alone = {row["tokens_per_gpu"]: row["tokens_per_s"] for row in found if row["gpus"] == 1}
    rows = sorted(found, key=lambda row: (row["tokens_per_gpu"], row["gpus"]))
    return down(
        ({**row, "times": row["tokens_per_s"] / alone[row["tokens_per_gpu"]]} for row in rows),
        "tokens per GPU: {tokens_per_gpu:,} | GPUs: {gpus} | tokens per sequence: {tokens:,} | "
        "checkpointing: {checkpointing:yes} | tokens per second: {tokens_per_s:,.0f} | times one GPU: {times:.2f} | "
        "µs per token: {us_per_token:.3f} | peak GiB per GPU: {peak_gib:.1f}",
        words=0,
    )


@shown("context-parallel-ring")
def context_parallel_ring() -> str:
    """Return the training steps of a softmax model by ring attention, beside ReBased on as many GPUs."""
    found = results("context_parallel/h200/context_parallel.csv")
    speeds = {(row["gpus"], row["tokens"]): row["tokens_per_s"] for row in found}
    rows = []
    for row in results("context_parallel/h200/ring.csv"):
        ours = speeds.get((row["gpus"], row["tokens"]))
        shown, ratio = (f"{ours:,.0f}", ours / row["tokens_per_s"]) if ours else ("not measured", None)
        rows.append({**row, "ours": shown, "ratio": ratio})
    return down(
        rows,
        "tokens per sequence: {tokens:,} | ReBased, tokens per second: {ours} | "
        "softmax, tokens per second: {tokens_per_s:,.0f} | ReBased / softmax: {ratio:.1f}",
        words=0,
    )


@shown("context-parallel-profile")
def context_parallel_profile() -> str:
    """Return what a step consists of on each GPU, by the profiler."""
    rows = results("context_parallel/h200/profile.csv")
    return down(
        (row for row in rows if row["tokens_per_gpu"] != 131072),
        "tokens per GPU: {tokens_per_gpu:,} | GPUs: {gpus} | GPU: {rank} | step, ms: {wall_ms:.0f} | "
        "host, ms: {host_ms:.0f} | compute, ms: {compute_ms:.0f} | all-gather, ms: {all_gather_ms:.0f} | "
        "all-reduce, ms: {all_reduce_ms:.0f} | kernels: {kernels:,} | largest gap, ms: {gap_ms:.1f}",
        words=0,
    )


@shown("context-parallel-errors")
def context_parallel_errors() -> str:
    """Return how far a sequence over several GPUs is from the same on one GPU."""
    columns = "dtype: {dtype} | GPUs: {gpus} | tokens: {tokens:,} | logits: {logits:.1e} | gradients: {gradients:.1e}"
    return down(results("context_parallel/h200/errors.csv"), columns)


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


def by_model(rows: list[dict[str, Any]], kind: str, value: str, digits: str) -> tuple[list[Any], list[list[str]]]:
    """Return the different values of column `kind`, and for each model its label and its `value` at each of them."""
    kinds = list(dict.fromkeys(row[kind] for row in rows))
    found: dict[str, dict[Any, str]] = defaultdict(dict)
    for row in rows:
        found[row["model"]][row[kind]] = format(row[value], digits)
    return kinds, [[label_of(model), *(cells[kind] for kind in kinds)] for model, cells in found.items()]


@shown("lm-domains")
def lm_domains() -> str:
    """Return bits per byte of each domain, and the perplexity over all domains."""
    rows = results("language_models/domains.csv")
    domains, lines = by_model(rows, "domain", "bits_per_byte", ".3f")
    parameters = {label_of(row["model"]): f"{row['parameters']:,}" for row in rows}
    overall = [row for row in results("language_models/slices.csv") if row["domain"] == row["slice"] == "all"]
    perplexities = {label_of(row["model"]): f"{row['perplexity']:.2f}" for row in overall}
    return table(
        ["model", "parameters", *domains, "perplexity of all"],
        [[name, parameters[name], *bits, perplexities[name]] for name, *bits in lines],
    )


@shown("lm-slices")
def lm_slices() -> str:
    """Return the loss of each slice over all domains, and its share of the tokens."""
    rows = [row for row in results("language_models/slices.csv") if row["domain"] == "all"]
    slices, lines = by_model(rows, "slice", "loss", ".3f")
    shares = {row["slice"]: f"{row['share']:.1%}" for row in rows}
    return table(["loss, nats per token", *slices], [*lines, ["share of tokens", *(shares[name] for name in slices)]])


@shown("lm-distance")
def lm_distance() -> str:
    """Return the loss of recall tokens by the distance to the earlier bigram."""
    rows = [row for row in results("language_models/distance.csv") if row["distance_from"] >= 8]
    distances, lines = by_model(rows, "distance_from", "loss", ".3f")
    return table(["loss at a distance from", *(f"{distance:,}" for distance in distances)], lines)


@shown("lm-lengths")
def lm_lengths() -> str:
    """Return the loss of the same documents in windows of each length."""
    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in results("language_models/positions.csv"):
        total = sums[row["model"], row["length"]]
        total[0] += row["loss"] * row["tokens"]
        total[1] += row["tokens"]
    rows = [{"model": model, "length": n, "loss": loss / count} for (model, n), (loss, count) in sums.items()]
    lengths, lines = by_model(rows, "length", "loss", ".3f")
    return table(["tokens per window", *(f"{length:,}" for length in lengths)], lines)


@shown("lm-speed")
def lm_speed() -> str:
    """Return speed and memory of a training step of each model."""
    columns = "model: {label} | tokens per second: {training_tokens_per_second:,.0f} | peak, GiB: {training_gib:.1f}"
    return down(({"label": label_of(row["model"]), **row} for row in results("language_models/speed.csv")), columns)


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """Return a page with its tables made anew."""

    def fill(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"there is no table {match[2]!r}; it must be one of {', '.join(sorted(TABLES))}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> None:
    """Rewrite the tables, or with --check tell which pages are stale."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is stale")
    check = parser.parse_args(argv).check
    problems = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = rewritten(text)
        if made != text and check:
            problems.append(f"{page.name} has stale tables: run python -m docs.tables")
        elif made != text:
            page.write_text(made, encoding="utf-8")
            print(f"{page.name} was rewritten")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
