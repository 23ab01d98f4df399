# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""The short convolution with its gate and residual, in one kernel forward and one backward.

    c_t = bias + sum_d w_d x_(t - d)        y_t = c_t, or c_t * gate_t + x_t where there is a gate

A GPU takes as long for this as it takes to move x, gate and y. Written in PyTorch, without torch.compile, every tap
moves tensors in float32 instead. Sums are in float32, and y is rounded once.

A program has BT tokens and BC channels. The shifted tiles of x overlap, so all but one come from the cache. Gradients
of weights are sums over tokens: each program writes its own part, and PyTorch adds the parts, always in one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_language_rebased import tl, triton
from .triton_launch_rebased import launch, on_gpu_of, prepare_launches


_TOKENS, _CHANNELS, _WARPS = 128, 64, 8  # of a program


@triton.jit
def _load_rows(x, t, T, stride_t, c, C, kept):
    """Load rows t of x [T, C] in float32, zeros for rows outside of [0, T) or not kept."""
    rows = x + t.to(tl.int64)[:, None] * stride_t + c[None, :]
    return tl.load(rows, mask=(kept & (t >= 0) & (t < T))[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _same_sequence(segment_ids, t, other, T, VARLEN: tl.constexpr):
    """Return whether tokens t and `other` exist and belong to one packed sequence."""
    inside = (t < T) & (other >= 0) & (other < T)
    if VARLEN:
        inside &= tl.load(segment_ids + t, mask=inside, other=0) == tl.load(segment_ids + other, mask=inside, other=0)
    return inside


@triton.jit
def _conv_kernel(
    x, weight, bias, gate, segment_ids, y,
    T, C, stride_xb, stride_xt, stride_gb, stride_gt, stride_segment,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """Compute y for BT tokens and BC channels of a batch row."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    x += row * stride_xb
    if VARLEN:
        segment_ids += row * stride_segment
    out = tl.zeros([BT, BC], tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for distance in tl.static_range(K):
        w = tl.load(weight + c * K + (K - 1 - distance), mask=c < C, other=0.0).to(tl.float32)
        kept = _same_sequence(segment_ids, t, t - distance, T, VARLEN)
        out += w[None, :] * _load_rows(x, t - distance, T, stride_xt, c, C, kept)
    exists = t < T
    if GATED:
        out *= _load_rows(gate + row * stride_gb, t, T, stride_gt, c, C, exists)
        out += _load_rows(x, t, T, stride_xt, c, C, exists)
    rows = y + (row * T + t.to(tl.int64)[:, None]) * C + c[None, :]
    tl.store(rows, out.to(y.dtype.element_ty), mask=exists[:, None] & (c < C)[None, :])


@triton.jit
def _conv_backward_kernel(
    grad, x, weight, bias, gate, segment_ids, dx, dgate, parts,
    T, C, stride_yb, stride_yt, stride_xb, stride_xt, stride_gb, stride_gt, stride_segment,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """Compute dx and dgate for BT tokens and BC channels of a batch row, and their part of dweight and dbias.

    parts [programs of a channel, K + 1, C] has a row for each distance, and one for the bias.
    """
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    grad += row * stride_yb
    x += row * stride_xb
    if GATED:
        gate += row * stride_gb
    if VARLEN:
        segment_ids += row * stride_segment
    parts += (row * tl.num_programs(0) + tl.program_id(0)) * (K + 1) * C + c
    exists = t < T
    inside = exists[:, None] & (c < C)[None, :]
    at = (row * T + t.to(tl.int64)[:, None]) * C + c[None, :]
    dy = _load_rows(grad, t, T, stride_yt, c, C, exists)
    dc = dy
    if GATED:
        dc *= _load_rows(gate, t, T, stride_gt, c, C, exists)
    tl.store(parts + K * C, tl.sum(dc, 0), mask=c < C)
    convolved = tl.zeros([BT, BC], tl.float32)
    if HAS_BIAS:
        convolved += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dx_tile = dy if GATED else tl.zeros([BT, BC], tl.float32)
    for distance in tl.static_range(K):
        w = tl.load(weight + c * K + (K - 1 - distance), mask=c < C, other=0.0).to(tl.float32)[None, :]
        kept = _same_sequence(segment_ids, t, t - distance, T, VARLEN)
        earlier = _load_rows(x, t - distance, T, stride_xt, c, C, kept)
        tl.store(parts + distance * C, tl.sum(dc * earlier, 0), mask=c < C)
        convolved += w * earlier
        kept = _same_sequence(segment_ids, t, t + distance, T, VARLEN)
        later = _load_rows(grad, t + distance, T, stride_yt, c, C, kept)
        if GATED:
            later *= _load_rows(gate, t + distance, T, stride_gt, c, C, kept)
        dx_tile += w * later
    tl.store(dx + at, dx_tile.to(dx.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(dgate + at, (dy * convolved).to(dgate.dtype.element_ty), mask=inside)


def _sizes(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, segment_ids: Tensor | None
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the grid of either kernel, and the numbers and options that both take, by name."""
    batch, length, channels = x.shape
    gate_strides = (0, 0) if gate is None else gate.stride()[:2]
    return (triton.cdiv(length, _TOKENS), triton.cdiv(channels, _CHANNELS), batch), {
        "T": length, "C": channels, "stride_xb": x.stride(0), "stride_xt": x.stride(1),
        "stride_gb": gate_strides[0], "stride_gt": gate_strides[1],
        "stride_segment": 0 if segment_ids is None else segment_ids.stride(0), "K": weight.shape[1], "BT": _TOKENS,
        "BC": _CHANNELS, "HAS_BIAS": bias is not None, "GATED": gate is not None, "VARLEN": segment_ids is not None,
        "num_warps": _WARPS,
    }  # fmt: skip


def _readable(
    x: Tensor, weight: Tensor, gate: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the tensors in the form that the kernels read, with a copy only where one is needed."""
    x = x if x.stride(2) == 1 else x.contiguous()
    if gate is not None and gate.stride(2) != 1:
        gate = gate.contiguous()
    if segment_ids is not None:
        segment_ids = segment_ids.expand(x.shape[:2])
        segment_ids = segment_ids if segment_ids.stride(1) == 1 else segment_ids.contiguous()
    return x, weight.contiguous(), gate, segment_ids


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """Return y [B, T, C]; see `triton_short_conv`."""
    x, weight, gate, segment_ids = _readable(x, weight, gate, segment_ids)
    y = conv_fake(x, weight, bias, gate, segment_ids)
    inputs = (x, weight, bias, gate, segment_ids)
    prepared = prepare_launches("conv", inputs)
    with on_gpu_of(x):
        tensors = dict(zip(("x", "weight", "bias", "gate", "segment_ids", "y"), (*inputs, y)))
        launch(prepared, "conv", _conv_kernel, tensors, lambda: _sizes(*inputs))
    return y


def conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """Return an empty tensor like the one that `conv_forward` returns."""
    return x.new_empty(x.shape, dtype=x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype))


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx [B, T, C], dweight [C, K], dbias [C], dgate [B, T, C]; without bias or gate theirs is empty."""
    x, weight, gate, segment_ids = _readable(x, weight, gate, segment_ids)
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    dx, dweight, dbias, dgate = conv_backward_fake(grad, x, weight, bias, gate, segment_ids)
    programs = x.shape[0] * triton.cdiv(x.shape[1], _TOKENS)
    parts = torch.empty(programs, weight.shape[1] + 1, x.shape[2], dtype=torch.float32, device=x.device)
    inputs = (x, weight, bias, gate, segment_ids)
    prepared = prepare_launches("conv backward", (grad, *inputs))

    def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
        grid, sizes = _sizes(*inputs)
        return grid, {**sizes, "stride_yb": grad.stride(0), "stride_yt": grad.stride(1)}

    with on_gpu_of(x):
        tensors = dict(zip(("x", "weight", "bias", "gate", "segment_ids"), inputs))
        tensors |= {"grad": grad, "dx": dx, "dgate": dgate, "parts": parts}
        launch(prepared, "conv backward", _conv_backward_kernel, tensors, complete)
    sums = parts.sum(0)
    dweight.copy_(sums[:-1].flip(0).T)
    if bias is not None:
        dbias.copy_(sums[-1])
    return dx, dweight, dbias, dgate


def conv_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors like those that `conv_backward` returns."""
    dx = x.new_empty(x.shape)
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dx, weight.new_empty(weight.shape), dbias, dgate
