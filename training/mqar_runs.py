"""Describe the runs of MQAR training: the model, the task and the recipe."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM

from . import mqar


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
}


# Parts of a name that only other values than the defaults have.
_NAMED_IF_OTHER = {
    "t": "test_examples",
    "data": "data_seed",
    "v": "vocab_size",
    "wd": "weight_decay",
    "stop": "stop_at",
}


@dataclass(frozen=True)
class Run:
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
        extra = [f"e{self.epochs}", f"b{self.batch_size}", f"n{self.train_examples}", f"d{self.dropout:g}"]
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
                f"lr{self.lr:g}",
                f"s{self.seed}",
                *extra,
            ]
        )

    @property
    def spec(self) -> mqar.MQARSpec:
        return mqar.MQARSpec(self.length, self.pairs, self.vocab_size)

    @property
    def steps_per_epoch(self) -> int:
        # the last, smaller batch of an epoch is left out: every epoch has another order, so nothing is lost for good
        return self.train_examples // self.batch_size

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch: a cosine from lr towards 0, with one step per epoch."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def order(self, epoch: int) -> torch.Tensor:
        """Return the order of the training examples in an epoch, cut to whole batches."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.train_examples, generator=generator)[: self.steps_per_epoch * self.batch_size]

    def config(self, kernel_backend: str = "auto") -> ReBasedConfig:
        """Return the model's configuration: two layers, no MLP, learned positions, as in the authors' MQAR runs."""
        heads = MODELS[self.model].get("num_attention_heads", 12)
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
        options |= MODELS[self.model]
        config = ReBasedConfig(**options)
        if config.layer_types != options["layer_types"]:  # a library that renames layers would train another model
            raise RuntimeError(f"layer_types became {config.layer_types}, they must stay {options['layer_types']}")
        return config


@dataclass(frozen=True)
class Options:
    """Hold how a run is computed, which does not change what it should learn."""

    device: str = "cuda"
    kernel_backend: str = "auto"
    bf16: bool = True
    compile: bool = True
    cuda_graph: bool = True
    progress: bool = True
    work_dir: str | None = None
    save_seconds: float = 30.0
    race_epoch: int | None = None
    deadline: float | None = None  # a time.time() after which runs stop at the end of their epoch
    take_turns: bool = False
    deterministic: bool = False

    @property
    def late(self) -> bool:
        """Return whether the deadline has passed."""
        return self.deadline is not None and time.time() > self.deadline

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)


def build_model(run: Run, kernel_backend: str = "auto") -> ReBasedForCausalLM:
    """Return a new model, with the same weights for the same seed, whatever was drawn before."""
    torch.manual_seed(run.seed)
    return ReBasedForCausalLM(run.config(kernel_backend))


def kind_of(run: Run) -> tuple:
    """Return what runs of one FastTrainer have in common."""
    return tuple(value for name, value in asdict(run).items() if name not in ("lr", "seed", "epochs", "stop_at"))
