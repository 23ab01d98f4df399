"""Read and write the results of runs on synthetic tasks: one line of JSON per run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from .recipe import Options, Recipe, best_epoch, fields_of


def run_result(
    run: Recipe,
    options: Options,
    history: list[dict[str, float]],
    finish: dict[str, float],
    seconds: float,
    length: int,
    parameters: int,
) -> dict[str, Any]:
    """Return the line of results that a run leaves: `history` by epoch, and `finish`, what is measured at the end."""
    trained = len(history)
    tokens = trained * run.steps_per_epoch * run.batch_size * length
    on_gpu = options.device.startswith("cuda")
    return {
        "name": run.name,
        **fields_of(run),
        "accuracy": history[-1]["accuracy"] if history else None,
        "best_accuracy": max((entry["accuracy"] for entry in history), default=None),
        **finish,
        **({"best_epoch": best} if (best := best_epoch(history)) is not None else {}),
        "epochs_trained": trained,
        "parameters": parameters,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds) if seconds else None,
        "bf16": options.bf16,
        "deterministic": options.deterministic,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "history": history,
    }


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read a results file, without a last line that was cut off by a kill."""
    path = Path(path)
    if not path.exists():
        return []
    results = []
    for line in path.read_text().splitlines():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def append_result(path: str | Path, result: dict[str, Any]) -> None:
    """Append one whole line. Several processes may write to one file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result) + "\n"
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line before was cut off
                text = "\n" + text
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
