"""Time calls and write tables as CSV, for all benchmarks."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modeling_rebased.training.folders import written


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    """Return the median wall-clock time of `repeats` calls in milliseconds, after one call that is not counted.

    The timer waits for a GPU, so that host time counts as it does for a user.
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
    """Write rows with equal fields as CSV, with four decimals. The folder is made if it is missing."""
    with written(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
