# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Launch kernels with little work for the host.

Calls with inputs of the same kind share a `PreparedCall`: the sizes of the kernels, how the tokens are cut, and the
compiled kernels with all arguments that are not tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .triton_language_rebased import INTERPRETED
from .triton_layout_rebased import Layout
from .triton_plan_rebased import Plan, choose_sizes, product_precision


class PreparedCall:
    """What calls with inputs of the same kind share; each part is worked out once."""

    __slots__ = ("cuts", "launches", "layout", "plan", "segment")

    def __init__(self, layout: Layout, plan: Plan, segment: int) -> None:
        self.layout, self.plan, self.segment = layout, plan, segment
        self.cuts: dict[bool, Any] = {}  # see `cut_into_segments`
        self.launches: dict[str, tuple] = {}  # see `launch`


_PREPARED: dict[tuple, PreparedCall] = {}
_MOST_PREPARED = 4096


def prepare(
    name: str, tensors: tuple[Tensor | None, ...], coefficients: tuple[float, ...], *options, packed: bool = False
) -> PreparedCall:
    """Return what calls of the pass `name` ("forward", "backward" or "decode") over such inputs share.

    The first tensor is q and the third v; coefficients are (c0, c1, c2, scale). `options` are all other numbers that
    the arguments of the kernels follow from. `packed` says that cu_seqlens is among the tensors.

    The key holds whatever Triton compiles for: dtype, alignment, shape and strides of each tensor, and the options.
    All other tensors and the grids follow from these, because what torch allocates is aligned.
    """
    q, _, v = tensors[:3]
    kinds = [None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors]
    key = (name, q.device, product_precision(q.dtype), coefficients, *options, *kinds)
    prepared = _PREPARED.get(key)
    if prepared is None:
        if len(_PREPARED) >= _MOST_PREPARED:
            _PREPARED.clear()
        layout, plan = choose_sizes(q.shape[3], v.shape[3], coefficients[:3], coefficients[3], q.dtype, q.device)
        segment = plan.segment if packed or q.shape[1] > plan.alone else plan.alone
        prepared = _PREPARED[key] = PreparedCall(layout, plan, segment)
    return prepared


def launch(
    prepared: PreparedCall,
    name: str,
    kernel,
    tensors: dict[str, Tensor | None],
    complete: Callable[[], tuple[tuple[int, ...], dict[str, Any]]],
) -> None:
    """Launch a kernel, with its arguments bound by name: the kernel's signature is the only order.

    Args:
        prepared: what such calls share; it remembers the compiled kernel as `name`, because Triton needs 50 us to find
            it again.
        kernel: its signature starts with the tensors.
        tensors: the tensors (or None) by name; they differ from call to call.
        complete: returns the grid and everything else by name: numbers, compile-time constants and compiler options
            (num_warps and the like). It is called once, so all of it must follow from what `prepared` was made for.
    """
    found = prepared.launches.get(name)
    if found is not None:
        run, in_order, others = found
        run(*in_order(tensors), *others)
        return
    grid, others = complete()
    compiled = kernel[grid](**tensors, **others)
    if not INTERPRETED:
        first, rest = kernel.arg_names[: len(tensors)], kernel.arg_names[len(tensors) :]
        prepared.launches[name] = compiled[(*grid, 1, 1)[:3]], itemgetter(*first), tuple(others[x] for x in rest)


def strides_of(name: str, x: Tensor) -> dict[str, int]:
    """Return the strides of x [B, T, H, dim] under the names that the kernels give them."""
    batch, token, head, _ = x.stride()
    return {f"stride_{name}b": batch, f"stride_{name}t": token, f"stride_{name}h": head}


_MOST_PROGRAMS = 65535  # of axes 1 and 2 of a grid


def grid_of_rows(programs: int, rows: int) -> tuple[int, int, int]:
    """Return the grid of `programs` for each of `rows` batch rows; `batch_row` finds them, and a few more may run."""
    if rows <= _MOST_PROGRAMS:
        return programs, rows, 1
    return programs, _MOST_PROGRAMS, -(-rows // _MOST_PROGRAMS)


_HERE = contextlib.nullcontext()


def on_gpu_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one for a `with` block, if it has one that is not."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE
