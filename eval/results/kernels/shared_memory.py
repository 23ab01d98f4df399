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
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[3]
SIZES: tuple[tuple[int, int], ...] = (
    *((16, 64), (16, 128), (16, 256), (32, 128), (32, 256), (64, 128), (64, 256)),
    *((72, 64), (80, 256), (96, 64), (128, 64), (128, 128), (128, 256)),
)


def main() -> None:
    """Print a row per dtype and size, without and with a decay: the largest of all kernels."""
    sys.path.insert(0, str(ROOT))
    import triton

    from tests.modeling_rebased import kernel_targets

    kernel_targets.record_for(86)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["triton", "dtype", "F", "D", "decay", "kib"])
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype, (width, dim), decays in itertools.product(dtypes, SIZES, (0, 1)):
        decay = torch.zeros(1, 8400, 1, requires_grad=True) if decays else None
        launches = kernel_targets.launches_of(8400, width, dim, dtype=dtype, decay=decay)
        most = max(kernel_targets.compile_kernel(launch, 86).metadata.shared for launch in launches)
        table.writerow([triton.__version__, str(dtype).removeprefix("torch."), width, dim, decays, most / 1024])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
