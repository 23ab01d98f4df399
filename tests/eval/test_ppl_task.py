"""The perplexity tasks: documents and metrics. tests/test_readme.py runs lm-eval's command line."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_rebased  # noqa: F401  registers the model
from modeling_rebased.eval.tasks import tasks_path
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.write_stories import story


lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from modeling_rebased.eval.tasks import rebased_ppl  # noqa: E402  which needs it


WINDOW = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny untrained model with its code and the byte-level tokenizer, as a folder."""
    torch.manual_seed(0)
    settings = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"max_position_embeddings": WINDOW, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rebased", **settings))
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that a token missed or counted twice shows
            parameter.mul_(4)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_the_held_out_documents():
    documents = rebased_ppl.load_heldout()["test"]
    titles = documents["title"]
    assert len(titles) == len(set(titles)) == 8
    assert 100_000 < sum(len(text.encode()) for text in documents["text"]) < 300_000


def test_the_held_out_stories():
    """They are the first stories of the command whose persons do not meet in the training text."""
    texts = rebased_ppl.load_heldout_stories()["test"]["text"]
    composed = (story(number) for number in itertools.count())
    held_out = (each.text for each in composed if each.is_held_out)
    assert len(texts) > 200 and texts[:100] == list(itertools.islice(held_out, 100))


def test_a_text_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.delenv("REBASED_PPL_TEXT", raising=False)
    with pytest.raises(ValueError, match="needs a text file"):
        rebased_ppl.load_text()
    plain = tmp_path / "plain.txt"
    plain.write_text("<|endoftext|>one\n<|endoftext|>two\n")
    assert rebased_ppl.load_text(text_file=str(plain), pretrained="ignored")["test"]["text"] == ["one\n", "two\n"]
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "three"}\n\n{"text": "four"}\n')
    monkeypatch.setenv("REBASED_PPL_TEXT", str(lines))
    assert rebased_ppl.load_text()["test"]["text"] == ["three", "four"]
    plain.write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        rebased_ppl.load_text(text_file=str(plain))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "must be a text file in UTF-8.*No such file"),
        ("latin.txt", b"caf\xe9", "must be a text file in UTF-8.*0xe9"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2: no JSON"),
        ("other.jsonl", b'{"body": "a"}\n', 'line 1: no field "text", there is body'),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"text_file .*{name} of the task rebased_ppl.*{words}"):
        rebased_ppl.load_text(text_file=str(tmp_path / name))


def test_a_text_file_must_be_a_path():
    with pytest.raises(ValueError, match=r"text_file .* must be a path, got 5"):
        rebased_ppl.load_text(text_file=5)


def test_metrics_count_words_and_bytes():
    metrics = rebased_ppl.process_results({"text": " naïve  words\nhere \n"}, (-7.0,))
    assert metrics == {
        "word_perplexity": (-7.0, 3),
        "byte_perplexity": (-7.0, 21),
        "bits_per_byte": (-7.0, 21),
    }


def test_lm_eval_scores_every_byte_once(checkpoint, tmp_path):
    """Against a computation by hand, in windows of 64 tokens.

    The first follows <|endoftext|>, each next starts with the byte before it. The last, which is shorter, gets as many
    bytes before it as make it full.
    """
    text = "The quick brown fox — naïve, as ever — jumps over the lazy dog. " * 5
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    ids = [256, *text.encode("utf-8")]
    nats = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        end = min(start + WINDOW, len(ids) - 1)
        window = torch.tensor([ids[max(0, end - WINDOW) : end + 1]])
        with torch.no_grad():
            log_probabilities = model(window[:, :-1]).logits.float().log_softmax(-1)
        nats -= log_probabilities[0].gather(1, window[0, 1:, None])[start - end :].sum().item()

    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint), "trust_remote_code": True, "dtype": "float32"},
        tasks=["rebased_ppl"],
        # Without the harness's own tasks, which take many seconds to list.
        task_manager=TaskManager(
            include_path=tasks_path(), include_defaults=False, metadata={"text_file": str(tmp_path / "text.txt")}
        ),
        device="cpu",
        bootstrap_iters=0,
    )["results"]["rebased_ppl"]
    assert results["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / (len(ids) - 1), rel=1e-4)
    assert results["word_perplexity,none"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-2)
