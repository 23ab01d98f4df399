"""A sequence that is split over processes is computed as by one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_rebased import triton_context_rebased, triton_launch_rebased
from modeling_rebased.attention_rebased import rebased_attention
from modeling_rebased.configuration_rebased import n_features
from modeling_rebased.triton_layout_rebased import make_layout, to_internal, to_public
from modeling_rebased.triton_rebased import OPS
from tests.modeling_rebased import context_parallel_ranks
from tests.processes import ROOT, run_python


def run_ranks(folder: Path, device: str, processes: int) -> list[dict[str, str]]:
    """Run all cases on so many processes, and return by rank what failed, by the case and the size of its group."""
    script = Path(context_parallel_ranks.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    if device == "cpu" and "TRITON_INTERPRET" in os.environ:
        done = run_python(script, folder, device, processes, environment=environment)
    else:  # a process that is forked where there is a GPU has a Triton that does not interpret
        command = [sys.executable, str(script), str(folder), device, str(processes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def failures(folder) -> list[dict[str, str]]:
    """Start the processes once for all tests of this file: importing the libraries takes most of the time."""
    return run_ranks(folder, "cpu", 4)


@pytest.mark.parametrize("case", context_parallel_ranks.CASES)
def test_on_one_to_four_processes(failures, case):
    for rank, failed in enumerate(failures):
        for size in range(1, 5):
            assert f"{case} ({size})" not in failed, f"rank {rank} of {size}:\n{failed[f'{case} ({size})']}"


def test_the_trainer_splits_sequences(failures, folder):
    """`train_lm` with a `cp_size` of 2 trains as one process does: losses, evaluation and weights."""
    alone, split = folder / "trained-1", folder / "trained-2"
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (alone, split)]
    losses = [[entry[key] for entry in log for key in ("loss", "eval_loss") if key in entry] for log in logs]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=2e-4)
    figures = [json.loads((path / "final/training_figures.json").read_text()) for path in (alone, split)]
    assert figures[0] == figures[1]  # as many tokens per step, and the same loss of the held-out text
    weights = [load_file(path / "final/model.safetensors") for path in (alone, split)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-2, atol=1e-4)  # in bfloat16


@pytest.mark.multi_gpu
def test_on_all_gpus(tmp_path):
    """The same cases with NCCL, in groups of 1 to all GPUs of the machine, at most 4."""
    failures = run_ranks(tmp_path, "cuda", min(4, torch.cuda.device_count()))
    for rank, failed in enumerate(failures):
        assert not failed, f"rank {rank}:\n" + "\n".join(f"{case}\n{error}" for case, error in failed.items())


# Up to 16 features and beyond, the kernels are others. 70 tokens are more than one segment, but not with the long
# segments of large inputs.
@pytest.mark.parametrize(
    ("length", "feature_dim", "coefficients", "large"),
    [(70, 5, (1.0, 1.0, 0.5), False), (70, 5, (0.0, 0.0, 1.0), True), (20, 17, (0.0, 0.0, 1.0), False)],
)
def test_sums_of_a_shard_by_the_kernels(length, feature_dim, coefficients, large, monkeypatch):
    """What a shard gives to others, and its gradients with states before and after it, against PyTorch's autograd."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if large:
        monkeypatch.setattr(triton_context_rebased, "count_multiprocessors", lambda device: 0)
        monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})
    torch.manual_seed(0)
    sizes = [(1, length, 2, feature_dim), (1, length, 1, feature_dim), (1, length, 1, 3), (1, length, 2, 3)]
    q, k, v, gradient = (torch.randn(size, device=device) for size in sizes)
    mask = torch.rand(1, length, device=device) > 0.3
    initial = torch.randn(1, 1, n_features(feature_dim, coefficients), 4, device=device)
    initial[..., -1] = initial[..., -1].abs() + 20  # a normaliser far from 0
    scale = feature_dim**-0.5
    exact = [x.double() for x in (q, k, v)]
    leaf = initial.double().requires_grad_()
    options = {"coefficients": coefficients, "attention_mask": mask, "backend": "eager"}
    _, state = rebased_attention(*exact, output_final_state=True, **options)
    layout = make_layout(feature_dim, 3, *coefficients, scale)
    sums = OPS.state(k, v, mask, *coefficients, scale)
    public = to_public(sums[..., :3], sums[..., 3], feature_dim, 3, layout)
    torch.testing.assert_close(public, state.float(), rtol=1e-4, atol=1e-3)

    of_final = torch.randn_like(initial)
    leaves = [x.requires_grad_() for x in (*exact, leaf)]
    output, final = rebased_attention(*leaves[:3], initial_state=leaf, output_final_state=True, **options)
    loss = (output * gradient).sum() + (final * of_final).sum()
    expected = [x.float() for x in torch.autograd.grad(loss, leaves)]
    expected[3] -= of_final  # the rest of the gradient came through the outputs

    def joined(state):
        values, norm = to_internal(state, feature_dim, 3, layout)
        return torch.cat([values, norm[..., None]], dim=-1)

    o, _, inverse_z, states, norms = OPS.forward(
        q, k, v, mask, None, joined(initial), *coefficients, scale, 1e-12, False
    )
    sums = OPS.state_gradient(gradient, q, o, inverse_z, 1, *coefficients, scale)
    of_initial = to_public(sums[..., :3], sums[..., 3], feature_dim, 3, layout)
    for_dq = (gradient, q, k, v, o, inverse_z, states, norms, mask, None, *coefficients, scale)
    dq, *scaled = OPS.shard_dq(*for_dq)
    for_dkdv = (joined(of_final), q, k, v, *scaled, mask, None, *coefficients, scale)
    dk, dv = OPS.shard_dkdv(*for_dkdv)
    if feature_dim == 17:  # the sizes that torch.compile believes
        for operator, arguments in (
            (OPS.state, (k, v, mask, *coefficients, scale)),
            (OPS.state_gradient, (gradient, q, o, inverse_z, 1, *coefficients, scale)),
            (OPS.shard_dq, for_dq),
            (OPS.shard_dkdv, for_dkdv),
        ):
            torch.library.opcheck(operator.default, arguments, test_utils="test_faketensor")
    torch.testing.assert_close(o, output.float(), rtol=1e-4, atol=1e-4)
    for got, wanted in zip((dq, dk, dv, of_initial), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
