# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Triton kernels against float64, through Triton's interpreter on the CPU or on a GPU where there is one."""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import shutil
import sys
import threading
import time
import types
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch._inductor.utils import run_and_get_code
from torch._prims_common import check_significant_strides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from modeling_rebased import (
    ReBasedConfig,
    ReBasedForCausalLM,
    modeling_rebased,
    triton_inputs_rebased,
    triton_launch_rebased,
    triton_plan_rebased,
    triton_rebased,
    triton_segments_rebased,
)
from modeling_rebased.attention_rebased import rebased_attention, rebased_attention_decode
from modeling_rebased.configuration_rebased import n_features
from modeling_rebased.eager_rebased import naive_rebased_attention
from modeling_rebased.eval.compare_kernels import load_backend
from modeling_rebased.triton_language_rebased import tl


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = triton_rebased.triton_unavailable_reason(torch.device(DEVICE), torch.float32, 16, 64)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the Triton backend cannot run here: {REASON}")

REBASED, BASED = (0.0, 0.0, 1.0), (1.0, 1.0, 0.5)
# allowed errors of results and of gradients, relative to the norm of the float64 result
BARS = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (5e-3, 1e-2)}


def oracle(q, k, v, coefficients, scale, eps, mask=None, cu=None, initial=None):
    """The definition, quadratic in T and in float64; returns o and the state after the last token of each sequence."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    if cu is not None:
        parts = [
            oracle(
                *(x[:, a:b] for x in (q, k, v)), coefficients, scale, eps,
                None if mask is None else mask[:, a:b], None, None if initial is None else initial[n : n + 1],
            )
            for n, (a, b) in enumerate(itertools.pairwise(cu.tolist()))
        ]  # fmt: skip
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts], 0)
    length, width, dim = q.shape[1], k.shape[3], v.shape[3]
    c0, c1, c2 = coefficients
    keep = torch.ones(q.shape[0], length, dtype=torch.bool, device=q.device) if mask is None else mask
    k, v = k * keep[:, :, None, None], v * keep[:, :, None, None]
    kq, vq = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihf,bjhf->bhij", q, kq) * scale
    w = (c0 + c1 * s + c2 * s * s).tril() * keep[:, None, None, :]
    ones = torch.cat([vq, torch.ones_like(vq[..., :1])], -1)
    sums = torch.einsum("bhij,bjhd->bihd", w, ones)

    def features(x):
        a, b = torch.triu_indices(width, width, 1, device=x.device)
        parts = [x * x, math.sqrt(2) * x[..., a] * x[..., b]] if c2 else []
        parts += [x] if c1 else []
        parts += [torch.ones_like(x[..., :1])] if c0 else []
        return torch.cat(parts, -1)

    kept_ones = keep.double()[:, :, None, None].expand(*v.shape[:3], 1)
    state = torch.einsum("bthn,bthd->bhnd", features(k), torch.cat([v, kept_ones], -1))
    if c0:  # a dropped key has the feature 1 too, and 0 values
        assert state.shape[-1] == dim + 1
    if initial is not None:
        initial = initial.double()
        quad, lin = width * (width + 1) // 2 * bool(c2), width * bool(c1)
        weights = torch.tensor([c2 * scale**2] * quad + [c1 * scale] * lin + [c0] * bool(c0), dtype=torch.float64)
        phi = features(q) * weights.to(q.device)
        sums = sums + torch.einsum("bthn,bhnd->bthd", phi, initial.repeat_interleave(group, 1))
        state = state + initial
    total = sums[..., dim:] + eps
    return torch.where(total == 0, 0.0, sums[..., :dim] / total), state


def relative(x, reference):
    assert x.shape == reference.shape
    return ((x.double() - reference).norm() / reference.norm().clamp(min=1e-12)).item()


def make(batch, length, heads, kv_heads, width, dim, dtype=torch.float32):
    """q, k, v, drawn on the CPU so that every device tests the same numbers."""
    torch.manual_seed(0)
    shapes = (batch, length, heads, width), (batch, length, kv_heads, width), (batch, length, kv_heads, dim)
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


def check(q, k, v, coefficients=REBASED, eps=1e-12, mask=None, cu=None, initial=None, final=True, **options):
    """Forward and backward of the kernels against autograd through the oracle."""
    bar, gradient_bar = BARS[q.dtype]
    scale = q.shape[-1] ** -0.5
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v) + ((initial,) if initial is not None else ())]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    o, state = triton_rebased.triton_rebased_attention(
        *leaves[:3], coefficients=coefficients, scale=scale, eps=eps, attention_mask=mask, cu_seqlens=cu,
        initial_state=leaves[3] if initial is not None else None, output_final_state=final, **options,
    )  # fmt: skip
    o_ref, state_ref = oracle(
        *exact[:3], coefficients, scale, eps, mask, cu, exact[3] if initial is not None else None
    )
    assert o.dtype == q.dtype
    assert o.isfinite().all()
    assert relative(o, o_ref) < bar
    grad = torch.randn_like(o_ref)
    loss, loss_ref = (o.double() * grad).sum(), (o_ref * grad).sum()
    if final:
        assert state.dtype == torch.float32
        assert relative(state, state_ref) < bar
        grad_state = torch.randn_like(state_ref) * 0.1
        loss, loss_ref = loss + (state.double() * grad_state).sum(), loss_ref + (state_ref * grad_state).sum()
    grads = torch.autograd.grad(loss, leaves)
    grads_ref = torch.autograd.grad(loss_ref, exact)
    for name, x, reference in zip("qkvs", grads, grads_ref):
        assert x.isfinite().all(), name
        assert relative(x, reference) < gradient_bar, f"d{name}: {relative(x, reference)}"


SHAPES = [
    # batch, length, heads, kv_heads, F, D
    (2, 1, 1, 1, 1, 1),
    (1, 37, 2, 2, 5, 10),
    (1, 100, 2, 1, 16, 21),
    (1, 130, 1, 1, 8, 42),
    (1, 129, 1, 1, 20, 5),
    (1, 70, 1, 1, 33, 70),
    (1, 66, 1, 1, 5, 256),
]


@pytest.mark.parametrize("coefficients", [REBASED, BASED, (0.0, 2.0, 0.0), (0.5, 0.0, 1.0)])
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_coefficients(shape, coefficients):
    q, k, v = make(*shape)
    eps = 1e-6
    if coefficients == (0.0, 2.0, 0.0):  # signed weights may cancel: keep the normaliser away from 0
        q, k = q.abs(), k.abs()
    check(q, k, v, coefficients, eps)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    # no final state: the path that training takes
    check(*make(*shape), final=False, eps=1e-2)


@pytest.mark.parametrize("narrow", [0, 16])
@pytest.mark.parametrize("width", [8, 20])
def test_segments_of_many_tiles(width, narrow, monkeypatch):
    """As on a GPU, where a segment has more than two tiles, square ones or narrow ones."""
    rows = (32, 4, 1)
    plan = triton_plan_rebased.Plan(256, *[rows] * 6, narrow=narrow)
    monkeypatch.setattr(triton_plan_rebased, "choose_plan", lambda *args: plan)
    monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})  # plans of earlier calls
    check(*make(1, 150, 2, 1, width, 20), final=False, eps=1e-2)


@pytest.fixture
def small_plan(monkeypatch):
    """Sets tile sizes, which nothing that was called before has used."""

    def set_plan(**changes):
        plan = triton_plan_rebased.Plan(32, *[(32, 4, 1)] * 6, narrow=16)._replace(**changes)
        monkeypatch.setattr(triton_plan_rebased, "choose_plan", lambda *args: plan)
        monkeypatch.setattr(triton_plan_rebased, "count_multiprocessors", lambda device: 1)
        monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})

    return set_plan


@pytest.mark.parametrize(
    ("length", "heads", "runs", "state"),
    [(257, 2, (2, 4), True), (257, 2, (8, 2), False), (520, 1, (2, 4), False), (520, 1, (8, 2), True)],
)
def test_runs_of_segments(length, heads, runs, state, small_plan):
    """States summed over several segments by one program: whole runs, one that is cut off, and one that is missing."""
    small_plan(runs=runs)
    q, k, v = make(1, length, heads, 1, 9, 6)
    mask = torch.rand(1, length, device=DEVICE) > 0.2
    initial = None
    if state:
        initial = torch.rand(1, 1, 45, 7, device=DEVICE)
        initial[:, :, :9] += 4  # squares, which keep normalisers away from 0
    prepared = triton_launch_rebased.prepare("forward", (q, k, v), (*REBASED, 1 / 3))
    for reverse in (False, True):
        cut = triton_segments_rebased.cut_into_segments(prepared, q, 1, state, state, None, reverse)
        # no longer than leaves two programs a multiprocessor
        assert cut.run == max(run for run in (1, 2, 4, 8) if run <= runs[reverse] and 2 * run <= cut.computed)
    check(q, k, v, eps=1e-2, mask=mask, initial=initial, final=state)


def test_packed_runs(small_plan):
    small_plan(runs=(4, 2))
    cu = torch.tensor([0, 3, 3, 170, 234, 244], dtype=torch.int32, device=DEVICE)
    q, k, v = make(1, 244, 1, 1, 7, 6)
    initial = torch.rand(5, 1, 28, 7, device=DEVICE)
    initial[:, :, :7] += 4
    check(q, k, v, eps=1e-4, cu=cu, initial=initial)
    check(q, k, v, eps=1e-2, cu=cu, final=False)


@pytest.mark.parametrize(("length", "state"), [(33, True), (90, False), (97, False), (97, True)])
def test_short_sequences_are_one_segment(length, state, small_plan):
    small_plan(alone=96)
    q, k, v = make(2, length, 1, 1, 9, 6)
    prepared = triton_launch_rebased.prepare("forward", (q, k, v, None, None, None), (*REBASED, 1 / 3))
    assert prepared.segment == (96 if length <= 96 else 32)
    initial = torch.rand(2, 1, 45, 7, device=DEVICE) + 4 if state else None
    check(q, k, v, eps=1e-2, initial=initial, final=state)
    operator = triton_rebased.OPS.forward.default  # its fake implementation knows no lengths, see `count_slots`
    arguments = (q, k, v, None, None, initial, *REBASED, 1 / 3, 1e-2, state)
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_more_batch_rows_than_an_axis_has(monkeypatch):
    monkeypatch.setattr(triton_launch_rebased, "_MOST_PROGRAMS", 2)
    monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})
    check(*make(5, 40, 1, 1, 8, 6), eps=1e-2)
    check(*make(3, 40, 1, 1, 20, 6), BASED, eps=1e-2)


def test_one_loop_over_tiles(small_plan):
    small_plan(flat=True)
    check(*make(1, 70, 2, 1, 20, 6), eps=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("final", [False, True])
def test_half_precision(dtype, final):
    q, k, v = make(1, 150, 2, 1, 16, 32)
    # normalised as the model has them: where a row's weights are all close to 0 its gradient is ill-conditioned
    q, k = (torch.nn.functional.layer_norm(x, (16,)) for x in (q, k))
    check(*(x.to(dtype) for x in (q, k, v)), final=final, eps=1e-2)


def check_short_documents(width, dim, tokens, documents, heads, dtype, seed, bars, decays=False):
    """Compare packed documents of so many tokens, whose queries have few keys, with each of them alone in float64."""
    generator = torch.Generator().manual_seed(seed)
    length = tokens * documents
    shapes = [(1, length, heads, width), (1, length, 1, width), (1, length, 1, dim), (1, length, heads, dim)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    leaves = [q, k, v] + [-torch.rand(1, length, 1, generator=generator).to(DEVICE)] * decays
    leaves = [x.requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    o, _ = triton_rebased.triton_rebased_attention(
        *leaves[:3], coefficients=REBASED, scale=width**-0.5, eps=1e-12, log_decay=leaves[3] if decays else None,
        cu_seqlens=torch.arange(0, length + 1, tokens, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    parts = [x.unflatten(1, (documents, tokens))[0] for x in exact]
    o_ref = naive_rebased_attention(*parts[:3], eps=1e-12, log_decay=parts[3] if decays else None).flatten(0, 1)[None]
    assert relative(o, o_ref) < bars[0]
    grads, grads_ref = torch.autograd.grad(o, leaves, grad), torch.autograd.grad(o_ref, exact, grad.double())
    for name, x, reference in zip("qkvg", grads, grads_ref):
        assert relative(x, reference) < bars[1], f"d{name}: {relative(x, reference)}"


@pytest.mark.skipif(not triton_rebased.INTERPRETED, reason="float16 is computed in float32 on a GPU")
@pytest.mark.parametrize(("width", "decays"), [(4, False), (20, False), (4, True)])
def test_roundings_of_queries_with_few_keys(width, decays, monkeypatch):
    """What cancels in a gradient comes from the same rounded numbers: docs/kernels.md, "Queries with few keys".

    The interpreter cannot multiply bfloat16 numbers, so here the kernels round to float16 where a GPU has bfloat16.
    """
    for name in ("forward", "backward", "states"):
        module = sys.modules[f"modeling_rebased.triton_{name}_rebased"]
        monkeypatch.setattr(module, "compute_type", lambda dtype: tl.float16)
        if name != "states":
            monkeypatch.setattr(module, "computes_in_float32", lambda dtype: False)
    monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})
    check_short_documents(width, 8, 3, 20, 1, torch.float16, 6, BARS[torch.float16], decays)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("width", "dim", "tokens", "documents", "decays"),
    [
        (16, 64, 10, 200, False),
        (16, 64, 30, 77, False),
        (64, 64, 30, 77, False),
        (16, 128, 30, 77, False),
        (128, 128, 30, 77, False),
        (16, 64, 30, 77, True),
    ],
)
def test_queries_with_few_keys(width, dim, tokens, documents, decays, seed):
    """Gradients of the first tokens of documents in bfloat16, which were up to 37% off."""
    check_short_documents(width, dim, tokens, documents, 2, torch.bfloat16, seed, BARS[torch.bfloat16], decays)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 256, 2, 2, 4, 32), (2, 256, 2, 2, 12, 32), (3, 700, 2, 2, 4, 16)])
def test_small_heads_several_times(shape, dtype):
    """The first call compiles, and later ones take a shorter way to the same kernels."""
    q, k, v = make(*shape, dtype=dtype)
    q, k = (torch.nn.functional.layer_norm(x.float(), x.shape[-1:]).to(dtype) for x in (q, k))
    with torch.no_grad():
        triton_rebased.triton_rebased_attention(q, k, v, coefficients=REBASED, scale=0.5, eps=1e-2)
    for _ in range(3):
        check(q, k, v, final=False, eps=1e-2)
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("coefficients", [REBASED, BASED])
@pytest.mark.parametrize("shape", [(1, 2301, 4, 2, 16, 64), (1, 2301, 2, 2, 24, 48), (1, 5000, 2, 1, 64, 64)])
@pytest.mark.parametrize("multiprocessors", [None, 1])
def test_segments_of_real_length(shape, coefficients, multiprocessors, monkeypatch):
    """In bfloat16, with tile sizes and segments as GPUs have them: what the interpreter is too slow for.

    On a GPU of one multiprocessor, runs of segments are as long as they are for large inputs.
    """
    if multiprocessors is not None:
        monkeypatch.setattr(triton_plan_rebased, "count_multiprocessors", lambda device: multiprocessors)
        monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})
    q, k, v = make(*shape, dtype=torch.bfloat16)
    q, k = (torch.nn.functional.layer_norm(x.float(), x.shape[-1:]).bfloat16() for x in (q, k))
    grad = torch.randn(*q.shape[:3], shape[-1], device=DEVICE, dtype=torch.bfloat16)
    grad[:, :64] = 0  # few keys: where their weights are near 0, o rounded to bfloat16 spoils the gradient
    scale = shape[4] ** -0.5
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, _ = triton_rebased.triton_rebased_attention(*leaves, coefficients=coefficients, scale=scale, eps=1e-12)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    o_ref, _ = oracle(*exact, coefficients, scale, 1e-12)
    assert relative(o, o_ref) < 5e-3
    grads, grads_ref = torch.autograd.grad(o, leaves, grad), torch.autograd.grad(o_ref, exact, grad.double())
    for name, x, reference in zip("qkv", grads, grads_ref):
        assert relative(x, reference) < 1e-2, f"d{name}: {relative(x, reference)}"


@pytest.mark.parametrize("coefficients", [REBASED, BASED])
def test_mask_and_initial_state(coefficients):
    q, k, v = make(2, 80, 1, 1, 6, 9)
    mask = torch.rand(2, 80, device=DEVICE) > 0.3
    mask[0, :70] = False
    mask[1, 75:] = False
    check(q[:1], k[:1], v[:1], coefficients, 1e-4, mask[:1])
    rows = n_features(6, coefficients)
    initial = torch.rand(2, 1, rows, 10, device=DEVICE)
    initial[:, :, :6] += 4  # squares outweigh the cross terms: a normaliser as real keys would make it
    check(q, k, v, coefficients, 1e-4, mask, initial=initial)
    check(q[:, :20], k[:, :20], v[:, :20], coefficients, 1e-4, mask[:, :20], initial=initial)


def test_dropped_keys_do_not_count_whatever_they_hold():
    q, k, v = make(1, 100, 1, 1, 8, 8)
    mask = torch.ones(1, 100, dtype=torch.bool, device=DEVICE)
    mask[:, 10:80] = False
    arguments = {
        "coefficients": REBASED,
        "scale": 1.0,
        "eps": 1e-6,
        "attention_mask": mask,
        "output_final_state": True,
    }
    o, state = triton_rebased.triton_rebased_attention(q, k, v, **arguments)
    k[:, 10:80], v[:, 10:80] = float("nan"), float("inf")
    o2, state2 = triton_rebased.triton_rebased_attention(q, k, v, **arguments)
    assert torch.equal(o, o2) and torch.equal(state, state2)


@pytest.mark.parametrize("with_state", [False, True])
def test_packed(with_state):
    cu = torch.tensor([0, 3, 3, 70, 198, 199], dtype=torch.int32, device=DEVICE)
    q, k, v = make(1, 199, 2, 1, 7, 6)
    mask = torch.rand(1, 199, device=DEVICE) > 0.2
    initial = None
    if with_state:
        initial = torch.rand(5, 1, 28, 7, device=DEVICE)
        initial[:, :, :7] += 4
    check(q, k, v, eps=1e-4, cu=cu, mask=mask, initial=initial, final=with_state)


def test_packed_equals_separate_bit_for_bit():
    q, k, v = make(1, 150, 1, 1, 8, 8)
    arguments = {"coefficients": REBASED, "scale": 1.0, "eps": 1e-6}
    cu = torch.tensor([0, 64, 150], dtype=torch.int32, device=DEVICE)
    packed, _ = triton_rebased.triton_rebased_attention(q, k, v, cu_seqlens=cu, **arguments)
    for a, b in ((0, 64), (64, 150)):
        alone, _ = triton_rebased.triton_rebased_attention(q[:, a:b], k[:, a:b], v[:, a:b], **arguments)
        assert torch.equal(packed[:, a:b], alone)


def test_strides():
    """Heads-first storage, and slices of one fused projection, give the bits of contiguous tensors."""
    fused = torch.randn(2, 80, 2 * (8 + 8 + 12), device=DEVICE)
    q, k, v = (x.unflatten(-1, (2, -1)) for x in fused.split([16, 16, 24], -1))
    assert not v.is_contiguous()
    arguments = {"coefficients": REBASED, "scale": 1.0, "eps": 1e-6}
    o, _ = triton_rebased.triton_rebased_attention(q, k, v, **arguments)
    dense, _ = triton_rebased.triton_rebased_attention(*(x.contiguous() for x in (q, k, v)), **arguments)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    swapped, _ = triton_rebased.triton_rebased_attention(*heads_first, **arguments)
    assert torch.equal(o, dense) and torch.equal(o, swapped)


def test_expanded_gradient():
    q, k, v = (x.requires_grad_() for x in make(1, 70, 1, 1, 8, 8))
    o, _ = triton_rebased.triton_rebased_attention(q, k, v, coefficients=REBASED, scale=1.0, eps=1e-6)
    first = torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_pieces_equal_the_whole():
    q, k, v = make(1, 160, 1, 1, 9, 7)
    arguments = {"coefficients": BASED, "scale": 1 / 3, "eps": 1e-6, "output_final_state": True}
    whole, last = triton_rebased.triton_rebased_attention(q, k, v, **arguments)
    state, pieces = None, []
    for a, b in ((0, 1), (1, 90), (90, 160)):
        o, state = triton_rebased.triton_rebased_attention(
            q[:, a:b], k[:, a:b], v[:, a:b], initial_state=state, **arguments
        )
        pieces.append(o)
    assert relative(torch.cat(pieces, 1), whole.double()) < 1e-5
    assert relative(state, last.double()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_million_tokens_in_pieces_do_not_drift(dtype):
    """Four pieces of 250,000 tokens against the PyTorch backend in float64: every output, and the last state."""
    from modeling_rebased import rebased_attention

    length, piece = 1_000_000, 250_000
    q, k, v = make(1, length, 2, 1, 16, 64)
    q, k = (torch.nn.functional.layer_norm(x, (16,)) for x in (q, k))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    state = exact = None
    for start in range(0, length, piece):
        part = [x[:, start : start + piece] for x in (q, k, v)]
        o, state = rebased_attention(*part, initial_state=state, output_final_state=True, backend="triton")
        o_ref, exact = rebased_attention(
            *(x.double() for x in part), initial_state=exact, output_final_state=True, backend="eager"
        )
        assert relative(o, o_ref) < BARS[dtype][0], f"the piece from {start} on: {relative(o, o_ref)}"
        assert relative(state, exact.double()) < BARS[dtype][0], f"state {start}: {relative(state, exact.double())}"


@pytest.mark.parametrize(
    "heads, kv_heads, width, dim, coefficients",
    [(2, 2, 16, 20, REBASED), (4, 1, 5, 7, BASED), (3, 1, 1, 1, REBASED), (2, 1, 4, 4, (1.0, 1.0, 0.0))],
)
def test_decode(heads, kv_heads, width, dim, coefficients):
    """Token by token from an empty state gives what the whole sequence gives; masked rows keep their state."""
    batch, length = 2, 6
    q, k, v = make(batch, length, heads, kv_heads, width, dim)
    if coefficients == (1.0, 1.0, 0.0):
        q, k = q.abs(), k.abs()
    mask = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    mask[0, 0] = mask[1, 3] = False
    arguments = {"coefficients": coefficients, "scale": width**-0.5, "eps": 1e-6}
    reference, last = oracle(q, k, v, coefficients, width**-0.5, 1e-6, mask)
    rows = n_features(width, coefficients)
    # a state whose last dims are not where a dense tensor has them
    state = torch.zeros(batch, dim + 1, kv_heads, rows, device=DEVICE).permute(0, 2, 3, 1)
    for t in range(length):
        step = slice(t, t + 1)
        before = state.clone()
        o = triton_rebased.triton_rebased_decode(
            q[:, step], k[:, step], v[:, step], state, attention_mask=mask[:, step], **arguments
        )
        assert relative(o, reference[:, step]) < 2e-5
        for b in range(batch):
            if not mask[b, t]:
                assert torch.equal(state[b], before[b])
    assert relative(state, last) < 2e-5


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "heads, kv_heads, width, dim, coefficients", [(2, 2, 16, 20, REBASED), (6, 2, 5, 7, BASED), (1, 1, 3, 1, REBASED)]
)
def test_decode_by_slot(heads, kv_heads, width, dim, coefficients, dtype, backend):
    """States are read and written where they lie; other slots, and rows without one, stay as they were."""
    batch, slots = 4, 6
    rows = n_features(width, coefficients)
    # as a server cuts its memory: rows of slots that are not dense, with states of some keys in them
    pool = torch.full((slots, kv_heads * rows * (dim + 1) + 8), 7.0, device=DEVICE)
    state = pool[:, : kv_heads * rows * (dim + 1)].unflatten(1, (kv_heads, rows, dim + 1))
    q, k, v = make(slots, 21, heads, kv_heads, width, dim)
    _, filled = oracle(q[:, :20], k[:, :20], v[:, :20], coefficients, 0.5, 1e-6)
    state.copy_(filled)
    indices = torch.tensor([4, -1, 0, 2], dtype=dtype, device=DEVICE)
    mask = torch.tensor([[True], [True], [False], [True]], device=DEVICE)
    used = indices.clamp(min=0).long()
    token = [x[used, 20:].clone() for x in (q, k, v)]
    for x in token:
        x[1] = math.nan  # what a padding row holds is nobody's business
    whole = torch.ones(slots, 21, dtype=torch.bool, device=DEVICE)
    whole[0, 20] = False
    reference, after = oracle(q, k, v, coefficients, 0.5, 1e-6, whole)
    before = pool.clone()
    o = rebased_attention_decode(
        *token, state, coefficients=coefficients, scale=0.5, eps=1e-6, attention_mask=mask, state_indices=indices,
        backend=backend,
    )  # fmt: skip
    assert o.shape == (batch, 1, heads, dim)
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    for row, slot in ((0, 4), (2, 0), (3, 2)):
        assert relative(o[row], reference[slot, 20:]) < 2e-5
        assert relative(state[slot], after[slot]) < 2e-5
    for slot in (0, 1, 3, 5):  # 0 is of a masked row, the others are of none
        assert torch.equal(pool[slot], before[slot])
    assert torch.equal(pool[:, -8:], before[:, -8:])


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_decode_of_padding_alone(backend):
    state = torch.rand(3, 1, 10, 4, device=DEVICE)
    before = state.clone()
    indices = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    o = rebased_attention_decode(*make(2, 1, 2, 1, 4, 3), state, state_indices=indices, backend=backend)
    assert torch.equal(o, torch.zeros_like(o)) and torch.equal(state, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_by_slot_in_a_cuda_graph(dtype):
    """A graph that was captured once serves other slots, and other numbers of rows that are padding."""
    slots, batch = 40, 16
    q, k, v = make(batch, 1, 12, 12, 16, 64, dtype)
    state = torch.rand(slots, 12, 136, 65, device=DEVICE) + 1
    indices = torch.full((batch,), -1, dtype=torch.int32, device=DEVICE)

    def step():
        return rebased_attention_decode(q, k, v, state, state_indices=indices)

    step()  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    for rows in (16, 5, 0):
        chosen = torch.randperm(slots, device=DEVICE)[:rows].int()
        indices.fill_(-1)
        indices[:rows] = chosen
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        expected = state.clone()
        states = expected[chosen.long()]
        reference = rebased_attention_decode(*(x[:rows] for x in (q, k, v)), states) if rows else o[:0]
        expected[chosen.long()] = states
        graph.replay()
        assert torch.equal(o[:rows], reference) and torch.equal(state, expected)
        assert not o[rows:].any()


@pytest.mark.parametrize("coefficients", [REBASED, (1.0, 1.0, 0.5)])
@pytest.mark.parametrize("heads", [1, 2])
def test_decode_of_large_queries_and_keys(heads, coefficients):
    """(q.k)^2 is beyond float32, while the state of the keys is not."""
    q, k, v = make(1, 4, heads, 1, 5, 3)
    state = torch.zeros(1, 1, n_features(5, coefficients), 4, device=DEVICE)
    arguments = {"coefficients": coefficients, "scale": 0.5, "eps": 1e-12}
    steps = [slice(t, t + 1) for t in range(4)]
    o = [
        triton_rebased.triton_rebased_decode(q[:, t] * 1e15, k[:, t] * 1e12, v[:, t], state, **arguments)
        for t in steps
    ]
    # At such a size only the quadratic part counts; it does not depend on the size.
    reference, _ = oracle(q, k, v, (0.0, 0.0, coefficients[2]), 0.5, 1e-12)
    assert relative(torch.cat(o, 1), reference) < 1e-5


def test_decode_continues_a_prefill():
    q, k, v = make(1, 101, 2, 1, 16, 8)
    arguments = {"coefficients": REBASED, "scale": 0.25, "eps": 1e-6}
    reference, _ = oracle(q, k, v, REBASED, 0.25, 1e-6)
    _, state = triton_rebased.triton_rebased_attention(
        q[:, :100], k[:, :100], v[:, :100], output_final_state=True, **arguments
    )
    o = triton_rebased.triton_rebased_decode(q[:, 100:], k[:, 100:], v[:, 100:], state, **arguments)
    assert relative(o, reference[:, 100:]) < 2e-5


def test_extreme_inputs_stay_finite():
    q, k, v = make(1, 130, 1, 1, 16, 8, torch.float16)
    k = (k / k.float().norm(dim=-1, keepdim=True) * 1e4).half()
    check(q, k, v, final=False, eps=1e-2)
    # nothing to attend to: 0, not NaN; and gradients of 0
    q, k, v = (x.requires_grad_() for x in make(1, 70, 1, 1, 8, 8))
    mask = torch.zeros(1, 70, dtype=torch.bool, device=DEVICE)
    for eps in (0.0, 1e-12):
        o, _ = triton_rebased.triton_rebased_attention(
            q, k, v, coefficients=REBASED, scale=1.0, eps=eps, attention_mask=mask
        )
        assert (o == 0).all()
        assert all((x == 0).all() for x in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize(
    ("shape", "coefficients"),
    [
        *(((1, 70, 2, 1, 9, 6), c) for c in (REBASED, (0.0, 2.0, 0.0), (0.5, 0.0, 1.0))),
        ((1, 121, 2, 1, 9, 6), BASED),  # the last segment ends with a tile that is not full, after one that is
        ((1, 70, 1, 1, 20, 5), BASED),
    ],
)
def test_queries_and_keys_are_brought_into_range(shape, coefficients, monkeypatch):
    """With a narrow range, so that every part of a weight counts."""
    monkeypatch.setattr(triton_inputs_rebased, "LARGEST", 0.7)
    q, k, v = make(*shape)
    if coefficients == (0.0, 2.0, 0.0):
        q, k = q.abs(), k.abs()
    q *= 10.0 ** (torch.arange(shape[1], device=DEVICE) % 7 - 3)[:, None, None]
    k *= 8
    mask = torch.rand(shape[0], shape[1], device=DEVICE) > 0.2
    initial = torch.rand(shape[0], 1, n_features(shape[4], coefficients), shape[5] + 1, device=DEVICE)
    initial[:, :, : shape[4]] += 300
    check(q, k, v, coefficients, 1e-2, mask, initial=initial, normalized=False)


def test_range_of_heads_that_several_programs_read():
    """The power of two of a head comes from all of its kept rows, and gradients are multiplied by it too."""
    q, k, _ = make(2, 300, 4, 2, 40, 1)
    q *= 10.0 ** torch.arange(2, 10, device=DEVICE).view(2, 1, 4, 1)
    k *= 10.0 ** torch.arange(5, 9, device=DEVICE).view(2, 1, 2, 1)
    q[0, 150, 1], k[1, 299, 1], k[0, 7, 0] = 1e20, 1e15, 1e19
    mask = torch.ones(2, 300, dtype=torch.bool, device=DEVICE)
    mask[0, 7] = False
    new_q, new_k, ranges, factors = triton_inputs_rebased.range_pass(q, k, mask, None)
    kept = k * mask[:, :, None, None]
    limit = triton_inputs_rebased.LARGEST
    size = torch.cat([q.abs().amax((1, 3)) * 40, kept.abs().amax((1, 3))], 1).double()
    expected = (limit / size).log2().floor().clamp(max=0).exp2()  # [B, H + H_kv]
    assert torch.equal(factors.double(), expected)
    of_q, of_k = expected[:, None, :4, None].float(), expected[:, None, 4:, None].float()
    assert torch.equal(new_q, q * of_q) and torch.equal(new_k, k * of_k)
    assert torch.equal(ranges, (of_q * of_k.repeat_interleave(2, 2))[:, 0].expand(2, 4, 300))
    dq, dk = triton_inputs_rebased.range_backward_pass(q, k, factors)
    assert torch.equal(dq, new_q) and torch.equal(dk, new_k)


@pytest.mark.parametrize("state", [False, True])
def test_packed_queries_and_keys_are_brought_into_range(state, small_plan, monkeypatch):
    monkeypatch.setattr(triton_inputs_rebased, "LARGEST", 0.7)
    small_plan(runs=(4, 2))
    cu = torch.tensor([0, 3, 3, 100, 110], dtype=torch.int32, device=DEVICE)
    q, k, v = make(1, 110, 1, 1, 7, 6)
    initial = None
    if state:
        initial = torch.rand(4, 1, 28, 7, device=DEVICE)
        initial[:, :, :7] += 4
    check(q * 100, k * 100, v, eps=1e-2, cu=cu, initial=initial, final=state, normalized=False)


@pytest.mark.parametrize(
    ("dtype", "q_size", "k_size", "packed", "coefficients"),
    [
        (torch.float32, 1e15, 1e12, False, BASED),
        (torch.float32, 1e38, 1e15, True, REBASED),
        (torch.bfloat16, 1e18, 1e15, False, REBASED),
    ],
)
def test_large_queries_and_keys(dtype, q_size, k_size, packed, coefficients):
    """(q.k)^2 is beyond float32, and o, the state and the gradients are not."""
    q, k, v = make(1, 70, 2, 1, 9, 6)
    q, k = q / q.abs().max(), k / k.abs().max()
    q, k, v = (q * q_size).to(dtype), (k * k_size).to(dtype), v.to(dtype)
    cu = torch.tensor([0, 3, 70], dtype=torch.int32, device=DEVICE) if packed else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, state = rebased_attention(
        *leaves, coefficients=coefficients, cu_seqlens=cu, output_final_state=True, backend="triton"
    )
    exact = [x.detach().double().requires_grad_() for x in leaves]
    o_ref, state_ref = oracle(*exact, coefficients, 1 / 3, 1e-12, cu=cu)
    bar, gradient_bar = BARS[dtype]
    assert relative(o, o_ref) < bar
    assert relative(state, state_ref) < bar
    grad = torch.randn_like(o_ref)
    grads, grads_ref = torch.autograd.grad(o, leaves, grad.to(dtype)), torch.autograd.grad(o_ref, exact, grad)
    for x, reference, size in zip(grads, grads_ref, (q_size, k_size, 1.0)):
        assert relative(x.double() * size, reference * size) < gradient_bar


def test_one_large_query_and_key_leave_the_others_exact():
    q, k, v = make(1, 40, 1, 1, 8, 8)
    expected, _ = oracle(q, k, v, REBASED, 8**-0.5, 1e-12)
    q[:, -1], k[:, -1] = q[:, -1] * 1e15, k[:, -1] * 1e15
    o, _ = rebased_attention(q, k, v, backend="triton")
    assert relative(o[:, :-1], expected[:, :-1]) < 1e-5
    assert relative(o[:, -1:], oracle(q, k, v, REBASED, 8**-0.5, 1e-12)[0][:, -1:]) < 1e-5
    q[:, 20] = float("nan")
    o, _ = rebased_attention(q[:, :-1], k[:, :-1], v[:, :-1], backend="triton")
    assert relative(o[:, :20], expected[:, :20]) < 1e-5 and relative(o[:, 21:], expected[:, 21:-1]) < 1e-5


def test_an_infinite_query_leaves_large_ones_exact():
    q, k, v = make(1, 40, 1, 1, 8, 8)
    expected, _ = oracle(q, k, v, REBASED, 8**-0.5, 1e-12)
    q, k = q * 1e15, k * 1e15
    q[:, 20], q[:, 30] = float("inf"), -float("inf")
    o, _ = rebased_attention(q, k, v, backend="triton")
    rest = [x for x in range(40) if x not in (20, 30)]
    assert relative(o[:, rest], expected[:, rest]) < 1e-5


def test_inputs_of_usual_size_stay_as_they_are():
    q, k, v = make(1, 40, 2, 1, 8, 8)
    initial = torch.rand(1, 1, 36, 9, device=DEVICE)
    for state in (None, initial):
        both = [
            rebased_attention(
                q, k, v, initial_state=state, output_final_state=True, normalized=normalized, backend="triton"
            )
            for normalized in (True, False)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*both))


def test_a_state_of_large_keys_is_continued():
    q, k, v = make(1, 50, 1, 1, 8, 8)
    k[:, :40] *= 1e17
    expected, _ = oracle(q * 1e15, k, v, REBASED, 8**-0.5, 1e-12)
    options = {"output_final_state": True, "backend": "triton"}
    _, state = rebased_attention(q[:, :40], k[:, :40], v[:, :40], **options)
    o, _ = rebased_attention(q[:, 40:] * 1e15, k[:, 40:], v[:, 40:], initial_state=state, **options)
    assert relative(o, expected[:, 40:]) < 1e-5


def test_dropped_keys_do_not_bring_others_out_of_range():
    q, k, v = make(1, 40, 1, 1, 8, 8)
    mask = torch.ones(1, 40, dtype=torch.bool, device=DEVICE)
    mask[:, 10:20] = False
    expected, _ = rebased_attention(q, k, v, attention_mask=mask, backend="triton")
    k[:, 10:15], k[:, 15:20] = float("nan"), 1e38
    assert torch.equal(rebased_attention(q, k, v, attention_mask=mask, backend="triton")[0], expected)


def test_deterministic():
    q, k, v = (x.requires_grad_() for x in make(1, 100, 2, 1, 16, 8))

    def run():
        o, _ = triton_rebased.triton_rebased_attention(q, k, v, coefficients=REBASED, scale=0.25, eps=1e-6)
        return o, *torch.autograd.grad(o.square().sum(), (q, k, v))

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_operators_are_well_formed():
    """Schemas, fake implementations and autograd registrations as torch.compile and torch.export rely on them."""
    q, k, v = (x.requires_grad_() for x in make(1, 70, 2, 1, 4, 4))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if DEVICE == "cpu":  # compares every element of every output, and on a GPU the states' spare ones hold anything
        tests.append("test_aot_dispatch_static")
    op = triton_rebased.OPS.forward.default
    initial = torch.rand(1, 1, 10, 5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(op, (q, k, v, None, None, None, 0.0, 0.0, 1.0, 0.5, 1e-3, False), test_utils=tests)
    decay = -torch.rand(1, 70, 1, device=DEVICE)
    arguments = (q, k, v, None, None, initial, 0.0, 0.0, 1.0, 0.5, 1e-3, True, None, decay.requires_grad_())
    torch.library.opcheck(op, arguments, test_utils=tests)
    torch.library.opcheck(triton_rebased.OPS.range.default, (q, k, None, None), test_utils=tests)
    state = torch.rand(1, 1, 10, 5, device=DEVICE)
    one = [x[:, :1].detach() for x in (q, k, v)]
    for indices, first in ((None, None), (torch.tensor([0], device=DEVICE), decay[:, :1].detach())):
        arguments = (*one, state, None, indices, 0.0, 0.0, 1.0, 0.5, 1e-3, first)
        torch.library.opcheck(triton_rebased.OPS.decode.default, arguments, test_utils=tests)


class ComparesWithFakes(TorchDispatchMode):
    """Compares what an operator of ours returns with what its fake implementation tells torch.compile.

    The compiled code stops with an error where strides differ, on a GPU alone. `opcheck` overlooks strides on a CPU.
    """

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace.startswith("rebased_"):
            self.seen.add(func._opname)
            with FakeTensorMode() as mode:
                fakes = func(*tree_map_only(torch.Tensor, mode.from_tensor, args))
            for number, (result, fake) in enumerate(zip(tree_leaves(results), tree_leaves(fakes), strict=True)):
                told = f"{func._opname}: result {number} has strides {result.stride()}, its fake {fake.stride()}"
                assert (result.shape, result.dtype) == (fake.shape, fake.dtype), told
                assert check_significant_strides(result, fake, only_cuda=False)[0], told
        return results


@pytest.mark.parametrize(("feature_dim", "packed"), [(5, False), (5, True), (20, False)])
def test_results_are_as_compiled_code_expects(feature_dim, packed):
    """Two heads of keys, since the strides of a dimension of size 1 mean nothing."""
    batch, length = (1, 30) if packed else (2, 15)
    q, k, v = (x.requires_grad_() for x in make(batch, length, 2, 2, feature_dim, 6))
    decay = -torch.rand(batch, length, 2, device=DEVICE)
    cu = torch.tensor([0, 11, 30], dtype=torch.int32, device=DEVICE) if packed else None
    mask = torch.rand(batch, length, device=DEVICE) > 0.2
    initial = torch.rand(2, 2, n_features(feature_dim, REBASED), 7, device=DEVICE) + 1
    with ComparesWithFakes() as mode:
        for dtype, options in (
            (torch.float32, {"log_decay": decay.requires_grad_()}),
            (torch.float16, {"initial_state": initial.requires_grad_(), "attention_mask": mask}),
        ):
            o, state = rebased_attention(
                q.to(dtype),
                k.to(dtype),
                v.to(dtype),
                cu_seqlens=cu,
                output_final_state=True,
                backend="triton",
                **options,
            )
            (o.float().square().sum() + state.square().sum()).backward()
    assert {"forward", "backward", "range", "range_backward"} <= mode.seen


def test_export_with_any_length():
    """One exported graph serves sequences of one segment and of several: no guard on T's size against a segment."""

    class Mixer(torch.nn.Module):
        def forward(self, q, k, v):
            return triton_rebased.triton_rebased_attention(q, k, v, coefficients=REBASED, scale=0.5, eps=1e-6)[0]

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = tuple({1: length} for _ in range(3))
    program = torch.export.export(Mixer(), tuple(make(1, 40, 1, 1, 4, 4)), dynamic_shapes=shapes)
    for size in (3, 150):
        q, k, v = make(1, size, 1, 1, 4, 4)
        assert torch.equal(program.module()(q, k, v), Mixer()(q, k, v))


