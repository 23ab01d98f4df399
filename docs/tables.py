"""Write the tables of README.md and docs/ from the files under eval/results.

    python -m docs.tables            # rewrites what stands between the markers of each table
    python -m docs.tables --check    # changes nothing, and fails if a page is stale

A page says `<!-- table: NAME -->` where the table NAME begins and `<!-- end of table -->` where it ends. A sentence
that quotes a figure is listed in `sentences`, and must stand in its page word for word.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
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
    welch,
)
from modeling_rebased.eval.plot_style import label_of
from modeling_rebased.eval.plots import read_csv
from modeling_rebased.serving.plan import state_bytes
from modeling_rebased.training.mqar_runs import Run


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def table(head: list[str], rows: list[list[Any]], words: int = 1) -> str:
    """Return a table in Markdown, its first `words` columns flush left and the others flush right."""
    rule = ["---" if i < words else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, rule, *rows])


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, thousands apart; nothing for `None`."""
    if value is None:
        return ""
    places = digits - len(str(int(abs(value)))) if abs(value) >= 1 else digits
    return f"{value:,.{max(0, places)}f}"


# ---------------------------------------------------------------- kernels


def kernel_times(folder: str, kind: str) -> dict[str, dict[int, float]]:
    """Return milliseconds by method and length; `kind` is "forward" or "training"."""
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read_csv(RESULTS / "kernels" / folder):
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
        first = read_csv(RESULTS / "kernels" / folder / "kernels.csv")[0][f"floor_{kind}_ms"]
        rows.append(["inputs and outputs moved once", *[number(first)] * len(lengths)])
    return table(["T", *(f"{length:,}" for length in lengths)], rows)


def kernel_ratios() -> str:
    """Return how many times as fast ReBased is as the others, and its extra memory, for F = 16."""
    rows = []
    lengths = list(kernel_times("h100/kernels.csv", "forward")["rebased"])
    for kind, name in (("forward", "forward"), ("training", "forward and backward")):
        times = kernel_times("h100/kernels.csv", kind)
        for other in ("softmax", "fla parallel_rebased", "fla chunk_simple_gla"):
            ratios = [number(times[other][n] / times["rebased"][n], 2) if n in times[other] else "" for n in lengths]
            rows.append([f"{name}, {label_of(other)}", *ratios])
    memory = {row["T"]: row["extra_gib"] for row in read_csv(RESULTS / "kernels/h100/kernels.csv")[: len(lengths)]}
    rows.append(["extra memory of ReBased, GiB", *(f"{memory[n]:.2f}" for n in lengths)])
    return table(["T", *(f"{length:,}" for length in lengths)], rows)


def extra_memory_64() -> str:
    """Return the extra memory for F = 64."""
    rows = [row for row in read_csv(RESULTS / "kernels/h100-f64/kernels.csv") if row["method"] == "rebased"]
    return table(
        ["T", *(f"{row['T']:,}" for row in rows)],
        [["extra memory of ReBased, GiB", *(f"{row['extra_gib']:.2f}" for row in rows)]],
    )


def decode() -> str:
    """Return the time of one token of one layer."""
    rows = read_csv(RESULTS / "generation/h100/decode.csv")
    return table(
        ["batch", *(row["batch"] for row in rows)],
        [
            ["one token, µs", *(f"{row['us']:.1f}" for row in rows)],
            ["the same, states by slot number, µs", *(f"{row['by_slot_us']:.1f}" for row in rows)],
            ["reading and writing the state once, µs", *(f"{row['floor_us']:.1f}" for row in rows)],
        ],
    )


