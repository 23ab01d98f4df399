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


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights and the states of the optimizer."""
    states = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    flat = {f"{number}.{name}": value for number, state in states.items() for name, value in state.items()}
    return load_file(folder / "model.safetensors"), flat


def assert_same_checkpoint(folder: Path, expected: Path) -> None:
    names = [{path.name for path in each.iterdir() if "rng_state" not in path.name} for each in (folder, expected)]
    assert names[0] == names[1]
    for got, wanted in zip(read_checkpoint(folder), read_checkpoint(expected)):
        assert got.keys() == wanted.keys() and len(got) > 10
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    groups = [torch.load(each / "optimizer.pt", weights_only=True)["param_groups"] for each in (folder, expected)]
    for got, wanted in zip(*groups, strict=True):
        unlike = dict.fromkeys(("foreach", "fused"))  # how it is computed, and not what
        assert got | unlike == wanted | unlike
    schedules = [torch.load(each / "scheduler.pt", weights_only=True) for each in (folder, expected)]
    assert schedules[0] == schedules[1]


def test_any_number_of_processes_goes_on_from_another(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = [*arguments, "--per_device_train_batch_size", "4"]
    train(one, tmp_path / "whole", 5)
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
    assert not (stopped / "checkpoint-2" / "pytorch_model_fsdp_0").exists()
    train_by(2, "tp", arguments, stopped, 4, batch=4)
    assert_same_checkpoint(stopped / "checkpoint-4", tmp_path / "whole" / "checkpoint-4")
    train(one, stopped, 5)
    assert_same(stopped, tmp_path / "whole")


def test_tensor_parallelism_goes_on_exactly(arguments, tmp_path, monkeypatch):
    """Both processes train on the same examples, and drop the same numbers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = json.loads(Path(arguments[1], "config.json").read_text()) | {"residual_dropout": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path), *arguments[2:]]
    whole, split, stopped = (tmp_path / name for name in ("whole", "split", "stopped"))
    train([*arguments, "--per_device_train_batch_size", "4"], whole, 4)
    train_by(2, "tp", arguments, split, 4, batch=4)
    assert_same(split, whole)
    figures = [json.loads((folder / "final/training_figures.json").read_text()) for folder in (split, whole)]
    assert figures[0] == figures[1]
    # As if both processes had been killed before the second one had written its random states
    for step in (2, 3):
        shutil.copytree(split / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
    (stopped / "checkpoint-3" / "rng_state_1.pth").unlink()
    # Both take the random states of the first one, also where the second one has others or none.
    shutil.copy(split / "checkpoint-1" / "rng_state_1.pth", stopped / "checkpoint-2")
    train_by(2, "tp", arguments, stopped, 4, batch=4)
    for got, wanted in zip(*(read_checkpoint(folder / "checkpoint-4") for folder in (stopped, split))):
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_what_cannot_be_split(monkeypatch):
    config = ReBasedConfig(qk_norm_scope="head", num_attention_heads=4, num_key_value_heads=2)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "4")
    for processes, message in ((2, "it must be their number"), (4, "does not divide 4 heads and 2 key-value heads")):
        with pytest.raises(ValueError, match=message):
            split_model(SimpleNamespace(config=config), SimpleNamespace(world_size=processes))