@pytest.mark.parametrize("normalized", [True, False])
def test_compiles_without_graph_breaks(normalized):
    """torch.compile(fullgraph=True) over forward and backward, and over decoding, whose state changes in place.

    One of the two cases has a decay too.
    """
    arguments = {"coefficients": REBASED, "scale": 0.5, "eps": 1e-6}
    q, k, v = (x.requires_grad_() for x in make(1, 70, 1, 1, 4, 4))
    decay = (-torch.rand(1, 70, 1, device=DEVICE)).requires_grad_()

    def loss(q, k, v, decay):
        options = {**arguments, "normalized": normalized, "log_decay": decay if normalized else None}
        return triton_rebased.triton_rebased_attention(q * 1.0, k, v, **options)[0].sum() + decay.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, traced = (torch.autograd.grad(f(q, k, v, decay), (q, k, v, decay)) for f in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(plain, traced))

    def step(q, k, v, state):
        return triton_rebased.triton_rebased_decode(q, k, v, state, **arguments) + 0.0

    state = torch.rand(1, 1, 10, 5, device=DEVICE)
    other, token = state.clone(), [x[:, :1].detach() for x in (q, k, v)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(*token, state), compiled(*token, other))
    assert torch.equal(state, other)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [None, "gate"])
def test_training_by_compiled_code_on_a_gpu(decay):
    """Inductor's code for a GPU holds each operator to the strides that its fake implementation gave."""
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "feature_dim": 8}
    model = ReBasedForCausalLM(ReBasedConfig(**sizes, num_hidden_layers=2, decay=decay)).to(DEVICE)
    ids = torch.randint(50, (2, 300), device=DEVICE)
    losses, grads = [], []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        losses.append(run(ids, labels=ids).loss)
        losses[-1].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    for eager, compiled in zip(*grads, strict=True):
        assert relative(compiled, eager.double()) < 1e-3


