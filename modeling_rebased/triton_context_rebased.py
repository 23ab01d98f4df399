# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""What a shard of a sequence gives to the other shards: its state, and the gradient of the state before it.

Both are sums over the shard's tokens. The kernels of states compute them alone, before the passes over the shard. Only
the total is wanted, so the segments are longer than those of attention, and fewer sums are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration_rebased import n_features
from .triton_backward_rebased import allocate_scaled, launch_scale
from .triton_inputs_rebased import computes_in_float32, mask_as_bytes, pad_rows, with_unit_stride
from .triton_launch_rebased import PreparedCall, on_gpu_of, prepare
from .triton_layout_rebased import to_public
from .triton_plan_rebased import MOST_SEGMENT, count_multiprocessors
from .triton_segments_rebased import allocate_states, cut_into_segments
from .triton_states_rebased import sum_states


def _prepare(name: str, tensors: tuple[Tensor | None, ...], options: tuple, rows: int) -> PreparedCall:
    """Return `prepare(...)` with segments as long as leave several programs per multiprocessor.

    `rows` is the number of tokens of all heads and batch rows.
    """
    prepared = prepare(name, tensors, *options)
    prepared.plan = prepared.plan._replace(runs=(1, 1))
    programs = 8 * count_multiprocessors(tensors[0].device)
    while 2 * prepared.segment <= MOST_SEGMENT and rows // (2 * prepared.segment) >= programs:
        prepared.segment *= 2
    return prepared


def state_pass(
    k: Tensor, v: Tensor, attention_mask: Tensor | None, c0: float, c1: float, c2: float, scale: float
) -> Tensor:
    """Return the state after all tokens, sum_j phi(k_j) [v_j, 1], fp32 [B, H_kv, n_features, D + 1].

    Args:
        k: [B, T, H_kv, F]; v: [B, T, H_kv, D].
        attention_mask: bool [B, T], False drops the token; or None.
        c0, c1, c2, scale: as in `triton_rebased_attention`.
    """
    if computes_in_float32(k.dtype):
        k, v = k.float(), v.float()
    k, v, mask = with_unit_stride(k), with_unit_stride(v), mask_as_bytes(attention_mask)
    kv_heads, head_dim = v.shape[2:]
    rows = k.shape[0] * k.shape[1] * kv_heads
    prepared = _prepare("shard's state", (k, k, v, mask), ((c0, c1, c2, scale),), rows)
    with on_gpu_of(k):
        v = pad_rows(v, prepared)
        cut = cut_into_segments(prepared, k, kv_heads, False, True, None)
        states, norms = allocate_states(k, cut.total, kv_heads, prepared.layout, True)
        totals = sum_states(k, v, states, norms, cut, prepared, mask, kv_heads, head_dim, None, True)
        return to_public(*totals, k.shape[3], head_dim, prepared.layout)


def state_fake(
    k: Tensor, v: Tensor, attention_mask: Tensor | None, c0: float, c1: float, c2: float, scale: float
) -> Tensor:
    """Return an empty tensor of the size that `state_pass` returns."""
    features = n_features(k.shape[3], (c0, c1, c2))
    return k.new_empty(k.shape[0], k.shape[2], features, v.shape[3] + 1, dtype=torch.float32)


def state_gradient_pass(
    grad: Tensor, q: Tensor, o: Tensor, inverse_z: Tensor, kv_heads: int, c0: float, c1: float, c2: float,
    scale: float, ranges: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient by the state before the first token, fp32 [B, H_kv, n_features, D + 1].

    A query with an `inverse_z` of 0 has no part in it.

    Args:
        grad: the gradient of o, [B, T, H_q, D].
        q: [B, T, H_q, F].
        o, inverse_z: what `forward_pass` returned.
        kv_heads: H_kv.
        c0, c1, c2, scale: as in `triton_rebased_attention`.
        ranges: what `forward_pass` was given.
    """
    if computes_in_float32(q.dtype):
        grad, q, o = grad.float(), q.float(), o.float()
    grad, q, o = with_unit_stride(grad), with_unit_stride(q), o.contiguous()
    head_dim = grad.shape[3]
    rows = q.shape[0] * q.shape[1] * kv_heads
    options = (c0, c1, c2, scale), kv_heads
    prepared = _prepare("shard's gradient", (q, q, grad, o, inverse_z, ranges), options, rows)
    layout = prepared.layout
    with on_gpu_of(q):
        scaled_grad, delta, minus_delta = allocate_scaled(grad, inverse_z, layout.d)
        launch_scale(prepared, grad, o, inverse_z, scaled_grad, delta, minus_delta)
        cut = cut_into_segments(prepared, q, kv_heads, False, True, None, reverse=True)
        states, norms = allocate_states(q, cut.total, kv_heads, layout, True)
        totals = sum_states(
            q, scaled_grad, states, norms, cut, prepared, None, kv_heads, head_dim, None, True, delta, minus_delta,
            ranges,
        )  # fmt: skip
        return to_public(*totals, q.shape[3], head_dim, layout)


def state_gradient_fake(
    grad: Tensor, q: Tensor, o: Tensor, inverse_z: Tensor, kv_heads: int, c0: float, c1: float, c2: float,
    scale: float, ranges: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return an empty tensor of the size that `state_gradient_pass` returns."""
    features = n_features(q.shape[3], (c0, c1, c2))
    return inverse_z.new_empty(q.shape[0], kv_heads, features, grad.shape[3] + 1)
