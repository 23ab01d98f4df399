# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Print what bfloat16 does to the gradient by `log_decay`, by imitating the kernels' roundings in float64, as CSV.

    python eval/results/kernels/decay_rounding.py

Rounded are do / z, o, the gradients of the weights within a segment, the features, and the states between segments.
The columns are the relative error of the sum of dL/dG as it is, and of the sum that `decay_gradient` makes of it. No
GPU is needed. See docs/kernels-log.md, "Rounding in the gradient of a decay".
"""

from __future__ import annotations

import csv
import itertools
import sys

import torch
from torch import Tensor


SIZES = ((16, 64, 256, 2301), (24, 128, 1024, 2301), (64, 64, 2048, 4300))  # F, D, tokens of a segment, T
WEAKNESS = (3, 100, 3000)  # a token keeps exp(-random / weakness) of what was before
HEADS, SEEDS = 2, 4


def rounded(x: Tensor) -> Tensor:
    """Return x rounded to bfloat16, in its own dtype."""
    return x.bfloat16().to(x.dtype)


def errors(width: int, dim: int, segment: int, length: int, weakness: float, seed: int) -> tuple[float, float]:
    """Return both errors for one key-value head, several query heads and normally distributed input."""
    torch.manual_seed(seed)
    sizes = ((HEADS, length, width), (length, width), (length, dim), (HEADS, length, dim))
    q, k, v, do = (rounded(torch.randn(size, dtype=torch.float64)) for size in sizes)
    q = q * width**-0.25  # the scale of scores, half of it each
    k = k * width**-0.25
    sums = (-torch.rand(length, dtype=torch.float64) / weakness).cumsum(0)
    token = torch.arange(length)
    causal = token[:, None] >= token
    decay = torch.exp((sums[:, None] - sums).clamp(max=0)) * causal
    scores = q @ k.T
    weights = scores**2 * decay
    z = weights.sum(-1, keepdim=True)
    o, grad = weights @ v / z, do / z
    exact = weights * (grad @ v.T - (grad * o).sum(-1, keepdim=True))
    exact = (exact.sum((0, 2)) - exact.sum((0, 1))).flip(0).cumsum(0).flip(0)

    grad = rounded(grad)
    delta = (grad * rounded(o)).sum(-1, keepdim=True)
    number = token // segment
    within = causal & (number[:, None] == number)
    parts = rounded((grad @ v.T - delta) * scores * decay * within) * scores
    of_queries, of_keys = parts.sum((0, 2)), parts.sum((0, 1))
    a, b = torch.triu_indices(width, width)
    twice = torch.where(a == b, 1.0, 2.0)
    keys, queries = k[:, a] * k[:, b], q[..., a] * q[..., b]
    for start in range(segment, length, segment):  # the bounds between segments
        before, after = slice(start), slice(start, None)
        this, last = slice(start, start + segment), slice(start - segment, start)
        left = torch.exp(sums[start - 1] - sums[before])[:, None]  # of the keys, at the bound
        reach = torch.exp(sums[after] - sums[start - 1])[:, None]  # of the bound, at the queries
        state, norm = rounded((rounded(keys[before]) * left).T @ v[before]), (keys[before] * left).sum(0)
        read = queries[:, this] * twice * reach[: queries[:, this].shape[1]]
        of_queries[this] += ((grad[:, this] @ state.T - delta[:, this] * norm) * read).sum((0, 2))
        state = rounded(torch.einsum("htf,htd->fd", rounded(queries[:, after]) * reach, grad[:, after]))
        norm = (queries[:, after] * reach * delta[:, after]).sum((0, 1))
        of_keys[last] += ((v[last] @ state.T - norm) * keys[last] * twice * left[last]).sum(1)
    total = (of_queries - of_keys).flip(0).cumsum(0).flip(0)
    spread = total - total[0] * (length - token) / length
    return tuple(((x - exact).norm() / exact.norm()).item() for x in (total, spread))


def main() -> None:
    """Print a row per size, decay and seed."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["F", "D", "segment", "T", "weakness", "seed", "as_it_is", "made_to_sum_up_to_0"])
    for size, weakness, seed in itertools.product(SIZES, WEAKNESS, range(SEEDS)):
        table.writerow([*size, weakness, seed, *(f"{error:.1e}" for error in errors(*size, weakness, seed))])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
