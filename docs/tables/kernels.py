"""Tables of docs/kernels.md and docs/kernels-log.md, and of the PyTorch backend in docs/results.md."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from modeling_rebased.eval.plot_style import label_of

from .form import TABLES, across, down, number, results, shown, table


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


@shown("late")
def late_look_for_the_end() -> str:
    """Return a step of `generate()` that looks for the end one step late or at once, on an H200."""
    rows: dict[tuple, dict[str, Any]] = {}
    for row in results("generation/h200/late.csv"):
        minimum = str(row["min_new_tokens"]) == "True"
        case = rows.setdefault((row["batch"], minimum), {"batch": row["batch"], "minimum": minimum})
        case[row["end"].replace(" ", "_")] = row
    return down(
        rows.values(),
        "batch: {batch} | `min_new_tokens`: {minimum:yes} | late, ms per step: {late[ms]:.2f} | "
        "at once, ms per step: {at_once[ms]:.2f} | late, tokens per second: {late[tokens_per_s]:,.0f} | "
        "at once, tokens per second: {at_once[tokens_per_s]:,.0f}",
        words=0,
    )


@shown("static")
def static_cache() -> str:
    """Return `generate()` with a static cache on an H200."""
    rows = results("generation/h200/static.csv")
    return down(
        ({**row, "model": row["model"].removeprefix("150m-")} for row in rows),
        "model: {model:name} | batch: {batch} | context: {context:,} | ms per step: {ms_per_token:.2f} | "
        "tokens per second: {tokens_per_s:,.0f} | peak GiB: {peak_gib:.1f}",
    )


@shown("quiet")
def quiet_machine() -> str:
    """Return `generate()` at batch 1 on a quiet machine with one H100, with all runs of a case in one row."""
    found: dict[tuple, list[str]] = defaultdict(list)
    for row in results("generation/h100/quiet.csv"):
        found[row["cache"], row["context"], row["model"].removeprefix("150m-")].append(f"{row['ms_per_token']:.2f}")
    return down(
        [
            {"cache": cache, "context": context, "rebased": ", ".join(times), "softmax": ", ".join(twin)}
            for (cache, context, model), times in sorted(found.items(), reverse=True, key=lambda each: each[0][0])
            if model == "rebased" and (twin := found[cache, context, "softmax"])
        ],
        "cache: {cache} | context: {context:,} | ReBased, ms per token: {rebased} | softmax, ms per token: {softmax}",
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


def parts_of_generate(prefix: str, gpu: str = "h200") -> str:
    """Return the parts of a step of `generate()` whose names begin with a prefix, or with "" those that have none."""
    rows = results(f"generation/{gpu}/steps.csv")
    cases = list(dict.fromkeys((row["model"], row["cache"], row["batch"]) for row in rows))
    found: dict[str, dict[tuple, float]] = defaultdict(dict)
    for row in rows:
        kind, colon, part = row["part"].rpartition(": ")
        if kind + colon == prefix:
            found[part][row["model"], row["cache"], row["batch"]] = row["ms"]
    heads = [f"{label_of(model.removeprefix('150m-'))}, {cache}, {batch}" for model, cache, batch in cases]
    last = ("in all", "number of kernels")
    parts = sorted(found, key=lambda part: last.index(part) if part in last else -1)
    return table(["part", *heads], [[part, *(number(found[part].get(case)) for case in cases)] for part in parts])


TABLES |= {
    "generate-host": lambda: parts_of_generate("host: "),
    "generate-gpu": lambda: parts_of_generate("GPU: "),
    "generate-without": lambda: parts_of_generate(""),
    "generate-without-h100": lambda: parts_of_generate("", "h100"),
}


@shown("calls")
def calls_of_changing_lengths() -> str:
    """Return the time of short calls of `generate()` and the CUDA graphs after them, by what becomes of the states."""
    rows = []
    for keeps in (False, True):
        calls = [row for row in results("generation/h200/calls.csv") if (str(row["states_kept"]) == "True") is keeps]
        times = [row["ms"] for row in calls[2:]]
        rows.append(
            {"keeps": keeps, "ms": statistics.median(times), "most": max(times), "graphs": calls[-1]["graphs"]}
        )
    return down(
        rows,
        "states stay at their addresses: {keeps:yes} | median, ms: {ms:.0f} | slowest call, ms: {most:,.0f} | "
        "CUDA graphs after the last call: {graphs}",
    )


@shown("first-parts")
def parts_of_first_calls() -> str:
    """Return the seconds of first calls, and of the stages of Triton's compiler in all threads together."""
    stages = {"python": "python", "ttir": "passes", "ttgir": "passes", "llir": "llvm", "ptx": "llvm"}
    stages |= {"cubin": "ptxas", "C compiler": "c"}
    rows = {
        (row["what"], row["caches"]): {**row, **dict.fromkeys(stages.values(), 0.0)}
        for row in results("generation/h200/first.csv")
    }
    for row in results("generation/h200/first-kernels.csv"):
        rows[row["what"], row["caches"]][stages[row["stage"]]] += row["seconds"]
    return down(
        rows.values(),
        "first call: {what} | caches: {caches} | seconds: {first_s:.2f} | "
        "Python to Triton's first form: {python:.2f} | Triton's passes: {passes:.2f} | "
        "LLVM, down to PTX: {llvm:.2f} | ptxas: {ptxas:.2f} | C compiler: {c:.2f}",
        words=2,
    )


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
        version = versions.setdefault(row["version"], {"version": row["version"], "step": None, "prefill": None})
        version[row["what"]] = row["first_s"]
    return down(
        versions.values(),
        "version: {version} | first training step, 16,384 tokens: {step:3sig} | "
        "first prefill, 32,768 tokens: {prefill:3sig}",
    )


