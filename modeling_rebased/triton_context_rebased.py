# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""What a shard of a sequence gives to the other shards: its state, and the gradient of the state before it.

Both are sums over the shard's tokens. The kernels of states compute them alone, before the passes over the shard. Only
the total is wanted, so the segments are longer than those of attention, and fewer sums are stored.

They are exchanged in the order of internal states, [B, H_kv, rows, D + 1] with the normaliser in the last column. The
way to the public order and back takes some 90 small kernels, more than all else that a shard adds.

The backward pass is in two parts. The gradient of queries does not need what other shards send, so it is computed
while that is on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_backward_rebased import allocate_scaled, key_gradients, launch_scale, query_gradient
from .triton_inputs_rebased import computes_in_float32, mask_as_bytes, pad_rows, with_unit_stride
from .triton_launch_rebased import PreparedCall, on_gpu_of, prepare
from .triton_layout_rebased import Layout, make_layout
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


def _join(totals: tuple[Tensor, Tensor], head_dim: int, layout: Layout) -> Tensor:
    """Return one tensor [B, H_kv, rows, D + 1] of states [B, H_kv, rows, DP] and norms [B, H_kv, rows]."""
    state = torch.cat([totals[0][..., :head_dim], totals[1][..., None]], dim=-1)
    if layout.const:
        state[:, :, layout.rows - 15 :] = 0.0  # the kernels leave the rows behind the constant one as they are
    return state


def factors_of_rows(
    factors: Tensor, feature_dim: int, head_dim: int, c0: float, c1: float, c2: float, scale: float
) -> Tensor:
    """Return factors [B, H_kv, n_features, 1] from `bring_into_range` for the rows of an internal state."""
    layout = make_layout(feature_dim, head_dim, c0, c1, c2, scale)
    parts = [factors[:, :, :1].expand(-1, -1, layout.first_low_row, -1)] if layout.quad else []
    if layout.lin:
        first = feature_dim * (feature_dim + 1) // 2 if layout.quad else 0
        parts.append(factors[:, :, first : first + 1].expand(-1, -1, layout.f, -1))
    if layout.const:
        parts.append(torch.ones_like(factors[:, :, :1]).expand(-1, -1, 16, -1))
    return torch.cat(parts, dim=2)


def state_pass(
    k: Tensor, v: Tensor, attention_mask: Tensor | None, c0: float, c1: float, c2: float, scale: float
) -> Tensor:
    """Return the state after all tokens, sum_j phi(k_j) [v_j, 1], fp32 [B, H_kv, rows, D + 1].

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
        k, v = pad_rows(prepared, k=k, v=v)
        cut = cut_into_segments(prepared, k, kv_heads, False, True, None)
        states, norms = allocate_states(k, cut.total, kv_heads, prepared.layout, True)
        totals = sum_states(k, v, states, norms, cut, prepared, mask, kv_heads, head_dim, None, True)
        assert totals is not None  # they were asked for
        return _join(totals, head_dim, prepared.layout)


def state_fake(
    k: Tensor, v: Tensor, attention_mask: Tensor | None, c0: float, c1: float, c2: float, scale: float
) -> Tensor:
    """Return an empty tensor of the size that `state_pass` returns."""
    layout = make_layout(k.shape[3], v.shape[3], c0, c1, c2, scale)
    return k.new_empty(k.shape[0], k.shape[2], layout.rows, v.shape[3] + 1, dtype=torch.float32)


def state_gradient_pass(
    grad: Tensor, q: Tensor, o: Tensor, inverse_z: Tensor, kv_heads: int, c0: float, c1: float, c2: float,
    scale: float, ranges: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient by the state before the first token, fp32 [B, H_kv, rows, D + 1].

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
        (q,) = pad_rows(prepared, q=q)
        scaled_grad, delta, minus_delta = allocate_scaled(grad, inverse_z, layout.d)
        launch_scale(prepared, grad, o, inverse_z, scaled_grad, delta, minus_delta)
        cut = cut_into_segments(prepared, q, kv_heads, False, True, None, reverse=True)
        states, norms = allocate_states(q, cut.total, kv_heads, layout, True)
        totals = sum_states(
            q, scaled_grad, states, norms, cut, prepared, None, kv_heads, head_dim, None, True, delta, minus_delta,
            ranges,
        )  # fmt: skip
        assert totals is not None  # they were asked for
        return _join(totals, head_dim, layout)


def state_gradient_fake(
    grad: Tensor, q: Tensor, o: Tensor, inverse_z: Tensor, kv_heads: int, c0: float, c1: float, c2: float,
    scale: float, ranges: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return an empty tensor of the size that `state_gradient_pass` returns."""
    layout = make_layout(q.shape[3], grad.shape[3], c0, c1, c2, scale)
    return inverse_z.new_empty(q.shape[0], kv_heads, layout.rows, grad.shape[3] + 1)


