"""Compute the losses of distillation."""

from typing import Any

import torch
import torch.nn.functional as F

from modeling_rebased.loss_rebased import _add_product


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return |output - expected|^2 / |expected|^2 of each example [T, hidden_size], averaged over the batch.

    The error is relative, so that layers with large and small outputs count alike. It is taken per example, so that a
    batch that is split over GPUs or accumulated in steps has the same mean.
    """
    output, expected = output.float().flatten(1), expected.float().flatten(1)
    return ((output - expected).square().sum(1) / expected.square().sum(1).clamp_min(1e-20)).mean()


def logits_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    expected_states: torch.Tensor,
    expected_weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    text_weight: float,
    compiled: bool = False,
) -> torch.Tensor:
    """Return the loss of stage "logits" per token, without the logits of all tokens.

    (1 - text_weight) * t^2 * KL(teacher_t || student_t) + text_weight * cross entropy of the text, with both
    distributions at temperature t (Hinton et al., 2015). The logits of `LogitsLoss.TOKENS` tokens exist at a time. The
    gradients are computed with them in the forward pass.

    Args:
        hidden_states: the student's, before its output layer, [B, T, C]. Under autocast the products run in
            autocast's dtype.
        weight: of the student's output layer, [V, C].
        expected_states, expected_weight: the teacher's, which get no gradient.
        labels: the text, [B, T], which is shifted here.
        temperature: t.
        text_weight: share of the loss of the text itself.
        compiled: whether to use torch.compile.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return LogitsLoss.apply(
        hidden_states.flatten(0, 1),
        weight,
        expected_states.flatten(0, 1),
        expected_weight,
        targets.flatten(),
        temperature,
        text_weight,
        compiled,
    )


class LogitsLoss(torch.autograd.Function):
    """Compute `logits_loss` and its gradients for some tokens at a time."""

    TOKENS = 2048

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        expected_states: torch.Tensor,
        expected_weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        text_weight: float,
        compiled: bool,
    ) -> torch.Tensor:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        ctx.dtypes = hidden_states.dtype, weight.dtype
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        part = _compiled_part if compiled else _loss_part
        count = hidden_states.shape[0]
        # Of `count` tokens the last of each example has no successor, so the mean over the text has another weight.
        text = text_weight / (targets >= 0).sum()
        losses, hidden_gradients = [], []
        weight_gradient: torch.Tensor | None = None
        with torch.autocast(device, enabled=False):
            for start in range(0, count, LogitsLoss.TOKENS):
                now = slice(start, start + LogitsLoss.TOKENS)
                logits = hidden_states[now] @ weight.T
                expected = expected_states[now].to(expected_weight.dtype) @ expected_weight.T
                loss, gradient = part(logits, expected, targets[now], text, (1 - text_weight) / count, temperature)
                losses.append(loss)
                hidden_gradients.append(gradient @ weight)
                if ctx.needs_input_grad[1]:
                    weight_gradient = _add_product(weight_gradient, gradient.T, hidden_states[now])
        ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient)
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        needed = ctx.needs_input_grad
        found = [
            (gradient * grad).to(dtype) if need else None
            for gradient, dtype, need in zip((hidden_gradient, weight_gradient), ctx.dtypes, needed)
        ]
        return (*found, *[None] * 6)


def _loss_part(
    logits: torch.Tensor,
    expected: torch.Tensor,
    targets: torch.Tensor,
    text: torch.Tensor,
    teacher: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 sum of some tokens' weighted losses, and its gradient [tokens, V] in the logits' dtype."""
    own = F.log_softmax(logits.float(), dim=-1)
    softened = own if temperature == 1 else F.log_softmax(logits.float() / temperature, dim=-1)
    aim = F.log_softmax(expected.float() / temperature, dim=-1)
    has_text = (targets >= 0)[:, None]
    is_target = (torch.arange(logits.shape[1], device=logits.device) == targets[:, None]) & has_text
    divergence = (aim.exp() * (aim - softened)).sum()
    loss = teacher * temperature**2 * divergence - text * torch.where(is_target, own, 0.0).sum()
    gradient = teacher * temperature * (softened.exp() - aim.exp())
    gradient = gradient + text * (own.exp() * has_text - is_target.float())
    return loss, gradient.to(logits.dtype)


_compiled_part = torch.compile(_loss_part, dynamic=False)
