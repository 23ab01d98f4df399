"""Rewrite a checkpoint of FSDP2 as one of a launch without FSDP, and the other way round.

accelerate writes a sharded checkpoint by torch.distributed.checkpoint (DCP), which any number of processes under FSDP2
can read. A launch without it reads model.safetensors and optimizer.pt. Both hold the same weights and the same states
of the optimizer. The Trainer's other files do not depend on FSDP.
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
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    states = {numbers[name]: state for name, state in optimizer["state"].items()}
    with written(checkpoint / WHOLE["optimizer"]) as path:
        torch.save({"state": states, "param_groups": groups}, path)
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
    optimizer = torch.load(checkpoint / WHOLE["optimizer"], weights_only=True)
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    # The Trainer's groups: weights that decay, then those that do not.
    order = [pair for pair in trained if pair[0] in decayed] + [pair for pair in trained if pair[0] not in decayed]
    groups, states = [], {}
    for group in optimizer["param_groups"]:
        groups.append({**group, "params": [order[number][0] for number in group["params"] if number < len(order)]})
    for number, state in optimizer["state"].items():
        fits = number < len(order) and state["exp_avg"].shape == order[number][1].shape
        if not fits:
            raise ValueError(f"{checkpoint} has states of an optimizer over other weights")
        states[order[number][0]] = state
    if weights.keys() != expected.keys():
        raise ValueError(f"{checkpoint} has other weights: {sorted(weights.keys() ^ expected.keys())[:5]}")
    for key, state in (("model", weights), ("optimizer", {"state": states, "param_groups": groups})):
        with written(checkpoint / SHARDED[key]) as path:
            dcp.save({key: state}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
