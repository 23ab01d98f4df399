# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""Build the ReBased model in PyTorch.

From the bottom up: normalisation of queries and keys, the sequence mixers (short convolutions, ReBased, softmax, both
in one), the MLP, the layer, the model and its heads. Shapes: B batch, T tokens, H heads, F feature_dim, D head_dim.
"""

import functools
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.generation import utils as generation_utils
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.loss.loss_utils import ForCausalLMLoss, ForTokenClassification
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_rebased import rebased_attention, rebased_attention_decode
from .batch_rebased import (
    Packing,
    check_counts,
    count_positions,
    create_masks,
    find_packing,
    fit_mask,
)
from .cache_rebased import (
    CACHE_NAME,
    CACHE_NAMES,
    conv_state,
    count_layer,
    either_cache_name,
    keep_conv_state,
    keep_recurrent_state,
    make_croppable,
    prepare_cache,
    record_inputs,
    record_recurrence,
    recurrent_state,
)
from .configuration_rebased import ReBasedConfig
from .context_parallel_rebased import (
    ContextShard,
    attend_shard,
    check_layers,
    group_name,
    locate_shard,
    put_inputs_before,
    send_inputs,
    send_state,
)
from .eager_rebased import computation_dtype, is_plain
from .loss_rebased import can_fuse_loss, fused_causal_lm_loss
from .triton_launch_rebased import can_compile_ahead, compiling_only
from .triton_rebased import triton_short_conv, triton_unavailable_reason


logger = logging.get_logger(__name__)


class ReBasedRMSNorm(nn.Module):
    """Compute weight * x / sqrt(mean(x^2) + eps) over the last dimension, with the root in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def build_norm(config: ReBasedConfig) -> nn.Module:
    """Return a norm of the residual stream."""
    norm = nn.LayerNorm if config.norm_type == "layernorm" else ReBasedRMSNorm
    return norm(config.hidden_size, eps=config.norm_eps)


class ReBasedQKNorm(nn.Module):
    """Normalise queries or keys: gamma * (x - mean) / std + beta, each step optional (paper, section 4.2).

    With all three it is LayerNorm; with none the identity, which leaves the plain x^2 kernel. Gamma and beta move the
    minimum of (q.k)^2, so that a token can be ignored.
    """

    def __init__(self, size: int, config: ReBasedConfig):
        super().__init__()
        self.size = size
        self.normalize = config.normalize
        self.eps = config.qk_norm_eps
        self.weight = nn.Parameter(torch.ones(size)) if config.use_gamma else None
        self.bias = nn.Parameter(torch.zeros(size)) if config.use_beta else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., size] to the same shape."""
        if self.normalize:
            return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
        if self.weight is not None:
            x = x * self.weight
        if self.bias is not None:
            x = x + self.bias
        return x

    def extra_repr(self) -> str:
        gamma, beta = self.weight is not None, self.bias is not None
        return f"{self.size}, normalize={self.normalize}, gamma={gamma}, beta={beta}"


def inverse_frequencies(dim: int, config: ReBasedConfig, device: torch.device | None = None) -> torch.Tensor:
    """Return the frequencies of the rotation of `dim` numbers, float32 [dim / 2]."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponent


class ReBasedRotaryEmbedding(nn.Module):
    """Compute the cosines and sines of rotary positions for softmax layers, of every kind that transformers knows.

    Args:
        config (`ReBasedConfig`): its `rope_parameters` say which kind, its `head_dim` the size.
        device (`torch.device`, *optional*): where the frequencies are computed.
    """

    def __init__(self, config: ReBasedConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: ReBasedConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies, float32 [head_dim / 2], and the factor of cos and sin, 1."""
        return inverse_frequencies(config.head_dim, config, device), 1.0

    def _apply(self, fn: Callable, recurse: bool = True) -> "ReBasedRotaryEmbedding":
        """Move the frequencies as `fn` does, but leave them in float32 where `fn` narrows, as `model.half()` does.

        A narrow frequency is wrong by up to 0.4 percent, which at position 1,000 is an angle of several radians.
        """
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, frequencies in before.items():
            after = getattr(self, name)
            if after.dtype != frequencies.dtype:
                setattr(self, name, frequencies.to(after.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [B or 1, T, dim] of int64 positions [B or 1, T], in x's dtype and on its device."""
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        return (emb.cos() * self.attention_scaling).to(x.dtype), (emb.sin() * self.attention_scaling).to(x.dtype)


class ReBasedLinearRotaryEmbedding(ReBasedRotaryEmbedding):
    """Compute rotary positions for linear layers, whose queries and keys have `feature_dim` numbers per head.

    Kinds other than "default" are computed from `head_dim`. The configuration allows them only where the two sizes
    are equal.
    """

    @staticmethod
    def compute_default_rope_parameters(
        config: ReBasedConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies, float32 [feature_dim / 2], and the factor of cos and sin, 1."""
        return inverse_frequencies(config.feature_dim, config, device), 1.0


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return (-x_2, x_1) of the halves (x_1, x_2) of the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k by cos and sin [B or 1, T, dim], which get the dimension of the heads, `unsqueeze_dim`.

    By default q and k are [B, H, T, dim]; with `unsqueeze_dim=2` they are [B, T, H, dim].
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class ReBasedCausalConv(nn.Module):
    """Compute a depthwise causal convolution over packed sequences, padding and a cache, for all short convolutions.

    A subclass makes `conv` of as many channels as it needs.
    """

    conv: nn.Conv1d

    def __init__(self, config: ReBasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.kernel_size = config.conv_kernel_size
        self.backend = config.kernel_backend

    @force_accelerate_hooks("conv")
    def convolve(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        segment_ids: torch.Tensor | None,
        gate: torch.Tensor | None = None,
        shard: ContextShard | None = None,
    ) -> torch.Tensor:
        """Return conv(u), or conv(u) * gate + u where there is a gate.

        Args:
            hidden_states (`torch.Tensor`): u [B, T, size].
            attention_mask (`torch.Tensor`, *optional*): [B, T], 0 at padding, which may stand anywhere: the
                convolution passes over it.
            cache (`Cache`, *optional*): holds the last `kernel_size` inputs, [B, size, kernel_size].
            segment_ids (`torch.Tensor`, *optional*): [B, T], the number of each token's packed sequence.
            gate (`torch.Tensor`, *optional*): [B, T, size].
            shard (`ContextShard`, *optional*): the tokens' place, if other ranks hold what comes before them.

        Returns:
            `torch.Tensor`: [B, T, size].
        """
        pending = None if shard is None else send_inputs(shard, hidden_states)
        if shard is not None and pending is not None and attention_mask is None:
            return self._convolve_shard(hidden_states, pending, shard, segment_ids, gate)
        length = hidden_states.shape[1]
        if shard is not None and pending is not None:
            hidden_states, attention_mask, segment_ids, gate = put_inputs_before(
                shard, pending, hidden_states, attention_mask, segment_ids, gate
            )
        x = hidden_states
        state = conv_state(cache, self.layer_idx)
        if attention_mask is not None:
            # Bring each row's real tokens together at its start, and remember where each went.
            kept = attention_mask.bool()
            dropped = kept.logical_not()
            places = torch.where(kept, kept.long().cumsum(1), kept.sum(1, keepdim=True) + dropped.long().cumsum(1)) - 1
            tokens = torch.arange(x.shape[1], device=x.device).expand_as(places)
            order = torch.zeros_like(places).scatter(1, places, tokens)
            x = x.gather(1, order[..., None].expand_as(x))
            if segment_ids is not None:
                segment_ids = segment_ids.expand_as(order).gather(1, order)
        has_kernel = state is None and self._has_kernel(x)
        if has_kernel:
            # Where tokens have been moved, the gate is for later.
            now, gate = (gate, None) if attention_mask is None else (None, gate)
            out = triton_short_conv(x, self.conv.weight[:, 0], self.conv.bias, now, segment_ids)
        if cache is not None or not has_kernel:
            before = x.new_zeros(x.shape[0], self.kernel_size, x.shape[2]) if state is None else state.transpose(1, 2)
            window = torch.cat([before.to(x.dtype), x], dim=1)  # [B, kernel_size + T, size]
        if not has_kernel:
            out = self._taps(window, segment_ids) if self._is_plain() else self._call(window, segment_ids)
        if cache is not None:
            record_inputs(cache, self.layer_idx, window, x.shape[1])
            if attention_mask is None:
                state = window[:, -self.kernel_size :]
            else:
                last = kept.sum(1)[:, None] + torch.arange(self.kernel_size, device=x.device)
                state = window.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
            keep_conv_state(cache, self.layer_idx, state.transpose(1, 2))
        if attention_mask is not None:
            # Padding has the output of the real token before it, or of the first one.
            position = (kept.long().cumsum(1) - 1).clamp_min(kept.shape[1] - length)
            out = out.gather(1, position[..., None].expand_as(out))
        out = out if gate is None else torch.addcmul(hidden_states, out, gate)
        return out if pending is None else out[:, -length:]

    def _convolve_shard(
        self,
        hidden_states: torch.Tensor,
        pending: torch.Tensor,
        shard: ContextShard,
        segment_ids: torch.Tensor | None,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """Convolve a shard without padding, and its first tokens again when the inputs before them have come."""
        out = self.convolve(hidden_states, None, None, segment_ids, gate)
        first = slice(0, self.kernel_size - 1)
        start, _, ids, its_gate = put_inputs_before(
            shard,
            pending,
            hidden_states[:, first],
            None,
            None if segment_ids is None else segment_ids[:, first],
            None if gate is None else gate[:, first],
        )
        start = self.convolve(start, None, None, ids, its_gate)[:, self.kernel_size - 1 :]
        return torch.cat([start, out[:, self.kernel_size - 1 :]], dim=1)

    def _has_kernel(self, x: torch.Tensor) -> bool:
        """Return whether to let Triton's kernel do what `_taps` does, from the first token on.

        torch.compile makes as fast a kernel of the taps, together with what stands before and after them.
        """
        wanted = self.backend == "triton" or (self.backend == "auto" and x.is_cuda)
        wanted = wanted and not torch.compiler.is_compiling()
        return wanted and self._is_plain() and triton_unavailable_reason(x.device, x.dtype, 16, 16) is None

    def _is_plain(self) -> bool:
        """Return whether reading the weights of `conv` does all that calling it would: no adapter, no hooks."""
        conv = self.conv
        hooked = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks
        return type(conv) is nn.Conv1d and not hooked

    def _call(self, window: torch.Tensor, segment_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return what `_taps` does, by a call of `conv`, which may be a module that an adapter has put there."""
        if segment_ids is None:
            return self.conv(window[:, 1:].transpose(1, 2)).transpose(1, 2).to(window.dtype)
        # Each token's window by itself, without what belongs to other sequences: [B, T, size, kernel_size]
        windows = window.unfold(1, self.kernel_size, 1)[:, 1:]
        before = F.pad(segment_ids, (self.kernel_size, 0), value=-1).unfold(1, self.kernel_size, 1)[:, 1:]
        windows = windows * (before == segment_ids[..., None])[:, :, None]
        return self.conv(windows.flatten(0, 1)).view(*segment_ids.shape, -1).to(window.dtype)

    def _taps(self, window: torch.Tensor, segment_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return the convolution of [B, kernel_size + T, size], tap by tap: [B, T, size].

        Faster than `F.conv1d` in groups of one channel, and torch.compile makes one kernel of it and of what follows.
        No tap reaches into another sequence of `segment_ids`, [B, T]. Like `F.conv1d` it rounds to the window's dtype
        once, at the end.
        """
        size, length = self.kernel_size, window.shape[1] - self.kernel_size
        taps, bias = self.conv.weight[:, 0].unbind(-1), self.conv.bias  # [size] each; the last tap is for the token
        narrow = taps[0].dtype in (torch.bfloat16, torch.float16)  # products and sums are float32 all the same
        if bias is not None:
            out = torch.addcmul(bias.float() if narrow else bias, window[:, size:], taps[-1])
        else:
            out = window[:, size:] * (taps[-1].float() if narrow else taps[-1])
        for distance in range(1, size):
            earlier = window[:, size - distance : -distance]
            if segment_ids is not None:
                same = segment_ids == F.pad(segment_ids, (distance, 0), value=-1)[:, :length]
                earlier = earlier * same[..., None]
            out = torch.addcmul(out, earlier, taps[-1 - distance])
        return out.to(window.dtype)


class ReBasedShortConv(ReBasedCausalConv):
    """Compute BaseConv (Arora et al., 2023), the short convolution that alternates with ReBased in the paper.

    It is y = conv(u) * (W u + b) + u. This residual belongs to the mixer and comes on top of the layer's.
    """

    def __init__(self, config: ReBasedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        size = config.hidden_size
        self.proj = nn.Linear(size, size)
        self.conv = nn.Conv1d(size, size, self.kernel_size, groups=size, bias=config.conv_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        segment_ids: torch.Tensor | None = None,
        shard: ContextShard | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map [B, T, hidden_size] to the same shape. The other arguments are those of `convolve`."""
        gate = self.proj(hidden_states)
        return self.convolve(hidden_states, attention_mask, cache, segment_ids, gate, shard)


class ReBasedGatedConv(ReBasedCausalConv):
    """Compute the short convolution of Based's released models (Arora et al., 2024).

    y = W_o (silu(conv(u_1)) * u_2) + b_o with u_1, u_2 = W_i u + b_i, both `conv_intermediate_size` wide.
    """

    def __init__(self, config: ReBasedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        size = config.conv_intermediate_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * size)
        self.conv = nn.Conv1d(size, size, self.kernel_size, groups=size, bias=config.conv_bias)
        self.out_proj = nn.Linear(size, config.hidden_size)
        self.out_proj.scaled_by_depth = True  # read by _init_weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        segment_ids: torch.Tensor | None = None,
        shard: ContextShard | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map [B, T, hidden_size] to the same shape. The other arguments are those of `convolve`."""
        convolved, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        convolved = self.convolve(convolved, attention_mask, cache, segment_ids, shard=shard)
        return self.out_proj(F.silu(convolved) * gate)


# Tokens after which a gate, as it starts, leaves 1 / e of a weight: sigmoid(log n) = n / (n + 1), nearly exp(-1 / n).
GATE_MEMORY = 8192


class ReBasedLinearAttention(nn.Module):
    """Compute linear attention with the configured kernel: ReBased's (q.k)^2 with a learnt norm, or Based's."""

    def __init__(self, config: ReBasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.feature_dim = config.feature_dim
        self.head_dim = config.head_dim
        self.coefficients = config.coefficients
        self.eps = config.attention_eps
        self.normalized = config.normalize
        self.backend = config.kernel_backend
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.heads = heads, kv_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.feature_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.feature_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.norm_by_head = config.qk_norm_scope == "head"
        self.q_norm = ReBasedQKNorm(self.feature_dim if self.norm_by_head else heads * self.feature_dim, config)
        self.k_norm = None
        if not config.qk_norm_shared:
            self.k_norm = ReBasedQKNorm(self.feature_dim if self.norm_by_head else kv_heads * self.feature_dim, config)
        self.decay_proj = None
        if config.decay is not None:
            self.decay_proj = nn.Linear(config.hidden_size, kv_heads)
            self.decay_proj.starts_open = True  # read by _init_weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        linear_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cu_seqlens: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        shard: ContextShard | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """
        Args:
            hidden_states (`torch.Tensor`): [B, T, hidden_size].
            attention_mask (`torch.Tensor`, *optional*): [B, T], 0 at padding.
            cache (`Cache`, *optional*): holds the state, float32 [B, H_kv, n_features, D + 1].
            linear_position_embeddings (`tuple[torch.Tensor, torch.Tensor]`, *optional*): cos and sin, [B, T, F].
            cu_seqlens, segment_ids (`torch.Tensor`, *optional*): [N + 1], bounds of packed sequences, and [B, T], the
                number of each token's.
            shard (`ContextShard`, *optional*): the tokens' place, if other ranks hold what comes before them.

        Returns:
            `tuple[torch.Tensor, None]`: [B, T, hidden_size], and no attention weights.
        """
        values = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        output = self.attend(
            hidden_states,
            values,
            attention_mask,
            cache,
            linear_position_embeddings,
            cu_seqlens,
            segment_ids,
            shard,
        )
        return self.o_proj(output.flatten(-2)), None

    def attend(
        self,
        hidden_states: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        cu_seqlens: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        shard: ContextShard | None = None,
    ) -> torch.Tensor:
        """Map [B, T, hidden_size] and values [B, T, H_kv, D] to [B, T, H, D]."""
        options: dict[str, Any] = {"coefficients": self.coefficients, "backend": self.backend}
        q_norm, k_norm = self.q_norm, self.k_norm if self.k_norm is not None else self.q_norm
        split = (-1, self.feature_dim)
        rotate = position_embeddings is not None
        if position_embeddings is not None:
            cos, sin = (part.unsqueeze(2) for part in position_embeddings)
        log_decay = None  # [B, T, H_kv]
        if self.decay_proj is not None:
            log_decay = F.logsigmoid(self.decay_proj(hidden_states).float())
        k = self.k_proj(hidden_states)
        k = k_norm(k.unflatten(-1, split)) if self.norm_by_head else k_norm(k).unflatten(-1, split)
        k = k * cos + rotate_half(k) * sin if rotate else k
        k = k.to(values.dtype)  # under autocast the norms are in float32 and the projections not
        if shard is not None:  # the states of the other ranks come in while the queries are computed
            options |= {
                "scale": self.feature_dim**-0.5,
                "attention_mask": attention_mask,
                "normalized": self.normalized,
            }
            pending = send_state(k, values, shard, **options)
        q = self.q_proj(hidden_states)
        q = q_norm(q.unflatten(-1, split)) if self.norm_by_head else q_norm(q).unflatten(-1, split)
        q = q * cos + rotate_half(q) * sin if rotate else q
        q = q.to(values.dtype)
        options["eps"] = self.eps
        if shard is not None:
            options |= {"cu_seqlens": cu_seqlens, "segment_ids": segment_ids}
            return attend_shard(q, k, values, shard, pending, **options)
        state = recurrent_state(cache, self.layer_idx)
        if cache is not None:
            record_recurrence(cache, self.layer_idx, k, values, attention_mask, log_decay, options)
        training = torch.is_grad_enabled() and (q.requires_grad or values.requires_grad)
        if state is not None and q.shape[1] == 1 and not training:
            output = rebased_attention_decode(
                q, k, values, state, attention_mask=attention_mask, log_decay=log_decay, **options
            )
        else:
            output, state = rebased_attention(
                q,
                k,
                values,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                segment_ids=segment_ids if cu_seqlens is None else None,
                initial_state=state,
                output_final_state=cache is not None,
                normalized=self.normalized,
                log_decay=log_decay,
                **options,
            )
            if cache is not None:
                keep_recurrent_state(cache, self.layer_idx, state)
        return output

    def compile_ahead(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        cu_seqlens: torch.Tensor | None,
        training: bool,
    ) -> None:
        """Start to compile the kernels that `attend` needs for such inputs, in threads, and return at once.

        For training the kernels of the backward pass are compiled too. `attend` finds them by the dtypes, shapes and
        strides of its tensors. Where it has others, as with heads split over ranks, it compiles what it needs.
        """
        device, dtype = hidden_states.device, hidden_states.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        sizes, decays = (self.feature_dim, self.head_dim), self.decay_proj is not None
        if self.backend == "eager" or triton_unavailable_reason(device, dtype, *sizes, decays) is not None:
            return
        (batch, length, _), (heads, kv_heads) = hidden_states.shape, self.heads
        q, k, values = (
            torch.empty(batch, length, n, size, dtype=dtype, device=device, requires_grad=training)
            for n, size in ((heads, self.feature_dim), (kv_heads, self.feature_dim), (kv_heads, self.head_dim))
        )
        log_decay = torch.zeros(batch, length, kv_heads, device=device) if decays else None
        with compiling_only():
            rebased_attention(
                q,
                k,
                values,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                initial_state=recurrent_state(cache, self.layer_idx),
                output_final_state=cache is not None,
                normalized=self.normalized,
                log_decay=log_decay,
                coefficients=self.coefficients,
                backend=self.backend,
                eps=self.eps,
            )


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeat each head n_rep times in a row: [B, H_kv, T, D] to [B, H_kv * n_rep, T, D]."""
    return hidden_states if n_rep == 1 else hidden_states.repeat_interleave(n_rep, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention by its definition and return its weights too (`attn_implementation="eager"`).

    It maps query [B, H, T, D], key and value [B, H_kv, S, D] to [B, T, H, D] and weights [B, H, T, S], in query's
    dtype. The mask [B or 1, 1, T, S] is added to the scores. The softmax is in float32, or in float64 for float64
    inputs, whose masks have numbers beyond the range of float32.
    """
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=computation_dtype(query)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def build_softmax_qk_norms(config: ReBasedConfig) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the norms of a softmax layer's queries and keys per head, with gains that all heads share (Qwen3)."""
    if not config.softmax_qk_norm:
        return None, None
    return ReBasedRMSNorm(config.head_dim, config.norm_eps), ReBasedRMSNorm(config.head_dim, config.norm_eps)


def softmax_attention(
    module: nn.Module,
    norms: tuple[nn.Module | None, nn.Module | None],
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Map query [B, T, H * D], key [B, T, H_kv * D], values [B, T, H_kv, D] to [B, T, H, D] and weights, if any."""
    query, key = query.unflatten(-1, (-1, module.head_dim)), key.unflatten(-1, (-1, module.head_dim))
    q_norm, k_norm = norms
    if q_norm is not None and k_norm is not None:
        query, key = q_norm(query), k_norm(key)
    query, key, values = query.transpose(1, 2), key.transpose(1, 2), values.transpose(1, 2)
    if position_embeddings is not None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if cache is not None:
        key, values = cache.update(key, values, module.layer_idx)
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    return attention_interface(
        module,
        query,
        key,
        values,
        attention_mask,
        dropout=0.0,
        scaling=module.head_dim**-0.5,
        sliding_window=module.sliding_window,
        **kwargs,
    )


class ReBasedSoftmaxAttention(nn.Module):
    """Compute softmax attention over all tokens or over a window."""

    is_causal = True

    def __init__(self, config: ReBasedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = build_softmax_qk_norms(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map [B, T, hidden_size] to the same shape, and return the attention weights if there are any."""
        output, weights = softmax_attention(
            self,
            (self.q_norm, self.k_norm),
            self.q_proj(hidden_states),
            self.k_proj(hidden_states),
            self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)),
            attention_mask,
            cache,
            position_embeddings,
            **kwargs,
        )
        return self.o_proj(output.flatten(-2)), weights


class ReBasedHybridAttention(ReBasedLinearAttention):
    """Mix ReBased over the whole past and softmax over a window, on the same values, head by head.

    The output is sigmoid(gate) * o_rebased + (1 - sigmoid(gate)) * o_window. Each head has a learnt gate, which starts
    at 0.
    """

    is_causal = True

    def __init__(self, config: ReBasedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window = config.sliding_window
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.window_q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.window_k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.window_q_norm, self.window_k_norm = build_softmax_qk_norms(config)
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        linear_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        window_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the arguments of both attention classes: `window_mask` for softmax, `attention_mask` for ReBased."""
        values = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        linear = self.attend(
            hidden_states,
            values,
            attention_mask,
            cache,
            linear_position_embeddings,
            cu_seqlens,
            segment_ids,
        )
        window, weights = softmax_attention(
            self,
            (self.window_q_norm, self.window_k_norm),
            self.window_q_proj(hidden_states),
            self.window_k_proj(hidden_states),
            values,
            window_mask,
            cache,
            position_embeddings,
            **kwargs,
        )
        output = torch.lerp(window, linear, self.gate.sigmoid()[:, None].to(linear.dtype))
        return self.o_proj(output.flatten(-2)), weights


class ReBasedMLP(nn.Module):
    """Compute down(act(up(x))), or with `mlp_type="swiglu"` down(act(gate(x)) * up(x))."""

    def __init__(self, config: ReBasedConfig):
        super().__init__()
        hidden_size, intermediate_size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if config.mlp_type == "swiglu" else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        # Read by _init_weights. The library does not hand it custom modules without parameters of their own, such as
        # this one.
        self.down_proj.scaled_by_depth = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, T, hidden_size] to the same shape."""
        up, gate = self.up_proj(x), self.gate_proj(x) if self.gate_proj is not None else None
        if self.training and up.is_cuda and torch.is_grad_enabled():
            # The backward pass computes the activation again: a few percent slower, with a quarter less memory in all.
            return checkpoint(self._activate, up, gate, use_reentrant=False, preserve_rng_state=False)
        return self._activate(up, gate)

    def _activate(self, up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return self.down_proj(self.act_fn(up) if gate is None else self.act_fn(gate) * up)


# The keywords that `forward` takes besides its own arguments: what the library passes to every model and to the loss
# of a language model, and a tokenizer's output that says nothing to a model of one kind of token.
KEYWORDS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        *inspect.signature(ForCausalLMLoss).parameters,
        "return_dict",
        "skip_logits",  # of the language model; Trainer gives it to every head in evaluation with `use_liger_kernel`
        "token_type_ids",
        "tokenizer",  # `transformers serve` gives it to `generate`, which passes it on to every model
    }
    - {"logits", "labels", "vocab_size", "kwargs"}
)
# Makes the library leave out the masks of a step: it takes a mask of four dimensions for one that is made already.
NO_MASK = torch.empty(0, 0, 0, 0)
CONV_CLASSES: dict[str, type[nn.Module]] = {"residual": ReBasedShortConv, "gated": ReBasedGatedConv}
ATTENTION_CLASSES: dict[str, type[nn.Module]] = {
    "linear_attention": ReBasedLinearAttention,
    "sliding_attention": ReBasedSoftmaxAttention,
    "full_attention": ReBasedSoftmaxAttention,
    "hybrid_sliding": ReBasedHybridAttention,
}


class ReBasedDecoderLayer(GradientCheckpointingLayer):
    """Compute x = x + mixer(norm(x)), then x = x + mlp(norm(x)), or x + norm(x) with mlp_type "none"."""

    def __init__(self, config: ReBasedConfig, layer_idx: int):
        super().__init__()
        self.is_conv = config.layer_types[layer_idx] == "conv"
        if self.is_conv:
            self.conv = CONV_CLASSES[config.conv_type](config, layer_idx)
        else:
            self.self_attn = ATTENTION_CLASSES[config.layer_types[layer_idx]](config, layer_idx)
        self.mlp = nn.Identity() if config.mlp_type == "none" else ReBasedMLP(config)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.dropout = nn.Dropout(config.residual_dropout)  # a module, which TRL finds where it switches dropout off

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Map [B, T, hidden_size] to the same shape."""
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.is_conv:
            hidden_states = self.conv(hidden_states, attention_mask=attention_mask, cache=cache, **kwargs)
        else:
            hidden_states, _ = self.self_attn(hidden_states, attention_mask=attention_mask, cache=cache, **kwargs)
        if self.dropout.training:  # in generation, calls that do nothing add up to 0.4 ms per token of 20 layers
            hidden_states = self.dropout(hidden_states)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        if self.dropout.training:
            hidden_states = self.dropout(hidden_states)
        return residual + hidden_states


class ReBasedPreTrainedModel(PreTrainedModel):
    """Hold what the model and its heads share: what they support, how weights start, and how masks are made."""

    config: ReBasedConfig
    config_class = ReBasedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReBasedDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": ReBasedDecoderLayer,
        "attentions": [ReBasedSoftmaxAttention, ReBasedHybridAttention],
    }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model as the library does.

        Raises:
            OSError: a file of weights is cut short or is no safetensors file. The library's own error names no file.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            from safetensors import SafetensorError

            if not isinstance(error, SafetensorError) or pretrained_model_name_or_path is None:
                raise
            message = _about_damaged_weights(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            raise OSError(f"{message} safetensors says: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the model as the library does, with an entry for every head, whose code lies beside the weights.

        The library itself names only the class that is saved.
        """
        self.config.auto_map = AUTO_MAP | (getattr(self.config, "auto_map", None) or {})
        super().save_pretrained(save_directory, *args, **kwargs)

    def set_context_parallel_group(self, group: Any) -> None:
        """Split sequences over the ranks of a process group: context parallelism.

        From now on each rank calls the model with its own shard, consecutive tokens of every row, in the order of the
        ranks. Hidden states, logits and gradients are those of one process with all tokens, without a cache.
        `shard_sequence` splits a batch. Every rank must take part in every forward and backward pass.

        Args:
            group (`ProcessGroup` or one-dimensional `DeviceMesh`): The ranks. `None` ends it.

        Raises:
            `ValueError`: the model has layers other than "conv" and "linear_attention", a decay, or a head that reads
                the whole sequence at once.
        """
        if group is not None:
            check_layers(self.config.layer_types)
            if self.config.decay is not None:
                raise ValueError(
                    f"Context parallelism takes models without a decay, but this one has "
                    f"`decay={self.config.decay!r}`. What a shard leaves of the state before it is not exchanged."
                )
            if isinstance(self, (GenericForSequenceClassification, GenericForQuestionAnswering)):
                raise ValueError(
                    f"{type(self).__name__} cannot be split over ranks: its head reads the whole sequence at once."
                )
        self.base_model.context_group = None if group is None else group_name(group)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            # torch's own initialisation, as in the authors' code: the library's is for wide kernels.
            bound = 1 / math.sqrt(module.kernel_size[0])
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear) and getattr(module, "starts_open", False):
            init.constant_(module.bias, math.log(GATE_MEMORY))
        elif isinstance(module, nn.Linear) and getattr(module, "scaled_by_depth", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, ReBasedQKNorm):
            if module.weight is not None:
                init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ReBasedHybridAttention):
            init.zeros_(module.gate)

    @staticmethod
    @either_cache_name
    def create_masks_for_generate(
        config: ReBasedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:
        """Make the masks for the kinds of layer in this model. `generate` calls this too, before a compiled forward.

        Returns:
            `dict[str, torch.Tensor | None]`: "linear_attention" [B, T], for all recurrent layers;
            "full_attention" and "sliding_attention", as the attention implementation takes them. `None` masks nothing.
        """
        counter = prepare_cache(cache, config, inputs_embeds) if cache is not None else None
        attention_mask, padding_mask = fit_mask(config, inputs_embeds, attention_mask, cache, counter)
        return create_masks(config, inputs_embeds, attention_mask, padding_mask, cache, None)


def _about_damaged_weights(source: str | os.PathLike, subfolder: str) -> str:
    """Return a message about the damaged safetensors files of `source`, a folder or a name on the Hub."""
    from safetensors import SafetensorError, safe_open

    folder = Path(source, subfolder)
    if not folder.is_dir():
        return (
            f"A weight file of {str(source)!r} is cut short or damaged. Download it again: "
            "from_pretrained(..., force_download=True)."
        )
    damaged = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            damaged.append(f"{path.name} ({path.stat().st_size:,} bytes)")
    return (
        f"The folder {str(folder)!r} holds weights that are cut short or damaged: {', '.join(damaged)}. Copy or "
        "download them again. A file of about 130 bytes is a pointer of Git LFS: `git lfs pull` fetches the weights."
    )


class ReBasedModel(ReBasedPreTrainedModel):
    """Compute the last hidden states of token ids: the model without a head.

    Args:
        config (`ReBasedConfig`): the configuration.
    """

    def __init__(self, config: ReBasedConfig):
        config.validate()  # again: `from_pretrained(..., num_hidden_layers=2)` sets fields of a finished configuration
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([ReBasedDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = build_norm(config)
        self.rotary_emb = self.linear_rotary_emb = None
        if config.position_embedding_type == "rope":
            self.rotary_emb = ReBasedRotaryEmbedding(config)
            if config.rope_linear_attention:
                self.linear_rotary_emb = ReBasedLinearRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._compiled_ahead: set[bool] = set()  # whether for training, see `_compile_ahead`
        self.context_group: str | None = None  # the name of a process group, see `set_context_parallel_group`
        self.post_init()

    @either_cache_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor`, *optional*): [B, T].
            attention_mask (`torch.Tensor`, *optional*): [B, cached + T] or [B, T], 0 at padding, left, right or
                between, also inside packed sequences. Or the masks that `create_masks_for_generate` made. Softmax
                windows count columns, as everywhere in transformers: padding between tokens takes room in them. A
                model of softmax layers only also takes a ready mask [B, 1, T, cached + T] or a `BlockMask`.
            position_ids (`torch.LongTensor`, *optional*): [B, T] or [1, T]. By default each row's real tokens are
                counted from 0, on from what the cache holds. Where they restart they mark packed sequences, in a batch
                of 1 and without a cache. Compiled code cannot see whether they do: it takes them as packed and returns
                no cache unless it is given one.
            cache (`Cache`, *optional*): `DynamicCache(config=...)` or `StaticCache(config=..., ...)`, by the name
                `cache` or `past_key_values` on every release of transformers. A cache of one row serves any batch.
            inputs_embeds (`torch.FloatTensor`, *optional*): [B, T, hidden_size], instead of `input_ids`.
            use_cache (`bool`, *optional*): whether to return a cache.
            cu_seq_lens_q (`torch.LongTensor`, *optional*): [N + 1], bounds of packed sequences, as
                `DataCollatorWithFlattening` makes them.
            seq_idx (`torch.LongTensor`, *optional*): [B, T], the number of each token's packed sequence.

        Returns:
            `BaseModelOutputWithPast`: last_hidden_state [B, T, hidden_size].

        Raises:
            `TypeError`: a keyword that neither this model nor the library knows, or a cache that is no `Cache`.
            `ValueError`: arguments of a wrong shape, or that contradict one another or the cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        self._check_arguments(inputs_embeds, position_ids, cache, kwargs)

        masks, position_ids, packing, shard, cache = self._prepare_batch(
            inputs_embeds, attention_mask, position_ids, cache, use_cache, kwargs
        )

        if self.embed_positions is not None:
            self._check_positions(position_ids)
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        hidden_states = self.dropout(inputs_embeds)
        position_embeddings = linear_position_embeddings = None
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        if self.linear_rotary_emb is not None:
            linear_position_embeddings = self.linear_rotary_emb(hidden_states, position_ids)

        if shard is None:
            self._compile_ahead(hidden_states, masks.get("linear_attention"), cache, packing)

        for layer_type, layer in zip(self.config.layer_types_in_use, self.layers):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type if layer_type in masks else "linear_attention"],
                window_mask=masks["sliding_attention"] if layer_type == "hybrid_sliding" else None,
                position_embeddings=position_embeddings,
                linear_position_embeddings=linear_position_embeddings,
                # FlashAttention reads the bounds of packed sequences from these, if from nothing else.
                position_ids=position_ids if packing is None else packing.columns,
                cache=cache,
                cu_seqlens=packing.cu_seqlens if packing is not None else None,
                segment_ids=packing.segment_ids if packing is not None else None,
                shard=shard,
                **kwargs,
            )
        if kwargs.get("output_attentions", self.config.output_attentions):
            self._warn_of_missing_attentions()
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _compile_ahead(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        packing: Packing | None,
    ) -> None:
        """Start to compile the kernels of attention in the first call, before other layers wait for their kernels."""
        if not is_plain(hidden_states) or hidden_states.shape[1] == 1:
            return
        training = self.training and torch.is_grad_enabled()
        if training in self._compiled_ahead or not can_compile_ahead(hidden_states.device):
            return
        self._compiled_ahead.add(training)
        attention = next((m for m in self.modules() if isinstance(m, ReBasedLinearAttention)), None)
        if attention is not None and (packing is None or packing.cu_seqlens is not None):
            cu_seqlens = packing.cu_seqlens if packing is not None else None
            attention.compile_ahead(hidden_states, attention_mask, cache, cu_seqlens, training)

    def _check_arguments(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> None:
        for name, value in kwargs.items():
            if name not in KEYWORDS and value is not None:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}.")
        if torch.jit.is_tracing():
            raise NotImplementedError("`torch.jit.trace` cannot follow this model. Use `torch.export.export` instead.")
        size = self.config.hidden_size
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != size:
            raise ValueError(
                f"`input_ids` must be [batch, tokens], or `inputs_embeds` [batch, tokens, {size}], but the embeddings "
                f"have the shape {tuple(inputs_embeds.shape)}."
            )
        batch, length = inputs_embeds.shape[:2]
        if length == 0:
            raise ValueError("`input_ids` or `inputs_embeds` must have at least one token per row, but it has 0.")
        # `!=`, since torch.compile takes a dynamic size for one that is not `in` a tuple of equal sizes
        if position_ids is not None and position_ids.shape != (batch, length) and position_ids.shape != (1, length):
            raise ValueError(
                f"`position_ids` must be [batch, tokens] = ({batch}, {length}) or (1, {length}), but its shape is "
                f"{tuple(position_ids.shape)}."
            )
        if kwargs.get("cu_seq_lens_q") is None and kwargs.get("cu_seq_lens_k") is not None:
            raise ValueError("`cu_seq_lens_k` needs `cu_seq_lens_q`, which has the bounds of packed sequences.")
        if kwargs.get("is_causal") is False and self.config.is_recurrent:
            raise ValueError("`is_causal=False` is not possible: a recurrent layer sees only what came before.")
        if self.context_group is not None:
            if cache is not None:
                raise ValueError(f"`{CACHE_NAME}` cannot be used by a model whose sequences are split over ranks.")
            if kwargs.get("cu_seq_lens_q") is not None:
                raise ValueError(
                    "`cu_seq_lens_q` cannot be used by a model whose sequences are split over ranks. Give `seq_idx`, "
                    "which `shard_sequence` makes of it."
                )
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                f"`{CACHE_NAME}` cannot be used in training with gradient checkpointing, which runs every layer "
                "twice. Call `model.gradient_checkpointing_disable()`, or give the tokens of the cache as well."
            )

    def _prepare_batch(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[dict[str, torch.Tensor | None], torch.Tensor | None, Packing | None, ContextShard | None, Cache | None]:
        """Work out what the layers need to know of a batch, and count its tokens in the cache.

        Takes the arguments of `forward` as they were given. Returns the masks by kind of layer, the positions, how
        sequences are packed, this rank's part of them, and the cache.
        """
        counter = prepare_cache(cache, self.config, inputs_embeds) if cache is not None else None
        masks = packing = padding_mask = shard = None
        if isinstance(attention_mask, dict):  # by `create_masks_for_generate`, ahead of a compiled forward
            masks = attention_mask
            attention_mask = padding_mask = masks.get("linear_attention")
        elif attention_mask is not None and not self.config.is_recurrent and getattr(attention_mask, "ndim", 0) != 2:
            # A ready mask [B, 1, T, S] or a `BlockMask`, which also says what packing would.
            masks = dict.fromkeys(("full_attention", "sliding_attention"), attention_mask)
            attention_mask = None
        else:
            attention_mask, padding_mask = fit_mask(self.config, inputs_embeds, attention_mask, cache, counter)
            packing = find_packing(
                inputs_embeds,
                position_ids,
                padding_mask,
                kwargs.get("cu_seq_lens_q"),
                kwargs.get("seq_idx"),
                continues=cache is not None,
            )
        if packing is not None and cache is not None:
            raise ValueError(f"Packed sequences (`{packing.given_by}`) cannot continue from `{CACHE_NAME}`.")

        if self.context_group is not None:
            shard = locate_shard(
                self.context_group,
                inputs_embeds,
                self.config.conv_kernel_size if "conv" in self.config.layer_types else 1,
                padding_mask,
                packing,
                position_ids,
                kwargs.get("seq_idx"),
            )
        elif use_cache and cache is None and packing is None:
            cache = DynamicCache(config=self.config)
            counter = prepare_cache(cache, self.config, inputs_embeds)

        if masks is None:
            masks = create_masks(self.config, inputs_embeds, attention_mask, padding_mask, cache, packing)
        if position_ids is None and self.config.position_embedding_type != "none":
            position_ids = count_positions(inputs_embeds, attention_mask, packing, cache, counter)
            if shard is not None:
                position_ids = shard.count_on(position_ids, padding_mask)
        if counter is not None:
            counter.update(padding_mask, inputs_embeds.shape[1])
        return masks, position_ids, packing, shard, cache

    def _warn_of_missing_attentions(self) -> None:
        if self.config.is_purely_recurrent:
            logger.warning_once(
                "`output_attentions=True`: no layer of this model has attention weights to return, since its layers "
                f"are {sorted(set(self.config.layer_types))}."
            )
        elif self.config._attn_implementation != "eager":
            logger.warning_once(
                "`output_attentions=True`: attention weights need `attn_implementation='eager'`, but the model has "
                f"{self.config._attn_implementation!r}."
            )

    def _check_positions(self, position_ids: torch.Tensor) -> None:
        # On a GPU the embedding itself complains; asking first would make the host wait.
        if position_ids.device.type == "cpu" and not is_tracing(position_ids):
            last = int(position_ids.max())
            if last >= self.config.max_position_embeddings:
                raise ValueError(
                    f"A token has position {last}, but learned positions end at `max_position_embeddings` - 1 = "
                    f"{self.config.max_position_embeddings - 1}."
                )


def _let_generate_check_late() -> None:
    """Let `generate` look one step late on an NVIDIA GPU whether it should stop, with caches that it made for ReBased.

    The host prepares a step while the GPU still computes the one before it. A step after the last one may run, whose
    token is dropped. transformers does this on Apple's GPUs only: `DeferredStopCheck.is_supported` says where.
    """
    check = getattr(generation_utils, "DeferredStopCheck", None)
    if check is None or getattr(check.is_supported, "knows_rebased", False):  # from another copy of this file
        return
    is_supported = check.is_supported

    def also_supported(
        device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool = False, **kwargs: Any
    ) -> bool:
        if device.type == "cuda" and getattr(cache, "may_check_late", False):
            return not cache_is_returned and not is_assistant
        return is_supported(device, cache, cache_is_returned, is_assistant=is_assistant, **kwargs)

    also_supported.knows_rebased = True  # type: ignore[attr-defined]
    check.is_supported = staticmethod(also_supported)


_let_generate_check_late()


class ReBasedForCausalLM(ReBasedPreTrainedModel, GenerationMixin):
    """Add a language-modelling head to ReBased.

    Args:
        config (`ReBasedConfig`): the configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ReBasedConfig):
        super().__init__(config)
        self.model = ReBasedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._kept_layers: dict[tuple, list] = {}  # see `_keep_states`
        self.post_init()

    def _get_name(self) -> str:
        """Return the name by which Trainer finds the class, also where FSDP has made a subclass of another name."""
        return ReBasedForCausalLM.__name__

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching, on which `generate_batch` is built.

        It keeps keys and values for each request and has no place for a state.

        Raises:
            `ValueError`: always; names the layer types and what to use.
        """
        raise ValueError(
            "`generate_batch` and continuous batching of transformers cannot serve a ReBased model, here with layers "
            f"of the types {sorted(set(self.config.layer_types))}. Use `generate`, or serve the model with vLLM: "
            "`pip install modeling-rebased[vllm]`, then `vllm serve FOLDER`."
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get(CACHE_NAME) is not None
        if given and not generation_config.use_cache:
            raise ValueError(
                f"`use_cache=False` feeds the whole text for each token, which `{CACHE_NAME}` would take in every "
                "time. Give only one of them."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None:
            return
        gets_drafts = GenerationMode.ASSISTED_GENERATION in (*args, *kwargs.values())
        assisted = gets_drafts or generation_config.is_assistant
        cache.may_check_late = not given and not assisted
        if self.config.is_recurrent:
            if not given and not generation_config.return_dict_in_generate:
                self._keep_states(cache)
            # Before the first token too, `generate` asks the cache for its length.
            count_layer(cache, self.config)
        if gets_drafts and given and cache.get_seq_length() > 0:
            raise ValueError(
                f"Assisted generation cannot continue from `{CACHE_NAME}`, which holds {cache.get_seq_length()} "
                "tokens: transformers feeds the model the whole prompt again. Leave the cache out, or generate "
                "without drafts."
            )
        if not assisted or not self.config.is_recurrent:
            return
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                "Assisted generation of a model with recurrent layers needs a `DynamicCache`, but the cache is a "
                f"{type(cache).__name__}."
            )
        make_croppable(cache, self.config)

    def _keep_states(self, cache: Cache) -> None:
        """Let a static cache that no caller will see use the states of the one before it, and leave them to the next.

        A state has one size whatever the number of tokens. At the same addresses, it needs no new CUDA graphs.
        """
        several_devices = len(set(getattr(self, "hf_device_map", {}).values())) > 1
        if (
            isinstance(cache, StaticCache)
            and self.config.is_purely_recurrent
            and not cache.offloading
            and not several_devices
        ):
            cache.kept_layers = self._kept_layers

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Update as the library does, without what no step reads: making masks and positions longer takes time."""
        cache = outputs.get(CACHE_NAME)
        # Assisted generation checks several tokens at once, which may need a mask.
        if cache is not None and self.config.is_purely_recurrent and not count_layer(cache, self.config).is_croppable:
            model_kwargs.pop("attention_mask", None)
            if self.config.position_embedding_type == "none":
                model_kwargs.pop("position_ids", None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare as the library does, without a mask for recurrent layers: a generated token is never padding."""
        generated = next_sequence_length == 1 and not kwargs.get("is_first_iteration")
        needs_no_mask = generated and kwargs.get(CACHE_NAME) is not None and self.config.is_purely_recurrent
        if needs_no_mask:
            kwargs["attention_mask"] = NO_MASK
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)
        if needs_no_mask:
            del inputs["attention_mask"]
        if inputs.get(CACHE_NAME) is not None:
            # PEFT looks for the older name, on every release, and would put virtual tokens before each new token. In
            # prefix tuning it puts another cache there.
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        cache, masks = inputs.get("past_key_values"), inputs.get("attention_mask")
        if cache is None or not self.config.is_recurrent:
            return inputs
        if kwargs.get("is_first_iteration"):
            self._check_turn_of_one_token(inputs.get("input_ids"), kwargs.get("attention_mask"), cache)
        if not generated or masks is None:
            return inputs
        # Where PEFT puts virtual tokens before the prompt, it makes the mask longer after this.
        if not isinstance(masks, dict) and masks.shape[1] - 1 == count_layer(cache, self.config).columns:
            sizes = torch.empty((*inputs["input_ids"].shape, 0), dtype=self.dtype, device=masks.device)
            masks = self.create_masks_for_generate(self.config, sizes, masks, cache)
        if isinstance(masks, dict):
            inputs["attention_mask"] = {**masks, "linear_attention": None}
        return inputs

    def _check_turn_of_one_token(self, ids: torch.Tensor | None, mask: Any, cache: Cache) -> None:
        """Check the mask of a turn of one token, which `forward` on a GPU would take for one that was generated."""
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and ids is not None and ids.shape[1] == 1:
            counter = count_layer(cache, self.config)
            if mask.shape[1] - 1 == counter.get_seq_length() > 0:
                check_counts(mask[:, :-1], counter)

    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: as in `ReBasedModel`.
            labels (`torch.LongTensor`, *optional*): [B, T], ids of the tokens themselves (the loss shifts them), -100
                where there is nothing to learn.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): compute the logits of the last so many
                tokens only, or of the tokens at these indices; 0 is all.
            skip_logits (`bool`, *optional*): compute the loss without storing all logits, which takes a GPU less time
                and much less memory; the output's `logits` are `None` then. By default the model does so when it is
                in training mode on a GPU and gets `labels`.

        Returns:
            `CausalLMOutputWithPast`: logits [B, T or kept, vocab_size], and the loss if there are labels.

        Raises:
            `ValueError`: labels that are not one per token, a negative `logits_to_keep`, or `skip_logits=True` where
                the loss needs the logits; the message says why.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> folder = "checkpoints/english-6m"
        >>> model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        >>> tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        >>> inputs = tokenizer("The king said", return_tensors="pt")
        >>> text = tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
        ```"""
        if labels is not None and use_cache is None and cache is None:
            # A training step is not continued: do without the final states that the configuration would ask for.
            use_cache = False
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if skip_logits is None:
            skip_logits = self.training and hidden_states.is_cuda
            skip_logits = skip_logits and self._why_logits_are_needed(hidden_states, labels, logits_to_keep) is None
        elif skip_logits and (reason := self._why_logits_are_needed(hidden_states, labels, logits_to_keep)):
            raise ValueError(
                f"`skip_logits=True` is not possible: {reason}. Trainer asks for it in evaluation if "
                "`use_liger_kernel=True`, which this model has no use for."
            )
        loss = logits = None
        if skip_logits:
            _check_labels(hidden_states, labels, kwargs.get("shift_labels"))
            loss = fused_causal_lm_loss(hidden_states, self.lm_head.weight, labels, **kwargs)
        else:
            if isinstance(logits_to_keep, int) and logits_to_keep < 0:
                raise ValueError(
                    f"`logits_to_keep` must be 0 or more, or a tensor of indices, but it is {logits_to_keep}."
                )
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
            if labels is not None:
                _check_labels(logits, labels, kwargs.get("shift_labels"))
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _why_logits_are_needed(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor
    ) -> str | None:
        """Return why this call cannot compute the loss without the logits, `None` if it can."""
        head = self.lm_head
        if labels is None:
            return "there are no `labels`"
        if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
            return "`logits_to_keep` asks for some of the logits"
        if self.loss_function is not ForCausalLMLoss:
            return "the model's loss function is not ForCausalLMLoss"
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"):
            return "`lm_head` is wrapped, adapted or hooked"
        if not can_fuse_loss(hidden_states, head.weight):
            return "it takes a GPU, Triton and an output layer that is not sharded"
        return None


def _check_labels(states: torch.Tensor, labels: torch.Tensor, shift_labels: torch.Tensor | None) -> None:
    """Compare labels with the tokens [B, T, any size] that have logits. The loss itself flattens and compares neither.

    Raises:
        `ValueError`: labels of another shape than [B, T].
    """
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given.shape != states.shape[:2]:
        raise ValueError(
            f"`{name}` must be [batch, tokens with logits] = {tuple(states.shape[:2])}, but its shape is "
            f"{tuple(given.shape)}."
        )


class ReBasedGenericHead:
    """Let the library's generic heads find their base model.

    They make it by `AutoModel.from_config`. In a checkpoint's own code that must be this file's model, whichever copy
    of the configuration file `config` comes from, without asking once more whether to trust the code.
    """

    # Read by Trainer. The loss of these heads is a mean over the batch that `forward` gets, whatever
    # `num_items_in_batch` says. So Trainer has to divide it by the number of batches that it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: ReBasedConfig):
        AutoModel.register(type(config), ReBasedModel, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]


class ReBasedForSequenceClassification(ReBasedGenericHead, GenericForSequenceClassification, ReBasedPreTrainedModel):
    """Add a classifier of sequences to ReBased. It reads the last token that is not padding."""

    forward = either_cache_name(GenericForSequenceClassification.forward)


def token_classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, config: ReBasedConfig, **kwargs: Any
) -> torch.Tensor:
    """Return the library's loss of logits [B, T, num_labels] and labels [B, T], after a look at the labels' shape."""
    _check_labels(logits, labels, None)
    return ForTokenClassification(logits, labels, config, **kwargs)


class ReBasedForTokenClassification(ReBasedGenericHead, GenericForTokenClassification, ReBasedPreTrainedModel):
    """Add a classifier of every token to ReBased."""

    def __init__(self, config: ReBasedConfig):
        super().__init__(config)
        self.loss_function = token_classification_loss

    forward = either_cache_name(GenericForTokenClassification.forward)


class ReBasedForQuestionAnswering(ReBasedGenericHead, GenericForQuestionAnswering, ReBasedPreTrainedModel):
    """Add a head to ReBased that marks the start and the end of a span as the answer to a question."""

    forward = either_cache_name(GenericForQuestionAnswering.forward)


# `save_pretrained` copies the code of a registered class, whichever way it was loaded. And transformers finds the task
# of a model by the name of its class in these tables. Trainer, for one, shifts the labels for label smoothing only if
# the name is in the first.
AUTO_MAP = {"AutoConfig": "configuration_rebased.ReBasedConfig", "AutoModel": "modeling_rebased.ReBasedModel"}
ReBasedModel.register_for_auto_class("AutoModel")
for _task, _names, _head in (
    ("CausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ReBasedForCausalLM),
    (
        "SequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ReBasedForSequenceClassification,
    ),
    ("TokenClassification", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, ReBasedForTokenClassification),
    ("QuestionAnswering", modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, ReBasedForQuestionAnswering),
):
    AUTO_MAP[f"AutoModelFor{_task}"] = f"modeling_rebased.{_head.__name__}"
    _head.register_for_auto_class(f"AutoModelFor{_task}")
    _names[ReBasedConfig.model_type] = _head.__name__


__all__ = [
    "ReBasedForCausalLM",
    "ReBasedForQuestionAnswering",
    "ReBasedForSequenceClassification",
    "ReBasedForTokenClassification",
    "ReBasedModel",
    "ReBasedPreTrainedModel",
]
