# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# ruff: noqa: SIM300
# Kernels are written in Triton's language, which only looks like Python. A test of a compile-time constant must not
# share a condition with a value that only the GPU knows, and a function needs one `return` for all its branches.
"""Pieces that all kernels share: where a program's block of tokens lies, how its tiles are loaded and stored, and the
arithmetic of a tile.

The kernels use these compile-time constants. All of them are bound by name (see `launch`):

    F, D            features of a query or key head as it lies in memory, and dims of a value head; F is FP where
                    `pad_rows` has copied queries and keys
    FP, DP          F and D padded to a power of 2, at least 16
    DV              columns that v has in memory: D, or DP where `pad_rows` has copied it
    NB              blocks of 8 dims that make up F
    NR              rows of an internal state (see `Layout`)
    H, HKV, G       query heads, key-value heads, and query heads per key-value head
    L               tokens per segment (see triton_plan_rebased.py)
    BM, BN, C       rows of a tile: of queries or keys, of queries in the narrow tiles of dk and dv, and of a state's
                    sum
    BD              value dims of a tile
    QUAD, LIN,      whether c2, c1 and c0 differ from 0
    CONST
    HAS_MASK        whether there is an attention mask
    HAS_DECAY       whether older tokens count less (see triton_decay_rebased.py)
    HAS_INIT        whether slot 0 of each sequence holds an initial state: 0 or 1, so that it can be added to a slot
    VARLEN          whether packed sequences are told apart by cu_seqlens
    CT, PREC        the type in which matrix products take their operands, and the precision of fp32 products

`stride_qb`, `stride_qt` and `stride_qh` are the strides of q by batch row, token and head; other tensors likewise.
"""

from __future__ import annotations

from .triton_language_rebased import PTX, tl, triton


@triton.jit
def batch_row():
    """Return the program's batch row. It is spread over axes 1 and 2 of the grid (see `grid_of_rows`)."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


@triton.jit
def locate_block(
    r, BLOCK: tl.constexpr, L: tl.constexpr, T, N, cu_seqlens, segment_sequence, first_segment, VARLEN: tl.constexpr
):  # fmt: skip
    """Locate block number `r` of BLOCK tokens in its batch row, or among all packed sequences.

    Returns (batch row, sequence, index of the block's segment in its sequence, segments of the sequence,
    first token of the segment, tokens of the segment, first row of the block within the segment). No row of the block
    is valid if its first row is not below the tokens of the segment.
    """
    if VARLEN:
        seg = r // (L // BLOCK)
        row = (r % (L // BLOCK)) * BLOCK
        used = tl.load(first_segment + N)
        seq = tl.load(segment_sequence + tl.minimum(seg, tl.maximum(used - 1, 0)))
        first = tl.load(first_segment + seq)
        index = seg - first
        count = tl.load(first_segment + seq + 1) - first
        start = tl.load(cu_seqlens + seq) + index * L
        tokens = tl.minimum(tl.load(cu_seqlens + seq + 1) - start, L)
        tokens = tl.where(seg < used, tokens, 0)
        batch = 0
    else:
        batch = batch_row()
        seq = batch
        t = r * BLOCK
        index = t // L
        row = t % L
        count = (T + L - 1) // L
        start = index * L
        tokens = tl.where(batch < N, tl.minimum(T - start, L), 0)
    return batch, seq, index, count, start, tokens, row


@triton.jit
def token_pointer(base, b64, token, head, stride_b, stride_t, stride_h):
    """Return the pointer to one head of one token of a tensor [B, T, heads, dim]; b64 is the batch row in 64 bits."""
    return base + (b64 * stride_b + token.to(tl.int64) * stride_t + head * stride_h)


@triton.jit
def load_rows(base, rows, ok, stride, cols, COLS: tl.constexpr, EVEN: tl.constexpr, CHECK: tl.constexpr):
    """Load [rows, cols] of a tensor with unit column stride; 0 where `ok` is false or a column is not below COLS.

    EVEN says that all of `cols` are below COLS, CHECK that some of `rows` may not be `ok`.
    """
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
def load_columns(base, rows, ok, stride, cols, COLS: tl.constexpr, EVEN: tl.constexpr, CHECK: tl.constexpr):
    """Load what `load_rows` loads, transposed: [cols, rows]."""
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
def store_rows(base, rows, ok, stride, cols, COLS: tl.constexpr, x):
    """Store x [rows, cols] in the tensor's type, where `ok` is true and a column is below COLS."""
    inside = ok[:, None] & (cols < COLS)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def kept_rows(mask, rows, tokens, HAS_MASK: tl.constexpr):
    """Return whether rows are inside the segment and not dropped by the attention mask."""
    ok = rows < tokens
    if HAS_MASK:
        ok = tl.load(mask + rows, mask=ok, other=0) != 0
    return ok


