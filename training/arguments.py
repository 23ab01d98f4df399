"""Command lines of scripts on transformers' Trainer: their own options first, the Trainer's on request."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .hub import wrong_hub_argument


# Of the Trainer's options, those that nearly every run sets.
COMMON = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "save_steps",
    "logging_steps",
    "bf16",
    "seed",
)


def parse_dataclasses(program: str, description: str, classes: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """Read a command line into dataclasses, of which the last is a `TrainingArguments`.

    `--help` shows the options of the other classes, those that the last one overrides and those in `COMMON`, each with
    its default. `--help-all` shows the rest of the Trainer's options too. A dash in an option's name counts as `_`.

    Args:
        program: name for messages.
        description: text above the options.
        classes: dataclasses with a help text in each field's metadata.
        argv: the command line.
    """
    parser = HfArgumentParser(
        classes,
        prog=program,
        description=description,
        formatter_class=HelpFormatter,
        epilog="--help-all also shows the other options of transformers' TrainingArguments.",
        # The library's usage lists every option, with both spellings of each, before each message of an error.
        usage=f"{program} [RECIPE.yaml] [options]",
        allow_abbrev=False,  # or a misspelt option counts as the one that it begins
    )
    if "--help-all" in argv or "--help_all" in argv:
        parser.epilog = None
        parser.print_help()
        sys.exit(0)
    if "-h" in argv or "--help" in argv:
        shown = {"help", *COMMON, *classes[-1].__annotations__}
        shown |= {
            field.name
            for each in classes
            if not issubclass(each, TrainingArguments)
            for field in dataclasses.fields(each)
        }
        for action in parser._actions:
            if action.dest not in shown:
                action.help = argparse.SUPPRESS
        parser.print_help()
        sys.exit(0)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    except ValueError as error:  # of the checks of TrainingArguments
        parser.error(str(error))
    except ImportError as error:  # TrainingArguments looks for accelerate
        parser.error(f"{error}. The extra brings it: pip install 'modeling-rebased[train]'")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; --help-all shows all options")
    if wrong := _wrong_value(parsed[-1]):
        parser.error(wrong)
    return tuple(parsed)


def _wrong_value(args: TrainingArguments) -> str | None:
    """Return what is wrong with values that the Trainer takes until it begins to train, or for good."""
    if args.use_liger_kernel:  # the library would pass over a model that Liger does not know without a word
        return "--use_liger_kernel has no kernels for ReBased, whose loss on a GPU is fused without it"
    if wrong := wrong_hub_argument(args):
        return wrong
    for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
        if not 0 <= (value := getattr(args, name)) < math.inf:
            return f"--{name} must be at least 0 and finite, got {value:g}"
    for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= (value := getattr(args, name)) < 1:
            return f"--{name} must be at least 0 and less than 1, got {value:g}"
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (value := getattr(args, name)) < 1:
            return f"--{name} must be at least 1, got {value}"
    if args.save_strategy == "steps" and not args.save_steps > 0:  # the library would write no checkpoint
        return f"--save_steps must be positive, got {args.save_steps:g}; --save_strategy no writes no checkpoints"
    if args.dataloader_num_workers < 0:
        return f"--dataloader_num_workers must be at least 0, got {args.dataloader_num_workers}"
    if args.max_steps < 1 and args.max_steps != -1:  # the library would train for the epochs
        return f"--max_steps must be at least 1, or -1 to train for --num_train_epochs, got {args.max_steps}"
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        return f"--num_train_epochs must be positive and finite, got {args.num_train_epochs:g}"
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint, "trainer_state.json").is_file():
        return f"--resume_from_checkpoint {checkpoint} is no checkpoint: it has no trainer_state.json"
    return None


def check_paths(files: Mapping[str, Sequence[str] | None], output_dir: str) -> None:
    """Refuse paths that cannot be read or written.

    Args:
        files: the files of each argument, by its name.
        output_dir: a folder, or a new one.

    Raises:
        ValueError: a file is missing, or `output_dir` is a file.
    """
    for name, paths in files.items():
        missing = [path for path in paths or [] if not Path(path).exists()]
        if missing:
            raise ValueError(f"--{name}: there is no {', '.join(missing)}")
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; it must be a folder, or a new one")


def read_yaml(path: Path) -> Any:
    """Return the content of a recipe.

    Raises:
        ValueError: the file is no YAML in UTF-8.
        OSError: it cannot be read.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {path} is no YAML: {error}") from error


def command_line(content: Mapping[str, Any]) -> list[str]:
    """Return the fields of a recipe as arguments of a command line. A field without a value is left out."""
    argv: list[str] = []
    for name, value in content.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in values)]
    return argv


def with_dashes(argv: Sequence[str] | None = None) -> list[str]:
    """Return a command line, by default this process's, with dashes for the `_` in the names of its options."""
    argv = sys.argv[1:] if argv is None else argv
    return [re.sub(r"^--[\w-]+", lambda name: name[0].replace("_", "-"), each) for each in argv]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the default of each option, and the description as it was written."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # the library adds each option with dashes in its name too
        if len(action.option_strings) > 1 and action.option_strings[0].startswith("--"):
            return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        empty = action.default is None or action.default is False or action.default in ("", [], argparse.SUPPRESS)
        if empty or "default" in text:
            return text
        if isinstance(action.default, (list, tuple)):  # as it is typed
            return f"{text} (default: {(' ' if action.nargs else ',').join(map(str, action.default))})"
        return f"{text} (default: %(default)s)"
