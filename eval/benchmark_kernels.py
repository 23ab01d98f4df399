"""Time the Triton kernels on this machine's GPU beside softmax and the other libraries that are installed.

    python -m modeling_rebased.eval.benchmark_kernels --output eval/results/kernels/h100

For every method and length the benchmark measures:

    forward_ms           the forward pass, the median of triton.testing.do_bench
    training_ms          the forward and the backward pass
    training_host_ms     the time that the host needs to issue both; if the GPU is faster, training_ms shows this
    extra_gib            the memory of both passes on top of inputs, outputs and gradients
    floor_..._ms         the time that moving inputs and outputs once takes at the copy bandwidth

The number of tokens is the same at every length (--tokens), so B = tokens / T. A sequence that is longer than that has
fewer heads. Every method is compared with float64 before it is timed, and ReBased at every length. The copy bandwidth
and the rate of a large matrix product are measured in the same run. Writes kernels.csv, machine.json and kernels.png.

--profile T measures nothing. It calls forward and backward once at that length, between the profiler's start and stop,
for `ncu --profile-from-start off`.

Other libraries are timed where they are installed: flash-linear-attention
(`pip install modeling-rebased[kernels-peers]`), and `retention` if --feature-dim equals --head-dim.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.folders import write_text
from modeling_rebased.training.values import count, new_folder

from .plots import kernels_title, plot_kernels
from .timing import write_csv


LENGTHS = (512, 2048, 8192, 32768, 131072)
CHECKED_LENGTH = 2500  # several segments and a ragged end, for a reference that is quadratic in T
BAR = 1.5e-2  # relative error in norm that bfloat16 inputs, features and weights may leave
PEER_BAR = 5e-2  # the others round sums and normalisers too
POWER_CHUNKS = (1024, 2048)  # retention has no default for its chunks: its best of these counts
QUADRATIC_LIMIT = 8192  # peers that are quadratic in T are timed up to here


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal scaled_dot_product_attention with heads of the values' size, by cuDNN where possible."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def rebased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ReBased attention by the Triton kernels."""
    from modeling_rebased import rebased_attention

    return rebased_attention(q, k, v, eps=1e-12, normalized=True, backend="triton")[0]


