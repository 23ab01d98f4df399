# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""States: sums of features and values over each segment, then running sums over the segments.

    state [rows, DP] = sum_j phi(k_j) v_j,   norm [rows] = sum_j phi(k_j)

The same kernels sum the states of later queries for the backward pass (REVERSE), from the end of a sequence:

    state [rows, DP] = sum_i phi(q_i) do_i / z_i,   norm [rows] = -sum_i phi(q_i) delta_i

`_state_kernel` sums the quadratic rows of all runs at once, `_low_state_kernel` the linear and constant rows of all
segments, and `_scan_kernel` adds up the sums of whole runs. Nothing walks along T but this elementwise scan.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .triton_decay_rebased import decay_across
from .triton_features_rebased import block_selector, blocks_of_tile, count_tiles, shift_matrix
from .triton_language_rebased import tl, triton
from .triton_launch_rebased import PreparedCall, grid_of_rows, launch, strides_of
from .triton_layout_rebased import power_of_2, to_internal
from .triton_plan_rebased import compute_type, product_precision
from .triton_segments_rebased import Segments
from .triton_tiles_rebased import batch_row, in_units, kept_rows, load_columns, load_rows, locate_block, token_pointer


@triton.jit
def _tile_features(outer, inner, x, rows, ok, stride, i, j, F: tl.constexpr, PREC: tl.constexpr):
    """Return the features of tile (i, j) of rows of x, fp32 [64, C], by the selectors [64, 16] (F > 16)."""
    f = tl.arange(0, 16)
    xi = load_columns(x, rows, ok, stride, i * 8 + f, F, False, True)  # [16, C], of which 8 are used
    xj = load_columns(x, rows, ok, stride, j * 8 + f, F, False, True)
    return tl.dot(outer, xi, input_precision=PREC) * tl.dot(inner, xj, input_precision=PREC)


