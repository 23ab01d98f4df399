"""Rewrite a checkpoint of FSDP2 as one of a launch without FSDP, and the other way round.

accelerate writes a sharded checkpoint by torch.distributed.checkpoint (DCP), which any number of processes under FSDP2
can read. A launch without it reads model.safetensors and optimizer.pt. Both hold the same weights and the same states
of the optimizer. The Trainer's other files do not depend on FSDP. Tensor parallelism writes and reads the files of a
launch without FSDP (`TensorParallelTrainer`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from transformers import Trainer

from .folders import written


SHARDED = {"model": "pytorch_model_fsdp_0", "optimizer": "optimizer_0"}  # by the key within, accelerate's names
WHOLE = {"model": "model.safetensors", "optimizer": "optimizer.pt"}  # the Trainer's names
SCHEDULE = "scheduler.pt"  # the Trainer's name
BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs")  # what torch's schedules keep for each group of weights


def is_sharded(checkpoint: Path) -> bool:
    """Return whether FSDP wrote a checkpoint."""
    return (checkpoint / SHARDED["model"]).is_dir()


def rewrite(checkpoint: Path, trainer: Trainer) -> None:
    """Give a checkpoint the form that a trainer reads, with FSDP or without. One process of a launch calls this.

    The files of the other form are removed at the end, so a process that is killed meanwhile leaves one that is whole.

    Raises:
        ValueError: the optimizer's states are not those of the trainer's weights.
    """
    if trainer.is_fsdp_enabled:
        _shard(checkpoint, trainer)
    else:
        _join(checkpoint)
    for name in (WHOLE if trainer.is_fsdp_enabled else SHARDED).values():
        path = checkpoint / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _join(checkpoint: Path) -> None:
    """Write what a launch without FSDP reads."""
    weights, optimizer = (_read_sharded(checkpoint, key) for key in ("model", "optimizer"))
    with written(checkpoint / WHOLE["optimizer"]) as path:
        torch.save(numbered(optimizer), path)
    with written(checkpoint / WHOLE["model"]) as path:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path, {"format": "pt"})


def _read_sharded(checkpoint: Path, key: str) -> dict[str, Any]:
    state: dict[str, Any] = {}
    _load_state_dict(
        state,
        storage_reader=dcp.FileSystemReader(checkpoint / SHARDED[key]),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return state[key]


def _shard(checkpoint: Path, trainer: Trainer) -> None:
    """Write what a launch with FSDP reads."""
    model: Any = trainer.model
    weights = load_file(checkpoint / WHOLE["model"])
    expected = model.state_dict()
    for name, alias in getattr(model, "all_tied_weights_keys", {}).items():
        weights.setdefault(name, weights[alias])
    optimizer = read_optimizer(checkpoint, trainer)
    if weights.keys() != expected.keys():
        raise ValueError(f"{checkpoint} has other weights: {sorted(weights.keys() ^ expected.keys())[:5]}")
    for key, state in (("model", weights), ("optimizer", optimizer)):
        with written(checkpoint / SHARDED[key]) as path:
            dcp.save({key: state}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)


def read_optimizer(checkpoint: Path, trainer: Trainer) -> dict[str, Any]:
    """Return the state dict of an optimizer in a checkpoint of a launch without FSDP, with names instead of numbers.

    Raises:
        ValueError: the states are not those of the trainer's weights.
    """
    optimizer = torch.load(checkpoint / WHOLE["optimizer"], map_location="cpu", mmap=True, weights_only=True)
    model: Any = trainer.model
    weights = dict(model.named_parameters())
    order = [name for names in _groups(trainer) for name in names]
    groups, states = [], {}
    for group in optimizer["param_groups"]:
        groups.append({**group, "params": [order[number] for number in group["params"] if number < len(order)]})
    for number, state in optimizer["state"].items():
        weight = weights[order[number]] if number < len(order) else None
        if weight is None or state.get("exp_avg", weight).shape != weight.shape:
            raise ValueError(f"{checkpoint} has states of an optimizer over other weights")
        states[order[number]] = state
    return {"state": states, "param_groups": groups}


def write_optimizer(checkpoint: Path, trainer: Trainer, optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Write what one process writes of an optimizer and its schedule.

    Args:
        checkpoint: its folder.
        trainer: gives the groups of weights.
        optimizer: a state dict with names and whole states, in groups of any kind.
        scheduler: the state dict of the schedule.
    """
    settings = optimizer["param_groups"][0]
    decays = trainer.args.weight_decay, 0.0
    groups = [{**settings, "params": names, "weight_decay": decay} for names, decay in zip(_groups(trainer), decays)]
    torch.save(numbered({**optimizer, "param_groups": groups}), checkpoint / WHOLE["optimizer"])
    torch.save(schedule_of(scheduler, len(groups)), checkpoint / SCHEDULE)


def schedule_of(scheduler: dict[str, Any], groups: int) -> dict[str, Any]:
    """Return the state dict of a schedule for another number of groups, all of which have the same rate."""
    return {name: value[:1] * groups if name in BY_GROUP else value for name, value in scheduler.items()}


def _groups(trainer: Trainer) -> tuple[list[str], list[str]]:
    """Return the names of the trained weights as the Trainer groups them: those that decay, then those that do not."""
    model: Any = trainer.model
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return [name for name in trained if name in decayed], [name for name in trained if name not in decayed]


def numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict with numbers, as torch has it, instead of names."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {numbers[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}
