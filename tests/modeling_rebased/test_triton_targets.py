# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Other machines than this one: kinds of GPU that are not here, and none with Triton missing."""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from modeling_rebased import triton_rebased


TARGETS = [(80, 99, 16), (90, 227, 16), (100, 227, 32)]


def compile_for_targets(cache: Path) -> list[list[str]]:
    """Return what the script compiles for one kind of GPU after another: (kind, kernel, bytes of shared memory)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(path for path in sys.path if path)
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    script = Path(__file__).with_name("kernel_targets.py")
    command = [sys.executable, str(script), str(cache), *(f"{capability},{width}" for capability, _, width in TARGETS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("compiled")]


@pytest.mark.skipif(not triton_rebased.HAS_TRITON, reason="needs the package triton")
def test_kernels_compile(tmp_path):
    """D = 64 in bfloat16, with states: within the shared memory of a block, in KiB (8.6 has less than 8.0).

    Based for 9.0, and ReBased for the other two.
    """
    compiled = compile_for_targets(tmp_path)
    for capability, shared, width in TARGETS:
        found = [(name, int(size)) for kind, name, size in compiled if int(kind) == capability]
        names = {"_state_kernel", "_scan_kernel", "_forward_kernel", "_dq_kernel", "_dkdv_kernel"}
        names |= {"_decode_kernel", "_conv_kernel", "_conv_backward_kernel"} if capability == 80 else set()
        names |= {"_scale_kernel", "_gradient_kernel"} if width > 16 else set()
        names |= {"_low_state_kernel", "_largest_kernel", "_multiply_kernel"} if capability == 90 else set()
        assert {name for name, _ in found} == names, capability
        assert max(size for _, size in found) <= shared * 1024, capability
    from tests.modeling_rebased import kernel_targets

    if kernel_targets.disassembler().exists():
        assert not kernel_targets.sums_of_one_register(tmp_path / "narrow.cubin")
        found = {path.stem: kernel_targets.overwritten_operands(path) for path in tmp_path.glob("decay-*.cubin")}
        assert len(found) == 3 and not any(found.values()), found


def test_without_triton(monkeypatch):
    """The files are read as they are, and say why their backend cannot run."""
    monkeypatch.setitem(sys.modules, "triton", None)
    package = types.ModuleType("without_triton")
    package.__path__ = [str(Path(triton_rebased.__file__).parent)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    module = importlib.import_module("without_triton.triton_rebased")
    assert not module.HAS_TRITON
    assert "not installed" in module.triton_unavailable_reason(torch.device("cpu"), torch.float32, 16, 64)
    for name in [name for name in sys.modules if name.startswith("without_triton.")]:
        del sys.modules[name]
