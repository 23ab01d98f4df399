"""Put the mixers of flash-linear-attention into the models of the synthetic tasks, as peers to compare with.

A peer takes the place of the linear attention and leaves the rest of the model as it is: the embedding, the short
convolution before it, the norms and the MLP. flash-linear-attention is an optional dependency.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


PEERS = ("gated_deltanet", "mamba2", "rwkv7")
HEAD = 64  # the largest head


class Peer(nn.Module):
    """Compute one mixer of flash-linear-attention in the place of this package's attention.

    Args:
        name: one of `PEERS`.
        hidden: width of the model.
        state: numbers of the recurrent state per unit of width, a power of two. RWKV-7 has at most 64, since its
            heads are square and have 64 numbers.

    Raises:
        ImportError: flash-linear-attention is not installed.
    """

    def __init__(self, name: str, hidden: int, state: int):
        super().__init__()
        layers = _layers(name)
        self.name, head = name, min(HEAD, state)
        # the library warns of what does not concern us: other kernels for Mamba-2, other code for RWKV-7
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            if name == "gated_deltanet":
                sizes = {"num_heads": hidden // head, "head_dim": head, "expand_v": state // head}
                self.layer = layers.GatedDeltaNet(hidden, **sizes)
            elif name == "mamba2":  # twice as wide inside
                self.layer = layers.Mamba2(hidden_size=hidden, head_dim=head, state_size=state // 2, backend="triton")
            else:  # the first layer, since no other of its kind gives it values
                self.layer = layers.RWKV7Attention(hidden_size=hidden, head_dim=head, layer_idx=0, num_hidden_layers=2)
        if name != "rwkv7":  # which has weights of its own
            for module in self.layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Map [B, T, hidden] to the same shape, without padding or a cache."""
        if self.name == "mamba2":
            return scan(self.layer, hidden_states), None
        return self.layer(hidden_states)[0], None


def scan(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute a Mamba-2 layer of flash-linear-attention with the kernels of that library alone.

    The layer itself needs the package mamba_ssm, or else a form that is quadratic in memory. Its recurrence is linear
    attention with a decay per head and token (Dao and Gu, 2024, arXiv 2405.21060, section 5). Where the library
    refuses the gradient of its chunked kernel, this takes the kernel that goes through the tokens one by one.

    Args:
        layer: a `Mamba2` with one group.
        hidden_states: [B, T, hidden].

    Returns:
        [B, T, hidden].
    """
    from fla.modules.convolution import causal_conv1d
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    inner, state, heads = layer.intermediate_size, layer.ssm_state_size, layer.num_heads
    gate, mixed, step = layer.in_proj(hidden_states).split([inner, layer.conv_dim, heads], dim=-1)
    mixed, _ = causal_conv1d(
        x=mixed.contiguous(), weight=layer.conv1d.weight[:, 0], bias=layer.conv1d.bias, activation="silu"
    )
    x, b, c = mixed.split([inner, state, state], dim=-1)
    x = x.unflatten(-1, (heads, layer.head_dim))
    step = F.softplus(step.float() + layer.dt_bias)  # [B, T, heads]
    decay = -layer.A_log.float().exp() * step
    key, query = (one[:, :, None].expand(-1, -1, heads, -1).contiguous() for one in (b, c))
    value = (x * step[..., None]).to(query.dtype).contiguous()
    attention = fused_recurrent_simple_gla if _refuses_chunked_gradient() else chunk_simple_gla
    y, _ = attention(q=query, k=key, v=value, g=decay, scale=1.0)
    y = y + x * layer.D[:, None]
    return layer.out_proj(layer.norm(y.flatten(-2).to(gate.dtype), gate))


def insert(model: PreTrainedModel, name: str, hidden: int, state: int) -> PreTrainedModel:
    """Replace every linear attention of a model by a peer, and return the model.

    Args:
        model: a language model of this package.
        name, hidden, state: of the peer, as `Peer` takes them.
    """
    for layer in model.base_model.layers:
        if not layer.is_conv:
            layer.self_attn = Peer(name, hidden, state)
    return model


def state_of_head(head: int) -> int:
    """Return the power of two below the numbers that ReBased's state has per unit of width with heads of this size."""
    return 1 << (((head + 1) ** 2 // 2).bit_length() - 1)


def check_peers(
    parser: argparse.ArgumentParser, models: Sequence[str], hidden: Sequence[int], state: int, save: str | None
) -> None:
    """End with an error if one of the models cannot be saved, or is a peer that cannot be built or trained here."""
    peers = [name for name in models if name in PEERS]
    if save and (others := [name for name in models if name in (*PEERS, "rebased_floor")]):
        parser.error(f"--save: only models of this package can be saved, not {', '.join(others)}")
    if not peers:
        return
    head = min(HEAD, state)
    if wrong := [size for size in hidden if size % head]:
        parser.error(f"--hidden: {', '.join(peers)} have heads of {head}, which do not divide {wrong[0]}")
    try:
        _layers(peers[0])
    except ImportError as error:
        parser.error(f"--models: {error}")
    if reason := why_untrainable(peers):
        parser.error(f"--models: {reason}")


def why_untrainable(peers: Sequence[str]) -> str | None:
    """Return why one of these peers cannot be trained on this machine, and `None` where all can."""
    if "gated_deltanet" not in peers or not _refuses_chunked_gradient():
        return None
    import triton
    from fla.ops.common.backends.tilelang import CommonTileLangBackend

    if CommonTileLangBackend.can_use():
        return None
    return (
        f"gated_deltanet cannot be trained on a Hopper GPU with Triton {triton.__version__}, which computes wrong "
        "gradients for it: install Triton 3.7.1 or newer, or tilelang beside CUDA's nvcc (pip install tilelang)"
    )


def _refuses_chunked_gradient() -> bool:
    """Tell whether flash-linear-attention raises an error in the backward pass of its chunked kernels with a decay.

    Triton 3.4 to 3.7.0 computes wrong gradients there on Hopper GPUs. With tilelang the library has other kernels,
    which serve Gated DeltaNet. They do not serve `chunk_simple_gla`, whose states are in float32.
    """
    try:
        from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1
    except ImportError:  # a release that does not know this fault
        return False
    return IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1


def _layers(name: str) -> Any:
    try:
        import fla.layers
    except ImportError as error:
        raise ImportError(
            f"the model {name!r} needs flash-linear-attention: pip install 'flash-linear-attention>=0.6' ({error})"
        ) from error
    return fla.layers
