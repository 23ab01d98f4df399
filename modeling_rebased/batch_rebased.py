# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""What comes with a batch of tokens: which are padding, which sequences are packed in a row, which position each has.

The masks of the layers follow from that.

Nothing here makes a GPU's host wait for a batch of one token per row, which a decoding step is.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)
from transformers.utils import is_tracing
from transformers.utils.generic import is_flash_attention_requested

from .cache_rebased import CACHE_NAME, TokenCountLayer
from .configuration_rebased import ReBasedConfig
from .eager_rebased import segment_ids_of


class Packing(NamedTuple):
    """Sequences that stand one after another in a row.

    `given_by` is the argument that told of them. `segment_ids` is int64 [B, T], the number of each token's sequence.
    `cu_seqlens` is [N + 1], their bounds in a batch of 1, and `None` in traced code that cannot tell their number.
    """

    given_by: str
    segment_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None

    @property
    def starts(self) -> torch.Tensor:
        """Whether a token is the first of its sequence and not of its row: bool [B, T]."""
        return F.pad(self.segment_ids.diff(dim=1) != 0, (1, 0))

    @property
    def columns(self) -> torch.Tensor:
        """The columns of each sequence counted from 0, padding included: int64 [B, T]."""
        columns = torch.arange(self.segment_ids.shape[1], device=self.segment_ids.device)
        return columns - torch.where(self.starts, columns, 0).cummax(1).values


def fit_mask(
    config: ReBasedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Cache | None,
    counter: TokenCountLayer | None,
) -> tuple[Any, torch.Tensor | None]:
    """Check a mask, and return what it says of the cached and the new tokens together, and of the new ones alone.

    The second keeps the mask of a single token, unlike the library's `create_recurrent_attention_mask`: a prompt may
    be fed one token at a time, and what is padding must not enter the state.

    Args:
        config (`ReBasedConfig`): the model's.
        inputs_embeds (`torch.Tensor`): [B, T, any size].
        attention_mask (`torch.Tensor`, *optional*): [B, cached + T] or more, or [B, T] for the new tokens only; 0 at
            padding. A model without recurrent layers takes whatever its attention implementation does.
        cache (`Cache`, *optional*): what came before.
        counter (`TokenCountLayer`, *optional*): its counts, if the model has recurrent layers.

    Returns:
        `tuple`: the mask [B, cached + T], and its last T columns, or `None` where they have no padding as far as the
            host knows. A model with recurrent layers only may leave out the cached columns.

    Raises:
        `TypeError`: the mask of a model with recurrent layers is no tensor.
        `ValueError`: the mask has another batch or too few columns, or it calls tokens padding that a recurrent state
            has taken in.
    """
    if attention_mask is None or (not config.is_recurrent and getattr(attention_mask, "ndim", 0) != 2):
        return attention_mask, None
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(
            f"`attention_mask` must be a tensor [batch, tokens], but it is a {type(attention_mask).__name__}."
        )
    batch, length = inputs_embeds.shape[:2]
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            "`attention_mask` must be [batch, tokens], as long as the cached and the new tokens together, but its "
            f"shape is {tuple(attention_mask.shape)} for {length} new tokens in a batch of {batch}."
        )
    width, seen = attention_mask.shape[1], _columns_seen(cache, counter, length)
    if seen is not None and (width > length or (seen > 0 and not config.is_purely_recurrent)):
        if width == length and counter is not None and bool((counter.counts[:, 0] == seen).all()):
            # Softmax layers need the cached columns, of which none is padding.
            attention_mask = F.pad(attention_mask, (seen, 0), value=1)
        elif width < seen + length:
            raise ValueError(
                f"`attention_mask` has {width} columns, but `{CACHE_NAME}` holds {seen} and {length} more are given. "
                "It must have one column for each of them."
            )
        attention_mask = attention_mask[:, : seen + length]
        if counter is not None and seen > 0 and (length > 1 or attention_mask.device.type == "cpu"):
            check_counts(attention_mask[:, :seen], counter)

    padding_mask = attention_mask[:, -length:]
    # Asking whether anything is masked makes a GPU's host wait: once a prompt, not once a token.
    readable = not is_tracing(padding_mask) and (length > 1 or padding_mask.device.type == "cpu")
    if readable and torch.all(padding_mask != 0):
        return attention_mask, None
    # A copy, not a view, so that one column has the same strides whatever the mask's length is. torch.compile would
    # take other strides as another shape, and CUDA graphs would be recorded again for every token.
    return attention_mask, padding_mask.clone(memory_format=torch.contiguous_format)