@pytest.mark.parametrize("by_slot", [False, True])
def test_a_compiled_step_changes_the_state_where_it_lies(by_slot):
    """No copy of the state: the operator gets the graph's own input, which CUDA graphs need at a fixed address."""
    q, k, v = make(2, 1, 2, 1, 4, 3)
    indices = torch.tensor([4, 1], device=DEVICE) if by_slot else None
    state = torch.rand(6 if by_slot else 2, 1, 10, 4, device=DEVICE)
    other = state.clone()

    def step(q, k, v, state, indices):
        # a view, as caches hand states on
        state = state.view(state.shape[0], 1, 10, 4)
        return rebased_attention_decode(q * 2.0, k, v, state, state_indices=indices, backend="triton") + 1.0

    o, (code, *_) = run_and_get_code(torch.compile(step, fullgraph=True), q, k, v, state, indices)
    assert relative(o, step(q, k, v, other, indices).double()) < 1e-6
    assert relative(state, other.double()) < 1e-6
    body = code[code.index("def call(") : code.index("return (buf", code.index("def call("))]
    assert body.count("decode.default(") == 1
    assert f"empty_strided_{DEVICE}({tuple(state.shape)}" not in body  # no memory for a second state
    assert ".copy_(" not in body and "clone" not in body


def copy_files(folder: Path) -> Path:
    """A folder with copies of the files that the backend is made of."""
    shutil.copytree(Path(triton_rebased.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_copies_of_the_files_live_together(tmp_path):
    """Reloaded copies, and ones that were edited, work beside the first, forward and backward, in any order."""
    same = copy_files(tmp_path / "same")
    q, k, v = (x.requires_grad_() for x in make(1, 70, 1, 1, 4, 4))

    def run(module):
        o, _ = module.triton_rebased_attention(q, k, v, coefficients=REBASED, scale=0.5, eps=1e-6)
        return o, *torch.autograd.grad(o.sum(), (q, k, v))

    expected = run(triton_rebased)
    copies = [load_backend(same, "copy_a")]
    assert copies[0].OPS.forward is triton_rebased.OPS.forward
    files = sorted(path.name for path in same.glob("triton_*.py"))
    assert len(files) > 10
    for number, file in enumerate(files):  # an edit of any of them is another version
        other = copy_files(tmp_path / f"other{number}")
        with (other / file).open("a") as edited:
            edited.write("\n# another version\n")
        copies.append(load_backend(other, f"copy_b{number}"))
    copies.append(load_backend(same, "copy_a"))
    assert len({str(module.OPS.forward) for module in copies}) == 1 + len(files)
    for module in (copies[1], copies[0], triton_rebased, copies[2], copies[-1]):
        assert all(torch.equal(a, b) for a, b in zip(run(module), expected))
    del copies
    for name in [name for name in sys.modules if name.startswith(("copy_a", "copy_b"))]:
        del sys.modules[name]
    assert all(torch.equal(a, b) for a, b in zip(run(triton_rebased), expected))


def test_calls_of_one_kind_share_what_is_prepared():
    """Whatever Triton compiles for tells kinds of calls apart, and a kind that comes back finds its own again."""
    q, k, v = make(2, 40, 2, 2, 16, 32)
    aligned, wide = torch.empty(2, 40, 2, 16 + 4, device=DEVICE), torch.empty(2, 40, 2, 32, device=DEVICE)
    calls = {
        "as it is": ((q, k, v), REBASED, 0.25, False),
        "another batch": ((q[:1], k[:1], v[:1]), REBASED, 0.25, False),
        "another length": ((q[:, :39], k[:, :39], v[:, :39]), REBASED, 0.25, False),
        "strides": ((wide[..., :16], k, v), REBASED, 0.25, False),
        "alignment": ((aligned[..., 1:17], k, v), REBASED, 0.25, False),
        "aligned": ((aligned[..., :16], k, v), REBASED, 0.25, False),
        "dtype": (tuple(x.bfloat16() for x in (q, k, v)), REBASED, 0.25, False),
        "coefficients": ((q, k, v), BASED, 0.25, False),
        "scale": ((q, k, v), REBASED, 0.5, False),
        "final state": ((q, k, v), REBASED, 0.25, True),
        "one more input": ((q, k, v, None), REBASED, 0.25, False),
        "mask": ((q, k, v, torch.ones(2, 40, dtype=torch.uint8, device=DEVICE)), REBASED, 0.25, False),
    }

    def find():
        return {
            name: triton_launch_rebased.prepare("forward", x, (*coefficients, scale), last)
            for name, (x, coefficients, scale, last) in calls.items()
        }

    found, again = find(), find()
    assert len({id(prepared) for prepared in found.values()}) == len(calls)
    assert all(found[name] is again[name] for name in calls)
    assert (
        triton_launch_rebased.prepare("backward", *calls["as it is"][:1], (*REBASED, 0.25), False)
        is not found["as it is"]
    )


def test_prepared_calls_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})
    monkeypatch.setattr(triton_launch_rebased, "_MOST_PREPARED", 3)
    for length in range(1, 20):
        q, k, v = (torch.empty(1, length, 1, 16, device=DEVICE) for _ in range(3))
        triton_launch_rebased.prepare("forward", (q, k, v), (*REBASED, 0.25))
        assert len(triton_launch_rebased._PREPARED) <= 3


