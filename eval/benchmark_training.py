"""Time the steps of `train_lm` on any number of GPUs, started as a user starts it.

    python -m modeling_rebased.eval.benchmark_training --table output/training.csv --config 150m-rebased ...
    accelerate launch --config_file training/fsdp2.yaml --num_processes 4 \\
        -m modeling_rebased.eval.benchmark_training --table output/training.csv --config 1.3b-rebased ...

All arguments but --table, --skip and --profile are those of `train_lm`. The measured steps are those after the first
--skip, with the optimizer and everything else that the Trainer does. The run ends after --max_steps without writing a
model. A row is added to the table:

    launch              how the model is spread over the GPUs: one, ddp or fsdp2
    tokens_per_gpu      of one step
    tokens_per_s        of all GPUs together
    tflops_per_gpu      6 operations per parameter and token
    peak_gib            the most memory that tensors take on a GPU, in the measured steps

With --profile the last four steps are not measured. torch.profiler records the kernels of each GPU in them, and a row
for each GPU is written to the named table, with times per step (`eval.profiling`).
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

from .profiling import kernel_times
from .timing import write_csv


PROFILED = 4  # steps


class StepClock(TrainerCallback):
    """Measure the steps of a training after the first `skip`, and end it without a model.

    Args:
        skip: steps before the measured ones.
        table: CSV to which a row is added.
        profile: CSV for what the kernels of each GPU take in the last steps, which are then not measured.
    """

    def __init__(self, skip: int, table: Path, profile: Path | None = None) -> None:
        self.skip, self.table, self.profile = skip, table, profile
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that there are steps to measure."""
        self.end = state.max_steps - (PROFILED if self.profile else 0)
        if not 0 < self.skip < self.end:
            raise SystemExit(f"--skip is {self.skip}; it must be at least 1 and less than the {self.end} steps")
        if self.profile and args.device.type != "cuda":
            raise SystemExit("--profile records the kernels of a GPU; this run is on the CPU")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start a clock, or stop it and write what it measured."""
        if state.global_step not in (self.skip, self.end, state.max_steps):
            return
        on_gpu = args.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        if state.global_step == self.skip:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
        elif state.global_step == self.end:
            seconds /= self.end - self.skip
            gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
            figures = torch.tensor([seconds, gib], device=args.device)
            if dist.is_initialized():
                dist.all_reduce(figures, dist.ReduceOp.MAX)
            if args.process_index == 0:
                seconds, gib = figures.tolist()
                self._write(args, kwargs["model"], seconds, gib, kwargs["train_dataloader"].dataset.length)
            if self.profile:
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()
        elif self.profile:
            self.profiler.stop()
            self._write_profile(args, 1e3 * seconds / PROFILED, self.profile)
        if state.global_step == state.max_steps:
            raise SystemExit(0)
        self.start = time.perf_counter()

    def _write_profile(self, args: Any, ms: float, path: Path) -> None:
        rows = [{"gpus": args.world_size, "rank": args.process_index, "wall_ms": ms}]
        rows[0] |= kernel_times(self.profiler, PROFILED)
        if dist.is_initialized():
            every: list[Any] = [None] * args.world_size
            dist.all_gather_object(every, rows[0])
            rows = every
        if args.process_index == 0:
            add_rows(rows, path)

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
        add_rows([row], self.table)
        print("  ".join(f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def add_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows to a table, which is made if it is missing."""
    before: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            before = list(csv.DictReader(file))
    write_csv([*before, *rows], path)


def main(argv: list[str] | None = None) -> None:
    """Train, and add a row to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--table", type=Path, required=True, help="CSV to which a row is added")
    parser.add_argument("--skip", type=int, default=10, help="steps before the measured ones")
    parser.add_argument("--profile", type=Path, help="CSV for what the kernels of the last steps take, on each GPU")
    own, others = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    clock = StepClock(own.skip, own.table, own.profile)
    train_lm.LMTrainer = functools.partial(train_lm.LMTrainer, callbacks=[clock])
    train_lm.main([*others, "--save_strategy", "no", "--report_to", "none"])


if __name__ == "__main__":
    main()
