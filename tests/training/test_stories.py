"""The stories: requests, sampling from a teacher, cleaning, and the tokenizer that is learnt on them."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, StaticCache

from modeling_rebased.cache_rebased import CACHE_NAME
from modeling_rebased.eval import judge_stories
from modeling_rebased.training import prepare_stories, write_stories
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.sampling import EnoughEnded, chat, grouped, sample
from modeling_rebased.training.story_prompts import WORDS, story_prompt
from modeling_rebased.training.text import TokenBlocks, encode, encode_all


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random model with a chat format and two query heads for each key head."""
    folder = tmp_path_factory.mktemp("stories") / "teacher"
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- requests


def test_a_number_is_always_the_same_request():
    prompts = [story_prompt(number) for number in range(600)]
    assert prompts == [story_prompt(number) for number in range(600)]
    assert len({prompt.request for prompt in prompts}) > 570
    kinds = [prompt.kind for prompt in prompts]
    assert kinds.count("dialogue") > 20 and kinds.count("explanation") > 20 and kinds.count("story") > 400
    for prompt in prompts:
        assert "{" not in prompt.request + prompt.opening
        assert all(name in prompt.request + prompt.opening for name in prompt.names)


def test_every_template_can_be_filled():
    slots = write_stories.story_prompt.__globals__["_slots"](random.Random(0))
    for situation in WORDS["situations"]:
        slots |= {name: text.format(**slots) for name, text in situation.items()}
    for kind, templates in WORDS.items():
        if kind not in ("children", "grown_ups", "situations"):
            assert all("{" not in template.format(**slots) for template in templates)


# ---------------------------------------------------------------- sampling


def test_grouped_attention_is_the_attention_of_the_library(teacher):
    """Logits of a prompt with padding and of a step after it, with a static cache, against each row alone."""
    model = LlamaForCausalLM.from_pretrained(teacher, attn_implementation="eager").double()
    ids = torch.randint(258, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = [model(input_ids=ids[:1, 4:]).logits[0], model(input_ids=ids[1:]).logits[0]]
    with grouped(model):
        cache = {CACHE_NAME: StaticCache(config=model.config, max_cache_len=16)}
        first = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], **cache).logits
        last = model(input_ids=ids[:, 8:], attention_mask=mask, **cache).logits
        plain = model(input_ids=ids[1:]).logits[0]  # without a mask
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(torch.cat([first, last], 1)[mask.bool()], torch.cat(expected))
    torch.testing.assert_close(plain, expected[1])


def test_sampling_with_one_static_cache_is_sampling_without_it(teacher):
    model, tokenizer = LlamaForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    requests = ["Hi", "A longer request"]
    cache = StaticCache(config=model.config, max_cache_len=128)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = sample(model, chat(tokenizer, requests, ["x", ""]), tokenizer.eos_token_id, new_tokens=30)
        torch.manual_seed(seed)
        with grouped(model):
            inputs = chat(tokenizer, requests, ["x", ""])
            assert sample(model, inputs, tokenizer.eos_token_id, new_tokens=30, cache=cache) == expected
    assert [len(row) for row, _ in expected] == [30, 30]


def test_a_row_is_cut_at_its_end(teacher):
    model, tokenizer = LlamaForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    torch.manual_seed(0)
    (whole, _), *_ = sample(model, chat(tokenizer, ["Hi"]), tokenizer.eos_token_id, new_tokens=20)
    torch.manual_seed(0)
    assert sample(model, chat(tokenizer, ["Hi"]), whole[7], new_tokens=20) == [(whole[: whole.index(whole[7])], True)]


def test_a_batch_stops_when_enough_rows_have_ended():
    ids = torch.tensor([[9, 9, 1, 5, 9], [9, 9, 1, 2, 3], [9, 9, 4, 9, 9], [9, 9, 9, 9, 9]])
    for share, expected in ((0.75, True), (0.76, False)):
        assert EnoughEnded(2, 9, share)(ids, None).tolist() == [expected] * 4


def test_chat_has_the_beginning_of_the_answer(teacher):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    inputs = chat(tokenizer, ["Hi", "Hello"], ["Once", ""], "Be good.")
    texts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert texts == ["<system>Be good.<user>Hi<a>Once", "<system>Be good.<user>Hello<a>"]


