"""Split every layer of a model over the processes of a launch, where accelerate asks for it: tensor parallelism.

accelerate's `tp_size` says over how many processes. accelerate takes only a model that is split already, and the
library splits a model while it loads one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)


def tensor_parallel_size() -> int:
    """Return the `tp_size` of this launch, 1 without tensor parallelism."""
    asked = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    return int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", 1)) if asked else 1


def split_model(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """Return a model with the same weights, split over all processes. Each of them must call this.

    A run with tensor parallelism writes no checkpoints: each process holds a part of the optimizer's states, and the
    Trainer writes those of one.

    Raises:
        ValueError: the model or the launch cannot be split.
    """
    size = tensor_parallel_size()
    if size != args.world_size:
        raise ValueError(f"tp_size is {size}, but there are {args.world_size} processes; it must be their number")
    config = model.config
    if getattr(config, "qk_norm_scope", "all_heads") == "head" and (config.use_gamma or config.use_beta):
        raise ValueError(
            "tp_size is above 1, and the heads of this model share the gains of their norms (qk_norm_scope is "
            "'head'), which every process would train by its own heads; FSDP2 (training/fsdp2.yaml) can train it"
        )
    if args.save_strategy != "no" or args.resume_from_checkpoint:
        logger.warning("A run with tensor parallelism writes no checkpoints, and continues from none.")
        args.save_strategy, args.resume_from_checkpoint = "no", None
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
    return split