@shown("first-changes")
def changes_of_first_calls() -> str:
    """Return the median seconds of first calls on an H200, by version and caches."""
    found: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: {"step": [], "prefill": []})
    for row in results("generation/h200/first-changes.csv"):
        found[row["version"], row["caches"]][row["what"]].append(row["first_s"])
    median = {key: {what: statistics.median(s) if s else None for what, s in of.items()} for key, of in found.items()}
    return down(
        [{"version": version, "caches": caches, **of} for (version, caches), of in median.items()],
        "version: {version} | caches: {caches} | first training step, s: {step:3sig} | "
        "first prefill, s: {prefill:3sig}",
        words=2,
    )


@shown("first-calls")
def first_calls_of_the_package() -> str:
    """Return the seconds of first calls on an H200, and of later calls, with the least and the most."""
    found: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in results("generation/h200/first-calls.csv"):
        found[row["what"], row["caches"], row["version"]].append(row)
    names = {"step": "training step, 16,384 tokens", "prefill": "prefill, 32,768 tokens"}
    rows = []
    for (what, caches, version), calls in sorted(found.items(), key=lambda each: each[0][:2]):
        spans = {}
        for key, digits in (("first_s", 2), ("later_ms", 0)):
            values = sorted(call[key] for call in calls)
            ends = f" ({values[0]:.{digits}f} to {values[-1]:.{digits}f})" if len(values) > 1 else ""
            spans[key] = f"{statistics.median(values):.{digits}f}{ends}"
        rows.append({"what": names[what], "caches": caches, "version": version, "calls": len(calls), **spans})
    return down(
        rows,
        "first call: {what} | caches: {caches} | version: {version} | calls: {calls} | seconds: {first_s} | "
        "later calls, ms: {later_ms}",
        words=3,
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


def errors_with_a_decay(versions: dict[str, str]) -> str:
    """Return the largest errors of the kernels with a decay against float64, by version, dtype and size."""
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    cases: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in results("kernels/decay.csv"):
        size = "D above 128" if row["D"] > 128 else "F above 64" if row["F"] > 64 else "F up to 64, D up to 128"
        cases[row["version"], row["dtype"], size].append(row)
    rows = []
    for (version, dtype, size), found in cases.items():
        if version in versions:
            most = {key: max(row[key] for row in found) for key in ("o", "dq", "dk", "dv", "d_log_decay")}
            names = {"version": versions[version], "dtype": dtypes[dtype], "size": size, "cases": len(found)}
            rows.append({**names, **most})
    columns = "size: {size} | " if len(versions) == 1 else "version: {version} | "
    return down(
        rows,
        columns + "dtype: {dtype} | cases: {cases} | o: {o:.1e} | dq: {dq:.1e} | dk: {dk:.1e} | dv: {dv:.1e} | "
        "gradient by log_decay: {d_log_decay:.1e}",
        words=2,
    )


CHANGES = {
    "before": "no limit of registers",
    "mask after the decay": "and masks after the decay",
    "rounded numbers": "and rounded numbers, but no masks after the decay",
}
TABLES |= {
    "decay-errors": lambda: errors_with_a_decay({"both": "now"}),
    "decay-versions": lambda: errors_with_a_decay(CHANGES),
}


@shown("decay-rounding")
def rounding_of_a_decay() -> str:
    """Return the errors of the imitated gradient by log_decay, before and after it is made to sum up to 0."""
    cases: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in results("kernels/decay_rounding.csv"):
        cases[row["F"], row["D"], row["segment"]].append(row)
    rows = []
    for (width, dim, segment), found in cases.items():
        rows.append({"F": width, "D": dim, "segment": segment, "cases": len(found)})
        for when, column in (("before", "as_it_is"), ("now", "made_to_sum_up_to_0")):
            errors = [row[column] for row in found]
            rows[-1] |= {f"median_{when}": statistics.median(errors), f"most_{when}": max(errors)}
    return down(
        rows,
        "F: {F} | D: {D} | tokens per segment: {segment:,} | cases: {cases} | median before: {median_before:.1e} | "
        "largest before: {most_before:.1e} | median now: {median_now:.1e} | largest now: {most_now:.1e}",
        words=0,
    )


@shown("decay-times")
def times_with_a_decay() -> str:
    """Return the times of attention with and without a decay."""
    rows: dict[tuple, dict[str, Any]] = {}
    for row in results("kernels/few-keys-times.csv"):
        key = row["F"], row["D"], row["heads"], row["kv_heads"], row["T"]
        rows.setdefault(key, {**row})["decaying" if row["decay"] else "plain"] = row
    return down(
        (row for row in rows.values() if "decaying" in row),
        "F: {F} | D: {D} | heads: {heads} | key-value heads: {kv_heads} | T: {T:,} | "
        "forward, ms: {plain[forward_ms]:.2f} | with a decay: {decaying[forward_ms]:.2f} | "
        "forward and backward, ms: {plain[training_ms]:.2f} | with a decay: {decaying[training_ms]:.2f}",
        words=0,
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
