"""Read the command lines of `rebased-mqar`, `rebased-mad` and `rebased-icll`, as far as they are alike."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_rebased.triton_rebased import triton_unavailable_reason

from .arguments import HelpFormatter, with_dashes
from .recipe import Options, Recipe
from .run_results import read_results
from .values import count, known_device, positive


# Training tokens beyond which a CPU takes hours.
MANY_TOKENS = 100_000_000


def _check_writable(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error before anything is trained if the results could not be written afterwards."""
    folders = {"--output": Path(args.output).parent, "--save": args.save, "--save-weights": args.save_weights}
    for name, folder in (*folders.items(), ("--work-dir", args.work_dir)):
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


def sweep_parser(program: str, description: str, presets: dict[str, dict[str, Any]]) -> argparse.ArgumentParser:
    """Return a parser with the options that say how runs are computed and where they are written."""
    # Without abbreviations, of which `parse_with_preset` would not see one of --preset.
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=presets, help="laptop: a small task that two cores learn in about a minute")
    add(
        "--output",
        default=f"output/{program.removeprefix('rebased-')}.jsonl",
        help="file of results, one line of JSON per run",
    )
    add("--save", metavar="DIR", help="write every trained model to DIR/NAME")
    add("--save-weights", metavar="DIR", help="write the weights after each epoch to DIR/NAME/epoch-N.pt")
    add("--work-dir", metavar="DIR", help="where unfinished runs are kept; default: beside OUTPUT")
    add("--jobs", type=count, default=1, help="kinds of model trained at once on the GPU")
    add("--take-turns", action="store_true", help="with --jobs: compile at once, but train one kind at a time")
    add("--device", type=known_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--kernel-backend", choices=("auto", "eager", "triton"), default="auto", help="of the linear attention")
    add("--fp32", action="store_true", help="no bf16 autocast")
    add("--no-compile", action="store_true", help="no torch.compile")
    add("--no-cuda-graph", action="store_true", help="issue each step from Python")
    add(
        "--deterministic",
        action="store_true",
        help="the same numbers to the bit from run to run on one kind of GPU; slower",
    )
    add("--no-progress", action="store_true", help="no progress bars")
    add(
        "--max-seconds",
        type=positive,
        help="stop runs at the end of their epoch after so long; they stay unfinished",
    )
    return parser


def parse_with_preset(
    parser: argparse.ArgumentParser, presets: dict[str, dict[str, Any]], argv: Sequence[str] | None
) -> argparse.Namespace:
    """Read a command line whose `--preset` changes the defaults."""
    argv = with_dashes(argv)
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets)
    parser.set_defaults(**presets.get(first.parse_known_args(argv)[0].preset, {}))
    return parser.parse_args(argv)


def _check_results(parser: argparse.ArgumentParser, args: argparse.Namespace, runs: Sequence[Recipe]) -> None:
    """End with an error if results of these runs would be taken for finished that were computed in another way."""
    names = {run.name for run in runs}
    for line in read_results(args.output):
        if line.get("name") not in names:
            continue
        for option, asked, given in (
            ("--fp32", args.fp32, not line.get("bf16")),
            ("--deterministic", args.deterministic, line.get("deterministic")),
        ):
            if asked and not given:
                parser.error(
                    f"{option} is given, but {args.output} holds a result of {line['name']} without it. "
                    "Give another --output"
                )


def options_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace, runs: Sequence[Recipe], examples: int, tokens: int
) -> Options:
    """Return what the runs share. End with an error where they cannot run or not be written.

    Args:
        parser: whose error it is.
        args: the command line.
        runs: what is trained.
        examples: training examples of the run with the fewest.
        tokens: training tokens of the longest run. A CPU takes hours for many, and is told so.
    """
    on_gpu = args.device.startswith("cuda")
    if args.kernel_backend == "triton":
        reason = triton_unavailable_reason(torch.device(args.device), torch.float32, 16, 16)
        if reason is not None:
            parser.error(f"--kernel-backend triton cannot run on --device {args.device}: {reason}")
    if args.batch_size > examples:
        parser.error(f"--batch-size {args.batch_size} is larger than --train-examples {examples}")
    if args.take_turns and args.jobs == 1:
        parser.error("--take-turns is for --jobs above 1")
    _check_writable(parser, args)
    _check_results(parser, args, runs)
    if not on_gpu and tokens > MANY_TOKENS:
        print("This needs a GPU: on a CPU it takes hours. --preset laptop is a task for two cores.", file=sys.stderr)
    return Options(
        device=args.device,
        kernel_backend=args.kernel_backend,
        bf16=on_gpu and not args.fp32,
        compile=on_gpu and not args.no_compile,
        cuda_graph=on_gpu and not args.no_cuda_graph,
        progress=not args.no_progress,
        work_dir=args.work_dir or str(Path(args.output).with_suffix("")) + "-unfinished",
        deadline=time.time() + args.max_seconds if args.max_seconds is not None else None,
        take_turns=args.take_turns,
        deterministic=args.deterministic,
        save_weights=args.save_weights,
    )
