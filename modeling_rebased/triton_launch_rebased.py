# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Launch kernels with little work for the host.

Calls with inputs of the same kind share a `PreparedCall`: the sizes of the kernels, how the tokens are cut, and the
compiled kernels with all arguments that are not tensors.

The first of such calls compiles the kernels of its pass in threads, all at the same time. Triton's compiler and the C
compiler that it starts let other threads run, and one kernel after another would take several seconds. A model starts
this before its first layer, see `ReBasedLinearAttention.compile_ahead`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .triton_language_rebased import HAS_TRITON, INTERPRETED, triton
from .triton_layout_rebased import Layout
from .triton_plan_rebased import Plan, choose_sizes, product_precision


class Launches:
    """The launches of calls with inputs of the same kind; each part is worked out once."""

    __slots__ = ("compiling", "is_new", "launches", "variant")

    def __init__(self, variant: tuple) -> None:
        self.variant: tuple | None = variant  # until there has been such a call, see `_is_new`
        self.is_new = False  # its kernels may not be compiled yet, see `is_first`
        self.launches: dict[str, tuple] = {}  # see `launch`
        self.compiling: dict[str, Future] = {}  # kernels that threads compile, by the name of their launch


class PreparedCall(Launches):
    """What calls of a pass of attention with inputs of the same kind share."""

    __slots__ = ("cuts", "layout", "plan", "segment")

    def __init__(self, layout: Layout, plan: Plan, segment: int, variant: tuple) -> None:
        super().__init__(variant)
        self.layout, self.plan, self.segment = layout, plan, segment
        self.cuts: dict[bool, Any] = {}  # see `cut_into_segments`


_PREPARED: dict[tuple, Any] = {}
_MOST_PREPARED = 4096
_VARIANTS: set[tuple] = set()


def _is_new(*variant) -> bool:
    """Return whether there has been no call of this variant, and remember it.

    A variant is what the compile-time constants of kernels follow from, but for rare exceptions. Lengths and batch
    sizes are not part of it, so that calls of all lengths find compiled kernels.
    """
    if variant in _VARIANTS:
        return False
    _VARIANTS.add(variant)
    return True


def _find(key: tuple, prepare_new: Callable[[], Any]) -> Any:
    """Return what calls of this key share, and let it know whether the call is the first of its variant.

    What is computed while kernels are only compiled is no call.
    """
    prepared = _PREPARED.get(key)
    if prepared is None:
        if len(_PREPARED) >= _MOST_PREPARED:
            _PREPARED.clear()
        prepared = _PREPARED[key] = prepare_new()
    if prepared.variant is not None and not is_compiling_only():
        prepared.is_new, prepared.variant = _is_new(*prepared.variant), None
    return prepared


def count_variants() -> int:
    """Return how many variants of calls there have been."""
    return len(_VARIANTS)


def prepare(
    name: str, tensors: tuple[Tensor | None, ...], coefficients: tuple[float, ...], *options, packed: bool = False,
    one_run: bool = False,
) -> PreparedCall:  # fmt: skip
    """Return what calls of the pass `name` ("forward", "backward" or "decode") over such inputs share.

    The first tensor is q and the third v; coefficients are (c0, c1, c2, scale). `options` are all other numbers that
    the arguments of the kernels follow from. `packed` says that cu_seqlens is among the tensors, and `one_run`
    that runs are of one segment.

    The key holds whatever Triton compiles for: dtype, alignment, shape and strides of each tensor, and the options.
    All other tensors and the grids follow from these, because what torch allocates is aligned.
    """
    q, _, v = tensors[:3]
    kinds = [None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors]
    key = (name, q.device, product_precision(q.dtype), coefficients, *options, *kinds)

    def prepare_new() -> PreparedCall:
        layout, plan = choose_sizes(q.shape[3], v.shape[3], coefficients[:3], coefficients[3], q.dtype, q.device)
        if one_run:
            plan = plan._replace(runs=(1, 1))
        segment = plan.segment if packed or q.shape[1] > plan.alone else plan.alone
        heads = tuple(x.shape[2:] for x in tensors[:3] if x is not None)
        given = tuple(x is None for x in tensors)
        variant = (*key[: 4 + len(options)], q.dtype, *heads, given, q.shape[1] > segment)
        return PreparedCall(layout, plan, segment, variant)

    return _find(key, prepare_new)


def prepare_launches(name: str, tensors: tuple[Tensor | None, ...]) -> Launches:
    """Return what calls of a pass that is no attention share; the key is as in `prepare`."""
    kinds = [None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors]
    key = (name, tensors[0].device, *kinds)

    def prepare_new() -> Launches:
        return Launches((*key[:2], tuple(None if x is None else (x.dtype, x.shape[-1]) for x in tensors)))

    return _find(key, prepare_new)


class _Mode(threading.local):
    """Say whether this thread launches kernels, or hands them to other threads that compile them."""

    compilers: ThreadPoolExecutor | None = None


_MODE = _Mode()


