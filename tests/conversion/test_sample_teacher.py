"""Texts that a teacher samples, on a tiny one."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, MistralConfig

from modeling_rebased import ReBasedForCausalLM
from modeling_rebased.conversion import linearize
from modeling_rebased.conversion.sample_teacher import OPENINGS, Prompts, main, sample_rows, sample_shards
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.shards import read_index
from modeling_rebased.training.text import TokenBlocks
from tests.conversion.teacher import make_teacher


TEMPLATE = "<system>Be kind.{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "teacher"
    with torch.no_grad():
        model = make_teacher(num_attention_heads=4, num_key_value_heads=2)
        model.model.embed_tokens.weight.mul_(12)  # or all tokens are about as likely
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def read(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.bin"))}


@pytest.mark.parametrize("ours", [False, True])
def test_rows_are_what_generate_writes(teacher, ours, tmp_path, monkeypatch):
    """At a temperature near 0, and each step attends without a mask, which fast kernels need."""
    if ours:
        linearize(teacher, tmp_path / "copy", layers="softmax")
        model = ReBasedForCausalLM.from_pretrained(tmp_path / "copy").eval()
    else:
        model = LlamaForCausalLM.from_pretrained(teacher).eval()
    prompts = torch.tensor([[1, 7, 3], [9, 9, 200]])
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=9, do_sample=False)
    masks, attend = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        masks.append(kwargs.get("attn_mask"))
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    rows = sample_rows(model, prompts, 12, 1e-4, torch.Generator().manual_seed(0))
    assert rows.tolist() == expected.tolist()
    assert len(masks) == 2 * 9 and set(masks) == {None}


def test_samples_have_the_models_distribution(teacher):
    model = LlamaForCausalLM.from_pretrained(teacher).eval()
    prompts = torch.tensor([[5, 6]]).expand(20_000, -1)
    with torch.no_grad():
        logits = model(prompts[:1]).logits[0, -1].double()
    for temperature in (1.0, 0.5):
        rows = sample_rows(model, prompts, 3, temperature, torch.Generator().manual_seed(0))
        found = torch.bincount(rows[:, 2], minlength=258).double() / len(rows)
        expected = (logits / temperature).softmax(-1)
        assert expected.max() > 0.02
        # Five standard deviations of a binomial share.
        assert ((found - expected).abs() < 5 * (expected * (1 - expected) / len(rows)).sqrt() + 1e-4).all()


def test_tokens_that_the_tokenizer_lacks_are_not_drawn(tmp_path):
    """Models often have more embeddings than tokens, so that their number is a multiple of 64."""
    with torch.no_grad():
        model = make_teacher(vocab_size=320)
        model.lm_head.weight[258:] = model.lm_head.weight[:62]  # as likely as others
    model.save_pretrained(tmp_path / "teacher")
    chat_tokenizer().save_pretrained(tmp_path / "teacher")
    sample_shards(tmp_path / "teacher", tmp_path / "out", tokens=600, length=30, batch_size=20, shares=(1, 0, 0))
    assert np.fromfile(tmp_path / "out" / "shard-00000.bin", "<u2").max() < 258


def test_one_process_or_several_write_the_same_and_a_stopped_run_goes_on(teacher, tmp_path):
    settings = {"tokens": 4 * 96 - 5, "length": 32, "batch_size": 3}
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert sample_shards(teacher, alone, **settings) == 4 * 96
    found = [sample_shards(teacher, together, **settings, rank=i, world_size=3) for i in (2, 0, 1)]
    assert found == [96, 192, 96]
    assert list(read(alone)) == [f"shard-0000{i}.bin" for i in range(4)] and read(alone) == read(together)
    (together / "shard-00002.bin").unlink()
    with pytest.raises(ValueError, match="is missing"):  # not read as if it were whole
        read_index(together)
    assert main([str(teacher), str(together), *["--tokens", "480", "--length", "32", "--batch-size", "3"]]) == 0
    assert read_index(together)["tokens"] == 480
    assert {name: raw for name, raw in read(together).items() if name != "shard-00004.bin"} == read(alone)
    assert len(set(read(together).values())) == 5
    blocks = TokenBlocks([str(together)], byte_tokenizer(), 32)
    assert len(blocks) == 15


def test_how_rows_begin(teacher, tmp_path):
    tokenizer = chat_tokenizer()
    prompts = Prompts(tokenizer, ["the cat", "a dog that barks"], (0.5, 0.25, 0.25), seed=0)
    kinds = [prompts.kind(number) for number in range(40)]
    assert [kinds.count(each) for each in ("start", "opening", "chat")] == pytest.approx([20, 10, 10], abs=1)
    assert prompts(kinds.index("start"), 3).tolist() == [[tokenizer.eos_token_id]] * 3
    (chat,) = set(tokenizer.batch_decode(prompts(kinds.index("chat"), 2)))
    assert chat == "<system>Be kind.<user>"
    for number in (i for i, kind in enumerate(kinds) if kind == "opening"):
        rows = prompts(number, 5)
        assert rows.tolist() == prompts(number, 5).tolist() and set(rows[:, 0].tolist()) == {tokenizer.eos_token_id}
        for text in tokenizer.batch_decode(rows[:, 1:]):
            assert text and ("the cat".startswith(text) or "a dog that barks".startswith(text))
    assert len(set(OPENINGS.read_text().splitlines())) > 150


def test_only_full_softmax_attention_is_sampled(teacher, tmp_path, capsys):
    sliding = MistralConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, sliding_window=8)
    sliding.save_pretrained(tmp_path / "sliding")
    linearize(teacher, tmp_path / "window", layers="window", feature_dim=4)
    for name in ("sliding", "window"):
        assert main([str(tmp_path / name), str(tmp_path / "out"), "--tokens", "9"]) == 1
        assert "TEACHER must have full softmax attention in every layer" in capsys.readouterr().err


def test_wrong_arguments(teacher, tmp_path, capsys):
    def refused(*more):
        assert main([str(teacher), str(tmp_path / "out"), *more]) == 1
        return capsys.readouterr().err

    assert "--tokens is 0" in refused("--tokens", "0")
    assert "--temperature is 0.0" in refused("--tokens", "9", "--temperature", "0")
    assert "at least 23, for the longest prompt" in refused("--tokens", "9", "--length", "22")
    assert "--shares is [0.0, 0.0, 0.0]" in refused("--tokens", "9", "--shares", "0", "0", "0")
    assert "--shares is [nan, 0.0, 1.0]" in refused("--tokens", "9", "--shares", "nan", "0", "1")
    assert "--max-seconds is nan" in refused("--tokens", "9", "--max-seconds", "nan")
    assert "--openings no.txt cannot be read" in refused("--tokens", "9", "--openings", "no.txt")
    (tmp_path / "blank.txt").write_bytes(b" \n")
    assert "--openings holds no opening" in refused("--tokens", "9", "--openings", str(tmp_path / "blank.txt"))
    (tmp_path / "blank.txt").write_bytes(b"\xff")
    assert "blank.txt cannot be read: 'utf-8'" in refused("--tokens", "9", "--openings", str(tmp_path / "blank.txt"))
    assert not (tmp_path / "out").exists()
    assert main([str(teacher), __file__, "--tokens", "9"]) == 1
    assert "is a file; it must be a folder" in capsys.readouterr().err
    (tmp_path / "mute").mkdir()
    shutil.copy(teacher / "config.json", tmp_path / "mute")
    assert main([str(tmp_path / "mute"), str(tmp_path / "out"), "--tokens", "9"]) == 1
    assert "mute' has no tokenizer" in capsys.readouterr().err
    byte_tokenizer().save_pretrained(tmp_path / "mute")
    assert main([str(tmp_path / "mute"), str(tmp_path / "out"), "--tokens", "9"]) == 1
    assert "has no chat format" in capsys.readouterr().err
    assert "--length is 65; it must be at most 64" in refused("--tokens", "9", "--length", "65")
    damaged = shutil.copytree(teacher, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    assert main([str(damaged), str(tmp_path / "out"), "--tokens", "9", "--length", "30"]) == 1
    assert "missing 'model.norm.weight'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    sample_shards(teacher, tmp_path / "out", tokens=60, length=30, batch_size=2)
    assert "holds shards of other settings: length 30" in refused(
        *["--tokens", "60", "--length", "31", "--batch-size", "2"]
    )
    assert json.loads((tmp_path / "out" / "index.json").read_text())["tokens"] == 60
    assert np.fromfile(tmp_path / "out" / "shard-00000.bin", "<u2").shape == (60,)