def check_counts(earlier: torch.Tensor, counter: TokenCountLayer) -> None:
    """Compare the mask of the cached columns [B, cached] with what the cache has counted. A GPU's host waits for it.

    Raises:
        `ValueError`: the mask calls tokens padding that a recurrent state has taken in.
    """
    real = (earlier != 0).sum(1).to(counter.counts.device)
    counted = counter.counts[:, 0].expand_as(real)  # one row of cache may serve many rows
    for row in (real != counted).nonzero()[:, 0].tolist():
        raise ValueError(
            f"`attention_mask` has {int(real[row])} tokens that are not padding among the {earlier.shape[1]} cached "
            f"columns of row {row}, but `{CACHE_NAME}` has taken in {int(counted[row])}. A recurrent state "
            "cannot forget a token: where `generate` has filled up a row that ended early, feed the conversation to "
            "an empty cache again."
        )


def _columns_seen(cache: Cache | None, counter: TokenCountLayer | None, length: int) -> int | None:
    """The columns in a cache; `None` where the host would have to wait for it in a decoding step, or cannot know."""
    if cache is None:
        return 0
    if counter is None:
        seen = cache.get_seq_length()
        if isinstance(seen, int):
            return seen
        return int(seen) if length > 1 and not is_tracing(seen) else None
    if is_tracing(counter.counts):
        return None
    return counter.columns if length == 1 else counter.get_seq_length()


def find_packing(
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    continues: bool = False,
) -> Packing | None:
    """Find packed sequences by their bounds, else by their numbers, else by positions that restart.

    Args:
        inputs_embeds (`torch.Tensor`): [B, T, hidden_size].
        position_ids (`torch.Tensor`, *optional*): [B or 1, T].
        padding_mask (`torch.Tensor`, *optional*): [B, T], 0 at padding, whose positions mean nothing.
        cu_seq_lens_q (`torch.Tensor`, *optional*): [N + 1], bounds from 0 to T.
        seq_idx (`torch.Tensor`, *optional*): [B, T], the number of each token's sequence.
        continues (`bool`, *optional*, defaults to `False`): whether there is a cache. Then positions make a packing
            only where they go back, and none in traced code.

    Returns:
        `Packing`, or `None` where the batch is a plain one. Traced code cannot tell: there positions and numbers
        always make a packing, of one sequence per row if they do not restart.

    Raises:
        `ValueError`: bounds or numbers that do not fit, or packed sequences in a batch of more than 1.
    """
    batch, length = inputs_embeds.shape[:2]
    traced = is_tracing(inputs_embeds)
    if seq_idx is not None and seq_idx.shape != (batch, length):
        raise ValueError(f"`seq_idx` must be [batch, tokens] = ({batch}, {length}), but it is {tuple(seq_idx.shape)}.")
    if cu_seq_lens_q is not None:
        if batch != 1:
            raise ValueError(f"`cu_seq_lens_q` packs sequences into a batch of 1, but the batch is {batch}.")
        segment_ids = segment_ids_of(cu_seq_lens_q, length)
        # Reading a GPU tensor would make the host wait.
        if cu_seq_lens_q.device.type == "cpu" and not traced:
            bounds = cu_seq_lens_q.tolist()
            if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
                raise ValueError(
                    f"`cu_seq_lens_q` must rise from 0 to the number of tokens, {length}, but it is {bounds}."
                )
            if seq_idx is not None and not torch.equal(segment_ids.diff(dim=1) != 0, seq_idx.diff(dim=1) != 0):
                raise ValueError("`cu_seq_lens_q` and `seq_idx` set different bounds between packed sequences.")
        return Packing("cu_seq_lens_q", segment_ids, cu_seq_lens_q)

    if seq_idx is not None:
        name, starts = "seq_idx", F.pad(seq_idx.diff(dim=1) != 0, (1, 0))
    elif position_ids is not None and length > 1 and not (traced and continues):
        if continues and padding_mask is None:
            padding_mask = torch.ones_like(position_ids)
        name, starts = "position_ids", _restarts(position_ids, padding_mask)
    else:
        return None
    segment_ids = starts.long().cumsum(1)
    if traced:
        return Packing(name, segment_ids.expand(batch, -1), None)
    if not starts.any():
        return None
    if continues:
        return Packing(name, segment_ids, None)
    if batch != 1 or segment_ids.shape[0] != 1:
        raise ValueError(
            f"`{name}` restart within a row, which packs sequences: that takes a batch of 1, but the batch is {batch}."
        )
    bounds = F.pad(F.pad(starts[0].nonzero()[:, 0], (1, 0)), (0, 1), value=length)
    return Packing(name, segment_ids, bounds.to(torch.int32))


