# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""What a recurrent model must know of its past beyond its states, kept in transformers' own caches.

transformers' `LinearAttentionLayer` has two slots, one for a convolution and one for a recurrence. Each ReBased layer
fills one with its state and the other with a count of what came before: int64 [batch, 2, 1], the real tokens of each
row (its next position) and the columns of the batch, padding included (the length of the cache). As tensors of the
cache the counts follow the library's own reorder, reset, offload and compile. Writing the convolution's slot is also
what marks a layer as started.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_rebased import RECURRENT_LAYER_TYPES


# transformers 5.24 renamed the argument and the output that hold the cache. Our own code says `cache`; what we give to
# the library, and what a signature shows, has the name that the installed release uses.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)


def either_cache_name(function: Callable) -> Callable:
    """Let a function take its cache as `cache` or as `past_key_values`, whichever of the two it has itself.

    Raises:
        `ValueError`: on a call that gives both.
    """
    signature = inspect.signature(function)
    own = next(name for name in CACHE_NAMES if name in signature.parameters)
    other = next(name for name in CACHE_NAMES if name != own)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if other in kwargs:
            cache = kwargs.pop(other)
            if cache is not None and kwargs.get(own) is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one argument: give only one of them.")
            if cache is not None or own not in kwargs:
                kwargs[own] = cache
        return function(*args, **kwargs)

    wrapper.__signature__ = signature.replace(
        parameters=[x.replace(name=CACHE_NAME) if x.name == own else x for x in signature.parameters.values()]
    )
    return wrapper


def previous_state(cache: Cache | None, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The contents of a layer's (convolution, recurrence) slots, `None`s before its first token."""
    if cache is None:
        return None, None
    layer = cache.layers[layer_idx]
    if not layer.has_previous_state[0]:
        return None, None
    return layer.conv_states[0], layer.recurrent_states[0]


def tokens_seen(cache: Cache | None, layer_types: list[str]) -> torch.Tensor | None:
    """The count before this call: int64 [batch, 2, 1], `None` for an empty cache or a model of softmax layers only."""
    for layer_idx, layer_type in enumerate(layer_types):
        if layer_type in RECURRENT_LAYER_TYPES:
            conv_state, recurrent_state = previous_state(cache, layer_idx)
            return recurrent_state if layer_type == "conv" else conv_state
    return None


def check_cache(cache: Cache, layer_types: list[str]) -> None:
    """Refuse a cache that was not made for this model.

    Raises:
        `ValueError`: a layer of the cache is missing or of the wrong kind.
    """
    for layer_idx, layer_type in enumerate(layer_types):
        layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        if layer_type in RECURRENT_LAYER_TYPES and not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"`{CACHE_NAME}` has no recurrent state for layer {layer_idx}, which is {layer_type!r}: it holds "
                f"{type(layer).__name__}. Make it as `DynamicCache(config=model.config)` or "
                "`StaticCache(config=model.config, max_cache_len=...)`."
            )


def _recurrent_length(cache: Cache, layer_idx: int = 0) -> int:
    layer = cache.layers[layer_idx]
    if not layer.has_previous_state[0]:
        return 0
    # The counts are the slot of integers.
    counts = next(x for x in (layer.conv_states[0], layer.recurrent_states[0]) if x.dtype == torch.int64)
    return int(counts[0, 1, 0])


def let_cache_tell_its_length(cache: Cache | None) -> None:
    """Give a cache of recurrent layers only the `get_seq_length` that `generate` asks for.

    The library's own raises where no softmax layer is there to ask.
    """
    if cache is not None and cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        cache.get_seq_length = functools.partial(_recurrent_length, cache)
