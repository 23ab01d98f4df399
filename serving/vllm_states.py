"""The recurrent layers' memory in vLLM, and the two operations on it: short convolution and linear attention.

vLLM keeps one pool of pages. A request holds one page per `StatePage`, by its slot number, for as long as it runs.
Batches come packed, without padding: first the requests that decode one token each, then those that prefill.
"""

from typing import Any

import torch
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    get_conv_copy_spec,
    get_temporal_copy_spec,
    is_conv_state_dim_first,
)
from vllm.platforms import CpuArchEnum, current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadata
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.kv_cache_interface import AttentionSpec

from modeling_rebased import rebased_attention
from modeling_rebased.attention_rebased import rebased_attention_decode
from modeling_rebased.configuration_rebased import ReBasedConfig

from .plan import state_dtypes, state_shapes


def vllm_state_shapes(config: ReBasedConfig, tensor_parallel: int) -> tuple[tuple[int, ...], ...]:
    """Return `state_shapes`, the convolutions' in the order of dimensions that vLLM is set to."""
    shapes = state_shapes(config, tensor_parallel)
    return tuple(shape[::-1] if len(shape) == 2 and is_conv_state_dim_first() else shape for shape in shapes)


def state_copy_functions(config: ReBasedConfig) -> tuple[MambaStateCopyFunc, ...]:
    """Return how prefix caching copies each state of a page."""
    return tuple(get_temporal_copy_spec if len(shape) == 3 else get_conv_copy_spec for shape in state_shapes(config))


class StatePage(nn.Module, MambaBase):
    """Hold the states of a linear layer and of some convolutions, or of one convolution: see `state_pages`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config: ReBasedConfig = vllm_config.model_config.hf_config
        self.model_dtype = vllm_config.model_config.dtype
        self.prefix = prefix
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        register_layer(prefix, self)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return vllm_state_shapes(self.config, get_tensor_model_parallel_world_size())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(state_dtypes(self.config, self.model_dtype, get_tensor_model_parallel_world_size()))

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        # What vLLM prepares for each batch: slots, bounds of packed prompts, and which of them continue.
        return MambaAttentionBackendEnum.SHORT_CONV

    @property
    def metadata(self) -> ShortConvAttentionMetadata | None:
        """Return the batch at hand; `None` in runs that only measure memory."""
        metadata = get_forward_context().attn_metadata
        return metadata.get(self.prefix) if metadata is not None else None

    @property
    def linear_states(self) -> torch.Tensor:
        """Return the states of the linear layer, float32 [slots, H_kv, n_features, D + 1], strided over slots."""
        return self.kv_cache[0]

    def conv_states(self, place: int) -> torch.Tensor:
        """Return the states of the convolutions, [slots, channels, conv_kernel_size - 1], strided."""
        state = self.kv_cache[len(self.kv_cache) - 1 - place]
        return state if is_conv_state_dim_first() else state.transpose(-1, -2)


def clear_new_pages_on_cpu() -> None:
    """Let vLLM's runner for CPUs clear new pages of sliding windows, as its runner for GPUs does.

    A page may hold a state that a former request has left. Its float32 numbers, read as keys and values in bfloat16,
    can be infinite or NaN. The attention kernel multiplies what lies behind the last token by zero, and the answer
    becomes NaN too. vLLM 0.32 clears the pages of full attention only.
    """
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def zero_block_ids(self: CPUModelRunner, block_ids: list[int]) -> None:
        for group in self.kv_cache_config.kv_cache_groups:
            if isinstance(group.kv_cache_spec, AttentionSpec):
                for name in group.layer_names:
                    pages = self.compilation_config.static_forward_context[name].kv_cache
                    pages.unflatten(0, (self.kv_cache_config.num_blocks, -1))[block_ids] = 0

    CPUModelRunner._zero_block_ids = zero_block_ids


def register_layer(prefix: str, layer: nn.Module) -> None:
    """Let vLLM's forward context find a layer by its name."""
    layers = get_current_vllm_config().compilation_config.static_forward_context
    if prefix in layers:
        raise ValueError(f"Duplicate layer name: {prefix}")
    layers[prefix] = layer


