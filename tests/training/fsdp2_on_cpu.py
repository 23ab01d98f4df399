"""Run a module's `main` as `accelerate launch --config_file training/fsdp2.yaml` does, on a CPU with gloo.

    RANK=0 WORLD_SIZE=2 ... python fsdp2_on_cpu.py MODULE ARGUMENT ...

accelerate itself wants GPUs for FSDP2. Here it believes that there are some.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
import yaml
from accelerate.state import DistributedType, PartialState


config = yaml.safe_load((Path(__file__).parents[2] / "training/fsdp2.yaml").read_text())["fsdp_config"]
os.environ.update({name.upper(): str(value) for name, value in config.items()})  # as accelerate launch does
os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})
PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
torch.distributed.init_process_group("gloo")
if status := importlib.import_module(sys.argv[1]).main(sys.argv[2:]):
    sys.exit(status)
