"""Compose short stories that hold together, as training text for a small model.

    python -m modeling_rebased.training.write_stories --output-dir data/stories --count 800000

writes
    data/stories/train.txt        the stories, each preceded by <|endoftext|>
    data/stories/heldout.txt      the same for the stories that are held out
    data/stories/heldout.jsonl    the first of those, one JSON object per line: title, text
    data/stories/tokenizer/       byte-level BPE of 2,048 pieces, learnt on the training text
    data/stories/figures.json     how many stories there are

A story follows one of the plots in story_plots.txt: a hero wants, loses or does something, a friend matters, and there
is an ending. Each step of a plot has several wordings, and names, places and things are drawn from story_words.yaml.
So the persons and things of a story stay the same to its end, and what happens has a cause. Two persons who meet in a
held-out story never meet in the training text.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .arguments import HelpFormatter, with_dashes
from .byte_tokenizer import PAD
from .folders import write_text, written
from .text import END_OF_TEXT
from .values import count, natural, new_folder


HELD_OUT = 20  # of so many pairs of persons, one pair is held out
CHUNK = 5_000


@dataclass(frozen=True)
class Story:
    """Hold one story.

    Attributes:
        plot: the name of its plot.
        hero, friend: the names of its persons.
        text: the story, with an empty line between paragraphs.
    """

    plot: str
    hero: str
    friend: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Tell whether this pair of persons is kept out of the training text."""
        return zlib.crc32(" ".join(sorted((self.hero, self.friend))).encode()) % HELD_OUT == 0


@dataclass(frozen=True)
class Step:
    """Hold one step of a plot.

    Attributes:
        choices: its wordings.
        optional: whether it may be left out.
        begins_paragraph: whether a paragraph begins with it. No such step is optional.
    """

    choices: list[str]
    optional: bool
    begins_paragraph: bool


@functools.cache
def words() -> dict[str, list[str]]:
    """Return the lists of words."""
    return yaml.safe_load((Path(__file__).resolve().parent / "story_words.yaml").read_text(encoding="utf-8"))


@functools.cache
def plots() -> tuple[dict[str, list[str]], dict[str, list[Step]]]:
    """Return the lists that plots share, and the steps of each plot, by name."""
    shared: dict[str, list[str]] = {}
    found: dict[str, list[Step]] = {}
    text = (Path(__file__).resolve().parent / "story_plots.txt").read_text(encoding="utf-8")
    for block in re.split(r"^(?=@|== )", text, flags=re.MULTILINE)[1:]:
        head, _, body = block.partition("\n")
        if head.startswith("@"):
            shared[head[1:]] = body.strip().split(" | ")
            continue
        steps = found.setdefault(head.removeprefix("== "), [])
        for paragraph in body.strip().split("\n\n"):
            for i, line in enumerate(paragraph.split("\n")):
                steps.append(Step(line.removeprefix("? ").split(" | "), line.startswith("? "), i == 0))
    return shared, found


def story(number: int) -> Story:
    """Compose the story with this number.

    Some stories go without the introduction of their hero, if the second step names the hero too. Others begin with a
    sentence that has nothing to do with the plot, so that a model learns to go on after any beginning.

    Args:
        number: any integer. The same number always gives the same story.
    """
    draw = random.Random(number)
    shared, known = plots()
    slots = _slots(draw)

    def expanded(choices: list[str]) -> str:
        return re.sub(r"<(\w+)>", lambda name: expanded(shared[name[1]]), draw.choice(choices))

    plot = draw.choice(list(known))
    steps = [(step, expanded(step.choices)) for step in known[plot] if not step.optional or draw.random() < 0.5]
    beginning = draw.random()
    if "{A}" in steps[1][1] and beginning < 0.2:
        steps = steps[1:]
    elif known[plot][0].choices in (["<intro>"], ["<intro_both>"]) and beginning > 0.7:
        steps[0] = (steps[0][0], expanded(["<stray_both>" if "<intro_both>" in known[plot][0].choices else "<stray>"]))
    text = ""
    for step, wording in steps:
        text += ("\n\n" if step.begins_paragraph and text else " " if text else "") + wording.format(**slots)
    return Story(plot, slots["A"], slots["B"], text)


