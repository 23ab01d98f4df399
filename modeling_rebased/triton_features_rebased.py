# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Features of queries and keys, and their products with a state, tile by tile.

The features phi(x) of x [F] are its products x_a x_b; they are never stored. An internal state has one row per
feature, and its *quadratic rows* come in one of two orders, of which F decides:

* F <= 16: row 16 s + a belongs to x_a x_(a + s mod 16). The *shifts* s from 0 to 8 have every pair: 144 rows for 136
  pairs, because shift 8 has its 8 pairs twice. Without the dims 8 to 15, the shifts 0 to 7 suffice.
* F > 16: the dims are cut into blocks of 8, and a *tile* of 64 rows belongs to the outer product of the blocks
  I <= J. Tiles are numbered row by row in the upper triangle of (I, J).

Both factors of a feature are made by the matrix units: x times a 0/1 matrix that takes each dim to its columns, which
is exact. Their elementwise product then lies in the registers where the next matrix product wants it.

*Low rows* follow the quadratic ones where the weights ask for them: FP linear rows (x itself) and the constant row.
"""

from __future__ import annotations

from .triton_language_rebased import tl, triton
from .triton_tiles_rebased import add_pairs, load_rows, multiply_pairs, split_in_two


@triton.constexpr_function
def count_tiles(blocks):
    """Return the tiles of a state's quadratic rows: of 64 rows each, but the third one of F <= 16 has 16."""
    return blocks + 1 if blocks <= 2 else blocks * (blocks + 1) // 2


@triton.constexpr_function
def quadratic_rows(blocks):
    """Return the number of quadratic rows of an internal state."""
    return 112 + 16 * blocks if blocks <= 2 else blocks * (blocks + 1) * 32


@triton.jit
def tile_of_blocks(low, high, NB: tl.constexpr):
    """Return the number of the tile of the blocks low <= high (F > 16)."""
    return low * NB - (low * (low - 1)) // 2 + high - low


