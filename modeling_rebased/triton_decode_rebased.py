# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""One token of generation: a kernel that adds it to the state in place and reads the output from the new state.

Unlike the other kernels, this one works on the public layout of a state and in fp32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .triton_inputs_rebased import mask_as_bytes, with_unit_stride
from .triton_language_rebased import tl, triton
from .triton_launch_rebased import launch, on_gpu_of, prepare
from .triton_layout_rebased import Layout
from .triton_tiles_rebased import round_to_power_of_2, store_rows


@triton.jit
def _decode_kernel(
    q, k, v, state, o, mask, state_indices, log_decay,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_sb, stride_sh, stride_sf, stride_sd,
    stride_mb,
    alpha, beta, eps,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, NF: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, BF: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_INDICES: tl.constexpr, HAS_DECAY: tl.constexpr, BARRIER: tl.constexpr,
):  # fmt: skip
    """Add phi(k) [v, 1] to state [NF, D + 1] in place, then read o of the G query heads from it, all in fp32.

    There is one program per batch row and key head. With several warps, Triton may hold a number in more than one, and
    a barrier keeps each from reading the state after another has stored it. Features are in the public order; their
    pairs of dims come from arithmetic, so that no table is needed. Tiles: features [BF], values [BF, BD], results
    [GP, BD], where GP is G padded to a power of 2.

    HAS_INDICES: `state` has slots instead of batch rows, and state_indices [B] says each row's slot. A row whose slot
    is negative gets 0. HAS_DECAY: the state is multiplied by exp(log_decay [B, H // G]) first.
    """
    pid = tl.program_id(0)
    b = pid // (H // G)
    hkv = pid % (H // G)
    b64 = b.to(tl.int64)
    kept = 1.0
    if HAS_MASK:
        kept = (tl.load(mask + b64 * stride_mb) != 0).to(tl.float32)
    q += b64 * stride_qb + hkv * G * stride_qh
    k += b64 * stride_kb + hkv * stride_kh
    v += b64 * stride_vb + hkv * stride_vh
    d = tl.arange(0, BD)
    g = tl.arange(0, GP)
    slot = b64
    if HAS_INDICES:
        slot = tl.load(state_indices + b64).to(tl.int64)
        if slot < 0:
            nothing = tl.zeros([GP, BD], o.dtype.element_ty)
            store_rows(o + (b64 * H + hkv * G) * D, g, g < G, D, d, D, nothing)
            return
    state += slot * stride_sb + hkv * stride_sh
    value = tl.load(v + d, mask=d < D, other=0.0).to(tl.float32)
    value = tl.where(kept > 0, value, 0.0)
    if G == 1:
        acc = tl.zeros([BF, BD], tl.float32)
        z = tl.zeros([BF], tl.float32)
    else:
        acc = tl.zeros([GP, BD], tl.float32)
        z = tl.zeros([GP], tl.float32)
    # A power of two per query, `shrink`, keeps the squares of large queries times those of large keys, which the state
    # may hold, in range. Numerator, normaliser and eps all carry its square.
    f = tl.arange(0, FP)
    if G == 1:
        most = tl.max(tl.abs(tl.load(q + f, mask=f < F, other=0.0).to(tl.float32)), 0)
    else:
        inside = (g < G)[:, None] & (f < F)[None, :]
        most = tl.max(
            tl.abs(tl.load(q + g[:, None] * stride_qh + f[None, :], mask=inside, other=0.0).to(tl.float32)), 1
        )
    shrink = round_to_power_of_2(1.0 / tl.maximum(most * F, 1.0))
    PAIRS: tl.constexpr = F * (F + 1) // 2 if QUAD else 0
    ROOT2: tl.constexpr = 1.4142135623730951
    if HAS_DECAY:
        left = tl.exp(tl.load(log_decay + b64 * (H // G) + hkv))
    for start in range(0, NF, BF):
        n = start + tl.arange(0, BF)
        exists = n < NF
        rows = state + n * stride_sf
        tile = tl.load(rows[:, None] + d[None, :] * stride_sd, mask=exists[:, None] & (d < D)[None, :], other=0.0)
        total = tl.load(rows + D * stride_sd, mask=exists, other=0.0)
        # Feature n is x_a x_b (times sqrt 2 where a < b), x_a, or 1.
        p = tl.minimum(tl.maximum(n - F, 0), F * (F - 1) // 2) if QUAD else n * 0
        root = tl.sqrt(((2 * F - 1) * (2 * F - 1) - 8 * p).to(tl.float32))
        a = ((2 * F - 1 - root) * 0.5).to(tl.int32)
        a = tl.where(a * (F - 1) - (a * (a - 1)) // 2 > p, a - 1, a)
        a = tl.where((a + 1) * (F - 1) - ((a + 1) * a) // 2 <= p, a + 1, a)
        c = a + 1 + p - (a * (F - 1) - (a * (a - 1)) // 2)
        square = (n < F) & (n < PAIRS)
        cross = (n >= F) & (n < PAIRS)
        linear = (n >= PAIRS) & (n < PAIRS + F) & LIN
        first = tl.where(square, n, tl.where(cross, a, n - PAIRS))
        second = tl.where(square, n, c)
        factor = tl.where(cross, ROOT2, 1.0)
        has_first = square | cross | linear
        has_second = square | cross
        x = tl.load(k + first, mask=has_first & exists, other=1.0).to(tl.float32)
        x *= tl.load(k + second, mask=has_second & exists, other=1.0).to(tl.float32)
        x = tl.where(kept > 0, x * factor, 0.0)
        if BARRIER:
            tl.debug_barrier()
        if HAS_DECAY:
            tile *= left
            total *= left
        tile += x[:, None] * value[None, :]
        total += x * kept
        tl.store(rows[:, None] + d[None, :] * stride_sd, tile, mask=exists[:, None] & (d < D)[None, :])
        tl.store(rows + D * stride_sd, total, mask=exists)
        weight = tl.where(has_second, factor, tl.where(linear, alpha, beta))
        weight = tl.where(exists, weight, 0.0)
        if G == 1:
            w = tl.load(q + first, mask=has_first & exists, other=1.0).to(tl.float32) * shrink
            w *= tl.load(q + second, mask=has_second & exists, other=1.0).to(tl.float32) * shrink
            w *= weight
            acc += w[:, None] * tile
            z += w * total
        else:
            ok = (g < G)[:, None] & exists[None, :]
            qg = q + g[:, None] * stride_qh
            w = tl.load(qg + first[None, :], mask=ok & has_first[None, :], other=1.0).to(tl.float32)
            w *= shrink[:, None]
            w *= tl.load(qg + second[None, :], mask=ok & has_second[None, :], other=1.0).to(tl.float32)
            w *= shrink[:, None]
            w *= weight[None, :]
            acc += tl.sum(w[:, :, None] * tile[None, :, :], 1)
            z += tl.sum(w * total[None, :], 1)
    if G == 1:
        z0 = tl.sum(z, 0) + eps * shrink * shrink
        out = tl.sum(acc, 0) * tl.where(z0 == 0.0, 0.0, 1.0 / z0)
        tl.store(o + (b64 * H + hkv) * D + d, out.to(o.dtype.element_ty), mask=d < D)
    else:
        z += eps * shrink * shrink
        out = acc * tl.where(z == 0.0, 0.0, 1.0 / z)[:, None]
        tl.store(
            o + (b64 * H + hkv * G + g)[:, None] * D + d[None, :], out.to(o.dtype.element_ty),
            mask=(g < G)[:, None] & (d < D)[None, :],
        )  # fmt: skip


def _tile_size(layout: Layout, heads: int) -> tuple[int, int]:
    """Return the features per step and the warps of a program: the tile [heads, features, values] is in registers.

    A query head that has its keys for itself reads many features at once, so that few loads wait for one another.
    Sums over features for several heads need a tile of three dimensions, which is for one warp.
    """
    numbers = layout.d * heads
    if heads == 1:
        return max(16, min(256, 16384 // numbers)), 8
    return max(1, min(16, 1024 // numbers)), 1


def decode_token(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, attention_mask: Tensor | None, state_indices: Tensor | None,
    c0: float, c1: float, c2: float, scale: float, eps: float, log_decay: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return o [B, 1, H_q, D] for one token per row, and change the state in place; see `triton_rebased_decode`."""
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    batch, _, heads, feature_dim = q.shape
    kv_heads, head_dim = v.shape[2:]
    mask = mask_as_bytes(attention_mask)
    if state_indices is not None:
        state_indices = state_indices.contiguous()
    if log_decay is not None:
        log_decay = log_decay.contiguous()
    prepared = prepare("decode", (q, k, v, state, mask, state_indices, log_decay), (c0, c1, c2, scale), eps)
    o = q.new_empty(batch, 1, heads, head_dim)

    def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
        layout = prepared.layout
        group = heads // kv_heads
        padded_group = 1 << (group - 1).bit_length()
        features, warps = _tile_size(layout, padded_group)
        strides = dict(zip(("stride_sb", "stride_sh", "stride_sf", "stride_sd"), state.stride()))
        for name, x in (("q", q), ("k", k), ("v", v)):
            strides |= {f"stride_{name}b": x.stride(0), f"stride_{name}h": x.stride(2)}
        return (batch * kv_heads,), {
            **strides, "stride_mb": 0 if mask is None else mask.stride(0), "alpha": layout.alpha,
            "beta": layout.beta, "eps": eps / layout.factor, "F": feature_dim, "FP": layout.f, "D": head_dim,
            "BD": layout.d, "NF": layout.features, "H": heads, "G": group, "GP": padded_group, "BF": features,
            "QUAD": layout.quad, "LIN": layout.lin, "CONST": layout.const, "HAS_MASK": mask is not None,
            "HAS_INDICES": state_indices is not None, "HAS_DECAY": log_decay is not None,
            "BARRIER": warps > 1, "num_warps": warps,
        }  # fmt: skip

    with on_gpu_of(q):
        tensors = {
            "q": q, "k": k, "v": v, "state": state, "o": o, "mask": mask, "state_indices": state_indices,
            "log_decay": log_decay,
        }  # fmt: skip
        launch(prepared, "decode", _decode_kernel, tensors, complete)
    return o


def decode_fake(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, attention_mask: Tensor | None, state_indices: Tensor | None,
    c0: float, c1: float, c2: float, scale: float, eps: float, log_decay: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return an empty tensor of the size that `decode_token` returns."""
    return q.new_empty(q.shape[0], 1, q.shape[2], v.shape[3])
