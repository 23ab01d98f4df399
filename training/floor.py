"""Change the kernel of ReBased so that its weights can be negative, a variant for the synthetic tasks.

The weights of ReBased are (q . k_j)^2 over their sum. None is negative, so every key adds something to every answer,
and what all keys add on average is the same for every query. This variant subtracts a learnable share of the average:

    o_i = sum_j (w_ij / sum_m w_im - floor / i) v_j

Each head has one parameter, `floor`. It starts at 0, where this is ReBased; at 1 the weights of a query sum to 0. The
state has D numbers more per head, the sum of the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modeling_rebased import ReBasedForCausalLM
from modeling_rebased.modeling_rebased import ReBasedLinearAttention


class FlooredAttention(ReBasedLinearAttention):
    """Compute ReBased with a learnable floor below its weights."""

    floor: nn.Parameter  # [H]

    def attend(self, hidden_states: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map [B, T, hidden_size] and values [B, T, H, D] to [B, T, H, D], without padding or a cache."""
        output = super().attend(hidden_states, values, *args, **kwargs)
        counted = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None, None]
        mean = values.cumsum(1, dtype=torch.promote_types(values.dtype, torch.float32)) / counted
        return output - (self.floor[:, None] * mean).to(output.dtype)


def add_floor(model: ReBasedForCausalLM) -> ReBasedForCausalLM:
    """Give every linear attention of a model a floor of 0 to learn, and return the model."""
    for layer in model.model.layers:
        if not layer.is_conv:
            layer.self_attn.__class__ = FlooredAttention
            layer.self_attn.floor = nn.Parameter(torch.zeros(model.config.num_attention_heads))
    return model
