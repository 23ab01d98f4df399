"""The ReBased model of vLLM: its own layers, our configuration and names of weights.

From the bottom up: short convolutions, linear attention, softmax attention, both in one, the MLP, the layer and the
model. Shapes: T tokens of all requests of a batch, one request after another; H heads, F feature_dim, D head_dim.
With tensor parallelism each process has its share of the heads and channels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncsByType
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.model_executor.utils import set_weight_attrs
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from modeling_rebased.configuration_rebased import RECURRENT_LAYER_TYPES, ReBasedConfig
from modeling_rebased.modeling_rebased import ReBasedQKNorm

from .plan import state_dtypes, state_pages
from .vllm_states import (
    LinearAttentionStates,
    ShortConvStates,
    StatePage,
    clear_new_pages_on_cpu,
    state_copy_functions,
    vllm_state_shapes,
)


def build_norm(config: ReBasedConfig) -> nn.Module:
    """Return a norm of the residual stream."""
    norm = nn.LayerNorm if config.norm_type == "layernorm" else RMSNorm
    return norm(config.hidden_size, eps=config.norm_eps)


def own_share(x: torch.Tensor) -> torch.Tensor:
    """Return this process' part of the last dimension."""
    size = x.shape[-1] // get_tensor_model_parallel_world_size()
    return x.narrow(-1, get_tensor_model_parallel_rank() * size, size)


class ReBasedShortConv(nn.Module):
    """Compute conv(u) * (W u + b) + u, by channels."""

    def __init__(self, vllm_config: VllmConfig, page: StatePage, place: int, prefix: str):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        size = config.hidden_size
        self.tp_size = get_tensor_model_parallel_world_size()
        self.proj = ColumnParallelLinear(
            size, size, quant_config=vllm_config.quant_config, prefix=f"{prefix}.proj", return_bias=False
        )
        self.conv = build_conv(size, config, page, place, f"{prefix}.conv")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [T, hidden_size] to the same shape."""
        inputs = own_share(hidden_states).contiguous()
        out = self.conv(inputs) * self.proj(hidden_states) + inputs
        return tensor_model_parallel_all_gather(out) if self.tp_size > 1 else out


class ReBasedGatedConv(nn.Module):
    """Compute W_o (silu(conv(u_1)) * u_2) + b_o with u_1, u_2 = W_i u + b_i."""

    def __init__(self, vllm_config: VllmConfig, page: StatePage, place: int, prefix: str):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        size, quant_config = config.conv_intermediate_size, vllm_config.quant_config
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [size, size],
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj",
            return_bias=False,
        )
        self.conv = build_conv(size, config, page, place, f"{prefix}.conv")
        self.out_proj = RowParallelLinear(
            size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.out_proj", return_bias=False
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [T, hidden_size] to the same shape."""
        convolved, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        return self.out_proj(F.silu(self.conv(convolved.contiguous())) * gate)


