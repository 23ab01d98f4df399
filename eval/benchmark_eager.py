"""Time the PyTorch backend on this machine's CPU against the quadratic form, and show that it is linear in T.

    python -m modeling_rebased.eval.benchmark_eager --output eval/results/eager

Prints a table and writes `eager.csv`, `machine.json` and `eager.png` to the output folder. Every time is a median.
Before anything is timed, the backend's result is compared with the quadratic form in float64.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

from modeling_rebased import rebased_attention
from modeling_rebased.eager_rebased import naive_rebased_attention
from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.folders import write_text
from modeling_rebased.training.values import count, new_folder

from .plots import plot_eager
from .timing import median_ms, write_csv


LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
# The quadratic form needs H * T * T floats a few times over.
QUADRATIC_LIMIT = 4096
TRAINING_LIMIT = 16384


def make_inputs(length: int, heads: int, feature_dim: int, head_dim: int) -> list[torch.Tensor]:
    """Return random q, k [1, T, H, F] and v [1, T, H, D] in float32."""
    return [torch.randn(1, length, heads, size) for size in (feature_dim, feature_dim, head_dim)]


def check(heads: int, feature_dim: int, head_dim: int) -> None:
    """Raise an error unless the backend agrees with float64 to 1e-5 (relative Frobenius norm)."""
    inputs = make_inputs(700, heads, feature_dim, head_dim)
    expected = naive_rebased_attention(*(x.double() for x in inputs))
    actual, _ = rebased_attention(*inputs, backend="eager")
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error < 1e-5:
        raise RuntimeError(f"The eager backend is off by {error:.1e}; nothing was timed.")


def time_length(length: int, heads: int, feature_dim: int, head_dim: int, repeats: int) -> dict[str, Any]:
    """Return the milliseconds of both forms at one length, `None` where a form is left out."""
    inputs = make_inputs(length, heads, feature_dim, head_dim)

    def train(function: Callable[..., torch.Tensor]) -> None:
        leaves = [x.clone().requires_grad_() for x in inputs]
        function(*leaves).sum().backward()

    def chunked(*qkv: torch.Tensor) -> torch.Tensor:
        return rebased_attention(*qkv, backend="eager")[0]

    row: dict[str, Any] = {"tokens": length}
    with torch.no_grad():
        row["chunked"] = median_ms(lambda: chunked(*inputs), repeats)
        quadratic = length <= QUADRATIC_LIMIT
        row["quadratic"] = median_ms(lambda: naive_rebased_attention(*inputs), repeats) if quadratic else None
    row["chunked fwd+bwd"] = median_ms(lambda: train(chunked), repeats) if length <= TRAINING_LIMIT else None
    row["quadratic fwd+bwd"] = median_ms(lambda: train(naive_rebased_attention), repeats) if quadratic else None
    return row


def print_row(row: dict[str, Any]) -> None:
    """Print one length as a line of the table."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    per_token = 1e3 * row["chunked"] / row["tokens"]
    print(
        f"{row['tokens']:>8} {cell(row['chunked']):>10} {cell(row['quadratic']):>10} {per_token:>12.2f} "
        f"{cell(row['chunked fwd+bwd']):>16} {cell(row['quadratic fwd+bwd']):>18}",
        flush=True,
    )


def main() -> None:
    """Time every length, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--heads", type=count, default=12, help="attention heads")
    parser.add_argument("--feature-dim", type=count, default=16, help="F, the size of a query or key per head")
    parser.add_argument("--head-dim", type=count, default=64, help="D, the size of a value per head")
    parser.add_argument("--lengths", type=count, nargs="+", default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--repeats", type=count, default=5, help="timed calls")
    parser.add_argument("--threads", type=count, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--output", type=new_folder, default=None, help="folder for the CSV and the plot")
    arguments = parser.parse_args(with_dashes())

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    sizes = (arguments.heads, arguments.feature_dim, arguments.head_dim)
    check(*sizes)
    title = (
        f"float32, batch 1, {sizes[0]} heads, F = {sizes[1]}, D = {sizes[2]}; {arguments.threads} threads of "
        f"{platform.machine()}, torch {torch.__version__}"
    )
    print(title)
    print(f"{'tokens':>8} {'chunked':>10} {'quadratic':>10} {'us per token':>12} {'chunked fwd+bwd':>16} ", end="")
    print(f"{'quadratic fwd+bwd':>18}   (ms, median of {arguments.repeats})")
    rows = []
    for length in arguments.lengths:
        rows.append(time_length(length, *sizes, arguments.repeats))
        print_row(rows[-1])
    if arguments.output is not None:
        write_csv(rows, arguments.output / "eager.csv")
        write_text(arguments.output / "machine.json", json.dumps({"title": title}, indent=2) + "\n")
        plot_eager(rows, title, arguments.output / "eager.png")
        print(f"Wrote {arguments.output / 'eager.csv'} and {arguments.output / 'eager.png'}")


if __name__ == "__main__":
    main()
