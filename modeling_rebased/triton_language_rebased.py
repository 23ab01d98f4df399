# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Triton and its language, or stand-ins where Triton is not installed.

The other files of the Triton backend import `triton` and `tl` from here, so the guard is written once.
"""

from __future__ import annotations

import os

import torch


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Missing:
        """Stand in for `triton` and `triton.language`: decorated kernels stay plain functions, and nothing runs."""

        constexpr = int

        @staticmethod
        def jit(function=None, **_kwargs):
            return function if function is not None else (lambda inner: inner)

        @staticmethod
        def constexpr_function(function):
            return function

    triton = tl = _Missing()


# Whether kernels may hold instructions of NVIDIA's PTX.
PTX = tl.constexpr(torch.version.hip is None)
# Whether Triton's interpreter runs the kernels on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _mend_interpreter() -> None:
    """Let the interpreter (Triton 3.6) take loop bounds that NumPy 2.4 does not convert with int()."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if getattr(original, "mended", False):
        return

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.mended = True
    interpreter._patch_lang_tensor = patch


if HAS_TRITON and INTERPRETED:
    _mend_interpreter()
