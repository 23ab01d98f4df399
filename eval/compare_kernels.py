"""Time versions of the Triton kernels against one another, in one run on this machine's GPU.

    git worktree add /tmp/before main
    python -m modeling_rebased.eval.compare_kernels /tmp/before/modeling_rebased modeling_rebased --output comparison

A version is a folder that holds triton_rebased.py and the files that it imports, like modeling_rebased.

Each version is compared with float64 at every length. It is then timed as `benchmark_kernels` times: the same inputs,
and medians of do_bench. Its kernels are timed one by one with torch.profiler, as medians of ten calls in microseconds;
their sum leaves out the gaps between them and the time of the host. The command writes comparison.csv and kernels.csv.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.values import new_folder

from .benchmark_kernels import BAR, add_sizes, compare, linear, make_inputs, time_ms, train
from .timing import write_csv


CALLS = 10  # calls that are profiled


def load_backend(folder: Path, name: str) -> types.ModuleType:
    """Import triton_rebased from `folder` in a package `name` of its own; a package of that name is imported anew.

    Any number of versions can be loaded like this.
    """
    for loaded in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        del sys.modules[loaded]
    package = types.ModuleType(name)
    package.__path__ = [str(folder.resolve())]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.triton_rebased")


def load(folder: Path, number: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return ReBased attention by the kernels in `folder`, which is the `number`-th version."""
    backend = load_backend(folder, f"version_{number}")

    def rebased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"coefficients": (0.0, 0.0, 1.0), "scale": q.shape[-1] ** -0.5, "eps": 1e-12}
        return backend.triton_rebased_attention(q, k, v, **options)[0]

    return rebased


def kernel_times(function: Callable, inputs: list[Tensor]) -> dict[str, float]:
    """Return the median microseconds of each kernel of forward and backward, numbered where it runs twice per call."""
    for _ in range(3):
        train(function, *inputs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            train(function, *inputs)
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:40]].append(event.device_time)
    medians = {}
    for name, all_times in times.items():
        each = len(all_times) // CALLS
        for number in range(each):
            label = name if each == 1 else f"{name} {number + 1}"
            medians[label] = statistics.median(all_times[number::each])
    return medians


def run(arguments: argparse.Namespace, rows: list[dict], kernels: list[dict]) -> None:
    """Add a row per version and length to `rows`, and a row per kernel of each to `kernels`."""
    functions = {str(path): load(path, number) for number, path in enumerate(arguments.versions)}
    sizes = (arguments.tokens, arguments.heads, arguments.feature_dim, arguments.head_dim)
    for length in arguments.lengths:
        for name, function in functions.items():
            torch.manual_seed(0)
            inputs = make_inputs(length, *sizes)
            compare(name, function, linear, inputs, BAR)
            torch.cuda.empty_cache()
            with torch.no_grad():
                forward = time_ms(lambda: function(*inputs[:3]))  # noqa: B023
            training = time_ms(lambda: train(function, *inputs))  # noqa: B023
            times = kernel_times(function, inputs)
            rows.append({"version": name, "T": length, "forward_ms": forward, "training_ms": training})
            kernels += [{"version": name, "T": length, "kernel": kernel, "us": us} for kernel, us in times.items()]
            listed = ", ".join(f"{kernel} {us:.1f}" for kernel, us in times.items())
            print(f"{name}  T {length}  forward {forward:.3f} ms  forward+backward {training:.3f} ms")
            print(f"    kernels {sum(times.values()):.0f} us: {listed}", flush=True)


def main() -> None:
    """Check and time every version at every length, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("versions", type=Path, nargs="+", help="folders like modeling_rebased")
    parser.add_argument("--output", type=new_folder, help="folder for comparison.csv and kernels.csv")
    add_sizes(parser)
    arguments = parser.parse_args(with_dashes())
    if missing := [str(path) for path in arguments.versions if not (path / "triton_rebased.py").is_file()]:
        parser.error(f"versions: no triton_rebased.py in {', '.join(missing)}")
    if not torch.cuda.is_available():
        sys.exit("The kernels are for GPUs, and torch sees none here.")
    rows: list = []
    kernels: list = []
    try:
        run(arguments, rows, kernels)
    finally:  # also what there is where a version is wrong
        if arguments.output is not None and rows:
            write_csv(rows, arguments.output / "comparison.csv")
            write_csv(kernels, arguments.output / "kernels.csv")


if __name__ == "__main__":
    main()
