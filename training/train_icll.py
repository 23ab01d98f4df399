"""Train small models on in-context language learning (icll.py): one run, or a sweep over models, sizes and rates.

    rebased-icll --models rebased,based,softmax --hidden 128 --lrs 2.5e-4,5e-4 --output output/icll.jsonl    # on a GPU
    rebased-icll --preset laptop                                                # a minute on two cores

`rebased-icll` is `python -m modeling_rebased.training.train_icll`. The recipe is that of the authors of ICLL: 5,000
automata, one example of each, 200 epochs of batch 32, and AdamW with weight decay 0.1. The learning rate rises from
1e-6 for a tenth of the steps and then falls along a cosine to a tenth.

A model has four layers, each with a SwiGLU: a short convolution and the mixer, twice. "Accuracy" is the share of the
next symbols of 250 other automata where the model's most likely token is legal. Distances are measured to two
distributions of the next token, that of the automaton and that of a 3-gram model of the example. They are sums over
tokens of absolute differences, from 0 to 2, twice the total variation. The weights that are measured, and saved, are
those of the epoch with the lowest loss on 250 more automata, as the authors choose them.

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
import torch.nn.functional as F
from transformers import PreTrainedModel

from . import icll
from .icll import ICLLExamples, ICLLSpec
from .random_numbers import IGNORED
from .recipe import Options, best_epoch
from .sweep import sweep
from .sweep_arguments import options_of, parse_with_preset, sweep_parser
from .token_task import TokenRun, TokenTask, add_run_options, check_models, fields_of, new_model, save_model
from .values import count, list_of, natural


# A task that two cores of a laptop learn to some degree in about a minute.
PRESETS: dict[str, dict[str, Any]] = {
    "laptop": {
        "symbols": 6,
        "max_states": 5,
        "max_strings": 10,
        "max_length": 9,
        "hidden": [64],
        "layers": 2,
        "lrs": [3e-3],
        "epochs": 10,
        "train_examples": [2000],
        "test_examples": 200,
        "dropout": 0.0,
    }
}
LOWEST_RATE = 1e-6  # at the first step


@dataclass(frozen=True, kw_only=True)
class ICLLRun(TokenRun):
    """Hold everything that decides a run's numbers, except the device."""

    symbols: int = ICLLSpec.symbols
    max_states: int = ICLLSpec.max_states
    min_strings: int = ICLLSpec.min_strings
    max_strings: int = ICLLSpec.max_strings
    max_length: int = ICLLSpec.max_length
    layers: int = 4
    batch_size: int = 32
    train_examples: int = 5000
    test_examples: int = 500
    dropout: float = 0.1
    patience: int = 0

    @property
    def spec(self) -> ICLLSpec:
        return ICLLSpec(self.symbols, self.max_states, self.min_strings, self.max_strings, self.max_length)

    @property
    def name(self) -> str:
        shorts = {"sym": "symbols", "states": "max_states", "from": "min_strings", "to": "max_strings"}
        shorts["len"] = "max_length"
        sizes = {short: getattr(self.spec, field) for short, field in shorts.items()}
        default = {short: getattr(ICLLSpec, field) for short, field in shorts.items()}
        parts = [f"{short}{size}" for short, size in sizes.items() if size != default[short]]
        return self.name_of("icll", *parts, *([f"patience{self.patience}"] if self.patience else []))

    def is_done(self, history: list[dict[str, float]]) -> bool:
        """Return whether the validation loss has not fallen for `patience` epochs, if that is not 0."""
        waited = len(history) - (best_epoch(history) or 0)
        return super().is_done(history) or 0 < self.patience <= waited

    def lr_at(self, epoch: int, step: int = 0) -> float:
        total = self.epochs * self.steps_per_epoch
        warm_up = math.ceil(self.epochs / 10) * self.steps_per_epoch
        now = epoch * self.steps_per_epoch + step
        if now < warm_up:
            return LOWEST_RATE + (self.lr - LOWEST_RATE) * now / warm_up
        return 0.1 * self.lr + 0.9 * self.lr * 0.5 * (1 + math.cos(math.pi * now / total))

    def new_model(self, kernel_backend: str) -> PreTrainedModel:
        return new_model(
            self.model,
            vocab_size=self.spec.vocab_size,
            hidden=self.hidden,
            layers=self.layers,
            length=self.spec.length,
            head=self.head,
            dropout=self.dropout,
            kernel_backend=kernel_backend,
        )

    def make_task(self, device: torch.device) -> ICLLTask:
        train = icll.make_examples(self.spec, self.train_examples, seed=self.data_seed, device=device)
        test = icll.make_examples(self.spec, self.test_examples, seed=self.data_seed, split="test", device=device)
        return ICLLTask(train, test)

    def save(self, model: PreTrainedModel, folder: Path, result: dict[str, Any]) -> None:
        tokens = icll.make_examples(self.spec, 1, seed=self.data_seed, split="test").tokens[0].tolist()
        sizes = dataclasses.asdict(self.spec)
        sizes["longest_string"] = sizes.pop("max_length")  # which is lm-eval's name for the length of a model
        save_model(
            model,
            folder,
            name=f"{self.model} for in-context language learning, width {self.hidden}",
            text=f"{self.layers} layers, every second one of {self.model}, trained on strings of random automata. Its "
            f"tokens are numbers: {self.spec.separator} separates strings, the smaller ones are symbols. Its most "
            f"likely token was legal at {result['accuracy']:.2%} of the positions of the test.",
            task="icll",
            metadata={"seed": self.data_seed, **sizes},
            prompt=tokens[: 2 * tokens.index(self.spec.separator)],
        )


