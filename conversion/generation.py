"""Let models answer requests, and judge the answers by the model that the students came from."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_rebased.training.sampling import chat

from .prompts import on_topic


# How answers are decoded, by name, for `generate`.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "repetition_penalty": 1.1},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0},
}


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int, mode: str
) -> list[tuple[str, bool]]:
    """Return answers in the chat format, each with whether it ended by itself. All prompts are one batch.

    Args:
        model, tokenizer: the model and its tokenizer, with a chat template.
        prompts: what the user says.
        new_tokens: most tokens of an answer.
        mode: one of `MODES`. Sampling starts from seed 0.
    """
    inputs = chat(tokenizer, prompts).to(model.device)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=end, pad_token_id=end, **MODES[mode])
    rows = output[:, inputs["input_ids"].shape[1] :]
    return list(zip(tokenizer.batch_decode(rows, skip_special_tokens=True), (rows == end).any(1).tolist()))


@torch.no_grad()
def judged_by(
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 32,
) -> float:
    """Return the judge's perplexity of the answers given their prompts, which is low for fluent, apt answers."""
    rows = []
    for prompt, text in zip(prompts, answers):
        before = chat(tokenizer, (prompt,))["input_ids"][0]
        after = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()
        if len(after):
            rows.append((before, after))
    total, count = 0.0, sum(len(after) for _, after in rows)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        # Padding stands at the end, where no token that counts sees it.
        ids = torch.nn.utils.rnn.pad_sequence([torch.cat(row) for row in part], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.cat([torch.full_like(before, -100), after]) for before, after in part],
            batch_first=True,
            padding_value=-100,
        )
        logits = judge(input_ids=ids.to(judge.device), use_cache=False).logits[:, :-1].float()
        labels = labels[:, 1:].to(judge.device)
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
    return math.exp(total / count) if count else math.nan


def repeated(answers: Sequence[str]) -> float:
    """Return the share of four-word runs that repeat one of the same answer, which is high in a loop."""
    runs = new = 0
    for text in answers:
        words = text.split()
        fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        runs, new = runs + len(fours), new + len(set(fours))
    return 1 - new / runs if runs else 0.0


def judge_answers(
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    topics: dict[str, tuple[str, ...]],
    answers: Sequence[tuple[str, bool]],
) -> dict[str, float]:
    """Return what answers to the requests of `topics` are worth.

    Returns:
        "judged", the judge's perplexity of them; "repeated", the share of runs of four words that were said before;
        "ended" and "on_topic", the shares of answers that ended by themselves and that are on the topic (prompts.py);
        "good", the share of those that are both.
    """
    texts = [text for text, _ in answers]
    apt = [on_topic(text, words) for text, words in zip(texts, topics.values())]
    ended = [done for _, done in answers]
    return {
        "judged": judged_by(judge, tokenizer, list(topics), texts),
        "repeated": repeated(texts),
        "ended": sum(ended) / len(ended),
        "on_topic": sum(apt) / len(apt),
        "good": sum(a and b for a, b in zip(apt, ended)) / len(apt),
    }