def is_compiling_only() -> bool:
    """Return whether this thread is in a block of `compiling_only`."""
    return _MODE.compilers is not None


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Let `launch` start the compilation of kernels in the background, and launch nothing, for a `with` block.

    Whatever a pass computes in the block is thrown away.
    """
    outer = _MODE.compilers
    _MODE.compilers = outer or ThreadPoolExecutor(8)
    try:
        yield
    finally:
        if outer is None:
            _MODE.compilers.shutdown(wait=False)
        _MODE.compilers = outer


def can_compile_ahead(device: torch.device) -> bool:
    """Return whether kernels for this device can be compiled before they are launched."""
    if device.type != "cuda" or INTERPRETED or not HAS_TRITON:
        return False
    return not torch.cuda.is_current_stream_capturing()  # when nothing may be loaded to the GPU


def is_first(prepared: Launches, device: torch.device) -> bool:
    """Return whether the kernels of such calls should be compiled ahead, the first time that it is asked."""
    is_new, prepared.is_new = prepared.is_new, False
    return is_new and not is_compiling_only() and can_compile_ahead(device)


def compiles_backward(variants: int, device: torch.device) -> bool:
    """Return whether a call should start to compile the kernels of its backward pass.

    That is so for the first of its variant, and where kernels are only compiled. `variants` is what `count_variants`
    returned before the call.
    """
    return is_compiling_only() or (count_variants() > variants and can_compile_ahead(device))


_STARTING = threading.Lock()
# Two passes may need the same compiled kernel. The second one finds it when the first one has been compiled.
_KERNEL_LOCKS: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)


@functools.cache
def _start_once() -> None:
    hash_triton = getattr(triton.runtime.cache, "triton_key", None)  # moved there before Triton 3.6
    with ThreadPoolExecutor(2) as threads:  # what goes wrong there goes wrong once more with the first kernel
        threads.submit(lambda: triton.runtime.driver.active.get_current_device())
        threads.submit(lambda: hash_triton and hash_triton())
        for name in sorted(name for name in list(sys.modules) if name.startswith(f"{__package__}.triton_")):
            for function in list(vars(sys.modules[name]).values()):
                if isinstance(function, triton.JITFunction):
                    _ = function.cache_key


def _start_triton() -> None:
    """Prepare what Triton needs before its first kernel, in one thread while the others wait.

    The C compiler makes Triton's driver. At the same time Triton hashes its own files, 400 MB, to find kernels in its
    cache. Either takes a third of a second. Meanwhile the functions in these files are hashed, always in one order:
    Triton's hash of a kernel depends on which of its functions have been hashed before.
    """
    with _STARTING:
        _start_once()


def _compile_with_launcher(compile_kernel: Callable[..., Any], source: Any, **options: Any) -> Any:
    """Compile a kernel as Triton does, and at the same time what launches it, which Triton would make afterwards.

    Up to Triton 3.6 the C compiler makes it, in a third of a second, from the types of the arguments alone. Triton
    then finds it in its cache. Later releases have one for all kernels.
    """
    with ThreadPoolExecutor(1) as thread:  # it fails for want of metadata, but after it has compiled
        thread.submit(triton.runtime.driver.active.launcher_cls, source, None)
        return compile_kernel(source, **options)


def start_compiling(kernel, grid: tuple[int, ...], arguments: dict[str, Any]) -> Future:
    """Compile a kernel in a thread of `compiling_only`, and load it to the current GPU."""
    assert _MODE.compilers is not None
    device, lock = torch.cuda.current_device(), _KERNEL_LOCKS[id(kernel)]
    # Triton looks at the dtype and the alignment of a tensor. Empty ones keep no memory while it compiles.
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.data_ptr() % 16 == 0:
            arguments[name] = x.new_empty(0)

    def compile_and_load() -> None:
        _start_triton()
        with lock, torch.cuda.device(device):
            _ = kernel.device_caches[device]  # sets `compile`, once per device
            if not isinstance(kernel.compile, functools.partial):
                kernel.compile = functools.partial(_compile_with_launcher, kernel.compile)
            # The subscript makes what launches the kernel, and loads both.
            kernel.warmup(grid=grid, **arguments)[(*grid, 1, 1)[:3]]

    return _MODE.compilers.submit(compile_and_load)


# For each sum and product of integers, Triton's compiler builds a check for overflow, which only its debug mode keeps.
# Without these checks it makes the same machine code, and its first stage, in Python, takes a tenth less time.
_WITHOUT_CHECKS = {} if INTERPRETED else {"sanitize_overflow": False}


def launch(
    prepared: Launches,
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
    if _MODE.compilers is not None:
        if name not in prepared.launches and name not in prepared.compiling:
            grid, others = complete()
            prepared.compiling[name] = start_compiling(kernel, grid, {**tensors, **others, **_WITHOUT_CHECKS})
        return
    found = prepared.launches.get(name)
    if found is not None:
        run, in_order, others = found
        run(*in_order(tensors), *others)
        return
    if name in prepared.compiling:
        wait([prepared.compiling.pop(name)])  # what went wrong there goes wrong once more below
    if not INTERPRETED:
        _start_triton()
    grid, others = complete()
    compiled = kernel[grid](**tensors, **others, **_WITHOUT_CHECKS)
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
