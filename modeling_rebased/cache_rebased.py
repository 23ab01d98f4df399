# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""Keep the states of recurrent layers in transformers' own caches, and accept both names of the cache argument.

A convolution keeps its last inputs in the `conv_states` of the library's `LinearAttentionLayer`. ReBased keeps its
state in `recurrent_states`. One more layer at the end of the cache, `TokenCountLayer`, counts the tokens that came
before.
"""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import is_tracing

from .attention_rebased import rebased_attention
from .configuration_rebased import RECURRENT_LAYER_TYPES, ReBasedConfig


# transformers 5.24 renamed the argument and the output that hold the cache. Our own code says `cache`; what we give to
# the library, and what a signature shows, has the name that the installed release uses.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)


def either_cache_name(function: Callable) -> Callable:
    """Let a function take its cache as `cache` or as `past_key_values`, whichever of the two it has itself.

    Raises:
        `ValueError`: on a call that gives two different caches.
    """
    signature = inspect.signature(function)
    own = next(name for name in CACHE_NAMES if name in signature.parameters)
    other = next(name for name in CACHE_NAMES if name != own)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if other in kwargs:
            cache = kwargs.pop(other)
            if cache is not None and kwargs.get(own) is not None and kwargs[own] is not cache:
                raise ValueError("`cache` and `past_key_values` are two names of one argument: give only one of them.")
            if cache is not None or own not in kwargs:
                kwargs[own] = cache
        return function(*args, **kwargs)

    wrapper.__signature__ = signature.replace(
        parameters=[x.replace(name=CACHE_NAME) if x.name == own else x for x in signature.parameters.values()]
    )
    return wrapper


def conv_state(cache: Cache | None, layer_idx: int) -> torch.Tensor | None:
    """Return a convolution's last inputs [B, size, kernel_size], or `None` before its first token."""
    layer = cache.layers[layer_idx] if cache is not None else None
    return layer.conv_states[0] if layer is not None and layer.has_previous_state[0] else None


def recurrent_state(cache: Cache | None, layer_idx: int) -> torch.Tensor | None:
    """Return a layer's recurrent state [B, H_kv, n_features, D + 1], or `None` before its first token."""
    layer = cache.layers[layer_idx] if cache is not None else None
    return layer.recurrent_states[0] if layer is not None and layer.has_previous_state[0] else None


def keep_conv_state(cache: Cache, layer_idx: int, state: torch.Tensor) -> None:
    """Write a convolution's last inputs [B, size, kernel_size] into the cache, in place after the first time."""
    layer = cache.layers[layer_idx]
    if layer.has_previous_state[0]:
        layer.conv_states[0].copy_(state)
    else:
        layer.update_conv_state(state)  # allocates, copies and marks the layer as started


def keep_recurrent_state(cache: Cache, layer_idx: int, state: torch.Tensor) -> None:
    """Write a recurrent state [B, H_kv, n_features, D + 1] into the cache, in place after the first time."""
    layer = cache.layers[layer_idx]
    layer.update_recurrent_state(state)  # allocates or copies
    if not layer.has_previous_state[0]:
        # The library does these two for a convolution's state only.
        layer.has_previous_state[0] = True
        if layer.device is None:
            layer.device = state.device


