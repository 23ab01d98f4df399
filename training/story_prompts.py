"""Compose requests for short texts in simple words: `story_prompt(7)` is always the same request.

A story has a hero with a name, a friend, a place, a thing, a situation and sometimes a feature such as an ending with
a lesson. One text in twelve is a dialogue and one in twelve an explanation. Most requests give the first sentences of
the text too, which a small model follows better than any instruction. The words are in story_words.yaml.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import yaml


WORDS = yaml.safe_load((Path(__file__).resolve().parent / "story_words.yaml").read_text(encoding="utf-8"))
SYSTEM = "You are a writer of good short stories for small children."
STYLE = "Use simple words, short sentences and a clear ending."


@dataclass(frozen=True)
class StoryPrompt:
    """One request.

    Attributes:
        kind: "story", "dialogue" or "explanation".
        request: what the user says.
        opening: the first sentences of the text, "" if the model is to begin itself.
        names: names that the text must mention, so that it is about the persons that were asked for.
    """

    kind: str
    request: str
    opening: str
    names: tuple[str, ...]


def story_prompt(number: int) -> StoryPrompt:
    """Compose the request with this number.

    Args:
        number: any integer. The same number always gives the same request.
    """
    draw = random.Random(number)
    slots = _slots(draw)

    def pick(kind: str) -> str:
        return draw.choice(WORDS[kind]).format(**slots)

    hero, friend = slots["A"], slots["B"]
    kind = draw.choices(("story", "dialogue", "explanation"), (10, 1, 1))[0]
    if kind == "explanation":
        question = pick("questions")
        opening = draw.choice(("", f"{hero} asked {slots['his']} mother {question}."))
        request = (
            f"Explain to a small child {question}. Use simple words, in one or two short paragraphs, without a list."
        )
        return StoryPrompt(kind, request, opening, (hero,) if opening else ())
    if kind == "dialogue":
        persons = f"{hero}, {slots['who']}, and {friend}, {slots['friend']}"
        request = f"Write a short dialogue in simple words between {persons}, about {pick('dialogue_subjects')}."
        return StoryPrompt(kind, f"{request} It ends well.", pick("dialogue_openings"), (hero, friend))
    situation = draw.choice(WORDS["situations"])
    slots |= {name: text.format(**slots) for name, text in situation.items()}
    request = " ".join((pick("requests"), *([pick("features")] if draw.random() < 0.8 else []), STYLE))
    introduction = pick("introductions")
    opening = draw.choices(("", introduction, f"{introduction} {slots['event']}"), (1, 2, 3))[0]
    return StoryPrompt(kind, request, opening, (hero,))


def _slots(draw: random.Random) -> dict[str, str]:
    """Draw what fills the slots of a template."""
    girl, friend_is_girl = draw.random() < 0.5, draw.random() < 0.5
    hero = draw.choice(WORDS["girls" if girl else "boys"])
    friend = draw.choice([name for name in WORDS["girls" if friend_is_girl else "boys"] if name != hero])
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    slots = {"A": hero, "B": friend, "he": he, "him": him, "his": his, "himself": f"{him}self"}
    slots |= {"who": _person(draw, girl), "friend": _person(draw, friend_is_girl), "home": draw.choice(WORDS["homes"])}
    slots |= {name.capitalize(): slots[name][0].upper() + slots[name][1:] for name in ("he", "who", "home")}
    for name in ("place", "food", "skill", "time", "feeling", "animal", "thing"):
        slots[name] = draw.choice(WORDS[f"{name}s"])
    slots |= {"weather": draw.choice(WORDS["weather"]), "a_thing": slots["thing"]}
    slots |= {"thing": slots["a_thing"].split(" ", 1)[1], "an_animal": _with_article(slots["animal"])}
    return slots


def _person(draw: random.Random, girl: bool) -> str:
    kind = draw.choices(("children", "grown_ups", "creatures", "animals"), (5, 2, 1, 4))[0]
    words = ("girl", "woman", "queen") if girl else ("boy", "man", "king")
    person = draw.choice(WORDS[kind]).format(**dict(zip(("child", "adult", "royal"), words)))
    return _with_article(f"{draw.choice(WORDS['adjectives'])} {person}") if kind == "animals" else person


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