def build_conv(size: int, config: ReBasedConfig, page: StatePage, place: int, prefix: str) -> ShortConvStates:
    conv = ShortConvStates(size // get_tensor_model_parallel_world_size(), config, page, place, prefix)
    for parameter in conv.parameters():
        set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
    return conv


class ReBasedLinearAttention(nn.Module):
    """Compute linear attention with the configured kernel: ReBased's or Based's."""

    def __init__(self, vllm_config: VllmConfig, page: StatePage, layer_idx: int, prefix: str):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        self.tp_size = get_tensor_model_parallel_world_size()
        self.feature_dim, self.head_dim = config.feature_dim, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sizes = [heads * self.feature_dim, kv_heads * self.feature_dim, kv_heads * self.head_dim]
        self.split = [size // self.tp_size for size in sizes]
        self.qkv_proj = MergedColumnParallelLinear(
            config.hidden_size,
            sizes,
            bias=config.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        self.norm_by_head = config.qk_norm_scope == "head"
        by_head = self.norm_by_head
        self.q_norm = ReBasedQKNorm(self.feature_dim if by_head else heads * self.feature_dim, config)
        self.k_norm = None
        if not config.qk_norm_shared:
            self.k_norm = ReBasedQKNorm(self.feature_dim if by_head else kv_heads * self.feature_dim, config)
        self.rotary_emb = None
        if config.rope_linear_attention:
            self.rotary_emb = get_rope(
                self.feature_dim, config.max_position_embeddings, rope_parameters=config.rope_parameters
            )
        self.states = LinearAttentionStates(config, page, f"{prefix}.states")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [T, hidden_size] to the same shape."""
        return self.o_proj(self.attend(positions, hidden_states)[0].flatten(1))

    def attend(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map [T, hidden_size] to [T, H, D] and to the values [T, H_kv, D]."""
        q, k, v = self.qkv_proj(hidden_states).split(self.split, dim=-1)
        q = self.normalize(q, self.q_norm)
        k = self.normalize(k, self.k_norm if self.k_norm is not None else self.q_norm)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(positions, q.contiguous(), k.contiguous())
        q, k = q.unflatten(-1, (-1, self.feature_dim)), k.unflatten(-1, (-1, self.feature_dim))
        v = v.unflatten(-1, (-1, self.head_dim))
        return self.states(q, k, v), v

    def normalize(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Map [T, H * F] to the same shape. A norm over all heads needs the other processes' heads too."""
        if self.norm_by_head:
            return norm(x.unflatten(-1, (-1, self.feature_dim))).flatten(-2)
        if self.tp_size == 1:
            return norm(x)
        return own_share(norm(tensor_model_parallel_all_gather(x.contiguous()))).contiguous()


class ReBasedSoftmaxCore(nn.Module):
    """Hold what softmax layers and windows share: norms and rotation of queries and keys, and vLLM's attention."""

    def __init__(self, vllm_config: VllmConfig, heads: int, kv_heads: int, window: int | None, prefix: str):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        self.head_dim = config.head_dim
        self.rotary_emb = None
        if config.position_embedding_type == "rope":
            self.rotary_emb = get_rope(
                self.head_dim, config.max_position_embeddings, rope_parameters=config.rope_parameters
            )
        self.attn = Attention(
            heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        positions: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_norm: nn.Module | None,
        k_norm: nn.Module | None,
    ) -> torch.Tensor:
        """Map q [T, H * D], k and v [T, H_kv * D] to [T, H * D]."""
        if q_norm is not None and k_norm is not None:
            q = q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(positions, q.contiguous(), k.contiguous())
        return self.attn(q, k, v)


def build_softmax_qk_norms(config: ReBasedConfig) -> tuple[nn.Module | None, nn.Module | None]:
    if not config.softmax_qk_norm:
        return None, None
    return RMSNorm(config.head_dim, config.norm_eps), RMSNorm(config.head_dim, config.norm_eps)


class ReBasedSoftmaxAttention(nn.Module):
    """Compute softmax attention, over all tokens or over a window."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.split = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
        self.q_norm, self.k_norm = build_softmax_qk_norms(config)
        window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.core = ReBasedSoftmaxCore(vllm_config, heads, kv_heads, window, prefix)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [T, hidden_size] to the same shape."""
        q, k, v = self.qkv_proj(hidden_states).split(self.split, dim=-1)
        return self.o_proj(self.core(positions, q, k, v, self.q_norm, self.k_norm))


class ReBasedHybridAttention(ReBasedLinearAttention):
    """Mix ReBased over the whole past and softmax over a window, of the same values, head by head."""

    def __init__(self, vllm_config: VllmConfig, page: StatePage, layer_idx: int, prefix: str):
        super().__init__(vllm_config, page, layer_idx, prefix)
        config: ReBasedConfig = vllm_config.model_config.hf_config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.window_qk_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [heads * config.head_dim, kv_heads * config.head_dim],
            bias=config.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.window_qk_proj",
            return_bias=False,
        )
        heads, kv_heads = heads // self.tp_size, kv_heads // self.tp_size
        self.window_split = [heads * config.head_dim, kv_heads * config.head_dim]
        self.window_q_norm, self.window_k_norm = build_softmax_qk_norms(config)
        self.gate = nn.Parameter(torch.empty(heads), requires_grad=False)
        set_weight_attrs(self.gate, {"weight_loader": sharded_weight_loader(0)})
        self.window = ReBasedSoftmaxCore(vllm_config, heads, kv_heads, config.sliding_window, prefix)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [T, hidden_size] to the same shape."""
        linear, values = self.attend(positions, hidden_states)
        q, k = self.window_qk_proj(hidden_states).split(self.window_split, dim=-1)
        window = self.window(positions, q, k, values.flatten(1), self.window_q_norm, self.window_k_norm)
        gate = self.gate.sigmoid()[:, None].to(linear.dtype)
        return self.o_proj(torch.lerp(window.view_as(linear), linear, gate).flatten(1))


class ReBasedMLP(nn.Module):
    """Compute down(act(up(x))), or with `mlp_type="swiglu"` down(act(gate(x)) * up(x))."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.gated = config.mlp_type == "swiglu"
        name = "gate_up_proj" if self.gated else "up_proj"
        up = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * (2 if self.gated else 1),
            bias=config.mlp_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.{name}",
            return_bias=False,
        )
        self.add_module(name, up)
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [T, hidden_size] to the same shape."""
        if not self.gated:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class ReBasedDecoderLayer(nn.Module):
    """Compute x = x + mixer(norm(x)); x = x + mlp(norm(x)). With mlp_type "none" the latter is x + norm(x)."""

    def __init__(self, vllm_config: VllmConfig, pages: list[StatePage], layer_idx: int, prefix: str):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        plan, layer_type = state_pages(config), config.layer_types[layer_idx]
        self.is_conv = layer_type == "conv"
        if self.is_conv:
            conv_class = ReBasedShortConv if config.conv_type == "residual" else ReBasedGatedConv
            page, place = plan.conv[layer_idx]
            self.conv = conv_class(vllm_config, pages[page], place, f"{prefix}.conv")
        elif layer_type not in RECURRENT_LAYER_TYPES:
            self.self_attn = ReBasedSoftmaxAttention(vllm_config, layer_idx, f"{prefix}.self_attn")
        else:
            attention = ReBasedLinearAttention if layer_type == "linear_attention" else ReBasedHybridAttention
            self.self_attn = attention(vllm_config, pages[plan.linear[layer_idx]], layer_idx, f"{prefix}.self_attn")
        self.mlp = nn.Identity() if config.mlp_type == "none" else ReBasedMLP(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [T, hidden_size] to the same shape."""
        mixer = self.conv if self.is_conv else self.self_attn
        hidden_states = hidden_states + mixer(positions, self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@support_torch_compile
class ReBasedModel(nn.Module):
    """Map token ids to the last hidden states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        # Each layer says itself whether it has a window; without this, vLLM would give one to all.
        vllm_config.cache_config.sliding_window = None
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        pages = [
            StatePage(vllm_config, f"{prefix}.layers.{layer_idx}.state_page")
            for layer_idx in state_pages(config).owners
        ]
        self.layers = nn.ModuleList(
            ReBasedDecoderLayer(vllm_config, pages, i, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = build_norm(config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map token ids and positions [T] to [T, hidden_size]."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(positions)
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        return self.norm(hidden_states)


class ReBasedForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsQuant):
    """Add a language-modelling head to ReBased, as vLLM runs it."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "window_qk_proj": ["window_q_proj", "window_k_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the states in one page, the same for every page."""
        parallel = vllm_config.parallel_config.tensor_parallel_size
        return vllm_state_shapes(vllm_config.model_config.hf_config, parallel)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Return the dtypes of these states."""
        parallel, model = vllm_config.parallel_config.tensor_parallel_size, vllm_config.model_config
        return tuple(state_dtypes(model.hf_config, model.dtype, parallel))

    def get_mamba_state_copy_func(self) -> tuple[MambaStateCopyFunc, ...]:
        """Return how prefix caching copies each of these states."""
        return state_copy_functions(self.config)

    def get_mamba_state_copy_funcs(self, mamba_types: set[MambaAttentionBackendEnum]) -> MambaStateCopyFuncsByType:
        """Return how prefix caching copies states, by kind of page; there is one kind."""
        return {mamba_type: self.get_mamba_state_copy_func() for mamba_type in mamba_types}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: ReBasedConfig = vllm_config.model_config.hf_config
        self.config = config
        if config.is_recurrent:
            clear_new_pages_on_cpu()
        self.model = ReBasedModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [T] to [T, hidden_size]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Map token ids and positions [T] to [T, hidden_size]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Map [T, hidden_size] to [T, vocab_size]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's weights; returns the names that were found."""
        stacked: dict[str, tuple[str, str | int]] = {}
        for i, layer_type in enumerate(self.config.layer_types):
            attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
            softmax = layer_type not in RECURRENT_LAYER_TYPES
            for index, name in enumerate("qkv"):
                stacked[f"{attention}.{name}_proj."] = (f"{attention}.qkv_proj.", name if softmax else index)
            for index, name in enumerate("qk"):
                stacked[f"{attention}.window_{name}_proj."] = (f"{attention}.window_qk_proj.", index)
            if self.config.mlp_type == "swiglu":
                for index, name in enumerate(("gate_proj", "up_proj")):
                    stacked[f"{mlp}.{name}."] = (f"{mlp}.gate_up_proj.", index)
        mapper = WeightsMapper(orig_to_new_stacked=stacked)
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
