"""Train small models on the six tasks of MAD (mad.py): one run, or a sweep over tasks, models and rates.

    rebased-mad --models rebased,based,softmax --output output/mad.jsonl     # the base sizes, on a GPU
    rebased-mad --vary --models rebased                                      # and all variations of the authors
    rebased-mad --preset laptop                                              # recall, small: a minute on two cores

`rebased-mad` is `python -m modeling_rebased.training.train_mad`. The recipe is that of MAD's authors: 12,800 examples
(256 of memorization), 200 epochs of batch 128, width 128, AdamW, and a learning rate that falls along a cosine to
1e-6. A run stops when 99.9% of the test answers are right. The authors give each token the same weight in the
accuracy, here every answer has it.

A model has two layers, each with a SwiGLU: a short convolution, and the mixer. Heads have the size 8, so the state of
ReBased has 4,608 numbers and is about as large as the 4,096 that the authors give every model. Compression is learned
by an autoencoder: the model reads the tokens, and an MLP says all of them from the model's last state.

A run is one line in OUTPUT, written when it ends. The same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import mad
from .mad import MADSpec
from .recipe import Options, shown
from .sweep import sweep
from .sweep_arguments import options_of, parse_with_preset, sweep_parser
from .token_task import TokenRun, TokenTask, add_run_options, check_models, fields_of, new_model, save_model
from .values import count, fraction, list_of


# A task that two cores of a laptop learn in about a minute.
PRESETS: dict[str, dict[str, Any]] = {
    "laptop": {
        "tasks": ["recall"],
        "length": 32,
        "hidden": [64],
        "lrs": [3e-3],
        "weight_decays": [0.1],
        "epochs": 30,
        "batch_size": 64,
        "train_examples": 3200,
        "test_examples": 320,
        "stop_at": 0.99,
    }
}
LOWEST_RATE = 1e-6


@dataclass(frozen=True, kw_only=True)
class MADRun(TokenRun):
    """Hold everything that decides a run's numbers, except the device."""

    task: str
    vocab_size: int
    length: int
    noise_vocab_size: int = 0
    noise: float = 0.0
    copy: int = 0
    head: int = 8
    stop_at: float = 0.999

    @property
    def spec(self) -> MADSpec:
        return MADSpec(self.task, self.vocab_size, self.length, self.noise_vocab_size, self.noise, self.copy)

    @property
    def name(self) -> str:
        sizes = [f"v{self.vocab_size}", f"l{self.length}"]
        sizes += [f"noise{shown(self.noise)}of{self.noise_vocab_size}"] if self.noise_vocab_size else []
        sizes += [f"copy{self.copy}"] if self.copy else []
        return self.name_of(self.task, *sizes)

    def lr_at(self, epoch: int, step: int = 0) -> float:
        return LOWEST_RATE + (self.lr - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def new_model(self, kernel_backend: str) -> nn.Module:
        model = new_model(
            self.model,
            vocab_size=self.vocab_size,
            hidden=self.hidden,
            layers=self.layers,
            length=self.spec.positions,
            head=self.head,
            dropout=self.dropout,
            kernel_backend=kernel_backend,
        )
        if self.task == "compression":
            return AutoEncoder(model.base_model, Decoder(self.hidden, self.vocab_size, self.spec.positions))
        return model

    def make_task(self, device: torch.device) -> TokenTask:
        train = mad.make_examples(self.spec, self.train_examples, seed=self.data_seed, device=device)
        test = mad.make_examples(self.spec, self.test_examples, seed=self.data_seed, split="test", device=device)
        return TokenTask(train, test, batch_size=640)

    def save(self, model: Any, folder: Path, result: dict[str, Any]) -> None:
        sizes = {"num_examples": 128, "seed": self.data_seed, **dataclasses.asdict(self.spec)}
        tokens = mad.make_examples(self.spec, 1, seed=self.data_seed, split="test")[0][0].tolist()
        save_model(
            model,
            folder,
            name=f"{self.model} for MAD's {self.task}",
            text=f"Two layers, a short convolution and one of {self.model}, trained on the task {self.task} of "
            f"MAD with {self.vocab_size} tokens and length {self.length}. Its tokens are numbers, with `_` for 0. It "
            f"answered {result['accuracy']:.2%} of the questions of the test.",
            task=f"mad_{self.task}",
            metadata={name: value for name, value in sizes.items() if name != "task"},
            prompt=tokens,
        )


class Decoder(nn.Module):
    """Say all tokens of a sequence from its last state: an MLP on the state plus the position of the token."""

    def __init__(self, hidden: int, vocab_size: int, length: int):
        super().__init__()
        rates = torch.exp(torch.arange(hidden // 2) * (-math.log(10_000) / (hidden // 2 - 1)))
        angles = torch.arange(length)[:, None] * rates
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1), persistent=False)
        blocks = [nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU()) for _ in range(2)]
        self.layers = nn.Sequential(*blocks, nn.LayerNorm(hidden), nn.Linear(hidden, vocab_size))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, vocab_size] from states [B, T, hidden], of which only the last is read."""
        return self.layers(hidden[:, -1:] + self.positions)


class AutoEncoder(nn.Module):
    """Join a language model without its output layer, the encoder, and a decoder."""

    def __init__(self, encoder: nn.Module, decoder: Decoder):
        super().__init__()
        self.base_model, self.decoder = encoder, decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def specs_of(task: str, sizes: dict[str, Any], vary: bool) -> list[tuple[MADSpec, int]]:
    """Return the task in its base size, changed by `sizes`, and its number of training examples; or all variations."""
    base = dataclasses.replace(mad.BASE[task], **sizes)
    examples = mad.TRAIN_EXAMPLES[task]
    found = [(base, examples)]
    if vary:
        for size, values in mad.VARIATIONS[task].items():
            changes: list[dict[str, Any]] = [{size: value} for value in values]
            found += [(dataclasses.replace(base, **change), examples) for change in changes]
        if task != "memorization":
            found += [(base, fewer) for fewer in mad.FEWER_EXAMPLES]
    return found


def parse(argv: list[str] | None = None) -> tuple[list[MADRun], Options, argparse.Namespace]:
    """Read the command line: the runs, what they share, and the rest."""
    parser = sweep_parser("rebased-mad", __doc__, PRESETS)
    add_run_options(parser, MADRun, lrs=[1e-4, 5e-4, 1e-3], decays=[0.0, 0.1])
    add = parser.add_argument
    add("--tasks", type=list_of(str), default=list(mad.TASKS), help="comma-separated, of the six")
    add("--vary", action="store_true", help="also train all variations of each task that the authors have")
    add("--train-examples", type=count, help="examples per epoch; default: 12,800, of memorization 256")
    add("--vocab-size", type=count, help="tokens of a task; default: the authors' base size, as for what follows")
    add("--length", type=count, help="tokens of a sequence")
    add("--noise", type=fraction, help="share of pairs of noisy_recall that are noise")
    add("--copy", type=count, help="tokens that selective_copying copies")
    args = parse_with_preset(parser, PRESETS, argv)
    check_models(parser, args)
    if unknown := [task for task in args.tasks if task not in mad.TASKS]:
        parser.error(f"--tasks: {', '.join(unknown)} is not one of {', '.join(mad.TASKS)}")
    if "compression" in args.tasks and (wrong := [size for size in args.hidden if size % 2 or size < 4]):
        parser.error(f"--hidden must be even and at least 4 for the decoder of compression, got {wrong[0]}")
    if args.save and "compression" in args.tasks:
        parser.error("--save: the autoencoder of compression is no language model and cannot be saved")
    sizes = {
        size: value for size in ("vocab_size", "length", "noise", "copy") if (value := getattr(args, size)) is not None
    }
    if args.vary and (sizes or args.train_examples):
        parser.error("--vary: the variations have sizes of their own, other options give none")
    runs = []
    try:
        for task in args.tasks:
            for spec, examples in specs_of(task, sizes, args.vary):
                for hidden, model, decay, seed, lr in itertools.product(
                    args.hidden, args.models, args.weight_decays, args.seeds, args.lrs
                ):
                    run = MADRun(
                        **dataclasses.asdict(spec),
                        **fields_of(args),
                        model=model,
                        hidden=hidden,
                        lr=lr,
                        seed=seed,
                        weight_decay=decay,
                        train_examples=args.train_examples or examples,
                    )
                    runs.append(run)
    except ValueError as error:
        parser.error(str(error))
    fewest = min(run.train_examples for run in runs)
    most = max(run.epochs * run.train_examples * run.length for run in runs)
    return runs, options_of(parser, args, runs, examples=fewest, tokens=most), args


def main(argv: list[str] | None = None) -> None:
    """Train the runs that are asked for."""
    runs, options, args = parse(argv)
    results = sweep(runs, options, args.output, args.jobs, args.save)
    print(f"{len(results)} runs trained, all results in {args.output}")


if __name__ == "__main__":
    main()
