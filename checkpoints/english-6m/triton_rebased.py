# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# ruff: noqa: SIM102, SIM300, B035
# Kernels are Triton's language, not Python: a constexpr test must not share a condition with a value that only the GPU
# knows, and a function needs one `return` for all branches.
"""The Triton backend of ReBased attention: forward, backward and one-token decoding, linear in the sequence length.

    s_ij = scale * q_i . k_j,   w_ij = c0 + c1 s_ij + c2 s_ij**2  (j <= i),   o_i = sum_j w_ij v_j / (sum_j w_ij + eps)

How it works (docs/kernels.md has the costs):

* The sequence is cut into segments of L tokens. Inside a segment the kernels build w tile by tile, as FlashAttention
  does, without a softmax. Across segments they use the state S = sum_j phi(k_j) [v_j, 1], phi(x) the products x_a x_b.
* States are summed per segment, a few of them one after another (a run; `_state_kernel`, all runs at once). Those at
  the ends of runs are turned into running sums (`_scan_kernel`), and a block of queries adds up the two states that
  make up what is in front of its segment (`_forward_kernel`). Nothing walks along T but the elementwise scan.
* phi is never stored. For F <= 16 a feature is x_a x_(a + s mod 16), row 16 s + a of a state: shifts s of 0 to 8 have
  every pair, 144 rows for 136 pairs. For F > 16 the dims are cut into blocks of 8, and a *tile* of 64 features is the
  outer product of two blocks I <= J. Factors are made with tensor cores, x times a 0/1 matrix that takes each dim to
  its columns (exact), and multiplied elementwise. The product then is already in the registers where the next matrix
  product wants it.
* With u = w / g monic in s (g = c2 scale**2), o = sum u v / (sum u + eps / g): constants leave the inner loops.
* The backward pass is the same machinery, with a state of later queries, R = sum_i phi(q_i) [do_i / z_i, dz_i],
  summed from the right. No atomics: two runs give the same bits.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # the module must import where Triton is missing: the decorators below then do nothing
    HAS_TRITON = False

    class _Missing:
        """Stands in for `triton` and `triton.language`, so that the kernels below still parse as plain functions."""

        constexpr = int

        @staticmethod
        def jit(function=None, **_kwargs):
            return function if function is not None else (lambda inner: inner)

        @staticmethod
        def constexpr_function(function):
            return function

    triton = tl = _Missing()


MAX_FEATURE_DIM = 128
MAX_HEAD_DIM = 256
_MOST_SEGMENT = 4096  # tokens of a segment, at most: how far a kernel walks from a 64-bit pointer
_WIDE_BYTES = 112 * 1024  # shared memory of the dk/dv kernel for F <= 16 and D > 128, which some GPUs do not have
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# whether kernels may hold instructions of NVIDIA's PTX
_PTX = tl.constexpr(torch.version.hip is None)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces shared by the kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _batch_row():
    """The batch row of a program: axes 1 and 2 of the grid (see `_grid`), so that nothing has to be divided."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


@triton.jit
def _segment(r, BLOCK: tl.constexpr, L: tl.constexpr, T, N, cu, seg_seq, seg_off, VARLEN: tl.constexpr):
    """Which segment block number `r` of a batch row (or of all packed sequences) belongs to.

    Returns (batch row, sequence, index of the segment in its sequence, segments in the sequence, first token of the
    segment, tokens in the segment, first row of the block within the segment); no row is valid if that is >= tokens.
    """
    if VARLEN:
        seg = r // (L // BLOCK)
        row = (r % (L // BLOCK)) * BLOCK
        used = tl.load(seg_off + N)
        seq = tl.load(seg_seq + tl.minimum(seg, tl.maximum(used - 1, 0)))
        first = tl.load(seg_off + seq)
        index = seg - first
        count = tl.load(seg_off + seq + 1) - first
        start = tl.load(cu + seq) + index * L
        tokens = tl.minimum(tl.load(cu + seq + 1) - start, L)
        tokens = tl.where(seg < used, tokens, 0)
        batch = 0
    else:
        batch = _batch_row()
        seq = batch
        t = r * BLOCK
        index = t // L
        row = t % L
        count = (T + L - 1) // L
        start = index * L
        tokens = tl.where(batch < N, tl.minimum(T - start, L), 0)
    return batch, seq, index, count, start, tokens, row


@triton.jit
def _selector(OUTER: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr):
    """F > 16: 0/1 matrix [16, 64] that takes 8 of 16 dims to a tile's 64 features: feature n is dim n // 8 (OUTER)
    or n % 8. TRANSPOSED gives [64, 16].
    """
    n = tl.arange(0, 64)
    d = tl.arange(0, 16)
    if OUTER:
        source = n // 8
    else:
        source = n % 8
    # one return for all branches: Triton goes on compiling behind a `return` in a branch that is always taken
    if TRANSPOSED:
        chosen = source[:, None] == d[None, :]
    else:
        chosen = d[:, None] == source[None, :]
    return chosen.to(DTYPE)


@triton.jit
def _load_rows(base, rows, ok, stride, cols, COLS: tl.constexpr, EVEN: tl.constexpr, CHECK: tl.constexpr):
    """Rows x columns of a tensor with unit column stride, [rows, cols]; 0 where `ok` is false or cols >= COLS."""
    pointers = base + rows[:, None] * stride + cols[None, :]
    if CHECK and EVEN:
        x = tl.load(pointers, mask=ok[:, None], other=0.0)
    elif CHECK:
        x = tl.load(pointers, mask=ok[:, None] & (cols < COLS)[None, :], other=0.0)
    elif EVEN:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(cols < COLS)[None, :], other=0.0)
    return x


@triton.jit
def _load_columns(base, rows, ok, stride, cols, COLS: tl.constexpr, EVEN: tl.constexpr, CHECK: tl.constexpr):
    """The transpose of `_load_rows`: [cols, rows]."""
    pointers = base + rows[None, :] * stride + cols[:, None]
    if CHECK and EVEN:
        x = tl.load(pointers, mask=ok[None, :], other=0.0)
    elif CHECK:
        x = tl.load(pointers, mask=ok[None, :] & (cols < COLS)[:, None], other=0.0)
    elif EVEN:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(cols < COLS)[:, None], other=0.0)
    return x


@triton.jit
def _kept(keep, rows, tokens, HAS_MASK: tl.constexpr):
    """Whether rows are inside the segment and not dropped by the attention mask."""
    ok = rows < tokens
    if HAS_MASK:
        ok = tl.load(keep + rows, mask=ok, other=0) != 0
    return ok


@triton.jit
def _polynomial(s, alpha, beta, QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr):
    """u(s): s (s + alpha) + beta, or s + beta where c2 = 0, or 1 where only c0 is left."""
    if QUAD:
        if LIN:
            u = s * (s + alpha)
        else:
            u = s * s
        if CONST:
            u = u + beta
    elif LIN:
        u = s
        if CONST:
            u = u + beta
    else:
        u = s * 0.0 + 1.0
    return u


