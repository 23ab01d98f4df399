"""Sample many answers at once with transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


def chat(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[str], openings: Sequence[str] | None = None
) -> BatchEncoding:
    """Return requests in the tokenizer's chat format, padded on the left: input_ids, attention_mask [B, T].

    Args:
        tokenizer: with a chat template.
        requests: what the user says.
        openings: how each answer begins. By default the model begins it.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    texts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": request}] for request in requests], add_generation_prompt=True, tokenize=False
    )
    texts = [text + opening for text, opening in zip(texts, openings or [""] * len(texts), strict=True)]
    return tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")  # the template has them


@torch.no_grad()
def sample(
    model: PreTrainedModel, inputs: BatchEncoding, end: int, *, new_tokens: int, **settings: Any
) -> list[tuple[list[int], bool]]:
    """Return what the model samples after each row: the new tokens, and whether the row ended by itself.

    Args:
        model: the model.
        inputs: input_ids and attention_mask [B, T], padded on the left.
        end: the token that ends a row. It is not among the tokens returned.
        new_tokens: most tokens of a row.
        settings: such as `temperature`, for `generate`.
    """
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=new_tokens,
        do_sample=True,
        eos_token_id=end,
        pad_token_id=end,
        **settings,
    )
    rows = output[:, length:].tolist()
    return [(row[: row.index(end)], True) if end in row else (row, False) for row in rows]
