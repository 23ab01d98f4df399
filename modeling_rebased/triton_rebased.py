# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""The Triton backend of ReBased attention: forward, backward and one-token decoding, linear in the sequence length.

    s_ij = scale * q_i . k_j,   w_ij = c0 + c1 s_ij + c2 s_ij**2  (j <= i),   o_i = sum_j w_ij v_j / (sum_j w_ij + eps)

How it works (docs/kernels.md has the costs):

* The sequence is cut into segments of L tokens. Inside a segment the kernels build w tile by tile, as FlashAttention
  does, without a softmax. Across segments they use the state S = sum_j phi(k_j) [v_j, 1], where phi(x) are the
  products x_a x_b.
* With u = w / g monic in s (g = c2 scale**2), o = sum u v / (sum u + eps / g). Constants leave the inner loops.

Each file has one subject. From the ground up:

    triton_language_rebased     Triton itself, or what stands in for it
    triton_tiles_rebased        where a block of tokens lies, loads and stores, arithmetic of a tile
    triton_features_rebased     features, and their products with a state
    triton_layout_rebased       the layout of a state, and the way to and from the public one
    triton_plan_rebased         segments, runs and tile sizes
    triton_launch_rebased       prepared calls, and launches with arguments bound by name
    triton_inputs_rebased       the caller's tensors in the form that kernels read
    triton_segments_rebased     how tokens are cut, and where states are stored
    triton_decay_rebased        what is left of older tokens, and the gradient of their decay
    triton_states_rebased       kernels that sum states
    triton_forward_rebased      the forward pass
    triton_backward_rebased     the backward pass
    triton_decode_rebased       one token
    triton_context_rebased      what a shard of a sequence gives to the other shards
    triton_conv_rebased         the short convolution between the layers of attention
    triton_rebased              the operators and the public functions
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .configuration_rebased import MAX_FEATURE_DIM, MAX_HEAD_DIM
from .eager_rebased import degree_factors, is_plain
from .triton_backward_rebased import backward_fake, backward_pass
from .triton_context_rebased import (
    shard_dkdv_fake,
    shard_dkdv_pass,
    shard_dq_fake,
    shard_dq_pass,
    state_fake,
    state_gradient_fake,
    state_gradient_pass,
    state_pass,
)
from .triton_conv_rebased import conv_backward, conv_backward_fake, conv_fake, conv_forward
from .triton_decode_rebased import decode_fake, decode_token
from .triton_forward_rebased import forward_fake, forward_pass
from .triton_inputs_rebased import needs_range, range_backward_fake, range_backward_pass, range_fake, range_pass
from .triton_language_rebased import HAS_TRITON, INTERPRETED
from .triton_launch_rebased import compiles_backward, compiling_only, count_variants, on_gpu_of


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, mask, cu_seqlens, initial, c0, c1, c2, scale, _, last, ranges, log_decay = inputs
    o, final, inverse_z, states, norms = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inverse_z, states, norms)
    # The final state matters to the gradient of the decay alone.
    kept_final = final if last and log_decay is not None else None
    ctx.save_for_backward(q, k, v, mask, cu_seqlens, o, inverse_z, states, norms, ranges, log_decay, kept_final)
    ctx.coefficients = (c0, c1, c2, scale)
    ctx.has_initial = initial is not None
    ctx.has_last = last
    ctx.grad_initial = ctx.has_initial and ctx.needs_input_grad[5]
    ctx.initial_dtype = initial.dtype if initial is not None else None


