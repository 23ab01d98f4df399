"""Sample many answers at once with transformers' `generate`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from modeling_rebased.cache_rebased import CACHE_NAME


def chat(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    openings: Sequence[str] | None = None,
    system: str | None = None,
) -> BatchEncoding:
    """Return requests in the tokenizer's chat format, padded on the left: input_ids, attention_mask [B, T].

    Args:
        tokenizer: with a chat template.
        requests: what the user says.
        openings: how each answer begins, "" where the model is to begin it.
        system: the system message. By default the template's own.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    before = [] if system is None else [{"role": "system", "content": system}]
    texts = tokenizer.apply_chat_template(
        [[*before, {"role": "user", "content": request}] for request in requests],
        add_generation_prompt=True,
        tokenize=False,
    )
    texts = [text + opening for text, opening in zip(texts, openings or [""] * len(texts), strict=True)]
    return tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")  # the template has them


class EnoughEnded(StoppingCriteria):
    """Stop when a share of the rows has ended, so that a few long rows do not hold up the others.

    Args:
        start: number of tokens that each row had at first.
        end: the token that ends a row.
        share: from 0 to 1.
    """

    def __init__(self, start: int, end: int, share: float) -> None:
        self.start, self.end, self.share = start, end, share

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Return whether each row is to stop: all of them or none."""
        ended = (input_ids[:, self.start :] == self.end).any(1)
        return (ended.float().mean() >= self.share).expand(len(ended))


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    inputs: BatchEncoding,
    end: int,
    *,
    new_tokens: int,
    enough: float = 1.0,
    cache: StaticCache | None = None,
    **settings: Any,
) -> list[tuple[list[int], bool]]:
    """Return what the model samples after each row: the new tokens, and whether the row ended by itself.

    Args:
        model: the model.
        inputs: input_ids and attention_mask [B, T], padded on the left.
        end: the token that ends a row. It is not among the tokens returned.
        new_tokens: most tokens of a row.
        enough: stop all rows when this share of them has ended.
        cache: a cache to use again and again for batches of one shape. By default each batch has one of its own.
        settings: such as `temperature`, for `generate`.
    """
    length = inputs["input_ids"].shape[1]
    if cache is not None:
        cache.reset()
        settings[CACHE_NAME] = cache
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=new_tokens,
        do_sample=True,
        eos_token_id=end,
        pad_token_id=end,
        stopping_criteria=StoppingCriteriaList([EnoughEnded(length, end, enough)]) if enough < 1 else None,
        **settings,
    )
    rows = output[:, length:].tolist()
    return [(row[: row.index(end)], True) if end in row else (row, False) for row in rows]


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute softmax attention with shared key heads as rows of one query, so that no key is copied.

    transformers copies keys and values for each query head if there is a mask, as there is with a static cache. For
    a step of SmolLM2-135M in a large batch, this copy takes longer than all else.

    Args:
        module: the attention layer, not used.
        query: [B, H, T, F].
        key, value: [B, H_kv, S, F].
        attention_mask: bool or additive, [B, 1, T, S].
        scaling: factor of the scores, F**-0.5 by default.

    Returns:
        [B, T, H, F], and no weights.
    """
    batch, heads, tokens, size = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * tokens, size)
    if attention_mask is None:  # the queries are the last T of S tokens
        seen = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = seen.tril(key.shape[2] - tokens)[None, None]
    mask = attention_mask.repeat(1, 1, groups, 1)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, heads, tokens, size).transpose(1, 2), None


@contextlib.contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Let a model use `grouped_attention` inside the block."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("grouped")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
