"""Describe the runs of MQAR training: the model, the task and the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM

from . import mqar, mqar_checkpoint
from .floor import add_floor
from .fused_loss import linear_cross_entropy
from .peers import PEERS, insert
from .recipe import Recipe, shown


# The paper's models: a short convolution first, the mixer second. Its ablation takes parts of the normalisation away.
MODELS: dict[str, dict[str, Any]] = {
    "rebased": {"kernel": "rebased"},
    "based": {"kernel": "based"},
    "x2": {"kernel": "rebased", "normalize": False, "use_gamma": False, "use_beta": False},
    "normalized": {"kernel": "rebased", "normalize": True, "use_gamma": False, "use_beta": False},
    "gamma": {"kernel": "rebased", "normalize": False, "use_gamma": True, "use_beta": False},
    "gamma_beta": {"kernel": "rebased", "normalize": False, "use_gamma": True, "use_beta": True},
    "softmax": {"layer_types": ["conv", "full_attention"]},
    # Not the paper's: the same projections, so the same parameters, cut into fewer and wider heads.
    "rebased_6_heads": {"kernel": "rebased", "num_attention_heads": 6},
    "rebased_3_heads": {"kernel": "rebased", "num_attention_heads": 3},
    "based_3_heads": {"kernel": "based", "num_attention_heads": 3},
    # Not the paper's either, with its heads: queries and keys normalised per head, and weights that can be negative.
    "rebased_head_norm": {"kernel": "rebased", "qk_norm_scope": "head"},
    "rebased_floor": {"kernel": "rebased"},
}
# Of a peer of flash-linear-attention, the numbers of its state per unit of width: ReBased has 140 to 163.
PEER_STATE = 128


# Parts of a name that only other values than the defaults have.
_NAMED_IF_OTHER = {
    "t": "test_examples",
    "data": "data_seed",
    "v": "vocab_size",
    "wd": "weight_decay",
    "stop": "stop_at",
}


@dataclass(frozen=True)
class Run(Recipe):
    """Hold everything that decides a run's numbers, except the device."""

    model: str
    hidden: int
    length: int
    pairs: int
    lr: float
    seed: int
    epochs: int = 64
    batch_size: int = 512
    train_examples: int = 100_000
    test_examples: int = 3_000
    data_seed: int = 0
    vocab_size: int = 8192
    weight_decay: float = 0.1
    dropout: float = 0.1
    stop_at: float = 0.99

    @property
    def name(self) -> str:
        extra = [f"e{self.epochs}", f"b{self.batch_size}", f"n{self.train_examples}", f"d{shown(self.dropout)}"]
        # The rest is named where it is not the recipe's, so that such a run is not taken for the recipe's own.
        for short, field in _NAMED_IF_OTHER.items():
            if (value := getattr(self, field)) != getattr(type(self), field):
                extra.append(f"{short}{value}")
        return "-".join(
            [
                self.model,
                f"h{self.hidden}",
                f"l{self.length}",
                f"p{self.pairs}",
                f"lr{shown(self.lr)}",
                f"s{self.seed}",
                *extra,
            ]
        )

    @property
    def spec(self) -> mqar.MQARSpec:
        return mqar.MQARSpec(self.length, self.pairs, self.vocab_size)

    def new_model(self, kernel_backend: str) -> ReBasedForCausalLM:
        model = ReBasedForCausalLM(self.config(kernel_backend))
        if self.model == "rebased_floor":
            return add_floor(model)
        return insert(model, self.model, self.hidden, PEER_STATE) if self.model in PEERS else model

    def make_task(self, device: torch.device) -> MQARTask:
        return MQARTask(self, device)

    def save(self, model: ReBasedForCausalLM, folder: Path, result: dict[str, Any]) -> None:
        mqar_checkpoint.save_model(model, self, folder, result)

    def config(self, kernel_backend: str = "auto") -> ReBasedConfig:
        """Return the model's configuration: two layers, no MLP, learned positions, as in the authors' MQAR runs."""
        heads = MODELS.get(self.model, {}).get("num_attention_heads", 12)
        options: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "num_hidden_layers": 2,
            "layer_types": ["conv", "linear_attention"],
            "num_attention_heads": heads,
            "feature_dim": 12 * 16 // heads,
            "head_dim": self.hidden // 12 * 12 // heads,
            "mlp_type": "none",
            "norm_type": "layernorm",
            "position_embedding_type": "learned",
            "max_position_embeddings": self.length,
            "embedding_dropout": self.dropout,
            "tie_word_embeddings": True,
            "kernel_backend": kernel_backend,
            # no padding token: the filler, token 0, has an embedding that is trained like any other
            "pad_token_id": None,
        }
        if self.model == "softmax":
            # one head for every 64 channels: 12 heads of 5 channels are no fair softmax baseline
            heads = max(1, self.hidden // 64)
            options.update(num_attention_heads=heads, head_dim=self.hidden // heads)
        options |= MODELS.get(self.model, {})
        config = ReBasedConfig(**options)
        if config.layer_types != options["layer_types"]:  # a library that renames layers would train another model
            raise RuntimeError(f"layer_types became {config.layer_types}, they must stay {options['layer_types']}")
        return config


class MQARTask:
    """Hold the examples of a run on its device. Logits are made only where an answer is asked."""

    def __init__(self, run: Run, device: torch.device):
        train = mqar.make_examples(run.spec, run.train_examples, seed=run.data_seed, device=device)
        self.test = mqar.make_examples(run.spec, run.test_examples, seed=run.data_seed, split="test", device=device)
        tokens = train.input_ids(train.keys.dtype)  # 2 bytes per token: 0.4 GB at length 2,048
        self.train = (tokens, train.positions, train.values)

    def loss(self, backbone: nn.Module, head: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of the answers of tokens [B, T], positions and values [B, pairs]."""
        input_ids, positions, values = batch
        hidden = backbone(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, T, hidden]
        hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # [B, pairs, hidden]
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, values.flatten())

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {"accuracy": mqar.accuracy(model, self.test, batch_size=256)}

    def finish(self, model: nn.Module) -> dict[str, float]:
        return {}
