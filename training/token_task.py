"""Hold what MAD and ICLL have in common: the models, and a task whose loss is the cross entropy of given targets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM

from . import folders, mqar
from .card import model_card
from .peers import PEERS, check_peers, insert, state_of_head
from .random_numbers import IGNORED
from .recipe import Recipe, shown
from .values import count, fraction, integer, list_of, not_negative, positive


WINDOW = 16  # tokens in the softmax window of the hybrid
# The mixer of every second layer. As in the paper of ReBased, a short convolution stands before each.
MODELS: dict[str, dict[str, Any]] = {
    "rebased": {"mixer": "linear_attention", "kernel": "rebased"},
    "based": {"mixer": "linear_attention", "kernel": "based"},
    "softmax": {"mixer": "full_attention"},
    "hybrid": {"mixer": "hybrid_sliding", "kernel": "rebased", "sliding_window": WINDOW},
}


def new_model(
    name: str,
    *,
    vocab_size: int,
    hidden: int,
    layers: int,
    length: int,
    head: int,
    dropout: float,
    kernel_backend: str,
) -> PreTrainedModel:
    """Return a language model with fresh weights.

    Args:
        name: one of `MODELS` or `PEERS`.
        vocab_size: number of tokens.
        hidden: width of the model.
        layers: number of layers, even. Each has a SwiGLU.
        length: longest sequence, for the learned positions that are added to the embedding.
        head: size of a head; its queries, keys and values are all as wide. A peer has heads of its own, and a state
            that is about as large as ReBased's with this size.
        dropout: of the embedding.
        kernel_backend: of the linear attention of this package.

    Raises:
        ImportError: a peer without flash-linear-attention.
    """
    options = dict(MODELS["rebased" if name in PEERS else name])
    mixer = options.pop("mixer")
    config = ReBasedConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        layer_types=["conv", mixer] * (layers // 2),
        num_attention_heads=hidden // head,
        feature_dim=head,
        head_dim=head,
        mlp_type="swiglu",
        norm_type="layernorm",
        position_embedding_type="learned",
        max_position_embeddings=length,
        embedding_dropout=dropout,
        tie_word_embeddings=False,
        kernel_backend=kernel_backend,
        pad_token_id=None,  # every token has an embedding that is trained
        **options,
    )
    model = ReBasedForCausalLM(config)
    return insert(model, name, hidden, state_of_head(head)) if name in PEERS else model


@dataclass(frozen=True, kw_only=True)
class TokenRun(Recipe):
    """Hold what decides the numbers of a run of MAD or ICLL, except the device and the data."""

    model: str
    lr: float
    seed: int
    hidden: int = 128
    layers: int = 2
    head: int = 16
    epochs: int = 200
    batch_size: int = 128
    train_examples: int
    test_examples: int = 1280
    data_seed: int = 0
    weight_decay: float = 0.1
    dropout: float = 0.0
    stop_at: float = 2.0

    def name_of(self, *first: str) -> str:
        """Return a name of `first`, what every run has, and of each other field that is not the default."""
        always = {"h": self.hidden, "lr": self.lr, "wd": self.weight_decay, "s": self.seed, "n": self.train_examples}
        others = {
            "layers": "layers",
            "head": "head",
            "e": "epochs",
            "b": "batch_size",
            "t": "test_examples",
            "data": "data_seed",
            "d": "dropout",
            "stop": "stop_at",
        }
        parts = [f"{short}{shown(value)}" for short, value in always.items()]
        for short, field in others.items():
            if (value := getattr(self, field)) != getattr(type(self), field):
                parts.append(f"{short}{shown(value)}")
        return "-".join([self.model, *first, *parts])


def add_run_options(
    parser: argparse.ArgumentParser, run: type[TokenRun], lrs: list[float], decays: list[float]
) -> None:
    """Add the options of the fields that runs of MAD and ICLL share, with the defaults of `run`."""
    add = parser.add_argument
    add("--models", type=list_of(str), default=["rebased"], help=f"comma-separated, of {', '.join((*MODELS, *PEERS))}")
    add("--hidden", type=list_of(count), default=[run.hidden], help="widths")
    add("--head", type=count, default=run.head, help="size of a head, which divides the width")
    add("--lrs", type=list_of(positive), default=lrs, help="peak learning rates")
    add("--weight-decays", type=list_of(not_negative), default=decays, help="of AdamW, on every parameter")
    add("--seeds", type=list_of(integer), default=[0], help="of weights and order")
    add("--epochs", type=count, default=run.epochs, help="at most")
    add("--batch-size", type=count, default=run.batch_size, help="examples per step")
    add("--test-examples", type=count, default=run.test_examples, help="examples of the test after each epoch")
    add("--data-seed", type=int, default=run.data_seed, help="of the data")
    add("--dropout", type=fraction, default=run.dropout, help="of the embeddings")
    add("--stop-at", type=not_negative, default=run.stop_at, help="test accuracy that ends a run; 2 never does")


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a run for which `add_run_options` reads one value, which all runs share."""
    names = ("head", "epochs", "batch_size", "test_examples", "data_seed", "dropout", "stop_at")
    return {name: getattr(args, name) for name in names}