def whole_models(name: str, **where: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of training.csv or generation.csv that have these values, by model without its size."""
    rows = read_csv(RESULTS / f"generation/h100/{name}.csv")
    found = [row for row in rows if all(str(row[key]) == str(value) for key, value in where.items())]
    return {row["model"].removeprefix("150m-"): row for row in found}


def models_training() -> str:
    """Return the training steps of whole models."""
    rows = []
    kinds = sorted({(row["T"], row["compiled"]) for row in read_csv(RESULTS / "generation/h100/training.csv")})
    for length, compiled in kinds:
        found = whole_models("training", T=length, compiled=compiled)
        ours, softmax = found["rebased"], found["softmax"]
        rows.append([
            f"{length:,}",
            "yes" if compiled == "True" else "no",
            f"{ours['tokens_per_s']:,.0f}",
            f"{softmax['tokens_per_s']:,.0f}",
            number(ours["tokens_per_s"] / softmax["tokens_per_s"]),
            f"{ours['peak_gib']:.1f}",
            f"{softmax['peak_gib']:.1f}",
        ])  # fmt: skip
    head = ["T", "layers compiled", "ReBased", "softmax", "ratio", "ReBased, peak GiB", "softmax, peak GiB"]
    return table(head, rows)


def models_generation() -> str:
    """Return `generate()` of whole models."""
    rows = []
    kinds = [
        (row["batch"], row["context"], row["cache"])
        for row in read_csv(RESULTS / "generation/h100/generation.csv")
        if row["model"] == "150m-rebased"
    ]
    for batch, context, cache in kinds:
        found = whole_models("generation", batch=batch, context=context, cache=cache)
        ours, softmax = found["rebased"], found.get("softmax", {})

        def of(key: str, digits: int, ours: dict = ours, softmax: dict = softmax) -> list[str]:
            values = [row.get(key) for row in (ours, softmax)]
            return ["" if value is None or value != value else f"{value:,.{digits}f}" for value in values]

        rows.append([cache, batch, f"{context:,}", *of("ms_per_token", 2), *of("first_4_ms", 0), *of("peak_gib", 1)])
    head = [
        "cache",
        "batch",
        "context",
        "ms per step, ReBased",
        "softmax",
        "ms for the context and 4 tokens, ReBased",
        "softmax",
    ]
    return table([*head, "peak GiB, ReBased", "softmax"], rows)


def convolution() -> str:
    """Return what the two forms of the short convolution give."""
    values = [
        [
            row["convolution"],
            "yes" if row["compiled"] == "True" else "no",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_gib']:.1f}",
            number(row["prefill_ms"]),
        ]
        for row in read_csv(RESULTS / "generation/h100/convolution.csv")
    ]
    return table(
        ["convolution", "layers compiled", "tokens per second", "peak GiB", "ms of a prefill"], values, words=2
    )


def models_changes() -> str:
    """Return what each change of a training step gave."""
    rows = read_csv(RESULTS / "generation/h100/changes.csv")
    values = [[row["change"], f"{row['tokens_per_s']:,.0f}", f"{row['peak_gib']:.1f}"] for row in rows]
    return table(["step", "tokens per second", "peak GiB"], values)


def step_parts() -> str:
    """Return the GPU's work in a training step, by what it is for."""
    rows = read_csv(RESULTS / "generation/h100/step.csv")
    rows = [row for row in rows if row["part"] != "other"] + [row for row in rows if row["part"] == "other"]
    keys = ("ms", "ms_in_mixed_precision")
    values = [[row["part"], *(f"{row[key]:.1f}" if row[key] else "" for key in keys)] for row in rows]
    values.append(["sum", *(f"{sum(row[key] for row in rows):.1f}" for key in keys)])
    head = ["part", "bfloat16, forward and backward, ms", "rebased-train in mixed precision before the change, ms"]
    return table(head, values)


def first_calls() -> str:
    """Return the seconds of the first training step and of the first prefill, by version."""
    rows = read_csv(RESULTS / "generation/h100/first.csv")
    seconds = {(row["what"], row["version"]): row["first_s"] for row in rows}
    names = {"step": "first training step, 16,384 tokens", "prefill": "first prefill, 32,768 tokens"}
    versions = list(dict.fromkeys(row["version"] for row in rows))
    return table(
        ["version", *names.values()], [[name, *(number(seconds[what, name]) for what in names)] for name in versions]
    )


def passes_for_range() -> str:
    """Return the times of attention with and without `normalized=True`, by version."""
    rows = read_csv(RESULTS / "kernels/h100/range.csv")
    values = []
    for kernel, version, normalized in dict.fromkeys((r["kernel"], r["version"], r["normalized"]) for r in rows):
        found = [r for r in rows if (r["kernel"], r["version"], r["normalized"]) == (kernel, version, normalized)]
        name = {"rebased": "ReBased", "based": "Based"}[kernel]
        times = [f"{row[key]:.2f}" for row in found for key in ("forward_ms", "training_ms")]
        values.append([name, version, "yes" if normalized == "True" else "no", *times])
    head = [f"{what}, T = {length:,}" for length in (2048, 8192) for what in ("forward", "forward and backward")]
    return table(["kernel", "version", "`normalized=True`", *head], values, words=3)


def train_lm() -> str:
    """Return the speed of rebased-train."""
    rows = [
        [
            row["model"].removeprefix("150m-").replace("rebased", "ReBased"),
            row["version"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ms']:.1f}",
            f"{row['peak_gib']:.1f}",
        ]
        for row in read_csv(RESULTS / "generation/h100/train-lm.csv")
    ]
    return table(["model", "version", "tokens per second", "ms per step", "peak GiB"], rows, words=2)


def loss_chunks() -> str:
    """Return the time of the loss and its gradients by the size of a chunk."""
    rows = read_csv(RESULTS / "generation/h100/loss-chunks.csv")
    return table(
        ["tokens per chunk", *(f"{row['chunk']:,}" for row in rows)],
        [["ms", *(f"{row['ms']:.1f}" for row in rows)]],
    )


def counters() -> str:
    """Return the hardware counters by kernel."""
    names = ["state sums of keys", "scan of key states", "forward", "dq", "state sums of queries"]
    names += ["scan of query states", "dk and dv"]
    rows = []
    for name, row in zip(names, read_csv(RESULTS / "kernels/h100/counters.csv"), strict=True):
        keys = (
            "us",
            "l1_pct",
            "l2_pct",
            "dram_pct",
            "matrix_units_pct",
            "issue_slots_pct",
            "warps_an_sm",
            "registers",
        )
        rows.append([name, *("" if row[key] is None else f"{row[key]:.0f}" for key in keys)])
    head = ["kernel", "µs", "shared memory and L1, %", "L2, %", "device memory, %", "matrix units, %"]
    return table([*head, "issue slots, %", "warps per multiprocessor", "registers per thread"], rows)


def versions() -> str:
    """Return the time of all kernels of forward and backward together, by version of the kernels."""
    total: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in read_csv(RESULTS / "kernels/h100-versions/kernels.csv"):
        total[row["version"]][row["T"]] += row["us"]
    rows = [[name, *(f"{found[n]:,.0f}" for n in (2048, 8192, 131072))] for name, found in total.items()]
    return table(["version", "T = 2,048", "8,192", "131,072"], rows)


def eager() -> str:
    """Return the times of the PyTorch backend on a CPU."""
    rows = read_csv(RESULTS / "eager/eager.csv")
    names = {
        "chunked": "forward, linear form",
        "quadratic": "forward, quadratic form",
        "chunked fwd+bwd": "forward and backward, linear form",
        "quadratic fwd+bwd": "forward and backward, quadratic form",
    }
    return table(
        ["T", *(f"{row['tokens']:,}" for row in rows)],
        [[name, *(number(row[key], 2) for row in rows)] for key, name in names.items()],
    )


# ---------------------------------------------------------------- serving


def serving_plan() -> str:
    """Return how many requests of pure ReBased models fit into a pool of 60 GiB."""
    rows = []
    for name in ("english-6m", "150m-rebased", "360m-rebased", "1.3b-rebased"):
        held = state_bytes(ReBasedConfig.from_pretrained(config_path(name)))
        rows.append([f"`{name}`", number(held / 1e6), f"{60 * 2**30 // held:,}", f"{60 * 2**30 // (2 * held):,}"])
    return table(["configuration", "megabytes per request", "requests", "requests with prefix caching"], rows)


def serving_memory() -> str:
    """Return the bytes that a request holds in vLLM, by the length of its context."""
    rows = read_csv(RESULTS / "serving/memory.csv")
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


def serving_speed() -> str:
    """Return the tokens per second of vLLM and of transformers on a CPU."""
    rows = read_csv(RESULTS / "serving/speed.csv")
    names = {"vllm": "vLLM", "transformers": "transformers' `generate`, one padded batch"}
    return table(
        ["engine", "seconds, best of 3", "seconds, worst of 3", "new tokens per second"],
        [
            [
                names[row["engine"]],
                number(row["seconds_best_of_3"]),
                number(row["seconds_worst_of_3"]),
                number(row["new_tokens_per_second"]),
            ]
            for row in rows
        ],
    )


# ---------------------------------------------------------------- associative recall


def mqar_runs() -> list[dict[str, Any]]:
    """Return all runs, as the figure takes them."""
    return read_runs(sorted((RESULTS / "mqar").glob("*.jsonl")))


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


def mqar_steps() -> str:
    """Return the time of one training step beside its floor."""
    rows = []
    lines = (RESULTS / "mqar/steps.jsonl").read_text(encoding="utf-8").splitlines()
    for step in map(json.loads, lines):
        model, hidden, length = re.match(r"(\w+)-h(\d+)-l(\d+)", step["name"]).groups()
        floor = max(step["floor"]["operations_seconds"], step["floor"]["bytes_seconds"])
        seconds = step["step_seconds"]
        rows.append(
            [
                label_of(model),
                f"{int(length):,}",
                hidden,
                f"{1e3 * seconds:.1f}",
                f"{1e3 * floor:.2f}",
                f"{floor / seconds:.0%}",
                f"{step['tokens_per_second'] / 1e6:.1f}",
                f"{64 * 195 * seconds:.0f}",
            ]
        )
    head = ["model", "length", "hidden", "step, ms", "floor, ms", "floor / step", "million tokens per second"]
    return table([*head, "64 epochs, s"], rows)


def mqar_checkpoint() -> str:
    """Return the curve of the run that made checkpoints/mqar-d128."""
    run = json.loads((RESULTS / "mqar/checkpoint.jsonl").read_text(encoding="utf-8"))
    shown = [entry for entry in run["history"] if entry["epoch"] in (1, 5, 6, 7, 8, 9, 10, 12, 17)]
    return table(
        ["epoch", *(entry["epoch"] for entry in shown)],
        [
            ["loss", *(f"{entry['loss']:.3f}" for entry in shown)],
            ["accuracy", *(f"{entry['accuracy']:.3f}" for entry in shown)],
        ],
    )


# ---------------------------------------------------------------- MAD and in-context language learning


def finished(name: str) -> list[dict[str, Any]]:
    """Return the finished runs in a folder of results."""
    return [run for run in read_runs(sorted((RESULTS / name).glob("*.jsonl"))) if not run.get("stopped")]


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


def small_models() -> str:
    """Return the figures of the three byte-level models of 6.65 million parameters."""
    figures = json.loads((ROOT / "checkpoints/english-6m/training_figures.json").read_text(encoding="utf-8"))
    parameters = {"english-6m": figures["parameters"], **figures["twins_parameters"]}
    rows = []
    for name, label in (("english-6m", "ReBased"), ("english-6m-based", "Based"), ("english-6m-softmax", "softmax")):
        found = figures["heldout_english"][name]
        values = [
            f"{found['bits_per_byte']:.3f}",
            f"{found['byte_perplexity']:.3f}",
            f"{found['word_perplexity']:,.0f}",
        ]
        rows.append([label, f"{parameters[name]:,}", *values])
    return table(["model", "parameters", "bits per byte", "byte perplexity", "word perplexity"], rows)


def stories() -> str:
    """Return the figures of the models of short stories, and of the judge's own stories."""
    figures = json.loads((ROOT / "checkpoints/stories-12m/training_figures.json").read_text(encoding="utf-8"))
    labels = {"stories-12m": "ReBased", "stories-12m-based": "Based", "stories-12m-softmax": "softmax"}
    labels["judge"] = "SmolLM2-135M-Instruct"
    found = {row["model"]: row for row in read_csv(RESULTS / "stories/stories.csv")}
    rows = []
    for name, label in labels.items():
        own, row = figures["models"].get(name, {}), found.get(name)
        rows.append([
            label,
            f"{own['parameters']:,}" if own else "135 million",
            f"{own['eval_bits_per_byte']:.4f}" if own else "",
            *(f"{row[key]:.1%}" if row else "" for key in ("ended", "persons", "repeated")),
            f"{row['perplexity']:.1f}" if row else "",
            f"{row['words']:.0f}" if row else "",
            f"{row['copied']:.0%}" if row else "",
        ])  # fmt: skip
    head = ["model", "parameters", "bits per byte, held out", "ended", "persons", "repeated", "perplexity", "words"]
    return table([*head, "copied"], rows)


def slices() -> str:
    """Return the losses by slice."""
    found = json.loads((RESULTS / "recall_slices/slices.json").read_text(encoding="utf-8"))
    rows = [
        [
            label_of(model),
            row["slice"],
            f"{row['tokens']:,}",
            f"{row['share']:.1%}",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['accuracy']:.1%}",
        ]
        for model, slices in found.items()
        for row in slices["slices"]
    ]
    return table(["model", "slice", "bytes", "share", "loss, nats per byte", "perplexity", "accuracy"], rows, 2)


# ---------------------------------------------------------------- conversion


def students() -> dict[str, Any]:
    """Return results.json of the comparison of students with their teacher."""
    return json.loads((RESULTS / "conversion/smollm2-h100/results.json").read_text(encoding="utf-8"))


def perplexities() -> dict[tuple[str, str, str, int], float]:
    """Return perplexities by model, stage, file and length."""
    rows = students()["perplexity"]
    return {(row["model"], row["stage"], row["file"], row["length"]): row["perplexity"] for row in rows}


def stages() -> str:
    """Return held-out perplexity by stage at 1,024 tokens."""
    found, training = perplexities(), students()["training"]
    teacher = found["teacher", "", "heldout", 1024]
    rows = [["teacher", *["", ""] * 2, f"{teacher:.1f}", "1.00", ""]]
    for model, goal in (("pure", "1.60"), ("window", "1.25"), ("hybrid", "1.10")):
        row = [model]
        for stage in ("start", "transfer", "logits"):
            value = found[model, stage, "heldout", 1024]
            row += [number(value), f"{value / teacher:.2f}"]
        rows.append([*row, goal])
    rows[0] = ["teacher", "", "", "", "", f"{teacher:.1f}", "1.00", ""]
    tokens = {(row["model"], row["stage"]): row["tokens"] / 1e6 for row in training}
    head = [
        "model",
        "start",
        "times teacher",
        "after transfer",
        "times teacher",
        "after logits",
        "times teacher",
        "goal",
    ]
    head += ["million tokens of transfer", "of logits"]
    rows = [
        [*row, *("" if row[0] == "teacher" else f"{tokens[row[0], stage]:.1f}" for stage in ("transfer", "logits"))]
        for row in rows
    ]
    return table(head, rows)


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


def answers() -> str:
    """Return how the teacher judges the answers."""
    found = students()["answers"]
    head = ["model", "teacher's perplexity of the answers", "four-word runs said before"]
    return table(head, [[name, f"{row['judged']:.1f}", f"{row['repeated']:.1%}"] for name, row in found.items()])


def students_decoding() -> str:
    """Return memory and time of decoding after 32,768 tokens."""
    by_model: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in students()["speed"]:
        by_model[row["model"]][row["batch"]] = row
    rows = []
    for model, found in by_model.items():
        one, many = found[1], found[32]
        rows.append(
            [
                model,
                f"{one['cache_mib']:.0f}",
                f"{many['cache_mib'] / 1024:.1f}",
                f"{many['peak_gib']:.1f}",
                f"{one['ms']:.0f}",
                f"{many['ms']:.0f}",
            ]
        )
    head = ["model", "cache at batch 1, MiB", "cache at batch 32, GiB", "peak at batch 32, GiB"]
    return table([*head, "ms per step, batch 1", "ms per step, batch 32"], rows)


# ---------------------------------------------------------------- the README


def recall_512() -> tuple[Any, Any]:
    """Return the cells of ReBased and Based at length 512 and hidden size 64."""
    found = {(cell.model, cell.length, cell.hidden): cell for cell in cells(mqar_runs())}
    return found["rebased", 512, 64], found["based", 512, 64]


def overview() -> str:
    """Return the one table of results of the README."""
    training = kernel_times("h100/kernels.csv", "training")
    step = whole_models("generation", batch=1, context=131072, cache="static")
    steps = whole_models("training", T=16384, compiled=True)
    split, ring = (
        next(
            x
            for x in read_csv(RESULTS / "context_parallel/h200" / f"{name}.csv")
            if (x["gpus"], x["tokens"]) == (4, 131072)
        )
        for name in ("context_parallel", "ring")
    )
    figures = json.loads((ROOT / "checkpoints/english-6m/training_figures.json").read_text(encoding="utf-8"))
    bits = {name: row["bits_per_byte"] for name, row in figures["heldout_english"].items()}
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
            "byte-level model of 6.65M parameters, bits per byte of held-out text",
            f"{bits['english-6m']:.3f}",
            f"Based {bits['english-6m-based']:.3f}, softmax {bits['english-6m-softmax']:.3f}",
            "[results](docs/results.md#language-models)",
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


def several_gpus() -> str:
    """Return the speed of `train_lm` by the number of GPUs, against fewer GPUs with as many tokens per GPU."""
    found = read_csv(RESULTS / "several_gpus/h200/training.csv")
    rows = []
    for row in sorted(found, key=lambda row: (row["parameters"], row["gpus"])):
        fewest = min((x for x in found if x["parameters"] == row["parameters"]), key=lambda x: x["gpus"])
        share = row["tokens_per_s"] / row["gpus"] / (fewest["tokens_per_s"] / fewest["gpus"])
        rows.append([
            f"{row['parameters'] / 1e6:,.0f}M",
            {"one": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}[row["launch"]],
            row["gpus"],
            f"{row['tokens_per_gpu']:,}",
            f"{row['tokens_per_s']:,.0f}",
            f"{share:.3f}",
            f"{row['tflops_per_gpu']:.0f}",
            f"{row['tflops_per_gpu'] / 790:.0%}",
            f"{row['peak_gib']:.1f}",
        ])  # fmt: skip
    head = ["parameters", "launch", "GPUs", "tokens per GPU and step", "tokens per second", "share per GPU"]
    return table([*head, "TFLOP/s per GPU", "of 790", "peak GiB per GPU"], rows, 2)


def context_parallel() -> str:
    """Return the training steps whose sequence is split over GPUs, against one GPU with as many tokens per GPU."""
    found = read_csv(RESULTS / "context_parallel/h200/context_parallel.csv")
    rows = []
    for row in sorted(found, key=lambda row: (row["tokens_per_gpu"], row["gpus"])):
        alone = next(x for x in found if x["gpus"] == 1 and x["tokens_per_gpu"] == row["tokens_per_gpu"])
        rows.append([
            f"{row['tokens_per_gpu']:,}",
            row["gpus"],
            f"{row['tokens']:,}",
            "yes" if str(row["checkpointing"]) == "True" else "no",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / alone['tokens_per_s']:.2f}",
            f"{row['us_per_token']:.3f}",
            f"{row['peak_gib']:.1f}",
        ])  # fmt: skip
    head = ["tokens per GPU", "GPUs", "tokens per sequence", "checkpointing", "tokens per second", "times one GPU"]
    return table([*head, "µs per token", "peak GiB per GPU"], rows, 0)