def test_reasons():
    reason = triton_rebased.triton_unavailable_reason
    device = torch.device(DEVICE)
    assert reason(device, torch.bfloat16, 16, 64) is None
    assert "129" in reason(device, torch.bfloat16, 129, 64)
    assert "257" in reason(device, torch.bfloat16, 16, 257)
    assert "float64" in reason(device, torch.float64, 16, 64)
    assert "meta" in reason(torch.device("meta"), torch.float32, 16, 64)


def test_reasons_of_a_gpu(monkeypatch):
    """What a GPU lacks is said before a kernel fails to compile or to start."""
    reason, device = triton_rebased.triton_unavailable_reason, torch.device("cuda")
    properties = types.SimpleNamespace(shared_memory_per_block_optin=101376)
    monkeypatch.setattr(triton_rebased, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    too_much = [
        (torch.bfloat16, 16, 129, False),
        (torch.bfloat16, 65, 64, True),
        (torch.float32, 16, 129, False),
        (torch.float16, 128, 256, True),
    ]
    for needs in too_much:
        assert "need 114,688" in reason(device, *needs) or "need 131,072" in reason(device, *needs)
        assert "101,376" in reason(device, *needs)
    assert reason(device, *too_much[1]).startswith("feature_dim 65 and head_dim 64 in bfloat16 with a decay need")
    fits = [(torch.bfloat16, 16, 128, True), (torch.bfloat16, 17, 256, True), (torch.bfloat16, 128, 256, False)]
    for fitting in (*fits, (torch.float32, 128, 128, True), (torch.float16, 16, 128, False)):
        assert reason(device, *fitting) is None
    assert "head_dim is 300" in reason(device, torch.float32, 16, 300)  # which no GPU can have
    assert "dtype torch.float64" in reason(device, torch.float64, 16, 256)
    properties.shared_memory_per_block_optin = 166912  # of 8.0
    assert not any(reason(device, *needs) for needs in (*too_much, *fits))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in reason(device, torch.float32, 16, 64)


def test_bounds_of_packed_sequences_with_a_stride():
    """A column of a table: the kernels read the bounds one after another."""
    table = torch.tensor([[0, 7], [3, 7], [70, 7], [100, 7]], dtype=torch.int32, device=DEVICE)
    check(*make(1, 100, 2, 1, 5, 6), eps=1e-2, cu=table[:, 0])


def test_strides_beyond_32_bits():
    """Kernels multiply heads and the tokens of a segment by strides in 32 bits: where that overflows, it is a copy."""
    for strides in ((1, 4, 2**30, 1), (1, 2**19, 4, 1)):
        x = torch.empty_strided((1, 5, 3, 4), strides, device="meta")
        assert triton_inputs_rebased.with_unit_stride(x).is_contiguous()
    x = torch.empty_strided((1, 5, 3, 4), (2**40, 12, 2**29, 1), device="meta")
    assert triton_inputs_rebased.with_unit_stride(x) is x


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_batch_of_none(with_state, final):
    leaves = [x.requires_grad_() for x in make(0, 70, 2, 1, 4, 3)]
    leaves += [torch.zeros(0, 1, 10, 4, device=DEVICE, requires_grad=True)] * with_state
    o, state = triton_rebased.triton_rebased_attention(
        *leaves[:3], coefficients=REBASED, scale=0.5, eps=1e-6, output_final_state=final,
        initial_state=leaves[3] if with_state else None,
    )  # fmt: skip
    assert o.shape == (0, 70, 2, 3)
    assert not final or state.shape == (0, 1, 10, 4)
    grads = torch.autograd.grad(o.sum() + (state.sum() if final else 0.0), leaves)
    assert all(x.shape == leaf.shape for x, leaf in zip(grads, leaves))


def test_second_derivatives_are_an_error():
    """A penalty on a gradient must not count as 0."""
    q, k, v = (x.requires_grad_() for x in make(1, 5, 1, 1, 4, 4))
    o, _ = triton_rebased.triton_rebased_attention(q, k, v, coefficients=REBASED, scale=0.5, eps=1e-6)
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (o.sum() + grad.square().sum()).backward()


def test_scale_of_zero():
    with pytest.raises(ValueError, match="scale"):
        triton_rebased.triton_rebased_attention(*make(1, 5, 1, 1, 4, 4), coefficients=REBASED, scale=0.0, eps=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_once_for_any_length(packed):
    """dynamic=True: the same graph, whatever the batch, the lengths and their number, with states in and out."""

    def run(q, k, v, tokens, initial):
        names = {"cu_seqlens" if packed else "attention_mask": tokens}
        return triton_rebased.triton_rebased_attention(
            q, k, v, coefficients=REBASED, scale=0.5, eps=1e-3, initial_state=initial, output_final_state=True, **names
        )

    graphs = []
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for batch, bounds in ((6, (0, 8, 8, 11, 12, 13, 17)), (2, (0, 66, 67))):
        q, k, v = (x.requires_grad_() for x in make(1 if packed else batch, bounds[-1], 1, 1, 4, 3))
        initial = torch.rand(batch, 1, 10, 4, device=DEVICE)
        initial[:, :, :4] += 4
        if packed:
            tokens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        else:
            tokens = torch.rand(batch, bounds[-1], device=DEVICE) > 0.3
        arguments = q, k, v, tokens, initial.requires_grad_()
        plain, traced = run(*arguments), compiled(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(plain, traced))
        weights = [torch.randn_like(x) for x in plain]
        leaves = q, k, v, initial
        plain, traced = (torch.autograd.grad(x, leaves, weights) for x in (plain, traced))
        assert all(torch.equal(a, b) for a, b in zip(plain, traced))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]  # the second batch found the graph of the first


def test_only_the_first_call_of_a_variant_is_new(monkeypatch):
    """Lengths and batches share compiled kernels; whether there is a state does not."""
    monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})
    monkeypatch.setattr(triton_launch_rebased, "_VARIANTS", set())

    def is_new(batch, length, dim, *options):
        q, k, v = (torch.empty(batch, length, 1, size, device=DEVICE) for size in (16, 16, dim))
        return triton_launch_rebased.prepare("forward", (q, k, v), (*REBASED, 0.25), *options).is_new

    assert is_new(1, 20, 16) and is_new(1, 20, 32) and is_new(1, 20, 16, True) and is_new(1, 20000, 16)
    assert not any((is_new(2, 20, 16), is_new(1, 21, 16), is_new(1, 21, 16, True), is_new(1, 30000, 16)))


