"""The judge of short stories, and the sampling that it uses, on a tiny random model."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_rebased.eval import judge_stories
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.sampling import chat, sample


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A random model with a chat format."""
    folder = tmp_path_factory.mktemp("stories") / "judge"
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_row_is_cut_at_its_end(judge):
    model, tokenizer = LlamaForCausalLM.from_pretrained(judge).eval(), AutoTokenizer.from_pretrained(judge)
    torch.manual_seed(0)
    ((whole, ended),) = sample(model, chat(tokenizer, ["Hi"]), tokenizer.eos_token_id, new_tokens=20)
    assert len(whole) == 20 and not ended
    torch.manual_seed(0)
    assert sample(model, chat(tokenizer, ["Hi"]), whole[7], new_tokens=20) == [(whole[: whole.index(whole[7])], True)]


def test_chat_has_the_beginning_of_the_answer(judge):
    tokenizer = AutoTokenizer.from_pretrained(judge)
    inputs = chat(tokenizer, ["Hi", "Hello"], ["Once", ""])
    assert inputs["attention_mask"].sum(1).tolist() == [15, 14]
    texts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert texts == ["<user>Hi<a>Once", "<user>Hello<a>"]


def test_a_folder_without_a_model_is_named(judge, tmp_path, capsys):
    for command in (["--judge", "nowhere"], ["--judge", str(judge), "--model", "a=nowhere"]):
        with pytest.raises(SystemExit):
            judge_stories.main([*command, "--output", str(tmp_path / "out")])
        assert "nowhere holds no model" in capsys.readouterr().err


def test_wrong_names_texts_and_numbers_are_named(judge, tmp_path, capsys):
    given = ["--judge", str(judge), "--output", str(tmp_path / "out")]
    for more, message in (
        (["--model", f"judge={judge}"], "--model: two are called 'judge'"),
        (["--model", str(judge)], "--model must be NAME=FOLDER"),
        (["--train-file", "no.txt"], "--train-file: [Errno 2]"),
        (["--samples", "0"], "--samples: must be an integer of at least 1, got '0'"),
        (["--output", __file__], "--output: must be a folder"),
    ):
        with pytest.raises(SystemExit):
            judge_stories.main([*given, *more])
        assert message in capsys.readouterr().err


def test_repeated_counts_runs_of_four_words():
    words = "a b c d a b c d a b c d"
    fours = [tuple(words.split()[i : i + 4]) for i in range(9)]
    assert judge_stories.repeated(words) == pytest.approx(1 - len(set(fours)) / 9)
    assert judge_stories.repeated("One two.") == 0.0


def test_the_judge(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_stories, "BEGINNINGS", judge_stories.BEGINNINGS[:3])
    (tmp_path / "train.txt").write_text("<|endoftext|>Tom was a small mouse who wanted to see the sea.")
    command = ["--judge", str(judge), "--model", f"student={judge}", "--samples", "2", "--new-tokens", "9"]
    judge_stories.main([*command, "--train-file", str(tmp_path / "train.txt"), "--output", str(tmp_path)])
    head, *rows = (tmp_path / "stories.csv").read_text().splitlines()
    assert head == "model,stories,ended,persons,repeated,perplexity,words,copied"
    assert [row.split(",")[:3] for row in rows] == [["judge", "6", "0.0"], ["student", "6", "0.0"]]
    assert all(float(row.split(",")[-1]) > 0 for row in rows)  # the beginning about Tom
    for name in ("judge", "student"):
        text = (tmp_path / f"{name}.md").read_text()
        assert text.count("### Sample 2") == 3 and text.count(f"**{judge_stories.BEGINNINGS[1][1]}**") == 2


def test_the_judges_perplexity(judge, monkeypatch):
    """Against each continuation by itself in float64."""
    monkeypatch.setattr(judge_stories, "BEGINNINGS", judge_stories.BEGINNINGS[:1])
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(judge).double().eval(),
        AutoTokenizer.from_pretrained(judge),
    )
    texts = [" She was happy.", " It flew away and away."]
    (hero, beginning), total, count = judge_stories.BEGINNINGS[0], 0.0, 0
    for text in texts:
        before = chat(tokenizer, [judge_stories.REQUEST.format(hero)], [beginning])["input_ids"]
        after = torch.tensor([list(text.encode())])
        logits = model(torch.cat([before, after], 1)).logits[0, before.shape[1] - 1 : -1]
        total += F.cross_entropy(logits, after[0], reduction="sum").item()
        count += after.shape[1]
    assert judge_stories.judged(model, tokenizer, [texts]) == pytest.approx(math.exp(total / count), rel=1e-5)