def check_models(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if a model is unknown, cannot be built or cannot be saved."""
    if unknown := [name for name in args.models if name not in (*MODELS, *PEERS)]:
        parser.error(f"--models: {', '.join(unknown)} is not one of {', '.join((*MODELS, *PEERS))}")
    for hidden in args.hidden:
        if hidden % args.head:
            parser.error(f"--head {args.head} does not divide --hidden {hidden}")
    check_peers(parser, args.models, args.hidden, state_of_head(args.head), args.save)


class TokenTask:
    """Learn and count targets, one for each token of the input.

    Args:
        train: tokens [N, T] and targets [N, T]. The target of a position is what the model must say there, so nothing
            is shifted. Positions with the target -100 do not count.
        test: the same for the test.
        batch_size: test examples per forward pass.
    """

    def __init__(self, train: tuple[torch.Tensor, ...], test: tuple[torch.Tensor, ...], batch_size: int = 256) -> None:
        self.train, self.test, self.batch_size = train, test, batch_size

    def loss(self, backbone: nn.Module, head: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of the targets of tokens [B, T] and targets [B, T]."""
        input_ids, targets = batch
        logits = head(backbone(input_ids=input_ids, use_cache=False).last_hidden_state)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def logits(self, model: Any) -> Iterator[tuple[slice, torch.Tensor]]:
        """Give the rows of each batch of the test, and the logits of the model there, [B, T, V]."""
        training = model.training
        model.eval()
        input_ids = self.test[0]
        for first in range(0, len(input_ids), self.batch_size):
            rows = slice(first, first + self.batch_size)
            hidden = model.base_model(input_ids=input_ids[rows].long(), use_cache=False).last_hidden_state
            yield rows, model.get_output_embeddings()(hidden)
        model.train(training)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the share of targets that are the most likely token of the whole vocabulary."""
        targets = self.test[1]
        correct = sum((logits.argmax(-1) == targets[rows]).sum() for rows, logits in self.logits(model))
        return {"accuracy": int(correct) / int((targets != IGNORED).sum())}

    def finish(self, model: nn.Module) -> dict[str, float]:
        return {}


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    name: str,
    text: str,
    task: str,
    metadata: dict[str, Any],
    prompt: list[int],
) -> None:
    """Write the folder of a model that was trained on MAD or ICLL. Its tokenizer reads numbers as tokens.

    Args:
        model: the trained model, one of this package.
        folder: the new folder, which appears when it is complete.
        name: title of the card.
        text: of the card, says what the model was trained on.
        task: of lm-eval, scores the model.
        metadata: of that task.
        prompt: tokens for the card's example.
    """
    model = model.to("cpu", torch.bfloat16).eval()
    config = model.config
    config.kernel_backend = "auto"
    tokenizer = mqar.build_tokenizer(config.vocab_size, config.max_position_embeddings)
    command = (
        f"lm-eval run --model hf --model_args pretrained={folder},trust_remote_code=True \\\n"
        f"    --include_path \"$(rebased-tasks)\" --tasks {task} --metadata '{json.dumps(metadata)}' --batch_size 32"
    )
    card = model_card(
        config,
        model.num_parameters(),
        name=name,
        folder=str(folder),
        prompt=mqar.to_text(prompt),
        new_tokens=1,
        text=text,
        sections=[f"## Score\n\n```console\n{command}\n```"],
        tags=[task],
    )
    with folders.written(folder) as path:
        folders.save_model(path, model, tokenizer, card)