def test_kernels_are_compiled_in_threads_before_they_are_launched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(triton_launch_rebased, "INTERPRETED", False)
    events = []
    start, meet = threading.Event(), threading.Barrier(2, timeout=30)

    class Kernel:
        arg_names = ("x", "y", "SIZE")
        device_caches = collections.defaultdict(dict)
        compile = None

        def __init__(self, name):
            self.name = name

        def warmup(self, x, y, SIZE, grid, **options):
            assert threading.current_thread() is not threading.main_thread()
            start.wait(30)
            meet.wait()  # both at the same time
            events.append(f"compile {self.name}")
            return {(*grid, 1): None}

        def __getitem__(self, grid):
            def run(x, y, SIZE, **options):
                events.append(f"launch {self.name}")
                return {(*grid, 1): lambda *arguments: events.append(f"launch {self.name} again with {arguments}")}

            return run

    monkeypatch.setattr(triton_launch_rebased, "_start_once", lambda: None)
    prepared = triton_launch_rebased.Launches(("a variant",))
    kernels = {name: Kernel(name) for name in "ab"}

    def both():
        for name in kernels:
            triton_launch_rebased.launch(
                prepared, name, kernels[name], {"y": 2, "x": 1}, lambda: ((4, 2), {"SIZE": 16})
            )

    with triton_launch_rebased.compiling_only():
        both()
        both()
    assert events == []
    start.set()
    both()
    both()
    first, again = events[:4], events[4:]
    assert sorted(first) == ["compile a", "compile b", "launch a", "launch b"]
    assert all(first.index(f"compile {name}") < first.index(f"launch {name}") for name in kernels)
    assert again == ["launch a again with (1, 2, 16)", "launch b again with (1, 2, 16)"]


