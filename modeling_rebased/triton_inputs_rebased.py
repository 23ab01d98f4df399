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


# What a key may be, and a query times F: their products have squares below 2**88. That leaves 2**40 for the tokens and
# their values, and smaller products of the same head are exact down to 2**-63.
LARGEST = 2.0**22


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
    """Multiply the queries and the keys of each head by a power of two that keeps (q . k)**2 within float32.

    The power is 1 unless numbers are very large. Multiplying all weights and eps by the same number leaves o as it is.

    Returns:
        q, k and the initial state, multiplied; the product of both powers for every query, `ranges`, fp32 [B, H, T];
        and the factors by which the states are multiplied, fp32 [B, H_kv, n_features, 1].
    """
    with torch.no_grad():
        query_size = torch.linalg.vector_norm(q, math.inf, (1, 3), dtype=torch.float32)  # [B, H]
        query_factor = _units_of_heads(query_size, LARGEST / q.shape[3])
        # A dropped key may hold anything.
        kept = k if attention_mask is None else k.masked_fill(~attention_mask[:, :, None, None], 0.0)
        key_size = torch.linalg.vector_norm(kept, math.inf, (1, 3), dtype=torch.float32)  # [B, H_kv]
        if (
            initial_state is not None
        ):  # it holds squares of keys; a row of it belongs to a packed sequence or to the batch
            squares = initial_state.abs().amax((2, 3) if initial_state.shape[0] == k.shape[0] else (0, 2, 3))
            key_size = torch.maximum(key_size, squares.float().sqrt())
        key_factor = _units_of_heads(key_size, LARGEST)
        by_head = query_factor * key_factor.repeat_interleave(q.shape[2] // k.shape[2], dim=1)  # [B, H]
        ranges = by_head[:, :, None].expand(-1, -1, q.shape[1]).contiguous()
        state_factor = degree_factors(key_factor[:, :, None, None], coefficients, q.shape[3])
    q = q * query_factor[:, None, :, None].to(q.dtype)
    k = k * key_factor[:, None, :, None].to(k.dtype)
    if initial_state is not None:
        initial_state = initial_state.float() * state_factor
    return q, k, initial_state, ranges, state_factor


def _units_of_heads(size: Tensor, largest: float) -> Tensor:
    """Return powers of two that bring heads whose largest number is `size` to `largest` at most; 1 for NaN."""
    return units_of(size.where(size.isfinite(), 0.0) / largest)


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