def _restarts(position_ids: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Whether a token begins a new sequence of its row: bool [B or 1, T], False for the first of all."""
    if padding_mask is None:
        return F.pad(position_ids.diff(dim=1) != 1, (1, 0))
    # Each real token against the real token before it. Padding may leave a gap between them.
    real = padding_mask != 0
    places = torch.arange(real.shape[1], device=real.device)
    latest = torch.where(real, places, -1).cummax(1).values
    before = F.pad(latest[:, :-1], (1, 0), value=-1)
    positions = position_ids.expand(real.shape[0], -1)
    return real & (before >= 0) & (positions <= positions.gather(1, before.clamp_min(0)))


def count_positions(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None,
    cache: Cache | None,
    counter: TokenCountLayer | None,
) -> torch.Tensor:
    """Count each row's or packed sequence's real tokens from 0, on from what the cache holds.

    Args:
        inputs_embeds (`torch.Tensor`): [B, T, hidden_size].
        attention_mask (`torch.Tensor`, *optional*): what `fit_mask` returned.
        packing (`Packing`, *optional*): the packed sequences.
        cache, counter: as in `fit_mask`.

    Returns:
        `torch.Tensor`: int64 [B or 1, T]. Padding repeats the position before it.
    """
    length = inputs_embeds.shape[1]
    if attention_mask is None:
        positions = torch.arange(length, device=inputs_embeds.device)[None]
    else:
        positions = (attention_mask[:, -length:] != 0).long().cumsum(1) - 1
    if packing is not None:
        real = 1 if attention_mask is None else (attention_mask != 0).long()
        first = torch.where(packing.starts, positions + 1 - real, 0).cummax(1).values
        return (positions - first).clamp_min(0)
    if counter is not None:
        positions = positions + counter.counts[:, :1].to(positions.device)
    elif attention_mask is not None:
        positions = positions + (attention_mask[:, :-length] != 0).sum(1, keepdim=True)
    elif cache is not None:
        positions = positions + cache.get_seq_length()
    return positions if attention_mask is None else positions.clamp_min(0)


def create_masks(
    config: ReBasedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    padding_mask: torch.Tensor | None,
    cache: Cache | None,
    packing: Packing | None,
) -> dict[str, torch.Tensor | None]:
    """Make the masks for the kinds of layer in a model. They also keep packed sequences apart in softmax layers.

    Args:
        config (`ReBasedConfig`): the model's.
        inputs_embeds (`torch.Tensor`): [B, T, any size].
        attention_mask, padding_mask: what `fit_mask` returned.
        cache (`Cache`, *optional*): what came before.
        packing (`Packing`, *optional*): the packed sequences.

    Returns:
        `dict[str, torch.Tensor | None]`: as `ReBasedPreTrainedModel.create_masks_for_generate`.

    Raises:
        `ValueError`: padding inside packed sequences, with FlashAttention.
    """
    masks = {"linear_attention": padding_mask} if config.is_recurrent else {}
    options = {}
    if packing is not None:
        attention_mask = padding_mask
        if padding_mask is None:
            # The library finds the bounds in positions that restart, if nothing else is given.
            options["position_ids"] = packing.columns
        else:
            options["and_mask_function"] = packed_sequence_mask_function(packing.segment_ids)
    for name, build in (
        ("full_attention", create_causal_mask),
        ("sliding_attention", create_sliding_window_causal_mask),
    ):
        users = [name, "hybrid_sliding"] if name == "sliding_attention" else [name]
        layer_idx = next((i for i, layer_type in enumerate(config.layer_types_in_use) if layer_type in users), None)
        if layer_idx is None:
            continue
        if packing is not None and padding_mask is not None and is_flash_attention_requested(config):
            raise ValueError(
                "`attention_mask` has padding inside packed sequences, which FlashAttention cannot tell apart: leave "
                "the padding out, or choose `attn_implementation='sdpa'`."
            )
        layer_cache = None
        if cache is not None:
            # The library sizes a mask by the first layer of the cache that looks right to it. Among layers that have
            # no length that can be a wrong one, so it sees only a layer that the mask is for.
            layer_cache = Cache(layers=[cache.layers[layer_idx]]) if layer_idx < len(cache.layers) else DynamicCache()
        masks[name] = build(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: layer_cache},
            **options,
        )
    return masks
