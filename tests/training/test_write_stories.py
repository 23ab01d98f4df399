"""The stories: composing them, and the tokenizer that is learnt on them."""

import json
import random
import re

import pytest
from transformers import AutoTokenizer

from modeling_rebased.training import write_stories
from modeling_rebased.training.text import TokenBlocks, encode, encode_all


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
    assert starts.count("Once") > 100 and 30 < starts.count("One") < 250


def test_some_stories_begin_with_a_sentence_of_no_plot():
    shared, _ = write_stories.plots()
    strays = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(text)) for text in shared["stray"] + shared["stray_both"]]
    texts = [write_stories.story(number).text for number in range(300)]
    assert 30 < sum(bool(re.match("|".join(strays), text)) for text in texts) < 150


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


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--output-dir", __file__, "--output-dir: must be a folder"),
        ("--held-out", "-1", "--held-out: must be an integer of at least 0, got '-1'"),
        ("--repository-bytes", "-1", "--repository-bytes: must be an integer of at least 0, got '-1'"),
        ("--vocab-size", "257", "--vocab-size must be at least 258"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, option, value, message):
    with pytest.raises(SystemExit):
        write_stories.main(["--output-dir", str(tmp_path / "out"), option, value])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
