"""A finished model is written whole, also where each process holds a part of it."""

import json
import os

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_rebased.eval.timing import write_csv
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.folders import gathered_model, save_model, write_text, written
from tests.modeling_rebased.cases import make_ids, make_model
from tests.processes import run_with_processes


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), written(tmp_path / "new" / "final") as path:
        path.mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_text_or_table_that_fails_leaves_the_one_before(tmp_path):
    write_text(tmp_path / "new" / "text", "one é\n")
    assert (tmp_path / "new" / "text").read_bytes() == "one é\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "new" / "text", "two\n" * 9999 + "\udcff")
    write_csv([{"a": 1.23456}], tmp_path / "new" / "table.csv")
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        write_csv([{"a": 2}, {"b": 3}], tmp_path / "new" / "table.csv")
    assert {path.name: path.read_text("utf-8").split() for path in (tmp_path / "new").iterdir()} == {
        "text": ["one", "é"],
        "table.csv": ["a", "1.2346"],
    }


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    for content in ("a", "b"):
        with written("new/er/file") as path:
            assert path.parent.parent == tmp_path / "new" / "er" and path.name == "file"
            assert path.parent.name.startswith(".file.") and path.parent.name.endswith(".partial")
            path.write_text(content)
            seen.append((tmp_path / "new" / "er" / "file").exists())
        assert (tmp_path / "new" / "er" / "file").read_text() == content
        assert [each.name for each in (tmp_path / "new" / "er").iterdir()] == ["file"]
    assert seen == [False, True]
    (tmp_path / "link").symlink_to("nowhere")
    with written("link") as path:
        path.mkdir()
    assert (tmp_path / "link").is_dir() and not (tmp_path / "link").is_symlink()


def test_a_file_takes_the_place_of_another_in_one_step(tmp_path, monkeypatch):
    """There is always a file of that name, so that a kill between two steps cannot lose both."""
    there, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda *paths: (replace(*paths), there.append((tmp_path / "run.json").exists()))
    )
    for content in ("a", "b"):
        write_text(tmp_path / "run.json", content)
    assert there == [True, True] and (tmp_path / "run.json").read_text() == "b"


def test_the_old_output_comes_back_where_the_new_one_cannot_take_its_place(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileNotFoundError), written(tmp_path / name):
            pass  # nothing was written
    assert (tmp_path / "file").read_text() == "old" and (tmp_path / "link").is_symlink()
    with pytest.raises(FileNotFoundError), written(tmp_path / "kept" / "a" / "b"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept", "link"]
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_saved_folder(tmp_path):
    model = make_model("paper", max_position_embeddings=64)
    save_model(tmp_path / "bare", model)
    assert not {"tokenizer.json", "README.md"} & {path.name for path in (tmp_path / "bare").iterdir()}
    tokenizer, short = byte_tokenizer(), byte_tokenizer()
    tokenizer.init_kwargs |= {"is_local": True, "local_files_only": True}  # as from_pretrained leaves them
    tokenizer.padding_side, short.model_max_length = "right", 20
    card = ModelCard("---\nlicense: mit\n---\nA card.\n")
    save_model(tmp_path / "whole", model, tokenizer, card, max_shard_size="20KB")
    assert (tmp_path / "whole" / "README.md").read_text() == str(card)
    assert (tmp_path / "whole" / "model.safetensors.index.json").is_file()
    settings = json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text())
    assert (settings["padding_side"], settings["model_max_length"]) == ("left", 64)
    assert not {"is_local", "local_files_only"} & settings.keys()
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 64)
    save_model(tmp_path / "short", model, short)
    assert json.loads((tmp_path / "short" / "tokenizer_config.json").read_text())["model_max_length"] == 20
    assert (tmp_path / "short" / "model.safetensors").is_file()


def test_a_gathered_model_is_a_copy_of_a_type():
    model = make_model("paper")
    expected = model.config.to_dict()
    model.config.use_cache = False  # as the Trainer leaves it
    model.generation_config.temperature = 0.3  # as a checkpoint may have it
    for dtype in (torch.bfloat16, torch.float32):
        copy = gathered_model(model, dtype) if dtype != torch.bfloat16 else gathered_model(model)
        assert type(copy) is type(model) and copy.config.to_dict() == expected
        assert copy.generation_config.temperature == 0.3
        assert copy.lm_head.weight is copy.model.embed_tokens.weight
        assert all(
            torch.equal(weight, model.state_dict()[name].to(dtype)) for name, weight in copy.state_dict().items()
        )
        assert {weight.dtype for weight in copy.state_dict().values()} == {dtype}


def test_a_model_sharded_by_fsdp2_is_written_like_one_of_a_single_process(tmp_path):
    """The same files, the same bytes of weights, code of this package, and one process that writes."""
    model = make_model("every_type")
    model.save_pretrained(tmp_path / "model")
    with written(tmp_path / "alone") as path:
        save_model(path, gathered_model(model), byte_tokenizer())
    script = tmp_path / "fsdp.py"
    script.write_text(
        """
import sys
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from modeling_rebased import ReBasedForCausalLM
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.folders import gathered_model, save_model, written
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (2,))
model = ReBasedForCausalLM.from_pretrained(sys.argv[1])
for i, layer in enumerate(model.model.layers):
    model.model.layers[i] = layer = checkpoint_wrapper(layer)  # as accelerate does for fsdp_activation_checkpointing
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
    run_with_processes(2, script, tmp_path / "model", tmp_path / "sharded")
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    assert {path.name for path in alone.iterdir()} == {path.name for path in sharded.iterdir()}
    assert json.loads((alone / "config.json").read_text()) == json.loads((sharded / "config.json").read_text())
    first, second = load_file(alone / "model.safetensors"), load_file(sharded / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    loaded = AutoModelForCausalLM.from_pretrained(sharded, trust_remote_code=True, dtype=torch.float32).eval()
    expected = make_model("every_type")
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        torch.testing.assert_close(loaded(make_ids()).logits, expected(make_ids()).logits)
