"""Compute the mean cross entropy of a linear output layer without storing the logits.

At length 1,024 and batch 512, MQAR asks 131,072 questions per step over a vocabulary of 8,192. The logits alone would
take 2.1 GB in bfloat16, written once and read several times. Here a tile of logits stays in registers:

- The forward pass makes each tile once, for the loss and for the gradient of the hidden states.
- The backward pass makes it again, for the gradient of the weight.

With hidden size 64 this takes four products of 137 GFLOP instead of three, and almost no memory traffic. The kernels
use no atomic additions, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation: linear_cross_entropy then takes PyTorch's way
    triton = None


if triton is not None:

    @triton.jit
    def _loss_kernel(
        h, w, target, lse, loss, dh, N, V: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr
    ):
        # One program: BN rows against all V columns, BV at a time. As FlashAttention with keys and values w: the same
        # tile of exp(logits) sums up the normaliser and sum_c softmax_c w_c, the gradient of h but for -w_target.
        LOG2E: tl.constexpr = 1.4426950408889634
        rows = tl.program_id(0) * BN + tl.arange(0, BN)
        d = tl.arange(0, D)
        x = tl.load(h + rows[:, None] * D + d[None, :], mask=rows[:, None] < N, other=0.0)  # [BN, D]
        largest = tl.full([BN], float("-inf"), tl.float32)
        total = tl.zeros([BN], tl.float32)
        acc = tl.zeros([BN, D], tl.float32)
        for first in range(0, V, BV):
            c = first + tl.arange(0, BV)
            tile = tl.load(w + c[:, None] * D + d[None, :], mask=c[:, None] < V, other=0.0)  # [BV, D]
            s = tl.dot(x, tl.trans(tile), input_precision="ieee") * LOG2E
            if V % BV:
                s = tl.where(c[None, :] < V, s, float("-inf"))
            bound = tl.maximum(largest, tl.max(s, 1))
            shrink = tl.exp2(largest - bound)
            p = tl.exp2(s - bound[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(tile.dtype), tile, acc * shrink[:, None], input_precision="ieee")
            largest = bound
        t = tl.load(target + rows, mask=rows < N, other=0)
        right = tl.load(w + t[:, None] * D + d[None, :]).to(tl.float32)  # [BN, D]
        log_sum = largest / LOG2E + tl.log(total)
        tl.store(lse + rows, log_sum, mask=rows < N)
        tl.store(loss + rows, log_sum - tl.sum(x * right, 1), mask=rows < N)
        g = acc / total[:, None] - right
        tl.store(dh + rows[:, None] * D + d[None, :], g.to(dh.dtype.element_ty), mask=rows[:, None] < N)

    @triton.jit
    def _weight_gradient_kernel(
        h,
        w,
        target,
        lse,
        dw,
        N,
        V: tl.constexpr,
        STEPS: tl.constexpr,
        D: tl.constexpr,
        BN: tl.constexpr,
        BV: tl.constexpr,
    ):
        # One program: BV columns against its share of STEPS * BN rows; the shares are added up afterwards, in order.
        # Rows lie along the tile's rows, where a thread needs two of lse and target; along its columns it needs 32.
        LOG2E: tl.constexpr = 1.4426950408889634
        c = tl.program_id(0) * BV + tl.arange(0, BV)
        part = tl.program_id(1)
        d = tl.arange(0, D)
        tile = tl.load(w + c[:, None] * D + d[None, :], mask=c[:, None] < V, other=0.0)  # [BV, D]
        acc = tl.zeros([D, BV], tl.float32)
        for step in range(STEPS):
            rows = (part * STEPS + step) * BN + tl.arange(0, BN)
            x = tl.load(h + rows[:, None] * D + d[None, :], mask=rows[:, None] < N, other=0.0)  # [BN, D]
            t = tl.load(target + rows, mask=rows < N, other=-1)
            # a row beyond the end gets exp2(-inf) = 0 and so no weight
            log_sum = tl.load(lse + rows, mask=rows < N, other=float("inf")) * LOG2E
            s = tl.dot(x, tl.trans(tile), input_precision="ieee")  # [BN, BV]
            g = tl.exp2(s * LOG2E - log_sum[:, None]) - tl.where(c[None, :] == t[:, None], 1.0, 0.0)
            acc = tl.dot(tl.trans(x), g.to(x.dtype), acc, input_precision="ieee")
        offset = part.to(tl.int64) * V * D
        tl.store(dw + offset + c[None, :] * D + d[:, None], acc, mask=c[None, :] < V)


def _tiles(hidden_size: int) -> tuple[int, int]:
    """Return the rows and columns of a tile of logits."""
    return (128, 128) if hidden_size <= 128 else (64, 64)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, compute_type: torch.dtype):
        h, w = hidden.to(compute_type).contiguous(), weight.to(compute_type).contiguous()
        (n, d), v = h.shape, w.shape[0]
        bn, bv = _tiles(d)
        lse = torch.empty(n, dtype=torch.float32, device=h.device)
        loss = torch.empty_like(lse)
        dh = torch.empty(n, d, dtype=torch.float32, device=h.device)
        # tiles of 256 numbers twice, not three times, or they do not fit into the 99 KiB that some GPUs have
        _loss_kernel[(triton.cdiv(n, bn),)](
            h, w, target, lse, loss, dh, n, v, D=d, BN=bn, BV=bv, num_warps=8, num_stages=3 if d <= 128 else 2
        )
        ctx.save_for_backward(h, w, target, lse, dh)
        ctx.types = hidden.dtype, weight.dtype
        return loss.mean()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        h, w, target, lse, dh = ctx.saved_tensors
        (n, d), v = h.shape, w.shape[0]
        bn, bv = _tiles(d)
        scale = gradient.float() / n
        # enough programs for 132 multiprocessors; a share is whole tiles of rows
        parts = max(1, min(8, triton.cdiv(n, 16 * bn)))
        steps = triton.cdiv(triton.cdiv(n, parts), bn)
        dw = torch.empty(parts, v, d, dtype=torch.float32, device=h.device)
        _weight_gradient_kernel[(triton.cdiv(v, bv), parts)](
            h, w, target, lse, dw, n, v, steps, D=d, BN=bn, BV=bv, num_warps=8
        )
        return (dh * scale).to(ctx.types[0]), (dw.sum(0) * scale).to(ctx.types[1]), None, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows of `cross_entropy(hidden @ weight.T, target)`, a scalar in float32.

    Args:
        hidden: [N, D], any float type. Under autocast the products run in autocast's type.
        weight: [V, D].
        target: [N], int64, each in [0, V). No index is ignored.

    On a GPU the fused version runs if D is a power of two from 16 to 256 and the products are in 16 bits. Otherwise
    PyTorch's own version runs.
    """
    kind = hidden.device.type
    d = hidden.shape[-1]
    if triton is not None and kind == "cuda" and 16 <= d <= 256 and d & (d - 1) == 0:
        compute_type = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        if compute_type in (torch.bfloat16, torch.float16):
            return _LinearCrossEntropy.apply(hidden, weight, target, compute_type)
    return F.cross_entropy(F.linear(hidden, weight).float(), target)