@triton.jit
def blocks_of_tile(tile, NB: tl.constexpr):
    """Return the blocks (I, J), I <= J, of a tile's number (F > 16)."""
    root = tl.sqrt(((2 * NB + 1) * (2 * NB + 1) - 8 * tile).to(tl.float32))
    i = ((2 * NB + 1 - root) * 0.5).to(tl.int32)
    # The square root may land on the wrong side of an integer; integers put it right.
    i = tl.where(i * NB - (i * (i - 1)) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * NB - ((i + 1) * i) // 2 <= tile, i + 1, i)
    j = i + tile - (i * NB - (i * (i - 1)) // 2)
    return i, j


@triton.jit
def block_selector(OUTER: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr):
    """Return the 0/1 matrix [16, 64] that takes 8 of 16 dims to the 64 features of a tile (F > 16).

    Feature n takes dim n // 8 (OUTER) or n % 8. TRANSPOSED gives [64, 16].
    """
    n = tl.arange(0, 64)
    d = tl.arange(0, 16)
    if OUTER:
        source = n // 8
    else:
        source = n % 8
    # One return for all branches: Triton goes on compiling behind a `return` in a branch that is always taken.
    if TRANSPOSED:
        chosen = source[:, None] == d[None, :]
    else:
        chosen = d[:, None] == source[None, :]
    return chosen.to(DTYPE)


@triton.jit
def shift_matrix(
    FIRST: tl.constexpr, WIDTH: tl.constexpr, SQUARES: tl.constexpr, OTHERS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return the matrix [16, WIDTH] that takes x to the second factors x_(a + s mod 16) of shifts from FIRST on (F <=
    16).

    Column 16 (s - FIRST) + a is that of shift s. Its one entry that is not 0 is SQUARES where s = 0, where features
    are squares, and OTHERS elsewhere.
    """
    n = tl.arange(0, WIDTH)
    d = tl.arange(0, 16)
    source = (n + n // 16 + FIRST) % 16
    weight = tl.where(n < 16 - 16 * FIRST, SQUARES, OTHERS)
    return tl.where(d[:, None] == source[None, :], weight[None, :], 0.0).to(DTYPE)


@triton.jit
def load_norm_matrix(
    norm, rest_offset, a, b, has_whole, has_rest, NB: tl.constexpr, RUNS: tl.constexpr, CT: tl.constexpr
):  # fmt: skip
    """Load the quadratic part of a norm as a symmetric matrix M with rows a and columns b, split in two.

    phi(x) . norm = x^T M x. `rest_offset`, `has_whole` and `has_rest` say where the two parts of a sum lie, see
    `slots_before`.
    """
    if NB <= 2:
        shift = (b[None, :] - a[:, None] + 16) % 16
        place = tl.where(shift <= 8, shift * 16 + a[:, None], (16 - shift) * 16 + b[None, :])
        exists = place < quadratic_rows(NB)
    else:
        i = (a // 8)[:, None]
        j = (b // 8)[None, :]
        low = tl.minimum(i, j)
        high = tl.maximum(i, j)
        tile = tile_of_blocks(low, high, NB)
        a8 = (a % 8)[:, None]
        b8 = (b % 8)[None, :]
        place = tile * 64 + tl.where(i <= j, a8 * 8 + b8, b8 * 8 + a8)
        exists = high < NB
    value = tl.load(norm + place, mask=exists & has_whole, other=0.0)
    if RUNS:
        value += tl.load(norm + rest_offset + place, mask=exists & has_rest, other=0.0)
    top, rest = split_in_two(value, CT)
    return top.to(CT), rest.to(CT)


@triton.jit
def times_norm_matrix(x, top, rest, PREC: tl.constexpr):
    """Return x @ M in fp32, [C, columns]; M comes from `load_norm_matrix`."""
    y = tl.dot(x, top, input_precision=PREC)
    return tl.dot(x, rest, y, input_precision=PREC)


@triton.jit
def load_state_rows(
    state, rest_offset, d_cols, has_whole, has_rest, ROWS: tl.constexpr, DP: tl.constexpr, RUNS: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """Load ROWS rows of a state, [ROWS, BD], as the sum of both its parts (see `slots_before`); F <= 16.

    They are the rows of ROWS / 16 shifts.
    """
    n = tl.arange(0, ROWS)
    rows = state + n[:, None] * DP + d_cols[None, :]
    tile = tl.load(rows, mask=has_whole & (d_cols < DP)[None, :], other=0.0)
    if RUNS:
        rest = tl.load(rows + rest_offset, mask=has_rest & (d_cols < DP)[None, :], other=0.0)
        tile = add_pairs(tile, rest)
    return tile.to(CT)


@triton.jit
def load_shift_pairs(
    state, rest_offset, d, has_whole, has_rest, NB: tl.constexpr, DP: tl.constexpr, RUNS: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """Load the quadratic rows of a state as `shift_gradient` takes them: four times two shifts, and shift 8."""
    s0 = load_state_rows(state, rest_offset, d, has_whole, has_rest, 32, DP, RUNS, CT)
    s1 = load_state_rows(state + 32 * DP, rest_offset, d, has_whole, has_rest, 32, DP, RUNS, CT)
    s2 = load_state_rows(state + 64 * DP, rest_offset, d, has_whole, has_rest, 32, DP, RUNS, CT)
    s3 = load_state_rows(state + 96 * DP, rest_offset, d, has_whole, has_rest, 32, DP, RUNS, CT)
    has_8 = NB == 2
    s4 = load_state_rows(state + 128 * DP, rest_offset, d, has_whole & has_8, has_rest & has_8, 16, DP, RUNS, CT)
    return s0, s1, s2, s3, s4


@triton.jit
def _in_result_layout(x, PREC: tl.constexpr):
    """Return x [C, 16] in fp32, in the layout of a result of the matrix units.

    In it, a thread holds the same dims of every 16 columns of a tile, so that one copy of x serves all of them.
    """
    if x.dtype == tl.bfloat16:
        y = x.to(tl.float32)  # in this layout already, see `move_to_registers`
    else:
        d = tl.arange(0, 16)
        y = tl.dot(x, (d[:, None] == d[None, :]).to(x.dtype), input_precision=PREC)
    return y


@triton.jit
def _split_columns(x):
    """Return the left and the right half of the columns of x, without moving a number."""
    C: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, [C, 2, N // 2]), (0, 2, 1)))


@triton.jit
def _join_columns(left, right):
    """Put together what `_split_columns` takes apart."""
    C: tl.constexpr = left.shape[0]
    N: tl.constexpr = left.shape[1]
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [C, 2 * N])


@triton.jit
def _times_repeated(tile, x, WIDTH: tl.constexpr):
    """Return tile [C, 16 WIDTH] times x [C, 16], repeated WIDTH times along the columns, without moving a number."""
    C: tl.constexpr = tile.shape[0]
    left = tl.reshape(tile, [C, WIDTH, 16])
    right = tl.broadcast_to(x[:, None, :], [C, WIDTH, 16])
    return tl.reshape(multiply_pairs(left, right), [C, 16 * WIDTH])


@triton.jit
def _shift_8_features(x, CT: tl.constexpr):
    """Return the features x_a x_(a + 8) of x [C, 16] (see `_in_result_layout`): each pair in two of 16 columns."""
    left, right = _split_columns(x)
    both = (left * right).to(CT)
    return _join_columns(both, both)


@triton.jit
def _add_shifts(
    acc, x, y, s, FIRST: tl.constexpr, WIDTH: tl.constexpr, SQUARES: tl.constexpr, OTHERS: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add the features of the WIDTH shifts from FIRST on, times their rows of the state, s [16 WIDTH, BD], to acc.

    x and y are [C, 16]: the factors of each feature, the second in the layout of `_in_result_layout`.
    """
    shifted = tl.dot(x, shift_matrix(FIRST, 16 * WIDTH, SQUARES, OTHERS, x.dtype), input_precision=PREC).to(CT)
    return tl.dot(_times_repeated(shifted, y, WIDTH), s, acc, input_precision=PREC)


@triton.jit
def query_shifts(acc, x, s0, s1, s2, NB: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """Add the quadratic part of phi(x) @ state to acc [C, BD] (F <= 16).

    x is [C, 16]. s0 and s1 [64, BD] are the state's rows of the shifts 0 to 3 and 4 to 7, s2 [16, BD] those of shift
    8, which exists where F > 8. Factors are exact in the compute type, so a feature is rounded once, as a product of
    fp32 numbers would be. The shifts 1 to 7 count twice; shift 8 has its pairs twice.
    """
    exact = _in_result_layout(x, PREC)
    y = exact.to(CT)
    acc = _add_shifts(acc, x, y, s0, 0, 4, 1.0, 2.0, CT, PREC)
    acc = _add_shifts(acc, x, y, s1, 4, 4, 1.0, 2.0, CT, PREC)
    if NB == 2:
        acc = tl.dot(_shift_8_features(exact, CT), s2, acc, input_precision=PREC)
    return acc


@triton.jit
def query_shift_pairs(acc, x, s0, s1, s2, s3, s4, NB: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """Add what `query_shifts` adds, from a state in pairs of shifts, by the matrices that `shift_gradient` makes."""
    exact = _in_result_layout(x, PREC)
    y = (exact * 2.0).to(CT)
    acc = _add_shifts(acc, x, y, s0, 0, 2, 0.5, 1.0, CT, PREC)
    acc = _add_shifts(acc, x, y, s1, 2, 2, 0.5, 1.0, CT, PREC)
    acc = _add_shifts(acc, x, y, s2, 4, 2, 0.5, 1.0, CT, PREC)
    acc = _add_shifts(acc, x, y, s3, 6, 2, 0.5, 1.0, CT, PREC)
    if NB == 2:
        acc = tl.dot(_shift_8_features(exact, CT), s4, acc, input_precision=PREC)
    return acc


@triton.jit
def _shift_pair_gradient(grad, x, exact, y, shifts, s, CT: tl.constexpr, PREC: tl.constexpr):
    """Add to grad the part of `shift_gradient` of two shifts, whose rows of the state are s [32, DP]."""
    g = tl.dot(y, tl.trans(s), input_precision=PREC)  # [C, 32]
    # The matrices are turned by tl.trans: Triton 3.6 stored ones built as [64, 16] past their buffer (8 warps).
    grad = tl.dot(_times_repeated(g, exact, 2).to(CT), tl.trans(shifts), grad, input_precision=PREC)
    left, right = _split_columns(g * tl.dot(x, shifts, input_precision=PREC))
    return tl.dot((left + right).to(CT), shift_matrix(0, 16, 1.0, 1.0, x.dtype), grad, input_precision=PREC)


@triton.jit
def shift_gradient(grad, x, y, s0, s1, s2, s3, s4, NB: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """Add half the gradient of sum_c y_c . (phi(x_c) @ state) by x, its quadratic part, to grad [C, 16] (F <= 16).

    The caller multiplies by 2, once, at the end. x is [C, 16], y [C, DP]. s0 to s3 [32, DP] are the state's rows of
    the shifts 0 and 1, 2 and 3, and so on; s4 [16, DP] those of shift 8, which exists where F > 8. A feature has two
    factors and each takes its part of the gradient. Half of x_a x_a's is x_a (0.5 for each factor); the others count
    twice.
    """
    exact = _in_result_layout(x, PREC)
    grad = _shift_pair_gradient(grad, x, exact, y, shift_matrix(0, 32, 0.5, 1.0, x.dtype), s0, CT, PREC)
    grad = _shift_pair_gradient(grad, x, exact, y, shift_matrix(2, 32, 0.5, 1.0, x.dtype), s1, CT, PREC)
    grad = _shift_pair_gradient(grad, x, exact, y, shift_matrix(4, 32, 0.5, 1.0, x.dtype), s2, CT, PREC)
    grad = _shift_pair_gradient(grad, x, exact, y, shift_matrix(6, 32, 0.5, 1.0, x.dtype), s3, CT, PREC)
    if NB == 2:
        # Here the rows a and a + 8 of the state are equal, and so are the parts of both factors.
        g = tl.dot(y, tl.trans(s4), input_precision=PREC)
        grad = tl.dot((g * exact).to(CT), shift_matrix(8, 16, 1.0, 1.0, x.dtype), grad, input_precision=PREC)
    return grad


@triton.jit
def _query_tile(
    acc, outer, selector, x_j, diagonal, state, tile, d_cols, DP: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """Add a tile's features, outer [C, 64] * (x_j [C, 16] @ selector), times its rows of a state to acc [C, BD]."""
    n = tl.arange(0, 64)
    inner = tl.dot(x_j, selector, input_precision=PREC)
    phi = (outer * inner * tl.where(diagonal, 1.0, 2.0)).to(CT)
    s = tl.load(state + (tile * 64 + n)[:, None] * DP + d_cols[None, :])  # [64, BD]
    return tl.dot(phi, s.to(CT), acc, input_precision=PREC)


@triton.jit
def query_tiles(
    acc, x_base, rows, ok, x_stride, state, d_cols,
    F: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, FLAT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add the quadratic part of phi(x) @ state to acc [C, BD] in a loop over the tiles (F > 16).

    16 dims of x are loaded at a time, of which 8 are used. There are two loops, or one if FLAT, which makes the outer
    factor of a block again for each of its tiles.
    """
    d = tl.arange(0, 16)
    outer_selector = block_selector(True, False, x_base.dtype.element_ty)
    inner_selector = block_selector(False, False, x_base.dtype.element_ty)
    if FLAT:
        for tile in range(NB * (NB + 1) // 2):
            i, j = blocks_of_tile(tile + tl.zeros([], tl.int32), NB)
            x_i = load_rows(x_base, rows, ok, x_stride, i * 8 + d, F, False, True)
            outer = tl.dot(x_i, outer_selector, input_precision=PREC)
            x_j = load_rows(x_base, rows, ok, x_stride, j * 8 + d, F, False, True)
            acc = _query_tile(acc, outer, inner_selector, x_j, i == j, state, tile, d_cols, DP, CT, PREC)
    else:
        tile = 0
        for i in range(NB):
            x_i = load_rows(x_base, rows, ok, x_stride, i * 8 + d, F, False, True)
            outer = tl.dot(x_i, outer_selector, input_precision=PREC)
            for j in range(i, NB):
                x_j = load_rows(x_base, rows, ok, x_stride, j * 8 + d, F, False, True)
                acc = _query_tile(acc, outer, inner_selector, x_j, i == j, state, tile, d_cols, DP, CT, PREC)
                tile += 1
    return acc


@triton.jit
def query_low_rows(
    acc, z, x, state, norm, d_cols, weight_lin, weight_const,
    FP: tl.constexpr, DP: tl.constexpr, FIRST: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr,
    NORM: tl.constexpr, BY_ROW: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add the part of the state's low rows, which start at FIRST, to acc [C, BD] and, if NORM, to z [C].

    The weights are numbers, or [C, 1] if BY_ROW.
    """
    if LIN:
        f = tl.arange(0, FP)
        s = tl.load(state + (FIRST + f)[:, None] * DP + d_cols[None, :])
        acc += weight_lin * tl.dot(x, s.to(CT), input_precision=PREC)
        if NORM:
            low = x.to(tl.float32) * tl.load(norm + FIRST + f)[None, :]
            if BY_ROW:
                z += tl.sum(weight_lin * low, 1)
            else:
                z += weight_lin * tl.sum(low, 1)
    if CONST:
        ROW: tl.constexpr = FIRST + (FP if LIN else 0)
        acc += weight_const * tl.load(state + ROW * DP + d_cols)[None, :].to(tl.float32)
        if NORM:
            if BY_ROW:
                z += tl.sum(weight_const * tl.load(norm + ROW), 1)
            else:
                z += weight_const * tl.load(norm + ROW)
    return acc, z


@triton.jit
def low_rows_gradient(
    acc, y, yz, state, norm, weight, FIRST: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add the linear rows' part of a gradient, weight * (y @ state_lin^T + yz norm_lin), to acc [C, FP]; yz is [C]."""
    f = tl.arange(0, FP)
    d = tl.arange(0, DP)
    s = tl.load(state + (FIRST + f)[None, :] * DP + d[:, None])
    g = tl.dot(y, s.to(CT), input_precision=PREC) + yz[:, None] * tl.load(norm + FIRST + f)[None, :]
    return acc + weight * g
