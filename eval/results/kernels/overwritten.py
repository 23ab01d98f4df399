# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Look for overwritten operands in the machine code of dk and dv with a decay, size by size, and print them as CSV.

The kernel is compiled for compute capability 9.0, in bfloat16, with two query heads per key-value head. No GPU is
needed. See `overwritten_operands` in tests/modeling_rebased/kernel_targets.py, and docs/kernels.md, "A decay in
bfloat16". From the root of a checkout, with the Triton that is installed:

    python eval/results/kernels/overwritten.py
"""

from __future__ import annotations

import csv
import itertools
import sys
import tempfile
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[3]
FEATURES, DIMS = (16, 24, 32, 48, 64, 128), (16, 32, 48, 64, 96, 128, 256)
LONG = {16: 800, 24: 2300, 32: 2300, 48: 4300, 64: 4300, 128: 8400}  # tokens of more than two segments


def main() -> None:
    """Print a row per size, without and with states of earlier and later segments."""
    sys.path.insert(0, str(ROOT))
    import triton

    from tests.modeling_rebased import kernel_targets

    kernel_targets.record_for(90)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["triton", "F", "D", "states", "overwritten"])
    with tempfile.TemporaryDirectory() as folder:
        for states, width, dim in itertools.product((False, True), FEATURES, DIMS):
            length = LONG[width] if states else 200
            launches = kernel_targets.launches_of(length, width, dim, decay=torch.zeros(1, length, 1))
            cubin = kernel_targets.write_machine_code(launches, "_dkdv_kernel", Path(folder, "kernel.cubin"))
            found = len(kernel_targets.overwritten_operands(cubin))
            table.writerow([triton.__version__, width, dim, int(states), found])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
