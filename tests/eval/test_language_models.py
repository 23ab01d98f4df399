"""Language models on the domains of a corpus: every figure against a plain computation."""

import argparse
import csv
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.eval import language_models, plot_language_models
from modeling_rebased.eval.language_models import by_bins, count_in_shards, windows_of
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.shards import write_index, write_shard


ROOT = Path(__file__).parents[2]
TEXTS = {
    "books": ["the cat sat on the mat and the cat saw the dog", "a dog"],
    "manuals": ["to be or not to be, that is the question of the man"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, held-out texts, training shards, and what the command found."""
    path = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = ReBasedConfig(
        vocab_size=264, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5
    )
    ReBasedForCausalLM(config).save_pretrained(path / "run" / "final")
    tokenizer.save_pretrained(path / "run" / "final")
    history = [{"step": 5, "loss": 3.0, "learning_rate": 0.1}, {"step": 9, "eval_loss": 2.0}]
    (path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (path / "held").mkdir()
    for domain, texts in TEXTS.items():
        lines = "\n".join(json.dumps({"title": "x", "text": text}) for text in texts)
        (path / "held" / f"{domain}.jsonl").write_text(lines)
    write_shard(path / "train", 0, np.array(tokenizer("the cat and the dog " * 100)["input_ids"]), len(tokenizer))
    write_index(path / "train", tokenizer, {})
    command = ["--models", f"rebased={path / 'run' / 'final'}", "--heldout", str(path / "held"), "--device", "cpu"]
    command += [
        "--context",
        "16",
        "--lengths",
        "8",
        "12",
        "32",
        "--tokens-at-once",
        "40",
        "--output",
        str(path / "out"),
    ]
    language_models.main([*command, "--shards", str(path / "train")])
    return path


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "out" / "rebased.json").read_text())


def plain(folder, context: int) -> dict[str, list[tuple[int, int, float]]]:
    """By domain: the token before, the token and the loss, one token after another."""
    model = ReBasedForCausalLM.from_pretrained(folder / "run" / "final").double()
    tokenizer = byte_tokenizer()
    result: dict[str, list[tuple[int, int, float]]] = {}
    for domain, texts in TEXTS.items():
        for text in texts:
            ids = [tokenizer.eos_token_id, *text.encode()]
            for first in range(0, len(ids) - 1, context - 1):
                window = torch.tensor([ids[first : first + context]])
                losses = -model(window).logits[0, :-1].log_softmax(-1).gather(1, window[0, 1:, None])[:, 0]
                rows = zip(window[0, :-1].tolist(), window[0, 1:].tolist(), losses.tolist())
                result.setdefault(domain, []).extend(rows)
    return result


def test_loss_perplexity_and_bits_per_byte_of_each_domain(folder, found):
    for domain, rows in plain(folder, 16).items():
        size = sum(len(text.encode()) for text in TEXTS[domain])
        total = sum(loss for _, _, loss in rows)
        row = found["domains"][domain]
        assert row["tokens"] == len(rows) == size and row["bytes"] == size and row["documents"] == len(TEXTS[domain])
        assert row["perplexity"] == pytest.approx(math.exp(total / size), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)


def test_slices_and_frequencies_add_up(folder, found):
    rows = [row for rows in plain(folder, 16).values() for row in rows]
    tokens = "the cat and the dog " * 100
    often = [tokens.count(chr(a) + chr(b)) if a < 256 else 0 for a, b, _ in rows]
    bins = found["by_frequency"]["recall"] + found["by_frequency"]["other"]
    for least, end in ((0, 1), (1, 10), (100, 1000)):
        expected = [row[2] for row, count in zip(rows, often) if least <= count < end]
        mine = [bin_ for bin_ in bins if bin_[0] == least]
        assert sum(bin_[1] for bin_ in mine) == len(expected)
        assert sum(bin_[2] for bin_ in mine) == pytest.approx(sum(expected), rel=1e-4)
    table = {row["slice"]: row for row in found["slices"]["all"]}
    assert table["all"]["loss"] == pytest.approx(np.mean([row[2] for row in rows]), rel=1e-4)
    assert sum(count for _, count, _ in found["by_distance"]) == table["recall"]["tokens"]


def test_positions_are_of_the_same_long_documents(folder, found):
    positions = found["positions"]
    assert positions["documents"] == 2 and list(positions["lengths"]) == ["8", "12", "32"]
    model = ReBasedForCausalLM.from_pretrained(folder / "run" / "final").double()
    for length in (8, 12, 32):
        losses = []
        for text in (TEXTS["books"][0], TEXTS["manuals"][0]):
            ids = torch.tensor([byte_tokenizer().eos_token_id, *text.encode()])[: 32 // length * length].view(
                -1, length
            )
            losses.append(
                torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            )
        assert positions["lengths"][str(length)]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        assert positions["lengths"][str(length)]["bins"][0][1] == 2 * (32 // length) * (length - 1)


def test_windows_score_every_token_once():
    for size in (2, 3, 15, 16, 17, 31, 32):
        windows = list(windows_of(list(range(size)), 16))
        assert [token for window in windows for token in window[1:]] == list(range(1, size))
        assert max(map(len, windows)) <= 16
    assert list(windows_of([1], 16)) == []


def test_bigrams_and_bins_by_hand():
    shards = [np.array([1, 2, 1, 2, 3], np.uint16), np.array([2, 3], np.uint16)]
    assert count_in_shards(shards, np.array([1 * 10 + 2, 2 * 10 + 1, 2 * 10 + 3, 9 * 10 + 9]), 10).tolist() == [
        2,
        1,
        2,
        0,
    ]
    losses = np.array([1.0, 2.0, 4.0])
    assert by_bins(np.array([0, 5, 9]), losses, (0, 1, 10)) == [[0, 1, 1.0], [1, 2, 6.0]]


def test_tables_and_pictures_of_all_models(folder, found, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("rebased, seed 1", "rebased"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**found, "model": name}))
    without = {"positions": {}, "slices": {name: rows[1:] for name, rows in found["slices"].items()}}
    (tmp_path / "mamba2.json").write_text(json.dumps({**found, "model": "mamba2", **without}))
    (tmp_path / "other.json").write_text("{}")
    plot_language_models.main([str(tmp_path)])
    models = plot_language_models.read_models(tmp_path)
    assert [found["model"] for found in models] == ["rebased", "rebased, seed 1", "mamba2"]
    assert {name: len(seeds) for name, seeds in plot_language_models.seeds_of(models).items()} == {
        "rebased": 2,
        "mamba2": 1,
    }
    assert plot_language_models.without_seed("rebased, lr 3e-3, seed 2") == "rebased, lr 3e-3"
    rows = list(csv.DictReader((tmp_path / "domains.csv").open()))
    assert len(rows) == 6
    assert float(rows[0]["bits_per_byte"]) == pytest.approx(found["domains"]["books"]["bits_per_byte"], rel=1e-5)
    assert found["curve"] == [{"step": 5, "loss": 3.0, "learning_rate": 0.1}]
    assert (tmp_path / "language_models.png").stat().st_size > 10_000 and (tmp_path / "curves.png").exists()
    for name in ("slices", "distance", "frequency", "positions"):
        assert (tmp_path / f"{name}.csv").exists()
    assert not (tmp_path / "speed.csv").exists()


def test_generation_is_timed_in_bfloat16_without_autocast(folder, tmp_path, monkeypatch):
    """Autocast would keep keys of softmax layers in float32, and the training step's weights would take memory."""
    timed = []

    def time_generate(model, ids, steps, cache):
        assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
        timed.append((model.dtype, model.training, tuple(ids.shape), cache, trained[0]()))
        return {"ms_per_token": 3.0, "first_4_ms": 4.0, "tokens_per_s": 1e3 / 3, "peak_gib": 0.5}

    def measure_training(model, context):
        trained.append(weakref.ref(model))
        return {"training_gib": 1.0}

    trained = []
    monkeypatch.setattr(language_models, "time_generate", time_generate)
    monkeypatch.setattr(language_models, "measure_training", measure_training)
    options = {"device": "cpu", "context": 16, "lengths": [8], "tokens_at_once": 40, "speed": True, "output": tmp_path}
    domains = language_models.Domains(folder / "held", byte_tokenizer())
    language_models.measure("x", str(folder / "run" / "final"), domains, [], argparse.Namespace(**options))
    assert timed == [(torch.bfloat16, False, (1, 8), "dynamic", None)]
    speed = json.loads((tmp_path / "x.json").read_text())["speed"]
    assert speed == {
        "training_gib": 1.0,
        "generation_prompt": 8,
        "generation_ms_per_token": 3.0,
        "generation_gib": 0.5,
    }


def test_bad_input_is_named(folder, tmp_path, capsys):
    model = str(folder / "run" / "final")
    command = ["--models", "x=y", "--heldout", str(folder / "held"), "--output", str(folder / "o"), "--device", "cpu"]
    write_index(tmp_path / "other", AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "stories-12m"), {})
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "books.jsonl").write_text('{"text": " "}\n')
    for more, message in (
        (["--context", "1"], "--context must be at least 2, got 1"),
        (["--lengths", "8", "0"], "--lengths must be at least 2, got 0"),
        (["--max-tokens", "0"], "--max-tokens: must be an integer of at least 1, got '0'"),
        (["--tokens-at-once", "-1"], "--tokens-at-once: must be an integer of at least 1, got '-1'"),
        (["--speed"], "needs a GPU, and --device is cpu"),
        (["--models", "x=./nowhere"], "--models: ./nowhere cannot be loaded"),
        (["--models", "a/final", "b/final"], "--models: a/final and b/final are both named 'final'"),
        (["--models", "a/b=c"], "--models: 'a/b=c' must be NAME=DIR"),
        (["--models", model, "--shards", str(folder)], "--shards: " + str(folder) + " is no folder of shards"),
        (["--models", model, "--shards", str(tmp_path / "other")], "holds ids of another tokenizer"),
        (["--models", model, "--heldout", str(tmp_path / "no")], "--heldout: there is no folder"),
        (["--models", model, "--heldout", str(tmp_path / "blank")], "books.jsonl holds no document of two tokens"),
    ):
        with pytest.raises(SystemExit):
            language_models.main([*command, *more])
        assert message in capsys.readouterr().err
    assert not (folder / "o").exists()
