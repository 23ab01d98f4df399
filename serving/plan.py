"""Say what a request keeps in memory while it is served, as shapes and in bytes. This needs no vLLM.

vLLM gives every layer with a memory pages of one size. A convolution's memory is some hundred times smaller than that
of a linear layer, so a page of its own would be nearly empty. Here each linear layer's page also holds the memories of
some convolutions. A model without linear layers has a page for each convolution.
"""

import math
from dataclasses import dataclass

import torch

from modeling_rebased.configuration_rebased import ReBasedConfig


@dataclass(frozen=True)
class StatePages:
    """Say where the layers keep their states.

    Args:
        owners (`list[int]`): the index of the layer that names each page.
        linear (`dict[int, int]`): the page of each linear layer, by layer index.
        conv (`dict[int, tuple[int, int]]`): the page of each convolution and its place among the page's convolutions.
        conv_slots (`int`): memories of convolutions that each page has room for.
    """

    owners: list[int]
    linear: dict[int, int]
    conv: dict[int, tuple[int, int]]
    conv_slots: int


def state_pages(config: ReBasedConfig) -> StatePages:
    """Assign the recurrent layers of a model to pages."""
    linear = [i for i, t in enumerate(config.layer_types) if t in ("linear_attention", "hybrid_sliding")]
    conv = [i for i, t in enumerate(config.layer_types) if t == "conv"]
    owners = linear or conv
    return StatePages(
        owners=owners,
        linear={layer: page for page, layer in enumerate(linear)},
        conv={layer: (i % len(owners), i // len(owners)) for i, layer in enumerate(conv)},
        conv_slots=-(-len(conv) // len(owners)) if owners else 0,
    )


def state_shapes(config: ReBasedConfig, tensor_parallel: int = 1) -> list[tuple[int, ...]]:
    """Return the shapes of the states in one page, per request and process: [linear state,] convolutions' states.

    A linear state is [H_kv, n_features, D + 1], a convolution's [conv_kernel_size - 1, channels].
    """
    pages = state_pages(config)
    channels = config.hidden_size if config.conv_type == "residual" else config.conv_intermediate_size
    shapes: list[tuple[int, ...]] = []
    if pages.linear:
        heads = config.num_key_value_heads // tensor_parallel
        shapes.append((heads, config.n_features, config.head_dim + 1))
    return shapes + [(config.conv_kernel_size - 1, channels // tensor_parallel)] * pages.conv_slots


def state_dtypes(config: ReBasedConfig, dtype: torch.dtype, tensor_parallel: int = 1) -> list[torch.dtype]:
    """Return the dtypes that belong to `state_shapes`: float32 for linear states, the model's for convolutions.

    Where a convolution's state would not end at a multiple of four bytes it is float32 too.
    """
    dtypes = []
    for shape in state_shapes(config, tensor_parallel):
        is_linear = len(shape) == 3
        dtypes.append(torch.float32 if is_linear or math.prod(shape) * dtype.itemsize % 4 else dtype)
    return dtypes


def state_bytes(config: ReBasedConfig, dtype: torch.dtype = torch.bfloat16, tensor_parallel: int = 1) -> int:
    """Return the bytes that all recurrent layers keep per request and process, whatever its length in tokens."""
    page = sum(
        math.prod(shape) * state_dtype.itemsize
        for shape, state_dtype in zip(
            state_shapes(config, tensor_parallel), state_dtypes(config, dtype, tensor_parallel)
        )
    )
    return page * len(state_pages(config).owners)


def softmax_bytes_per_token(config: ReBasedConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes that all "full_attention" layers together keep per token of a request."""
    layers = config.layer_types.count("full_attention")
    return 2 * layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