def test_writing_goes_on_where_it_stopped(teacher, tmp_path):
    command = ["--teacher", str(teacher), "--length", "500", "--new-tokens", "4", "--batch-size", "3"]
    command += ["--output-dir", str(tmp_path)]
    write_stories.main([*command, "--count", "3"])
    before = (tmp_path / "shard-00000.jsonl").read_bytes()
    write_stories.main([*command, "--count", "6", "--cache", "dynamic"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-00000.jsonl", "shard-00001.jsonl"]
    assert (tmp_path / "shard-00000.jsonl").read_bytes() == before
    for shard in range(2):
        lines = [json.loads(line) for line in (tmp_path / f"shard-0000{shard}.jsonl").read_text().splitlines()]
        assert len(lines) == 3 and all(line["number"] // write_stories.SHARD == shard for line in lines)
        assert all(line["text"].startswith(story_prompt(line["number"]).opening) for line in lines)
    (tmp_path / "shard-00001.jsonl").unlink()
    write_stories.main([*command, "--count", "6", "--max-seconds", "0"])
    assert not (tmp_path / "shard-00001.jsonl").exists()


def test_a_length_that_is_too_short_is_refused(teacher):
    with pytest.raises(ValueError, match="--length is 20"):
        write_stories.requests_of(0, 4, AutoTokenizer.from_pretrained(teacher), 20)


# ---------------------------------------------------------------- cleaning


STORY = (
    "Tom found a kite in the park. He asked everyone whose it was, but nobody knew. In the end a small girl came. "
    'She said, "That is my kite!" Tom gave it back to her at once, and she let him fly it until the sun went down.'
)


def test_clean():
    assert (
        prepare_stories.clean("\u201cHi,\u201d  she said\u2026\r\nIt\u2019s late.\n\n\n")
        == '"Hi," she said...\n\nIt\'s late.'
    )


@pytest.mark.parametrize(
    ("text", "ended", "reason"),
    [
        (STORY, True, None),
        (STORY, False, "no ending"),
        (STORY + " And then", True, "no ending"),
        ("Tom was happy. Tom slept.", True, "length"),
        (STORY.replace("kite", "**kite**"), True, "not plain text"),
        (STORY.replace("kite", "c\u00f4te"), True, "not plain text"),
        (STORY + '\n\nTom: "Bye."', True, "not plain text"),
        (STORY.replace('kite!"', "kite!"), True, "not plain text"),
        ("As an AI, I tell this. " + STORY, True, "speaks as an assistant"),
        (STORY.replace("Tom gave", "He gave"), True, "without its persons"),
        (STORY + " " + STORY[:90] + ".", True, "repeats itself"),
    ],
)
def test_faults(text, ended, reason):
    assert prepare_stories.fault(text, ended, ("Tom",)) == reason


def test_repeated_counts_runs_of_words():
    words = "a b c d a b c d a b c d"
    fours = [tuple(words.split()[i : i + 4]) for i in range(9)]
    assert prepare_stories.repeated(words) == pytest.approx(1 - len(set(fours)) / 9)
    assert prepare_stories.repeated("One two.") == 0.0


def test_copies_are_shares_of_runs_seen_before():
    hashes = [np.array(each, dtype=np.uint64) for each in ([1, 2], [2, 3, 4, 5], [], [1, 3, 6, 7])]
    before, near_held_out = prepare_stories.copies(hashes, held_out=1)
    assert before.tolist() == [0, 0.25, 0, 0.5]
    assert near_held_out.tolist() == [0, 0.25, 0, 0.25]


def persons(number):
    return [*story_prompt(number).names, "Otto", "Stella"][:2]


def renamed(text, number, other):
    new = dict(zip(persons(number), persons(other)))
    return re.sub(r"\w+", lambda word: new.get(word[0], word[0]), text)


def story_of(number, draw):
    """A text that mentions the persons of a request, of words drawn at random."""
    names = persons(number)
    words = [draw.choice(WORDS["animals"] + WORDS["adjectives"]) for _ in range(60)]
    return f"{' and '.join(names)} met. {' '.join(words)}. {' and '.join(names)} slept."


def test_the_whole_of_preparing(tmp_path):
    draw = random.Random(0)
    texts = {number: story_of(number, draw) for number in range(150, 450)}
    held_out = [200, 400]
    # A near copy of a held-out text, and a copy of another one, both with other names.
    texts[250] = renamed(texts[200], 200, 250).replace("slept", "went to sleep")
    texts[301] = renamed(texts[300], 300, 301)
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [json.dumps({"number": number, "text": text, "ended": number != 310}) for number, text in texts.items()]
    (raw / "shard-00000.jsonl").write_text("\n".join(lines[:100]) + "\n")
    (raw / "shard-00001.jsonl").write_text("\n".join(lines[100:]) + "\n")
    prepare_stories.main([str(raw), "--output-dir", str(tmp_path), "--vocab-size", "300"])

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["texts written"] == 300 and figures["dropped"] == {"no ending": 1, "near copy": 2}
    train = (tmp_path / "train.txt").read_text().split("<|endoftext|>")[1:]
    assert len(train) == figures["texts for training"] == 300 - 3 - len(held_out)
    lines = (tmp_path / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [texts[number] for number in held_out]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (
        len(tokenizer) == 300 and tokenizer.padding_side == "left" and tokenizer.pad_token_id != tokenizer.eos_token_id
    )
    ids = tokenizer(texts[320])["input_ids"]
    assert ids[0] == tokenizer.eos_token_id and ids == encode(texts[320], tokenizer)
    assert tokenizer.decode(ids[1:]) == texts[320]
    assert encode_all([texts[320], "Hi"], tokenizer) == [ids, encode("Hi", tokenizer)]
    blocks = TokenBlocks([str(tmp_path / "train.txt")], tokenizer, 16)
    assert blocks.tokens.tolist() == [token for text in train for token in encode(text, tokenizer)]


# ---------------------------------------------------------------- the judge


def test_the_judge(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_stories, "BEGINNINGS", judge_stories.BEGINNINGS[:3])
    (tmp_path / "train.txt").write_text("<|endoftext|>Tom was a small mouse who wanted to see the sea.")
    command = ["--teacher", str(teacher), "--model", f"student={teacher}", "--samples", "2", "--new-tokens", "9"]
    judge_stories.main([*command, "--train-file", str(tmp_path / "train.txt"), "--output", str(tmp_path)])
    head, *rows = (tmp_path / "stories.csv").read_text().splitlines()
    assert head == "model,stories,ended,persons,repeated,perplexity,words,copied"
    assert [row.split(",")[:3] for row in rows] == [["teacher", "6", "0.0"], ["student", "6", "0.0"]]
    assert all(float(row.split(",")[-1]) > 0 for row in rows)  # the beginning about Tom
    texts = json.loads((tmp_path / "stories.json").read_text())
    assert list(texts) == ["teacher", "student"] and [len(row) for row in texts["student"]] == [2, 2, 2]
    assert (tmp_path / "stories.md").read_text().count("### student, sample 2") == 3


def test_the_judges_perplexity(teacher, monkeypatch):
    """Against each continuation by itself in float64."""
    monkeypatch.setattr(judge_stories, "BEGINNINGS", judge_stories.BEGINNINGS[:1])
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(teacher).double().eval(),
        AutoTokenizer.from_pretrained(teacher),
    )
    texts = [" She was happy.", " It flew away and away."]
    (hero, beginning), total, count = judge_stories.BEGINNINGS[0], 0.0, 0
    for text in texts:
        before = chat(tokenizer, [judge_stories.REQUEST.format(hero)], [beginning], judge_stories.SYSTEM)["input_ids"]
        after = torch.tensor([list(text.encode())])
        logits = model(torch.cat([before, after], 1)).logits[0, before.shape[1] - 1 : -1]
        total += F.cross_entropy(logits, after[0], reduction="sum").item()
        count += after.shape[1]
    assert judge_stories.judged(model, tokenizer, [texts]) == pytest.approx(math.exp(total / count), rel=1e-5)