def test_a_kernel_that_two_passes_need_is_compiled_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(triton_launch_rebased, "_start_once", lambda: None)
    compiled, events = set(), []

    def warmup(grid, **arguments):
        found = "kernel" in compiled
        time.sleep(0.02)
        compiled.add("kernel")
        events.append("found" if found else "compiled")
        return {(*grid, 1, 1): None}

    kernel = types.SimpleNamespace(warmup=warmup, compile=None, device_caches={3: ()})
    with triton_launch_rebased.compiling_only():
        both = [triton_launch_rebased.start_compiling(kernel, (4,), {"x": 1}) for _ in range(2)]
    for future in both:
        future.result(30)
    assert events == ["compiled", "found"]


def test_what_launches_a_kernel_is_compiled_beside_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(triton_launch_rebased, "_start_once", lambda: None)
    events, meet = [], threading.Barrier(2, timeout=30)

    class Launcher:
        def __init__(self, source, metadata):
            meet.wait()  # both at the same time
            events.append(f"launcher of {source}")
            raise AttributeError("no metadata")

    class Kernel:
        def __init__(self):
            self.device_caches = collections.defaultdict(self.create_binder)  # as Triton's

        def create_binder(self):
            self.compile = lambda source, target: meet.wait()

        def warmup(self, grid, **arguments):
            self.device_caches[3]
            assert arguments["tensor"].numel() == 0  # needs no memory
            assert torch.equal(arguments["unaligned"], values[1:])
            self.compile(arguments["x"], target="a GPU")
            events.append("kernel")
            return {(*grid, 1, 1): None}

    driver = types.SimpleNamespace(active=types.SimpleNamespace(launcher_cls=Launcher))
    monkeypatch.setattr(triton_launch_rebased.triton.runtime, "driver", driver)
    kernel = Kernel()
    with triton_launch_rebased.compiling_only():
        values = torch.arange(4.0)
        tensors = {"tensor": values, "unaligned": values[1:]}
        both = [triton_launch_rebased.start_compiling(kernel, (4,), {"x": x, **tensors}) for x in "ab"]
    for future in both:
        future.result(60)
    assert events == ["launcher of a", "kernel", "launcher of b", "kernel"]


