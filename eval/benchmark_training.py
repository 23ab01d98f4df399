"""Time the steps of `train_lm` on any number of GPUs, started as a user starts it.

    python -m modeling_rebased.eval.benchmark_training --table output/training.csv --config 150m-rebased ...
    accelerate launch --config_file training/fsdp2.yaml --num_processes 4 \\
        -m modeling_rebased.eval.benchmark_training --table output/training.csv --config 1.3b-rebased ...

All arguments but the first two are those of `train_lm`. The measured steps are those after the first --skip, with the
optimizer and everything else that the Trainer does. The run ends after --max_steps without writing a model. A row is
added to the table:

    launch              how the model is spread over the GPUs: one, ddp or fsdp2
    tokens_per_gpu      of one step
    tokens_per_s        of all GPUs together
    tflops_per_gpu      6 operations per parameter and token
    peak_gib            the most memory that tensors take on a GPU, in the measured steps
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from modeling_rebased.training import train_lm
from modeling_rebased.training.arguments import HelpFormatter

from .timing import write_csv


class StepClock(TrainerCallback):
    """Measure the steps of a training after the first `skip`, and end it without a model."""

    def __init__(self, skip: int, table: Path) -> None:
        self.skip, self.table = skip, table
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that there are steps to measure."""
        if not 0 < self.skip < state.max_steps:
            raise SystemExit(f"--skip is {self.skip}; it must be at least 1 and less than the {state.max_steps} steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, or stop it and write the row."""
        if state.global_step not in (self.skip, state.max_steps):
            return
        on_gpu = args.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == self.skip:
            self.start = now
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            return
        seconds = (now - self.start) / (state.max_steps - self.skip)
        gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        figures = torch.tensor([seconds, gib], device=args.device)
        if dist.is_initialized():
            dist.all_reduce(figures, dist.ReduceOp.MAX)
        if args.process_index == 0:
            seconds, gib = figures.tolist()
            self._write(args, kwargs["model"], seconds, gib, kwargs["train_dataloader"].dataset.length)
        raise SystemExit(0)

    def _write(self, args: Any, model: torch.nn.Module, seconds: float, gib: float, length: int) -> None:
        tokens = args.train_batch_size * args.gradient_accumulation_steps * length
        parameters = sum(parameter.numel() for parameter in model.parameters())  # of the whole model, also if sharded
        rate = args.world_size * tokens / seconds
        one = not dist.is_initialized()
        row = {
            "gpu": torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU",
            "launch": "one" if one else "fsdp2" if hasattr(model, "unshard") else "ddp",
            "gpus": args.world_size,
            "parameters": parameters,
            "length": length,
            "tokens_per_gpu": tokens,
            "ms": 1e3 * seconds,
            "tokens_per_s": rate,
            "tflops_per_gpu": 6e-12 * parameters * rate / args.world_size,
            "peak_gib": gib,
        }
        rows: list[dict[str, Any]] = []
        if self.table.exists():
            with self.table.open(newline="") as file:
                rows = list(csv.DictReader(file))
        write_csv([*rows, row], self.table)
        print("  ".join(f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Train, and add a row to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--table", type=Path, required=True, help="CSV to which a row is added")
    parser.add_argument("--skip", type=int, default=10, help="steps before the measured ones")
    own, others = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    clock = StepClock(own.skip, own.table)
    train_lm.LMTrainer = functools.partial(train_lm.LMTrainer, callbacks=[clock])
    train_lm.main([*others, "--save_strategy", "no", "--report_to", "none"])


if __name__ == "__main__":
    main()