def _change_rows(layer: LinearAttentionCacheLayerMixin, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for states in (layer.conv_states, layer.recurrent_states):
        for i, state in states.items():
            if state is not None:
                states[i] = change(state)


def _batch_repeat_interleave(self: LinearAttentionCacheLayerMixin, repeats: int) -> None:
    """Repeat each row of a layer's states, and of its window's keys and values if it has them."""
    if isinstance(self, CacheLayerMixin):
        super(LinearAttentionCacheLayerMixin, self).batch_repeat_interleave(repeats)
    _change_rows(self, lambda state: state.repeat_interleave(repeats, dim=0))


def _batch_select_indices(self: LinearAttentionCacheLayerMixin, indices: torch.Tensor) -> None:
    """Select rows of a layer's states, and of its window's keys and values if it has them."""
    if isinstance(self, CacheLayerMixin):
        super(LinearAttentionCacheLayerMixin, self).batch_select_indices(indices)
    _change_rows(self, lambda state: state[indices])


# `Cache` offers both to custom loops of generation, such as contrastive search, but up to 5.24 the library's recurrent
# layers lack them.
for _name, _method in (
    ("batch_repeat_interleave", _batch_repeat_interleave),
    ("batch_select_indices", _batch_select_indices),
):
    if not hasattr(LinearAttentionCacheLayerMixin, _name):
        setattr(LinearAttentionCacheLayerMixin, _name, _method)


class RollbackLayer:
    """What lets a recurrent layer of a cache take back its last tokens, for assisted generation.

    A recurrent state cannot forget. So while the layer records, it keeps the state before the first token since the
    last `crop`, and what each token since then brought: its key, value and decay, or the convolution's inputs. `crop`
    makes the state of the tokens that stay from these. `make_croppable` puts this class before the library's own.
    """

    is_croppable = True
    before: torch.Tensor | None = None
    updates: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
    options: dict[str, Any]
    inputs: torch.Tensor | None = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, and forget how to take back those before them."""
        if tokens_to_remove > 0 or not self.record_past:
            raise RuntimeError("A recurrent layer takes back tokens by a negative number, and only while it records.")
        removed = -tokens_to_remove
        if removed > 0 and self.updates:
            keys, values = (torch.cat([update[i] for update in self.updates], dim=1) for i in (0, 1))
            masks = [k.new_ones(k.shape[:2]) if mask is None else mask for k, _, mask, _ in self.updates]
            decays = [decay for *_, decay in self.updates if decay is not None]
            kept = keys.shape[1] - removed
            if kept == 0:
                self.recurrent_states[0].copy_(self.before) if self.before is not None else self.reset()
            else:
                # Queries do not matter to the state.
                _, state = rebased_attention(
                    keys[:, :kept],
                    keys[:, :kept],
                    values[:, :kept],
                    attention_mask=torch.cat(masks, dim=1)[:, :kept],
                    log_decay=torch.cat(decays, dim=1)[:, :kept] if decays else None,
                    initial_state=self.before,
                    output_final_state=True,
                    **self.options,
                )
                self.recurrent_states[0].copy_(state)
        if removed > 0 and self.inputs is not None:
            stop = self.inputs.shape[1] - removed
            self.conv_states[0].copy_(self.inputs[:, stop - self.conv_kernel_size[0] : stop].transpose(1, 2))
        self.before, self.updates, self.inputs = None, [], None
        if isinstance(self, CacheLayerMixin):  # the window of a hybrid layer
            super(LinearAttentionCacheLayerMixin, self).crop(tokens_to_remove)


def record_recurrence(
    cache: Cache,
    layer_idx: int,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    options: dict[str, Any],
) -> None:
    """Keep what tokens are about to bring to a recurrent state, if the layer records its past.

    Args:
        cache (`Cache`): the cache, whose state is still the one before these tokens.
        layer_idx (`int`): the layer.
        k, v (`torch.Tensor`): [B, T, H_kv, F] and [B, T, H_kv, D].
        attention_mask (`torch.Tensor`, *optional*): [B, T], 0 at padding.
        log_decay (`torch.Tensor`, *optional*): [B, T, H_kv].
        options (`dict[str, Any]`): the other arguments of `rebased_attention`.
    """
    layer = cache.layers[layer_idx]
    if not layer.record_past or not isinstance(layer, RollbackLayer):
        return
    if not layer.updates:
        state = recurrent_state(cache, layer_idx)
        layer.before, layer.options = None if state is None else state.clone(), options
    layer.updates.append((k, v, attention_mask, log_decay))


def record_inputs(cache: Cache, layer_idx: int, window: torch.Tensor, length: int) -> None:
    """Keep a convolution's inputs [B, kernel_size + T, size], the last `length` of them new, if the layer records."""
    layer = cache.layers[layer_idx]
    if layer.record_past and isinstance(layer, RollbackLayer):
        new = window[:, window.shape[1] - length :]
        layer.inputs = window.clone() if layer.inputs is None else torch.cat([layer.inputs, new], dim=1)


def make_croppable(cache: Cache, config: ReBasedConfig) -> None:
    """Let a dynamic cache of a recurrent model take back tokens once it records them, as `RollbackLayer` says."""
    for layer_idx, layer_type in enumerate(config.layer_types_in_use):
        layer = cache.layers[layer_idx]
        if layer_type in RECURRENT_LAYER_TYPES and not isinstance(layer, RollbackLayer):
            # The same layer with more abilities, whichever of the library's kinds it is.
            kind = type(f"Rollback{type(layer).__name__}", (RollbackLayer, type(layer)), {})
            cache.layers[layer_idx] = able = kind.__new__(kind)
            able.__dict__ = {**layer.__dict__, "updates": []}
    count_layer(cache, config).is_croppable = True


class TokenCountLayer(CacheLayerMixin):
    """Count the tokens and columns that came before, as the last layer of a recurrent model's cache.

    `counts` is int64 [B, 2]: the real tokens of each row (its next position), and the columns of the batch, padding
    included (the length of the cache). No state tells either number. A layer of the cache follows the library's
    reorder and reset, and a cache that has only recurrent layers besides can answer `get_seq_length`, which `generate`
    asks for. Steps change `counts` in place, so that CUDA graphs can hold its address.

    Args:
        compileable (`bool`): whether the cache belongs to a compiled decoding step. A `DynamicCache` does not, and
            `generate` then hands over plain masks [B, cached + T].
    """

    supports_early_init = False
    counts: torch.Tensor  # from `lazy_initialization` on

    def __init__(self, compileable: bool):
        super().__init__()
        self.is_compileable = compileable
        # The columns as the host knows them; `None` after compiled steps, which only `counts` has seen.
        self.columns: int | None = 0

    def lazy_initialization(self, batch: int, device: torch.device) -> None:
        """Start every row at 0."""
        self.counts = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self.is_initialized = True
        if not is_tracing(self.counts):
            torch._dynamo.mark_static_address(self.counts)

    def update(self, padding_mask: torch.Tensor | None, length: int) -> None:
        """Count `length` more columns, of which `padding_mask` [B, length] says the real tokens; `None` is all."""
        if padding_mask is None:
            self.counts.add_(length)
        else:
            real = (padding_mask != 0).sum(1).to(self.counts.device)
            self.counts.add_(torch.stack([real, torch.full_like(real, length)], dim=1))
        if is_tracing(self.counts):
            self.columns = None
        elif self.columns is not None:
            self.columns += length

    def get_seq_length(self) -> int:
        """Return the columns seen. After a compiled step this makes the host wait for the GPU once."""
        if self.columns is None:
            self.columns = int(self.counts[0, 1])
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the columns that a mask covers."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Start every row at 0 again, in place."""
        if self.is_initialized:
            self.counts.zero_()
        self.columns = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select rows, for beam search."""
        if self.is_initialized:
            self.counts = self.counts.index_select(0, beam_idx.to(self.counts.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.is_initialized:
            self.counts = self.counts.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows, by their numbers or by a mask."""
        if self.is_initialized:
            self.counts = self.counts[indices]

    def offload(self) -> None:
        """Stay where it is: there is next to nothing to move."""

    def prefetch(self) -> None:
        """Stay where it is."""

    def activate_past_recording(self) -> None:
        """Refuse in a cache whose recurrent layers cannot take back tokens: what a state has absorbed stays in it."""
        if not self.is_croppable:
            raise NotImplementedError(
                "This cache cannot record its past and be cropped, since its recurrent states cannot forget. Leave "
                "it to `generate` to make the cache of assisted generation."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns, which are real tokens in every row."""
        self.activate_past_recording()
        if self.is_initialized:
            self.counts.add_(tokens_to_remove)
        if self.columns is not None:
            self.columns += tokens_to_remove


def count_layer(cache: Cache, config: ReBasedConfig) -> TokenCountLayer:
    """Return the layer of a recurrent model's cache that counts tokens. A cache that is new to the model gets one.

    Raises:
        `ValueError`: the cache was not made for this model: a layer is missing, of the wrong kind or too many.
    """
    if len(cache.layers) <= config.num_hidden_layers:
        for layer_idx, layer_type in enumerate(config.layer_types_in_use):
            layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
            if layer_type in RECURRENT_LAYER_TYPES and not isinstance(layer, LinearAttentionCacheLayerMixin):
                raise ValueError(
                    f"`{CACHE_NAME}` has no recurrent state for layer {layer_idx}, which is {layer_type!r}: it holds "
                    f"{type(layer).__name__}. Make it as `DynamicCache(config=model.config)` or "
                    "`StaticCache(config=model.config, max_cache_len=...)`."
                )
        cache.layers.append(TokenCountLayer(compileable=not isinstance(cache, DynamicCache)))
    counter = cache.layers[config.num_hidden_layers]
    if type(counter).__name__ != TokenCountLayer.__name__:  # by name, since other copies of this file have their own
        raise ValueError(
            f"`{CACHE_NAME}` was made for a model of more layers: this one has {config.num_hidden_layers}, and the "
            f"next layer of the cache is a {type(counter).__name__}. Make it as `DynamicCache(config=model.config)`."
        )
    return counter


def _take_layers(cache: Cache, kept: dict[tuple, list], inputs_embeds: torch.Tensor) -> None:
    """Give a new cache the layers in `kept` if they fit, and bring its layers there when the cache is deleted.

    CUDA graphs read and write states at fixed addresses. States at new addresses make them be recorded anew. `kept`
    holds the layers of one cache at most, under all that their tensors follow from.
    """
    kind = inputs_embeds.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    modes = autocast, torch.is_inference_mode_enabled()
    key = (inputs_embeds.shape[0], inputs_embeds.dtype, inputs_embeds.device, *modes)
    layers = kept.pop(key, None)
    kept.clear()
    if layers is not None:
        cache.layers = layers
        for layer in layers:
            layer.reset()
        _change_tensors(cache, lambda x: x)  # marks the addresses of those that beam search has replaced

    def keep(layers: list) -> None:
        kept.clear()
        kept[key] = layers

    weakref.finalize(cache, keep, cache.layers).atexit = False


def prepare_cache(cache: Cache, config: ReBasedConfig, inputs_embeds: torch.Tensor) -> TokenCountLayer | None:
    """Make a cache ready for a batch [B, T, hidden_size], and return its counts, `None` without recurrent layers.

    Outside of compiled code it does two more things. It gives every row of the batch a copy of a cache that has one
    row, for beams. It copies states that were made under `torch.inference_mode` and are to be changed outside of it.

    Raises:
        `TypeError`: `cache` is no `Cache`, for example a tuple of older releases.
        `ValueError`: it was made for another model or for another batch.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"`{CACHE_NAME}` must be a `Cache`, such as `DynamicCache(config=model.config)`, but it is a "
            f"{type(cache).__name__}."
        )
    if not config.is_recurrent:
        return None
    counter = count_layer(cache, config)
    batch = inputs_embeds.shape[0]
    if not counter.is_initialized:
        kept = getattr(cache, "kept_layers", None)
        if kept is not None and not is_tracing(inputs_embeds):
            _take_layers(cache, kept, inputs_embeds)
            counter = count_layer(cache, config)
    if not counter.is_initialized:
        counter.lazy_initialization(batch, inputs_embeds.device)
    if not is_tracing(inputs_embeds):
        rows = counter.counts.shape[0]
        if rows == 1 and batch > 1:
            _change_tensors(cache, lambda x: x.repeat_interleave(batch, dim=0))
        elif counter.counts.is_inference() and not torch.is_inference_mode_enabled():
            _change_tensors(cache, torch.clone)
    if counter.counts.shape[0] != batch:
        raise ValueError(
            f"`{CACHE_NAME}` holds {counter.counts.shape[0]} rows, but the batch has {batch}. Only a cache of one row "
            "is copied for every row of a batch."
        )
    return counter


def _change_tensors(cache: Cache, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace every tensor that the layers of a cache hold for each row of the batch."""

    def changed(x: torch.Tensor) -> torch.Tensor:
        x = change(x)
        torch._dynamo.mark_static_address(x)
        return x

    for layer in cache.layers:
        for name in ("counts", "keys", "values"):
            x = getattr(layer, name, None)
            if isinstance(x, torch.Tensor) and x.numel() > 0:
                setattr(layer, name, changed(x))
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            states.update({i: changed(x) for i, x in states.items() if x is not None})
        if hasattr(layer, "batch_size") and layer.is_initialized:
            layer.batch_size = layer.keys.shape[0]
        length = getattr(layer, "cumulative_length", None)
        if isinstance(length, torch.Tensor) and length.is_inference():
            layer.cumulative_length = length.clone()