class ICLLTask(TokenTask):
    """Learn the next symbol, and count where a model's greedy choice is legal for the automaton.

    The first half of `test` is the test, the other half chooses the epoch.
    """

    def __init__(self, train: ICLLExamples, test: ICLLExamples):
        super().__init__((train.input_ids(), train.targets()), (test.input_ids(), test.targets()), batch_size=64)
        self.examples, self.next_tokens = test, test.next_tokens()
        tokens, targets = self.test
        is_test = (torch.arange(len(tokens), device=tokens.device) < (len(tokens) + 1) // 2)[:, None]
        self.read = (tokens != icll.PADDING) & is_test
        self.counted = (targets != IGNORED) & is_test
        self.chosen_by = (targets != IGNORED) & ~is_test

    def measure(self, model: Any) -> dict[str, float]:
        """Return the share of targets at whose place the most likely token is legal, and the other half's loss."""
        legal = torch.zeros((), dtype=torch.long, device=self.read.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.read.device)
        for rows, logits in self.logits(model):
            greedy = self.next_tokens[rows].gather(2, logits.argmax(-1, keepdim=True))[..., 0]
            legal += ((greedy > 0) & self.counted[rows]).sum()
            mask = self.chosen_by[rows]
            loss += F.cross_entropy(logits[mask].float(), self.test[1][rows][mask].long(), reduction="sum").double()
        return {
            "accuracy": int(legal) / int(self.counted.sum()),
            "validation_loss": float(loss) / int(self.chosen_by.sum()),
        }

    def finish(self, model: Any) -> dict[str, float]:
        """Return the accuracy, mean distances over the tokens that are read, and what the 3-gram model reaches."""
        ngram, exact = icll.ngram_next_tokens(self.examples), self.next_tokens
        read, counted = self.read, self.counted
        to_exact = torch.zeros((), dtype=torch.float64, device=read.device)
        to_ngram = torch.zeros_like(to_exact)
        for rows, logits in self.logits(model):
            probabilities = logits.float().softmax(-1)
            to_exact += distance(probabilities, exact[rows])[read[rows]].sum()
            to_ngram += distance(probabilities, ngram[rows])[read[rows]].sum()
        greedy = exact.gather(2, ngram.argmax(-1, keepdim=True))[..., 0] > 0
        return {
            "accuracy": self.measure(model)["accuracy"],
            "distance_to_automaton": float(to_exact / read.sum()),
            "distance_to_3gram": float(to_ngram / read.sum()),
            "accuracy_of_3gram": float(greedy[counted].double().mean()),
            "distance_of_3gram": float(distance(ngram, exact)[read].double().mean()),
        }


def distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the sum of absolute differences of distributions [..., V], which is twice the total variation."""
    return (first - second).abs().sum(-1)


def parse(argv: list[str] | None = None) -> tuple[list[ICLLRun], Options, argparse.Namespace]:
    """Read the command line: the runs, what they share, and the rest."""
    parser = sweep_parser("rebased-icll", __doc__, PRESETS)
    add_run_options(parser, ICLLRun, lrs=[2.5e-4, 5e-4], decays=[0.1])
    add = parser.add_argument
    add("--layers", type=count, default=ICLLRun.layers, help="even: a convolution and the mixer in turn")
    examples = [ICLLRun.train_examples]
    add("--train-examples", type=list_of(count), default=examples, help="automata; the authors have 2500 to 40000")
    add("--symbols", type=count, default=ICLLRun.symbols, help="of all automata")
    add("--max-states", type=count, default=ICLLRun.max_states, help="of an automaton, at least 4")
    add("--min-strings", type=count, default=ICLLRun.min_strings, help="of an example")
    add("--max-strings", type=count, default=ICLLRun.max_strings, help="of an example")
    add("--max-length", type=count, default=ICLLRun.max_length, help="symbols in a string")
    add(
        "--patience",
        type=natural,
        default=0,
        help="end a run after so many epochs without a lower validation loss; 0 never does",
    )
    args = parse_with_preset(parser, PRESETS, argv)
    check_models(parser, args)
    if args.test_examples < 2:
        parser.error("--test-examples must be at least 2, since half of them choose the epoch")
    if args.layers % 2:
        parser.error(f"--layers must be even, got {args.layers}")
    runs = [
        ICLLRun(
            **{size: getattr(args, size) for size in ("symbols", "max_states", "min_strings", "max_strings")},
            **fields_of(args),
            max_length=args.max_length,
            patience=args.patience,
            model=model,
            hidden=hidden,
            layers=args.layers,
            lr=lr,
            seed=seed,
            weight_decay=decay,
            train_examples=examples,
        )
        for examples, hidden, model, decay, seed, lr in itertools.product(
            args.train_examples, args.hidden, args.models, args.weight_decays, args.seeds, args.lrs
        )
    ]
    try:
        spec = runs[0].spec
    except ValueError as error:
        parser.error(str(error))
    fewest, most = min(args.train_examples), max(args.train_examples)
    return runs, options_of(parser, args, runs, examples=fewest, tokens=args.epochs * most * spec.length // 2), args


def main(argv: list[str] | None = None) -> None:
    """Train the runs that are asked for."""
    runs, options, args = parse(argv)
    results = sweep(runs, options, args.output, args.jobs, args.save)
    print(f"{len(results)} runs trained, all results in {args.output}")


if __name__ == "__main__":
    main()
