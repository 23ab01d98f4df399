"""Split each sequence over several processes in transformers' Trainer, where accelerate asks for it.

accelerate's `cp_size` says over how many processes. Its own way of splitting is for softmax attention alone. It gives
each process a piece from the front and one from the back of a sequence, replaces the call of attention, and refuses
recurrent layers, which need consecutive tokens. This module keeps what accelerate does around it: the mesh, FSDP2, and
the same batch for all processes of a sequence. It splits the batch by `shard_sequence`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from modeling_rebased import shard_sequence


class ContextParallelTrainer(Trainer):
    """Train as the library does, with accelerate's `cp_size` for ReBased models.

    Raises:
        ValueError: `cp_size` is above 1, and the model has softmax layers, the loss is smoothed, or there are metrics.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_group: dist.ProcessGroup | None = None
        if self.get_cp_size() > 1:
            for name in ("label_smoothing_factor", "compute_metrics"):
                if getattr(self.args, name, None) or getattr(self, name, None):
                    raise ValueError(f"`{name}` cannot be used where sequences are split over processes")
            self.context_group = self.accelerator.torch_device_mesh["cp"].get_group()
            self.accelerator.unwrap_model(self.model).set_context_parallel_group(self.context_group)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator as the library does, without accelerate's own changes to attention."""
        super().create_accelerator_and_postprocess()
        if self.get_cp_size() > 1:
            self.accelerator._prepare_cp = lambda *prepared: prepared

    def _prepare_context_parallel_inputs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable, dict[str, Any]]:
        return contextlib.nullcontext, inputs  # `compute_loss` splits them

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the loss as the library does, over this process's part of each sequence."""
        if self.context_group is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = shard_sequence(self._prepare_inputs(inputs), self.context_group)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training:  # evaluation keeps the loss of one of the processes of a sequence
            dist.all_reduce(loss, group=self.context_group)
            loss = loss / self.context_group.size()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the library does, with each sequence counted once."""
        if self.context_group is not None:
            self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)

    def _gather_once(self, values: torch.Tensor) -> torch.Tensor:
        """Return what `gather_for_metrics` does of values [B], from the first process of each sequence."""
        assert self.context_group is not None  # or `evaluation_loop` would not ask
        every = self.accelerator.gather(values).view(-1, self.context_group.size(), len(values))[:, 0].flatten()
        state = self.accelerator.gradient_state
        return every[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else every