def methods(feature_dim: int, head_dim: int) -> Iterator[tuple[str, Callable, int, bool, bool]]:
    """Yield (name, function of q, k, v, its feature_dim, whether it is ReBased, whether it is quadratic in T)."""
    yield "rebased", rebased, feature_dim, True, False
    yield "softmax", softmax, head_dim, False, False
    if importlib.util.find_spec("fla") is not None:
        from fla.ops.rebased import parallel_rebased
        from fla.ops.simple_gla import chunk_simple_gla

        yield "fla parallel_rebased", lambda q, k, v: parallel_rebased(q, k, v, 1e-12), feature_dim, True, True
        yield "fla chunk_simple_gla", lambda q, k, v: chunk_simple_gla(q, k, v)[0], 64, False, False
    else:
        print("flash-linear-attention is not installed: its rows are missing.")
    if feature_dim == head_dim:
        if importlib.util.find_spec("retention") is not None:
            from retention import power_retention

            def power(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
                chunk = min(chunk, q.shape[1])
                return power_retention(q, k, v, deg=2, scale=q.shape[-1] ** -0.5, chunk_size=chunk)

            for chunk in POWER_CHUNKS:
                name = f"retention power_retention, chunks of {chunk}"
                yield name, partial(power, chunk=chunk), feature_dim, True, False
        else:
            print("retention is not installed: its row is missing.")


def make_inputs(length: int, tokens: int, heads: int, feature_dim: int, head_dim: int) -> list[Tensor]:
    """Return q, k [B, T, H, F], normalised as in the model, v [B, T, H, D] and a gradient of o, in bfloat16."""
    batch = max(1, tokens // length)
    heads = heads * batch * tokens // (batch * max(tokens, length))
    q, k = (torch.randn(batch, length, heads, feature_dim, device="cuda") for _ in range(2))
    v, grad = (torch.randn(batch, length, heads, head_dim, device="cuda") for _ in range(2))
    q, k = (layer_norm(x, (feature_dim,)) for x in (q, k))
    return [x.bfloat16() for x in (q, k, v, grad)]


def train(function: Callable, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output = function(*leaves)
    return (output, *torch.autograd.grad(output, leaves, grad))


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ReBased attention by the PyTorch backend, linear in T."""
    from modeling_rebased import rebased_attention

    return rebased_attention(q, k, v, eps=1e-12, backend="eager")[0]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ReBased attention by its definition, quadratic in T."""
    s = torch.einsum("bihf,bjhf->bhij", q, k) * q.shape[-1] ** -0.5
    w = s.square().tril()
    return torch.einsum("bhij,bjhd->bihd", w, v) / (w.sum(-1).transpose(1, 2)[..., None] + 1e-12)


def compare(name: str, function: Callable, reference: Callable, inputs: list[Tensor], bar: float) -> None:
    """Raise an error unless o, dq, dk and dv agree with `reference` in float64.

    All numbers must be finite. Only two heads of the first, the middle and the last sequence are compared, because the
    reference needs much memory.
    """
    q, k, v, grad = inputs
    batch, length, heads = q.shape[:3]
    # the first rows have few keys; where all their weights are near 0, o rounded to bfloat16 spoils the gradient
    grad = grad.clone()
    grad[:, :64] = 0
    results = dict(zip(("o", "dq", "dk", "dv"), train(function, q, k, v, grad)))
    for part, x in results.items():
        if not x.isfinite().all():
            raise RuntimeError(f"{name}: {part} of {length} tokens is not finite; not timed.")
    for sequence, head in sorted({(0, 0), (batch // 2, heads // 2), (batch - 1, max(0, heads - 2))}):
        some = (slice(sequence, sequence + 1), slice(None), slice(head, head + 2))
        expected = train(reference, *(x[some].double() for x in (q, k, v, grad)))
        for (part, x), y in zip(results.items(), expected):
            error = ((x[some].double() - y).norm() / y.norm()).item()
            if not error < bar:
                where = f"{name}: {part} of {length} tokens, sequence {sequence}, heads {head} and after it,"
                raise RuntimeError(f"{where} is off by {error:.1e} from float64, allowed is {bar}; not timed.")


def check(name: str, function: Callable, feature_dim: int, head_dim: int, quadratic_kernel: bool) -> None:
    """Compare a method with its definition, that of ReBased or of softmax attention."""
    length = CHECKED_LENGTH if name == "rebased" else 2048  # peers may take whole chunks only
    inputs = make_inputs(length, length, 2, feature_dim, head_dim)
    compare(name, function, exact if quadratic_kernel else softmax, inputs, BAR if name == "rebased" else PEER_BAR)


@contextmanager
def extra_memory() -> Iterator[list[float]]:
    """Return the GiB at the peak of a call on top of what exists before or after it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result: list = []
    yield result
    torch.cuda.synchronize()
    result.append((torch.cuda.max_memory_allocated() - max(before, torch.cuda.memory_allocated())) / 2**30)


def time_ms(function: Callable[[], object]) -> float:
    """Return the median time of a call in milliseconds, by Triton's own timer."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=50, return_mode="median")


def host_ms(function: Callable[[], object], calls: int = 20) -> float:
    """Return the milliseconds until a call returns while the GPU still has work: the median of `calls`."""
    times = []
    torch.cuda.synchronize()
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e3 * statistics.median(times)


def ceilings() -> dict[str, float]:
    """Measure the copy bandwidth (TB/s, read plus written) and a large bfloat16 matrix product (TFLOP/s)."""
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / time_ms(lambda: y.copy_(x)) / 1e9
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"copy_tb_per_s": copy, "matmul_tflop_per_s": 2 * 8192**3 / time_ms(lambda: a @ b) / 1e9}


def time_one(function: Callable, inputs: list[Tensor], rates: dict[str, float]) -> dict[str, float]:
    """Return the times, the memory and the memory floor of one method at one size."""
    with torch.no_grad():
        forward = time_ms(lambda: function(*inputs[:3]))
    training = time_ms(lambda: train(function, *inputs))
    host = host_ms(lambda: train(function, *inputs))
    with extra_memory() as memory:
        kept = train(function, *inputs)
    del kept
    # the floor: q, k, v read and o written once; then all of them and do read, and dq, dk, dv written
    moved, per_ms = sum(x.nbytes for x in inputs), rates["copy_tb_per_s"] * 1e9
    return {
        "B": inputs[0].shape[0],
        "H": inputs[0].shape[2],
        "forward_ms": forward,
        "training_ms": training,
        "training_host_ms": host,
        "extra_gib": memory[0],
        "floor_forward_ms": moved / per_ms,
        "floor_training_ms": (3 * moved) / per_ms,
    }


def run(arguments: argparse.Namespace, rates: dict[str, float], rows: list[dict]) -> list[str]:
    """Add one row per method and length to `rows`, and return the errors of ReBased."""
    wrong = []
    tokens, heads, head_dim = arguments.tokens, arguments.heads, arguments.head_dim
    for name, function, feature_dim, same_kernel, quadratic in methods(arguments.feature_dim, head_dim):
        if same_kernel or name == "softmax":
            try:
                check(name, function, feature_dim, head_dim, same_kernel)
            except Exception as error:
                if name == "rebased":
                    raise
                print(f"{name}: left out, {error}")
                continue
        for length in arguments.lengths:
            if quadratic and length > QUADRATIC_LIMIT:
                continue
            row = {"method": name, "T": length, "F": feature_dim}
            inputs = make_inputs(length, tokens, heads, feature_dim, head_dim)
            if name == "rebased":
                try:
                    compare(name, function, linear, inputs, BAR)
                except RuntimeError as error:  # the other rows are worth having; `main` ends with it
                    wrong.append(str(error))
                    print(error, flush=True)
                    continue
                torch.cuda.empty_cache()
            row |= time_one(function, inputs, rates)
            rows.append(row)
            print(
                f"{name:26s} T {length:7d}  B {row['B']:4d}  H {row['H']:3d}  F {feature_dim:3d}  "
                f"forward {row['forward_ms']:8.3f} ms  forward+backward {row['training_ms']:8.3f} ms  "
                f"(host {row['training_host_ms']:6.3f})  extra {row['extra_gib']:5.2f} GiB",
                flush=True,
            )
            torch.cuda.empty_cache()
    return wrong


def profile(arguments: argparse.Namespace) -> None:
    """Run forward and backward of ReBased once, for a profiler that waits for cudaProfilerStart."""
    sizes = (arguments.tokens, arguments.heads, arguments.feature_dim, arguments.head_dim)
    inputs = make_inputs(arguments.profile, *sizes)
    for _ in range(3):  # compile, and fill the allocator
        train(rebased, *inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    train(rebased, *inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how large the inputs are."""
    parser.add_argument("--feature-dim", type=count, default=16, help="F, the size of a query or key per head")
    parser.add_argument("--head-dim", type=count, default=64, help="D, the size of a value per head")
    parser.add_argument("--heads", type=count, default=12, help="attention heads")
    parser.add_argument("--tokens", type=count, default=65536, help="tokens of all sequences together")
    parser.add_argument("--lengths", type=count, nargs="+", default=LENGTHS, help="tokens of a sequence")


def main() -> None:
    """Check every method against the definition, time it, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=new_folder, help="folder for kernels.csv, machine.json and kernels.png")
    add_sizes(parser)
    parser.add_argument("--profile", type=count, metavar="T", help="time nothing, run once at length T for a profiler")
    arguments = parser.parse_args(with_dashes())
    if not torch.cuda.is_available():
        sys.exit("The kernels are for GPUs, and torch sees none here; benchmark_eager.py times the CPU.")
    torch.manual_seed(0)
    if arguments.profile:
        profile(arguments)
        return
    command = " ".join(["python -m modeling_rebased.eval.benchmark_kernels", *sys.argv[1:]])
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "command": command}
    machine |= {"tokens": arguments.tokens, "head_dim": arguments.head_dim}
    rates = ceilings()
    machine |= rates
    print(
        f"{machine['gpu']}: copy {rates['copy_tb_per_s']:.2f} TB/s, matmul {rates['matmul_tflop_per_s']:.0f} TFLOP/s"
    )
    rows: list = []
    wrong: list = []
    try:
        wrong = run(arguments, rates, rows)
    finally:  # also what there is when it is interrupted
        if arguments.output is not None and rows:
            write(rows, machine, arguments)
    if wrong:
        sys.exit("\n".join(wrong))


def write(rows: list[dict], machine: dict, arguments: argparse.Namespace) -> None:
    """Write kernels.csv, machine.json and kernels.png."""
    write_csv(rows, arguments.output / "kernels.csv")
    write_text(arguments.output / "machine.json", json.dumps(machine, indent=2) + "\n")
    title = kernels_title(rows, machine, arguments.head_dim, arguments.tokens)
    plot_kernels(rows, title, arguments.output / "kernels.png")


if __name__ == "__main__":
    main()