@triton.jit
def _add_to_tile(
    acc, z, phi, values, minus_delta_rows, decay, REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Add phi [64, C] @ values to acc [64, BD], and to z [64] the sum of phi.

    REVERSE: phi @ minus_delta_rows, to z [64, 16]. HAS_DECAY: phi is multiplied by `decay` [C] first.
    """
    if HAS_DECAY:
        phi *= decay[None, :]
    acc = tl.dot(phi.to(CT), values, acc, input_precision=PREC)
    if REVERSE:
        z = tl.dot(phi.to(CT), minus_delta_rows, z, input_precision=PREC)
    else:
        z += tl.sum(phi, 1)
    return acc, z


@triton.jit
def _store_tile(states, norms, tile, d_cols, first, acc, z, exists, CHECK: tl.constexpr, DP: tl.constexpr):
    """Store one tile's sums, acc [64, BD] and z [64]; CHECK says that only the rows that exist are stored.

    `first` says whether the program has the first block of value dims, whose program stores the norm.
    """
    n = tl.arange(0, 64)
    dtype = states.dtype.element_ty
    if CHECK:
        inside = exists[:, None]
        tl.store(states + (tile * 64 + n)[:, None] * DP + d_cols[None, :], acc.to(dtype), mask=inside)
    else:
        exists = n < 64
        tl.store(states + (tile * 64 + n)[:, None] * DP + d_cols[None, :], acc.to(dtype))
    tl.store(norms + tile * 64 + n, z, mask=exists & first)


@triton.jit
def _store_tiles(
    states, norms, slot, hkv, t0, d_cols, first, acc0, acc1, acc2, z0, z1, z2, NB: tl.constexpr, NR: tl.constexpr,
    DP: tl.constexpr, HKV: tl.constexpr, TG: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Store the tiles t0 to t0 + TG - 1 of one slot; the sums of norms are as `_add_to_tile` has them."""
    NT: tl.constexpr = count_tiles(NB)
    n = tl.arange(0, 64)
    if REVERSE:
        z0 = tl.sum(z0, 1)
        z1 = tl.sum(z1, 1)
        z2 = tl.sum(z2, 1)
    s64 = slot.to(tl.int64) * HKV + hkv
    states += s64 * (NR * DP)
    norms += s64 * NR
    _store_tile(states, norms, t0, d_cols, first, acc0, z0, True, False, DP)
    if TG > 1:
        exists = (n < 64) & (t0 + 1 < NT)
        _store_tile(states, norms, t0 + 1, d_cols, first, acc1, z1, exists, True, DP)
    if TG > 2:
        exists = (n < (16 if NB <= 2 else 64)) & (t0 + 2 < NT)
        _store_tile(states, norms, t0 + 2, d_cols, first, acc2, z2, exists, True, DP)


@triton.jit(do_not_specialize=["T", "SEGMENTS", "SLOTS", "N", "RUN"])
def _state_kernel(
    x, y, minus_delta, states, norms, mask, decays, cu_seqlens, segment_sequence, first_segment, first_slot,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_mb,
    T, SEGMENTS, SLOTS, N, RUN,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr,
    NR: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, L: tl.constexpr, C: tl.constexpr, TG: tl.constexpr,
    REVERSE: tl.constexpr, LAST: tl.constexpr, HAS_INIT: tl.constexpr, RUNS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, VARLEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Sum the quadratic rows of the states of a run's segments, each of them from the start of the run on.

    states [64 TG, BD] = sum_c phi(x_c) y_c, norms [64 TG] = sum_c phi(x_c).

    REVERSE: x and y are q and do / z, runs go towards the start of the sequence, the norms weigh each row with its
    -delta, which comes as `minus_delta` [B, T, H, 16] (see `as_columns`), and the heads of a group are summed. Without
    RUNS a run is one segment, as it is if HAS_DECAY.

    Grid: groups of TG tiles * blocks of BD value dims * HKV * runs. Packed sequences have a program for every segment,
    of which the first of a run works. All products are [64, C] x [C, BD].
    """
    NT: tl.constexpr = count_tiles(NB)
    GROUPS: tl.constexpr = (NT + TG - 1) // TG
    D_BLOCKS: tl.constexpr = DP // BD
    t0 = (tl.program_id(0) % GROUPS) * TG
    pid = tl.program_id(0) // GROUPS
    first = pid % D_BLOCKS == 0
    d_cols = (pid % D_BLOCKS) * BD + tl.arange(0, BD)
    pid = pid // D_BLOCKS
    hkv = pid % HKV
    r = pid // HKV
    if VARLEN:
        batch, seq, index, count, start, tokens, _row = locate_block(
            r, L, L, T, N, cu_seqlens, segment_sequence, first_segment, True
        )
        if tokens <= 0:
            return
        order = index
        if REVERSE:
            order = count - 1 - index
        segments = tl.minimum(RUN, count - 1 + LAST - order)
        if segments <= 0:
            return
        if order & (RUN - 1) != 0:
            return
        slot = tl.load(first_slot + seq) + order + HAS_INIT
        left = tl.load(cu_seqlens + seq + 1) - start
    else:
        batch = batch_row()
        if batch >= N:
            return
        order = r * RUN
        segments = tl.minimum(RUN, SEGMENTS - order)
        count = (T + L - 1) // L
        index = order
        if REVERSE:
            index = count - 1 - order
        start = index * L
        slot = batch * SLOTS + order + HAS_INIT
        left = T - start
    b64 = tl.cast(batch, tl.int64)
    x = token_pointer(x, b64, start, hkv * G, stride_xb, stride_xt, stride_xh)
    y = token_pointer(y, b64, start, hkv * G, stride_yb, stride_yt, stride_yh)
    if HAS_MASK:
        mask += b64 * stride_mb + start
    if REVERSE:
        minus_delta += ((b64 * T + start) * (HKV * G) + hkv * G) * 16
    if HAS_DECAY:
        decays += (b64 * HKV + hkv) * T + start
        segment_decay = tl.load(decays + tl.minimum(left, L) - 1)

    n = tl.arange(0, 64)
    f = tl.arange(0, 16)
    acc0 = tl.zeros([64, BD], tl.float32)
    acc1 = tl.zeros([64, BD], tl.float32)
    acc2 = tl.zeros([64, BD], tl.float32)
    z0 = tl.zeros([64, 16] if REVERSE else [64], tl.float32)
    z1 = tl.zeros([64, 16] if REVERSE else [64], tl.float32)
    z2 = tl.zeros([64, 16] if REVERSE else [64], tl.float32)
    if NB > 2:
        i0, j0 = blocks_of_tile(t0, NB)
        i1, j1 = blocks_of_tile(tl.minimum(t0 + 1, NT - 1), NB)
        i2, j2 = blocks_of_tile(tl.minimum(t0 + 2, NT - 1), NB)
    if not RUNS:
        segments = 1  # the compiler drops a loop of one step, and with it the registers that it takes
    for segment in range(segments):
        begin = segment * L
        if REVERSE:
            begin = -begin
        steps = (tl.minimum(left - begin, L) + C - 1) // C
        for step in range(steps * G):
            g = 0
            if G > 1:
                g = step // steps
            rows = begin + (step - g * steps) * C + tl.arange(0, C)
            ok = kept_rows(mask, rows, left, HAS_MASK)
            xg = x + g * stride_xh
            decay = 0.0
            if HAS_DECAY:
                decay = tl.load(decays + rows, mask=ok, other=0.0)
                if not REVERSE:
                    decay = segment_decay - decay
                decay = tl.exp2(decay)
            minus_delta_rows = 0.0
            values = load_rows(y + g * stride_yh, rows, ok, stride_yt, d_cols, D, D == DP, True)  # [C, BD]
            if REVERSE:
                minus_delta_rows = load_rows(
                    minus_delta + g * 16, rows, ok, HKV * G * 16, f, 16, True, True
                )  # [C, 16]
            if NB <= 2:
                xt = load_columns(xg, rows, ok, stride_xt, f, F, F == 16, True)  # [16, C]
                repeated = tl.dot((n[:, None] % 16 == f[None, :]).to(xt.dtype), xt, input_precision=PREC)  # [64, C]
                phi = repeated * tl.dot(tl.trans(shift_matrix(0, 64, 1.0, 1.0, xt.dtype)), xt, input_precision=PREC)
                acc0, z0 = _add_to_tile(acc0, z0, phi, values, minus_delta_rows, decay, REVERSE, HAS_DECAY, CT, PREC)
                phi = repeated * tl.dot(tl.trans(shift_matrix(4, 64, 1.0, 1.0, xt.dtype)), xt, input_precision=PREC)
                acc1, z1 = _add_to_tile(acc1, z1, phi, values, minus_delta_rows, decay, REVERSE, HAS_DECAY, CT, PREC)
                if NB == 2:
                    # Of these 64 rows the first 16 are used, those of shift 8. Products of 16 rows were slower.
                    phi = repeated * tl.dot(
                        tl.trans(shift_matrix(8, 64, 1.0, 1.0, xt.dtype)), xt, input_precision=PREC
                    )
                    acc2, z2 = _add_to_tile(
                        acc2, z2, phi, values, minus_delta_rows, decay, REVERSE, HAS_DECAY, CT, PREC
                    )
            else:
                outer_selector = block_selector(True, True, x.dtype.element_ty)
                inner_selector = block_selector(False, True, x.dtype.element_ty)
                phi = _tile_features(outer_selector, inner_selector, xg, rows, ok, stride_xt, i0, j0, F, PREC)
                acc0, z0 = _add_to_tile(acc0, z0, phi, values, minus_delta_rows, decay, REVERSE, HAS_DECAY, CT, PREC)
                if TG > 1:
                    phi = _tile_features(outer_selector, inner_selector, xg, rows, ok, stride_xt, i1, j1, F, PREC)
                    acc1, z1 = _add_to_tile(
                        acc1, z1, phi, values, minus_delta_rows, decay, REVERSE, HAS_DECAY, CT, PREC
                    )
                if TG > 2:
                    phi = _tile_features(outer_selector, inner_selector, xg, rows, ok, stride_xt, i2, j2, F, PREC)
                    acc2, z2 = _add_to_tile(
                        acc2, z2, phi, values, minus_delta_rows, decay, REVERSE, HAS_DECAY, CT, PREC
                    )
        _store_tiles(
            states, norms, slot + segment, hkv, t0, d_cols, first, acc0, acc1, acc2, z0, z1, z2, NB, NR, DP, HKV, TG,
            REVERSE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "SEGMENTS", "SLOTS", "N"])
def _low_state_kernel(
    x, y, delta, states, norms, mask, ranges, cu_seqlens, segment_sequence, first_segment, first_slot,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_mb,
    T, SEGMENTS, SLOTS, N, weight_lin, weight_const,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr,
    NR: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, L: tl.constexpr, C: tl.constexpr,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, REVERSE: tl.constexpr, LAST: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RANGES: tl.constexpr, VARLEN: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Sum the low rows of a segment's state: the linear ones (x itself) and the constant one (1), where w has them.

    HAS_RANGES (with REVERSE): each query has its own units, see `in_units`.
    """
    D_BLOCKS: tl.constexpr = DP // BD
    first = tl.program_id(0) % D_BLOCKS == 0
    d_cols = (tl.program_id(0) % D_BLOCKS) * BD + tl.arange(0, BD)
    pid = tl.program_id(0) // D_BLOCKS
    hkv = pid % HKV
    r = pid // HKV
    if VARLEN:
        batch, seq, index, count, start, tokens, _row = locate_block(
            r, L, L, T, N, cu_seqlens, segment_sequence, first_segment, True
        )
        if tokens <= 0:
            return
        order = index
        if REVERSE:
            order = count - 1 - index
        if order >= count - 1 + LAST:
            return
        slot = tl.load(first_slot + seq) + order + HAS_INIT
    else:
        batch = batch_row()
        if batch >= N:
            return
        order = r
        count = (T + L - 1) // L
        index = order
        if REVERSE:
            index = count - 1 - order
        start = index * L
        tokens = tl.minimum(T - start, L)
        slot = batch * SLOTS + order + HAS_INIT
    b64 = tl.cast(batch, tl.int64)
    x = token_pointer(x, b64, start, hkv * G, stride_xb, stride_xt, stride_xh)
    y = token_pointer(y, b64, start, hkv * G, stride_yb, stride_yt, stride_yh)
    if HAS_MASK:
        mask += b64 * stride_mb + start
    if REVERSE:
        delta += (b64 * HKV * G + hkv * G) * T + start
    if HAS_RANGES:
        ranges += (b64 * HKV * G + hkv * G) * T + start
    f = tl.arange(0, FP)
    lin = tl.zeros([FP, BD], tl.float32)
    lin_norm = tl.zeros([FP], tl.float32)
    const = tl.zeros([BD], tl.float32)
    const_norm = tl.zeros([1], tl.float32)
    steps = (tokens + C - 1) // C
    for step in range(steps * G):
        g = step // steps
        rows = (step % steps) * C + tl.arange(0, C)
        ok = kept_rows(mask, rows, tokens, HAS_MASK)
        values = load_rows(y + g * stride_yh, rows, ok, stride_yt, d_cols, D, D == DP, True)
        if REVERSE:
            weight = -tl.load(delta + g * T + rows, mask=ok, other=0.0)
        else:
            weight = ok.to(tl.float32)
        if HAS_RANGES:
            by_lin, by_const, _eps = in_units(ranges + g * T, rows, ok, 1.0, 1.0, 1.0, QUAD)
        if LIN:
            xt = load_columns(x + g * stride_xh, rows, ok, stride_xt, f, F, F == FP, True).to(tl.float32)
            if HAS_RANGES:
                xt *= by_lin[None, :]
            lin = tl.dot(xt.to(CT), values, lin, input_precision=PREC)
            lin_norm += tl.sum(xt * weight[None, :], 1)
        if CONST:
            values = values.to(tl.float32)
            if HAS_RANGES:
                values *= by_const[:, None]
                weight *= by_const
            const += tl.sum(values, 0)
            const_norm += tl.sum(weight, 0)
    s64 = slot.to(tl.int64) * HKV + hkv
    states += s64 * (NR * DP)
    norms += s64 * NR
    if LIN:
        tl.store(states + (FIRST + f)[:, None] * DP + d_cols[None, :], (lin * weight_lin).to(states.dtype.element_ty))
        tl.store(norms + FIRST + f, lin_norm * weight_lin, mask=(f < FP) & first)
    if CONST:
        ROW: tl.constexpr = FIRST + (FP if LIN else 0)
        tl.store(states + ROW * DP + d_cols, (const * weight_const).to(states.dtype.element_ty))
        one = tl.arange(0, 1)
        tl.store(norms + ROW + one, const_norm * weight_const, mask=(one < 1) & first)


@triton.jit
def _scan_slots(
    data, last, base, final, e, ok_e, slots, step, rest, decays, count, tokens, U: tl.constexpr, BE: tl.constexpr,
    KEEP_LAST: tl.constexpr, HAS_INIT: tl.constexpr, HAS_DECAY: tl.constexpr, REVERSE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Turn elements e of every `step`-th number from `base` on into running sums, in place.

    KEEP_LAST: store their total at `final` of `last`, with the numbers that lie `rest` behind the last of them.
    HAS_DECAY: each number comes to what `decay_across` leaves of the sum before it.
    """
    u = tl.arange(0, U)
    carry = tl.zeros([BE], tl.float32)
    pointers = data + base + u.to(tl.int64)[:, None] * step + e[None, :]
    ok = (u < slots)[:, None] & ok_e[None, :]
    part = tl.load(pointers, mask=ok, other=0.0)
    for i in range(0, slots, U):
        later = pointers + U * step
        ok_later = ((i + U + u) < slots)[:, None] & ok_e[None, :]
        ahead = tl.load(later, mask=ok_later, other=0.0)  # loaded while the others are summed
        part = part.to(tl.float32)
        if HAS_DECAY:
            left = decay_across(decays, i + u - HAS_INIT, count, tokens, L, REVERSE)
            total = part
            for i_u in tl.static_range(U):  # a thread holds its elements of all U
                now = u == i_u
                carry = carry * tl.sum(tl.where(now, left, 0.0), 0) + tl.sum(tl.where(now[:, None], part, 0.0), 0)
                total = tl.where(now[:, None], carry[None, :], total)
        else:
            total = tl.cumsum(part, 0) + carry[None, :]
        tl.store(pointers, total.to(data.dtype.element_ty), mask=ok)
        if not HAS_DECAY:
            carry += tl.sum(part, 0)
        pointers, ok, part = later, ok_later, ahead
    if KEEP_LAST:
        pointers = data + base + (slots - 1).to(tl.int64) * step + rest + e
        carry += tl.load(pointers, mask=ok_e & (rest > 0), other=0.0).to(tl.float32)
        tl.store(last + final + e, carry, mask=ok_e)


@triton.jit(do_not_specialize=["SLOTS", "RUN"])
def _scan_kernel(
    states, norms, last_states, last_norms, first_slot, decays, cu_seqlens, SLOTS, RUN, T,
    E: tl.constexpr, NR: tl.constexpr, HKV: tl.constexpr, U: tl.constexpr, BE: tl.constexpr, VARLEN: tl.constexpr,
    HAS_INIT: tl.constexpr, KEEP_LAST: tl.constexpr, HAS_DECAY: tl.constexpr, REVERSE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Turn the last slot of each whole run of a sequence into a running sum, in place, from the initial state on.

    states are [slots, HKV, E], norms [slots, HKV, NR]. KEEP_LAST: the totals in fp32, with what follows the last whole
    run, go to `last_states` and `last_norms`. Grid: (sequences * HKV, blocks of states, then of norms). U slots are
    loaded at once, so that the waits for them overlap.
    `decays`, `cu_seqlens`, T, REVERSE and L matter only if HAS_DECAY, so that others share one kernel.
    """
    pid = tl.program_id(0)
    hkv = pid % HKV
    seq = pid // HKV
    if VARLEN:
        first = tl.load(first_slot + seq)
        slots = tl.load(first_slot + seq + 1) - first
    else:
        first = seq * SLOTS
        slots = SLOTS
    rest = ((slots - HAS_INIT) % RUN).to(tl.int64) * HKV
    slots = (slots - HAS_INIT) // RUN + HAS_INIT
    row = (first + (RUN - 1) * (1 - HAS_INIT)).to(tl.int64) * HKV + hkv
    step = RUN.to(tl.int64) * HKV
    p64 = pid.to(tl.int64)
    count = 0
    tokens = 0
    if HAS_DECAY:
        if VARLEN:
            start = tl.load(cu_seqlens + seq)
            tokens = tl.load(cu_seqlens + seq + 1) - start
            decays += hkv.to(tl.int64) * T + start
        else:
            tokens = T
            decays += p64 * T
        count = (tokens + L - 1) // L
    BLOCKS: tl.constexpr = (E + BE - 1) // BE
    if tl.program_id(1) < BLOCKS:
        e = tl.program_id(1) * BE + tl.arange(0, BE)
        _scan_slots(states, last_states, row * E, p64 * E, e, e < E, slots, step * E, rest * E, decays, count,
                    tokens, U, BE, KEEP_LAST, HAS_INIT, HAS_DECAY, REVERSE, L)  # fmt: skip
    else:
        e = (tl.program_id(1) - BLOCKS) * BE + tl.arange(0, BE)
        _scan_slots(norms, last_norms, row * NR, p64 * NR, e, e < NR, slots, step * NR, rest * NR, decays,
                    count, tokens, U, BE, KEEP_LAST, HAS_INIT, HAS_DECAY, REVERSE, L)  # fmt: skip


def _store_initial(
    initial: Tensor, states: Tensor, norms: Tensor, cut: Segments, prepared: PreparedCall, batch: int,
    feature_dim: int, head_dim: int,
) -> None:  # fmt: skip
    """Write the initial states [N, H_kv, n_features, D + 1] to slot 0 of each sequence.

    States of `layout.rows` rows have the order of internal ones (triton_context_rebased.py).
    """
    layout = prepared.layout
    kv_heads = initial.shape[1]
    if initial.shape[2] == layout.rows:
        values, norm = initial[..., :head_dim], initial[..., head_dim]
    else:
        values, norm = to_internal(initial, feature_dim, head_dim, layout)
    rows = cut.total * kv_heads * layout.rows
    shape = (1 if cut.packed else batch, cut.slots, kv_heads, layout.rows)
    states, norms = states[: rows * layout.d].view(*shape, layout.d), norms[:rows].view(shape)
    if cut.packed:
        first = cut.tables["first_slot"][:-1].long()
        padded = states.new_zeros(cut.sequences, kv_heads, layout.rows, layout.d)
        padded[..., :head_dim] = values
        states.flatten(0, 1).index_copy_(0, first, padded)
        norms.flatten(0, 1).index_copy_(0, first, norm)
    else:
        states[:, 0, ..., head_dim:] = 0
        states[:, 0, ..., :head_dim] = values
        norms[:, 0] = norm


def _scan(
    states: Tensor, norms: Tensor, cut: Segments, prepared: PreparedCall, kv_heads: int, has_initial: int, last: bool,
    decays: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Turn the sums of whole runs into running sums, and return the totals in fp32 if `last`."""
    layout = prepared.layout
    sums = (cut.slots - has_initial) // cut.run + has_initial
    if not last and (cut.total == 0 or (sums <= 1 and not cut.packed)):
        return None  # nothing to add up
    totals = None, None
    if last:
        totals = (
            norms.new_empty(cut.sequences, kv_heads, layout.rows, layout.d),
            norms.new_empty(cut.sequences, kv_heads, layout.rows),
        )

    def complete() -> tuple[tuple[int, ...], dict[str, Any]]:
        elements = layout.rows * layout.d
        # At least one element per thread: the sums are in place, so a tile that two threads hold would be added twice.
        # With 1,024 elements a thread has 16 bytes of every slot, and sums them without the other threads.
        block = 1024
        return (cut.sequences * kv_heads, -(-elements // block) - (-layout.rows // block)), {
            "SLOTS": cut.slots, "RUN": cut.run, "E": elements, "NR": layout.rows, "HKV": kv_heads,
            "U": 8 if cut.packed else min(8, power_of_2(max(sums, 1), 2)), "BE": block, "VARLEN": cut.packed,
            "HAS_INIT": has_initial, "KEEP_LAST": last, "HAS_DECAY": decays is not None,
            "REVERSE": decays is not None and reverse, "L": 0 if decays is None else cut.length,
            "T": None if decays is None else decays.shape[2], "num_warps": 4,
        }  # fmt: skip

    tensors = {
        "states": states, "norms": norms, "last_states": totals[0], "last_norms": totals[1],
        "first_slot": cut.tables["first_slot"], "decays": decays,
        "cu_seqlens": None if decays is None else cut.tables["cu_seqlens"],
    }  # fmt: skip
    launch(prepared, "scan", _scan_kernel, tensors, complete)
    return totals if last else None


def sum_states(
    x: Tensor, y: Tensor, states: Tensor, norms: Tensor, cut: Segments, prepared: PreparedCall, mask: Tensor | None,
    kv_heads: int, head_dim: int, initial: Tensor | None, last: bool, delta: Tensor | None = None,
    minus_delta: Tensor | None = None, ranges: Tensor | None = None, decays: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Fill `states` and `norms` with running sums over the slots, and return the totals in fp32 if `last`.

    Args:
        x, y: k and v, from `pad_rows`; or, for the state of later queries, q and do / z.
        states, norms: from `allocate_states`.
        cut: the segments, cut in the same direction.
        mask: [B, T] in bytes, drops keys; None for queries.
        head_dim: D; y may have more columns.
        initial: states before the first token, public or as `_store_initial` takes them, or None.
        last: whether the states after the last token are wanted.
        delta, minus_delta: [B, H, T] and [B, T, H, 16] come with queries and weigh their norms.
        ranges: [B, H, T], comes with queries from `bring_into_range`, or None.
        decays: [B, H_kv, T], from `sum_decays`, or None.
    """
    batch, length, heads, columns = x.shape
    layout, plan = prepared.layout, prepared.plan
    reverse = delta is not None
    has_initial = int(initial is not None)
    if initial is not None:
        _store_initial(initial, states, norms, cut, prepared, batch, layout.feature_dim, head_dim)
    tensors = {"x": x, "y": y, "states": states, "norms": norms, "mask": mask, **cut.tables}
    block_d = min(layout.d, 64)
    # A program sums a run. Packed sequences have a program per segment, because the host does not know their runs.
    programs = (cut.computed if cut.packed else -(-cut.computed // cut.run)) * kv_heads * (layout.d // block_d)
    batch_rows = 1 if cut.packed else batch

    def shared() -> dict[str, Any]:
        tokens, warps, _ = plan.later if reverse else plan.state
        return {
            **strides_of("x", x), **strides_of("y", y), "stride_mb": 0 if mask is None else mask.stride(0),
            "T": length, "SEGMENTS": cut.computed, "SLOTS": cut.slots, "N": cut.sequences,
            "F": columns, "D": y.shape[-1], "FP": layout.f, "DP": layout.d, "BD": block_d, "NR": layout.rows,
            "HKV": kv_heads, "G": heads // kv_heads, "L": cut.length, "C": tokens, "REVERSE": reverse,
            "LAST": int(last), "HAS_INIT": has_initial, "HAS_MASK": mask is not None, "VARLEN": cut.packed,
            "CT": compute_type(x.dtype), "PREC": product_precision(x.dtype), "num_warps": warps,
        }  # fmt: skip

    def complete_quadratic() -> tuple[tuple[int, ...], dict[str, Any]]:
        group = min(layout.tiles, 3)
        _, _, stages = plan.later if reverse else plan.state
        return grid_of_rows(-(-layout.tiles // group) * programs, batch_rows), {
            **shared(), "RUN": cut.run, "RUNS": max(plan.runs) > 1, "HAS_DECAY": decays is not None,
            "NB": layout.blocks, "TG": group, "num_stages": stages, **plan.options("later" if reverse else "state"),
        }  # fmt: skip

    def complete_low() -> tuple[tuple[int, ...], dict[str, Any]]:
        return grid_of_rows(programs, batch_rows), {
            **shared(), "weight_lin": layout.alpha if reverse else 1.0,
            "weight_const": layout.beta if reverse else 1.0, "FIRST": layout.first_low_row,
            "QUAD": layout.quad, "LIN": layout.lin, "CONST": layout.const, "HAS_RANGES": ranges is not None,
            "num_stages": 1,
        }  # fmt: skip

    if programs > 0 and layout.quad:
        of_state = {**tensors, "minus_delta": minus_delta, "decays": decays}
        launch(prepared, "state", _state_kernel, of_state, complete_quadratic)
    if programs > 0 and (layout.lin or layout.const):
        launch(prepared, "low state", _low_state_kernel, {**tensors, "delta": delta, "ranges": ranges}, complete_low)
    return _scan(states, norms, cut, prepared, kv_heads, has_initial, last, decays, reverse)
