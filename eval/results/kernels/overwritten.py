# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Look for overwritten operands in the machine code of dk and dv with a decay, size by size, and print them as CSV.

The kernel is compiled for compute capability 9.0, in bfloat16, with two query heads per key-value head. No GPU is
needed. See `overwritten_operands` in tests/modeling_rebased/test_triton_targets.py, and docs/kernels.md, "A decay in
bfloat16". From the root of a checkout, with the Triton that is installed:

    python eval/results/kernels/overwritten.py
"""

from __future__ import annotations

import csv
import itertools
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[3]
FEATURES, DIMS = (16, 24, 32, 48, 64, 128), (16, 32, 48, 64, 96, 128, 256)
LONG = {16: 800, 24: 2300, 32: 2300, 48: 4300, 64: 4300, 128: 8400}  # tokens of more than two segments


def main() -> None:
    """Print a row per size, without and with states of earlier and later segments."""
    targets = runpy.run_path(str(ROOT / "tests/modeling_rebased/test_triton_targets.py"))
    sys.argv = sys.argv[:1]  # no kinds of GPU: the script then only defines what it would do
    names: dict[str, Any] = {"capability": 90}
    exec(targets["SCRIPT"], names)
    import triton

    from modeling_rebased import triton_launch_rebased, triton_rebased

    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["triton", "F", "D", "states", "overwritten"])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        for states, width, dim in itertools.product((False, True), FEATURES, DIMS):
            triton_launch_rebased._PREPARED.clear()
            names["launches"].clear()
            length = LONG[width] if states else 200
            q, k, v = (
                torch.zeros(1, length, heads, n, dtype=torch.bfloat16, requires_grad=True)
                for heads, n in ((2, width), (1, width), (1, dim))
            )
            rebased = (0.0, 0.0, 1.0, 0.25, 1e-12, False, None, torch.zeros(1, length, 1))
            triton_rebased._Attention.apply(q, k, v, None, None, None, *rebased)[0].sum().backward()
            kernel, arguments = next(found for found in names["launches"] if found[0].__name__ == "_dkdv_kernel")
            cubin.write_bytes(names["compile"](kernel, arguments).asm["cubin"])
            found = len(targets["overwritten_operands"](cubin))
            table.writerow([triton.__version__, width, dim, int(states), found])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
