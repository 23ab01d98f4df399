# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Sizes of the kernels: segments, runs, tiles, and the number types of matrix products.

A *segment* is L consecutive tokens of a sequence, from a multiple of L on; the last segment of a sequence may be
shorter. Within a segment the kernels build the weights tile by tile. What lies before a segment reaches it as a state.

A *run* is a group of consecutive segments whose states one program sums one after another, each of them the sum since
the start of its run. A scan then turns the sums of whole runs into running sums. Longer runs leave less to the scan;
shorter runs keep more programs busy. A run has a power of 2 of segments. In the backward direction, segments and runs
are counted from the end of the sequence.

A *plan* holds these sizes. It follows from F, D, the dtype and the kind of GPU alone: nothing is timed, and every call
chooses the same plan.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .triton_language_rebased import INTERPRETED, tl
from .triton_layout_rebased import Layout, make_layout


MOST_SEGMENT = 4096  # tokens per segment, at most: kernels walk so far from a 64-bit pointer in 32 bits


class Plan(NamedTuple):
    """Tile sizes of the kernels."""

    segment: int  # tokens per segment
    # (rows per tile, warps, stages) of a kernel; for the two sums of states, over keys and over later queries,
    # (tokens per step, warps, stages)
    forward: tuple[int, int, int]
    dq: tuple[int, int, int]
    dkdv: tuple[int, int, int]
    state: tuple[int, int, int]
    later: tuple[int, int, int]
    gradient: tuple[int, int, int]
    # Most registers per thread, by kernel, where a limit below the compiler's own choice pays. (ptxas may then run the
    # matrix products one by one; the kernels are written so that it does not.) "dkdv, decay" is dkdv with a decay.
    registers: tuple[tuple[str, int], ...] = ()
    narrow: int = 0  # queries per tile of dkdv, if they are fewer than its keys
    # Most segments per run, of the sums over keys and over later queries: powers of 2; 1 where states have low rows,
    # whose sums are made per segment.
    runs: tuple[int, int] = (1, 1)
    alone: int = 0  # a sequence of at most so many tokens is one segment, without states
    flat: bool = False  # loop over tiles once instead of in two nested loops, which fail to compile on some GPUs

    def options(self, kernel: str) -> dict[str, int]:
        """Return the compiler options of a kernel besides warps and stages."""
        limit = dict(self.registers).get(kernel)
        return {} if limit is None or INTERPRETED else {"maxnreg": limit}


@functools.lru_cache
def count_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, or 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Return whether to use the plans that were measured on an H100: there, and where no GPU runs the kernels."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@functools.lru_cache
def _is_blackwell(device: torch.device) -> bool:
    """Return whether Triton compiles for the tensor memory of compute capability 10 and 11."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (10, 11)


def choose_plan(feature_dim: int, head_dim: int, squares: bool, dtype: torch.dtype, device: torch.device) -> Plan:
    """Return the plan for F, D, whether w has squares only, the dtype and the kind of GPU.

    A longer segment costs more weights (160 L / 2 operations per token at F = 16) and less traffic of states
    (features / L numbers per token). It must not depend on T, so that the shapes of saved tensors are plain formulas
    in T. By that formula a sequence of one segment has states too, which stay unused.
    """
    if INTERPRETED:
        small = feature_dim <= 16
        return Plan(64, *[(32, 4, 1)] * 6, narrow=16 if small else 0, runs=(4, 2) if small and squares else (1, 1))
    if feature_dim <= 16:
        segment = 512
    elif feature_dim <= 32:
        segment = 1024
    elif feature_dim <= 64:
        segment = 2048
    else:
        segment = MOST_SEGMENT
    if dtype != torch.bfloat16:
        rows = (64, 4, 1) if feature_dim <= 64 and head_dim <= 64 else (32, 4, 1)
        return Plan(segment, rows, rows, rows, (32, 4, 1), (32, 4, 1), rows)
    if feature_dim <= 16 and head_dim <= 64:
        registers = (("forward", 128), ("dq", 128), ("dkdv", 128), ("dkdv, decay", 128), ("state", 168))
        plan = Plan(segment, (64, 4, 3), (64, 4, 3), (64, 4, 3), (32, 4, 4), (64, 4, 3), (64, 4, 3), registers, 32)
        if squares:
            plan = plan._replace(segment=256, runs=(8, 4), alone=512)
    elif feature_dim <= 64 and head_dim <= 64:
        # None for "dkdv, decay": with one, each step of its loop takes more instructions (docs/kernels-log.md).
        registers = (("forward", 168), ("dkdv", 168))
        plan = Plan(segment, (64, 4, 3), (64, 4, 2), (64, 4, 2), (32, 4, 3), (64, 4, 3), (64, 4, 3), registers)
    elif feature_dim <= 64 and head_dim <= 128:
        plan = Plan(segment, (64, 4, 2), (64, 4, 1), (64, 4, 1), (64, 4, 2), (64, 4, 2), (64, 4, 1))
    elif feature_dim <= 16:
        plan = Plan(segment, *[(64, 4, 1)] * 6)
    else:
        plan = Plan(segment, (64, 4, 1), (32, 4, 1), (32, 4, 1), (64, 4, 1), (64, 4, 1), (32, 4, 1))
    if not _is_hopper(device):  # elsewhere operands of matrix products lie in registers, which must not be limited
        plan = plan._replace(registers=(), flat=_is_blackwell(device))
    return plan


def choose_sizes(
    feature_dim: int, head_dim: int, coefficients: tuple[float, ...], scale: float, dtype: torch.dtype,
    device: torch.device,
) -> tuple[Layout, Plan]:  # fmt: skip
    """Return the layout of a state and the plan of the kernels."""
    layout = make_layout(feature_dim, head_dim, *coefficients, scale)
    return layout, choose_plan(feature_dim, head_dim, layout.squares, dtype, device)


def segments_per_run(plan: Plan, segments: int, kv_heads: int, reverse: bool, device: torch.device) -> int:
    """Return the number of segments per run for `segments` segments of all sequences together.

    It is the largest that the plan allows and that leaves at least two programs per multiprocessor. It is the same in
    the forward and the backward pass over the same shapes, because the kernel of dq reads what forward has stored.
    """
    run = plan.runs[reverse]
    while run > 1 and segments * kv_heads < 2 * run * count_multiprocessors(device):
        run //= 2
    return run


def product_precision(dtype: torch.dtype) -> str:
    """Return the precision of fp32 products.

    It is three TF32 products, with an error of about 1e-7, or one where torch's own products may use TF32.
    """
    if dtype != torch.float32:
        return "tf32"
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Return the type to which features, weights and states are rounded for the matrix units."""
    return tl.float32 if dtype == torch.float32 else tl.bfloat16
