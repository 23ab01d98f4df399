# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Print how much shared memory the kernels of attention take for compute capability 8.6, size by size, as CSV.

A block has 99 KiB there. The kernels are compiled, and no GPU is needed. See docs/kernels.md, "Other GPUs". From the
root of a checkout, with the Triton that is installed:

    python eval/results/kernels/shared_memory.py
"""

from __future__ import annotations

import csv
import itertools
import runpy
import sys
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[3]
SIZES: tuple[tuple[int, int], ...] = (
    *((16, 64), (16, 128), (16, 256), (32, 128), (32, 256), (64, 128), (64, 256)),
    *((72, 64), (80, 256), (96, 64), (128, 64), (128, 128), (128, 256)),
)


def main() -> None:
    """Print a row per dtype and size, without and with a decay: the largest of all kernels."""
    targets = runpy.run_path(str(ROOT / "tests/modeling_rebased/test_triton_targets.py"))
    sys.argv = sys.argv[:1]  # no kinds of GPU: the script then only defines what it would do
    names: dict[str, Any] = {"capability": 86}
    exec(targets["SCRIPT"], names)
    names["TYPES"][torch.float16] = "*fp16"
    import triton

    from modeling_rebased import triton_launch_rebased, triton_rebased

    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["triton", "dtype", "F", "D", "decay", "kib"])
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype, (width, dim), decays in itertools.product(dtypes, SIZES, (0, 1)):
        triton_launch_rebased._PREPARED.clear()
        names["launches"].clear()
        q, k, v = (
            torch.zeros(1, 8400, heads, n, dtype=dtype, requires_grad=True)
            for heads, n in ((2, width), (1, width), (1, dim))
        )
        decay = torch.zeros(1, 8400, 1, requires_grad=True) if decays else None
        rebased = (0.0, 0.0, 1.0, 0.25, 1e-12, False, None, decay)
        triton_rebased._Attention.apply(q, k, v, None, None, None, *rebased)[0].sum().backward()
        most = max(names["compile"](*launch).metadata.shared for launch in names["launches"])
        table.writerow([triton.__version__, str(dtype).removeprefix("torch."), width, dim, decays, most / 1024])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
