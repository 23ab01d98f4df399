"""Perplexity by slice: which tokens count as recall, and that chunks, caches and batches change no number."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_rebased.eval import recall_slices
from modeling_rebased.eval.recall_slices import Slices, count_bigrams, evaluate, last_occurrence, score_windows


def brute_force(tokens: list[int], order: int = 2) -> list[int]:
    distances = [0] * len(tokens)
    for t in range(order - 1, len(tokens)):
        for d in range(1, t - order + 2):
            if tokens[t - d - order + 1 : t - d + 1] == tokens[t - order + 1 : t + 1]:
                distances[t] = d
                break
    return distances


@pytest.mark.parametrize("size", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("order", [2, 3, 6])
def test_recall_tokens_against_brute_force(size, order):
    rng = np.random.default_rng(size)
    for vocab in (1, 2, 7, 50):
        tokens = rng.integers(vocab, size=size)
        assert last_occurrence(tokens, order).tolist() == brute_force(tokens.tolist(), order)
    with pytest.raises(ValueError, match="order"):
        last_occurrence(tokens, 1)


def test_a_sentence_by_hand():
    words = ["the", "cat", "sat", ".", "the", "dog", "saw", "the", "cat", "sat"]
    ids = [sorted(set(words)).index(w) for w in words]
    distances = last_occurrence(np.array(ids))
    # "the cat" and "cat sat" come again at the end, seven words later; nothing else does
    assert distances.tolist() == [0] * 8 + [7, 7]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    config.initializer_range = 0.5
    return LlamaForCausalLM(config).eval()


def rebased():
    modeling_rebased = pytest.importorskip("modeling_rebased")
    torch.manual_seed(0)
    config = modeling_rebased.ReBasedConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5
    )
    return modeling_rebased.ReBasedForCausalLM(config).eval()


@pytest.mark.parametrize("build", [llama, rebased])
@pytest.mark.parametrize("mode", ["auto", "cache", "hidden"])
@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_chunks_and_modes_give_the_whole_windows_losses(build, mode, chunk):
    model = build()
    windows = torch.randint(30, (3, 41), generator=torch.Generator().manual_seed(1))
    losses, correct = score_windows(model, windows, chunk=chunk, mode=mode)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    np.testing.assert_allclose(losses.ravel(), expected.numpy(), rtol=2e-4, atol=2e-4)
    assert correct.tolist() == (logits.argmax(-1) == windows[:, 1:]).tolist()


def test_logits_never_exceed_a_chunk(monkeypatch):
    model, sizes = llama(), []
    score = recall_slices._score
    monkeypatch.setattr(recall_slices, "_score", lambda logits, t: sizes.append(logits.shape[0]) or score(logits, t))
    for mode in ("cache", "hidden"):
        score_windows(model, torch.randint(30, (2, 100)), chunk=16, mode=mode)
    assert max(sizes) == 32 and sum(sizes) == 2 * 2 * 99
    whole = []
    model.lm_head.register_forward_hook(lambda m, i, o: whole.append(o.shape[1]))
    score_windows(model, torch.randint(30, (2, 100)), chunk=16)
    assert max(whole) == 16


class NoCache(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        kwargs["use_cache"] = False
        kwargs.pop("past_key_values", None)
        return super().forward(*args, **kwargs)


def test_a_model_without_a_cache():
    model = NoCache(llama().config).eval()
    windows = torch.randint(30, (1, 50))
    expected = score_windows(model, windows, mode="hidden")
    actual = score_windows(model, windows, chunk=20)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    with pytest.raises(ValueError, match="NoCache returns no cache"):
        score_windows(model, windows, chunk=20, mode="cache")


def test_slices_add_up_and_batches_change_nothing():
    model = llama()
    rng = np.random.default_rng(0)
    documents = [rng.integers(30, size=n).tolist() for n in (150, 40, 90, 1)]
    one = evaluate(model, documents, context=40, chunk=16)
    many = evaluate(model, documents, context=40, chunk=64, batch_size=4)
    assert one.tokens == many.tokens
    assert one.loss == pytest.approx(many.loss)
    windows = [d[i : i + 40] for d in documents for i in range(0, len(d), 40)]
    assert sum(one.tokens.values()) == sum(len(w) - 1 for w in windows if len(w) > 1)
    assert one.tokens["recall"] == sum(sum(d > 0 for d in brute_force(w)) for w in windows if len(w) > 1)
    assert sum(count for count, _ in one.by_distance.values()) == one.tokens["recall"]
    everything = np.concatenate([score_windows(model, torch.tensor([w]))[0].ravel() for w in windows if len(w) > 1])
    assert one.table()[-1]["loss"] == pytest.approx(everything.mean(), rel=1e-5)


def test_known_bigrams_are_a_slice_of_their_own():
    tokens = [1, 2, 3, 1, 2, 4, 1, 2, 5, 6, 5, 6]
    known = count_bigrams(np.array([5, 6] * 10), vocab_size=30)
    slices = evaluate(llama(), [tokens], known=known, known_from=10)
    assert slices.tokens == {"recall": 2, "known": 1, "other": 8}  # "1 2" twice more; "5 6" once more


def test_table_by_hand():
    slices = Slices()
    slices.add(np.log([2.0, 4, 8, 8]), np.array([1, 1, 0, 0], bool), np.array([3, 5, 0, 0]), np.zeros(4, bool))
    recall, other, everything = slices.table()
    assert recall["perplexity"] == pytest.approx(8**0.5) and recall["accuracy"] == 1
    assert other["perplexity"] == pytest.approx(8) and other["share"] == 0.5
    assert everything["perplexity"] == pytest.approx(512**0.25)
    assert slices.by_distance == {1: [1, pytest.approx(np.log(2))], 2: [1, pytest.approx(np.log(4))]}


def test_command_line_writes_table_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .?")}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    llama().save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. the cat sat on the hat. " * 5)
    inputs = ["--models", f"tiny={tmp_path / 'model'}", "--text", str(tmp_path / "text.txt"), "--context", "100"]
    recall_slices.main([*inputs, "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert "| tiny | recall |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "slices.json").read_text())
    assert report["tiny"]["slices"][0]["slice"] == "recall"
    assert (tmp_path / "out" / "slices.png").stat().st_size > 5_000
    assert (tmp_path / "out" / "slices.md").read_text().startswith("| model | slice |")


def test_wrong_arguments_are_named_before_a_model_is_loaded(tmp_path, capsys):
    for name, content in (("good.txt", b"some text"), ("empty.txt", b"\n"), ("latin.txt", b"caf\xe9")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    good = ["--models", "no/such/model", "--text", str(tmp_path / "good.txt")]
    for argv, words in (
        ([*good, "--order", "1"], "--order must be at least 2, got 1"),
        ([*good, "--context", "1"], "--context must be at least 2, got 1"),
        ([*good, "--chunk", "0"], "--chunk must be at least 1, got 0"),
        ([*good, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ([*good, "--dtype", "flo"], "--dtype is flo; it must be auto or a dtype of torch"),
        (["--models", "./nowhere", *good[2:]], "--models: ./nowhere cannot be loaded"),
        ([*good, "--max-tokens", "1"], "--max-tokens must be at least 2, got 1"),
        ([*good, "--output", str(tmp_path / "good.txt" / "x")], "good.txt"),
        (["--models", "a/x", "b/x", "--text", good[-1]], "two are called x"),
        ([*good[:3], str(tmp_path / "missing.txt")], "missing.txt"),
        ([*good[:3], str(tmp_path / "empty.txt")], "--text: no text in"),
        ([*good[:3], str(tmp_path / "missing.txt")], "--text: [Errno 2] No such file or directory:"),
        ([*good[:3], str(tmp_path / "latin.txt")], "latin.txt must be text in UTF-8, at byte 3 it is not"),
        ([*good[:3], str(tmp_path / "broken.jsonl")], "broken.jsonl, line 1: no JSON"),
    ):
        with pytest.raises(SystemExit):
            recall_slices.main(argv)
        assert words in capsys.readouterr().err
