"""Say what the kernels of a GPU do in a profiled time, for all benchmarks."""

from __future__ import annotations

from typing import Any

import torch


# Parts of the names of kernels, by the column that has their time.
KINDS = {"all_gather_ms": "AllGather", "all_reduce_ms": "AllReduce", "copy_ms": "Mem"}


def kernel_times(profiler: torch.profiler.profile, steps: int = 1) -> dict[str, Any]:
    """Return what the kernels of a profile took, per step and in milliseconds.

    Args:
        profiler: a finished profile of the GPU's activities.
        steps: number of steps in it.

    Returns:
        `kernels`, their number; `busy_ms`, the time in which at least one runs; `compute_ms`, that in which one other
        than a collective does; the times of all gathers, sums and copies (`KINDS`), in which a collective also waits
        for the slower GPUs; `gap_ms`, the largest time without a kernel, and `gap_before`, the kernel that ends it;
        and `longest`, the twelve kernels that took the most time.
    """
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    row: dict[str, Any] = {"kernels": len(kernels) // steps}
    compute = [kernel for kernel in kernels if "nccl" not in kernel[2].lower()]
    for key, chosen in (("busy_ms", kernels), ("compute_ms", compute)):
        end, total, gap, before = kernels[0][0], 0.0, 0.0, ""
        for first, last, name in chosen:
            if first - end > gap:
                gap, before = first - end, name
            total += max(0.0, last - max(first, end))
            end = max(end, last)
        row |= {key: total / 1e3 / steps}
        if key == "busy_ms":
            row |= {"gap_ms": gap / 1e3, "gap_before": before[:60]}
    for key, part in KINDS.items():
        row[key] = sum(last - first for first, last, name in kernels if part in name) / 1e3 / steps
    longest: dict[str, float] = {}
    for first, last, name in kernels:
        longest[name] = longest.get(name, 0.0) + (last - first) / 1e3 / steps
    best = sorted(longest.items(), key=lambda item: -item[1])[:12]
    row["longest"] = "; ".join(f"{name[:50]} {ms:.2f}" for name, ms in best)
    return row
