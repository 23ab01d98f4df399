"""Compute the losses of both stages of distillation."""

from typing import Any

import torch
import torch.nn.functional as F


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return |output - expected|^2 / |expected|^2 of each example [T, hidden_size], averaged over the batch.

    The error is relative, so that layers with large and small outputs count alike. It is taken per example, so that a
    batch that is split over GPUs or accumulated in steps has the same mean.
    """
    output, expected = output.float().flatten(1), expected.float().flatten(1)
    return ((output - expected).square().sum(1) / expected.square().sum(1).clamp_min(1e-20)).mean()


def logits_loss(
    logits: torch.Tensor,
    expected: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    text_weight: float,
    compiled: bool = False,
) -> torch.Tensor:
    """Return the loss of stage "logits" per token.

    (1 - text_weight) * t^2 * KL(teacher_t || student_t) + text_weight * cross entropy of the text, with both
    distributions at temperature t (Hinton et al., 2015).

    Args:
        logits, expected: the student's and the teacher's, [B, T, V].
        labels: the text, [B, T], which is shifted here.
        temperature: t.
        text_weight: share of the loss of the text itself.
        compiled: whether to use torch.compile.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return _LogitsLoss.apply(
        logits.flatten(0, 1), expected.flatten(0, 1), targets.flatten(), temperature, text_weight, compiled
    )


class _LogitsLoss(torch.autograd.Function):
    """Compute the loss and its gradient for some tokens at a time, without float32 logits of all tokens."""

    TOKENS = 2048

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        expected: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        text_weight: float,
        compiled: bool,
    ) -> torch.Tensor:
        part = _compiled_part if compiled else _loss_part
        count = logits.shape[0]
        # Of `count` tokens the last of each example has no successor, so the mean over the text has another weight.
        text = text_weight / (targets >= 0).sum()
        gradient = torch.empty_like(logits)
        losses = []
        for start in range(0, count, _LogitsLoss.TOKENS):
            now = slice(start, start + _LogitsLoss.TOKENS)
            loss, gradient[now] = part(
                logits[now], expected[now], targets[now], text, (1 - text_weight) / count, temperature
            )
            losses.append(loss)
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None


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
