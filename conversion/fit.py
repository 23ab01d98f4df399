"""Fit the linear layers of a started model to the attention of its teacher, one layer after another, without training.

Each layer is a regression of its own: the inputs are the teacher's, and the target is the output of the teacher's
attention. What is fitted is what stage "transfer" of `distill` trains: queries, keys, their norms, the gate, and the
decay if there is one. The text is small enough for every step to see all of it, so a quasi-Newton method (L-BFGS) can
be used, which needs no learning rate.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_rebased import ReBasedForCausalLM

from .distill_trainer import TRANSFERRED, AttentionTap, linear_layers
from .losses import relative_error
from .report import progress


def fit_layers(
    teacher: PreTrainedModel, student: ReBasedForCausalLM, ids: torch.Tensor, iterations: int = 15, rows: int = 8
) -> list[tuple[float, float]]:
    """Fit the linear layers of `student` in place.

    Args:
        teacher: the softmax model, on the same device.
        student: what `linearize` made of it, in float32.
        ids: text, int64 [B, T], every row by itself.
        iterations: of L-BFGS per layer.
        rows: how many rows are computed at once.

    Returns:
        The relative square error of each linear layer's output, before and after.
    """
    layers = linear_layers(student.config)
    device = student.device
    trained = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    student.requires_grad_(False)
    tap = AttentionTap({i: teacher.model.layers[i].self_attn for i in layers})
    inputs: dict[int, list[torch.Tensor]] = {i: [] for i in layers}
    targets: dict[int, list[torch.Tensor]] = {i: [] for i in layers}
    parts = ids.split(rows)
    with torch.no_grad():
        for part in parts:
            teacher.model(input_ids=part.to(device), use_cache=False)
            for i in layers:
                inputs[i].append(tap.inputs[i].float().cpu())
                targets[i].append(tap.outputs[i].float().cpu())
        settings = _settings(student, layers, ids[:1].to(device))
    tap.remove()

    errors = []
    for i in progress(layers, "fitting"):
        pairs = [(x.to(device), y.to(device)) for x, y in zip(inputs.pop(i), targets.pop(i))]
        errors.append(_fit_layer(student.model.layers[i].self_attn, pairs, settings[i], iterations))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trained[name])
    return errors


def _fit_layer(
    attention: torch.nn.Module,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    settings: dict[str, Any],
    iterations: int,
) -> tuple[float, float]:
    """Fit one layer to pairs of inputs and outputs [rows, T, hidden_size]. Return its error before and after."""
    fitted = [each for name, each in attention.named_parameters() if name.startswith(TRANSFERRED)]
    count = sum(len(x) for x, _ in pairs)
    optimizer = torch.optim.LBFGS(fitted, max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")
    seen: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for x, expected in pairs:
            error = relative_error(attention(hidden_states=x, **settings)[0], expected) * len(x) / count
            error.backward()
            total += error.item()
        seen.append(total)
        return total

    for each in fitted:
        each.requires_grad_(True)
    optimizer.step(closure)
    closure()
    for each in fitted:
        each.requires_grad_(False)
        each.grad = None
    return seen[0], seen[-1]


def _settings(student: ReBasedForCausalLM, layers: list[int], ids: torch.Tensor) -> dict[int, dict[str, Any]]:
    """Return what the model gives to the attention of each layer beside the hidden states, for rows like `ids`."""
    found: dict[int, dict[str, Any]] = {}

    def keep(i: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            found[i] = {name: value for name, value in kwargs.items() if name != "hidden_states"}

        return hook

    hooks = [student.model.layers[i].self_attn.register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers]
    student.model(input_ids=ids, use_cache=False)
    for each in hooks:
        each.remove()
    return found
