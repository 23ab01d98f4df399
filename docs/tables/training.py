"""Tables of docs/training.md: training on several GPUs."""

from __future__ import annotations

from .form import down, results, shown


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


@shown("ddp-profile")
def ddp_profile() -> str:
    """Return what a step of `train_lm` consists of on each GPU, alone and with DDP."""
    return down(
        results("several_gpus/h200/profile.csv"),
        "launch: {launch} | examples per GPU: {examples} | step, ms: {ms:.1f} | "
        "tokens per second: {tokens_per_s:,.0f} | GPU: {gpu} | busy, ms: {busy_ms:.1f} | "
        "compute, ms: {compute_ms:.1f} | all-reduce, ms: {all_reduce_ms:.1f} | kernels: {kernels:,}",
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
        speed, ratio = (f"{ours:,.0f}", ours / row["tokens_per_s"]) if ours else ("not measured", None)
        rows.append({**row, "ours": speed, "ratio": ratio})
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