@triton.jit
def _tile_of(t, NB: tl.constexpr):
    """The blocks (I, J), I <= J, of tile number t; tiles are numbered row by row in the upper triangle."""
    root = tl.sqrt(((2 * NB + 1) * (2 * NB + 1) - 8 * t).to(tl.float32))
    i = ((2 * NB + 1 - root) * 0.5).to(tl.int32)
    # the square root may land on the wrong side of an integer: put it right with integers
    i = tl.where(i * NB - (i * (i - 1)) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * NB - ((i + 1) * i) // 2 <= t, i + 1, i)
    j = i + t - (i * NB - (i * (i - 1)) // 2)
    return i, j


@triton.constexpr_function
def _state_tiles(blocks):
    """Tiles of a state's quadratic rows: of 64 rows, but for the third one of F <= 16, which has 16."""
    return blocks + 1 if blocks <= 2 else blocks * (blocks + 1) // 2


@triton.constexpr_function
def _quadratic_rows(blocks):
    """Quadratic rows of an internal state."""
    return 112 + 16 * blocks if blocks <= 2 else blocks * (blocks + 1) * 32


@triton.jit
def _split(value, CT: tl.constexpr):
    """fp32 as a sum of two numbers of the compute type: 16 bits of mantissa with bfloat16, exact with fp32.

    Bits are cut, not rounded: a round trip through the short type is something compilers remove.
    """
    if CT == tl.float32:
        high = value
    else:
        high = (value.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high, value - high


@triton.jit
def _norm_matrix(norm, gap, a, b, some, more, NB: tl.constexpr, RUNS: tl.constexpr, CT: tl.constexpr):
    """The quadratic norms as a symmetric matrix M, rows a and columns b: phi(x) . norms = x^T M x; split in two.

    gap, some, more: where the sum is in two parts, see `_earlier`.
    """
    if NB <= 2:
        shift = (b[None, :] - a[:, None] + 16) % 16
        place = tl.where(shift <= 8, shift * 16 + a[:, None], (16 - shift) * 16 + b[None, :])
        exists = place < _quadratic_rows(NB)
    else:
        i = (a // 8)[:, None]
        j = (b // 8)[None, :]
        low = tl.minimum(i, j)
        high = tl.maximum(i, j)
        tile = low * NB - (low * (low - 1)) // 2 + high - low
        a8 = (a % 8)[:, None]
        b8 = (b % 8)[None, :]
        place = tile * 64 + tl.where(i <= j, a8 * 8 + b8, b8 * 8 + a8)
        exists = high < NB
    value = tl.load(norm + place, mask=exists & some, other=0.0)
    if RUNS:
        value += tl.load(norm + gap + place, mask=exists & more, other=0.0)
    top, rest = _split(value, CT)
    return top.to(CT), rest.to(CT)


@triton.jit
def _times_norm(x, top, rest, PREC: tl.constexpr):
    """x @ M, fp32 [C, columns]; M from `_norm_matrix`."""
    y = tl.dot(x, top, input_precision=PREC)
    return tl.dot(x, rest, y, input_precision=PREC)


@triton.jit
def _finished(x, CT: tl.constexpr):
    """x, fp32, but the matrix units have to be done with it here: an instruction without a body reads it.

    Sums that are left running from one step of a loop into the next one may make ptxas (12.8, C7515) run all matrix
    products of the kernel one by one.
    """
    if _PTX and CT == tl.bfloat16:
        x = tl.inline_asm_elementwise("// done", "=f,0", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def _product(x, keys, CT: tl.constexpr, PREC: tl.constexpr):
    """x [C, N] in bfloat16, computed exactly: x times 1, or x plus 0 times keys [N, 16] where 1 would be large.

    The matrix units read a left operand that was loaded from shared memory, again for every product, and that memory
    is what the kernels wait for. A result of theirs lies in registers as a left operand has to: no memory is read.
    """
    if CT == tl.bfloat16:
        C: tl.constexpr = x.shape[0]
        N: tl.constexpr = x.shape[1]
        if N == keys.shape[0]:
            zero = tl.zeros([C, 16], CT)
            x = tl.dot(zero, tl.trans(keys), x.to(tl.float32), input_precision=PREC).to(CT)
        else:
            n = tl.arange(0, N)
            x = tl.dot(x, (n[:, None] == n[None, :]).to(CT), input_precision=PREC).to(CT)
    return x


@triton.jit
def _once(x, CT: tl.constexpr):
    """x in bfloat16, computed once (an instruction without a body): else, for every layout that x is wanted in."""
    if _PTX and CT == tl.bfloat16:
        x = tl.inline_asm_elementwise("// once", "=r,0", [x], dtype=tl.bfloat16, is_pure=False, pack=2)
    return x


@triton.jit
def _of_pairs(x, y, ADD: tl.constexpr):
    """x + y, or x * y, in bfloat16, two numbers an instruction: 1 x + y and x y - 0.

    Compute capability 8 has no other sum or product of pairs, and 9 makes a plain one of it.
    """
    if ADD:
        CODE: tl.constexpr = "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }"
    else:
        CODE: tl.constexpr = "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }"
    return tl.inline_asm_elementwise(CODE, "=r,r,r", [x, y], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _earlier(e, RUN, HAS_INIT: tl.constexpr, RUNS: tl.constexpr):
    """Which slots hold the sum of the first `e` segments of a sequence, which the scan may have left in two parts.

    Returns (slot of the running sum, whether there is one; slots from it to the sum within the run, whether there is
    one). Slots are counted from the sequence's first.
    """
    whole = e
    if RUNS:
        whole = e & -RUN  # a power of 2
    return whole - 1 + HAS_INIT, whole + HAS_INIT > 0, e - whole, e > whole


@triton.jit
def _state_tile(
    state, gap, d_cols, some, more, ROWS: tl.constexpr, DP: tl.constexpr, RUNS: tl.constexpr, CT: tl.constexpr
):  # fmt: skip
    """F <= 16: the sum of both parts (see `_earlier`) of ROWS rows of a state, [ROWS, BD]; ROWS / 16 shifts."""
    n = tl.arange(0, ROWS)
    rows = state + n[:, None] * DP + d_cols[None, :]
    tile = tl.load(rows, mask=some & (d_cols < DP)[None, :], other=0.0)
    if RUNS:
        rest = tl.load(rows + gap, mask=more & (d_cols < DP)[None, :], other=0.0)
        if _PTX and tile.dtype == tl.bfloat16:
            tile = _of_pairs(tile, rest, True)
        else:
            tile += rest
    return tile.to(CT)


@triton.jit
def _state_pairs(state, gap, d, some, more, NB: tl.constexpr, DP: tl.constexpr, RUNS: tl.constexpr, CT: tl.constexpr):
    """The quadratic rows of a state as `_gradient_tiles` takes them: four times two shifts, and shift 8."""
    s0 = _state_tile(state, gap, d, some, more, 32, DP, RUNS, CT)
    s1 = _state_tile(state + 32 * DP, gap, d, some, more, 32, DP, RUNS, CT)
    s2 = _state_tile(state + 64 * DP, gap, d, some, more, 32, DP, RUNS, CT)
    s3 = _state_tile(state + 96 * DP, gap, d, some, more, 32, DP, RUNS, CT)
    s4 = _state_tile(state + 128 * DP, gap, d, some & (NB == 2), more & (NB == 2), 16, DP, RUNS, CT)
    return s0, s1, s2, s3, s4


@triton.jit
def _shifts(
    FIRST: tl.constexpr, WIDTH: tl.constexpr, SQUARES: tl.constexpr, OTHERS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """F <= 16: matrix [16, WIDTH] that takes x to x_(a + s mod 16), column 16 (s - FIRST) + a.

    Its entries are 0 but for SQUARES where s = 0 (there features are squares) and OTHERS where it is not.
    """
    n = tl.arange(0, WIDTH)
    d = tl.arange(0, 16)
    source = (n + n // 16 + FIRST) % 16
    weight = tl.where(n < 16 - 16 * FIRST, SQUARES, OTHERS)
    return tl.where(d[:, None] == source[None, :], weight[None, :], 0.0).to(DTYPE)


@triton.jit
def _in_place(x, PREC: tl.constexpr):
    """x [C, 16] in fp32, where the matrix units leave a result.

    There a thread holds the same dims of every 16 columns of a tile, so that one copy of x serves all of them.
    """
    if x.dtype == tl.bfloat16:
        y = x.to(tl.float32)  # is there already, see `_product`
    else:
        d = tl.arange(0, 16)
        y = tl.dot(x, (d[:, None] == d[None, :]).to(x.dtype), input_precision=PREC)
    return y


@triton.jit
def _halves(x):
    """The left and the right half of the columns of x, without moving a number."""
    C: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, [C, 2, N // 2]), (0, 2, 1)))


@triton.jit
def _side_by_side(left, right):
    """What `_halves` takes apart."""
    C: tl.constexpr = left.shape[0]
    N: tl.constexpr = left.shape[1]
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [C, 2 * N])


@triton.jit
def _times_repeated(tile, x, WIDTH: tl.constexpr):
    """tile [C, 16 WIDTH] * x [C, 16] repeated WIDTH times along the columns, without moving a number."""
    C: tl.constexpr = tile.shape[0]
    left = tl.reshape(tile, [C, WIDTH, 16])
    if _PTX and tile.dtype == tl.bfloat16:
        both = _of_pairs(left, tl.broadcast_to(x[:, None, :], [C, WIDTH, 16]), False)
    else:
        both = left * x[:, None, :]
    return tl.reshape(both, [C, 16 * WIDTH])


@triton.jit
def _opposites(x, CT: tl.constexpr):
    """The features x_a x_(a + 8) of x [C, 16] fp32, see `_in_place`: each pair stands in two of the 16 columns."""
    left, right = _halves(x)
    both = (left * right).to(CT)
    return _side_by_side(both, both)


@triton.jit
def _query_tiles(acc, x, s0, s1, s2, NB: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """F <= 16: acc [C, BD] += phi(x) @ state, the quadratic part.

    x: [C, 16]; s0, s1 [64, BD]: shifts 0 to 3 and 4 to 7; s2 [16, BD]: shift 8, where F > 8.

    Factors are exact in the compute type: their products are rounded once, like products of fp32 numbers. Shifts 1 to
    7 count twice; shift 8 has its pairs twice.
    """
    exact = _in_place(x, PREC)
    y = exact.to(CT)
    shifted = tl.dot(x, _shifts(0, 64, 1.0, 2.0, x.dtype), input_precision=PREC).to(CT)  # [C, 64]
    acc = tl.dot(_times_repeated(shifted, y, 4), s0, acc, input_precision=PREC)
    shifted = tl.dot(x, _shifts(4, 64, 1.0, 2.0, x.dtype), input_precision=PREC).to(CT)
    acc = tl.dot(_times_repeated(shifted, y, 4), s1, acc, input_precision=PREC)
    if NB == 2:
        acc = tl.dot(_opposites(exact, CT), s2, acc, input_precision=PREC)
    return acc


@triton.jit
def _query_halves(acc, x, s0, s1, s2, s3, s4, NB: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """`_query_tiles` for a state in pairs of shifts, and with the selectors that `_gradient_tiles` has made."""
    exact = _in_place(x, PREC)
    y = (exact * 2.0).to(CT)
    shifted = tl.dot(x, _shifts(0, 32, 0.5, 1.0, x.dtype), input_precision=PREC).to(CT)  # [C, 32]
    acc = tl.dot(_times_repeated(shifted, y, 2), s0, acc, input_precision=PREC)
    shifted = tl.dot(x, _shifts(2, 32, 0.5, 1.0, x.dtype), input_precision=PREC).to(CT)
    acc = tl.dot(_times_repeated(shifted, y, 2), s1, acc, input_precision=PREC)
    shifted = tl.dot(x, _shifts(4, 32, 0.5, 1.0, x.dtype), input_precision=PREC).to(CT)
    acc = tl.dot(_times_repeated(shifted, y, 2), s2, acc, input_precision=PREC)
    shifted = tl.dot(x, _shifts(6, 32, 0.5, 1.0, x.dtype), input_precision=PREC).to(CT)
    acc = tl.dot(_times_repeated(shifted, y, 2), s3, acc, input_precision=PREC)
    if NB == 2:
        acc = tl.dot(_opposites(exact, CT), s4, acc, input_precision=PREC)
    return acc


@triton.jit
def _gradient_pair(grad, x, exact, y, shifts, s, CT: tl.constexpr, PREC: tl.constexpr):
    """The part of `_gradient_tiles` of two shifts, whose rows of the state are s [32, DP]."""
    g = tl.dot(y, tl.trans(s), input_precision=PREC)  # [C, 32]
    # selectors are turned with tl.trans: built as [64, 16], Triton 3.6 stored them past their buffer (8 warps)
    grad = tl.dot(_times_repeated(g, exact, 2).to(CT), tl.trans(shifts), grad, input_precision=PREC)
    left, right = _halves(g * tl.dot(x, shifts, input_precision=PREC))
    return tl.dot((left + right).to(CT), _shifts(0, 16, 1.0, 1.0, x.dtype), grad, input_precision=PREC)


@triton.jit
def _gradient_tiles(grad, x, y, s0, s1, s2, s3, s4, NB: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """F <= 16: grad [C, 16] += half the gradient of sum_c y_c . (phi(x_c) @ state) by x, the quadratic part.

    The caller multiplies by 2, once, at the end. x: [C, 16]; y: [C, DP]; s0 to s3 [32, DP]: shifts 0 and 1, 2 and 3,
    and so on; s4 [16, DP]: shift 8, where F > 8. A feature has two factors, and each takes its part of the gradient,
    which half of x_a x_a's is (0.5); the others count twice.
    """
    exact = _in_place(x, PREC)
    grad = _gradient_pair(grad, x, exact, y, _shifts(0, 32, 0.5, 1.0, x.dtype), s0, CT, PREC)
    grad = _gradient_pair(grad, x, exact, y, _shifts(2, 32, 0.5, 1.0, x.dtype), s1, CT, PREC)
    grad = _gradient_pair(grad, x, exact, y, _shifts(4, 32, 0.5, 1.0, x.dtype), s2, CT, PREC)
    grad = _gradient_pair(grad, x, exact, y, _shifts(6, 32, 0.5, 1.0, x.dtype), s3, CT, PREC)
    if NB == 2:
        # the state's rows a and a + 8 are the same here, so both factors' parts are
        g = tl.dot(y, tl.trans(s4), input_precision=PREC)
        grad = tl.dot((g * exact).to(CT), _shifts(8, 16, 1.0, 1.0, x.dtype), grad, input_precision=PREC)
    return grad


@triton.jit
def _query_tile(
    acc, outer, selector, x_j, diagonal, state, tile, d_cols, DP: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """F > 16: acc [C, BD] += a tile's features, outer [C, 64] * (x_j [C, 16] @ selector), @ its rows of a state."""
    n = tl.arange(0, 64)
    inner = tl.dot(x_j, selector, input_precision=PREC)
    phi = (outer * inner * tl.where(diagonal, 1.0, 2.0)).to(CT)
    s = tl.load(state + (tile * 64 + n)[:, None] * DP + d_cols[None, :])  # [64, BD]
    return tl.dot(phi, s.to(CT), acc, input_precision=PREC)


@triton.jit
def _query_loop(
    acc, x_base, rows, ok, x_stride, state, d_cols,
    F: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, FLAT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """F > 16: acc [C, BD] += phi(x) @ state in a loop over the tiles; 16 dims of x at a time, of which 8 are used.

    Two loops, or one if FLAT, which makes a block's outer factor again for each of its tiles.
    """
    d = tl.arange(0, 16)
    outer_selector = _selector(True, False, x_base.dtype.element_ty)
    inner_selector = _selector(False, False, x_base.dtype.element_ty)
    if FLAT:
        for tile in range(NB * (NB + 1) // 2):
            i, j = _tile_of(tile + tl.zeros([], tl.int32), NB)
            x_i = _load_rows(x_base, rows, ok, x_stride, i * 8 + d, F, False, True)
            outer = tl.dot(x_i, outer_selector, input_precision=PREC)
            x_j = _load_rows(x_base, rows, ok, x_stride, j * 8 + d, F, False, True)
            acc = _query_tile(acc, outer, inner_selector, x_j, i == j, state, tile, d_cols, DP, CT, PREC)
    else:
        tile = 0
        for i in range(NB):
            x_i = _load_rows(x_base, rows, ok, x_stride, i * 8 + d, F, False, True)
            outer = tl.dot(x_i, outer_selector, input_precision=PREC)
            for j in range(i, NB):
                x_j = _load_rows(x_base, rows, ok, x_stride, j * 8 + d, F, False, True)
                acc = _query_tile(acc, outer, inner_selector, x_j, i == j, state, tile, d_cols, DP, CT, PREC)
                tile += 1
    return acc


@triton.jit
def _query_low(
    acc, z, x, state, norm, d_cols, weight_lin, weight_const,
    FP: tl.constexpr, DP: tl.constexpr, FIRST: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr,
    NORM: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """acc [C, BD] and z [C] += the linear rows (x itself) and the constant row of the state."""
    if LIN:
        f = tl.arange(0, FP)
        s = tl.load(state + (FIRST + f)[:, None] * DP + d_cols[None, :])
        acc += weight_lin * tl.dot(x, s.to(CT), input_precision=PREC)
        if NORM:
            z += weight_lin * tl.sum(x.to(tl.float32) * tl.load(norm + FIRST + f)[None, :], 1)
    if CONST:
        ROW: tl.constexpr = FIRST + (FP if LIN else 0)
        acc += weight_const * tl.load(state + ROW * DP + d_cols)[None, :].to(tl.float32)
        if NORM:
            z += weight_const * tl.load(norm + ROW)
    return acc, z


@triton.jit
def _gradient_low(
    acc, y, yz, state, norm, weight, FIRST: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """acc [C, FP] += weight * (y @ state_lin^T + yz norm_lin): the linear features' part; yz [C] here."""
    f = tl.arange(0, FP)
    d = tl.arange(0, DP)
    s = tl.load(state + (FIRST + f)[None, :] * DP + d[:, None])
    g = tl.dot(y, s.to(CT), input_precision=PREC) + yz[:, None] * tl.load(norm + FIRST + f)[None, :]
    return acc + weight * g


@triton.jit
def _columns(value, CT: tl.constexpr):
    """A number a row, [C], as [C, 16] for the matrix units: the two parts of `_split`, then zeros."""
    f = tl.arange(0, 16)
    top, rest = _split(value, CT)
    return tl.where((f == 0)[None, :], top[:, None], tl.where((f == 1)[None, :], rest[:, None], 0.0)).to(CT)


# ---------------------------------------------------------------------------------------------------------------------
# States: sums of features over each segment, then running sums over the segments
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _block_product(outer, inner, x, rows, ok, stride, i, j, F: tl.constexpr, PREC: tl.constexpr):
    """F > 16: the features of tile (i, j) of some rows of x [T, F], a pointer, fp32 [64, C]; by selectors [64, 16]."""
    f = tl.arange(0, 16)
    xi = _load_columns(x, rows, ok, stride, i * 8 + f, F, False, True)  # [16, C], of which 8 are used
    xj = _load_columns(x, rows, ok, stride, j * 8 + f, F, False, True)
    return tl.dot(outer, xi, input_precision=PREC) * tl.dot(inner, xj, input_precision=PREC)


@triton.jit
def _add_tile(acc, z, phi, values, dz, REVERSE: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """One tile's sums: acc [64, BD] += phi [64, C] @ values, z [64] += sum phi, or z [64, 16] += phi @ dz."""
    acc = tl.dot(phi.to(CT), values, acc, input_precision=PREC)
    if REVERSE:
        z = tl.dot(phi.to(CT), dz, z, input_precision=PREC)
    else:
        z += tl.sum(phi, 1)
    return acc, z


@triton.jit
def _store_state(
    states, norms, slot, hkv, t0, d_cols, first, acc0, acc1, acc2, z0, z1, z2, NB: tl.constexpr, NR: tl.constexpr,
    DP: tl.constexpr, HKV: tl.constexpr, TG: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Writes tiles t0 to t0 + TG - 1 of one slot; sums of norms as `_add_tile` has them."""
    NT: tl.constexpr = _state_tiles(NB)
    n = tl.arange(0, 64)
    if REVERSE:
        z0 = tl.sum(z0, 1)
        z1 = tl.sum(z1, 1)
        z2 = tl.sum(z2, 1)
    s64 = slot.to(tl.int64) * HKV + hkv
    states += s64 * (NR * DP)
    norms += s64 * NR
    tl.store(states + (t0 * 64 + n)[:, None] * DP + d_cols[None, :], acc0.to(states.dtype.element_ty))
    tl.store(norms + t0 * 64 + n, z0, mask=(n < 64) & first)
    if TG > 1:
        more = (n < 64) & (t0 + 1 < NT)
        tl.store(
            states + ((t0 + 1) * 64 + n)[:, None] * DP + d_cols[None, :], acc1.to(states.dtype.element_ty),
            mask=more[:, None],
        )  # fmt: skip
        tl.store(norms + (t0 + 1) * 64 + n, z1, mask=more & first)
    if TG > 2:
        more = (n < (16 if NB <= 2 else 64)) & (t0 + 2 < NT)
        tl.store(
            states + ((t0 + 2) * 64 + n)[:, None] * DP + d_cols[None, :], acc2.to(states.dtype.element_ty),
            mask=more[:, None],
        )  # fmt: skip
        tl.store(norms + (t0 + 2) * 64 + n, z2, mask=more & first)


@triton.jit(do_not_specialize=["T", "SEGMENTS", "SLOTS", "N", "RUN"])
def _state_kernel(
    x, y, aux, states, norms, keep, cu, seg_seq, seg_off, slot_off,
    sxb, sxt, sxh, syb, syt, syh, smb,
    T, SEGMENTS, SLOTS, N, RUN,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr,
    NR: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, L: tl.constexpr, C: tl.constexpr, TG: tl.constexpr,
    REVERSE: tl.constexpr, LAST: tl.constexpr, HAS_INIT: tl.constexpr, RUNS: tl.constexpr,
    HAS_MASK: tl.constexpr, VARLEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The quadratic states of the RUN segments of a run, each of them the sum since the run's start.

    states [64 TG, BD] = sum_c phi(x_c) y_c, norms [64 TG] = sum_c phi(x_c).

    REVERSE: x, y are q, do / z and runs go towards the sequence's start; the norms weigh dz_c, which comes as aux
    [B, T, H, 16] (see `_columns`); heads of a group are summed. Without RUNS a run is one segment.
    Grid: groups of TG tiles * blocks of BD value dims * HKV * runs; packed sequences have a program for every
    segment, of which the first of a run works. All products are [64, C] x [C, BD].
    """
    NT: tl.constexpr = _state_tiles(NB)
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
        batch, seq, index, count, start, tokens, _row = _segment(r, L, L, T, N, cu, seg_seq, seg_off, True)
        if tokens <= 0:
            return
        order = index
        if REVERSE:
            order = count - 1 - index
        parts = tl.minimum(RUN, count - 1 + LAST - order)
        if parts <= 0:
            return
        if order & (RUN - 1) != 0:
            return
        slot = tl.load(slot_off + seq) + order + HAS_INIT
        left = tl.load(cu + seq + 1) - start
    else:
        batch = _batch_row()
        if batch >= N:
            return
        order = r * RUN
        parts = tl.minimum(RUN, SEGMENTS - order)
        count = (T + L - 1) // L
        index = order
        if REVERSE:
            index = count - 1 - order
        start = index * L
        slot = batch * SLOTS + order + HAS_INIT
        left = T - start
    b64 = batch.to(tl.int64) if not VARLEN else tl.zeros([], tl.int64)
    x += b64 * sxb + start.to(tl.int64) * sxt + hkv * G * sxh
    y += b64 * syb + start.to(tl.int64) * syt + hkv * G * syh
    if HAS_MASK:
        keep += b64 * smb + start
    if REVERSE:
        aux += ((b64 * T + start) * (HKV * G) + hkv * G) * 16

    n = tl.arange(0, 64)
    f = tl.arange(0, 16)
    acc0 = tl.zeros([64, BD], tl.float32)
    acc1 = tl.zeros([64, BD], tl.float32)
    acc2 = tl.zeros([64, BD], tl.float32)
    z0 = tl.zeros([64, 16] if REVERSE else [64], tl.float32)
    z1 = tl.zeros([64, 16] if REVERSE else [64], tl.float32)
    z2 = tl.zeros([64, 16] if REVERSE else [64], tl.float32)
    if NB > 2:
        i0, j0 = _tile_of(t0, NB)
        i1, j1 = _tile_of(tl.minimum(t0 + 1, NT - 1), NB)
        i2, j2 = _tile_of(tl.minimum(t0 + 2, NT - 1), NB)
    if not RUNS:
        parts = 1  # a loop of one step is no loop for the compiler, and takes no registers
    for part in range(parts):
        begin = part * L
        if REVERSE:
            begin = -begin
        steps = (tl.minimum(left - begin, L) + C - 1) // C
        for step in range(steps * G):
            g = 0
            if G > 1:
                g = step // steps
            rows = begin + (step - g * steps) * C + tl.arange(0, C)
            ok = _kept(keep, rows, left, HAS_MASK)
            xg = x + g * sxh
            dz = 0.0
            values = _load_rows(y + g * syh, rows, ok, syt, d_cols, D, D == DP, True)  # [C, BD]
            if REVERSE:
                dz = _load_rows(aux + g * 16, rows, ok, HKV * G * 16, f, 16, True, True)  # [C, 16]
            if NB <= 2:
                xt = _load_columns(xg, rows, ok, sxt, f, F, F == 16, True)  # [16, C]
                repeated = tl.dot((n[:, None] % 16 == f[None, :]).to(xt.dtype), xt, input_precision=PREC)  # [64, C]
                phi = repeated * tl.dot(tl.trans(_shifts(0, 64, 1.0, 1.0, xt.dtype)), xt, input_precision=PREC)
                acc0, z0 = _add_tile(acc0, z0, phi, values, dz, REVERSE, CT, PREC)
                phi = repeated * tl.dot(tl.trans(_shifts(4, 64, 1.0, 1.0, xt.dtype)), xt, input_precision=PREC)
                acc1, z1 = _add_tile(acc1, z1, phi, values, dz, REVERSE, CT, PREC)
                if NB == 2:
                    # of 64 rows the first 16 are used: shift 8. Products of 16 rows were slower.
                    phi = repeated * tl.dot(tl.trans(_shifts(8, 64, 1.0, 1.0, xt.dtype)), xt, input_precision=PREC)
                    acc2, z2 = _add_tile(acc2, z2, phi, values, dz, REVERSE, CT, PREC)
            else:
                outer_selector = _selector(True, True, x.dtype.element_ty)
                inner_selector = _selector(False, True, x.dtype.element_ty)
                phi = _block_product(outer_selector, inner_selector, xg, rows, ok, sxt, i0, j0, F, PREC)
                acc0, z0 = _add_tile(acc0, z0, phi, values, dz, REVERSE, CT, PREC)
                if TG > 1:
                    phi = _block_product(outer_selector, inner_selector, xg, rows, ok, sxt, i1, j1, F, PREC)
                    acc1, z1 = _add_tile(acc1, z1, phi, values, dz, REVERSE, CT, PREC)
                if TG > 2:
                    phi = _block_product(outer_selector, inner_selector, xg, rows, ok, sxt, i2, j2, F, PREC)
                    acc2, z2 = _add_tile(acc2, z2, phi, values, dz, REVERSE, CT, PREC)
        _store_state(
            states, norms, slot + part, hkv, t0, d_cols, first, acc0, acc1, acc2, z0, z1, z2, NB, NR, DP, HKV, TG,
            REVERSE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "SEGMENTS", "SLOTS", "N"])
def _low_state_kernel(
    x, y, delta, states, norms, keep, cu, seg_seq, seg_off, slot_off,
    sxb, sxt, sxh, syb, syt, syh, smb,
    T, SEGMENTS, SLOTS, N, weight_lin, weight_const,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr,
    NR: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, L: tl.constexpr, C: tl.constexpr,
    LIN: tl.constexpr, CONST: tl.constexpr, REVERSE: tl.constexpr, LAST: tl.constexpr, HAS_INIT: tl.constexpr,
    HAS_MASK: tl.constexpr, VARLEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The linear rows (x itself) and the constant row (1) of a segment's state, where c1 and c0 ask for them."""
    D_BLOCKS: tl.constexpr = DP // BD
    first = tl.program_id(0) % D_BLOCKS == 0
    d_cols = (tl.program_id(0) % D_BLOCKS) * BD + tl.arange(0, BD)
    pid = tl.program_id(0) // D_BLOCKS
    hkv = pid % HKV
    r = pid // HKV
    if VARLEN:
        batch, seq, index, count, start, tokens, _row = _segment(r, L, L, T, N, cu, seg_seq, seg_off, True)
        if tokens <= 0:
            return
        order = index
        if REVERSE:
            order = count - 1 - index
        if order >= count - 1 + LAST:
            return
        slot = tl.load(slot_off + seq) + order + HAS_INIT
    else:
        batch = _batch_row()
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
    b64 = batch.to(tl.int64) if not VARLEN else tl.zeros([], tl.int64)
    x += b64 * sxb + start.to(tl.int64) * sxt + hkv * G * sxh
    y += b64 * syb + start.to(tl.int64) * syt + hkv * G * syh
    if HAS_MASK:
        keep += b64 * smb + start
    if REVERSE:
        delta += (b64 * HKV * G + hkv * G) * T + start
    f = tl.arange(0, FP)
    lin = tl.zeros([FP, BD], tl.float32)
    lin_norm = tl.zeros([FP], tl.float32)
    const = tl.zeros([BD], tl.float32)
    const_norm = tl.zeros([1], tl.float32)
    steps = (tokens + C - 1) // C
    for step in range(steps * G):
        g = step // steps
        rows = (step % steps) * C + tl.arange(0, C)
        ok = _kept(keep, rows, tokens, HAS_MASK)
        values = _load_rows(y + g * syh, rows, ok, syt, d_cols, D, D == DP, True)
        if REVERSE:
            weight = -tl.load(delta + g * T + rows, mask=ok, other=0.0)
        else:
            weight = ok.to(tl.float32)
        if LIN:
            xt = _load_columns(x + g * sxh, rows, ok, sxt, f, F, F == FP, True).to(tl.float32)
            lin = tl.dot(xt.to(CT), values, lin, input_precision=PREC)
            lin_norm += tl.sum(xt * weight[None, :], 1)
        if CONST:
            const += tl.sum(values.to(tl.float32), 0)
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
def _scan(
    data, last, base, final, e, ok_e, slots, step, rest, U: tl.constexpr, BE: tl.constexpr, KEEP_LAST: tl.constexpr
):  # fmt: skip
    u = tl.arange(0, U)
    carry = tl.zeros([BE], tl.float32)
    pointers = data + base + u.to(tl.int64)[:, None] * step + e[None, :]
    ok = (u < slots)[:, None] & ok_e[None, :]
    part = tl.load(pointers, mask=ok, other=0.0)
    for i in range(0, slots, U):
        later = pointers + U * step
        ok_later = ((i + U + u) < slots)[:, None] & ok_e[None, :]
        ahead = tl.load(later, mask=ok_later, other=0.0)  # on its way while these are summed
        part = part.to(tl.float32)
        total = tl.cumsum(part, 0) + carry[None, :]
        tl.store(pointers, total.to(data.dtype.element_ty), mask=ok)
        carry += tl.sum(part, 0)
        pointers, ok, part = later, ok_later, ahead
    if KEEP_LAST:
        pointers = data + base + (slots - 1).to(tl.int64) * step + rest + e
        carry += tl.load(pointers, mask=ok_e & (rest > 0), other=0.0).to(tl.float32)
        tl.store(last + final + e, carry, mask=ok_e)


@triton.jit(do_not_specialize=["SLOTS", "RUN"])
def _scan_kernel(
    states, norms, last_states, last_norms, slot_off, SLOTS, RUN,
    E: tl.constexpr, NR: tl.constexpr, HKV: tl.constexpr, U: tl.constexpr, BE: tl.constexpr, VARLEN: tl.constexpr,
    HAS_INIT: tl.constexpr, KEEP_LAST: tl.constexpr,
):  # fmt: skip
    """Running sums over the last slot of each of a sequence's runs, in place, and over the initial state before them:
    states [slots, HKV, E], norms [slots, HKV, NR]; totals in fp32, with what follows the last whole run.

    Grid: (N * HKV, blocks of states, then of norms). U slots are loaded at once, so that their latencies overlap.
    """
    pid = tl.program_id(0)
    hkv = pid % HKV
    seq = pid // HKV
    if VARLEN:
        first = tl.load(slot_off + seq)
        slots = tl.load(slot_off + seq + 1) - first
    else:
        first = seq * SLOTS
        slots = SLOTS
    rest = ((slots - HAS_INIT) % RUN).to(tl.int64) * HKV
    slots = (slots - HAS_INIT) // RUN + HAS_INIT
    row = (first + (RUN - 1) * (1 - HAS_INIT)).to(tl.int64) * HKV + hkv
    step = RUN.to(tl.int64) * HKV
    p64 = pid.to(tl.int64)
    BLOCKS: tl.constexpr = (E + BE - 1) // BE
    if tl.program_id(1) < BLOCKS:
        e = tl.program_id(1) * BE + tl.arange(0, BE)
        _scan(states, last_states, row * E, p64 * E, e, e < E, slots, step * E, rest * E, U, BE, KEEP_LAST)
    else:
        e = (tl.program_id(1) - BLOCKS) * BE + tl.arange(0, BE)
        _scan(norms, last_norms, row * NR, p64 * NR, e, e < NR, slots, step * NR, rest * NR, U, BE, KEEP_LAST)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_tile(
    acc, z, xq, kt, values, rows, cols, ok, alpha, beta,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, DIAGONAL: tl.constexpr, HAS_MASK: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """acc [BM, BD], z [BM] += one tile of keys kt [FP, BM], values [BM, BD]."""
    s = tl.dot(xq, kt, input_precision=PREC)
    u = _polynomial(s, alpha, beta, QUAD, LIN, CONST)
    if DIAGONAL:
        u = tl.where(rows[:, None] >= cols[None, :], u, 0.0)
    if HAS_MASK and CONST:
        u = tl.where(ok[None, :], u, 0.0)
    z += tl.sum(u, 1)
    acc = tl.dot(u.to(CT), values, acc, input_precision=PREC)
    return acc, z


@triton.jit(do_not_specialize=["T", "SLOTS", "N", "RUN"])
def _forward_kernel(
    q, k, v, o, rz, states, norms, keep, cu, seg_seq, seg_off, slot_off,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, smb,
    T, SLOTS, N, RUN, alpha, beta, eps,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr,
    NR: tl.constexpr, H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    DV: tl.constexpr, FLAT: tl.constexpr,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INIT: tl.constexpr,
    RUNS: tl.constexpr, HAS_MASK: tl.constexpr, VARLEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """o [BM, BD] of one block of queries and one head, and rz = 1 / (normaliser + eps).

    Grid: blocks of BD value dims * H * blocks of BM queries. Heads run fast: they share cache lines. Whatever
    does not depend on other loads is loaded first, so that one wait covers all.
    """
    D_BLOCKS: tl.constexpr = DP // BD
    first = tl.program_id(0) % D_BLOCKS == 0
    d_cols = (tl.program_id(0) % D_BLOCKS) * BD + tl.arange(0, BD)
    pid = tl.program_id(0) // D_BLOCKS
    h = pid % H
    hkv = h // G
    batch, seq, index, _count, start, tokens, row = _segment(pid // H, BM, L, T, N, cu, seg_seq, seg_off, VARLEN)
    if row >= tokens:
        return
    b64 = batch.to(tl.int64) if not VARLEN else tl.zeros([], tl.int64)
    t64 = start.to(tl.int64)
    q += b64 * sqb + t64 * sqt + h * sqh
    k += b64 * skb + t64 * skt + hkv * skh
    v += b64 * svb + t64 * svt + hkv * svh
    if HAS_MASK:
        keep += b64 * smb + t64
    f = tl.arange(0, FP)
    block = tl.arange(0, BM)
    rows = row + block
    inside = rows < tokens
    xq = _load_rows(q, rows, inside, sqt, f, F, F == FP, True)  # [BM, FP]
    ok = _kept(keep, rows, tokens, HAS_MASK)
    kt = _load_columns(k, rows, ok, skt, f, F, F == FP, True)  # [FP, BM]
    values = _load_rows(v, rows, ok, svt, d_cols, DV, DV == DP, True)  # [BM, BD]
    if HAS_STATE:
        before, some, gap, more = _earlier(index, RUN, HAS_INIT, RUNS)
        if VARLEN:
            slot = tl.load(slot_off + seq) + before
        else:
            slot = seq * SLOTS + before
        s64 = slot.to(tl.int64) * (H // G) + hkv
        state = states + s64 * (NR * DP)
        norm = norms + s64 * NR
        gap *= H // G
        if QUAD and NB <= 2:
            s0 = _state_tile(state, gap * (NR * DP), d_cols, some, more, 64, DP, RUNS, CT)
            s1 = _state_tile(state + 64 * DP, gap * (NR * DP), d_cols, some, more, 64, DP, RUNS, CT)
            s2 = _state_tile(
                state + 128 * DP, gap * (NR * DP), d_cols, some & (NB == 2), more & (NB == 2), 16, DP, RUNS, CT
            )
            top, rest = _norm_matrix(norm, gap * NR, f, f, some, more, NB, RUNS, CT)
    if FP == 16:
        xq = _product(xq, xq, CT, PREC)
    acc = tl.zeros([BM, BD], tl.float32)
    z = tl.zeros([BM], tl.float32)
    acc, z = _forward_tile(
        acc, z, xq, kt, values, rows, rows, ok, alpha, beta, QUAD, LIN, CONST, True, HAS_MASK, CT, PREC
    )
    if HAS_STATE:
        if some | more:
            if QUAD:
                if NB <= 2:
                    acc = _query_tiles(acc, xq, s0, s1, s2, NB, CT, PREC)
                else:
                    acc = _query_loop(acc, q, rows, inside, sqt, state, d_cols, F, DP, NB, FLAT, CT, PREC)
                    top, rest = _norm_matrix(norm, 0, f, f, True, False, NB, False, CT)
                quad = tl.sum(_times_norm(xq, top, rest, PREC) * xq.to(tl.float32), 1)
                if not LIN and not CONST:
                    quad = tl.maximum(quad, 0.0)  # a sum of squares, which rounding may leave below 0
                z += quad
            if LIN or CONST:
                FIRST: tl.constexpr = _quadratic_rows(NB) if QUAD else 0
                acc, z = _query_low(
                    acc, z, xq, state, norm, d_cols, alpha, beta, FP, DP, FIRST, LIN, CONST, True, CT, PREC
                )
    for j in range(0, row, BM):
        cols = j + block
        ok = _kept(keep, cols, tokens, HAS_MASK)
        kt = _load_columns(k, cols, ok, skt, f, F, F == FP, HAS_MASK)
        values = _load_rows(v, cols, ok, svt, d_cols, DV, DV == DP, HAS_MASK)
        acc, z = _forward_tile(
            acc, z, xq, kt, values, rows, cols, ok, alpha, beta, QUAD, LIN, CONST, False, HAS_MASK, CT, PREC
        )
    z += eps
    inverse = tl.where(z == 0.0, 0.0, 1.0 / z)
    o += ((b64 * T + t64) * H + h) * D
    tl.store(
        o + rows[:, None] * (H * D) + d_cols[None, :], (acc * inverse[:, None]).to(o.dtype.element_ty),
        mask=inside[:, None] & (d_cols < D)[None, :],
    )  # fmt: skip
    tl.store(rz + (b64 * H + h) * T + t64 + rows, inverse, mask=inside & first)


@triton.jit(do_not_specialize=["T", "ROWS"])
def _pad_kernel(
    v, out, svb, svt, svh, T, ROWS, D: tl.constexpr, DP: tl.constexpr, HKV: tl.constexpr, BLOCK: tl.constexpr
):
    """out [B, T, HKV, DP] = v [B, T, HKV, D] and zeros; one program does BLOCK of the ROWS = B * T * HKV rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    ok = (row < ROWS)[:, None]
    token = row // HKV
    source = (token // T) * svb + (token % T) * svt + (row % HKV) * svh
    x = tl.load(v + source[:, None] + d[None, :], mask=ok & (d < D)[None, :], other=0.0)
    tl.store(out + row[:, None] * DP + d[None, :], x, mask=ok)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _scaled_gradient(
    o, do, rz, dn, delta, aux, rows, inside, sdt, D: tl.constexpr, DP: tl.constexpr, H: tl.constexpr, CT: tl.constexpr
):
    """delta = do . o / z and do / z of some rows; writes do / z, delta and -delta (see `_columns`) to dn, delta, aux.

    With them dv_j = sum_i u(s_ij) dn_i and du_ij = dn_i . v_j - delta_i: no 1 / z is left in the other kernels.
    """
    d = tl.arange(0, DP)
    f = tl.arange(0, 16)
    grad = _load_rows(do, rows, inside, sdt, d, D, D == DP, True).to(tl.float32)  # [BM, DP]
    out = _load_rows(o, rows, inside, H * D, d, D, D == DP, True).to(tl.float32)
    scale = tl.load(rz + rows, mask=inside, other=0.0)
    dl = tl.sum(grad * out, 1) * scale
    scaled = _once((grad * scale[:, None]).to(CT), CT)
    tl.store(dn + rows[:, None] * (H * DP) + d[None, :], scaled, mask=inside[:, None])
    tl.store(delta + rows, dl, mask=inside)
    tl.store(aux + rows[:, None] * (H * 16) + f[None, :], _columns(-dl, CT), mask=inside[:, None])
    return dl, scaled


@triton.jit(do_not_specialize=["T", "N"])
def _scale_kernel(
    o, do, rz, dn, delta, aux, sdb, sdt, sdh, T, N, D: tl.constexpr, DP: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """`_scaled_gradient` alone, where the state's part of dq needs it before `_dq_kernel` runs (F > 16)."""
    pid = tl.program_id(0)
    h = pid % H
    if _batch_row() >= N:
        return
    b64 = _batch_row().to(tl.int64)
    t64 = (pid // H).to(tl.int64) * BM
    rows = tl.arange(0, BM)
    first = (b64 * T + t64) * H + h
    vector = (b64 * H + h) * T + t64
    _scaled_gradient(
        o + first * D, do + b64 * sdb + t64 * sdt + h * sdh, rz + vector, dn + first * DP, delta + vector,
        aux + first * 16, rows, rows + t64 < T, sdt, D, DP, H, CT,
    )  # fmt: skip


@triton.jit
def _dq_tile(
    acc, xq, grad, dl, keys, vt, rows, cols, minus_half_alpha,
    QUAD: tl.constexpr, LIN: tl.constexpr, DIAGONAL: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """acc [BM, FP] += (dn . v - delta) u'(s) / 2 k over one tile of keys (u' itself where u is linear)."""
    du = tl.dot(grad, vt, input_precision=PREC) - dl[:, None]
    if QUAD:
        s = tl.dot(xq, tl.trans(keys), input_precision=PREC)
        if LIN:
            s -= minus_half_alpha  # not s += half_alpha: docs/kernels.md, "Limits of the compiler"
        du *= s
    if DIAGONAL:
        du = tl.where(rows[:, None] >= cols[None, :], du, 0.0)
    return tl.dot(du.to(CT), keys, acc, input_precision=PREC)  # a dropped key is 0 here


@triton.jit(do_not_specialize=["T", "SLOTS", "N", "RUN"])
def _dq_kernel(
    q, k, v, o, do, rz, dn, delta, aux, dq, part, states, norms, keep, cu, seg_seq, seg_off, slot_off,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sdb, sdt, sdh, smb,
    T, SLOTS, N, RUN, alpha, half_alpha,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    DV: tl.constexpr,
    QUAD: tl.constexpr, LIN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INIT: tl.constexpr, RUNS: tl.constexpr,
    PART: tl.constexpr, HAS_MASK: tl.constexpr, VARLEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq [BM, F] of one block of queries: dq_i = sum_j (dn_i . v_j - delta_i) u'(s_ij) k_j.

    Writes dn, delta and aux on the way, unless PART says that they are there, with the state's part of dq.
    """
    pid = tl.program_id(0)
    h = pid % H
    hkv = h // G
    batch, seq, index, _count, start, tokens, row = _segment(pid // H, BM, L, T, N, cu, seg_seq, seg_off, VARLEN)
    if row >= tokens:
        return
    b64 = batch.to(tl.int64) if not VARLEN else tl.zeros([], tl.int64)
    t64 = start.to(tl.int64)
    q += b64 * sqb + t64 * sqt + h * sqh
    k += b64 * skb + t64 * skt + hkv * skh
    v += b64 * svb + t64 * svt + hkv * svh
    if HAS_MASK:
        keep += b64 * smb + t64
    f = tl.arange(0, FP)
    d = tl.arange(0, DP)
    block = tl.arange(0, BM)
    rows = row + block
    inside = rows < tokens
    first = (b64 * T + t64) * H + h
    vector = (b64 * H + h) * T + t64
    xq = _load_rows(q, rows, inside, sqt, f, F, F == FP, True)
    ok = _kept(keep, rows, tokens, HAS_MASK)
    keys = _load_rows(k, rows, ok, skt, f, F, F == FP, True)  # [BM, FP]
    vt = _load_columns(v, rows, ok, svt, d, DV, DV == DP, True)  # [DP, BM]
    if HAS_STATE:
        before, some, gap, more = _earlier(index, RUN, HAS_INIT, RUNS)
        if VARLEN:
            slot = tl.load(slot_off + seq) + before
        else:
            slot = seq * SLOTS + before
        s64 = slot.to(tl.int64) * (H // G) + hkv
        state = states + s64 * (NR * DP)
        norm = norms + s64 * NR
        gap *= H // G
        if QUAD and NB <= 2:
            s0, s1, s2, s3, s4 = _state_pairs(state, gap * (NR * DP), d, some, more, NB, DP, RUNS, CT)
            top, rest = _norm_matrix(norm, gap * NR, f, f, some, more, NB, RUNS, CT)
    acc = tl.zeros([BM, FP], tl.float32)
    HELD: tl.constexpr = FP == 16 and DP <= 64 and CT == tl.bfloat16  # do / z stays in registers
    if PART:
        dl = tl.load(delta + vector + rows, mask=inside, other=0.0)
    else:
        dl, grad = _scaled_gradient(
            o + first * D, do + b64 * sdb + t64 * sdt + h * sdh, rz + vector, dn + first * DP, delta + vector,
            aux + first * 16, rows, inside, sdt, D, DP, H, CT,
        )  # fmt: skip
    if HELD:
        grad = _product(grad, keys, CT, PREC)
    else:
        if not PART:
            tl.debug_barrier()  # read back as an operand in shared memory: there are no registers for it
        grad = _load_rows(dn + first * DP, rows, inside, H * DP, d, DP, True, True)
    if FP == 16:
        xq = _product(xq, xq, CT, PREC)
    acc = _dq_tile(acc, xq, grad, dl, keys, vt, rows, rows, -half_alpha, QUAD, LIN, True, CT, PREC)
    if HAS_STATE:
        if some | more:
            if QUAD:
                if NB <= 2:
                    acc = _gradient_tiles(acc, xq, grad, s0, s1, s2, s3, s4, NB, CT, PREC)
            if LIN:
                FIRST: tl.constexpr = _quadratic_rows(NB) if QUAD else 0
                acc = _gradient_low(
                    acc, grad, -dl, state, norm, half_alpha if QUAD else alpha, FIRST, FP, DP, CT, PREC
                )  # fmt: skip
    for j in range(0, row, BM):
        cols = j + block
        ok = _kept(keep, cols, tokens, HAS_MASK)
        keys = _load_rows(k, cols, ok, skt, f, F, F == FP, HAS_MASK)
        vt = _load_columns(v, cols, ok, svt, d, DV, DV == DP, HAS_MASK)
        acc = _dq_tile(acc, xq, grad, dl, keys, vt, rows, cols, -half_alpha, QUAD, LIN, False, CT, PREC)
    extra = tl.zeros([BM, FP], tl.float32)
    if HAS_STATE:
        if some | more:
            if QUAD:
                if NB > 2:
                    top, rest = _norm_matrix(norm, 0, f, f, True, False, NB, False, CT)
                # not before the loop: changed by hand there, acc would serialise the matrix units, and waiting for the
                # end of it takes registers
                extra = dl[:, None] * _times_norm(xq, top, rest, PREC)
    if PART:
        extra -= tl.load(part + first * FP + rows[:, None] * (H * FP) + f[None, :], mask=inside[:, None], other=0.0)
    if QUAD:
        acc = 2.0 * (acc - extra)
    elif not LIN:
        acc *= 0.0
    tl.store(
        dq + first * F + rows[:, None] * (H * F) + f[None, :], acc.to(dq.dtype.element_ty),
        mask=inside[:, None] & (f < F)[None, :],
    )  # fmt: skip


@triton.jit
def _dkdv_tile(
    dk, dv, xk, xv, pick, queries, grad, minus, rows, cols, alpha, half_alpha, beta,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, DIAGONAL: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk [BM, FP] and dv [BM, DP] += one tile of queries; tiles are transposed, [keys, queries].

    -delta reaches all rows through a matrix product, pick [BM, 16] @ minus^T: as a vector along the columns it would
    take 16 loads a thread.
    """
    du = tl.dot(pick, tl.trans(minus), input_precision=PREC)
    du = tl.dot(xv, tl.trans(grad), du, input_precision=PREC)
    if QUAD or LIN:
        s = tl.dot(xk, tl.trans(queries), input_precision=PREC)
        if DIAGONAL and not LIN and not CONST:
            s = tl.where(cols[None, :] >= rows[:, None], s, 0.0)  # a factor of u and of du
        u = _polynomial(s, alpha, beta, QUAD, LIN, CONST)
    else:
        u = du * 0.0 + 1.0
    if QUAD:
        if LIN:
            s += half_alpha
        du *= s
    if DIAGONAL and (LIN or CONST):
        below = cols[None, :] >= rows[:, None]
        u = tl.where(below, u, 0.0)
        du = tl.where(below, du, 0.0)
    dv = tl.dot(u.to(CT), grad, dv, input_precision=PREC)
    if QUAD or LIN:
        dk = tl.dot(du.to(CT), queries, dk, input_precision=PREC)
    return dk, dv


@triton.jit(do_not_specialize=["T", "SLOTS", "N", "RUN"])
def _dkdv_kernel(
    q, k, v, dn, aux, dk, dv, part, states, norms, keep, cu, seg_seq, seg_off, slot_off,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, smb,
    T, SLOTS, N, RUN, alpha, half_alpha, beta,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DV: tl.constexpr, FLAT: tl.constexpr,
    QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INIT: tl.constexpr,
    RUNS: tl.constexpr, PART: tl.constexpr, HAS_MASK: tl.constexpr, VARLEN: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """dk [BM, F] and dv [BM, D] of one block of keys, summed over the G query heads that share them.

    Tiles are BM keys by BN queries.
    dv_j = sum_i u(s_ij) dn_i, dk_j = sum_i (dn_i . v_j - delta_i) u'(s_ij) q_i; later segments come through R.
    """
    pid = tl.program_id(0)
    hkv = pid % HKV
    batch, seq, index, count, start, tokens, row = _segment(pid // HKV, BM, L, T, N, cu, seg_seq, seg_off, VARLEN)
    if row >= tokens:
        return
    b64 = batch.to(tl.int64) if not VARLEN else tl.zeros([], tl.int64)
    t64 = start.to(tl.int64)
    k += b64 * skb + t64 * skt + hkv * skh
    v += b64 * svb + t64 * svt + hkv * svh
    if HAS_MASK:
        keep += b64 * smb + t64
    f = tl.arange(0, FP)
    d = tl.arange(0, DP)
    f16 = tl.arange(0, 16)
    block = tl.arange(0, BN)
    rows = row + tl.arange(0, BM)
    inside = rows < tokens
    ok = _kept(keep, rows, tokens, HAS_MASK)
    xk = _load_rows(k, rows, ok, skt, f, F, F == FP, True)
    xv = _load_rows(v, rows, ok, svt, d, DV, DV == DP, True)
    if FP == 16 and DP <= 64:
        xv = _product(xv, xk, CT, PREC)
    pick = tl.where((f16 < 2)[None, :], rows[:, None] * 0 + 1.0, 0.0).to(CT)
    acc_k = tl.zeros([BM, FP], tl.float32)
    acc_v = tl.zeros([BM, DP], tl.float32)
    if HAS_STATE:
        before, some, gap, more = _earlier(count - 1 - index, RUN, HAS_INIT, RUNS)
        if VARLEN:
            slot = tl.load(slot_off + seq) + before
        else:
            slot = seq * SLOTS + before
        s64 = slot.to(tl.int64) * HKV + hkv
        state = states + s64 * (NR * DP)
        norm = norms + s64 * NR
        gap *= HKV
        if QUAD and NB <= 2:
            top, rest = _norm_matrix(norm, gap * NR, f, f, some, more, NB, RUNS, CT)
        if some | more:
            ones = tl.full([BM], 1.0, tl.float32)
            if QUAD:
                if NB <= 2:
                    # loaded here and, first, used for dk: fewer of them wait in registers
                    s0, s1, s2, s3, s4 = _state_pairs(state, gap * (NR * DP), d, some, more, NB, DP, RUNS, CT)
                    held = _product(xk, xk, CT, PREC)  # not as long as the loops: there are no registers for it
                    acc_k = _gradient_tiles(acc_k, held, xv, s0, s1, s2, s3, s4, NB, CT, PREC)
                    # phi(-x) = phi(x): with x, the compiler would keep the factors of one use for the other
                    minus_held = (held.to(tl.float32) * -1.0).to(held.dtype)
                    acc_v = _query_halves(acc_v, minus_held, s0, s1, s2, s3, s4, NB, CT, PREC)
                    acc_k += _times_norm(held, top, rest, PREC)
                else:
                    acc_v = _query_loop(acc_v, k, rows, ok, skt, state, d, F, DP, NB, FLAT, CT, PREC)
                    top, rest = _norm_matrix(norm, 0, f, f, True, False, NB, False, CT)
                    acc_k += _times_norm(xk, top, rest, PREC)
            if PART:
                base = part + ((b64 * T + t64) * HKV + hkv) * FP
                acc_k += tl.load(base + rows[:, None] * (HKV * FP) + f[None, :], mask=inside[:, None], other=0.0)
            if LIN or CONST:
                FIRST: tl.constexpr = _quadratic_rows(NB) if QUAD else 0
                acc_v, ones = _query_low(
                    acc_v, ones, xk, state, norm, d, 1.0, 1.0, FP, DP, FIRST, LIN, CONST, False, CT, PREC
                )
                if LIN:
                    acc_k = _gradient_low(
                        acc_k, xv, ones, state, norm, 0.5 if QUAD else 1.0, FIRST, FP, DP, CT, PREC
                    )  # fmt: skip
    for g in range(G):
        h = hkv * G + g
        first = (b64 * T + t64) * (HKV * G) + h
        qg = q + b64 * sqb + t64 * sqt + h * sqh
        dg = dn + first * DP
        ag = aux + first * 16
        later = tl.full([BN], True, tl.int1)
        full = row + BM
        if BM == BN:
            queries = _load_rows(qg, rows, inside, sqt, f, F, F == FP, True)  # [BM, FP]
            grad = _load_rows(dg, rows, inside, HKV * G * DP, d, DP, True, True)  # [BM, DP]
            minus = _load_rows(ag, rows, inside, HKV * G * 16, f16, 16, True, True)  # [BM, 16]
            acc_k, acc_v = _dkdv_tile(
                acc_k, acc_v, xk, xv, pick, queries, grad, minus, rows, rows, alpha, half_alpha, beta,
                QUAD, LIN, CONST, True, CT, PREC,
            )  # fmt: skip
        else:
            # A block has several narrow tiles on its diagonal: a loop keeps their loads ahead. The last tile of all,
            # if it is not full, comes with them: it needs a mask too, and a loop of its own would take registers.
            full += tl.maximum(tokens - row - BM, 0) // BN * BN
            end = tl.minimum(row + BM, tokens) + tl.where(full < tokens, BN, 0)
            for i in range(row, end, BN):
                cols = tl.where(i < row + BM, i, full) + block
                later = cols < tokens
                queries = _load_rows(qg, cols, later, sqt, f, F, F == FP, True)
                grad = _load_rows(dg, cols, later, HKV * G * DP, d, DP, True, True)
                minus = _load_rows(ag, cols, later, HKV * G * 16, f16, 16, True, True)
                acc_k, acc_v = _dkdv_tile(
                    acc_k, acc_v, xk, xv, pick, queries, grad, minus, rows, cols, alpha, half_alpha, beta,
                    QUAD, LIN, CONST, True, CT, PREC,
                )  # fmt: skip
                acc_k = _finished(acc_k, CT)
                acc_v = _finished(acc_v, CT)
        after = (row + BM).to(tl.int64)
        qg += after * sqt
        dg += after * (HKV * G * DP)
        ag += after * (HKV * G * 16)
        if CT == tl.bfloat16 or BM != BN:  # one copy of the loop less to compile in fp32, where it is long
            # full tiles need no mask, and pointers that walk make an address a sum of two numbers
            if BM == BN:
                full += tl.maximum(tokens - row - BM, 0) // BN * BN
            for _step in range(row + BM, full, BN):
                queries = _load_rows(qg, block, later, sqt, f, F, F == FP, False)
                grad = _load_rows(dg, block, later, HKV * G * DP, d, DP, True, False)
                minus = _load_rows(ag, block, later, HKV * G * 16, f16, 16, True, False)
                qg += BN * sqt
                dg += BN * HKV * G * DP
                ag += BN * HKV * G * 16
                acc_k, acc_v = _dkdv_tile(
                    acc_k, acc_v, xk, xv, pick, queries, grad, minus, rows, rows, alpha, half_alpha, beta,
                    QUAD, LIN, CONST, False, CT, PREC,
                )  # fmt: skip
                if BM != BN:
                    acc_k = _finished(acc_k, CT)
                    acc_v = _finished(acc_v, CT)
        if BM == BN:
            for i in tl.range(full, tokens, BN, num_stages=1):  # the last tile, if it is not full
                later = i + block < tokens
                queries = _load_rows(qg, i - full + block, later, sqt, f, F, F == FP, True)
                grad = _load_rows(dg, i - full + block, later, HKV * G * DP, d, DP, True, True)
                minus = _load_rows(ag, i - full + block, later, HKV * G * 16, f16, 16, True, True)
                acc_k, acc_v = _dkdv_tile(
                    acc_k, acc_v, xk, xv, pick, queries, grad, minus, rows, rows, alpha, half_alpha, beta,
                    QUAD, LIN, CONST, False, CT, PREC,
                )  # fmt: skip
    if QUAD:
        acc_k *= 2.0
    if HAS_MASK:
        acc_k = tl.where(ok[:, None], acc_k, 0.0)
        acc_v = tl.where(ok[:, None], acc_v, 0.0)
    dk += ((b64 * T + t64) * HKV + hkv) * F
    dv += ((b64 * T + t64) * HKV + hkv) * D
    tl.store(
        dk + rows[:, None] * (HKV * F) + f[None, :], acc_k.to(dk.dtype.element_ty),
        mask=inside[:, None] & (f < F)[None, :],
    )  # fmt: skip
    tl.store(
        dv + rows[:, None] * (HKV * D) + d[None, :], acc_v.to(dv.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "SLOTS", "N"])
def _gradient_kernel(
    x, y, part, states, keep, cu, seg_seq, seg_off, slot_off,
    sxb, sxt, sxh, syb, syt, syh, smb,
    T, SLOTS, N,
    F: tl.constexpr, D: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    KEYS: tl.constexpr, HAS_INIT: tl.constexpr, HAS_MASK: tl.constexpr, VARLEN: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """F > 16: 16 dims of half the gradient by x that comes through the state (see `_gradient_tiles`), fp32.

    KEYS: x, y are k, v and the state is R; otherwise q, dn and S. The norms' part is left to the caller.
    Grid: slices of 16 dims * H * blocks of BM rows. Walks the ordered pairs of blocks (i in the slice, j).
    """
    slice_ = tl.program_id(0) % (FP // 16)
    pid = tl.program_id(0) // (FP // 16)
    h = pid % H
    hkv = h // G
    batch, seq, index, count, start, tokens, row = _segment(pid // H, BM, L, T, N, cu, seg_seq, seg_off, VARLEN)
    if row >= tokens:
        return
    b64 = batch.to(tl.int64) if not VARLEN else tl.zeros([], tl.int64)
    t64 = start.to(tl.int64)
    x += b64 * sxb + t64 * sxt + h * sxh
    y += b64 * syb + t64 * syt + h * syh
    if HAS_MASK:
        keep += b64 * smb + t64
    rows = row + tl.arange(0, BM)
    inside = rows < tokens
    ok = _kept(keep, rows, tokens, HAS_MASK)
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
        if VARLEN:
            slot = tl.load(slot_off + seq) + before
        else:
            slot = seq * SLOTS + before
        s64 = slot.to(tl.int64) * (H // G) + hkv
        state = states + s64 * (NR * DP)
        values = _load_rows(y, rows, ok, syt, d, D, D == DP, True)  # [BM, DP]
        inner_selector = _selector(False, False, x.dtype.element_ty)
        for step in range(2 * NB):
            half = step % 2
            i = slice_ * 2 + half
            j = step // 2
            # the stored tile is (min, max); read from the other side, its rows swap their two indices
            low = tl.minimum(i, j)
            high = tl.maximum(i, j)
            tile = low * NB - (low * (low - 1)) // 2 + high - low
            feature = tl.where(i < NB, tile, 0) * 64 + tl.where(i <= j, n, (n % 8) * 8 + n // 8)
            xj = _load_rows(x, rows, ok, sxt, j * 8 + f, F, False, True)
            inner = tl.dot(xj, inner_selector, input_precision=PREC)
            s = tl.load(state + feature[:, None] * DP + d[None, :])  # [64, DP]
            g = tl.dot(values, tl.trans(s.to(CT)), input_precision=PREC)
            # dims past the last block, where F is not a multiple of 16, are computed from tile 0 and never read
            fold = (f[:, None] == (n // 8 + half * 8)[None, :]).to(CT)  # [16, 64]
            acc = tl.dot((g * inner).to(CT), tl.trans(fold), acc, input_precision=PREC)
    tl.store(
        part + first * FP + rows[:, None] * (H * FP) + (slice_ * 16 + f)[None, :], acc, mask=inside[:, None]
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One token
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _decode_kernel(
    q, k, v, state, o, keep,
    sqb, sqh, skb, skh, svb, svh, ssb, ssh, ssf, ssd, smb,
    alpha, beta, eps,
    F: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, NF: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, BF: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """state [NF, D + 1] += phi(k) [v, 1] in place, then o of the G query heads from it, all in fp32.

    One program a batch row and key head, of one warp: Triton may hold a number in several warps, and one of them
    would read the state after another has stored it. The feature order is the public one; index pairs come from
    arithmetic, so that no table is needed. Tiles: features [BF], values [BF, BD], results [G, BD].
    """
    pid = tl.program_id(0)
    b = pid // (H // G)
    hkv = pid % (H // G)
    b64 = b.to(tl.int64)
    kept = 1.0
    if HAS_MASK:
        kept = (tl.load(keep + b64 * smb) != 0).to(tl.float32)
    q += b64 * sqb + hkv * G * sqh
    k += b64 * skb + hkv * skh
    v += b64 * svb + hkv * svh
    state += b64 * ssb + hkv * ssh
    d = tl.arange(0, BD)
    g = tl.arange(0, GP)
    value = tl.load(v + d, mask=d < D, other=0.0).to(tl.float32)
    value = tl.where(kept > 0, value, 0.0)
    if G == 1:
        acc = tl.zeros([BF, BD], tl.float32)
        z = tl.zeros([BF], tl.float32)
    else:
        acc = tl.zeros([GP, BD], tl.float32)
        z = tl.zeros([GP], tl.float32)
    PAIRS: tl.constexpr = F * (F + 1) // 2 if QUAD else 0
    ROOT2: tl.constexpr = 1.4142135623730951
    for start in range(0, NF, BF):
        n = start + tl.arange(0, BF)
        exists = n < NF
        rows = state + n * ssf
        tile = tl.load(rows[:, None] + d[None, :] * ssd, mask=exists[:, None] & (d < D)[None, :], other=0.0)
        total = tl.load(rows + D * ssd, mask=exists, other=0.0)
        # feature n is x_a x_b (times sqrt 2 where a < b), x_a, or 1
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
        tile += x[:, None] * value[None, :]
        total += x * kept
        tl.store(rows[:, None] + d[None, :] * ssd, tile, mask=exists[:, None] & (d < D)[None, :])
        tl.store(rows + D * ssd, total, mask=exists)
        weight = tl.where(has_second, factor, tl.where(linear, alpha, beta))
        weight = tl.where(exists, weight, 0.0)
        if G == 1:
            w = tl.load(q + first, mask=has_first & exists, other=1.0).to(tl.float32)
            w *= tl.load(q + second, mask=has_second & exists, other=1.0).to(tl.float32)
            w *= weight
            acc += w[:, None] * tile
            z += w * total
        else:
            ok = (g < G)[:, None] & exists[None, :]
            qg = q + g[:, None] * sqh
            w = tl.load(qg + first[None, :], mask=ok & has_first[None, :], other=1.0).to(tl.float32)
            w *= tl.load(qg + second[None, :], mask=ok & has_second[None, :], other=1.0).to(tl.float32)
            w *= weight[None, :]
            acc += tl.sum(w[:, :, None] * tile[None, :, :], 1)
            z += tl.sum(w * total[None, :], 1)
    if G == 1:
        z0 = tl.sum(z, 0) + eps
        out = tl.sum(acc, 0) * tl.where(z0 == 0.0, 0.0, 1.0 / z0)
        tl.store(o + (b64 * H + hkv) * D + d, out.to(o.dtype.element_ty), mask=d < D)
    else:
        z += eps
        out = acc * tl.where(z == 0.0, 0.0, 1.0 / z)[:, None]
        tl.store(
            o + (b64 * H + hkv * G + g)[:, None] * D + d[None, :], out.to(o.dtype.element_ty),
            mask=(g < G)[:, None] & (d < D)[None, :],
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Tile sizes of the kernels for one (F, D, dtype).

    segment: tokens between two states; forward, dq, dkdv, gradient: (rows of a tile, warps, stages);
    state, later: (tokens a step, warps, stages) of the sums over keys and over later queries;
    registers: most registers a thread, by kernel, where fewer than the compiler would take pay (ptxas then may run the
    matrix products one by one; the kernels are written so that it need not);
    narrow: queries of dkdv's tiles, where they are fewer than its keys;
    runs: most segments that one program of the sums over keys, and over later queries, walks through: powers of 2, 1
    where states have linear or constant rows, whose sums are not made that way;
    alone: tokens up to which a sequence is one segment, without states;
    flat: whether a loop over tiles is one, for the compiler of a GPU that fails on two.
    """

    segment: int
    forward: tuple[int, int, int]
    dq: tuple[int, int, int]
    dkdv: tuple[int, int, int]
    state: tuple[int, int, int]
    later: tuple[int, int, int]
    gradient: tuple[int, int, int]
    registers: tuple[tuple[str, int], ...] = ()
    narrow: int = 0
    runs: tuple[int, int] = (1, 1)
    alone: int = 0
    flat: bool = False

    def options(self, kernel: str) -> dict[str, int]:
        return {"maxnreg": n for name, n in self.registers if name == kernel and not _INTERPRETED}


_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _mend_interpreter() -> None:
    """Triton's interpreter (3.6) takes loop bounds with int() of arrays of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if getattr(original, "mended", False):
        return

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.mended = True
    interpreter._patch_lang_tensor = patch


if HAS_TRITON and _INTERPRETED:
    _mend_interpreter()


def _power_of_2(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Whether the plans that were measured on an H100 are meant for this device (or no GPU is to run anything)."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@functools.lru_cache
def _is_blackwell(device: torch.device) -> bool:
    """Whether Triton compiles for the tensor memory of compute capability 10 and 11."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (10, 11)


def _plan(feature_dim: int, head_dim: int, squares: bool, dtype: torch.dtype, device: torch.device) -> Plan:
    """Tile sizes, by size of the features, values, whether w has squares only, dtype and kind of GPU.

    The same on every call: nothing is timed.

    The segment trades the quadratic part (160 L / 2 operations a token at F = 16) against the states' traffic
    (features / L a token) and must not depend on T, so that shapes of saved tensors are plain formulas in T.
    A sequence that is one segment alone has states by that formula too, and no use for them.
    """
    if _INTERPRETED:
        small = feature_dim <= 16
        return Plan(64, *[(32, 4, 1)] * 6, narrow=16 if small else 0, runs=(4, 2) if small and squares else (1, 1))
    if feature_dim <= 16:
        segment = 512
    elif feature_dim <= 32:
        segment = 1024
    elif feature_dim <= 64:
        segment = 2048
    else:
        segment = _MOST_SEGMENT
    if dtype != torch.bfloat16:
        rows = (64, 4, 1) if feature_dim <= 64 and head_dim <= 64 else (32, 4, 1)
        return Plan(segment, rows, rows, rows, (32, 4, 1), (32, 4, 1), rows)
    if feature_dim <= 16 and head_dim <= 64:
        registers = (("forward", 128), ("dq", 128), ("dkdv", 128), ("state", 168))
        plan = Plan(segment, (64, 4, 3), (64, 4, 3), (64, 4, 3), (32, 4, 4), (64, 4, 3), (64, 4, 3), registers, 32)
        if squares:
            plan = plan._replace(segment=256, runs=(8, 4), alone=512)
    elif feature_dim <= 64 and head_dim <= 64:
        registers = (("forward", 168), ("dkdv", 168))
        plan = Plan(segment, (64, 4, 3), (64, 4, 2), (64, 4, 2), (32, 4, 3), (64, 4, 3), (64, 4, 3), registers)
    elif feature_dim <= 64 and head_dim <= 128:
        plan = Plan(segment, (64, 4, 2), (64, 4, 1), (64, 4, 1), (64, 4, 2), (64, 4, 2), (64, 4, 1))
    elif feature_dim <= 16:
        plan = Plan(segment, *[(64, 4, 1)] * 6)
    else:
        plan = Plan(segment, (64, 4, 1), (32, 4, 1), (32, 4, 1), (64, 4, 1), (64, 4, 1), (32, 4, 1))
    if not _is_hopper(device):  # operands of its products lie in shared memory, elsewhere in registers: no limits
        plan = plan._replace(registers=(), flat=_is_blackwell(device))
    return plan


class _Layout(NamedTuple):
    """What follows from F, D and the coefficients. A state has quadratic rows, then F linear ones, then 1 of 16."""

    f: int  # F padded to a power of 2, at least 16
    d: int  # D likewise
    blocks: int  # blocks of 8 dims
    tiles: int  # of the quadratic rows, see `_state_tiles`
    rows: int
    features: int  # rows of the public state
    quad: bool
    lin: bool
    const: bool
    alpha: float
    beta: float
    factor: float  # w = factor * u

    @property
    def squares(self) -> bool:
        return self.quad and not self.lin and not self.const


def _layout(feature_dim: int, head_dim: int, c0: float, c1: float, c2: float, scale: float) -> _Layout:
    quad, lin, const = c2 != 0, c1 != 0, c0 != 0
    if scale == 0:
        raise ValueError("scale: 0 makes every weight c0; the Triton kernels take any other number.")
    if quad:
        factor, alpha, beta = c2 * scale * scale, c1 / (c2 * scale), c0 / (c2 * scale * scale)
    elif lin:
        factor, alpha, beta = c1 * scale, 1.0, c0 / (c1 * scale)
    elif const:
        factor, alpha, beta = c0, 0.0, 1.0
    else:
        raise ValueError("coefficients: (0, 0, 0) weighs every key with 0; at least one has to differ from 0.")
    blocks = -(-feature_dim // 8) if quad else 1
    f = _power_of_2(feature_dim)
    rows = (_quadratic_rows(blocks) if quad else 0) + (f if lin else 0) + (16 if const else 0)
    features = n_features(feature_dim, (c0, c1, c2))
    tiles = _state_tiles(blocks) if quad else 0
    return _Layout(f, _power_of_2(head_dim), blocks, tiles, rows, features, quad, lin, const, alpha, beta, factor)


def n_features(feature_dim: int, coefficients: tuple[float, float, float] = (0.0, 0.0, 1.0)) -> int:
    """Rows of the public state: F (F + 1) / 2 if c2 != 0, F more if c1 != 0, one more if c0 != 0."""
    c0, c1, c2 = coefficients
    # int(): torch 2.11 cannot multiply a symbolic size by a bool
    return feature_dim * (feature_dim + 1) // 2 * int(c2 != 0) + feature_dim * int(c1 != 0) + int(c0 != 0)


def _index_tables(feature_dim: int, layout: _Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Between the public feature order and the kernels' rows.

    Returns (row of each feature [features], its factor: sqrt 2 for a < b; feature of each row [rows], its factor:
    1 / sqrt 2 likewise and 0 for padding). Computed on the device, without a copy from the host.
    """
    n, nb = feature_dim, layout.blocks
    row_parts, factor_parts, back_parts, inverse_parts = [], [], [], []
    first_row = first_feature = 0
    if layout.quad:
        a, b = torch.triu_indices(n, n, 1, device=device).unbind(0)
        square = torch.arange(n, device=device)
        a, b = torch.cat([square, a]), torch.cat([square, b])
        factor_parts.append(torch.where(a == b, 1.0, math.sqrt(2.0)))
        if nb <= 2:
            row_parts.append(torch.where(b - a <= 8, (b - a) * 16 + a, (16 + a - b) * 16 + b))
            row = torch.arange(_quadratic_rows(nb), device=device)
            a, b = row % 16, (row % 16 + row // 16) % 16
        else:
            i, j = a // 8, b // 8
            row_parts.append((i * nb - i * (i - 1) // 2 + j - i) * 64 + a % 8 * 8 + b % 8)
            tile_i, tile_j = torch.triu_indices(nb, nb, 0, device=device).unbind(0)
            inside = torch.arange(64, device=device)
            a = (tile_i[:, None] * 8 + inside // 8).flatten()
            b = (tile_j[:, None] * 8 + inside % 8).flatten()
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        feature = torch.where(low == high, low, n + low * (n - 1) - low * (low - 1) // 2 + high - low - 1)
        real = high < n
        back_parts.append(torch.where(real, feature, 0))
        inverse_parts.append(torch.where(low == high, 1.0, math.sqrt(0.5)) * real)
        first_row, first_feature = _quadratic_rows(nb), n * (n + 1) // 2
    if layout.lin:
        f = torch.arange(layout.f, device=device)
        row_parts.append(first_row + f[:n])
        factor_parts.append(torch.ones(n, device=device))
        back_parts.append(torch.where(f < n, first_feature + f, 0))
        inverse_parts.append((f < n).float())
        first_row, first_feature = first_row + layout.f, first_feature + n
    if layout.const:
        row_parts.append(torch.full((1,), first_row, device=device))
        factor_parts.append(torch.ones(1, device=device))
        back_parts.append(torch.full((16,), first_feature, device=device))
        inverse_parts.append((torch.arange(16, device=device) == 0).float())  # padding keeps rows aligned
    return torch.cat(row_parts), torch.cat(factor_parts), torch.cat(back_parts), torch.cat(inverse_parts)


def _to_public(states: Tensor, norms: Tensor, feature_dim: int, head_dim: int, layout: _Layout) -> Tensor:
    """Internal [N, H, rows, DP] and [N, H, rows] to the public state [N, H, features, D + 1]."""
    row, factor, _, _ = _index_tables(feature_dim, layout, states.device)
    values = states.index_select(2, row)[..., :head_dim]
    return torch.cat([values, norms.index_select(2, row)[..., None]], -1) * factor[:, None]


def _to_internal(public: Tensor, feature_dim: int, head_dim: int, layout: _Layout) -> tuple[Tensor, Tensor]:
    """The public state to internal ([N, H, rows, D], [N, H, rows])."""
    _, _, feature, factor = _index_tables(feature_dim, layout, public.device)
    rows = public.float().index_select(2, feature) * factor[:, None]
    return rows[..., :head_dim], rows[..., head_dim]


# ---------------------------------------------------------------------------------------------------------------------
# Launching
# ---------------------------------------------------------------------------------------------------------------------


class _Segments(NamedTuple):
    """How the tokens are cut: tables for packed sequences, and how many slots (stored states) each sequence has."""

    sequences: int
    slots: int  # slots of each sequence, or of all together if packed
    total: int  # slots of all sequences
    computed: int  # segments of a sequence whose own state is needed, or of all together if packed
    run: int  # segments that are summed one after another
    cu: Tensor | None
    seq_of: Tensor | None
    first_segment: Tensor | None
    first_slot: Tensor | None


def _slots(batch: int, length: int, segment: int, initial: bool, last: bool, sequences: int | None) -> int:
    """Slots of all sequences: a formula without branches on T, as the fake implementations need it."""
    if sequences is None:
        return batch * ((length - 1) // segment + int(initial) + int(last))
    return length // segment + sequences * (int(initial) + int(last))


def _cut(
    x: Tensor, kv_heads: int, known: _Pass, initial: bool, last: bool, cu: Tensor | None, reverse: bool = False
) -> _Segments:
    """The segments of x [B, T, ...], and what `initial` and `last` (a state before, one after) add to them.

    `reverse`: for the states of later queries, whose first is the last segment.
    """
    batch, length = x.shape[:2]
    segment = known.segment
    if cu is None:
        slots = (length - 1) // segment + initial + last
        computed = (length - 1) // segment + last
        run = _run(known, batch * computed, kv_heads, reverse, x.device)
        return _Segments(batch, slots, batch * slots, computed, run, None, None, None, None)
    sequences = cu.shape[0] - 1
    cu = cu.to(torch.int32).contiguous()
    count = (cu.diff() + segment - 1) // segment
    zero = torch.zeros(1, dtype=torch.int32, device=cu.device)
    first_segment = torch.cat([zero, count.cumsum(0, dtype=torch.int32)])
    slots = (count - 1 + int(last)).clamp(min=0) + int(initial)
    first_slot = torch.cat([zero, slots.cumsum(0, dtype=torch.int32)])
    most = length // segment + sequences
    numbers = torch.arange(most, dtype=torch.int32, device=cu.device)
    seq_of = torch.searchsorted(first_segment[1:].contiguous(), numbers, right=True, out_int32=True)
    seq_of = seq_of.clamp(max=sequences - 1)
    total = _slots(batch, length, segment, initial, last, sequences)
    run = _run(known, most, kv_heads, reverse, x.device)
    return _Segments(sequences, total, total, most, run, cu, seq_of, first_segment, first_slot)


def _run(known: _Pass, segments: int, kv_heads: int, reverse: bool, device: torch.device) -> int:
    """Segments of a run, a power of 2: as many as leave two programs a multiprocessor, of `segments` in all.

    The same for both passes over the same shapes, since dq reads what forward has stored.
    """
    run = known.plan.runs[reverse]
    while run > 1 and segments * kv_heads < 2 * run * _multiprocessors(device):
        run //= 2
    return run


def _in_float32(dtype: torch.dtype) -> bool:
    """Whether inputs of this type are turned into fp32 first: squares overflow fp16, and sums of them in bfloat16
    would lose what fp16 has over it; Triton's interpreter multiplies bfloat16 as if they were integers."""
    return dtype == torch.float16 or (_INTERPRETED and dtype != torch.float32)


def _precision(dtype: torch.dtype) -> str:
    """fp32 products: three TF32 products (error about 1e-7), or one where torch's own matmuls may use TF32."""
    if dtype != torch.float32:
        return "tf32"
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _compute_type(dtype: torch.dtype):
    """What features, weights and states are rounded to for the matrix units."""
    return tl.float32 if dtype == torch.float32 else tl.bfloat16


def _unit_stride(x: Tensor) -> Tensor:
    """x [B, T, H, dim], copied if its last stride is not 1, or if a kernel's 32-bit products of strides overflow."""
    _, token, head, unit = x.stride()
    if unit == 1 and token * _MOST_SEGMENT < 2**31 and head * x.shape[2] < 2**31:
        return x
    return x.contiguous()


def _even_rows(v: Tensor, known: _Pass) -> Tensor:
    """v with layout.d columns, the new ones 0, where the kernels can't count on rows that start at 16 bytes.

    Those can't be copied to shared memory asynchronously: every tile of keys would be waited for.
    """
    batch, length, heads, columns = v.shape
    if columns % 16 == 0:  # what Triton knows of a stride
        return v
    width = known.layout.d
    out = v.new_empty(batch, length, heads, width)
    rows, block = batch * length * heads, max(16, 4096 // width)
    _launch(
        known, "pad", _pad_kernel, (-(-rows // block),), (v, out, *v.stride()[:3], length, rows),
        lambda: {"D": columns, "DP": width, "HKV": heads, "BLOCK": block, "num_warps": 4},
    )  # fmt: skip
    return out


def _byte_mask(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask != 0
    return (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)


class _Pass:
    """What calls with inputs of the same kinds share: sizes, tiles and compiled kernels, each looked up once."""

    __slots__ = ("launches", "layout", "plan", "segment")

    def __init__(self, layout: _Layout, plan: Plan, length: int, packed: bool) -> None:
        self.layout, self.plan = layout, plan
        self.segment = plan.segment if packed or length > plan.alone else plan.alone
        self.launches: dict[str, tuple] = {}


_PASSES: dict[tuple, _Pass] = {}
_MOST_PASSES = 4096


def _pass(name: str, tensors: tuple[Tensor | None, ...], coefficients: tuple[float, ...], *options) -> _Pass:
    """The forward, backward or decoding pass over such inputs: q comes first and v third in `tensors`.

    The key holds whatever Triton compiles for: dtype, alignment and strides of a tensor, divisibility and size of an
    int, constants. Those of inner tensors and all grids follow from the inputs' own, for what torch allocates is
    aligned.
    """
    q, _, v = tensors[:3]
    kinds = [None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors]
    key = (name, q.device, _precision(q.dtype), coefficients, *options, *kinds)
    known = _PASSES.get(key)
    if known is None:
        if len(_PASSES) >= _MOST_PASSES:
            _PASSES.clear()
        layout = _layout(q.shape[3], v.shape[3], *coefficients)
        packed = name != "decode" and len(tensors) > 4 and tensors[4] is not None
        plan = _plan(q.shape[3], v.shape[3], layout.squares, q.dtype, q.device)
        known = _PASSES[key] = _Pass(layout, plan, q.shape[1], packed)
    return known


_MOST_PROGRAMS = 65535  # of axes 1 and 2 of a grid


def _grid(programs: int, rows: int) -> tuple[int, int, int]:
    """`programs` for each of `rows` batch rows, which the kernels find with `_batch_row`; there may be a few more."""
    if rows <= _MOST_PROGRAMS:
        return programs, rows, 1
    return programs, _MOST_PROGRAMS, -(-rows // _MOST_PROGRAMS)


def _launch(
    known: _Pass, name: str, kernel, grid: tuple[int, ...], arguments: tuple, flags: Callable[[], dict[str, Any]]
) -> None:
    """kernel[grid](*arguments, **flags()), remembering the compiled kernel as `name`: Triton takes 50 us to find it.

    `flags` gives the constexpr parameters and compiler options (num_warps and the like), and is not asked again.
    """
    launch = known.launches.get(name)
    if launch is None:
        values = flags()
        compiled = kernel[grid](*arguments, **values)
        if not _INTERPRETED:
            constants = tuple(values[flag] for flag in kernel.arg_names[len(arguments) :])
            known.launches[name] = compiled[(*grid, 1, 1)[:3]], constants
    else:
        run, constants = launch
        run(*arguments, *constants)


def _grid_of(q: Tensor, heads: int, rows: int, cut: _Segments, known: _Pass) -> tuple[int, int, int]:
    """`heads` programs for each block of `rows` tokens of q."""
    if cut.cu is not None:
        return _grid(cut.computed * (known.segment // rows) * heads, 1)
    return _grid(-(-q.shape[1] // rows) * heads, q.shape[0])


class _Guard:
    """Makes the tensor's GPU the current one while kernels are launched, where it is not (or the CPU interprets)."""

    def __init__(self, tensor: Tensor) -> None:
        elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
        self.guard = torch.cuda.device(tensor.device) if elsewhere else None

    def __enter__(self) -> None:
        if self.guard is not None:
            self.guard.__enter__()

    def __exit__(self, *exc) -> None:
        if self.guard is not None:
            self.guard.__exit__(*exc)


def _new_states(like: Tensor, slots: int, kv_heads: int, layout: _Layout, exact: bool) -> tuple[Tensor, Tensor]:
    """Flat storage for [slots, H_kv, rows, DP] and [slots, H_kv, rows].

    In the compute type, or in fp32 if the totals are results of their own (`exact`). The spare elements keep sizes
    away from 0 and 1, on which torch.export would specialise the sequence length.
    """
    exact = exact or like.dtype != torch.bfloat16 or _INTERPRETED
    rows = slots * kv_heads * layout.rows
    # opcheck, which runs on the interpreter, compares every element, spare ones too
    empty = like.new_zeros if _INTERPRETED else like.new_empty
    states = empty(rows * layout.d + 16, dtype=torch.float32 if exact else torch.bfloat16)
    return states, empty(rows + 16, dtype=torch.float32)


def _make_states(
    x: Tensor, y: Tensor, states: Tensor, norms: Tensor, cut: _Segments, known: _Pass, mask: Tensor | None,
    kv_heads: int, weights: tuple[Tensor, Tensor] | None, initial: Tensor | None, last: bool, head_dim: int,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Fills `states` and `norms` with running sums; returns the totals in fp32 if `last`.

    `weights` (delta, aux) marks the backward direction: x, y are q, do / z and the sums run from the end.
    """
    batch, length, heads, feature_dim = x.shape
    layout, plan = known.layout, known.plan
    reverse = weights is not None
    varlen = cut.cu is not None
    if initial is not None:
        values, total = _to_internal(initial, feature_dim, head_dim, layout)
        rows = cut.total * kv_heads * layout.rows
        slots = (1 if varlen else batch, cut.slots, kv_heads, layout.rows)
        states_of, norms_of = states[: rows * layout.d].view(*slots, layout.d), norms[:rows].view(slots)
        if varlen:
            first = cut.first_slot[:-1].long()
            padded = states.new_zeros(cut.sequences, kv_heads, layout.rows, layout.d)
            padded[..., :head_dim] = values
            states_of.flatten(0, 1).index_copy_(0, first, padded)
            norms_of.flatten(0, 1).index_copy_(0, first, total)
        else:
            states_of[:, 0, ..., head_dim:] = 0
            states_of[:, 0, ..., :head_dim] = values
            norms_of[:, 0] = total
    block_d = min(layout.d, 64)
    tokens, warps, stages = plan.later if reverse else plan.state
    delta, aux = weights if reverse else (None, None)
    shape = (
        x.stride(0), x.stride(1), x.stride(2), y.stride(0), y.stride(1), y.stride(2),
        0 if mask is None else mask.stride(0), length, cut.computed, cut.slots, cut.sequences,
    )  # fmt: skip
    tables = (states, norms, mask, cut.cu, cut.seq_of, cut.first_segment, cut.first_slot)

    def flags() -> dict[str, Any]:
        return {
            "F": feature_dim, "D": y.shape[-1], "FP": layout.f, "DP": layout.d, "BD": block_d, "NR": layout.rows,
            "HKV": kv_heads, "G": heads // kv_heads, "L": known.segment, "C": tokens, "REVERSE": reverse,
            "LAST": int(last), "HAS_INIT": int(initial is not None), "HAS_MASK": mask is not None, "VARLEN": varlen,
            "CT": _compute_type(x.dtype), "PREC": _precision(x.dtype), "num_warps": warps,
        }  # fmt: skip

    batch_rows = 1 if varlen else batch
    programs = (cut.computed if varlen else -(-cut.computed // cut.run)) * kv_heads * (layout.d // block_d)
    if programs > 0 and layout.quad:
        group = min(layout.tiles, 3)
        _launch(
            known,
            "state",
            _state_kernel,
            _grid(-(-layout.tiles // group) * programs, batch_rows),
            (x, y, aux, *tables, *shape, cut.run),
            lambda: {
                **flags(),
                "RUNS": max(plan.runs) > 1,
                "NB": layout.blocks,
                "TG": group,
                "num_stages": stages,
                **plan.options("later" if reverse else "state"),
            },
        )
    if programs > 0 and (layout.lin or layout.const):
        _launch(
            known,
            "low state",
            _low_state_kernel,
            _grid(programs, batch_rows),
            (x, y, delta, *tables, *shape, layout.alpha if reverse else 1.0, layout.beta if reverse else 1.0),
            lambda: {
                **flags(),
                "FIRST": _quadratic_rows(layout.blocks) if layout.quad else 0,
                "LIN": layout.lin,
                "CONST": layout.const,
                "num_stages": 1,
            },
        )
    has_first = int(initial is not None)
    sums = (cut.slots - has_first) // cut.run + has_first
    if not last and (cut.total == 0 or (sums <= 1 and not varlen)):
        return None  # nothing to add up
    totals = None, None
    if last:
        totals = (
            norms.new_empty(cut.sequences, kv_heads, layout.rows, layout.d),
            norms.new_empty(cut.sequences, kv_heads, layout.rows),
        )
    elements = layout.rows * layout.d
    # At least an element a thread: a tile held twice would be added twice, the sums being in place. With 1,024
    # elements a thread has its 16 bytes of every slot, and sums them without the other threads.
    block = 1024
    together = 8 if varlen else min(8, _power_of_2(max(sums, 1), 2))
    _launch(
        known,
        "scan",
        _scan_kernel,
        (cut.sequences * kv_heads, -(-elements // block) - (-layout.rows // block)),
        (states, norms, *totals, cut.first_slot, cut.slots, cut.run),
        lambda: {
            "E": elements,
            "NR": layout.rows,
            "HKV": kv_heads,
            "U": together,
            "BE": block,
            "VARLEN": varlen,
            "HAS_INIT": has_first,
            "KEEP_LAST": last,
            "num_warps": 4,
        },
    )
    return totals if last else None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, c0: float, c1: float, c2: float, scale: float, eps: float, output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, final state (empty if not asked for), rz [B, H, T], and the states and norms that the backward pass reads."""
    if _in_float32(q.dtype):
        arguments = (attention_mask, cu_seqlens, initial_state, c0, c1, c2, scale, eps, output_final_state)
        o, *rest = _forward(q.float(), k.float(), v.float(), *arguments)
        return o.to(q.dtype), *rest
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    batch, length, heads, feature_dim = q.shape
    kv_heads, head_dim = v.shape[2:]
    mask = _byte_mask(attention_mask)
    initial = initial_state is not None
    inputs = (q, k, v, mask, cu_seqlens, initial_state)
    known = _pass("forward", inputs, (c0, c1, c2, scale), output_final_state)
    layout, plan = known.layout, known.plan
    with _Guard(q):
        v = _even_rows(v, known)
        cut = _cut(q, kv_heads, known, initial, output_final_state, cu_seqlens)
        varlen = cut.cu is not None
        o = q.new_empty(batch, length, heads, head_dim)
        rz = q.new_empty(batch, heads, length, dtype=torch.float32)
        # as many as the fake implementation says: a sequence that is one segment leaves some unused
        sequences = cut.sequences if varlen else None
        slots = _slots(batch, length, plan.segment, initial, output_final_state, sequences)
        states, norms = _new_states(q, slots, kv_heads, layout, output_final_state)
        totals = None
        if cut.total > 0 or output_final_state:
            totals = _make_states(
                k, v, states, norms, cut, known, mask, kv_heads, None, initial_state, output_final_state, head_dim
            )
        rows, warps, stages = plan.forward
        block_d = min(layout.d, 128)
        _launch(
            known,
            "forward",
            _forward_kernel,
            _grid_of(q, heads * (layout.d // block_d), rows, cut, known),
            (
                q,
                k,
                v,
                o,
                rz,
                states,
                norms,
                mask,
                cut.cu,
                cut.seq_of,
                cut.first_segment,
                cut.first_slot,
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                0 if mask is None else mask.stride(0),
                length,
                cut.slots,
                cut.sequences,
                cut.run,
                layout.alpha,
                layout.beta,
                eps / layout.factor,
            ),
            lambda: {
                "F": feature_dim,
                "D": head_dim,
                "DV": v.shape[-1],
                "FP": layout.f,
                "DP": layout.d,
                "BD": block_d,
                "NB": layout.blocks,
                "NR": layout.rows,
                "H": heads,
                "G": heads // kv_heads,
                "L": known.segment,
                "BM": rows,
                "FLAT": plan.flat,
                "QUAD": layout.quad,
                "LIN": layout.lin,
                "CONST": layout.const,
                "HAS_STATE": varlen or initial or length > known.segment,
                "HAS_INIT": int(initial),
                "RUNS": max(plan.runs) > 1,
                "HAS_MASK": mask is not None,
                "VARLEN": varlen,
                "CT": _compute_type(q.dtype),
                "PREC": _precision(q.dtype),
                "num_warps": warps,
                "num_stages": stages,
                **plan.options("forward"),
            },
        )
        if output_final_state:
            final = _to_public(*totals, feature_dim, head_dim, layout)
        else:
            final = norms.new_empty(0)
    return o, final, rz, states, norms


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, c0: float, c1: float, c2: float, scale: float, eps: float, output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, heads, feature_dim = q.shape
    kv_heads, head_dim = v.shape[2:]
    layout = _layout(feature_dim, head_dim, c0, c1, c2, scale)
    plan = _plan(feature_dim, head_dim, layout.squares, q.dtype, q.device)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = _slots(batch, length, plan.segment, initial_state is not None, output_final_state, sequences)
    if output_final_state:
        rows = batch if sequences is None else sequences
        final = q.new_empty(rows, kv_heads, layout.features, head_dim + 1, dtype=torch.float32)
    else:
        final = q.new_empty(0, dtype=torch.float32)
    return (
        q.new_empty(batch, length, heads, head_dim),
        final,
        q.new_empty(batch, heads, length, dtype=torch.float32),
        *_new_states(q, slots, kv_heads, layout, output_final_state),
    )


def _backward(
    grad: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, rz: Tensor, states: Tensor,
    norms: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, has_initial: bool, has_last: bool,
    grad_initial: bool, c0: float, c1: float, c2: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and the initial state's gradient (empty if not asked for)."""
    if _in_float32(q.dtype):
        dq, dk, dv, d_initial = _backward(
            grad.float(), grad_final, q.float(), k.float(), v.float(), o.float(), rz, states, norms, attention_mask,
            cu_seqlens, has_initial, has_last, grad_initial, c0, c1, c2, scale,
        )  # fmt: skip
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_initial
    q, k, v, grad, o = _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(grad), o.contiguous()
    batch, length, heads, feature_dim = q.shape
    kv_heads, head_dim = v.shape[2:]
    group = heads // kv_heads
    mask = _byte_mask(attention_mask)
    mask_stride = 0 if mask is None else mask.stride(0)
    final = grad_final is not None
    inputs = (q, k, v, mask, cu_seqlens, grad, grad_final, o, rz, states, norms)
    known = _pass("backward", inputs, (c0, c1, c2, scale), has_initial, has_last, grad_initial)
    layout, plan = known.layout, known.plan
    with _Guard(q):
        cut = _cut(q, kv_heads, known, has_initial, has_last, cu_seqlens)
        varlen = cut.cu is not None
        has_state = varlen or has_initial or length > known.segment
        dq = q.new_empty(q.shape)
        dk = k.new_empty(k.shape)
        dv = v.new_empty(v.shape)
        v = _even_rows(v, known)
        half = torch.float32 if q.dtype == torch.float32 or _INTERPRETED else torch.bfloat16
        dn = q.new_empty(batch, length, heads, layout.d, dtype=half)
        delta = torch.empty_like(rz)
        aux = q.new_empty(batch, length, heads, 16, dtype=half)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])

        def sizes() -> dict[str, Any]:
            return {
                "F": feature_dim, "D": head_dim, "FP": layout.f, "DP": layout.d, "NB": layout.blocks,
                "NR": layout.rows, "L": known.segment, "HAS_MASK": mask is not None, "VARLEN": varlen,
                "CT": _compute_type(q.dtype), "PREC": _precision(q.dtype),
            }  # fmt: skip

        def tables(cut: _Segments):
            return cut.cu, cut.seq_of, cut.first_segment, cut.first_slot

        def through_state(x: Tensor, y: Tensor, keys: bool, states: Tensor, cut: _Segments, init: bool) -> Tensor:
            rows, warps, stages = plan.gradient
            part = q.new_empty(batch, length, x.shape[2], layout.f, dtype=torch.float32)
            _launch(
                known,
                "gradient of keys" if keys else "gradient of queries",
                _gradient_kernel,
                _grid_of(q, x.shape[2] * (layout.f // 16), rows, cut, known),
                (
                    x,
                    y,
                    part,
                    states,
                    mask if keys else None,
                    *tables(cut),
                    *x.stride()[:3],
                    *y.stride()[:3],
                    mask_stride,
                    length,
                    cut.slots,
                    cut.sequences,
                ),
                lambda: {
                    **sizes(),
                    "D": y.shape[-1],
                    "HAS_MASK": keys and mask is not None,
                    "H": x.shape[2],
                    "G": 1 if keys else group,
                    "BM": rows,
                    "KEYS": keys,
                    "HAS_INIT": int(init),
                    "num_warps": warps,
                    "num_stages": stages,
                    **plan.options("gradient"),
                },
            )
            return part

        # beyond 16 dims the state's part of a gradient has a kernel of its own, which leaves it here
        parts = layout.quad and layout.blocks > 2 and has_state
        part = None
        if parts:
            _launch(
                known,
                "scale",
                _scale_kernel,
                _grid(-(-length // 64) * heads, batch),
                (o, grad, rz, dn, delta, aux, *grad.stride()[:3], length, batch),
                lambda: {"D": head_dim, "DP": layout.d, "H": heads, "BM": 64, "CT": _compute_type(q.dtype)},
            )
            part = through_state(q, dn, False, states, cut, has_initial)
        rows, warps, stages = plan.dq
        half_alpha = layout.alpha / 2 if layout.quad else 0.0
        _launch(
            known,
            "dq",
            _dq_kernel,
            _grid_of(q, heads, rows, cut, known),
            (
                q,
                k,
                v,
                o,
                grad,
                rz,
                dn,
                delta,
                aux,
                dq,
                part,
                states,
                norms,
                mask,
                *tables(cut),
                *strides,
                *grad.stride()[:3],
                mask_stride,
                length,
                cut.slots,
                cut.sequences,
                cut.run,
                layout.alpha,
                half_alpha,
            ),
            lambda: {
                **sizes(),
                "DV": v.shape[-1],
                "H": heads,
                "G": group,
                "BM": rows,
                "QUAD": layout.quad,
                "LIN": layout.lin,
                "HAS_STATE": has_state,
                "HAS_INIT": int(has_initial),
                "RUNS": max(plan.runs) > 1,
                "PART": parts,
                "num_warps": warps,
                "num_stages": stages,
                **plan.options("dq"),
            },
        )
        del part

        # from here on, the state of later queries: its first slot is the final state's gradient
        cut = _cut(q, kv_heads, known, final, grad_initial, cu_seqlens, reverse=True)
        has_state = varlen or final or length > known.segment
        later, later_norms = _new_states(q, cut.total, kv_heads, layout, grad_initial)
        totals = None
        if cut.total > 0 or grad_initial:
            totals = _make_states(
                q, dn, later, later_norms, cut, known, None, kv_heads, (delta, aux), grad_final, grad_initial, head_dim
            )
        parts = layout.quad and layout.blocks > 2 and has_state
        part = through_state(k, v, True, later, cut, final) if parts else None
        rows, warps, stages = plan.dkdv
        _launch(
            known,
            "dkdv",
            _dkdv_kernel,
            _grid_of(q, kv_heads, rows, cut, known),
            (
                q,
                k,
                v,
                dn,
                aux,
                dk,
                dv,
                part,
                later,
                later_norms,
                mask,
                *tables(cut),
                *strides,
                mask_stride,
                length,
                cut.slots,
                cut.sequences,
                cut.run,
                layout.alpha,
                half_alpha,
                layout.beta,
            ),
            lambda: {
                **sizes(),
                "DV": v.shape[-1],
                "HKV": kv_heads,
                "G": group,
                "BM": rows,
                "FLAT": plan.flat,
                "BN": plan.narrow or rows,
                "QUAD": layout.quad,
                "LIN": layout.lin,
                "CONST": layout.const,
                "HAS_STATE": has_state,
                "HAS_INIT": int(final),
                "RUNS": max(plan.runs) > 1,
                "PART": parts,
                "num_warps": warps,
                "num_stages": stages,
                **plan.options("dkdv"),
            },
        )
        if grad_initial:
            d_initial = _to_public(*totals, feature_dim, head_dim, layout)
        else:
            d_initial = rz.new_empty(0)
    return dq, dk, dv, d_initial


def _backward_fake(
    grad: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, rz: Tensor, states: Tensor,
    norms: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, has_initial: bool, has_last: bool,
    grad_initial: bool, c0: float, c1: float, c2: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, _, feature_dim = q.shape
    if grad_initial:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        features = n_features(feature_dim, (c0, c1, c2))
        d_initial = rz.new_empty(rows, v.shape[2], features, v.shape[3] + 1)
    else:
        d_initial = rz.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_initial


def _decode(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, attention_mask: Tensor | None,
    c0: float, c1: float, c2: float, scale: float, eps: float,
) -> Tensor:  # fmt: skip
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    batch, _, heads, feature_dim = q.shape
    kv_heads, head_dim = v.shape[2:]
    group = heads // kv_heads
    mask = _byte_mask(attention_mask)
    known = _pass("decode", (q, k, v, state, mask), (c0, c1, c2, scale))
    layout = known.layout
    o = q.new_empty(batch, 1, heads, head_dim)
    # features a step: the tile [heads, features, values] has to stay in one warp's registers
    heads_padded = 1 << (group - 1).bit_length()
    features = max(1, min(16, 1024 // (layout.d * heads_padded)))
    with _Guard(q):
        _launch(
            known,
            "decode",
            _decode_kernel,
            (batch * kv_heads,),
            (
                q,
                k,
                v,
                state,
                o,
                state if mask is None else mask,
                q.stride(0),
                q.stride(2),
                k.stride(0),
                k.stride(2),
                v.stride(0),
                v.stride(2),
                *state.stride(),
                0 if mask is None else mask.stride(0),
                layout.alpha,
                layout.beta,
                eps / layout.factor,
            ),
            lambda: {
                "F": feature_dim,
                "D": head_dim,
                "BD": layout.d,
                "NF": layout.features,
                "H": heads,
                "G": group,
                "GP": heads_padded,
                "BF": features,
                "QUAD": layout.quad,
                "LIN": layout.lin,
                "CONST": layout.const,
                "HAS_MASK": mask is not None,
                "num_warps": 1,
            },
        )
    return o


def _decode_fake(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, attention_mask: Tensor | None,
    c0: float, c1: float, c2: float, scale: float, eps: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], 1, q.shape[2], v.shape[3])


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, mask, cu, initial, c0, c1, c2, scale, _, last = inputs
    o, _final, rz, states, norms = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rz, states, norms)
    ctx.save_for_backward(q, k, v, mask, cu, o, rz, states, norms)
    ctx.coefficients = (c0, c1, c2, scale)
    ctx.has_initial = initial is not None
    ctx.has_last = last
    ctx.grad_initial = ctx.has_initial and ctx.needs_input_grad[5]
    ctx.initial_dtype = initial.dtype if initial is not None else None


def _make_autograd(backward_op):
    def autograd(ctx, grad, grad_final, *_):
        q, k, v, mask, cu, o, rz, states, norms = ctx.saved_tensors
        if grad is None and grad_final is None:
            return (None,) * 12
        if grad is None:
            grad = torch.zeros_like(o)
        if not ctx.has_last:
            grad_final = None
        dq, dk, dv, d_initial = backward_op(
            grad, grad_final, q, k, v, o, rz, states, norms, mask, cu, ctx.has_initial, ctx.has_last, ctx.grad_initial,
            *ctx.coefficients,
        )  # fmt: skip
        d_initial = d_initial.to(ctx.initial_dtype) if ctx.grad_initial else None
        return dq, dk, dv, None, None, d_initial, None, None, None, None, None, None

    return autograd


class _Attention(torch.autograd.Function):
    """The same forward and backward pass without the dispatcher: plain eager calls save most of the host's time."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    # second derivatives are an error, not silently 0
    backward = staticmethod(once_differentiable(_make_autograd(_backward)))


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether nobody traces or intercepts operators: then the registered ones have nothing to add."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors if x is not None)
    )


_COEFFICIENTS = "float c0, float c1, float c2, float scale"
_SCHEMAS = {
    "forward": "(Tensor q, Tensor k, Tensor v, Tensor? attention_mask, Tensor? cu_seqlens, Tensor? initial_state, "
    f"{_COEFFICIENTS}, float eps, bool output_final_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "backward": "(Tensor grad, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor o, Tensor rz, Tensor states, "
    "Tensor norms, Tensor? attention_mask, Tensor? cu_seqlens, bool has_initial, bool has_last, bool grad_initial, "
    f"{_COEFFICIENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "decode": "(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? attention_mask, "
    f"{_COEFFICIENTS}, float eps) -> Tensor",
}


def _register():
    """The operators of this very source text, registered once a process.

    Several copies of this file live in one process: the installed package, and one for each checkpoint loaded with
    trust_remote_code, reloaded at will. The namespace is a hash of the text, so that equal copies share operators and
    different versions never meet; the Library is kept on the torch module, so that no copy's end takes them away.
    """
    name = "rebased_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    libraries = torch.library.__dict__.setdefault("_rebased_libraries", {})
    if name not in libraries:
        library = torch.library.Library(name, "FRAGMENT")
        for op, (real, fake) in {
            "forward": (_forward, _forward_fake),
            "backward": (_backward, _backward_fake),
            "decode": (_decode, _decode_fake),
        }.items():
            library.define(op + _SCHEMAS[op], tags=torch.Tag.pt2_compliant_tag)
            library.impl(op, real, "CUDA")
            library.impl(op, real, "CPU")
            torch.library.register_fake(f"{name}::{op}", fake, lib=library)
        backward_op = getattr(torch.ops, name).backward.default
        torch.library.register_autograd(
            f"{name}::forward", _make_autograd(backward_op), setup_context=_setup_context, lib=library
        )
        libraries[name] = library
    return getattr(torch.ops, name)


_OPS = _register() if HAS_TRITON else None


def triton_unavailable_reason(device: torch.device, dtype: torch.dtype, feature_dim: int, head_dim: int) -> str | None:
    """Why the Triton backend cannot run for such tensors, or None if it can.

    `device` is where q, k and v are, `dtype` theirs, `feature_dim` F (1 to 128) and `head_dim` D (1 to 256).
    """
    if not HAS_TRITON:
        return "the package triton is not installed"
    device = torch.device(device)
    if device.type == "cuda":
        if _INTERPRETED:
            return None
        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(device)
            if major < 8:
                return f"it needs a GPU of compute capability 8.0 or higher, this one has {major}.{minor}"
            if dtype == torch.bfloat16 and feature_dim <= 16 and 128 < head_dim <= MAX_HEAD_DIM:
                shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
                if shared < _WIDE_BYTES:
                    needs = f"{_WIDE_BYTES:,} bytes of shared memory"
                    return f"head_dim {head_dim} in bfloat16 needs {needs}, and this GPU has {shared:,} for a block"
    elif device.type == "cpu":
        if not _INTERPRETED:
            return "the tensors are on the CPU (Triton kernels run there only with TRITON_INTERPRET=1, for tests)"
    else:
        return f"the tensors are on {device.type!r}, and the kernels are for GPUs"
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not one of bfloat16, float16 and float32"
    if not 1 <= feature_dim <= MAX_FEATURE_DIM:
        return f"feature_dim is {feature_dim}, and the kernels take 1 to {MAX_FEATURE_DIM}"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, and the kernels take 1 to {MAX_HEAD_DIM}"
    return None


def triton_rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """ReBased attention with Triton kernels; arguments are taken as checked (`rebased_attention` does that).

    Args:
        q: [B, T, H_q, F]; k: [B, T, H_kv, F]; v: [B, T, H_kv, D]: bfloat16, float16 or float32, one dtype, any strides
            (a copy is made only if the last one is not 1).
        coefficients: (c0, c1, c2) of w = c0 + c1 s + c2 s**2, s = scale * q . k.
        scale: factor of q . k, usually F**-0.5.
        eps: added to the normaliser.
        attention_mask: bool [B, T], False drops the token as a key; or None.
        cu_seqlens: int32 [N + 1], where packed sequences start and end, B = 1; or None.
        initial_state: fp32 [B or N, H_kv, n_features, D + 1], or None for zeros.
        output_final_state: also return the state after the last token.

    Returns:
        o [B, T, H_q, D] in q's dtype, and the final state, fp32 like the initial one, or None. A row whose normaliser
        (with eps) is 0 is 0.

    State: sum_j phi(k_j) [v_j, 1] over the kept keys, with k as given. phi's order: x_a x_a for every a; sqrt(2) x_a
    x_b for a < b, in the order of torch.triu_indices(F, F, 1); x_a if c1 != 0; 1 if c0 != 0. No squares if c2 == 0.
    """
    c0, c1, c2 = (float(c) for c in coefficients)
    inputs = (q, k, v, attention_mask, cu_seqlens, initial_state)
    options = (c0, c1, c2, float(scale), float(eps), output_final_state)
    if not _is_plain(*inputs):
        o, final, _, _, _ = _OPS.forward(*inputs, *options)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        o, final, _, _, _ = _Attention.apply(*inputs, *options)
    else:
        o, final, _, _, _ = _forward(*inputs, *options)
    return o, final if output_final_state else None


def triton_rebased_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """One token (T = 1) for every row of a batch: adds it to `state` in place and returns o [B, 1, H_q, D].

    q: [B, 1, H_q, F]; k: [B, 1, H_kv, F]; v: [B, 1, H_kv, D]; state: fp32 [B, H_kv, n_features, D + 1], layout as in
    `triton_rebased_attention`. A row with attention_mask [B, 1] False leaves its state as it was. No gradients. One
    kernel without host-side decisions on values: safe inside CUDA graphs.
    """
    c0, c1, c2 = (float(c) for c in coefficients)
    run = _decode if _is_plain(q, k, v, state, attention_mask) else _OPS.decode
    return run(q, k, v, state, attention_mask, c0, c1, c2, float(scale), float(eps))
