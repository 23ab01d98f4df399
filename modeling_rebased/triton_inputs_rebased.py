# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# ruff: noqa: SIM102
# Kernels are written in Triton's language, which only looks like Python. A test of a compile-time constant must not
# share a condition with a value that only the GPU knows.
"""Bring the caller's tensors into the form that the kernels read, with a copy only where one is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_language_rebased import INTERPRETED, tl, triton
from .triton_launch_rebased import PreparedCall, grid_of_rows, launch, on_gpu_of, prepare, strides_of
from .triton_plan_rebased import MOST_SEGMENT
from .triton_tiles_rebased import batch_row, load_rows, round_to_power_of_2, store_rows, token_pointer


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


@triton.jit
def _locate_head(
    q, k, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, H: tl.constexpr, HKV: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """Locate the BM rows of one head, of q or of k, that a program reads. Grid: (H + HKV) * blocks of rows.

    Returns (head, where those of k come after those of q; batch row and first token, in 64 bits; pointer to the first
    row, stride of the rows).
    """
    head = tl.program_id(0) % (H + HKV)
    b64 = batch_row().to(tl.int64)
    t64 = (tl.program_id(0) // (H + HKV)).to(tl.int64) * BM
    if head < H:
        base = token_pointer(q, b64, t64, head, stride_qb, stride_qt, stride_qh)
        stride = stride_qt
    else:
        base = token_pointer(k, b64, t64, head - H, stride_kb, stride_kt, stride_kh)
        stride = stride_kt
    return head, b64, t64, base, stride


@triton.jit(do_not_specialize=["T", "N"])
def _largest_kernel(
    q, k, bits, mask,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_mb, T, N,
    F: tl.constexpr, FP: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, BM: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Raise bits [N, H + HKV] to the largest finite magnitude of each head of q, and of the kept rows of each of k.

    Positive floats are ordered as their bits are, as integers.
    """
    if batch_row() >= N:
        return
    head, b64, t64, base, stride = _locate_head(
        q, k, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, H, HKV, BM
    )
    rows = tl.arange(0, BM)
    ok = rows + t64 < T
    if HAS_MASK:
        if head >= H:
            ok = tl.load(mask + b64 * stride_mb + t64 + rows, mask=ok, other=0) != 0
    x = load_rows(base, rows, ok, stride, tl.arange(0, FP), F, F == FP, True)
    size = tl.abs(x.to(tl.float32))
    size = tl.where(size < float("inf"), size, 0.0)  # not NaN either
    largest = tl.max(tl.max(size, 1), 0)
    tl.atomic_max(bits + b64 * (H + HKV) + head, largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _factor(bits, most):
    """Return the power of two that brings numbers up to the float with these bits to `most`; at most 1."""
    size = tl.load(bits).to(tl.float32, bitcast=True)
    return round_to_power_of_2(1.0 / tl.maximum(size / most, 1.0))


@triton.jit(do_not_specialize=["T", "N"])
def _multiply_kernel(
    q, k, new_q, new_k, bits, factors, ranges,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, T, N, most_query, most_key,
    F: tl.constexpr, FP: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, BM: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """Multiply each head of q and of k by its factor, into new_q [B, T, H, F] and new_k [B, T, HKV, F].

    FORWARD: the factors follow from `bits`, and are stored: factors [N, H + HKV], and ranges [N, H, T], the products
    of a query's factor and its keys'. Otherwise they are read.
    """
    if batch_row() >= N:
        return
    head, b64, t64, base, stride = _locate_head(
        q, k, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, H, HKV, BM
    )
    rows = tl.arange(0, BM)
    inside = rows + t64 < T
    f = tl.arange(0, FP)
    bits += b64 * (H + HKV)
    factors += b64 * (H + HKV)
    if FORWARD:
        if head < H:
            factor = _factor(bits + head, most_query)
            product = factor * _factor(bits + H + head // (H // HKV), most_key)
            tl.store(ranges + (b64 * H + head) * T + t64 + rows, rows * 0.0 + product, mask=inside)
        else:
            factor = _factor(bits + head, most_key)
    else:
        factor = tl.load(factors + head)
    x = load_rows(base, rows, inside, stride, f, F, F == FP, True)
    _, _, _, new_base, new_stride = _locate_head(
        new_q, new_k, T.to(tl.int64) * (H * F), H * F, F, T.to(tl.int64) * (HKV * F), HKV * F, F, H, HKV, BM
    )
    store_rows(new_base, rows, inside, new_stride, f, F, x.to(tl.float32) * factor)
    if FORWARD:
        if t64 == 0:
            tl.store(factors + head, factor)


def _range_sizes(q: Tensor, k: Tensor, prepared: PreparedCall) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the grid of both kernels, and the arguments that they share, by name."""
    batch, length, heads, feature_dim = q.shape
    kv_heads, width = k.shape[2], prepared.layout.f
    rows = min(256, 8192 // width)  # a thread has 64 numbers at most
    return grid_of_rows(-(-length // rows) * (heads + kv_heads), batch), {
        **strides_of("q", q), **strides_of("k", k), "T": length, "N": batch, "F": feature_dim,
        "FP": width, "H": heads, "HKV": kv_heads, "BM": rows, "num_warps": 4,
    }  # fmt: skip


def range_pass(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, state_size: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q and k within range, `ranges` [B, H, T], and the factors of the heads of q and of k, [B, H + H_kv].

    Args:
        q: [B, T, H, F]; k: [B, T, H_kv, F].
        attention_mask: [B, T]. A dropped key may hold anything.
        state_size: the largest magnitude of keys that the initial state comes from, fp32 [B, H_kv]; or None.
    """
    q, k, mask = with_unit_stride(q), with_unit_stride(k), mask_as_bytes(attention_mask)
    batch, heads, feature_dim = q.shape[0], q.shape[2], q.shape[3]
    prepared = prepare("range", (q, k, k, mask), (0.0, 0.0, 1.0, 1.0), LARGEST)
    with on_gpu_of(q):
        bits = torch.zeros(batch, heads + k.shape[2], dtype=torch.int32, device=q.device)
        if state_size is not None:
            bits[:, heads:] = state_size.where(state_size.isfinite(), 0.0).view(torch.int32)
        new_q, new_k, ranges, factors = range_fake(q, k, attention_mask, state_size)

        def complete_largest() -> tuple[tuple[int, ...], dict[str, Any]]:
            grid, sizes = _range_sizes(q, k, prepared)
            return grid, {**sizes, "stride_mb": 0 if mask is None else mask.stride(0), "HAS_MASK": mask is not None}

        def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
            grid, sizes = _range_sizes(q, k, prepared)
            # A query times F, since its product with a key is a sum of F.
            return grid, {**sizes, "most_query": LARGEST / feature_dim, "most_key": LARGEST, "FORWARD": True}

        launch(prepared, "largest", _largest_kernel, {"q": q, "k": k, "bits": bits, "mask": mask}, complete_largest)
        tensors = {"q": q, "k": k, "new_q": new_q, "new_k": new_k, "bits": bits, "factors": factors, "ranges": ranges}
        launch(prepared, "multiply", _multiply_kernel, tensors, complete)
    return new_q, new_k, ranges, factors


def range_fake(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, state_size: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors of the sizes that `range_pass` returns."""
    batch, length, heads, _ = q.shape
    ranges = q.new_empty(batch, heads, length, dtype=torch.float32)
    factors = q.new_empty(batch, heads + k.shape[2], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), ranges, factors


def range_backward_pass(dq: Tensor, dk: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by q and k before `range_pass`, from those after it."""
    dq, dk = with_unit_stride(dq), with_unit_stride(dk)
    prepared = prepare("range backward", (dq, dk, dk), (0.0, 0.0, 1.0, 1.0))
    with on_gpu_of(dq):
        new_dq, new_dk = range_backward_fake(dq, dk, factors)

        def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
            grid, sizes = _range_sizes(dq, dk, prepared)
            return grid, {**sizes, "most_query": 1.0, "most_key": 1.0, "FORWARD": False}

        tensors = {"q": dq, "k": dk, "new_q": new_dq, "new_k": new_dk}
        tensors |= {"bits": factors, "factors": factors, "ranges": factors}
        launch(prepared, "multiply", _multiply_kernel, tensors, complete)
    return new_dq, new_dk


def range_backward_fake(dq: Tensor, dk: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the sizes that `range_backward_pass` returns."""
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape)


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
    x, out, stride_xb, stride_xt, stride_xh, T, ROWS,
    D: tl.constexpr, DP: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy x [B, T, H, D] to out [B, T, H, DP], followed by zeros.

    One program copies BLOCK of the ROWS = B * T * H rows.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    ok = (row < ROWS)[:, None]
    token = row // H
    source = (token // T) * stride_xb + (token % T) * stride_xt + (row % H) * stride_xh
    values = tl.load(x + source[:, None] + d[None, :], mask=ok & (d < D)[None, :], other=0.0)
    tl.store(out + row[:, None] * DP + d[None, :], values, mask=ok)


def pad_rows(prepared: PreparedCall, **tensors: Tensor) -> list[Tensor]:
    """Return q, k and v, given by name, with FP, FP and DP columns where their rows may not start at 16 bytes.

    The new columns are 0. Rows that start elsewhere cannot be copied to shared memory asynchronously, so the kernels
    would wait for every tile of keys. And ptxas makes wrong code of loops over such tiles: docs/kernels.md, "Limits of
    the compiler".
    """
    layout = prepared.layout
    return [_pad(x, layout.d if name == "v" else layout.f, name, prepared) for name, x in tensors.items()]


def _pad(x: Tensor, width: int, name: str, prepared: PreparedCall) -> Tensor:
    batch, length, heads, columns = x.shape
    if columns % 16 == 0:  # what Triton knows of a stride
        return x
    out = x.new_empty(batch, length, heads, width)
    rows, block = batch * length * heads, max(16, 4096 // width)

    def complete():
        sizes = {"T": length, "ROWS": rows, "D": columns, "DP": width, "H": heads, "BLOCK": block, "num_warps": 4}
        return (-(-rows // block),), {**strides_of("x", x), **sizes}

    launch(prepared, f"pad {name}", _pad_kernel, {"x": x, "out": out}, complete)
    return out


def without_padding(x: Tensor, columns: int) -> Tensor:
    """Return the first columns of a gradient of padded rows."""
    return x if x.shape[3] == columns else x[..., :columns].contiguous()
