# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""The layout of a state inside the kernels, and the way to and from the public layout.

The public state [N, H_kv, n_features, D + 1] has one row per feature, in the order that `feature_map` documents, and
the normaliser in its last column. An internal state is a pair: states [N, H_kv, rows, DP] and norms [N, H_kv, rows].
Its rows are the quadratic ones (triton_features_rebased.py has their order), then FP linear ones, then 16 of which the
first is the constant row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_rebased import n_features
from .triton_features_rebased import count_tiles, quadratic_rows


class Layout(NamedTuple):
    """What follows from F, D, the coefficients and the scale. w = factor * u(s), see `weight_polynomial`."""

    feature_dim: int  # F
    f: int  # F padded to a power of 2, at least 16
    d: int  # D likewise
    blocks: int  # blocks of 8 dims
    tiles: int  # of the quadratic rows, see `count_tiles`
    first_low_row: int  # the quadratic rows
    rows: int  # of an internal state
    features: int  # rows of the public state
    quad: bool
    lin: bool
    const: bool
    alpha: float
    beta: float
    factor: float

    @property
    def squares(self) -> bool:
        """Whether w has squares only, as in ReBased."""
        return self.quad and not self.lin and not self.const


def power_of_2(n: int, least: int = 16) -> int:
    """Return the smallest power of 2 that is at least `n` and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def make_layout(feature_dim: int, head_dim: int, c0: float, c1: float, c2: float, scale: float) -> Layout:
    """Return the layout for heads of F = `feature_dim` and D = `head_dim`.

    Raises:
        `ValueError`: all coefficients are 0, or the scale is.
    """
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
    f = power_of_2(feature_dim)
    first_low_row = quadratic_rows(blocks) if quad else 0
    return Layout(
        feature_dim=feature_dim,
        f=f,
        d=power_of_2(head_dim),
        blocks=blocks,
        tiles=count_tiles(blocks) if quad else 0,
        first_low_row=first_low_row,
        rows=first_low_row + (f if lin else 0) + (16 if const else 0),
        features=n_features(feature_dim, (c0, c1, c2)),
        quad=quad,
        lin=lin,
        const=const,
        alpha=alpha,
        beta=beta,
        factor=factor,
    )


def _index_tables(feature_dim: int, layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tables between the public features and the internal rows.

    They are the row of each feature [features] and its factor, sqrt 2 for a < b, then the feature of each row [rows]
    and its factor, 1 / sqrt 2 likewise and 0 for padding. They are computed on the device, without a copy from the
    host.
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
            row = torch.arange(quadratic_rows(nb), device=device)
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
        first_row, first_feature = quadratic_rows(nb), n * (n + 1) // 2
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


def to_public(states: Tensor, norms: Tensor, feature_dim: int, head_dim: int, layout: Layout) -> Tensor:
    """Turn an internal state, [N, H_kv, rows, DP] and [N, H_kv, rows], into a public one."""
    row, factor, _, _ = _index_tables(feature_dim, layout, states.device)
    values = states.index_select(2, row)[..., :head_dim]
    return torch.cat([values, norms.index_select(2, row)[..., None]], -1) * factor[:, None]


def to_internal(public: Tensor, feature_dim: int, head_dim: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Turn a public state into an internal one, [N, H_kv, rows, D] and [N, H_kv, rows]."""
    _, _, feature, factor = _index_tables(feature_dim, layout, public.device)
    rows = public.float().index_select(2, feature) * factor[:, None]
    return rows[..., :head_dim], rows[..., head_dim]
