"""Time a training step whose one sequence is split over GPUs, and compare its result with one GPU.

    torchrun --nproc-per-node 2 -m modeling_rebased.eval.benchmark_context_parallel --output output/context_parallel

Every GPU holds as many tokens whatever the number of GPUs, so a sequence is longer on more GPUs. The measured step is
`model(...).loss.backward()` in training mode, in bfloat16, with compiled layers, followed by the average of the
gradients over the GPUs. There is no optimizer. With one GPU there is no exchange. From 65,536 tokens per GPU on, the
step uses activation checkpointing (--checkpoint-from).

Writes to the output folder:

    context_parallel.csv    for each number of GPUs and tokens per GPU: time, the part of it in which the host launches
                            work, tokens per second, share of the speed of one GPU times their number, peak memory per
                            GPU, and the bytes that a GPU receives
    profile.csv             with --profile, for each of these and each GPU: what one more step consists of
    ring.csv                with --ring, the time of a softmax model by PyTorch's ring attention on all GPUs
    errors.csv              relative errors of logits and gradients against one GPU, in norm
    context_parallel.png    a picture of the time per token

The bytes are counted as the collectives are called, in one step without compilation and without checkpointing. Their
number does not depend on the number of tokens.

Ring attention is torch.distributed.tensor.experimental.context_parallel. It is timed and no more: its order puts two
pieces of the sequence on each GPU, and the convolutions and positions take them as one.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM, shard_sequence
from modeling_rebased.configuration import config_path
from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.values import count, natural, new_folder

from .plots import plot_context_parallel
from .profiling import kernel_times
from .timing import write_csv


class Received(TorchDispatchMode):
    """Count the bytes that this process receives by all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and keep the size of what it brings from the other processes."""
        result = function(*args, **(kwargs or {}))
        if function is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.sizes.append(result.nbytes - args[0].nbytes)
        return result


def load(name: str, device: str, dtype: torch.dtype, **changes: Any) -> ReBasedForCausalLM:
    """Return a model with random weights, the same on every process."""
    torch.manual_seed(0)
    config = ReBasedConfig.from_pretrained(config_path(name), **changes)
    with torch.device(device):
        return ReBasedForCausalLM(config).to(dtype)


def make_batch(model: ReBasedForCausalLM, length: int) -> dict[str, torch.Tensor]:
    """Return one sequence of random tokens, the same on every process."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
    return {"input_ids": ids, "labels": ids}


@contextmanager
def split_over(model: ReBasedForCausalLM, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Split the model's sequences over a group, or over none."""
    model.set_context_parallel_group(group)
    try:
        yield
    finally:
        model.set_context_parallel_group(None)


def average_gradients(model: ReBasedForCausalLM, group: dist.ProcessGroup) -> None:
    """Replace each gradient by its mean over the group."""
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    flat /= group.size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])


