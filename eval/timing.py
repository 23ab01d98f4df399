# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What the benchmarks share: a median over wall clock, and tables as CSV."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    """Median wall clock of `repeats` calls, after one that is not counted, in milliseconds.

    A GPU is waited for, so that host time counts as it does for a user.
    """

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    function()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of one kind under the names of their fields; the folder is made. Floats keep four decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