def context_parallel_ring() -> str:
    """Return the training steps of a softmax model by ring attention, beside ReBased on as many GPUs."""
    ours = read_csv(RESULTS / "context_parallel/h200/context_parallel.csv")
    rows = []
    for row in read_csv(RESULTS / "context_parallel/h200/ring.csv"):
        same = [x for x in ours if x["gpus"] == row["gpus"] and x["tokens"] == row["tokens"]]
        rebased = same[0]["tokens_per_s"] if same else None
        rows.append([
            f"{row['tokens']:,}",
            f"{rebased:,.0f}" if rebased else "not measured",
            f"{row['tokens_per_s']:,.0f}",
            f"{rebased / row['tokens_per_s']:.1f}" if rebased else "",
        ])  # fmt: skip
    head = ["tokens per sequence", "ReBased, tokens per second", "softmax, tokens per second", "ReBased / softmax"]
    return table(head, rows, 0)


def context_parallel_profile() -> str:
    """Return what a step consists of on each GPU, by the profiler."""
    rows = [
        [
            f"{row['tokens_per_gpu']:,}",
            row["gpus"],
            row["rank"],
            *(f"{row[key]:.0f}" for key in ("wall_ms", "host_ms", "compute_ms", "all_gather_ms", "all_reduce_ms")),
            f"{row['kernels']:,}",
            f"{row['gap_ms']:.1f}",
        ]
        for row in read_csv(RESULTS / "context_parallel/h200/profile.csv")
        if row["tokens_per_gpu"] != 131072
    ]
    head = ["tokens per GPU", "GPUs", "GPU", "step, ms", "host, ms", "compute, ms", "all-gather, ms"]
    return table([*head, "all-reduce, ms", "kernels", "largest gap, ms"], rows, 0)


