"""Handle what all formats share: names and shapes of tensors, numbered layers, and configurations."""

import re
from collections.abc import Iterable
from typing import Any

import torch

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM

from .report import ConversionError, some


State = dict[str, torch.Tensor]


def make_config(**fields: Any) -> ReBasedConfig:
    """Return a configuration of what was found in a checkpoint.

    Raises:
        ConversionError: no model can have these sizes.
    """
    try:
        return ReBasedConfig(**fields)
    except Exception as error:  # strict dataclasses raise errors of several kinds
        raise ConversionError(f"The checkpoint's sizes make no possible model: {error}") from error


def own_fields(config: ReBasedConfig) -> dict[str, Any]:
    """Return the fields of a configuration of this package, to make another one from."""
    ignored = ("model_type", "auto_map", "transformers_version", "dtype")
    return {name: value for name, value in config.to_dict().items() if name not in ignored}


def model_shapes(config: ReBasedConfig) -> dict[str, torch.Size]:
    """Return name and shape of every tensor of a model, without its memory and without a tied `lm_head.weight`."""
    with torch.device("meta"):
        model = ReBasedForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def check_names(missing: Iterable[str], unknown: Iterable[str], where: str) -> None:
    """Refuse names that are missing or unknown.

    Raises:
        ConversionError: there are such names; the message lists them.
    """
    if missing or unknown:
        raise ConversionError(
            f"{where} does not fit its configuration: missing {some(sorted(missing))}; unknown "
            f"{some(sorted(unknown))}."
        )


def check_against(config: ReBasedConfig, state: State, where: str) -> None:
    """Check that `state` has exactly the tensors that `config` asks for.

    Raises:
        ConversionError: tensors are missing, unknown or of a wrong shape; the message names them.
    """
    shapes = model_shapes(config)
    check_names(set(shapes) - set(state), set(state) - set(shapes), repr(where))
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ConversionError(
                f"{name!r} in {where!r} has the shape {list(state[name].shape)}; the configuration asks for "
                f"{list(shape)}."
            )


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def matrix_size(state: State, name: str) -> tuple[int, int]:
    """Return the rows and columns of a matrix.

    Raises:
        ConversionError: the tensor has another number of dimensions.
    """
    tensor = state[name]
    if tensor.ndim != 2:
        raise ConversionError(f"{name!r} has the shape {list(tensor.shape)}; it must have two dimensions.")
    return tensor.shape[0], tensor.shape[1]


def set_same_size(fields: dict[str, Any], field: str, tensor: torch.Tensor, dim: int, layer: int) -> None:
    """Put a tensor's size into a field of the configuration, which all layers must share.

    Raises:
        ConversionError: an earlier layer had another size.
    """
    size = tensor.shape[dim] if tensor.ndim else 0
    if fields.setdefault(field, size) != size:
        raise ConversionError(
            f"{field} must be one for all layers, but it is {fields[field]} and, in layer {layer}, {size}."
        )


def find_prefix(state: State, marker: str, what: str) -> str:
    """Return what stands before all names of a checkpoint: "" or, where a trainer saved the file, "model." or so.

    Args:
        state: the tensors by name.
        marker: a name that every such checkpoint has, without the prefix.
        what: the kind of checkpoint, for messages.

    Raises:
        ConversionError: these are not such a checkpoint's names, or some of them lack the prefix.
    """
    found = [name for name in state if name.endswith(marker)]
    if len(found) != 1:
        raise ConversionError(
            f"SOURCE is not {what}: {len(found)} of its names end in {marker!r}, and one must. It has "
            f"{some(sorted(state))}."
        )
    prefix = found[0].removesuffix(marker)
    others = sorted(name for name in state if not name.startswith(prefix))
    if others:
        raise ConversionError(f"All names in SOURCE must start with {prefix!r}; these do not: {some(others)}.")
    return prefix


def by_layer(state: State, layer: re.Pattern[str], others: Iterable[str], what: str) -> list[State]:
    """Return the tensors of each layer, by their names in it.

    Args:
        state: the tensors by name.
        layer: a pattern of a layer's names; its groups are the layer's number and the name in it.
        others: names that are no layer's.
        what: the kind of model, for messages.

    Raises:
        ConversionError: a name is neither a layer's nor in `others`, or a layer is missing.
    """
    numbered: dict[int, State] = {}
    unknown, allowed = [], set(others)
    for name, tensor in state.items():
        match = layer.fullmatch(name)
        if match:
            numbered.setdefault(int(match[1]), {})[match[2]] = tensor
        elif name not in allowed:
            unknown.append(name)
    if unknown:
        raise ConversionError(f"SOURCE has tensors that no {what} has: {some(unknown)}.")
    if not numbered or max(numbered) != len(numbered) - 1:
        raise ConversionError(
            f"The layers of SOURCE must be numbered from 0 without a gap, but they are {sorted(numbered)[:20]}."
        )
    return [numbered[i] for i in range(len(numbered))]
