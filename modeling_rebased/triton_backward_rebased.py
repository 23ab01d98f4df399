# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# ruff: noqa: SIM102, SIM300
# Kernels are written in Triton's language, which only looks like Python. A test of a compile-time constant must not
# share a condition with a value that only the GPU knows, and a function needs one `return` for all its branches.
"""The backward pass: the forward pass's machinery once more, with a second state that sums over later queries.

With z_i the normaliser of query i (and eps), do_i the gradient of o_i and delta_i = do_i . o_i / z_i:

    dv_j = sum_i u(s_ij) do_i / z_i
    dk_j = sum_i (do_i . v_j / z_i - delta_i) u'(s_ij) q_i
    dq_i = sum_j (do_i . v_j / z_i - delta_i) u'(s_ij) k_j

Keys and queries of other segments come in through two states: that of the forward pass for dq, and one of later
queries, summed from the end of the sequence, for dk and dv. There are no atomic sums: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .configuration_rebased import n_features
from .triton_decay_rebased import decay_between, decay_gradient, decay_of_tile, sum_decays
from .triton_features_rebased import (
    block_selector,
    load_norm_matrix,
    load_shift_pairs,
    low_rows_gradient,
    quadratic_rows,
    query_low_rows,
    query_shift_pairs,
    query_tiles,
    shift_gradient,
    tile_of_blocks,
    times_norm_matrix,
)
from .triton_inputs_rebased import computes_in_float32, mask_as_bytes, pad_rows, with_unit_stride, without_padding
from .triton_language_rebased import tl, triton
from .triton_launch_rebased import (
    PreparedCall,
    compiling_only,
    grid_of_rows,
    is_first,
    launch,
    on_gpu_of,
    prepare,
    strides_of,
)
from .triton_layout_rebased import to_public
from .triton_plan_rebased import compute_type, product_precision
from .triton_segments_rebased import Segments, allocate_states, cut_into_segments, grid_of_blocks
from .triton_states_rebased import sum_states
from .triton_tiles_rebased import (
    as_columns,
    batch_row,
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
    wait_for_sum,
    weight_polynomial,
)


@triton.jit
def _scale_gradient(
    o, do, inverse_z, scaled_grad, delta, minus_delta, rows, inside, stride_dot, D: tl.constexpr, DP: tl.constexpr,
    H: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Compute do / z and delta = (do / z) . o of some rows, and store them as scaled_grad, delta and minus_delta.

    minus_delta has -delta as columns for the matrix units, see `as_columns`. No 1 / z is left in the other kernels.
    delta is made of do / z as it is stored, rounded: docs/kernels.md, "Queries with few keys".
    """
    d = tl.arange(0, DP)
    f = tl.arange(0, 16)
    grad = load_rows(do, rows, inside, stride_dot, d, D, D == DP, True).to(tl.float32)  # [BM, DP]
    out = load_rows(o, rows, inside, H * D, d, D, D == DP, True).to(tl.float32)
    scale = tl.load(inverse_z + rows, mask=inside, other=0.0)
    scaled = compute_once((grad * scale[:, None]).to(CT), CT)
    tl.store(scaled_grad + rows[:, None] * (H * DP) + d[None, :], scaled, mask=inside[:, None])
    delta_rows = tl.sum(scaled.to(tl.float32) * out, 1)
    tl.store(delta + rows, delta_rows, mask=inside)
    tl.store(minus_delta + rows[:, None] * (H * 16) + f[None, :], as_columns(-delta_rows, CT), mask=inside[:, None])
    return delta_rows, scaled