def test_triton_is_started_once_while_its_files_are_hashed(monkeypatch):
    calls, meet = [], threading.Barrier(2, timeout=30)

    def call(name):
        calls.append(name)
        meet.wait()  # both at the same time

    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_device=lambda: call("driver")))
    monkeypatch.setattr(triton_launch_rebased.triton.runtime, "driver", driver)
    monkeypatch.setattr(triton_launch_rebased.triton.runtime.cache, "triton_key", lambda: call("hash"))
    triton_launch_rebased._start_once.cache_clear()
    threads = [threading.Thread(target=triton_launch_rebased._start_triton) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == ["driver", "hash"]
    triton_launch_rebased._start_once.cache_clear()


def test_a_model_compiles_attention_before_its_first_layer(monkeypatch):
    """With just what the call launches: forward and backward in training, forward without gradients.

    On a GPU, the convolution of the first layer hands over its own kernels, when it is called.
    """
    handed, begun = [], []
    compiled = Future()
    compiled.set_result(None)

    def start_compiling(kernel, grid, arguments):
        if not kernel.fn.__name__.startswith("_conv"):
            handed.append(kernel.fn.__name__)
        return compiled

    monkeypatch.setattr(triton_launch_rebased, "start_compiling", start_compiling)
    monkeypatch.setattr(modeling_rebased, "can_compile_ahead", lambda device: True)
    config = ReBasedConfig(
        hidden_size=16, num_attention_heads=2, feature_dim=4, head_dim=8, layer_types=["conv", "linear_attention"],
        num_hidden_layers=2, vocab_size=11, kernel_backend="triton",
    )  # fmt: skip
    model = ReBasedForCausalLM(config).to(DEVICE)
    model.model.layers[0].register_forward_pre_hook(lambda *_: begun.append(list(handed)))
    ids = torch.randint(11, (1, 40), device=DEVICE)
    for training in (True, False):
        monkeypatch.setattr(triton_launch_rebased, "_PREPARED", {})
        monkeypatch.setattr(triton_launch_rebased, "_VARIANTS", set())
        for _ in range(2):  # the second call finds all
            model.train(training)
            with torch.set_grad_enabled(training):
                loss = model(ids, labels=ids).loss
            if training:
                loss.backward()
            waiting = [prepared.compiling for prepared in triton_launch_rebased._PREPARED.values()]
            assert not any(waiting)  # every kernel was launched
        assert begun[0] == begun[1] == handed  # from before the first layer on
        assert "_forward_kernel" in handed
        assert ("_dq_kernel" in handed) == ("_dkdv_kernel" in handed) == training
        handed.clear()
        begun.clear()
