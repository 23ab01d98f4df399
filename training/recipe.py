"""Say what the fast loop (fast_loop.py) trains: a run of a synthetic task, and how it is computed.

MQAR (mqar_runs.py), MAD (train_mad.py) and ICLL (train_icll.py) each have a class of runs, derived from `Recipe`.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn


if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Task(Protocol):
    """Hold the data of a run on its device, and say what is learned from it and measured.

    Attributes:
        train: tensors with one row per training example. The first holds the tokens, [N, T].
    """

    train: tuple[torch.Tensor, ...]

    def loss(self, backbone: nn.Module, head: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        """Return the loss of one batch, which has rows of each tensor of `train` as int64."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return what the test set shows after an epoch, "accuracy" first.

        With a "validation_loss", the weights of the epoch where it is lowest are the result of a run.
        """

    def finish(self, model: nn.Module) -> dict[str, float]:
        """Return what is measured once, at the end of a run."""


class Recipe:
    """Be the base of the classes of runs, frozen dataclasses whose fields decide a run's numbers."""

    model: str
    lr: float
    seed: int
    epochs: int
    batch_size: int
    train_examples: int
    weight_decay: float
    stop_at: float

    @property
    def name(self) -> str:
        """Return a name that differs between any two runs."""
        raise NotImplementedError

    def new_model(self, kernel_backend: str) -> nn.Module:
        """Return a model with fresh weights. It has `base_model` and `get_output_embeddings`."""
        raise NotImplementedError

    def make_task(self, device: torch.device) -> Task:
        """Return the data and the measures of this run."""
        raise NotImplementedError

    def save(self, model: nn.Module, folder: Path, result: dict[str, Any]) -> None:
        """Write the folder of a trained model."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> int:
        # the last, smaller batch of an epoch is left out: every epoch has another order, so nothing is lost for good
        return self.train_examples // self.batch_size

    def lr_at(self, epoch: int, step: int = 0) -> float:
        """Return the learning rate of a step of an epoch: here a cosine from lr towards 0, with one step per epoch."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def is_done(self, history: list[dict[str, float]]) -> bool:
        """Return whether a run with these epochs, at least one, need not go on."""
        return history[-1]["accuracy"] >= self.stop_at

    def order(self, epoch: int) -> torch.Tensor:
        """Return the order of the training examples in an epoch, cut to whole batches."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.train_examples, generator=generator)[: self.steps_per_epoch * self.batch_size]


@dataclass(frozen=True)
class Options:
    """Hold how a run is computed, which does not change what it should learn."""

    device: str = "cuda"
    kernel_backend: str = "auto"
    bf16: bool = True
    compile: bool = True
    cuda_graph: bool = True
    progress: bool = True
    work_dir: str | None = None
    save_seconds: float = 30.0
    race_epoch: int | None = None
    deadline: float | None = None  # a time.time() after which runs stop at the end of their epoch
    take_turns: bool = False
    deterministic: bool = False
    save_weights: str | None = None  # a folder, for the weights after each epoch

    @property
    def late(self) -> bool:
        """Return whether the deadline has passed."""
        return self.deadline is not None and time.time() > self.deadline

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)


def shown(value: float) -> str:
    """Return a number as the name of a run has it: short, and different for any two numbers."""
    return str(value) if isinstance(value, int) or float(f"{value:g}") != value else f"{value:g}"


def best_epoch(history: list[dict[str, float]]) -> int | None:
    """Return the number of the epoch with the lowest validation loss, or `None` if there is none."""
    losses = [(entry["validation_loss"], entry["epoch"]) for entry in history if "validation_loss" in entry]
    return int(min(losses)[1]) if losses else None


def build_model(run: Recipe, kernel_backend: str = "auto") -> Any:
    """Return a new model, with the same weights for the same seed, whatever was drawn before."""
    torch.manual_seed(run.seed)
    return run.new_model(kernel_backend)


def fields_of(run: Recipe) -> dict[str, Any]:
    """Return the fields of a run by name."""
    instance: DataclassInstance = run  # type: ignore[assignment]
    return asdict(instance)


def kind_of(run: Recipe) -> tuple:
    """Return what runs of one FastTrainer have in common."""
    return tuple(value for name, value in fields_of(run).items() if name not in ("lr", "seed", "epochs", "stop_at"))
