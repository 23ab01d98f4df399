# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# ruff: noqa: SIM102
# Kernels are written in Triton's language, which only looks like Python. A test of a compile-time constant must not
# share a condition with a value that only the GPU knows, and a function needs one `return` for all its branches.
"""The forward pass: outputs from the keys of the segment at hand and from the state of the segments before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_decay_rebased import decay_of_tile, sum_decays
from .triton_features_rebased import (
    load_norm_matrix,
    load_state_rows,
    quadratic_rows,
    query_low_rows,
    query_shifts,
    query_tiles,
    times_norm_matrix,
)
from .triton_inputs_rebased import computes_in_float32, mask_as_bytes, pad_rows, with_unit_stride
from .triton_language_rebased import tl, triton
from .triton_launch_rebased import compiling_only, is_first, launch, on_gpu_of, prepare, strides_of
from .triton_layout_rebased import to_public
from .triton_plan_rebased import choose_sizes, compute_type, product_precision
from .triton_segments_rebased import allocate_states, count_slots, cut_into_segments, grid_of_blocks
from .triton_states_rebased import sum_states
from .triton_tiles_rebased import (
    compute_once,
    in_units,
    kept_rows,
    load_columns,
    load_rows,
    locate_block,
    move_to_registers,
    slots_before,
    state_pointers,
    store_rows,
    token_pointer,
    weight_polynomial,
)


@triton.jit
def _forward_tile(
    acc, z, xq, kt, values, rows, cols, ok, alpha, beta, row_decays, decays,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, DIAGONAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DECAY: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys, kt [FP, BM] and values [BM, BD], to acc [BM, BD] and z [BM].

    `row_decays` [BM] and those of the keys, at `decays`, are there if HAS_DECAY.
    """
    s = tl.dot(xq, kt, input_precision=PREC)
    u = weight_polynomial(s, alpha, beta, QUAD, LIN, CONST)
    if HAS_DECAY:
        u *= decay_of_tile(row_decays, decays, cols, DIAGONAL)
    if DIAGONAL:
        u = tl.where(rows[:, None] >= cols[None, :], u, 0.0)
    if HAS_MASK and CONST:
        u = tl.where(ok[None, :], u, 0.0)
    rounded = u.to(CT)
    if DIAGONAL:  # z of the same rounded numbers as acc: docs/kernels.md, "Queries with few keys"
        rounded = compute_once(rounded, CT)  # without it, compilers remove the round trip
        u = rounded.to(tl.float32)
    z += tl.sum(u, 1)
    acc = tl.dot(rounded, values, acc, input_precision=PREC)
    return acc, z