def error_rows(name: str, device: str, length: int, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Compare a sequence over all processes with the same on each process alone."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load(name, device, dtype).eval()
        batch = make_batch(model, length)
        logits = model(**batch).logits.detach()
        model(**batch).loss.backward()
        whole = {key: parameter.grad.float() for key, parameter in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        with split_over(model, group):
            shard = shard_sequence(batch, group)
            output = model(**shard)
            output.loss.backward()
        average_gradients(model, group)
        start = dist.get_rank(group) * length // group.size()
        expected = logits[:, start : start + output.logits.shape[1]].float()
        # Sums of squares over all processes, of the differences and of what is expected
        squares = torch.stack([(output.logits.detach().float() - expected).square().sum(), expected.square().sum()])
        dist.all_reduce(squares, group=group)
        differences = {key: parameter.grad.float() - whole[key] for key, parameter in model.named_parameters()}
        worst = max((differences[key].norm() / whole[key].norm().clamp_min(1e-30)).item() for key in whole)
        total = torch.stack([x.norm() for x in differences.values()]).norm()
        rows.append(
            {
                "gpus": group.size(),
                "tokens": length,
                "dtype": str(dtype).removeprefix("torch."),
                "logits": f"{(squares[0] / squares[1]).sqrt().item():.3g}",
                "gradients": f"{(total / torch.stack([x.norm() for x in whole.values()]).norm()).item():.3g}",
                "worst_gradient": f"{worst:.3g}",
            }
        )
        del model, output, whole, differences
    return rows


def count_bytes(name: str, device: str, group: dist.ProcessGroup) -> dict[str, int]:
    """Return the bytes that a process receives in the forward pass, per layer, and in a whole step."""
    model = load(name, device, torch.bfloat16 if device != "cpu" else torch.float32).train()
    batch = make_batch(model, 64 * group.size())
    with split_over(model, group):
        shard = shard_sequence(batch, group)
        with Received() as received:
            loss = model(**shard).loss
        forward = received.sizes[1:]  # without the table at the start
        with received:
            loss.backward()
    sizes = dict(zip(model.config.layer_types, forward))
    return {
        "state_bytes": sizes["linear_attention"],
        "halo_bytes": sizes.get("conv", 0),
        "step_bytes": sum(received.sizes),
    }


def profile_row(step: Callable[[], None]) -> dict[str, Any]:
    """Return what a step consists of on this GPU, in milliseconds, by torch.profiler (`eval.profiling`)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        step()
        host = 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    return {"wall_ms": wall, "host_ms": host} | kernel_times(profiler)


def time_step(
    model: ReBasedForCausalLM, length: int, group: dist.ProcessGroup | None, repeats: int, profiled: bool = False
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the median times of a training step in milliseconds with the peak memory in GiB, and a profile."""
    on_gpu = model.device.type == "cuda"
    with split_over(model, group):
        batch = make_batch(model, length)
        shard = batch if group is None else shard_sequence(batch, group)

        def step() -> None:
            model(**shard).loss.backward()
            if group is not None:
                average_gradients(model, group)
            model.zero_grad(set_to_none=True)

        times, of_host = [], []
        for repeat in range(repeats + 2):
            if repeat == 2 and on_gpu:
                torch.cuda.reset_peak_memory_stats()
            if group is not None:
                dist.barrier(group)
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            of_host.append(1e3 * (time.perf_counter() - start))
            if on_gpu:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        row: dict[str, Any] = {}
        if profiled and on_gpu:
            if group is not None:
                dist.barrier(group)
            row = profile_row(step)
    figures = torch.tensor([statistics.median(times[2:]), statistics.median(of_host[2:]), gib], device=model.device)
    if group is not None:
        dist.all_reduce(figures, dist.ReduceOp.MAX, group=group)
    return dict(zip(("ms", "host_ms", "peak_gib"), figures.tolist())), row


def time_ring(name: str, length: int, checkpointing: bool, repeats: int) -> dict[str, Any]:
    """Return the row of ring.csv of one sequence over all GPUs."""
    from torch.distributed.tensor.experimental import context_parallel

    processes = dist.get_world_size()
    mesh = init_device_mesh("cuda", (processes,))
    model = load(name, "cuda", torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:  # attention itself is replaced, which a compiled layer would not see
        layer.mlp.compile(dynamic=False)
    ids = make_batch(model, length)["input_ids"]
    times = []
    for _ in range(repeats + 1):
        torch.cuda.reset_peak_memory_stats()
        shard = ids.clone()
        with context_parallel(mesh, buffers=[shard], buffer_seq_dims=[1], no_restore_buffers={shard}):
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(input_ids=shard, labels=shard).loss.backward()
            average_gradients(model, dist.group.WORLD)
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    ms = statistics.median(times[1:] or times)
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpus": processes,
        "config": name,
        "tokens": length,
        "checkpointing": checkpointing,
        "ms": ms,
        "tokens_per_s": length / ms * 1e3,
        "us_per_token": 1e3 * ms / length,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def measure(
    arguments: argparse.Namespace, gpus: int, shard: int, group: dist.ProcessGroup | None, received: dict[str, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rows of context_parallel.csv and profile.csv of a step with `shard` tokens on each of some GPUs.

    Args:
        arguments: the command line.
        gpus, shard: numbers of GPUs, and of tokens per GPU.
        group: these GPUs, `None` for one.
        received: the bytes that a GPU receives (`count_bytes`).
    """
    on_gpu = torch.cuda.is_available()
    checkpointing = shard >= arguments.checkpoint_from
    model = load(arguments.config, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if arguments.compile:
        torch.compiler.reset()
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    figures, profiled = time_step(model, gpus * shard, group, arguments.repeats, arguments.profile)
    ms = figures["ms"]
    row = {
        "gpu": torch.cuda.get_device_name() if on_gpu else "CPU",
        "gpus": gpus,
        "tokens_per_gpu": shard,
        "tokens": gpus * shard,
        "checkpointing": checkpointing,
        "ms": ms,
        "host_ms": figures["host_ms"],
        "tokens_per_s": gpus * shard / ms * 1e3,
        "us_per_token": 1e3 * ms / (gpus * shard),
        "peak_gib": figures["peak_gib"],
        **{key: received.get(key, 0) for key in ("state_bytes", "halo_bytes", "step_bytes")},
    }
    del model
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return row, profiled


def main(argv: list[str] | None = None) -> None:
    """Make the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=new_folder, help="folder for the results")
    parser.add_argument("--config", default="150m-rebased", help="configuration of the model")
    parser.add_argument("--shards", type=count, nargs="*", default=[131072], help="tokens per GPU")
    parser.add_argument("--gpus", type=count, nargs="*", help="numbers of GPUs; by default 1, 2, 4, ... and all")
    parser.add_argument("--profile", action="store_true", help="also profile one step of each kind")
    parser.add_argument("--ring", type=count, nargs="*", default=[], help="tokens per sequence, for ring attention")
    parser.add_argument("--ring-config", default="150m-softmax", help="configuration of the softmax model")
    parser.add_argument(
        "--checked-length", type=natural, default=5001, help="tokens of the comparison with one GPU, 0 for none"
    )
    parser.add_argument("--repeats", type=count, default=5, help="timed calls")
    parser.add_argument("--compile", type=natural, default=1, help="0 leaves the layers as they are")
    parser.add_argument(
        "--checkpoint-from", type=count, default=65536, help="tokens per GPU with activation checkpointing"
    )
    arguments = parser.parse_args(with_dashes(argv))
    if "LOCAL_RANK" not in os.environ:
        parser.error(
            "start it with torchrun --nproc-per-node GPUS -m modeling_rebased.eval.benchmark_context_parallel"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    rows: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []

    def write(table: list[dict[str, Any]], file: str, new: list[dict[str, Any]]) -> None:
        if rank == 0:
            if arguments.output is not None:
                write_csv(table, arguments.output / file)
            for row in new:
                print(
                    "  ".join(f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )

    groups = {gpus: dist.new_group(range(gpus)) for gpus in arguments.gpus or _powers_of_two(processes)}
    for gpus, group in groups.items():
        received = count_bytes(arguments.config, device, group) if gpus > 1 and rank < gpus else {}
        for shard in arguments.shards:
            if rank < gpus:
                row, profiled = measure(arguments, gpus, shard, group if gpus > 1 else None, received)
                alone = next((other["ms"] for other in rows if other["tokens_per_gpu"] == shard), row["ms"])
                rows.append({**row, "efficiency": alone / row["ms"]})
                write(rows, "context_parallel.csv", rows[-1:])
                if profiled:
                    every: list[Any] = [None] * gpus
                    own = {"tokens_per_gpu": shard, "gpus": gpus, "rank": rank, **profiled}
                    dist.all_gather_object(every, own, group)
                    profiles += every
                    write(profiles, "profile.csv", every)
            dist.barrier()
    rings: list[dict[str, Any]] = []
    for length in arguments.ring:
        checkpointing = length // processes >= arguments.checkpoint_from
        rings.append(time_ring(arguments.ring_config, length, checkpointing, repeats=1 if length <= 262144 else 0))
        write(rings, "ring.csv", rings[-1:])
    if processes > 1 and arguments.checked_length:
        errors = error_rows(arguments.config, device, arguments.checked_length, dist.group.WORLD)
        write(errors, "errors.csv", errors)
    if rank == 0 and arguments.output is not None and rows:
        plot_context_parallel(rows, rings, arguments.output / "context_parallel.png")
    dist.destroy_process_group()


def _powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4 and so on below `most`, and `most`."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


if __name__ == "__main__":
    main()
