# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Bring the caller's tensors into the form that the kernels read, with a copy only where one is needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .eager_rebased import degree_factors, units_of
from .triton_language_rebased import INTERPRETED, tl, triton
from .triton_launch_rebased import PreparedCall, launch, strides_of
from .triton_plan_rebased import MOST_SEGMENT


def computes_in_float32(dtype: torch.dtype) -> bool:
    """Return whether inputs of this type are turned into fp32 first.

    Squares overflow fp16, and sums of them in bfloat16 would lose what fp16 has over it. Triton's interpreter
    multiplies bfloat16 numbers as if they were integers.
    """
    return dtype == torch.float16 or (INTERPRETED and dtype != torch.float32)


def needs_range(q: Tensor, coefficients: tuple[float, float, float], normalized: bool) -> bool:
    """Return whether `bring_into_range` has something to do. float16's own range is narrow enough."""
    return not normalized and any(coefficients[1:]) and q.dtype != torch.float16


def bring_into_range(
    q: Tensor,
    k: Tensor,
    coefficients: tuple[float, float, float],
    attention_mask: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Multiply queries and keys by powers of two that keep (q . k)**2 within float32, as the eager backend does.

    A query row has a factor of its own, and all keys of a head share one. Both bring the largest number to at most 1.
    Multiplying all weights of a row, and eps, by the same number leaves o as it is.

    Returns:
        q, k and the initial state, multiplied; the products of both factors for every row, `ranges`, fp32 [B, H, T];
        and the factors by which the states are multiplied, fp32 [B, H_kv, n_features, 1].
    """
    with torch.no_grad():
        query_factor = units_of(torch.linalg.vector_norm(q, math.inf, dim=3, dtype=torch.float32))  # [B, T, H]
        sizes = torch.linalg.vector_norm(k, math.inf, dim=3, dtype=torch.float32)  # [B, T, H_kv]
        if attention_mask is not None:  # a dropped key may hold anything
            sizes = sizes.where(attention_mask[:, :, None], 0.0)
        key_factor = units_of(sizes.amax(1))  # [B, H_kv]
        by_head = key_factor.repeat_interleave(q.shape[2] // k.shape[2], dim=1)  # [B, H]
        ranges = (query_factor.transpose(1, 2) * by_head[:, :, None]).contiguous()
        state_factor = degree_factors(key_factor[:, :, None, None], coefficients, q.shape[3])
    q = q * query_factor[..., None].to(q.dtype)
    k = k * key_factor[:, None, :, None].to(k.dtype)
    if initial_state is not None:
        initial_state = initial_state.float() * state_factor
    return q, k, initial_state, ranges, state_factor


def with_unit_stride(x: Tensor) -> Tensor:
    """Return x [B, T, H, dim], copied if its last stride is not 1 or if its strides are too large for kernels."""
    _, token, head, unit = x.stride()
    # Kernels multiply strides by the tokens of a segment and by heads in 32 bits.
    if unit == 1 and token * MOST_SEGMENT < 2**31 and head * x.shape[2] < 2**31:
        return x
    return x.contiguous()


def mask_as_bytes(mask: Tensor | None) -> Tensor | None:
    """Return an attention mask [B, T] as bytes with unit stride by token."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask != 0
    return (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)


@triton.jit(do_not_specialize=["T", "ROWS"])
def _pad_kernel(
    v, out, stride_vb, stride_vt, stride_vh, T, ROWS,
    D: tl.constexpr, DP: tl.constexpr, HKV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy v [B, T, HKV, D] to out [B, T, HKV, DP], followed by zeros.

    One program copies BLOCK of the ROWS = B * T * HKV rows.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    ok = (row < ROWS)[:, None]
    token = row // HKV
    source = (token // T) * stride_vb + (token % T) * stride_vt + (row % HKV) * stride_vh
    x = tl.load(v + source[:, None] + d[None, :], mask=ok & (d < D)[None, :], other=0.0)
    tl.store(out + row[:, None] * DP + d[None, :], x, mask=ok)


def pad_rows(v: Tensor, prepared: PreparedCall) -> Tensor:
    """Return v with DP columns, the new ones 0, where its rows may not start at a multiple of 16 bytes.

    Such rows cannot be copied to shared memory asynchronously, so the kernels would wait for every tile of keys.
    """
    batch, length, heads, columns = v.shape
    if columns % 16 == 0:  # what Triton knows of a stride
        return v
    width = prepared.layout.d
    out = v.new_empty(batch, length, heads, width)
    rows, block = batch * length * heads, max(16, 4096 // width)

    def complete():
        sizes = {"T": length, "ROWS": rows, "D": columns, "DP": width, "HKV": heads, "BLOCK": block, "num_warps": 4}
        return (-(-rows // block),), {**strides_of("v", v), **sizes}

    launch(prepared, "pad", _pad_kernel, {"v": v, "out": out}, complete)
    return out