@triton.jit(do_not_specialize=["T", "SLOTS", "N", "RUN"])
def _forward_kernel(
    q, k, v, o, inverse_z, states, norms, mask, ranges, decays, cu_seqlens, segment_sequence, first_segment,
    first_slot,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_mb,
    T, SLOTS, N, RUN, alpha, beta, eps,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr,
    NR: tl.constexpr, H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    DV: tl.constexpr, FLAT: tl.constexpr,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INIT: tl.constexpr,
    RUNS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RANGES: tl.constexpr, HAS_DECAY: tl.constexpr,
    VARLEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Compute o [BM, BD] of one block of queries and one head, and inverse_z = 1 / (normaliser + eps).

    Grid: blocks of BD value dims * H * blocks of BM queries. Heads vary faster than blocks, because they share cache
    lines. Whatever does not depend on other loads is loaded first, so that one wait covers all of it.
    """
    D_BLOCKS: tl.constexpr = DP // BD
    first = tl.program_id(0) % D_BLOCKS == 0
    d_cols = (tl.program_id(0) % D_BLOCKS) * BD + tl.arange(0, BD)
    pid = tl.program_id(0) // D_BLOCKS
    h = pid % H
    hkv = h // G
    batch, seq, index, _count, start, tokens, row = locate_block(
        pid // H, BM, L, T, N, cu_seqlens, segment_sequence, first_segment, VARLEN
    )
    if row >= tokens:
        return
    b64 = tl.cast(batch, tl.int64)
    t64 = start.to(tl.int64)
    q = token_pointer(q, b64, t64, h, stride_qb, stride_qt, stride_qh)
    k = token_pointer(k, b64, t64, hkv, stride_kb, stride_kt, stride_kh)
    v = token_pointer(v, b64, t64, hkv, stride_vb, stride_vt, stride_vh)
    if HAS_MASK:
        mask += b64 * stride_mb + t64
    f = tl.arange(0, FP)
    block = tl.arange(0, BM)
    rows = row + block
    inside = rows < tokens
    if HAS_RANGES:
        alpha, beta, eps = in_units(ranges + (b64 * H + h) * T + t64, rows, inside, alpha, beta, eps, QUAD)  # [BM]
        alpha, beta = alpha[:, None], beta[:, None]
    xq = load_rows(q, rows, inside, stride_qt, f, F, F == FP, True)  # [BM, FP]
    row_decays = 0.0
    if HAS_DECAY:
        decays += (b64 * (H // G) + hkv) * T + t64
        row_decays = tl.load(decays + rows, mask=inside, other=0.0)
    ok = kept_rows(mask, rows, tokens, HAS_MASK)
    kt = load_columns(k, rows, ok, stride_kt, f, F, F == FP, True)  # [FP, BM]
    values = load_rows(v, rows, ok, stride_vt, d_cols, DV, DV == DP, True)  # [BM, BD]
    if HAS_STATE:
        before, has_whole, rest_offset, has_rest = slots_before(index, RUN, HAS_INIT, RUNS)
        state, norm = state_pointers(states, norms, before, seq, hkv, first_slot, SLOTS, NR, DP, H // G, VARLEN)
        rest_offset *= H // G
        if QUAD and NB <= 2:
            s0 = load_state_rows(state, rest_offset * (NR * DP), d_cols, has_whole, has_rest, 64, DP, RUNS, CT)
            s1 = load_state_rows(
                state + 64 * DP, rest_offset * (NR * DP), d_cols, has_whole, has_rest, 64, DP, RUNS, CT
            )
            has_8 = NB == 2
            s2 = load_state_rows(
                state + 128 * DP,
                rest_offset * (NR * DP),
                d_cols,
                has_whole & has_8,
                has_rest & has_8,
                16,
                DP,
                RUNS,
                CT,
            )
            top, rest = load_norm_matrix(norm, rest_offset * NR, f, f, has_whole, has_rest, NB, RUNS, CT)
    if FP == 16:
        xq = move_to_registers(xq, xq, CT, PREC)
    acc = tl.zeros([BM, BD], tl.float32)
    z = tl.zeros([BM], tl.float32)
    if not HAS_DECAY:
        acc, z = _forward_tile(
            acc, z, xq, kt, values, rows, rows, ok, alpha, beta, row_decays, decays, QUAD, LIN, CONST, True, HAS_MASK,
            False, CT, PREC,
        )  # fmt: skip
    if HAS_STATE:
        if has_whole | has_rest:
            if QUAD:
                if NB <= 2:
                    acc = query_shifts(acc, xq, s0, s1, s2, NB, CT, PREC)
                else:
                    acc = query_tiles(acc, q, rows, inside, stride_qt, state, d_cols, F, DP, NB, FLAT, CT, PREC)
                    top, rest = load_norm_matrix(norm, 0, f, f, True, False, NB, False, CT)
                quad = tl.sum(times_norm_matrix(xq, top, rest, PREC) * xq.to(tl.float32), 1)
                if not LIN and not CONST:
                    quad = tl.maximum(quad, 0.0)  # a sum of squares; rounding may leave it below 0
                z += quad
            if LIN or CONST:
                FIRST: tl.constexpr = quadratic_rows(NB) if QUAD else 0
                acc, z = query_low_rows(
                    acc, z, xq, state, norm, d_cols, alpha, beta, FP, DP, FIRST, LIN, CONST, True, HAS_RANGES, CT, PREC
                )
    if HAS_DECAY:  # so far there is what comes from the state
        left = tl.exp2(row_decays)
        acc *= left[:, None]
        z *= left
        acc, z = _forward_tile(
            acc, z, xq, kt, values, rows, rows, ok, alpha, beta, row_decays, decays, QUAD, LIN, CONST, True, HAS_MASK,
            True, CT, PREC,
        )  # fmt: skip
    for j in range(0, row, BM):
        cols = j + block
        ok = kept_rows(mask, cols, tokens, HAS_MASK)
        kt = load_columns(k, cols, ok, stride_kt, f, F, F == FP, HAS_MASK)
        values = load_rows(v, cols, ok, stride_vt, d_cols, DV, DV == DP, HAS_MASK)
        acc, z = _forward_tile(
            acc, z, xq, kt, values, rows, cols, ok, alpha, beta, row_decays, decays, QUAD, LIN, CONST, False, HAS_MASK,
            HAS_DECAY, CT, PREC,
        )  # fmt: skip
    z += eps
    inverse = tl.where(z == 0.0, 0.0, 1.0 / z)
    o += ((b64 * T + t64) * H + h) * D
    store_rows(o, rows, inside, H * D, d_cols, D, acc * inverse[:, None])
    tl.store(inverse_z + (b64 * H + h) * T + t64 + rows, inverse, mask=inside & first)


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, c0: float, c1: float, c2: float, scale: float, eps: float, output_final_state: bool,
    ranges: Tensor | None = None, log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, the final state, and what the backward pass reads: inverse_z [B, H, T], states and norms.

    The final state is empty if it is not asked for. `ranges` comes from `bring_into_range`, with q, k and the state.
    Other arguments as in `triton_rebased_attention`.
    """
    if computes_in_float32(q.dtype):
        arguments = (attention_mask, cu_seqlens, initial_state, c0, c1, c2, scale, eps, output_final_state)
        o, *rest = forward_pass(q.float(), k.float(), v.float(), *arguments, ranges, log_decay)
        return o.to(q.dtype), *rest
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    batch, length, heads, _ = q.shape
    kv_heads, head_dim = v.shape[2:]
    mask = mask_as_bytes(attention_mask)
    initial = initial_state is not None
    prepared = prepare(
        "forward", (q, k, v, mask, cu_seqlens, initial_state, ranges, log_decay), (c0, c1, c2, scale), eps,
        output_final_state, packed=cu_seqlens is not None, one_run=log_decay is not None,
    )  # fmt: skip
    if is_first(prepared, q.device):
        with on_gpu_of(q), compiling_only():
            forward_pass(
                q, k, v, attention_mask, cu_seqlens, initial_state, c0, c1, c2, scale, eps, output_final_state, ranges,
                log_decay,
            )  # fmt: skip
    layout, plan = prepared.layout, prepared.plan
    with on_gpu_of(q):
        q, k, v = pad_rows(prepared, q=q, k=k, v=v)
        cut = cut_into_segments(prepared, q, kv_heads, initial, output_final_state, cu_seqlens)
        decays = sum_decays(log_decay, prepared.segment, cu_seqlens)
        o = q.new_empty(batch, length, heads, head_dim)
        inverse_z = q.new_empty(batch, heads, length, dtype=torch.float32)
        # As many slots as the fake implementation says. A sequence that is one segment leaves some unused.
        sequences = cut.sequences if cut.packed else None
        slots = count_slots(batch, length, plan.segment, initial, output_final_state, sequences)
        states, norms = allocate_states(q, slots, kv_heads, layout, output_final_state)
        totals = None
        if cut.total > 0 or output_final_state:
            totals = sum_states(
                k, v, states, norms, cut, prepared, mask, kv_heads, head_dim, initial_state, output_final_state,
                decays=decays,
            )  # fmt: skip

        def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
            rows, warps, stages = plan.forward
            block_d = min(layout.d, 128)
            return grid_of_blocks(q, heads * (layout.d // block_d), rows, cut), {
                **strides_of("q", q), **strides_of("k", k), **strides_of("v", v),
                "stride_mb": 0 if mask is None else mask.stride(0), "T": length, "SLOTS": cut.slots,
                "N": cut.sequences, "RUN": cut.run, "alpha": layout.alpha, "beta": layout.beta,
                "eps": eps / layout.factor, "F": q.shape[-1], "D": head_dim, "DV": v.shape[-1], "FP": layout.f,
                "DP": layout.d, "BD": block_d, "NB": layout.blocks, "NR": layout.rows, "H": heads,
                "G": heads // kv_heads, "L": cut.length, "BM": rows, "FLAT": plan.flat, "QUAD": layout.quad,
                "LIN": layout.lin, "CONST": layout.const,
                "HAS_STATE": cut.packed or initial or length > cut.length, "HAS_INIT": int(initial),
                "RUNS": max(plan.runs) > 1, "HAS_MASK": mask is not None, "HAS_RANGES": ranges is not None,
                "HAS_DECAY": decays is not None, "VARLEN": cut.packed, "CT": compute_type(q.dtype),
                "PREC": product_precision(q.dtype), "num_warps": warps, "num_stages": stages,
                **plan.options("forward"),
            }  # fmt: skip

        tensors = {
            "q": q, "k": k, "v": v, "o": o, "inverse_z": inverse_z, "states": states, "norms": norms, "mask": mask,
            "ranges": ranges, "decays": decays, **cut.tables,
        }  # fmt: skip
        launch(prepared, "forward", _forward_kernel, tensors, complete)
        final = to_public(*totals, layout.feature_dim, head_dim, layout) if output_final_state else norms.new_empty(0)
    return o, final, inverse_z, states, norms


def forward_fake(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, c0: float, c1: float, c2: float, scale: float, eps: float, output_final_state: bool,
    ranges: Tensor | None = None, log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return empty tensors of the sizes that `forward_pass` returns."""
    batch, length, heads, feature_dim = q.shape
    kv_heads, head_dim = v.shape[2:]
    layout, plan = choose_sizes(feature_dim, head_dim, (c0, c1, c2), scale, q.dtype, q.device)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = count_slots(batch, length, plan.segment, initial_state is not None, output_final_state, sequences)
    if output_final_state:
        rows = batch if sequences is None else sequences
        final = q.new_empty(rows, kv_heads, layout.features, head_dim + 1, dtype=torch.float32)
    else:
        final = q.new_empty(0, dtype=torch.float32)
    return (
        q.new_empty(batch, length, heads, head_dim),
        final,
        q.new_empty(batch, heads, length, dtype=torch.float32),
        *allocate_states(q, slots, kv_heads, layout, output_final_state),
    )
