"""A finished model is written whole, also where each process holds a part of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.folders import gathered_model, save_model, written
from tests.modeling_rebased.cases import make_ids, make_model
from tests.processes import run_with_two_processes


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), written(tmp_path / "new" / "final") as path:
        path.mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["every_type", "paper"])
def test_a_model_sharded_by_fsdp2_is_written_like_one_of_a_single_process(tmp_path, name):
    """The same files, the same bytes of weights, code of this package, and one process that writes."""
    model = make_model(name)
    model.save_pretrained(tmp_path / "model")
    with written(tmp_path / "alone") as path:
        save_model(path, gathered_model(model), byte_tokenizer())
    script = tmp_path / "fsdp.py"
    script.write_text(
        """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from modeling_rebased import ReBasedForCausalLM
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.folders import gathered_model, save_model, written
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (2,))
model = ReBasedForCausalLM.from_pretrained(sys.argv[1])
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
whole = gathered_model(model)
assert (whole is None) == (dist.get_rank() != 0)
if whole is not None:
    with written(sys.argv[2]) as path:
        save_model(path, whole, byte_tokenizer())
dist.destroy_process_group()
"""
    )
    run_with_two_processes(script, tmp_path / "model", tmp_path / "sharded")
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    assert {path.name for path in alone.iterdir()} == {path.name for path in sharded.iterdir()}
    assert json.loads((alone / "config.json").read_text()) == json.loads((sharded / "config.json").read_text())
    first, second = load_file(alone / "model.safetensors"), load_file(sharded / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    loaded = AutoModelForCausalLM.from_pretrained(sharded, trust_remote_code=True, dtype=torch.float32).eval()
    expected = make_model(name)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        torch.testing.assert_close(loaded(make_ids()).logits, expected(make_ids()).logits)
