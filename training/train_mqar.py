"""Train small models on multi-query associative recall (MQAR): one run, or a sweep over models, sizes and rates.

    rebased-mqar --models rebased,based --hidden 64 --lengths 1024 --lrs 1e-3,3e-3 --seeds 0,1 \\
        --output output/mqar.jsonl          # the paper's task, on a GPU
    rebased-mqar --preset laptop            # a small task: 0.99 on two cores in about a minute

`rebased-mqar` is `python -m modeling_rebased.training.train_mqar`. The recipe is the authors' (ReBased, section 5.1):
100,000 examples, 64 epochs, batch 512, and AdamW with weight decay 0.1 on every parameter. The learning rate falls
along a cosine from epoch to epoch, without warm-up and without clipping. A run stops when 99% of the test answers are
right.

The training loop (fast_loop.py) is arranged for a GPU. A test compares it with the Trainer of transformers.

A run is one line in OUTPUT, written when it ends. Runs that are already there are skipped, so the same command
continues where it was stopped. A run that was stopped in the middle continues from its last saved epoch. `--jobs`
trains several kinds of model at once on one GPU, which pays for small models. With `--take-turns` they only compile at
once.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from typing import Any

from . import mqar
from .fast_loop import FastTrainer, use_deterministic_algorithms
from .mqar_runs import MODELS, PEER_STATE, Run
from .mqar_speed import time_steps
from .peers import PEERS, check_peers
from .recipe import Options, kind_of
from .run_results import append_result
from .sweep import sweep
from .sweep_arguments import options_of, parse_with_preset, sweep_parser
from .values import count, fraction, integer, list_of, not_negative, positive


# A task that two cores of a laptop learn to 0.99 in about a minute.
PRESETS: dict[str, dict[str, Any]] = {
    "laptop": {
        "lengths": [32],
        "pairs": 4,
        "vocab_size": 128,
        "lrs": [1e-2],
        "epochs": 20,
        "batch_size": 64,
        "train_examples": 6400,
        "test_examples": 500,
        "dropout": 0.0,
    }
}


def parse(argv: list[str] | None = None) -> tuple[list[Run], Options, argparse.Namespace]:
    """Read the command line: the runs, what they share, and the rest."""
    parser = sweep_parser("rebased-mqar", __doc__, PRESETS)
    add = parser.add_argument
    add("--models", type=list_of(str), default=["rebased"], help=f"comma-separated, of {', '.join((*MODELS, *PEERS))}")
    add("--hidden", type=list_of(count), default=[64], help="hidden sizes")
    add("--lengths", type=list_of(count), default=[128], help="of 128, 256, 512, 1024, 2048, or any with --pairs")
    add("--pairs", type=count, help="key-value pairs per sequence; default: those of Figure 1")
    add("--lrs", type=list_of(positive), default=[5e-4, 1e-3, 3e-3, 1e-2], help="peak learning rates")
    add("--seeds", type=list_of(integer), default=[0], help="of weights and order")
    add("--epochs", type=count, default=64, help="at most")
    add("--batch-size", type=count, default=512, help="examples per step")
    add("--train-examples", type=count, default=100_000, help="examples per epoch")
    add("--test-examples", type=count, default=3_000, help="examples of the test after each epoch")
    add("--data-seed", type=int, default=0, help="of the data")
    add("--vocab-size", type=count, default=8192, help="keys and values are each half of it")
    add("--dropout", type=fraction, default=0.1, help="of the embeddings")
    add("--stop-at", type=not_negative, default=0.99, help="test accuracy that ends a run; 2 never does")
    add(
        "--race",
        type=count,
        metavar="EPOCH",
        help="train the first seed to this epoch at every rate, then go on with the one of lowest loss; "
        "MQAR first stays on a plateau for some epochs, and a race that ends there is a lottery",
    )
    add("--time-steps", action="store_true", help="train nothing: time a step of each kind of model, on a GPU")
    args = parse_with_preset(parser, PRESETS, argv)
    if unknown := [name for name in args.models if name not in (*MODELS, *PEERS)]:
        parser.error(f"--models: {', '.join(unknown)} is not one of {', '.join((*MODELS, *PEERS))}")
    check_peers(parser, args.models, args.hidden, PEER_STATE, args.save)
    try:
        runs = [
            Run(
                model=model,
                hidden=hidden,
                length=length,
                pairs=args.pairs or mqar.figure_1_spec(length).num_pairs,
                lr=lr,
                seed=seed,
                epochs=args.epochs,
                batch_size=args.batch_size,
                train_examples=args.train_examples,
                test_examples=args.test_examples,
                data_seed=args.data_seed,
                vocab_size=args.vocab_size,
                dropout=args.dropout,
                stop_at=args.stop_at,
            )
            for length, hidden, model, seed, lr in itertools.product(
                args.lengths, args.hidden, args.models, args.seeds, args.lrs
            )
        ]
        for run in runs:
            _ = run.spec
    except ValueError as error:
        parser.error(str(error))
    if (too_small := min(args.hidden)) < 12 and args.models != ["softmax"]:
        parser.error(f"--hidden must be at least 12, since the models have 12 heads, got {too_small}")
    if args.race is not None and args.race >= args.epochs:
        parser.error(f"--race is {args.race}, it must be less than --epochs, which is {args.epochs}")
    if args.time_steps and not args.device.startswith("cuda"):
        parser.error(f"--time-steps needs a GPU, --device is {args.device}")
    options = options_of(
        parser,
        args,
        runs,
        args.train_examples,
        tokens=max(run.epochs * run.train_examples * run.length for run in runs),
    )
    return runs, replace(options, race_epoch=args.race), args


def main(argv: list[str] | None = None) -> None:
    """Train the runs that are asked for."""
    runs, options, args = parse(argv)
    if args.time_steps:
        if options.deterministic:
            use_deterministic_algorithms()
        for run in {kind_of(run): run for run in runs}.values():
            report = time_steps(FastTrainer(run, options), run)
            append_result(args.output, report)
            print(json.dumps(report, indent=1))
        return
    results = sweep(runs, options, args.output, args.jobs, args.save)
    print(f"{len(results)} runs trained, all results in {args.output}")


if __name__ == "__main__":
    main()