def context_parallel_errors() -> str:
    """Return how far a sequence over several GPUs is from the same on one GPU."""
    rows = [
        [row["dtype"], row["gpus"], f"{row['tokens']:,}", f"{row['logits']:.1e}", f"{row['gradients']:.1e}"]
        for row in read_csv(RESULTS / "context_parallel/h200/errors.csv")
    ]
    return table(["dtype", "GPUs", "tokens", "logits", "gradients"], rows)


def corpus_domains() -> str:
    """Return the size of each domain of the mixed corpus, and of its held-out part."""
    found = read_csv(RESULTS / "corpus/corpus.csv")
    sums: dict[str, dict[str, Any]] = {}
    for row in found:
        sums.setdefault(row["domain"], {})[row["part"]] = row
    rows = []
    for domain, parts in sums.items():
        trained, held = parts["train"], parts["heldout"]
        counts = [trained[key] for key in ("packages", "documents", "bytes", "tokens")]
        rows.append([domain, *counts, held["documents"], held["tokens"]])
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 7))])
    shown = [
        [row[0], row[1], f"{row[2]:,}", f"{row[3] / 1e6:.1f}", f"{row[4] / 1e6:.1f}", f"{row[5]:,}", f"{row[6]:,}"]
        for row in rows
    ]
    head = ["domain", "packages", "documents", "million bytes", "million tokens", "held-out documents"]
    return table([*head, "held-out tokens"], shown)


TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "kernels-forward": lambda: kernels("h100", "forward", floor=True),
    "kernels-training": lambda: kernels("h100", "training", floor=True),
    "kernels-ratios": kernel_ratios,
    "kernels-64-forward": lambda: kernels("h100-f64", "forward"),
    "kernels-64-training": lambda: kernels("h100-f64", "training"),
    "kernels-64-memory": extra_memory_64,
    "decode": decode,
    "models-training": models_training,
    "models-generation": models_generation,
    "models-changes": models_changes,
    "convolution": convolution,
    "step": step_parts,
    "first": first_calls,
    "range": passes_for_range,
    "loss-chunks": loss_chunks,
    "train-lm": train_lm,
    "counters": counters,
    "versions": versions,
    "eager": eager,
    "serving-plan": serving_plan,
    "serving-memory": serving_memory,
    "serving-speed": serving_speed,
    "mqar-figure": mqar_figure,
    "mqar-cells": lambda: markdown(cells(mqar_runs())),
    "mqar-differences": lambda: differences(cells(mqar_runs())),
    "mqar-rates": mqar_rates,
    "mqar-ablation": mqar_ablation,
    "mqar-variants": mqar_variants,
    "mqar-speed": mqar_speed,
    "mqar-steps": mqar_steps,
    "mqar-checkpoint": mqar_checkpoint,
    "mad-scores": lambda: plot_mad.markdown(finished("mad")),
    "mad-fuzzy": mad_fuzzy,
    "icll": lambda: plot_icll.markdown(finished("icll")),
    "small-models": small_models,
    "corpus-domains": corpus_domains,
    "stories": stories,
    "slices": slices,
    "stages": stages,
    "registers": registers,
    "answers": answers,
    "students-decoding": students_decoding,
    "several-gpus": several_gpus,
    "context-parallel": context_parallel,
    "context-parallel-ring": context_parallel_ring,
    "context-parallel-profile": context_parallel_profile,
    "context-parallel-errors": context_parallel_errors,
}


def sentences() -> dict[str, list[str]]:
    """Return sentences with figures by page; each must stand in its page, whatever its line breaks."""
    found = {(cell.model, cell.length, cell.hidden): cell for cell in cells(mqar_runs())}
    result = []
    for length in (512, 1024):
        ours, based = found["rebased", length, 64], found["based", length, 64]
        gap = welch(ours.accuracies, based.accuracies)
        ahead, sign = ("ReBased", 1) if gap.mean > 0 else ("Based", -1)
        low, high = sorted((sign * gap.low, sign * gap.high))
        result.append(
            f"{ahead} is ahead by {abs(gap.mean):.3f}, and the 95% interval of the difference reaches from "
            f"{low:.2f} to {high:.2f}"
        )
    return {"docs/results.md": result}


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """Return a page with its tables made anew."""

    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> None:
    """Rewrite the tables, or with --check tell which pages are stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for name, quoted in sentences().items():
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        problems += [f'{name} does not say "{sentence}"' for sentence in quoted if sentence not in text]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
