"""Split every layer of a model over the processes of a launch, where accelerate asks for it: tensor parallelism.

accelerate's `tp_size` says over how many processes. accelerate takes only a model that is split already, and the
library splits a model while it loads one. Its Trainer neither writes nor reads checkpoints of such a model, so
`TensorParallelTrainer` does.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .checkpoints import SCHEDULE, WHOLE, numbered, read_optimizer, schedule_of, write_optimizer
from .folders import gathered_model


def tensor_parallel_size() -> int:
    """Return the `tp_size` of this launch, 1 without tensor parallelism."""
    asked = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    return int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", 1)) if asked else 1


def split_model(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """Return a model with the same weights, split over all processes. Each of them must call this.

    The split model's `load_state_dict` takes whole weights, such as those of a checkpoint.

    Raises:
        ValueError: the model or the launch cannot be split.
    """
    size = tensor_parallel_size()
    if size != args.world_size:
        raise ValueError(f"tp_size is {size}, but there are {args.world_size} processes; it must be their number")
    config = model.config
    by_heads = (config.base_model_tp_plan or {}).get("layers.*.self_attn.q_proj") == "colwise"
    heads = [getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")] if by_heads else []
    if any(count % size for count in heads):
        raise ValueError(
            f"tp_size is {size}, which does not divide {heads[0]} heads and {heads[1]} key-value heads; "
            "FSDP2 (training/fsdp2.yaml) can train this model"
        )
    with tempfile.TemporaryDirectory() as own:
        folder = [own if args.process_index == 0 else None]
        dist.broadcast_object_list(
            folder, src=0, device=args.device
        )  # the folder of the first process, on one machine
        if args.process_index == 0:
            model.save_pretrained(Path(own))
        dist.barrier()
        split = type(model).from_pretrained(folder[0], dtype=torch.float32, tp_plan="auto")
        dist.barrier()
    split.register_load_state_dict_pre_hook(_take_parts)
    if by_heads and getattr(config, "qk_norm_scope", "all_heads") == "head":
        # The heads of all processes share the gains. The library's own style for that, in which the gradient is summed
        # once it is accumulated ("replicated_with_grad_allreduce"), sums earlier parts of a batch again.
        for name, gain in split.named_parameters():
            if ".self_attn.q_norm." in name or ".self_attn.k_norm." in name:
                gain.register_hook(_sum_over_processes)
    return split


def _sum_over_processes(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient


class TensorParallelTrainer(Trainer):
    """Train as the library does, with checkpoints of a model that `split_model` made.

    The files are those of one process, with whole weights and whole states of the optimizer. A run therefore goes on
    from a checkpoint with any number of processes, with tensor parallelism or without it.
    """

    model: Any

    def __init__(self, *, args: TrainingArguments, **kwargs: Any) -> None:
        # The library refuses checkpoints of a split model, unless they hold its weights alone.
        given = args.save_only_model
        args.save_only_model = given or tensor_parallel_size() > 1
        try:
            super().__init__(args=args, **kwargs)
        finally:
            args.save_only_model = given

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as the library does, with whole weights. Every process must call this."""
        if self.get_tp_size() == 1:
            super().save_model(output_dir, _internal_call)
            return
        split = self.model
        whole = gathered_model(self.accelerator.unwrap_model(split), torch.float32)
        if whole is None:  # the first process writes it
            return
        self.model = whole
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = split

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.get_tp_size() == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if self.args.should_save:
            write_optimizer(Path(output_dir), self, state, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.get_tp_size() == 1 or checkpoint is None or not (Path(checkpoint) / WHOLE["optimizer"]).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        known = read_optimizer(Path(checkpoint), self)
        weights = dict(self.model.named_parameters())
        states = {
            name: {key: _split(value, weights[name]) for key, value in state.items()}
            for name, state in known["state"].items()
        }
        # No kernel updates weights that are split and others at once. The library therefore puts them into groups of
        # their own, or chooses an implementation that takes one weight at a time.
        names = {weight: name for name, weight in weights.items()}
        known_groups = {name: group for group in known["param_groups"] for name in group["params"]}
        groups = []
        for group in self.optimizer.param_groups:
            own = [names[weight] for weight in group["params"]]
            settings = known_groups[own[0]] if own else {}
            implementation = {name: group[name] for name in ("foreach", "fused") if name in group}
            groups.append({**group, **settings, **implementation, "params": own})
        self.optimizer.load_state_dict(numbered({"state": states, "param_groups": groups}))
        schedule = torch.load(Path(checkpoint) / SCHEDULE, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule_of(schedule, len(groups)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.get_tp_size() == 1 or checkpoint is None:
            return
        # All processes take those of the first: what each computes alike, such as dropout, must stay alike, also where
        # the checkpoint has the states of fewer processes.
        on_gpu = self.args.device.type == "cuda"
        states = [torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None]
        dist.broadcast_object_list(states, src=0, device=self.args.device)
        torch.set_rng_state(states[0])
        if on_gpu:
            torch.cuda.set_rng_state(states[1])


def _split(whole: Any, weight: torch.Tensor) -> Any:
    """Return this process's part of a tensor, if it belongs to a weight that is split and has its shape."""
    if not isinstance(weight, DTensor) or getattr(whole, "shape", None) != weight.shape:
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)


def _take_parts(model: PreTrainedModel, state_dict: dict[str, Any], *_: Any) -> None:
    """Replace the whole weights in a state dict by this process's parts, before they are loaded."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in state_dict:
            state_dict[name] = _split(state_dict[name], weight)