def _make_autograd(backward_op):
    def autograd(ctx, grad, grad_final, *_):
        q, k, v, mask, cu_seqlens, o, inverse_z, states, norms, ranges, log_decay, final = ctx.saved_tensors
        if grad is None and grad_final is None:
            return (None,) * 14
        if grad is None:
            grad = torch.zeros_like(o)
        if not ctx.has_last:
            grad_final = None
        dq, dk, dv, d_initial, d_log_decay = backward_op(
            grad, grad_final, q, k, v, o, inverse_z, states, norms, mask, cu_seqlens, ctx.has_initial, ctx.has_last,
            ctx.grad_initial, *ctx.coefficients, ranges, log_decay, final,
        )  # fmt: skip
        d_initial = d_initial.to(ctx.initial_dtype) if ctx.grad_initial else None
        return dq, dk, dv, None, None, d_initial, *[None] * 7, None if log_decay is None else d_log_decay

    return autograd


def _compile_backward(ctx, inputs, output) -> None:
    """Compile the kernels of the backward pass in the background, while the model goes on with its forward pass."""
    q, k, v, mask, cu_seqlens, *_, ranges, log_decay = inputs
    o, final, inverse_z, states, norms = output
    grad_final = final if ctx.has_last else None
    with on_gpu_of(q), compiling_only():
        backward_pass(
            o, grad_final, q, k, v, o, inverse_z, states, norms, mask, cu_seqlens, ctx.has_initial, ctx.has_last,
            ctx.grad_initial, *ctx.coefficients, ranges, log_decay, final,
        )  # fmt: skip


class _Attention(torch.autograd.Function):
    """The same forward and backward pass without the dispatcher: plain eager calls save most of the host's time."""

    @staticmethod
    def forward(ctx, *inputs):
        variants = count_variants()
        output = forward_pass(*inputs)
        _setup_context(ctx, inputs, output)
        if compiles_backward(variants, inputs[0].device):
            _compile_backward(ctx, inputs, output)
        return output

    # second derivatives are an error, not silently 0
    backward = staticmethod(once_differentiable(_make_autograd(backward_pass)))


def _setup_conv_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _make_conv_autograd(backward_op):
    def autograd(ctx, grad):
        saved = ctx.saved_tensors  # activation checkpointing lets them be read once
        _, _, bias, gate, _ = saved
        dx, dweight, dbias, dgate = backward_op(grad, *saved)
        return dx, dweight, dbias if bias is not None else None, dgate if gate is not None else None, None

    return autograd


class _ShortConv(torch.autograd.Function):
    """The convolution likewise."""

    @staticmethod
    def forward(ctx, *inputs):
        variants = count_variants()
        _setup_conv_context(ctx, inputs, None)
        y = conv_forward(*inputs)
        if compiles_backward(variants, y.device):
            with on_gpu_of(y), compiling_only():
                conv_backward(y, *inputs)
        return y

    backward = staticmethod(once_differentiable(_make_conv_autograd(conv_backward)))


def _setup_range_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(output[3])


def _make_range_autograd(backward_op):
    def autograd(ctx, dq, dk, *_):
        return *backward_op(dq, dk, *ctx.saved_tensors), None, None

    return autograd


class _Range(torch.autograd.Function):
    """What brings queries and keys into range likewise."""

    @staticmethod
    def forward(ctx, *inputs):
        output = range_pass(*inputs)
        _setup_range_context(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable(_make_range_autograd(range_backward_pass)))


