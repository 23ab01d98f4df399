# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Measure the errors of the kernels with a decay in bfloat16 on a GPU, in sizes of F above 64 or D above 128.

    python eval/results/kernels/decay.py SECONDS [SEED]

It prints rows of decay.csv for cases in a random order, as many as fit into the time. Errors are relative Frobenius
norms against the definition in float64. "two calls" means that the second half starts from the state of the first one.
"""

from __future__ import annotations

import csv
import itertools
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from modeling_rebased import rebased_attention
from modeling_rebased.eager_rebased import naive_rebased_attention


FEATURES, DIMS = (128, 96, 80, 72, 64, 48), (256, 160, 64, 128)
MODES, HEADS = ("plain", "mask", "packed", "two calls"), ((2, 1), (1, 1), (4, 2))


def attend(mode: str, inputs: Sequence[torch.Tensor], mask: torch.Tensor, exact: bool) -> torch.Tensor:
    """Return o [1, T, H, D] of q, k, v and log_decay, by the kernels, or by the definition if `exact`."""
    length = inputs[0].shape[1]
    bounds = [0, length // 3, length // 3 + 5, length]
    attention_mask = mask if mode == "mask" else None

    def run(start: int, stop: int, **options: Any) -> Any:
        q, k, v, log_decay = (x[:, start:stop] for x in inputs)
        if exact:
            return naive_rebased_attention(q, k, v, log_decay=log_decay, attention_mask=attention_mask)
        return rebased_attention(
            q, k, v, log_decay=log_decay, attention_mask=attention_mask, backend="triton", **options
        )

    if exact:
        pieces = itertools.pairwise(bounds) if mode == "packed" else [(0, length)]
        return torch.cat([run(*piece) for piece in pieces], 1)
    if mode == "packed":
        return run(0, length, cu_seqlens=torch.tensor(bounds, device=mask.device, dtype=torch.int32))[0]
    if mode == "two calls":
        first, state = run(0, length // 2, output_final_state=True)
        return torch.cat([first, run(length // 2, length, initial_state=state)[0]], 1)
    return run(0, length)[0]


def errors(mode: str, length: int, heads: int, kv_heads: int, width: int, dim: int, weakness: float) -> list[float]:
    """Return the errors of o and of the gradients of q, k, v and log_decay."""
    sizes = ((heads, width), (kv_heads, width), (kv_heads, dim), (heads, dim))
    *inputs, grad = (torch.randn(1, length, *size, device="cuda", dtype=torch.bfloat16) for size in sizes)
    inputs.append(-torch.rand(1, length, kv_heads, device="cuda") / weakness)
    mask = torch.rand(1, length, device="cuda") > 0.3
    mask[:, 0] = True
    results = []
    for exact in (False, True):
        leaves = [x.to(torch.float64 if exact else x.dtype).clone().requires_grad_() for x in inputs]
        o = attend(mode, leaves, mask, exact)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, grad.to(o.dtype))])
    return [((got.double() - exact).norm() / exact.norm()).item() for got, exact in zip(*results)]


def main() -> None:
    end = time.monotonic() + float(sys.argv[1])
    choose = random.Random(sys.argv[2] if len(sys.argv) > 2 else "0")
    cases = list(itertools.product(FEATURES, DIMS, MODES, HEADS))
    choose.shuffle(cases)
    gpu = torch.cuda.get_device_name().split()[1]
    table = csv.writer(sys.stdout, lineterminator="\n")
    for width, dim, mode, (heads, kv_heads) in cases:
        if width <= 64 and dim <= 128:
            continue
        if time.monotonic() > end:
            return
        length, strength = choose.choice((700, 2301, 3000)), choose.choice(("strong", "weak"))
        torch.manual_seed(choose.randrange(10**6))
        found = errors(mode, length, heads, kv_heads, width, dim, 3 if strength == "strong" else 3000)
        case = (1, length, heads, kv_heads, width, dim, f"{mode}, {strength} decay")
        table.writerow([gpu, "both", "bf16", *case, *(f"{error:.1e}" for error in found)])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