def shard_dq_pass(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, inverse_z: Tensor, states: Tensor, norms: Tensor,
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, c0: float, c1: float, c2: float, scale: float,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq of a shard with a state before it, and the tensors that `shard_dkdv_pass` takes.

    Args:
        grad: the gradient of o, [B, T, H_q, D].
        o, inverse_z, states, norms: what `forward_pass` returned, which kept no final state.
        others: as in `forward_pass`.
    """
    dtype = q.dtype
    if computes_in_float32(dtype):
        grad, q, k, v, o = grad.float(), q.float(), k.float(), v.float(), o.float()
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    grad, o, mask = with_unit_stride(grad), o.contiguous(), mask_as_bytes(attention_mask)
    tensors = (q, k, v, mask, cu_seqlens, grad, o, inverse_z, states, norms, ranges)
    prepared = prepare("shard's dq", tensors, (c0, c1, c2, scale), packed=cu_seqlens is not None)
    with on_gpu_of(q):
        q, k, v = pad_rows(prepared, q=q, k=k, v=v)
        dq, *scaled = query_gradient(
            prepared, grad, q, k, v, o, inverse_z, states, norms, mask, cu_seqlens, True, False, ranges
        )
    return dq.to(dtype), *scaled


def shard_dq_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, inverse_z: Tensor, states: Tensor, norms: Tensor,
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, c0: float, c1: float, c2: float, scale: float,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return empty tensors of the sizes that `shard_dq_pass` returns."""
    grad = grad.float() if computes_in_float32(q.dtype) else grad
    columns = make_layout(q.shape[3], grad.shape[3], c0, c1, c2, scale).d
    return q.new_empty(q.shape), *allocate_scaled(grad, inverse_z, columns)


def shard_dkdv_pass(
    grad_final: Tensor, q: Tensor, k: Tensor, v: Tensor, scaled_grad: Tensor, delta: Tensor, minus_delta: Tensor,
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, c0: float, c1: float, c2: float, scale: float,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dk and dv of a shard.

    Args:
        grad_final: the gradient of the state after the shard, fp32 [B, H_kv, rows, D + 1].
        scaled_grad, delta, minus_delta: from `shard_dq_pass`.
        others: as in `forward_pass`.
    """
    dtype = q.dtype
    if computes_in_float32(dtype):
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    mask = mask_as_bytes(attention_mask)
    tensors = (q, k, v, mask, cu_seqlens, grad_final, scaled_grad, ranges)
    prepared = prepare("shard's dk and dv", tensors, (c0, c1, c2, scale), packed=cu_seqlens is not None)
    with on_gpu_of(q):
        dv = v.new_empty(v.shape)
        q, k, v = pad_rows(prepared, q=q, k=k, v=v)
        dk, _ = key_gradients(
            prepared, grad_final, q, k, v, dv, scaled_grad, delta, minus_delta, mask, cu_seqlens, False, ranges
        )
    return dk.to(dtype), dv.to(dtype)


def shard_dkdv_fake(
    grad_final: Tensor, q: Tensor, k: Tensor, v: Tensor, scaled_grad: Tensor, delta: Tensor, minus_delta: Tensor,
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, c0: float, c1: float, c2: float, scale: float,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return empty tensors of the sizes that `shard_dkdv_pass` returns."""
    return k.new_empty(k.shape), v.new_empty(v.shape)
