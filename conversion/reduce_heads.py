"""Compute the queries and keys that a linear layer starts from: the closest fit of few numbers to a softmax head."""

import math

import torch


def exp_beta(feature_dim: int, constant: float) -> float:
    """Return the beta with which the kernel of queries and keys normalised per head is (constant + s)^2.

    Such queries have mean 0, so the vector that is beta everywhere is orthogonal to them, and
    (q + beta)(k + beta) = q.k + F beta^2. Divided by sqrt(F), this is s + constant for beta^2 = constant / sqrt(F).
    """
    return math.sqrt(constant / math.sqrt(feature_dim))


def reduce_heads(
    queries: torch.Tensor, keys: torch.Tensor, feature_dim: int, rotated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys of `feature_dim` numbers whose products come closest to those of the full ones.

    The score of x and y is x^T Q^T K y. If x and y have unit covariance, its error is the Frobenius norm of
    Q^T K - Q'^T K', summed over the query heads that share a key head. With Q' = B^T Q and K' = A K, the
    best B and A come from a singular value decomposition of the size of a head.

    If queries and keys are rotated by position, pairs of numbers are complex numbers that each turn at one frequency,
    and only numbers of like frequency may be added. The head's pairs are divided into `feature_dim / 2` bands. The
    first frequency of a band is that of the reduced pair, and each band is reduced to one complex number.

    Args:
        queries: float64 [H, head_dim, inputs].
        keys: float64 [H_kv, head_dim, inputs].
        feature_dim: at most head_dim. With `rotated` it is an even divisor of head_dim.
        rotated: whether a rotary embedding follows.

    Returns:
        [H, feature_dim, inputs] and [H_kv, feature_dim, inputs].
    """
    group = queries.shape[0] // keys.shape[0]
    queries = queries.unflatten(0, (-1, group))  # [H_kv, group, head_dim, inputs]
    if not rotated:
        new_q, new_k = _best_projection(queries, keys, feature_dim)
        return new_q.flatten(0, 1), new_k
    band = queries.shape[-2] // feature_dim

    def bands(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-2)
        return torch.complex(first, second).unflatten(-2, (feature_dim // 2, band))

    def pairs(x: list[torch.Tensor]) -> torch.Tensor:
        together = torch.cat(x, dim=-2)
        return torch.cat([together.real, together.imag], dim=-2)

    q_bands, k_bands = bands(queries), bands(keys)
    reduced = [_best_projection(q_bands[..., j, :, :], k_bands[..., j, :, :], 1) for j in range(feature_dim // 2)]
    new_q, new_k = pairs([q for q, _ in reduced]), pairs([k for _, k in reduced])
    return new_q.flatten(0, 1), new_k


def _best_projection(queries: torch.Tensor, keys: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce [n, group, d, inputs] and [n, d, inputs] to `size` instead of d numbers, real or complex."""
    root_q, inverse_q = _square_root((queries @ queries.mH).sum(1))
    root_k, inverse_k = _square_root(keys @ keys.mH)
    u, s, vh = torch.linalg.svd(root_q @ root_k)
    scale = s[:, :size, None].sqrt()
    to_q = scale * (u[..., :size].mH @ inverse_q)
    to_k = scale * (vh[:, :size] @ inverse_k)
    return to_q[:, None] @ queries, to_k @ keys


def _square_root(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square root of positive semi-definite matrices, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.amax(-1, keepdim=True) * 1e-12
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(values > floor, 1 / root.clamp_min(1e-300), torch.zeros_like(root))

    def build(diagonal: torch.Tensor) -> torch.Tensor:
        return (vectors * diagonal[..., None, :]) @ vectors.mH

    return build(root), build(inverse)
