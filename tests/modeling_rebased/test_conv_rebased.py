# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Triton kernel of the short convolution against float64, in the interpreter or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM, triton_rebased
from modeling_rebased.triton_rebased import triton_short_conv


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = triton_rebased.triton_unavailable_reason(torch.device(DEVICE), torch.float32, 1, 1)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the Triton backend cannot run here: {REASON}")

# allowed errors of results and of gradients, relative to the norm of the float64 result
BARS = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (5e-3, 1e-2)}


def by_definition(x, weight, bias, gate, segment_ids):
    """Token by token, in float64: each packed sequence is a sequence of its own."""
    rows = []
    for row in range(len(x)):
        ids = torch.zeros(x.shape[1]) if segment_ids is None else segment_ids[row % len(segment_ids)]
        parts = []
        for part in ids.unique():
            u = x[row, ids.to(x.device) == part]
            padded = F.pad(u, (0, 0, weight.shape[1] - 1, 0))
            out = F.conv1d(padded.T[None], weight[:, None], bias, groups=len(weight))[0].T
            parts.append(out if gate is None else out * gate[row, ids.to(x.device) == part] + u)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def compare(x, weight, bias, gate, segment_ids, bars):
    given = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, gate)]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, gate)]
    y, truth = triton_short_conv(*given, segment_ids), by_definition(*exact, segment_ids)
    assert y.dtype == (x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype))
    assert error(y, truth) < bars[0]
    grad = torch.randn(y.shape, device=y.device).to(y.dtype)
    y.backward(grad)
    truth.backward(grad.double())
    for mine, true in zip(given, exact):
        if mine is not None:
            assert mine.grad.dtype == mine.dtype
            assert error(mine.grad, true.grad) < bars[1]


def make(batch, length, channels, taps, dtype=torch.float32, bias=True, gated=True, gate_dtype=None):
    torch.manual_seed(batch * length + channels + taps)
    x, gate = (torch.randn(batch, length, channels, device=DEVICE).to(dtype) for _ in range(2))
    weight, offset = torch.randn(channels, taps, device=DEVICE).to(dtype), torch.randn(channels, device=DEVICE)
    return x, weight, offset.to(dtype) if bias else None, gate.to(gate_dtype or dtype) if gated else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(2, 140, 70, 3), (1, 1, 8, 4), (3, 2, 16, 5), (1, 33, 5, 1)])
def test_sizes(size, gated, bias):
    compare(*make(*size, bias=bias, gated=gated), None, BARS[torch.float32])


def test_activation_checkpointing():
    """Activation checkpointing lets a backward pass read its saved tensors once."""
    inputs = [x.requires_grad_() for x in make(1, 3, 5, 3)]
    gradients = [
        torch.autograd.grad(y.sum(), inputs)
        for y in (triton_short_conv(*inputs), checkpoint(triton_short_conv, *inputs, use_reentrant=False))
    ]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    compare(*make(2, 140, 70, 3, dtype), None, BARS[dtype])


def test_a_gate_of_another_dtype_as_under_autocast():
    x, weight, bias, gate = make(1, 50, 20, 3, gate_dtype=torch.bfloat16)
    y = triton_short_conv(x, weight, bias, gate)
    assert y.dtype == torch.float32
    assert error(y, by_definition(*(t.double() for t in (x, weight, bias, gate)), None)) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_packed_sequences(gated):
    ids = torch.tensor([0] * 1 + [1] * 2 + [2] * 130 + [3] * 7, device=DEVICE)
    compare(*make(1, 140, 20, 4, gated=gated), ids[None], BARS[torch.float32])
    compare(*make(2, 140, 20, 4, gated=gated), ids[None], BARS[torch.float32])  # one row of ids for all


def test_strides():
    x, weight, bias, gate = make(2, 30, 40, 3)
    wide = torch.randn(2, 30, 80, device=DEVICE)
    wide[..., :40], wide[..., 40:] = x, gate
    half, other = wide.chunk(2, dim=-1)
    assert torch.equal(triton_short_conv(half, weight, bias, other), triton_short_conv(x, weight, bias, gate))
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(triton_short_conv(turned, weight, bias, gate), triton_short_conv(x, weight, bias, gate))
    y = triton_short_conv(x.requires_grad_(), weight, bias, gate)
    y.sum().backward()  # the gradient of a sum has strides of 0
    (expected,) = torch.autograd.grad(triton_short_conv(x, weight, bias, gate), x, torch.ones_like(y))
    assert torch.equal(x.grad, expected)


def test_operators_are_well_formed():
    x, weight, bias, gate = (t.requires_grad_() for t in make(1, 9, 6, 3))
    ids = torch.tensor([[0] * 4 + [1] * 5], device=DEVICE)
    for inputs in ((x, weight, bias, gate, ids), (x, weight, None, None, None)):
        torch.library.opcheck(triton_rebased.OPS.conv, inputs)


@pytest.mark.parametrize("conv_type", ["residual", "gated"])
def test_a_model_computes_the_same_by_either_backend(conv_type):
    """Whole, padded, packed and continued from a cache, with gradients."""
    torch.manual_seed(0)
    eager, triton = (
        ReBasedForCausalLM(
            ReBasedConfig(
                vocab_size=50, hidden_size=32, num_attention_heads=2, head_dim=8, feature_dim=4, num_hidden_layers=2,
                intermediate_size=16, conv_type=conv_type, conv_intermediate_size=24 if conv_type == "gated" else None,
                layer_types=["conv", "linear_attention"], kernel_backend=backend,
            )
        ).to(DEVICE)
        for backend in ("eager", "triton")
    )  # fmt: skip
    triton.load_state_dict(eager.state_dict())
    ids = torch.randint(50, (2, 12), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 4:7] = 0
    restart = torch.tensor([[*range(5), *range(7)]], device=DEVICE)
    for arguments in (
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids[:1], "position_ids": restart, "use_cache": False},
    ):
        outputs = [model(**arguments).logits for model in (eager, triton)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        grads = [
            torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
            for logits, model in zip(outputs, (eager, triton))
        ]
        for a, b in zip(*grads):
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    first = triton(ids[:, :7], use_cache=True)
    rest = triton(ids[:, 7:], past_key_values=first.past_key_values)
    whole = eager(ids).logits
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-5)