@triton.jit
def slots_before(segments, RUN, HAS_INIT: tl.constexpr, RUNS: tl.constexpr):
    """Find the slots whose sum is the state after the first `segments` segments of a sequence.

    The scan adds up whole runs only (RUNS says that a run may have several segments), so there may be two parts: the
    running sum up to the last whole run, and the sum within the run at hand. Returns (slot of the running sum, counted
    from the sequence's first; whether there is one; slots from there to the sum within the run; whether there is one).
    """
    whole = segments
    if RUNS:
        whole = segments & -RUN  # RUN is a power of 2
    return whole - 1 + HAS_INIT, whole + HAS_INIT > 0, segments - whole, segments > whole


@triton.jit
def state_pointers(
    states, norms, slot, seq, hkv, first_slot, SLOTS, NR: tl.constexpr, DP: tl.constexpr, HKV: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """Return the pointers to one head's state [NR, DP] and norm [NR] in slot number `slot` of sequence `seq`."""
    if VARLEN:
        s64 = (tl.load(first_slot + seq) + slot).to(tl.int64) * HKV + hkv
    else:
        s64 = (seq * SLOTS + slot).to(tl.int64) * HKV + hkv
    return states + s64 * (NR * DP), norms + s64 * NR


@triton.jit
def in_units(ranges, rows, ok, alpha, beta, eps, QUAD: tl.constexpr):
    """Return alpha, beta and eps for rows of queries whose s comes multiplied by their numbers in `ranges`, r.

    u has the units of s**2, or of s where it is linear. See `bring_into_range`.
    """
    r = tl.load(ranges + rows, mask=ok, other=1.0)
    if QUAD:
        alpha *= r
        unit = r * r
    else:
        alpha += r * 0.0
        unit = r
    return alpha, beta * unit, eps * unit


@triton.jit
def weight_polynomial(s, alpha, beta, QUAD: tl.constexpr, LIN: tl.constexpr, CONST: tl.constexpr):
    """Return u(s), the weight without its constant factor: s (s + alpha) + beta, or s + beta if c2 = 0, else 1."""
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
def round_to_power_of_2(x):
    """Return the largest power of two up to x, fp32 and positive, or the smallest normal number if x is below that."""
    SMALLEST: tl.constexpr = 1.1754943508222875e-38
    return (tl.maximum(x, SMALLEST).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def split_in_two(value, CT: tl.constexpr):
    """Split fp32 numbers into sums of two of the compute type: 16 bits of mantissa with bfloat16, exact with fp32.

    Bits are cut off instead of rounded, because compilers remove a round trip through the short type.
    """
    if CT == tl.float32:
        high = value
    else:
        high = (value.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high, value - high


@triton.jit
def as_columns(value, CT: tl.constexpr):
    """Return one number per row, [C], as [C, 16] for the matrix units: the parts of `split_in_two`, then zeros."""
    f = tl.arange(0, 16)
    top, rest = split_in_two(value, CT)
    return tl.where((f == 0)[None, :], top[:, None], tl.where((f == 1)[None, :], rest[:, None], 0.0)).to(CT)


@triton.jit
def wait_for_sum(x, CT: tl.constexpr):
    """Return x (fp32) after the matrix units have finished it: an instruction without a body reads it.

    If sums keep running from one step of a loop into the next, ptxas (12.8, message C7515) may run all matrix products
    of the kernel one by one.
    """
    if PTX and CT == tl.bfloat16:
        x = tl.inline_asm_elementwise("// done", "=f,0", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def move_to_registers(x, keys, CT: tl.constexpr, PREC: tl.constexpr):
    """Return x [C, N] as the result of a matrix product, which leaves it in registers (bfloat16 only).

    A left operand that was loaded lies in shared memory, and the matrix units read it again for every product. That
    memory is what the kernels wait for. The result of a product lies in registers, in the layout of a left operand.
    The product is exact: x times the unit matrix, or x plus 0 times keys [N, 16] where the unit matrix would be large.
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
def compute_once(x, CT: tl.constexpr):
    """Return x (bfloat16), computed once: without this instruction (it has no body) once per layout of its uses."""
    if PTX and CT == tl.bfloat16:
        x = tl.inline_asm_elementwise("// once", "=r,0", [x], dtype=tl.bfloat16, is_pure=False, pack=2)
    return x


@triton.jit
def add_pairs(x, y):
    """Return x + y, in bfloat16 by two numbers per instruction.

    The instruction computes 1 x + y, because compute capability 8 has no plain sum of pairs; 9 makes one of it.
    """
    if PTX and x.dtype == tl.bfloat16:
        CODE: tl.constexpr = "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }"
        total = tl.inline_asm_elementwise(CODE, "=r,r,r", [x, y], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        total = x + y
    return total


@triton.jit
def multiply_pairs(x, y):
    """Return x * y, in bfloat16 by two numbers per instruction; it computes x y - 0, see `add_pairs`."""
    if PTX and x.dtype == tl.bfloat16:
        CODE: tl.constexpr = "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }"
        product = tl.inline_asm_elementwise(CODE, "=r,r,r", [x, y], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        product = x * y
    return product
