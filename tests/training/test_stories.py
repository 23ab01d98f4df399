"""The stories: composing them, the tokenizer that is learnt on them, sampling, and the judge."""

import json
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_rebased.eval import judge_stories
from modeling_rebased.training import write_stories
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.sampling import chat, sample
from modeling_rebased.training.text import TokenBlocks, encode, encode_all


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


# ---------------------------------------------------------------- composing


def test_a_number_is_always_the_same_story():
    stories = [write_stories.story(number) for number in range(2000)]
    assert stories[:50] == [write_stories.story(number) for number in range(50)]
    assert len({each.text for each in stories}) == 2000
    assert {each.plot for each in stories} == set(write_stories.plots()[1])


def test_stories_are_plain_sentences_about_their_persons():
    for number in range(2000):
        each = write_stories.story(number)
        assert each.text.isascii() and not re.search(r"[{}<>|@=?]{2}|[{}<>|@=]|  | ,| \.(?!\.)|\n\n\n", each.text), (
            number
        )
        assert each.hero in each.text and each.friend in each.text
        assert each.text.count('"') % 2 == 0, each.text
        assert re.search(r"[.!?]\"?$", each.text)


def test_every_wording_can_be_filled():
    """Whatever is drawn: each wording of each step, also those that 2,000 stories may miss."""
    shared, known = write_stories.plots()
    slots = write_stories._slots(random.Random(0))
    wordings = [text for choices in shared.values() for text in choices]
    wordings += [text for steps in known.values() for step in steps for text in step.choices]
    for text in wordings:
        assert set(re.findall(r"<(\w+)>", text)) <= shared.keys()
        assert "{" not in re.sub(r"<\w+>", "", text).format(**slots)
        assert text.count('"') % 2 == 0, text


def test_a_plot_is_read_as_written():
    steps = write_stories.plots()[1]["the lost thing"]
    assert steps[0] == write_stories.Step(["<intro>"], False, True)
    assert steps[1] == write_stories.Step(["<trait>"], True, False)
    assert [step.begins_paragraph for step in steps].count(True) == 3


def test_some_stories_have_no_introduction():
    starts = [write_stories.story(number).text.split()[0] for number in range(1000)]
    introductions = [text.split()[0] for text in write_stories.plots()[0]["intro"]]
    assert "Once" in introductions and "One" not in introductions
    assert starts.count("Once") > 150 and 30 < starts.count("One") < 250


def test_persons_of_held_out_stories_never_meet_in_training(tmp_path):
    write_stories.main(["--output-dir", str(tmp_path), "--count", "1500", "--vocab-size", "400", "--held-out", "50"])
    stories = [write_stories.story(number) for number in range(1500)]
    pairs = {
        held_out: {frozenset((each.hero, each.friend)) for each in stories if each.is_held_out == held_out}
        for held_out in (True, False)
    }
    assert not pairs[True] & pairs[False] and 30 < sum(each.is_held_out for each in stories) < 150
    train = (tmp_path / "train.txt").read_text().split("<|endoftext|>")[1:]
    assert train == [each.text + "\n" for each in stories if not each.is_held_out]
    held_out = [each.text for each in stories if each.is_held_out][:50]
    lines = (tmp_path / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == held_out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["stories for training"] == len(train) and figures["stories held out"] == len(held_out)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 400 and tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer(held_out[0])["input_ids"]
    assert ids[0] == tokenizer.eos_token_id and ids == encode(held_out[0], tokenizer)
    assert tokenizer.decode(ids[1:]) == held_out[0]
    assert encode_all([held_out[0], "Hi"], tokenizer) == [ids, encode("Hi", tokenizer)]
    blocks = TokenBlocks([str(tmp_path / "heldout.txt")], tokenizer, 16)
    assert blocks.tokens.tolist() == [token for text in held_out for token in encode(text + "\n", tokenizer)]


# ---------------------------------------------------------------- sampling


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


# ---------------------------------------------------------------- the judge


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
