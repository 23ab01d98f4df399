"""The programs of examples/ run, offline, and stay short enough to read at once."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from tests.conversion.teacher import make_teacher
from tests.processes import run_python


REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
CHECKPOINT = REPOSITORY / "checkpoints" / "english-6m"
TEXT = "the cat sat on the mat and the dog sat on the log. " * 30


def run(name: str, *arguments: str | Path) -> str:
    """Run an example without the network and return what it prints."""
    path = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = run_python(REPOSITORY / "examples" / name, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_each_is_short_and_named_in_a_test():
    this_file = Path(__file__).read_text(encoding="utf-8")
    assert len(EXAMPLES) == 3
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name
        assert f'run("{path.name}"' in this_file


def test_generate():
    prompts = ("My fellow citizens, ", "And")
    printed = run("generate.py", "--model", CHECKPOINT, "--prompt", *prompts, "--new_tokens", "12")
    texts = printed.strip().split("\n\n")
    assert [text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True)] == [True, True]


def test_finetune_lora(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    given = ("--model", CHECKPOINT, "--train_file", tmp_path / "text.txt", "--output", tmp_path / "out")
    run("finetune_lora.py", *given, "--steps", "30", "--context_length", "64")
    tokenizer = byte_tokenizer()
    inputs = tokenizer(TEXT[:200], return_tensors="pt")
    losses = []
    for folder in (CHECKPOINT, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        losses.append(model(**inputs, labels=inputs["input_ids"]).loss.item())
        # merged: the names of the plain model, and no adapters beside them
        assert not any("lora" in name for name, _ in model.named_parameters())
    assert losses[1] < losses[0] - 0.3


def test_linearize(tmp_path):
    make_teacher(tie_word_embeddings=False).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    files = ("--train_file", tmp_path / "text.txt", "--eval_file", tmp_path / "text.txt")
    sizes = ("--steps", "3", "--context_length", "32")
    printed = run("linearize.py", tmp_path / "teacher", tmp_path / "out", *files, *sizes)
    assert "held-out perplexity" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "logits" / "final", trust_remote_code=True)
    assert model.config.layer_types == ["hybrid_sliding", "hybrid_sliding"]
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()
