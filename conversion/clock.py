"""Train for so many seconds instead of so many steps."""

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments


class Clock:
    """Lower the learning rate along a straight line until the time is up.

    `LambdaLR` stores the clock with a checkpoint, so that a continued run knows how long it has trained. The time
    until the first step ends, in which code is compiled, counts. The learning rate does not fall during that time.

    Args:
        warmup_steps: number of steps in which the learning rate rises.

    Attributes:
        seconds: how long to train.
        spent: seconds since the start, in this process and those before it.
        progress: share of the time that is spent, from the first step on. At 1 the run is over.
    """

    def __init__(self, warmup_steps: int):
        self.warmup_steps = warmup_steps
        self.seconds = math.inf
        self.spent = self.waited = self.progress = self.last = 0.0
        self.stepped = False

    def start(self, seconds: float) -> None:
        """Note that a process begins to train."""
        self.seconds, self.last, self.stepped = seconds, time.monotonic(), False

    def tick(self) -> None:
        """Note that a step has ended."""
        passed = torch.tensor(time.monotonic() - self.last, dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Every process must see the same time, or their weights part ways.
            where = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            passed = passed.to(where)
            torch.distributed.broadcast(passed, 0)
        passed = passed.item()
        self.last += passed
        self.spent += passed
        if not self.stepped:
            self.stepped = True
            self.waited += passed
        self.progress = min(1.0, (self.spent - self.waited) / max(1e-9, self.seconds - self.waited))
        if self.spent >= self.seconds:
            self.progress = 1.0

    def __call__(self, step: int) -> float:
        """Return the factor of the learning rate after `step` steps."""
        return min(1.0, (step + 1) / (self.warmup_steps + 1)) * (1.0 - self.progress)


class StopByClock(TrainerCallback):
    """Tell a `Clock` the time, and end the run when the time is up."""

    def __init__(self, clock: Clock, seconds: float):
        self.clock = clock
        self.seconds = seconds

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.start(self.seconds)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.tick()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.clock.progress >= 1.0:
            control.should_training_stop = True
