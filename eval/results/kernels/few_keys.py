# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Emulate what the Triton kernels round to bfloat16, and print how far off the gradients of q and k then are, as CSV.

All else is computed in float64, so the errors come from the roundings alone. A query with one key has no gradient,
because do . v and do . o are equal. Where one of them comes from rounded numbers and the other does not, a small z
enlarges the difference. The kernels had "do . o / z": do / z was rounded before it was multiplied by v, and the
weights of o were rounded, but not those of z. They now have "the same, z of rounded weights". The numbers are the
largest of eight draws.

    python eval/results/kernels/few_keys.py > eval/results/kernels/few-keys.csv

With --kernels, the kernels themselves are compared with float64 on this machine's GPU, for packed documents:

    python eval/results/kernels/few_keys.py --kernels
"""

from __future__ import annotations

import csv
import sys

import torch
from torch import Tensor


HEADS, T, F, D = 2, 2301, 16, 64
SEEDS = 8
CASES = ("one sequence", "documents of 30 tokens", "decay", "decay with cuts")


def rounded(x: Tensor) -> Tensor:
    """Return x, float64, as bfloat16 holds it."""
    return x.bfloat16().double()


def visible(case: str, generator: torch.Generator) -> Tensor:
    """Return the factors of the weights, [HEADS, T, T]: what a decay leaves; 0 where a query does not see a key."""
    seen = torch.ones(T, T).tril()
    if case == "documents of 30 tokens":
        document = torch.arange(T) // 30
        seen *= document[:, None] == document
    decay = torch.zeros(HEADS, T, dtype=torch.float64)
    if case.startswith("decay"):
        decay = -torch.rand(HEADS, T, generator=generator).double() / torch.logspace(0.5, 3.5, HEADS)[:, None]
    if case == "decay with cuts":
        decay[torch.rand(HEADS, T, generator=generator) < 0.002] = -30.0
    total = decay.cumsum(-1)
    return torch.exp((total[:, :, None] - total[:, None]).clamp(max=0.0)) * seen


def gradients(
    q: Tensor, k: Tensor, v: Tensor, factors: Tensor, grad: Tensor, delta: Tensor, exact: bool
) -> list[Tensor]:
    """Return the gradients of q and k, from grad = do / z and delta = grad . o."""
    s = q @ k.transpose(1, 2) * F**-0.5
    ds = (grad @ v.transpose(1, 2) - delta[..., None]) * 2 * s * factors
    ds = ds if exact else rounded(ds)
    return [ds @ k * F**-0.5, ds.transpose(1, 2) @ q * F**-0.5]


def errors(case: str, seed: int) -> dict[str, list[float]]:
    """Return the relative errors of dq and dk and the share of dq's squared error in three rows, by kind of delta."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, do = (rounded(torch.randn(HEADS, T, n, generator=generator)) for n in (F, F, D, D))
    factors = visible(case, generator)
    u = (q @ k.transpose(1, 2) * F**-0.5) ** 2 * factors
    tile = torch.arange(T) // 64
    of_diagonal = torch.where(tile[:, None] == tile, rounded(u), u)  # the kernels' first tile of each query
    exact_z, z = u.sum(-1, keepdim=True), of_diagonal.sum(-1, keepdim=True)
    exact_o = u @ v / exact_z
    o, new_o = rounded(rounded(u) @ v / exact_z), rounded(rounded(u) @ v / z)
    grad, new_grad = rounded(do / exact_z), rounded(do / z)
    expected = gradients(q, k, v, factors, do / exact_z, (do * exact_o / exact_z).sum(-1), True)
    found = {
        "do . o / z": gradients(q, k, v, factors, grad, (do * o / exact_z).sum(-1), False),
        "rounded (do / z) . o": gradients(q, k, v, factors, grad, (grad * o).sum(-1), False),
        "the same, z of rounded weights": gradients(q, k, v, factors, new_grad, (new_grad * new_o).sum(-1), False),
    }
    table = {}
    for name, pair in found.items():
        rows = (pair[0] - expected[0]).square().sum(-1).flatten()
        table[name] = [((x - y).norm() / y.norm()).item() for x, y in zip(pair, expected, strict=True)]
        table[name].append((rows.topk(3).values.sum() / rows.sum()).item())
    return table


def of_kernels(width: int, dim: int, tokens: int, documents: int, seed: int) -> list[float]:
    """Return the relative errors of o, dq, dk and dv by the kernels, with HEADS query heads per key-value head."""
    from modeling_rebased import rebased_attention
    from modeling_rebased.eager_rebased import naive_rebased_attention

    generator = torch.Generator(device="cuda").manual_seed(seed)
    sizes = [(HEADS, width), (1, width), (1, dim), (HEADS, dim)]
    q, k, v, grad = (
        torch.randn(1, tokens * documents, *size, generator=generator, device="cuda").bfloat16() for size in sizes
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    bounds = torch.arange(0, tokens * documents + 1, tokens, dtype=torch.int32, device="cuda")
    o, _ = rebased_attention(*leaves, cu_seqlens=bounds, normalized=True, backend="triton")
    parts = (x.unflatten(1, (documents, tokens))[0] for x in exact)
    expected = naive_rebased_attention(*parts).flatten(0, 1)[None]
    found = [o, *torch.autograd.grad(o, leaves, grad)]
    references = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, references, strict=True)]


def main() -> None:
    """Print the largest numbers of all seeds, or with --kernels the numbers of each."""
    torch.set_num_threads(1)
    table = csv.writer(sys.stdout, lineterminator="\n")
    if "--kernels" in sys.argv:
        table.writerow(["F", "D", "tokens", "documents", "seed", "o", "dq", "dk", "dv"])
        for sizes in ((16, 64, 10, 200), (16, 64, 30, 77), (16, 64, 2301, 1), (64, 64, 30, 77), (16, 128, 30, 77)):
            for seed in range(SEEDS // 2):
                table.writerow([*sizes, seed, *(f"{error:.1e}" for error in of_kernels(*sizes, seed))])
        return
    table.writerow(["case", "delta", "dq", "dk", "share_of_three_rows"])
    for case in CASES:
        found = [errors(case, seed) for seed in range(SEEDS)]
        for name in found[0]:
            dq, dk, share = (max(column) for column in zip(*(one[name] for one in found), strict=True))
            table.writerow([case, name, f"{dq:.1e}", f"{dk:.1e}", f"{share:.2f}"])


if __name__ == "__main__":
    main()
