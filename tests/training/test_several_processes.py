"""Training under DDP, FSDP2 and tensor parallelism makes what one process makes; each goes on from the others."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from modeling_rebased import ReBasedConfig
from modeling_rebased.training import train_lm
from modeling_rebased.training.tensor_parallel import split_model
from tests.processes import run_with_processes


LAUNCH_ON_CPU = Path(__file__).with_name("launch_on_cpu.py")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("several")
    config = {"model_type": "rebased", "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "feature_dim": 4, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "text.txt").write_text("".join(f"the number {n} is followed by {n + 1}. " for n in range(40)))
    given = {"config": folder, "train_file": folder / "text.txt", "context_length": 64, "warmup_steps": 0}
    given |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 1}
    given |= {"save_total_limit": 9, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def train(arguments: list[str], output: Path, steps: int) -> None:
    train_lm.main([*arguments, "--output_dir", str(output), "--max_steps", str(steps)])


def train_by(processes: int, launch: str, arguments: list[str], output: Path, steps: int, batch: int) -> None:
    own = ["--per_device_train_batch_size", batch, "--output_dir", output, "--max_steps", steps]
    run_with_processes(processes, LAUNCH_ON_CPU, launch, "modeling_rebased.training.train_lm", *arguments, *own)


def assert_same(output: Path, expected: Path) -> None:
    got, wanted = (load_file(folder / "final" / "model.safetensors") for folder in (output, expected))
    assert {path.name for path in (output / "final").iterdir()} == {
        path.name for path in (expected / "final").iterdir()
    }
    assert got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-2, atol=1e-4)  # in bfloat16


def test_any_number_of_processes_goes_on_from_another(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = [*arguments, "--per_device_train_batch_size", "4"]
    train(one, tmp_path / "whole", 4)
    # As if the run had been stopped after its first step, then after its second and third
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", stopped / "checkpoint-1")
    sharded = "fsdp2,fsdp_offload_params=true,fsdp_activation_checkpointing=true"
    train_by(2, sharded, arguments, stopped, 2, batch=2)
    for step in ("checkpoint-1", "checkpoint-2"):
        assert (stopped / step / "pytorch_model_fsdp_0").is_dir() and not (stopped / step / "optimizer.pt").exists()
    names = [{path.name for path in (folder / "final").iterdir()} for folder in (stopped, tmp_path / "whole")]
    assert names[0] == names[1]
    train_by(4, "ddp", arguments, stopped, 3, batch=1)
    train(one, stopped, 4)
    assert not (stopped / "checkpoint-2" / "pytorch_model_fsdp_0").exists()
    assert_same(stopped, tmp_path / "whole")
    # Tensor parallelism: both processes train on the same examples.
    train_by(2, "tp", arguments, tmp_path / "split", 4, batch=4)
    assert_same(tmp_path / "split", tmp_path / "whole")
    assert not list((tmp_path / "split").glob("checkpoint-*"))
    figures = [
        json.loads((tmp_path / name / "final/training_figures.json").read_text()) for name in ("split", "whole")
    ]
    assert figures[0] == figures[1]


def test_what_cannot_be_split(monkeypatch):
    args = SimpleNamespace(world_size=2)
    for size, scope, message in ((4, "all_heads", "it must be their number"), (2, "head", "FSDP2")):
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", str(size))
        model = SimpleNamespace(config=ReBasedConfig(qk_norm_scope=scope))
        with pytest.raises(ValueError, match=message):
            split_model(model, args)
