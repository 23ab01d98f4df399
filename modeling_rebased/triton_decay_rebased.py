# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""The decay of older tokens: its sums, what kernels make of them, and its gradient.

With `log_decay` the weight of key j for query i is multiplied by exp(G_i - G_j), where G_i is the sum of `log_decay`
up to token i. The kernels read `decays`, fp32 [B, H_kv, T]: such sums from the start of each segment on, as logarithms
to base 2. No exponent is ever positive:

    a query and a key of one segment     decays_i - decays_j
    a query and the state before         decays_i
    a key and the state after            decays_last - decays_j, where last is the last token of the segment
    the state across a segment           decays_last

The state of later queries works the other way round: a query is added with the second factor, and a key reads with the
third. The gradient needs no kernel of its own. w is of degree two in q_i and in k_j, so by Euler's theorem

    dL/dG_i = sum_j w_ij dL/dw_ij - sum_l w_li dL/dw_li = (q_i . dq_i - k_i . dk_i) / 2.

Over a sequence without an initial state these sum up to 0. The gradient by `log_decay` is their sum from a token on,
in which rounding errors would add up. So `decay_gradient` makes them sum up to 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .triton_language_rebased import tl, triton


@triton.jit
def decay_between(later, earlier):
    """Return exp(G_i - G_j), from `decays` of i and of j; 1 where i comes before j, for pairs that are dropped."""
    return tl.exp2(tl.minimum(later - earlier, 0.0))


@triton.jit
def decay_of_tile(row_decays, decays, cols, DIAGONAL: tl.constexpr):
    """Return exp(G_i - G_j) for queries with `row_decays` [BM] and the keys `cols`; DIAGONAL: the same tokens."""
    col_decays = row_decays
    if not DIAGONAL:
        col_decays = tl.load(decays + cols)
    return decay_between(row_decays[:, None], col_decays[None, :])


@triton.jit
def decay_across(decays, order, count, tokens, L: tl.constexpr, REVERSE: tl.constexpr):
    """Return what is left of the state across the segments that are number `order` of a sequence.

    They are counted from the end if REVERSE. The sequence has `count` segments and `tokens` tokens, the first of which
    is at `decays`. It is 1 for a number that no segment has.
    """
    index = order
    if REVERSE:
        index = count - 1 - order
    last = tl.minimum((index + 1) * L, tokens) - 1
    return tl.exp2(tl.load(decays + last, mask=(index >= 0) & (index < count), other=0.0))


def _sequence_of_tokens(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of `length` tokens, int64, and that of the packed sequence of each."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long().contiguous(), tokens, right=True)
    return tokens, sequence.clamp(max=cu_seqlens.shape[0] - 2)  # bounds on a GPU are not checked


def sum_decays(log_decay: Tensor | None, segment: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """Return `decays`, fp32 [B, H_kv, T], of log_decay [B, T, H_kv], for segments of so many tokens."""
    if log_decay is None:
        return None
    length = log_decay.shape[1]
    if cu_seqlens is not None:
        tokens, sequence = _sequence_of_tokens(cu_seqlens, length)
        first = cu_seqlens.long()[sequence]
        start = first + (tokens - first) // segment * segment
    else:
        tokens = torch.arange(length, device=log_decay.device)
        start = tokens // segment * segment
    steps = log_decay.detach().transpose(1, 2).double() / math.log(2)  # sums over all tokens are exact enough in fp64
    total = steps.cumsum(-1)
    return (total - (total - steps)[..., start]).float().contiguous()


def decay_gradient(
    query_part: Tensor, key_part: Tensor, cu_seqlens: Tensor | None, has_initial: bool, final: Tensor | None,
    grad_final: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the gradient by log_decay, fp32 [B, T, H_kv]: the sum of dL/dG over the tokens from each one on.

    Without an initial state the first decay of a sequence multiplies nothing, and its gradient is 0. What rounding
    adds to it is taken from all tokens of the sequence alike: docs/kernels-log.md, "Rounding in the gradient of a
    decay".

    Args:
        query_part: q . dq / 2, fp32 [B, H_q, T]; key_part: k . dk / 2, fp32 [B, H_kv, T].
        cu_seqlens: the bounds of packed sequences, or None.
        has_initial: whether there is an initial state.
        final, grad_final: the final state, all of which decays with the last G, and its gradient; or None.
    """
    by_sum = (query_part.unflatten(1, (key_part.shape[1], -1)).sum(2) - key_part).double()
    total, length = by_sum.cumsum(-1), by_sum.shape[-1]
    if cu_seqlens is None:
        sequence, first, last = None, slice(1), slice(-1, None)
        left = torch.arange(length, 0, -1, device=by_sum.device) / length  # 1 for the first token, 1 / T for the last
    else:
        tokens, sequence = _sequence_of_tokens(cu_seqlens, length)
        first, end = cu_seqlens.long()[sequence], cu_seqlens.long()[1:][sequence]
        last, left = end - 1, (end - tokens) / (end - first)
    gradient = total[..., last] - total + by_sum
    if final is not None and grad_final is not None:
        by_last = (final * grad_final).sum((2, 3))  # [B or N, H_kv]
        gradient += by_last[..., None] if sequence is None else by_last[sequence].T
    if not has_initial:
        gradient -= gradient[..., first] * left
    return gradient.transpose(1, 2).float().contiguous()
