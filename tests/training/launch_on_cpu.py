"""Run a module's `main` as `accelerate launch --config_file training/NAME.yaml` does, on a CPU with gloo.

    RANK=0 WORLD_SIZE=2 ... python launch_on_cpu.py NAME[,OPTION=VALUE,...] MODULE ARGUMENT ...

An option is one of accelerate launch, such as `fsdp_offload_params=true`. accelerate itself wants GPUs for all
configurations but ddp. Here it believes that there are some.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
import yaml
from accelerate.state import DistributedType, PartialState


launch, module, *arguments = sys.argv[1:]
name, *options = launch.split(",")
config = yaml.safe_load((Path(__file__).parents[2] / f"training/{name}.yaml").read_text())
# What accelerate launch does with a configuration
given = {**config.get("fsdp_config", {}), **config.get("parallelism_config", {})}
given |= dict(option.split("=") for option in options)
os.environ.update({key.upper(): str(value) for key, value in given.items()})
for part, switch in (
    ("fsdp_config", "ACCELERATE_USE_FSDP"),
    ("parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG"),
):
    os.environ[switch] = str(part in config).lower()
os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
kind = DistributedType.MULTI_CPU if name == "ddp" else DistributedType.MULTI_GPU
PartialState._prepare_backend = lambda self, *_: ("gloo", kind)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
torch.Tensor.pin_memory = lambda self, *_: self  # which needs a GPU, for FSDP2 with weights on the CPU
torch.distributed.init_process_group("gloo")
if status := importlib.import_module(module).main(arguments):
    sys.exit(status)
