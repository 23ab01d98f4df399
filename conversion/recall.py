"""Measure what a model recalls from its prompt: a number or a name that was given many tokens before.

The text follows the single needle with repeated text of RULER (Hsieh et al., 2024, niah_single_1): a sentence with the
number stands before the same few sentences over and over, and the question comes at the end. The number has seven
digits. The needle with a name is our own and is asked for in the same way. lm-eval has RULER too, but downloads a
tokenizer of sentences for it. The tasks `needle` of `eval/tasks` ask through lm-eval and need no network.

An item is right if the model's most likely tokens after the beginning of the answer are the number or name, all of
them, which is what greedy decoding would write.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
INTRODUCTION = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind}s afterwards.\n"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}.\n"
QUESTION = "What is the special magic {kind} for {key} mentioned in the provided text?"
BEGINNING = "The special magic {kind} for {key} mentioned in the provided text is:"
KEYS = ("garden", "river", "teacher", "window", "mountain", "engine", "letter", "market", "forest", "island")
NAMES = ("Alice", "Robert", "Maria", "David", "Emma", "Thomas", "Julia", "Peter", "Laura", "Henry", "Anna", "George")
KINDS = ("number", "name")
DISTANCES = (200, 500, 1000, 2000, 4000)


def item_text(kind: str, lines: int, seed: int) -> tuple[str, str, str]:
    """Return a request, the beginning of its answer, and the value that is asked for.

    Args:
        kind: one of `KINDS`.
        lines: how often the repeated sentences stand between the needle and the question.
        seed: of the value and its key.
    """
    draw = random.Random(f"{kind} {seed}")
    key = draw.choice(KEYS)
    value = str(draw.randint(10**6, 10**7 - 1)) if kind == "number" else draw.choice(NAMES)
    parts = {"kind": kind, "key": key, "value": value}
    return (INTRODUCTION + NEEDLE + FILLER * lines + QUESTION).format(**parts), BEGINNING.format(**parts), value


def make_item(
    tokenizer: PreTrainedTokenizerBase, kind: str, distance: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids before the value and those of the value, int64 [T] and [n].

    Args:
        tokenizer: with a chat format or without.
        kind: one of `KINDS`.
        distance: tokens of the repeated sentences between the needle and the question, rounded down to whole lines.
        seed: of the value and its key.
    """
    lines = max(1, distance // len(tokenizer(FILLER, add_special_tokens=False)["input_ids"]))
    request, beginning, value = item_text(kind, lines, seed)
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": request}]
        request = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        request += "\n"
    before = tokenizer(request + beginning, add_special_tokens=False)["input_ids"]
    whole = tokenizer(request + beginning + " " + value, add_special_tokens=False)["input_ids"]
    return torch.tensor(before), torch.tensor(whole[len(before) :])


@torch.no_grad()
def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, distances: Sequence[int], count: int
) -> list[dict[str, Any]]:
    """Ask for `count` values of each kind at each distance.

    Returns:
        A row per kind and distance: "kind", "distance", "right" (the share of values that are recalled), and "loss"
        (the mean cross entropy per token of the values).
    """
    rows = []
    for kind in KINDS:
        for distance in distances:
            right = tokens = 0
            loss = 0.0
            for seed in range(count):
                before, value = make_item(tokenizer, kind, distance, seed)
                ids = torch.cat([before, value[:-1]])[None].to(model.device)
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(value)).logits[0].float().cpu()
                right += int(torch.equal(logits.argmax(-1), value))
                loss += F.cross_entropy(logits, value, reduction="sum").item()
                tokens += len(value)
            rows.append({"kind": kind, "distance": distance, "right": right / count, "loss": loss / tokens})
    return rows
