# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""Compute the language-modelling loss without the logits of all tokens at once.

At 32,768 tokens and a vocabulary of 50,304 the logits have 1.6 billion numbers. The plain loss stores them in half
precision, in float32, and once more as a gradient: 20 GB, which also take time to move. Here some thousand tokens at a
time go through the output layer, their loss and both gradients are computed, and their logits are overwritten.

Symbols: N tokens, C size of the hidden states, V size of the vocabulary.
"""

from typing import Any

import torch


try:
    import triton
    import triton.language as tl
except ImportError:  # no fused loss: `can_fuse_loss` says so
    triton = None

MAX_CHUNK_BYTES = 400 * 2**20  # the logits of one chunk: 4,096 tokens at a vocabulary of 50,304


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(
        logits,
        labels,
        loss,
        row_stride,
        vocab_size,
        ignore_index,
        BLOCK: tl.constexpr,
        WITH_GRADIENT: tl.constexpr,
    ):
        # One program per token. It reads the row of logits for the normaliser, in blocks of BLOCK with a running
        # maximum, and again (from the cache) to overwrite it with softmax - one_hot, the gradient.
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        label = tl.load(labels + row)
        column = tl.arange(0, BLOCK)
        if label == ignore_index:
            tl.store(loss + row, 0.0)
            if WITH_GRADIENT:
                for start in range(0, vocab_size, BLOCK):
                    zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
                    tl.store(logits + start + column, zeros, mask=start + column < vocab_size)
        else:
            largest = float("-inf")
            total = 0.0
            for start in range(0, vocab_size, BLOCK):
                x = tl.load(logits + start + column, mask=start + column < vocab_size, other=float("-inf"))
                x = x.to(tl.float32)
                larger = tl.maximum(largest, tl.max(x, 0))
                total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
                largest = larger
            normaliser = largest + tl.log(total)
            # A label outside the vocabulary makes the loss NaN, and reads no memory that is not there.
            is_valid = (label >= 0) & (label < vocab_size)
            of_label = tl.load(logits + label, mask=is_valid, other=float("nan")).to(tl.float32)
            tl.store(loss + row, normaliser - of_label)
            if WITH_GRADIENT:
                for start in range(0, vocab_size, BLOCK):
                    inside = start + column < vocab_size
                    x = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
                    gradient = tl.exp(x - normaliser) - tl.where(start + column == label, 1.0, 0.0)
                    tl.store(logits + start + column, gradient.to(logits.dtype.element_ty), mask=inside)


def can_fuse_loss(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether `linear_cross_entropy` can run: on a GPU with Triton, for a plain weight in floating point."""
    return triton is not None and hidden_states.is_cuda and type(weight) in (torch.Tensor, torch.nn.Parameter)


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute the sum of the losses and its gradients together, and scale the gradients in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int
    ) -> torch.Tensor:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        ctx.dtypes = hidden_states.dtype, weight.dtype
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        (tokens, _), vocab_size = hidden_states.shape, weight.shape[0]
        with_gradient = any(ctx.needs_input_grad[:2])
        losses = torch.empty(tokens, dtype=torch.float32, device=weight.device)
        hidden_gradients = []
        weight_gradient = None
        chunk = max(1, MAX_CHUNK_BYTES // (vocab_size * weight.element_size()))
        if chunk > 128:
            chunk -= chunk % 128  # whole tiles of the matrix products
        with torch.autocast(device, enabled=False):
            for start in range(0, tokens, chunk):
                x, of_chunk = hidden_states[start : start + chunk], slice(start, start + chunk)
                logits = x @ weight.T
                _cross_entropy_kernel[(x.shape[0],)](
                    logits,
                    labels[of_chunk],
                    losses[of_chunk],
                    logits.stride(0),
                    vocab_size,
                    ignore_index,
                    BLOCK=min(8192, triton.next_power_of_2(vocab_size)),
                    WITH_GRADIENT=with_gradient,
                    num_warps=16,
                )
                if with_gradient:  # the kernel has overwritten the logits with their gradient
                    hidden_gradients.append(logits @ weight)
                    weight_gradient = _add_product(weight_gradient, logits.T, x)
        if with_gradient:
            ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        hidden_gradient = (hidden_gradient * gradient).to(hidden_dtype) if ctx.needs_input_grad[0] else None
        weight_gradient = (weight_gradient * gradient).to(weight_dtype) if ctx.needs_input_grad[1] else None
        return hidden_gradient, weight_gradient, None, None


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return total + a @ b in float32."""
    if not a.is_cuda or a.dtype == torch.float32:
        product = (a @ b).float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    if torch.compiler.is_compiling():  # it cannot trace `out`
        return total + torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Return the cross entropy of `hidden_states @ weight.T` against `labels`, a float32 scalar.

    It is what `transformers.loss.loss_utils.ForCausalLMLoss` computes from the logits, with less memory. The largest
    temporary tensor has 400 MiB. Half precision rounds the logits as an output layer in half precision does.

    Args:
        hidden_states (`torch.Tensor`): [N, C], floating point. Under autocast the products run in autocast's dtype.
        weight (`torch.Tensor`): [V, C].
        labels (`torch.Tensor`): int64 [N], already shifted: the token after each token.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): The sum of the losses is divided by this number. By
            default it is divided by the number of labels that are not ignored.
        ignore_index (`int`, *optional*, defaults to -100): Label of a token that does not count.
    """
    total = _LinearCrossEntropy.apply(hidden_states, weight, labels, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def fused_causal_lm_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return what `ForCausalLMLoss` gives for the logits `hidden_states @ weight.T`, a float32 scalar.

    Args:
        hidden_states (`torch.Tensor`): [B, T, C], floating point.
        weight (`torch.Tensor`): [V, C].
        labels (`torch.Tensor`): int64 [B, T], the tokens themselves: the loss shifts them.
        shift_labels (`torch.Tensor`, *optional*): int64 [B, T], the token after each token, instead of `labels`.
        num_items_in_batch, ignore_index: as in `linear_cross_entropy`.
        kwargs: other arguments of `ForCausalLMLoss`, which it does not use either.
    """
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    return linear_cross_entropy(
        hidden_states.flatten(0, 1),
        weight,
        shift_labels.reshape(-1).to(hidden_states.device),
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
    )