class LinearAttentionStates(nn.Module):
    """Compute ReBased attention of a packed batch, from each request's state on, and update the states.

    Args:
        config (`ReBasedConfig`): gives the kernel and its epsilon.
        page (`StatePage`): holds the states.
        prefix (`str`): the layer's name.
    """

    def __init__(self, config: ReBasedConfig, page: StatePage, prefix: str):
        super().__init__()
        self.options: dict[str, Any] = {
            "coefficients": config.coefficients,
            "eps": config.attention_eps,
            "backend": config.kernel_backend,
        }
        self.normalized = config.normalize
        self.pages = (page,)  # in a tuple, so that it is not a submodule a second time
        self.prefix = prefix
        register_layer(prefix, self)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Map q [T, H, F], k [T, H_kv, F] and v [T, H_kv, D] of all requests, one after another, to [T, H, D]."""
        output = v.new_empty(q.shape[0], q.shape[1], v.shape[2])
        torch.ops.vllm.rebased_linear_attention(q, k, v, output, self.prefix)
        return output

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor) -> None:
        metadata = self.pages[0].metadata
        if metadata is None:
            # vLLM measures the memory that a batch takes: let it see this operator's.
            out, _ = rebased_attention(
                q[None], k[None], v[None], output_final_state=True, normalized=self.normalized, **self.options
            )
            output.copy_(out[0])
            return
        states = self.pages[0].linear_states
        decoded, prefilled = metadata.num_decode_tokens, metadata.num_prefill_tokens
        if decoded:
            slots = metadata.state_indices_tensor_d[:, 0]
            # vLLM pads a batch for a CUDA graph with slot 0, which belongs to nobody; the operator with negative ones.
            slots = slots.where(slots != NULL_BLOCK_ID, -1)
            part = slice(decoded)
            out = rebased_attention_decode(
                q[part, None], k[part, None], v[part, None], states, state_indices=slots, **self.options
            )
            output[part] = out[:, 0]
        if prefilled:
            part = slice(decoded, decoded + prefilled)
            slots = metadata.state_indices_tensor_p
            # Slots of new requests hold what former ones left there.
            started = metadata.has_initial_states_p[:, None, None, None]
            out, final_states = rebased_attention(
                q[None, part],
                k[None, part],
                v[None, part],
                cu_seqlens=metadata.query_start_loc_p,
                initial_state=torch.where(started, states[slots], 0.0),
                output_final_state=True,
                normalized=self.normalized,
                **self.options,
            )
            output[part] = out[0]
            states[slots] = final_states


class ShortConvStates(nn.Module):
    """Compute a depthwise causal convolution of a packed batch, by vLLM's kernels, as its ShortConv calls them.

    Args:
        channels (`int`): of this process.
        config (`ReBasedConfig`): gives the kernel's size and whether there is a bias.
        page (`StatePage`): holds the last `conv_kernel_size - 1` inputs of each request.
        place (`int`): which of the page's convolutions this is.
        prefix (`str`): the layer's name.
    """

    def __init__(self, channels: int, config: ReBasedConfig, page: StatePage, place: int, prefix: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, config.conv_kernel_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels), requires_grad=False) if config.conv_bias else None
        self.pages = (page,)
        self.place = place
        self.prefix = prefix
        register_layer(prefix, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [T, channels] of all requests, one after another, to the same shape."""
        output = torch.empty_like(x)
        torch.ops.vllm.rebased_short_conv(x, output, self.prefix)
        return output

    def convolve(self, x: torch.Tensor, output: torch.Tensor) -> None:
        metadata = self.pages[0].metadata
        if metadata is None:
            output.copy_(x)
            return
        states, weight = self.pages[0].conv_states(self.place), self.weight[:, 0]
        decoded, prefilled = metadata.num_decode_tokens, metadata.num_prefill_tokens
        prefill, update = conv_functions()
        if decoded:
            slots = metadata.state_indices_tensor_d[:, 0].contiguous()
            # A copy, because the kernel writes over its input.
            output[:decoded] = update(
                x[:decoded].clone(), states, weight, self.bias, activation=None, conv_state_indices=slots
            )
        if prefilled:
            part = slice(decoded, decoded + prefilled)
            out = prefill(
                x[part].transpose(0, 1),
                weight,
                self.bias,
                conv_states=states,
                query_start_loc=metadata.query_start_loc_p,
                cache_indices=metadata.state_indices_tensor_p,
                has_initial_state=metadata.has_initial_states_p,
                activation=None,
                metadata=metadata,
            )
            output[part] = out.transpose(0, 1)


def conv_functions():
    """Return vLLM's convolution of packed prompts and its one of single tokens, for this machine."""
    if not current_platform.is_cpu():
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

        return causal_conv1d_fn, causal_conv1d_update
    from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu, causal_conv1d_update_cpu

    if current_platform.get_cpu_architecture() == CpuArchEnum.ARM:
        return causal_conv1d_fn_cpu, _update_on_arm
    return causal_conv1d_fn_cpu, causal_conv1d_update_cpu


def _update_on_arm(x, conv_state, weight, bias, activation, conv_state_indices):
    from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_update_torch

    state = conv_state[conv_state_indices].contiguous()
    out = causal_conv1d_update_torch(x[..., None], state, weight, bias, activation)[..., 0]
    conv_state[conv_state_indices] = state
    return out


@eager_break_during_capture
def rebased_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    get_forward_context().no_compile_layers[layer_name].attend(q, k, v, output)


@eager_break_during_capture
def rebased_short_conv(x: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].convolve(x, output)


direct_register_custom_op(
    op_name="rebased_linear_attention", op_func=rebased_linear_attention, mutates_args=["output"]
)
direct_register_custom_op(op_name="rebased_short_conv", op_func=rebased_short_conv, mutates_args=["output"])
