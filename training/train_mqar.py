"""Train small models on multi-query associative recall (MQAR): one run, or a sweep over models, sizes and rates.

    rebased-mqar --models rebased,based --hidden 64 --lengths 1024 --lrs 1e-3,3e-3 --seeds 0,1 \\
        --output output/mqar.jsonl          # the paper's task, on a GPU
    rebased-mqar --preset laptop            # a small task: 0.99 on two cores in about two minutes

`rebased-mqar` is `python -m modeling_rebased.training.train_mqar`. The recipe is the authors' (ReBased, section 5.1):
100,000 examples, 64 epochs, batch 512, and AdamW with weight decay 0.1 on every parameter. The learning rate falls
along a cosine from epoch to epoch, without warm-up and without clipping. A run stops when 99% of the test answers are
right.

The training loop (mqar_loop.py) is arranged for a GPU. A test compares it with the Trainer of transformers.

A run is one line in OUTPUT, written when it ends. Runs that are already there are skipped, so the same command
continues where it was stopped. A run that was stopped in the middle continues from its last saved epoch. `--jobs`
trains several kinds of model at once on one GPU, which pays for small models. With `--take-turns` they only compile at
once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import mqar
from .arguments import HelpFormatter, with_dashes
from .mqar_loop import FastTrainer, use_deterministic_algorithms
from .mqar_results import append_result
from .mqar_runs import MODELS, Options, Run, kind_of
from .mqar_speed import time_steps
from .mqar_sweep import sweep


# A task that two cores of a laptop learn to 0.99 within two minutes.
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
# Training tokens beyond which a CPU takes hours.
MANY_TOKENS = 100_000_000


def _number(text: str, kind: type, allowed: str, holds: Callable[[Any], bool]) -> Any:
    """Read a number of the command line. argparse puts the argument's name before the error."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
    return value


def _integer(text: str) -> int:
    return _number(text, int, "an integer", lambda value: True)


def _count(text: str) -> int:
    return _number(text, int, "an integer of at least 1", lambda value: value >= 1)


def _positive(text: str) -> float:
    return _number(text, float, "a positive number", lambda value: 0 < value < math.inf)


def _fraction(text: str) -> float:
    return _number(text, float, "at least 0 and less than 1", lambda value: 0 <= value < 1)


def _list(kind: Callable[[str], Any]) -> Callable[[str], list]:
    return lambda text: [kind(item) for item in text.split(",")]


def _check_writable(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error before anything is trained if the results could not be written afterwards."""
    for name, folder in (("--output", Path(args.output).parent), ("--save", args.save), ("--work-dir", args.work_dir)):
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            parser.error(f"{name}: cannot write into {folder}: {error.strerror}")
    if Path(args.output).is_dir():
        parser.error(f"--output {args.output} is a folder, it must be a file of JSON lines")


def parse(argv: list[str] | None = None) -> tuple[list[Run], Options, argparse.Namespace]:
    """Read the command line: the runs, what they share, and the rest."""
    argv = with_dashes(argv)
    parser = argparse.ArgumentParser(prog="rebased-mqar", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="laptop: a small task that two cores learn in about two minutes")
    add("--models", default="rebased", help=f"comma-separated, of {', '.join(MODELS)}")
    add("--hidden", type=_list(_count), default=[64], help="hidden sizes")
    add("--lengths", type=_list(_count), default=[128], help="of 128, 256, 512, 1024, 2048, or any with --pairs")
    add("--pairs", type=_count, help="key-value pairs per sequence; default: those of Figure 1")
    add("--lrs", type=_list(_positive), default=[5e-4, 1e-3, 3e-3, 1e-2], help="peak learning rates")
    add("--seeds", type=_list(_integer), default=[0], help="of weights and order")
    add("--epochs", type=_count, default=64, help="at most")
    add("--batch-size", type=_count, default=512, help="examples per step")
    add("--train-examples", type=_count, default=100_000, help="examples per epoch")
    add("--test-examples", type=_count, default=3_000, help="examples of the test after each epoch")
    add("--data-seed", type=int, default=0, help="of the data")
    add("--vocab-size", type=_count, default=8192, help="keys and values are each half of it")
    add("--dropout", type=_fraction, default=0.1, help="of the embeddings")
    add("--stop-at", type=float, default=0.99, help="test accuracy that ends a run; 2 never does")
    add("--output", default="output/mqar.jsonl", help="file of results, one line of JSON per run")
    add("--save", metavar="DIR", help="write every trained model to DIR/NAME")
    add("--work-dir", metavar="DIR", help="where unfinished runs are kept; default: beside OUTPUT")
    add("--jobs", type=_count, default=1, help="kinds of model trained at once on the GPU")
    add("--take-turns", action="store_true", help="with --jobs: compile at once, but train one kind at a time")
    add(
        "--race",
        type=_count,
        metavar="EPOCH",
        help="train the first seed to this epoch at every rate, then go on with the one of lowest loss; "
        "MQAR first stays on a plateau for some epochs, and a race that ends there is a lottery",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--kernel-backend", choices=("auto", "eager", "triton"), default="auto", help="of the linear attention")
    add("--fp32", action="store_true", help="no bf16 autocast")
    add("--no-compile", action="store_true", help="no torch.compile")
    add("--no-cuda-graph", action="store_true", help="issue each step from Python")
    add(
        "--deterministic",
        action="store_true",
        help="the same numbers to the bit from run to run on one kind of GPU; slower",
    )
    add("--time-steps", action="store_true", help="train nothing: time a step of each kind of model, on a GPU")
    add("--no-progress", action="store_true", help="no progress bars")
    add(
        "--max-seconds",
        type=_positive,
        help="stop runs at the end of their epoch after so long; they stay unfinished",
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS)
    parser.set_defaults(**PRESETS.get(first.parse_known_args(argv)[0].preset, {}))
    args = parser.parse_args(argv)
    models = args.models.split(",")
    if unknown := [name for name in models if name not in MODELS]:
        parser.error(f"--models: {', '.join(unknown)} is not one of {', '.join(MODELS)}")
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
                args.lengths, args.hidden, models, args.seeds, args.lrs
            )
        ]
        for run in runs:
            _ = run.spec
    except ValueError as error:
        parser.error(str(error))
    if (too_small := min(args.hidden)) < 12 and models != ["softmax"]:
        parser.error(f"--hidden must be at least 12, since the models have 12 heads, got {too_small}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no GPU here, --device cpu is possible")
    if args.time_steps and not args.device.startswith("cuda"):
        parser.error(f"--time-steps needs a GPU, --device is {args.device}")
    if args.batch_size > args.train_examples:
        parser.error(f"--batch-size {args.batch_size} is larger than --train-examples {args.train_examples}")
    on_gpu = args.device.startswith("cuda")
    _check_writable(parser, args)
    if not on_gpu and max(run.epochs * run.train_examples * run.length for run in runs) > MANY_TOKENS:
        print("This needs a GPU: on a CPU it takes hours. --preset laptop is a task for two cores.", file=sys.stderr)
    options = Options(
        device=args.device,
        kernel_backend=args.kernel_backend,
        bf16=on_gpu and not args.fp32,
        compile=on_gpu and not args.no_compile,
        cuda_graph=on_gpu and not args.no_cuda_graph,
        progress=not args.no_progress,
        work_dir=args.work_dir or str(Path(args.output).with_suffix("")) + "-unfinished",
        race_epoch=args.race,
        deadline=time.time() + args.max_seconds if args.max_seconds is not None else None,
        take_turns=args.take_turns,
        deterministic=args.deterministic,
    )
    return runs, options, args


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