def _slots(draw: random.Random) -> dict[str, str]:
    """Draw what fills the slots of a plot."""
    girl, friend_is_girl = draw.random() < 0.5, draw.random() < 0.5
    hero = draw.choice(words()["girls" if girl else "boys"])
    friend = draw.choice([name for name in words()["girls" if friend_is_girl else "boys"] if name != hero])
    slots = {"A": hero, "B": friend, "home": draw.choice(words()["homes"])}
    slots |= {"who": _person(draw, girl), "friend": _person(draw, friend_is_girl)}
    for prefix, is_girl in (("", girl), ("b", friend_is_girl)):
        he, him, his = ("she", "her", "her") if is_girl else ("he", "him", "his")
        slots |= {f"{prefix}he": he, f"{prefix}him": him, f"{prefix}his": his, f"{prefix}himself": f"{him}self"}
    things, places = draw.sample(words()["things"], 2), draw.sample(words()["places"], 2)
    slots["thing"] = " ".join([*([draw.choice(words()["colors"])] if draw.random() < 0.6 else []), things[0]])
    slots |= {"thing2": things[1], "animal": draw.choice(words()["animals"])}
    slots |= {"a_thing": _with_article(slots["thing"]), "an_animal": _with_article(slots["animal"])}
    for name, place in zip(("place", "place2"), places):
        slots |= {f"in_{name}": place, name: place.split(" ", 1)[1]}
    slots["weather_time"] = f"{draw.choice(words()['weather'])} {draw.choice(words()['hours'])}"
    choices = {"skill": "skills", "feeling": "feelings", "time": "times", "food": "food", "fruit": "fruit"}
    slots |= {name: draw.choice(words()[kind]) for name, kind in choices.items()}
    return slots | {name[0].upper() + name[1:]: value[0].upper() + value[1:] for name, value in slots.items()}


def _person(draw: random.Random, girl: bool) -> str:
    kind = draw.choices(("children", "grown_ups", "creatures", "animals"), (4, 2, 1, 5))[0]
    names = ("girl", "woman", "princess") if girl else ("boy", "man", "prince")
    person = draw.choice(words()[kind]).format(**dict(zip(("child", "adult", "royal"), names)))
    return _with_article(f"{draw.choice(words()['adjectives'])} {person}" if kind == "animals" else person)


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _stories(numbers: range) -> list[tuple[bool, str]]:
    return [(each.is_held_out, each.text) for each in map(story, numbers)]


def learn_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts <|endoftext|> before a text and pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A prompt begins a story, and in training this token stands before each of them.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--output-dir", type=new_folder, required=True, help="folder for the files")
    parser.add_argument("--count", type=count, default=800_000, help="stories, with the held-out ones")
    parser.add_argument("--held-out", type=natural, default=2_000, help="most stories to hold out")
    parser.add_argument("--repository-bytes", type=natural, default=200_000, help="size of heldout.jsonl")
    parser.add_argument("--vocab-size", type=count, default=2048, help="pieces of the tokenizer")
    args = parser.parse_args(with_dashes(argv))
    if args.vocab_size < 258:
        parser.error(f"--vocab-size must be at least 258, 256 bytes and two special tokens, got {args.vocab_size}")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    held_out: list[str] = []
    sample: list[str] = []
    kept = 0
    with (
        ProcessPoolExecutor() as pool,
        written(args.output_dir / "train.txt") as path,
        open(path, "w", encoding="utf-8") as out,
    ):
        ranges = [range(first, min(first + CHUNK, args.count)) for first in range(0, args.count, CHUNK)]
        for chunk in pool.map(_stories, ranges):
            held_out += [text for is_held_out, text in chunk if is_held_out]
            texts = [text for is_held_out, text in chunk if not is_held_out]
            kept += len(texts)
            sample += texts[: max(0, 50_000 - len(sample))]
            out.write("".join(f"{END_OF_TEXT}{text}\n" for text in texts))
    held_out = held_out[: args.held_out]
    write_text(args.output_dir / "heldout.txt", "".join(f"{END_OF_TEXT}{text}\n" for text in held_out))
    lines = [json.dumps({"title": f"story-{i}", "text": text}) + "\n" for i, text in enumerate(held_out)]
    while sum(map(len, lines)) > args.repository_bytes:
        lines.pop()
    write_text(args.output_dir / "heldout.jsonl", "".join(lines))
    with written(args.output_dir / "tokenizer") as path:
        learn_tokenizer(sample, args.vocab_size).save_pretrained(path)
    figures = {"stories for training": kept, "stories held out": len(held_out), "plots": len(plots()[1])}
    write_text(args.output_dir / "figures.json", json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