@triton.jit(do_not_specialize=["T", "N"])
def _scale_kernel(
    o, do, inverse_z, scaled_grad, delta, minus_delta, stride_dob, stride_dot, stride_doh, T, N,
    D: tl.constexpr, DP: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Do `_scale_gradient` alone, where the state's part of dq needs its results before `_dq_kernel` runs (F > 16)."""
    pid = tl.program_id(0)
    h = pid % H
    if batch_row() >= N:
        return
    b64 = batch_row().to(tl.int64)
    t64 = (pid // H).to(tl.int64) * BM
    rows = tl.arange(0, BM)
    first = (b64 * T + t64) * H + h
    vector = (b64 * H + h) * T + t64
    _scale_gradient(
        o + first * D, token_pointer(do, b64, t64, h, stride_dob, stride_dot, stride_doh), inverse_z + vector,
        scaled_grad + first * DP, delta + vector, minus_delta + first * 16, rows, rows + t64 < T, stride_dot, D, DP,
        H, CT,
    )  # fmt: skip


@triton.jit
def _dq_tile(
    acc, xq, grad, delta_rows, keys, vt, rows, cols, minus_half_alpha, row_decays, decays,
    QUAD: tl.constexpr, LIN: tl.constexpr, DIAGONAL: tl.constexpr, HAS_DECAY: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Add (do / z . v - delta) u'(s) / 2 k of one tile of keys to acc [BM, FP]; where u is linear, u' as it is.

    Decays are as in `_forward_tile`.
    """
    du = tl.dot(grad, vt, input_precision=PREC) - delta_rows[:, None]
    if QUAD:
        s = tl.dot(xq, tl.trans(keys), input_precision=PREC)
        if LIN:
            s -= minus_half_alpha  # not s += half_alpha: docs/kernels.md, "Limits of the compiler"
        du *= s
    if HAS_DECAY:
        du *= decay_of_tile(row_decays, decays, cols, DIAGONAL)
    if DIAGONAL:
        du = tl.where(rows[:, None] >= cols[None, :], du, 0.0)
    return tl.dot(du.to(CT), keys, acc, input_precision=PREC)  # a dropped key is 0 here


@triton.jit(do_not_specialize=["T", "SLOTS", "N", "RUN"])
def _dq_kernel(
    q, k, v, o, do, inverse_z, scaled_grad, delta, minus_delta, dq, query_part, from_state, states, norms, mask,
    ranges, decays, cu_seqlens, segment_sequence, first_segment, first_slot,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_dob, stride_dot, stride_doh, stride_mb,
    T, SLOTS, N, RUN, alpha, half_alpha,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, DV: tl.constexpr,
    QUAD: tl.constexpr, LIN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INIT: tl.constexpr, RUNS: tl.constexpr,
    HAS_FROM_STATE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RANGES: tl.constexpr, HAS_DECAY: tl.constexpr,
    VARLEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Compute dq [BM, F] of one block of queries.

    The kernel stores scaled_grad, delta and minus_delta on the way. HAS_FROM_STATE says that they are there already,
    with the state's part of dq in `from_state` (F > 16). HAS_DECAY: q . dq / 2 goes to query_part [B, H, T]. Grid: H *
    blocks of BM queries.
    """
    pid = tl.program_id(0)
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
    d = tl.arange(0, DP)
    block = tl.arange(0, BM)
    rows = row + block
    inside = rows < tokens
    first = (b64 * T + t64) * H + h
    vector = (b64 * H + h) * T + t64
    if HAS_RANGES:
        half_alpha = (half_alpha * tl.load(ranges + vector + rows, mask=inside, other=1.0))[:, None]
    row_decays = 0.0
    if HAS_DECAY:
        decays += (b64 * (H // G) + hkv) * T + t64
        row_decays = tl.load(decays + rows, mask=inside, other=0.0)
    xq = load_rows(q, rows, inside, stride_qt, f, F, F == FP, True)
    ok = kept_rows(mask, rows, tokens, HAS_MASK)
    keys = load_rows(k, rows, ok, stride_kt, f, F, F == FP, True)  # [BM, FP]
    vt = load_columns(v, rows, ok, stride_vt, d, DV, DV == DP, True)  # [DP, BM]
    if HAS_STATE:
        before, has_whole, rest_offset, has_rest = slots_before(index, RUN, HAS_INIT, RUNS)
        state, norm = state_pointers(states, norms, before, seq, hkv, first_slot, SLOTS, NR, DP, H // G, VARLEN)
        rest_offset *= H // G
        if QUAD and NB <= 2:
            s0, s1, s2, s3, s4 = load_shift_pairs(
                state, rest_offset * (NR * DP), d, has_whole, has_rest, NB, DP, RUNS, CT
            )
            top, rest = load_norm_matrix(norm, rest_offset * NR, f, f, has_whole, has_rest, NB, RUNS, CT)
    acc = tl.zeros([BM, FP], tl.float32)
    HELD: tl.constexpr = FP == 16 and DP <= 64 and CT == tl.bfloat16  # do / z stays in registers
    if HAS_FROM_STATE:
        delta_rows = tl.load(delta + vector + rows, mask=inside, other=0.0)
    else:
        delta_rows, grad = _scale_gradient(
            o + first * D, token_pointer(do, b64, t64, h, stride_dob, stride_dot, stride_doh), inverse_z + vector,
            scaled_grad + first * DP, delta + vector, minus_delta + first * 16, rows, inside, stride_dot, D, DP, H, CT,
        )  # fmt: skip
    if HELD:
        grad = move_to_registers(grad, keys, CT, PREC)
    else:
        if not HAS_FROM_STATE:
            tl.debug_barrier()  # read back into shared memory, because there are no registers for it
        grad = load_rows(scaled_grad + first * DP, rows, inside, H * DP, d, DP, True, True)
    if FP == 16:
        xq = move_to_registers(xq, xq, CT, PREC)
    if not HAS_DECAY:
        acc = _dq_tile(
            acc, xq, grad, delta_rows, keys, vt, rows, rows, -half_alpha, row_decays, decays, QUAD, LIN, True, False,
            CT, PREC,
        )  # fmt: skip
    if HAS_STATE:
        if has_whole | has_rest:
            if QUAD:
                if NB <= 2:
                    acc = shift_gradient(acc, xq, grad, s0, s1, s2, s3, s4, NB, CT, PREC)
            if LIN:
                FIRST: tl.constexpr = quadratic_rows(NB) if QUAD else 0
                acc = low_rows_gradient(
                    acc, grad, -delta_rows, state, norm, half_alpha if QUAD else alpha, FIRST, FP, DP, CT, PREC
                )  # fmt: skip
    if HAS_DECAY:  # so far there is what comes from the state
        left = tl.exp2(row_decays)[:, None]
        acc = _dq_tile(
            acc * left, xq, grad, delta_rows, keys, vt, rows, rows, -half_alpha, row_decays, decays, QUAD, LIN, True,
            True, CT, PREC,
        )  # fmt: skip
    for j in range(0, row, BM):
        cols = j + block
        ok = kept_rows(mask, cols, tokens, HAS_MASK)
        keys = load_rows(k, cols, ok, stride_kt, f, F, F == FP, HAS_MASK)
        vt = load_columns(v, cols, ok, stride_vt, d, DV, DV == DP, HAS_MASK)
        acc = _dq_tile(
            acc, xq, grad, delta_rows, keys, vt, rows, cols, -half_alpha, row_decays, decays, QUAD, LIN, False,
            HAS_DECAY, CT, PREC,
        )  # fmt: skip
    extra = tl.zeros([BM, FP], tl.float32)
    if HAS_STATE:
        if has_whole | has_rest:
            if QUAD:
                if NB > 2:
                    top, rest = load_norm_matrix(norm, 0, f, f, True, False, NB, False, CT)
                # Not before the loop: if acc were changed there, the products would run one by one, and waiting for
                # their end takes registers.
                extra = delta_rows[:, None] * times_norm_matrix(xq, top, rest, PREC)
    if HAS_FROM_STATE:
        extra -= tl.load(
            from_state + first * FP + rows[:, None] * (H * FP) + f[None, :], mask=inside[:, None], other=0.0
        )
    if HAS_DECAY:
        extra *= left
        part = tl.sum(xq.to(tl.float32) * (acc - extra), 1)
        tl.store(query_part + vector + rows, part, mask=inside)
    if QUAD:
        acc = 2.0 * (acc - extra)
    elif not LIN:
        acc *= 0.0
    store_rows(dq + first * F, rows, inside, H * F, f, F, acc)


@triton.jit
def _dkdv_tile(
    dk, dv, xk, xv, pick, queries, grad, minus, rows, cols, ranges, row_decays, decays, at, ok, alpha, half_alpha,
    beta,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, DIAGONAL: tl.constexpr, HAS_RANGES: tl.constexpr,
    HAS_DECAY: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to dk [BM, FP] and dv [BM, DP]; tiles are transposed, [keys, queries].

    -delta reaches all rows through a matrix product, pick [BM, 16] @ minus^T. As a vector along the columns it would
    take 16 loads per thread. `ranges` has a number for each of the queries `at`, see `in_units`. `decays` has one too,
    and those of the keys are `row_decays`.
    """
    if HAS_RANGES:
        alpha, beta, _eps = in_units(ranges, at, ok, alpha, beta, 0.0, QUAD)
        alpha, beta = alpha[None, :], beta[None, :]
        half_alpha = alpha * 0.5
    du = tl.dot(pick, tl.trans(minus), input_precision=PREC)
    du = tl.dot(xv, tl.trans(grad), du, input_precision=PREC)
    if QUAD or LIN:
        s = tl.dot(xk, tl.trans(queries), input_precision=PREC)
        # With a decay the mask comes last. No part of u is then computed before the loop over the query heads, which
        # ptxas compiles wrongly: docs/kernels.md, "A decay in bfloat16".
        if DIAGONAL and not LIN and not CONST and not HAS_DECAY:
            s = tl.where(cols[None, :] >= rows[:, None], s, 0.0)  # a factor of u and of du
        u = weight_polynomial(s, alpha, beta, QUAD, LIN, CONST)
    else:
        u = du * 0.0 + 1.0
    if QUAD:
        if LIN:
            s += half_alpha
        du *= s
    if HAS_DECAY:
        left = decay_between(tl.load(decays + at, mask=ok, other=0.0)[None, :], row_decays[:, None])
        u *= left
        du *= left
    if DIAGONAL and (LIN or CONST or HAS_DECAY):
        below = cols[None, :] >= rows[:, None]
        u = tl.where(below, u, 0.0)
        du = tl.where(below, du, 0.0)
    dv = tl.dot(u.to(CT), grad, dv, input_precision=PREC)
    if QUAD or LIN:
        dk = tl.dot(du.to(CT), queries, dk, input_precision=PREC)
    return dk, dv


@triton.jit(do_not_specialize=["T", "SLOTS", "N", "RUN"])
def _dkdv_kernel(
    q, k, v, scaled_grad, minus_delta, dk, dv, key_part, from_state, states, norms, mask, ranges, decays,
    cu_seqlens, segment_sequence, first_segment, first_slot,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_mb,
    T, SLOTS, N, RUN, alpha, half_alpha, beta,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DV: tl.constexpr, FLAT: tl.constexpr,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INIT: tl.constexpr,
    RUNS: tl.constexpr, HAS_FROM_STATE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RANGES: tl.constexpr,
    HAS_DECAY: tl.constexpr, VARLEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Compute dk [BM, F] and dv [BM, D] of one block of keys, summed over the G query heads that share them.

    Tiles are BM keys by BN queries. Later segments come in through the state of later queries. HAS_DECAY: k . dk / 2
    goes to key_part [B, HKV, T]. Grid: HKV * blocks of BM keys.
    """
    pid = tl.program_id(0)
    hkv = pid % HKV
    batch, seq, index, count, start, tokens, row = locate_block(
        pid // HKV, BM, L, T, N, cu_seqlens, segment_sequence, first_segment, VARLEN
    )
    if row >= tokens:
        return
    b64 = tl.cast(batch, tl.int64)
    t64 = start.to(tl.int64)
    k = token_pointer(k, b64, t64, hkv, stride_kb, stride_kt, stride_kh)
    v = token_pointer(v, b64, t64, hkv, stride_vb, stride_vt, stride_vh)
    if HAS_MASK:
        mask += b64 * stride_mb + t64
    f = tl.arange(0, FP)
    d = tl.arange(0, DP)
    f16 = tl.arange(0, 16)
    block = tl.arange(0, BN)
    rows = row + tl.arange(0, BM)
    inside = rows < tokens
    ok = kept_rows(mask, rows, tokens, HAS_MASK)
    xk = load_rows(k, rows, ok, stride_kt, f, F, F == FP, True)
    xv = load_rows(v, rows, ok, stride_vt, d, DV, DV == DP, True)
    if FP == 16 and DP <= 64:
        xv = move_to_registers(xv, xk, CT, PREC)
    row_decays = 0.0
    if HAS_DECAY:
        decays += (b64 * HKV + hkv) * T + t64
        row_decays = tl.load(decays + rows, mask=inside, other=0.0)
    pick = tl.where((f16 < 2)[None, :], rows[:, None] * 0 + 1.0, 0.0).to(CT)
    acc_k = tl.zeros([BM, FP], tl.float32)
    acc_v = tl.zeros([BM, DP], tl.float32)
    if HAS_STATE:
        before, has_whole, rest_offset, has_rest = slots_before(count - 1 - index, RUN, HAS_INIT, RUNS)
        state, norm = state_pointers(states, norms, before, seq, hkv, first_slot, SLOTS, NR, DP, HKV, VARLEN)
        rest_offset *= HKV
        if QUAD and NB <= 2:
            top, rest = load_norm_matrix(norm, rest_offset * NR, f, f, has_whole, has_rest, NB, RUNS, CT)
        if has_whole | has_rest:
            ones = tl.full([BM], 1.0, tl.float32)
            if QUAD:
                if NB <= 2:
                    # Loaded here and used for dk first, so that fewer of them wait in registers.
                    s0, s1, s2, s3, s4 = load_shift_pairs(
                        state, rest_offset * (NR * DP), d, has_whole, has_rest, NB, DP, RUNS, CT
                    )
                    held = move_to_registers(xk, xk, CT, PREC)  # not for the loops too: there are no registers for it
                    acc_k = shift_gradient(acc_k, held, xv, s0, s1, s2, s3, s4, NB, CT, PREC)
                    # phi(-x) = phi(x). With x, the compiler would keep the factors of one use for the other.
                    minus_held = (held.to(tl.float32) * -1.0).to(held.dtype)
                    acc_v = query_shift_pairs(acc_v, minus_held, s0, s1, s2, s3, s4, NB, CT, PREC)
                    acc_k += times_norm_matrix(held, top, rest, PREC)
                else:
                    acc_v = query_tiles(acc_v, k, rows, ok, stride_kt, state, d, F, DP, NB, FLAT, CT, PREC)
                    top, rest = load_norm_matrix(norm, 0, f, f, True, False, NB, False, CT)
                    acc_k += times_norm_matrix(xk, top, rest, PREC)
            if HAS_FROM_STATE:
                base = from_state + ((b64 * T + t64) * HKV + hkv) * FP
                acc_k += tl.load(base + rows[:, None] * (HKV * FP) + f[None, :], mask=inside[:, None], other=0.0)
            if LIN or CONST:
                FIRST: tl.constexpr = quadratic_rows(NB) if QUAD else 0
                acc_v, ones = query_low_rows(
                    acc_v, ones, xk, state, norm, d, 1.0, 1.0, FP, DP, FIRST, LIN, CONST, False, False, CT, PREC
                )
                if LIN:
                    acc_k = low_rows_gradient(
                        acc_k, xv, ones, state, norm, 0.5 if QUAD else 1.0, FIRST, FP, DP, CT, PREC
                    )  # fmt: skip
            if HAS_DECAY:
                left = tl.exp2(tl.load(decays + tokens - 1) - row_decays)[:, None]
                acc_k *= left
                acc_v *= left
    for g in range(G):
        h = hkv * G + g
        first = (b64 * T + t64) * (HKV * G) + h
        qg = token_pointer(q, b64, t64, h, stride_qb, stride_qt, stride_qh)
        dg = scaled_grad + first * DP
        ag = minus_delta + first * 16
        rg = ranges
        if HAS_RANGES:
            rg += (b64 * (HKV * G) + h) * T + t64
        full = row + BM
        if BM == BN:
            queries = load_rows(qg, rows, inside, stride_qt, f, F, F == FP, True)  # [BM, FP]
            grad = load_rows(dg, rows, inside, HKV * G * DP, d, DP, True, True)  # [BM, DP]
            minus = load_rows(ag, rows, inside, HKV * G * 16, f16, 16, True, True)  # [BM, 16]
            acc_k, acc_v = _dkdv_tile(
                acc_k, acc_v, xk, xv, pick, queries, grad, minus, rows, rows, rg, row_decays, decays, rows,
                inside, alpha, half_alpha, beta, QUAD, LIN, CONST, True, HAS_RANGES, HAS_DECAY, CT, PREC,
            )  # fmt: skip
        else:
            # A block has several narrow tiles on its diagonal, and a loop keeps their loads ahead. The last tile of
            # all comes with them if it is not full: it needs a mask too, and a loop of its own would take registers.
            full += tl.maximum(tokens - row - BM, 0) // BN * BN
            end = tl.minimum(row + BM, tokens) + tl.where(full < tokens, BN, 0)
            for i in range(row, end, BN):
                cols = tl.where(i < row + BM, i, full) + block
                later = cols < tokens
                queries = load_rows(qg, cols, later, stride_qt, f, F, F == FP, True)
                grad = load_rows(dg, cols, later, HKV * G * DP, d, DP, True, True)
                minus = load_rows(ag, cols, later, HKV * G * 16, f16, 16, True, True)
                acc_k, acc_v = _dkdv_tile(
                    acc_k, acc_v, xk, xv, pick, queries, grad, minus, rows, cols, rg, row_decays, decays, cols,
                    later, alpha, half_alpha, beta, QUAD, LIN, CONST, True, HAS_RANGES, HAS_DECAY, CT, PREC,
                )  # fmt: skip
                acc_k = wait_for_sum(acc_k, CT)
                acc_v = wait_for_sum(acc_v, CT)
        after = (row + BM).to(tl.int64)
        qg += after * stride_qt
        dg += after * (HKV * G * DP)
        ag += after * (HKV * G * 16)
        if CT == tl.bfloat16 or BM != BN:  # in fp32, where the loop is long, one copy less of it to compile
            # Full tiles need no mask, and with pointers that walk an address is a sum of two numbers.
            if BM == BN:
                full += tl.maximum(tokens - row - BM, 0) // BN * BN
            later = tl.full([BN], True, tl.int1)
            for step in range(row + BM, full, BN):
                queries = load_rows(qg, block, later, stride_qt, f, F, F == FP, False)
                grad = load_rows(dg, block, later, HKV * G * DP, d, DP, True, False)
                minus = load_rows(ag, block, later, HKV * G * 16, f16, 16, True, False)
                qg += BN * stride_qt
                dg += BN * HKV * G * DP
                ag += BN * HKV * G * 16
                acc_k, acc_v = _dkdv_tile(
                    acc_k, acc_v, xk, xv, pick, queries, grad, minus, rows, rows, rg, row_decays, decays,
                    step + block, later, alpha, half_alpha, beta, QUAD, LIN, CONST, False, HAS_RANGES, HAS_DECAY, CT,
                    PREC,
                )  # fmt: skip
                if BM != BN:
                    acc_k = wait_for_sum(acc_k, CT)
                    acc_v = wait_for_sum(acc_v, CT)
        if BM == BN:
            for i in tl.range(full, tokens, BN, num_stages=1):  # the last tile, if it is not full
                later = i + block < tokens
                queries = load_rows(qg, i - full + block, later, stride_qt, f, F, F == FP, True)
                grad = load_rows(dg, i - full + block, later, HKV * G * DP, d, DP, True, True)
                minus = load_rows(ag, i - full + block, later, HKV * G * 16, f16, 16, True, True)
                acc_k, acc_v = _dkdv_tile(
                    acc_k, acc_v, xk, xv, pick, queries, grad, minus, rows, rows, rg, row_decays, decays,
                    i + block, later, alpha, half_alpha, beta, QUAD, LIN, CONST, False, HAS_RANGES, HAS_DECAY, CT,
                    PREC,
                )  # fmt: skip
    if HAS_DECAY:
        part = tl.sum(xk.to(tl.float32) * acc_k, 1)
        tl.store(key_part + (b64 * HKV + hkv) * T + t64 + rows, part, mask=inside)
    if QUAD:
        acc_k *= 2.0
    if HAS_MASK:
        acc_k = tl.where(ok[:, None], acc_k, 0.0)
        acc_v = tl.where(ok[:, None], acc_v, 0.0)
    dk += ((b64 * T + t64) * HKV + hkv) * F
    dv += ((b64 * T + t64) * HKV + hkv) * D
    store_rows(dk, rows, inside, HKV * F, f, F, acc_k)
    store_rows(dv, rows, inside, HKV * D, d, D, acc_v)


@triton.jit(do_not_specialize=["T", "SLOTS", "N"])
def _gradient_kernel(
    x, y, from_state, states, mask, cu_seqlens, segment_sequence, first_segment, first_slot,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_mb,
    T, SLOTS, N,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    KEYS: tl.constexpr, HAS_INIT: tl.constexpr, HAS_MASK: tl.constexpr, VARLEN: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Compute 16 dims of half the gradient by x that comes through the state (see `shift_gradient`), in fp32 (F > 16).

    KEYS: x and y are k and v, and the state is that of later queries; otherwise they are q and do / z, and the state
    is that of earlier keys. The norms' part is left to the caller. Grid: slices of 16 dims * H * blocks of BM rows.
    The kernel walks the ordered pairs of blocks (i in the slice, j).
    """
    slice_ = tl.program_id(0) % (FP // 16)
    pid = tl.program_id(0) // (FP // 16)
    h = pid % H
    hkv = h // G
    batch, seq, index, count, start, tokens, row = locate_block(
        pid // H, BM, L, T, N, cu_seqlens, segment_sequence, first_segment, VARLEN
    )
    if row >= tokens:
        return
    b64 = tl.cast(batch, tl.int64)
    t64 = start.to(tl.int64)
    x = token_pointer(x, b64, t64, h, stride_xb, stride_xt, stride_xh)
    y = token_pointer(y, b64, t64, h, stride_yb, stride_yt, stride_yh)
    if HAS_MASK:
        mask += b64 * stride_mb + t64
    rows = row + tl.arange(0, BM)
    inside = rows < tokens
    ok = kept_rows(mask, rows, tokens, HAS_MASK)
    n = tl.arange(0, 64)
    f = tl.arange(0, 16)
    d = tl.arange(0, DP)
    acc = tl.zeros([BM, 16], tl.float32)
    if KEYS:
        before = count - 2 - index + HAS_INIT
    else:
        before = index - 1 + HAS_INIT
    first = (b64 * T + t64) * H + h
    if before >= 0:
        state, _norm = state_pointers(states, states, before, seq, hkv, first_slot, SLOTS, NR, DP, H // G, VARLEN)
        values = load_rows(y, rows, ok, stride_yt, d, D, D == DP, True)  # [BM, DP]
        inner_selector = block_selector(False, False, x.dtype.element_ty)
        for step in range(2 * NB):
            half = step % 2
            i = slice_ * 2 + half
            j = step // 2
            # The stored tile is (min, max). Read from the other side, its rows swap their two indices.
            low = tl.minimum(i, j)
            high = tl.maximum(i, j)
            tile = tile_of_blocks(low, high, NB)
            feature = tl.where(i < NB, tile, 0) * 64 + tl.where(i <= j, n, (n % 8) * 8 + n // 8)
            xj = load_rows(x, rows, ok, stride_xt, j * 8 + f, F, False, True)
            inner = tl.dot(xj, inner_selector, input_precision=PREC)
            s = tl.load(state + feature[:, None] * DP + d[None, :])  # [64, DP]
            g = tl.dot(values, tl.trans(s.to(CT)), input_precision=PREC)
            # Dims past the last block, where F is not a multiple of 16, are computed from tile 0 and never read.
            fold = (f[:, None] == (n // 8 + half * 8)[None, :]).to(CT)  # [16, 64]
            acc = tl.dot((g * inner).to(CT), tl.trans(fold), acc, input_precision=PREC)
    tl.store(
        from_state + first * FP + rows[:, None] * (H * FP) + (slice_ * 16 + f)[None, :], acc, mask=inside[:, None]
    )


def _sizes(
    q: Tensor, mask: Tensor | None, cut: Segments, prepared: PreparedCall, head_dim: int, tile: tuple[int, int, int]
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments that the kernels of dq, of dk and dv, and of their parts through a state have in common."""
    layout = prepared.layout
    rows, warps, stages = tile
    return {
        "stride_mb": 0 if mask is None else mask.stride(0), "T": q.shape[1], "SLOTS": cut.slots, "N": cut.sequences,
        "F": q.shape[3], "D": head_dim, "FP": layout.f, "DP": layout.d, "NB": layout.blocks, "NR": layout.rows,
        "L": cut.length, "BM": rows, "HAS_MASK": mask is not None, "VARLEN": cut.packed, "CT": compute_type(q.dtype),
        "PREC": product_precision(q.dtype), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def allocate_scaled(grad: Tensor, inverse_z: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for what `_scale_gradient` stores: scaled_grad of so many columns, delta and minus_delta."""
    shape = grad.shape[:3]
    return grad.new_empty(*shape, columns), torch.empty_like(inverse_z), grad.new_empty(*shape, 16)


def launch_scale(
    prepared: PreparedCall, grad: Tensor, o: Tensor, inverse_z: Tensor, scaled_grad: Tensor, delta: Tensor,
    minus_delta: Tensor,
) -> None:  # fmt: skip
    """Fill scaled_grad [B, T, H, DP], delta [B, H, T] and minus_delta [B, T, H, 16] by `_scale_kernel`."""
    batch, length, heads, head_dim = grad.shape

    def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
        return grid_of_rows(-(-length // 64) * heads, batch), {
            **strides_of("do", grad), "T": length, "N": batch, "D": head_dim, "DP": prepared.layout.d, "H": heads,
            "BM": 64, "CT": compute_type(grad.dtype),
        }  # fmt: skip

    tensors = {
        "o": o, "do": grad, "inverse_z": inverse_z, "scaled_grad": scaled_grad, "delta": delta,
        "minus_delta": minus_delta,
    }  # fmt: skip
    launch(prepared, "scale", _scale_kernel, tensors, complete)


def _gradient_through_state(
    x: Tensor, y: Tensor, states: Tensor, mask: Tensor | None, cut: Segments, prepared: PreparedCall, group: int,
    keys: bool, has_initial: bool,
) -> Tensor:  # fmt: skip
    """Return half the gradient by x [B, T, heads, F] that comes through the state, fp32 [B, T, heads, FP].

    See `_gradient_kernel` for x, y and `keys`. `group` is the number of heads of x per state.
    """
    batch, length, heads, _ = x.shape
    layout, plan = prepared.layout, prepared.plan
    from_state = x.new_empty(batch, length, heads, layout.f, dtype=torch.float32)

    def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
        return grid_of_blocks(x, heads * (layout.f // 16), plan.gradient[0], cut), {
            **strides_of("x", x), **strides_of("y", y),
            **_sizes(x, mask, cut, prepared, y.shape[-1], plan.gradient), "H": heads, "G": group, "KEYS": keys,
            "HAS_INIT": int(has_initial), **plan.options("gradient"),
        }  # fmt: skip

    tensors = {"x": x, "y": y, "from_state": from_state, "states": states, "mask": mask, **cut.tables}
    name = "gradient of keys" if keys else "gradient of queries"
    launch(prepared, name, _gradient_kernel, tensors, complete)
    return from_state


def query_gradient(
    prepared: PreparedCall, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, inverse_z: Tensor,
    states: Tensor, norms: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, has_initial: bool, has_last: bool,
    ranges: Tensor | None, decays: Tensor | None = None, query_part: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, and scaled_grad, delta and minus_delta, which the gradients of keys and values need.

    q, k and v come from `pad_rows` and mask from `mask_as_bytes`; the others are as in `backward_pass`, with unit
    strides. With `decays`, from `sum_decays`, q . dq / 2 is stored in query_part, fp32 [B, H_q, T].
    """
    layout, plan = prepared.layout, prepared.plan
    _, length, heads, _ = q.shape
    kv_heads, head_dim = v.shape[2], grad.shape[3]
    group = heads // kv_heads
    # Beyond 16 dims the state's part of a gradient has a kernel of its own.
    separate = layout.quad and layout.blocks > 2
    cut = cut_into_segments(prepared, q, kv_heads, has_initial, has_last, cu_seqlens)
    dq = q.new_empty(q.shape)
    scaled_grad, delta, minus_delta = allocate_scaled(grad, inverse_z, layout.d)
    has_state = cut.packed or has_initial or length > cut.length
    from_state = None
    if separate and has_state:
        launch_scale(prepared, grad, o, inverse_z, scaled_grad, delta, minus_delta)
        from_state = _gradient_through_state(q, scaled_grad, states, None, cut, prepared, group, False, has_initial)

    def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
        return grid_of_blocks(q, heads, plan.dq[0], cut), {
            **strides_of("q", q), **strides_of("k", k), **strides_of("v", v), **strides_of("do", grad),
            **_sizes(q, mask, cut, prepared, head_dim, plan.dq), "RUN": cut.run, "alpha": layout.alpha,
            "half_alpha": layout.alpha / 2 if layout.quad else 0.0, "DV": v.shape[-1], "H": heads, "G": group,
            "QUAD": layout.quad, "LIN": layout.lin, "HAS_STATE": has_state, "HAS_INIT": int(has_initial),
            "RUNS": max(plan.runs) > 1, "HAS_FROM_STATE": separate and has_state,
            "HAS_RANGES": ranges is not None, "HAS_DECAY": decays is not None, **plan.options("dq"),
        }  # fmt: skip

    tensors = {
        "q": q, "k": k, "v": v, "scaled_grad": scaled_grad, "minus_delta": minus_delta, "mask": mask,
        "ranges": ranges, "decays": decays, "query_part": query_part, **cut.tables, "o": o, "do": grad,
        "inverse_z": inverse_z, "delta": delta, "dq": dq, "from_state": from_state, "states": states, "norms": norms,
    }  # fmt: skip
    launch(prepared, "dq", _dq_kernel, tensors, complete)
    return without_padding(dq, layout.feature_dim), scaled_grad, delta, minus_delta


def key_gradients(
    prepared: PreparedCall, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, dv: Tensor,
    scaled_grad: Tensor, delta: Tensor, minus_delta: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    grad_initial: bool, ranges: Tensor | None, decays: Tensor | None = None, key_part: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dk and the gradient of the initial state, which is empty if it is not asked for, and fill dv.

    With `decays`, k . dk / 2 is stored in key_part, fp32 [B, H_kv, T].
    """
    layout, plan = prepared.layout, prepared.plan
    _, length, heads, _ = q.shape
    kv_heads, head_dim = dv.shape[2:]
    final = grad_final is not None
    separate = layout.quad and layout.blocks > 2
    # The state is that of later queries. Its first slot is the gradient of the final state.
    cut = cut_into_segments(prepared, q, kv_heads, final, grad_initial, cu_seqlens, reverse=True)
    has_state = cut.packed or final or length > cut.length
    dk = k.new_empty(k.shape)
    later, later_norms = allocate_states(q, cut.total, kv_heads, layout, grad_initial)
    totals = None
    if cut.total > 0 or grad_initial:
        totals = sum_states(
            q, scaled_grad, later, later_norms, cut, prepared, None, kv_heads, head_dim, grad_final, grad_initial,
            delta, minus_delta, ranges, decays,
        )  # fmt: skip
    from_state = None
    if separate and has_state:
        from_state = _gradient_through_state(k, v, later, mask, cut, prepared, 1, True, final)

    def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
        return grid_of_blocks(q, kv_heads, plan.dkdv[0], cut), {
            **strides_of("q", q), **strides_of("k", k), **strides_of("v", v),
            **_sizes(q, mask, cut, prepared, head_dim, plan.dkdv), "RUN": cut.run, "alpha": layout.alpha,
            "half_alpha": layout.alpha / 2 if layout.quad else 0.0, "beta": layout.beta, "DV": v.shape[-1],
            "HKV": kv_heads, "G": heads // kv_heads, "FLAT": plan.flat, "BN": plan.narrow or plan.dkdv[0],
            "QUAD": layout.quad, "LIN": layout.lin, "CONST": layout.const, "HAS_STATE": has_state,
            "HAS_INIT": int(final), "RUNS": max(plan.runs) > 1, "HAS_FROM_STATE": separate and has_state,
            "HAS_RANGES": ranges is not None, "HAS_DECAY": decays is not None,
            **plan.options("dkdv" if decays is None else "dkdv, decay"),
        }  # fmt: skip

    tensors = {
        "q": q, "k": k, "v": v, "scaled_grad": scaled_grad, "minus_delta": minus_delta, "mask": mask,
        "ranges": ranges, "decays": decays, "key_part": key_part, **cut.tables, "dk": dk, "dv": dv,
        "from_state": from_state, "states": later, "norms": later_norms,
    }  # fmt: skip
    launch(prepared, "dkdv", _dkdv_kernel, tensors, complete)
    d_initial = to_public(*totals, layout.feature_dim, head_dim, layout) if grad_initial else delta.new_empty(0)
    return without_padding(dk, layout.feature_dim), d_initial


def backward_pass(
    grad: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, inverse_z: Tensor,
    states: Tensor, norms: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, has_initial: bool,
    has_last: bool, grad_initial: bool, c0: float, c1: float, c2: float, scale: float, ranges: Tensor | None = None,
    log_decay: Tensor | None = None, final: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, the initial state and log_decay; the last two are empty if not asked for.

    Args:
        grad: the gradient of o. grad_final: that of the final state, or None.
        o, inverse_z, states, norms: what `forward` returned.
        has_initial, has_last: whether there was an initial state, and whether the final state was asked for.
        grad_initial: whether the gradient of the initial state is wanted.
        ranges, log_decay: what `forward` was given.
        final: the final state, if there are a decay and a `grad_final`.
    """
    if computes_in_float32(q.dtype):
        dq, dk, dv, *others = backward_pass(
            grad.float(), grad_final, q.float(), k.float(), v.float(), o.float(), inverse_z, states, norms,
            attention_mask, cu_seqlens, has_initial, has_last, grad_initial, c0, c1, c2, scale, ranges, log_decay,
            final,
        )  # fmt: skip
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *others
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    grad, o = with_unit_stride(grad), o.contiguous()
    mask = mask_as_bytes(attention_mask)
    prepared = prepare(
        "backward", (q, k, v, mask, cu_seqlens, grad, grad_final, o, inverse_z, states, norms, ranges, log_decay),
        (c0, c1, c2, scale), has_initial, has_last, grad_initial, packed=cu_seqlens is not None,
        one_run=log_decay is not None,
    )  # fmt: skip
    if is_first(prepared, q.device):
        with on_gpu_of(q), compiling_only():
            backward_pass(
                grad, grad_final, q, k, v, o, inverse_z, states, norms, attention_mask, cu_seqlens, has_initial,
                has_last, grad_initial, c0, c1, c2, scale, ranges, log_decay, final,
            )  # fmt: skip
    with on_gpu_of(q):
        dv = v.new_empty(v.shape)
        q, k, v = pad_rows(prepared, q=q, k=k, v=v)
        decays = sum_decays(log_decay, prepared.segment, cu_seqlens)
        query_part = key_part = None
        d_log_decay = inverse_z.new_empty(0)
        if log_decay is not None:
            query_part = torch.empty_like(inverse_z)
            key_part = query_part.new_empty(k.shape[0], k.shape[2], k.shape[1])
        dq, *scaled = query_gradient(
            prepared, grad, q, k, v, o, inverse_z, states, norms, mask, cu_seqlens, has_initial, has_last, ranges,
            decays, query_part,
        )  # fmt: skip
        dk, d_initial = key_gradients(
            prepared, grad_final, q, k, v, dv, *scaled, mask, cu_seqlens, grad_initial, ranges, decays, key_part
        )
        if query_part is not None and key_part is not None:
            d_log_decay = decay_gradient(query_part, key_part, cu_seqlens, has_initial, final, grad_final)
    return dq, dk, dv, d_initial, d_log_decay


def backward_fake(
    grad: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, inverse_z: Tensor,
    states: Tensor, norms: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, has_initial: bool,
    has_last: bool, grad_initial: bool, c0: float, c1: float, c2: float, scale: float, ranges: Tensor | None = None,
    log_decay: Tensor | None = None, final: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return empty tensors of the sizes that `backward_pass` returns."""
    batch, _, _, feature_dim = q.shape
    if grad_initial:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        features = n_features(feature_dim, (c0, c1, c2))
        d_initial = inverse_z.new_empty(rows, v.shape[2], features, v.shape[3] + 1)
    else:
        d_initial = inverse_z.new_empty(0)
    d_log_decay = inverse_z.new_empty(0 if log_decay is None else log_decay.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_initial, d_log_decay
