"""What every test of the suite needs before torch, triton and transformers are imported."""

import os
import shutil
import tempfile
from pathlib import Path


# No test may reach for the network: whatever it loads lies in the repository or is made by the test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests fork processes (`processes.py`). Looking for GPUs must not start CUDA, which does not survive a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# Under pytest-xdist, several processes run tests side by side. One thread per process is then the fastest.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# transformers copies a checkpoint's code into this cache and imports it from there. Each process that runs tests
# has a folder of its own, apart from the user's cache and from the other processes.
_MODULES_CACHE = tempfile.mkdtemp(prefix="rebased-tests-")
os.environ["HF_MODULES_CACHE"] = _MODULES_CACHE


def _has_gpu() -> bool:
    """Look for an NVIDIA GPU without importing torch, which would be too early for triton's interpreter switch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):
        return False
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


# Triton reads this at import. Its interpreter runs the kernels on the CPU: slow, but the same code.
if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.interpreter import prepare_interpreter  # noqa: E402


prepare_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` or `multi_gpu`, with the reason, where torch sees no GPU or only one.

    The longest test goes first: as the last one, it would keep one process busy while the others have ended.
    """
    items.sort(key=lambda item: item.name != "test_kernels_compile")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for mark, least, reason in (
        ("gpu", 1, "needs an NVIDIA GPU, torch.cuda.is_available() is False"),
        ("multi_gpu", 2, f"needs at least two NVIDIA GPUs, torch sees {gpus}"),
    ):
        for item in items if gpus < least else []:
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish() -> None:
    shutil.rmtree(_MODULES_CACHE, ignore_errors=True)