_COEFFICIENTS = "float c0, float c1, float c2, float scale"
_SCHEMAS = {
    "forward": "(Tensor q, Tensor k, Tensor v, Tensor? attention_mask, Tensor? cu_seqlens, Tensor? initial_state, "
    f"{_COEFFICIENTS}, float eps, bool output_final_state, Tensor? ranges=None, Tensor? log_decay=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "backward": "(Tensor grad, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor o, Tensor inverse_z, "
    "Tensor states, Tensor norms, Tensor? attention_mask, Tensor? cu_seqlens, bool has_initial, bool has_last, "
    f"bool grad_initial, {_COEFFICIENTS}, Tensor? ranges=None, Tensor? log_decay=None, Tensor? final=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "decode": "(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? attention_mask, Tensor? state_indices, "
    f"{_COEFFICIENTS}, float eps, Tensor? log_decay=None) -> Tensor",
    "conv": "(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? segment_ids) -> Tensor",
    "conv_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? segment_ids) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "range": "(Tensor q, Tensor k, Tensor? attention_mask, Tensor? state_size) -> (Tensor, Tensor, Tensor, Tensor)",
    "range_backward": "(Tensor dq, Tensor dk, Tensor factors) -> (Tensor, Tensor)",
    "state": f"(Tensor k, Tensor v, Tensor? attention_mask, {_COEFFICIENTS}) -> Tensor",
    "state_gradient": "(Tensor grad, Tensor q, Tensor o, Tensor inverse_z, int kv_heads, "
    f"{_COEFFICIENTS}, Tensor? ranges=None) -> Tensor",
    "shard_dq": "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor inverse_z, Tensor states, Tensor norms, "
    f"Tensor? attention_mask, Tensor? cu_seqlens, {_COEFFICIENTS}, Tensor? ranges=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "shard_dkdv": "(Tensor grad_final, Tensor q, Tensor k, Tensor v, Tensor scaled_grad, Tensor delta, "
    f"Tensor minus_delta, Tensor? attention_mask, Tensor? cu_seqlens, {_COEFFICIENTS}, Tensor? ranges=None) "
    "-> (Tensor, Tensor)",
}


def _register():
    """Register the operators of this very source text, once per process, and return their namespace.

    Several copies of these files live in one process: the installed package, and one for each checkpoint loaded with
    trust_remote_code, reloaded at will. The namespace is a hash of the texts of all Triton files, so equal copies
    share operators and different versions never meet. The Library is kept on the torch module, so that it outlives any
    copy.
    """
    texts = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("triton_*rebased.py")):
        texts.update(path.read_bytes())
    name = f"rebased_{texts.hexdigest()[:12]}"
    libraries = torch.library.__dict__.setdefault("_rebased_libraries", {})
    if name not in libraries:
        library = torch.library.Library(name, "FRAGMENT")
        for op, (real, fake) in {
            "forward": (forward_pass, forward_fake),
            "backward": (backward_pass, backward_fake),
            "decode": (decode_token, decode_fake),
            "conv": (conv_forward, conv_fake),
            "conv_backward": (conv_backward, conv_backward_fake),
            "range": (range_pass, range_fake),
            "range_backward": (range_backward_pass, range_backward_fake),
            "state": (state_pass, state_fake),
            "state_gradient": (state_gradient_pass, state_gradient_fake),
            "shard_dq": (shard_dq_pass, shard_dq_fake),
            "shard_dkdv": (shard_dkdv_pass, shard_dkdv_fake),
        }.items():
            library.define(op + _SCHEMAS[op], tags=torch.Tag.pt2_compliant_tag)
            library.impl(op, real, "CUDA")
            library.impl(op, real, "CPU")
            torch.library.register_fake(f"{name}::{op}", fake, lib=library)
        ops = getattr(torch.ops, name)
        for op, autograd, setup in (
            ("forward", _make_autograd(ops.backward.default), _setup_context),
            ("conv", _make_conv_autograd(ops.conv_backward.default), _setup_conv_context),
            ("range", _make_range_autograd(ops.range_backward.default), _setup_range_context),
        ):
            torch.library.register_autograd(f"{name}::{op}", autograd, setup_context=setup, lib=library)
        libraries[name] = library
    return getattr(torch.ops, name)


OPS: Any = _register() if HAS_TRITON else None


def _much_shared_memory(dtype: torch.dtype, feature_dim: int, head_dim: int, decays: bool) -> int:
    """Return the bytes of shared memory for a block of the largest kernel, 0 if all GPUs have them.

    docs/kernels.md, "Other GPUs", has the sizes that need more than the 99 KiB of some.
    """
    if dtype != torch.bfloat16:
        return 128 * 1024 if head_dim > 128 else 0
    return 112 * 1024 if (head_dim > 128 and feature_dim <= 16) or (decays and feature_dim > 64) else 0


def triton_unavailable_reason(
    device: torch.device, dtype: torch.dtype, feature_dim: int, head_dim: int, decays: bool = False
) -> str | None:
    """Why the Triton backend cannot run for such tensors, or None if it can.

    `device` is where q, k and v are, `dtype` theirs, `feature_dim` F (1 to 128) and `head_dim` D (1 to 256).
    `decays` says whether sequences come with a decay.
    """
    if not HAS_TRITON:
        return "the package triton is not installed"
    device = torch.device(device)
    if device.type == "cuda":
        if INTERPRETED:
            return None
        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(device)
            if major < 8:
                return f"it needs a GPU of compute capability 8.0 or higher, this one has {major}.{minor}"
    elif device.type == "cpu":
        if not INTERPRETED:
            return "the tensors are on the CPU (Triton kernels run there only with TRITON_INTERPRET=1, for tests)"
    else:
        return f"the tensors are on {device.type!r}, and the kernels are for GPUs"
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not one of bfloat16, float16 and float32"
    if not 1 <= feature_dim <= MAX_FEATURE_DIM:
        return f"feature_dim is {feature_dim}, and the kernels take 1 to {MAX_FEATURE_DIM}"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, and the kernels take 1 to {MAX_HEAD_DIM}"
    needed = _much_shared_memory(dtype, feature_dim, head_dim, decays)
    if needed and device.type == "cuda" and torch.version.hip is None:
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if shared < needed:
            sizes = f"feature_dim {feature_dim} and head_dim {head_dim} in {str(dtype).removeprefix('torch.')}"
            sizes += " with a decay" if decays else ""
            return f"{sizes} need {needed:,} bytes of shared memory, and this GPU has {shared:,} for a block"
    return None


def bring_into_range(
    q: Tensor,
    k: Tensor,
    coefficients: tuple[float, float, float],
    attention_mask: Tensor | None,
    initial_state: Tensor | None,
    with_factor: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Multiply the queries and the keys of each head by a power of two that keeps (q . k)**2 within float32.

    The power is 1 unless numbers are very large. Multiplying all weights and eps by the same number leaves o as it is.

    Returns:
        q, k and the initial state, multiplied; the product of both powers for every query, `ranges`, fp32 [B, H, T];
        and the factors by which the states are multiplied, fp32 [B, H_kv, n_features, 1], or None if there is no
        initial state and `with_factor` does not ask for them.
    """
    state_size = None
    if initial_state is not None:  # it holds squares of keys; a row of it belongs to a packed sequence or to the batch
        with torch.no_grad():
            squares = initial_state.abs().amax((2, 3) if initial_state.shape[0] == k.shape[0] else (0, 2, 3))
            state_size = squares.float().sqrt().expand(k.shape[0], -1).contiguous()
    inputs = (q, k, attention_mask, state_size)
    if not is_plain(*inputs):
        q, k, ranges, factors = OPS.range(*inputs)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        q, k, ranges, factors = _Range.apply(*inputs)
    else:
        q, k, ranges, factors = range_pass(*inputs)
    state_factor = None
    if with_factor or initial_state is not None:
        state_factor = degree_factors(factors[:, q.shape[2] :, None, None], coefficients, q.shape[3])
    if initial_state is not None:
        initial_state = initial_state.float() * state_factor
    return q, k, initial_state, ranges, state_factor


def triton_rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalized: bool = True,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """ReBased attention with Triton kernels; arguments are taken as checked (`rebased_attention` does that).

    Args:
        q: [B, T, H_q, F]; k: [B, T, H_kv, F]; v: [B, T, H_kv, D]: bfloat16, float16 or float32, one dtype, any strides
            (a copy is made only if the last one is not 1).
        coefficients: (c0, c1, c2) of w = c0 + c1 s + c2 s**2, s = scale * q . k.
        scale: factor of q . k, usually F**-0.5.
        eps: added to the normaliser.
        attention_mask: bool [B, T], False drops the token as a key; or None.
        cu_seqlens: int32 [N + 1], where packed sequences start and end, B = 1; or None.
        initial_state: fp32 [B or N, H_kv, n_features, D + 1], or None for zeros.
        output_final_state: also return the state after the last token.
        normalized: (q . k)**2 is far within float32's range; otherwise q and k are brought there, which takes passes
            over both.
        log_decay: fp32 [B, T, H_kv], at most 0, and 0 at padding; or None. It needs c0 = c1 = 0.

    Returns:
        o [B, T, H_q, D] in q's dtype, and the final state, fp32 like the initial one, or None. A row whose normaliser
        (with eps) is 0 is 0.

    State: sum_j phi(k_j) [v_j, 1] over the kept keys, with k as given. phi's order: x_a x_a for every a; sqrt(2) x_a
    x_b for a < b, in the order of torch.triu_indices(F, F, 1); x_a if c1 != 0; 1 if c0 != 0. No squares if c2 == 0.
    """
    c0, c1, c2 = (float(c) for c in coefficients)
    ranges = state_factor = None
    if needs_range(q, (c0, c1, c2), normalized):
        q, k, initial_state, ranges, state_factor = bring_into_range(
            q, k, (c0, c1, c2), attention_mask, initial_state, output_final_state
        )
    inputs = (q, k, v, attention_mask, cu_seqlens, initial_state)
    options = (c0, c1, c2, float(scale), float(eps), output_final_state, ranges, log_decay)
    if not is_plain(*inputs, log_decay):
        o, final, _, _, _ = OPS.forward(*inputs, *options)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, log_decay)):
        o, final, _, _, _ = _Attention.apply(*inputs, *options)
    else:
        o, final, _, _, _ = forward_pass(*inputs, *options)
    if not output_final_state:
        return o, None
    return o, final if state_factor is None else final / state_factor


def triton_rebased_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    attention_mask: Tensor | None = None,
    state_indices: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Add one token per row of a batch to `state` in place, and return o [B, 1, H_q, D]. There are no gradients.

    One kernel does it, without decisions of the host on values, so it is safe inside CUDA graphs.

    Args:
        q: [B, 1, H_q, F]; k: [B, 1, H_kv, F]; v: [B, 1, H_kv, D]: as in `triton_rebased_attention`.
        state: fp32 [B, H_kv, n_features, D + 1] of any strides, or [slots, ...] with `state_indices`. The layout is
            that of `triton_rebased_attention`.
        attention_mask: bool [B, 1]; a row that is False leaves its state as it was.
        state_indices: int32 or int64 [B], the slot of each row's state; no slot may come twice. A row whose slot is
            negative touches no state and gets 0.
        log_decay: fp32 [B, 1, H_kv], at most 0; or None. The state is multiplied by its exponential first.
    """
    c0, c1, c2 = (float(c) for c in coefficients)
    inputs = (q, k, v, state, attention_mask, state_indices)
    decode = decode_token if is_plain(*inputs, log_decay) else OPS.decode
    return decode(*inputs, c0, c1, c2, float(scale), float(eps), log_decay)


def triton_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution c of x, or c * gate + x where there is a gate; zeros stand before the first token.

    Args:
        x: [B, T, C]: bfloat16, float16 or float32, on a GPU.
        weight: [C, K]; the last tap is the token's own.
        bias: [C].
        gate: [B, T, C].
        segment_ids: int64 [B or 1, T], the number of each token's packed sequence. No tap reaches into another one.

    Returns:
        [B, T, C], in x's dtype, or in the wider of x's and gate's. Sums are in float32.
    """
    inputs = (x, weight, bias, gate, segment_ids)
    if not is_plain(*inputs):
        return OPS.conv(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _ShortConv.apply(*inputs)
    return conv_forward(*inputs)
