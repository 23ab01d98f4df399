"""Command lines of scripts on transformers' Trainer: their own options first, the Trainer's on request."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, PreTrainedConfig, TrainingArguments, get_scheduler
from transformers.hf_argparser import string_to_bool
from transformers.utils import is_accelerate_available, logging
from transformers.utils.generic import strtobool

from .hub import wrong_hub_argument


logger = logging.get_logger(__name__)

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


def gpu_defaults(argv: Sequence[str], *compile_options: str) -> list[str]:
    """Return arguments that a Trainer on a GPU has by default, to be put before those of the command line `argv`.

    They are `--bf16` where the GPU has bfloat16, the switches `compile_options`, and copies of batches to the GPU that
    do not make the host wait for the step before. All are off without a GPU, with `--use_cpu`, and under `accelerate
    launch --cpu`. `--fp16` and `accelerate launch --mixed_precision fp16` replace the first.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("use_cpu", "bf16", "fp16"):
        spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(*sorted(spellings), dest=name, type=string_to_bool, nargs="?", const=True, default=False)
    try:
        given = parser.parse_known_args(list(argv))[0]
    except argparse.ArgumentError:  # a wrong value, of which the parser of all arguments says more
        return []
    # `accelerate launch` sets these variables, of which TrainingArguments reads the first.
    uses_cpu = given.use_cpu or strtobool(os.environ.get("ACCELERATE_USE_CPU", "False"))
    fp16 = given.fp16 or (not given.bf16 and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16")
    on_gpu = torch.cuda.is_available() and not uses_cpu
    values = {"fp16": fp16, "bf16": on_gpu and torch.cuda.is_bf16_supported() and not fp16}
    values |= dict.fromkeys(compile_options, on_gpu)
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*words, "--accelerator_config", '{"non_blocking": true}'] if on_gpu else words


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
    except ImportError as error:  # TrainingArguments looks for what it needs
        extra = "" if is_accelerate_available() else ". The extra brings it: pip install 'modeling-rebased[train]'"
        parser.error(f"{error}{extra}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; --help-all shows all options")
    has_held_out = any(getattr(each, "eval_file", None) for each in parsed)
    if wrong := _wrong_value(parsed[-1]) or _wrong_evaluation(parsed[-1], has_held_out) or _wrong_tool(parsed[-1]):
        parser.error(wrong)
    if (gpus := parsed[-1].n_gpu) > 1:  # of one process, for which the Trainer would take nn.DataParallel
        parsed[-1]._n_gpu = 1
        logger.warning(
            f"One process trains on one GPU, and there are {gpus}. `accelerate launch --multi_gpu "
            f"--num_processes {gpus}` uses all of them, each with a batch of its own."
        )
    return tuple(parsed)


def _wrong_value(args: TrainingArguments) -> str | None:
    """Return what is wrong with values that the Trainer takes until it begins to train, or for good."""
    if args.use_liger_kernel:  # the library would pass over a model that Liger does not know without a word
        return "--use_liger_kernel has no kernels for ReBased, whose loss on a GPU is fused without it"
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched > args.world_size == 1:  # accelerate does not join processes without a GPU unasked
        return f"{launched} processes would each train alone into one folder; processes on a CPU need --use_cpu"
    if wrong := wrong_hub_argument(args):
        return wrong
    for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"):
        if not 0 <= (value := getattr(args, name)) < math.inf:
            return f"--{name} must be at least 0 and finite, got {value:g}"
    for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= (value := getattr(args, name)) < 1:
            return f"--{name} must be at least 0 and less than 1, got {value:g}"
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (value := getattr(args, name)) < 1:
            return f"--{name} must be at least 1, got {value}"
    for name in ("save_total_limit", "eval_accumulation_steps"):  # the library would keep all, or divide by 0
        if (value := getattr(args, name)) is not None and value < 1:
            return f"--{name} must be at least 1, got {value}"
    if args.save_strategy == "steps" and not args.save_steps > 0:  # the library would write no checkpoint
        return f"--save_steps must be positive, got {args.save_steps:g}; --save_strategy no writes no checkpoints"
    if args.logging_strategy == "steps" and not 0 < args.logging_steps < math.inf:
        return (
            f"--logging_steps must be positive and finite, got {args.logging_steps:g}; --logging_strategy no logs none"
        )
    if args.dataloader_num_workers < 0:
        return f"--dataloader_num_workers must be at least 0, got {args.dataloader_num_workers}"
    if not 0 <= args.seed < 2**32:
        return f"--seed must be at least 0 and less than 2**32, got {args.seed}"
    if args.max_steps < 1 and args.max_steps != -1:  # the library would train for the epochs
        return f"--max_steps must be at least 1, or -1 to train for --num_train_epochs, got {args.max_steps}"
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        return f"--num_train_epochs must be positive and finite, got {args.num_train_epochs:g}"
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint, "trainer_state.json").is_file():
        return f"--resume_from_checkpoint {checkpoint} is no checkpoint: it has no trainer_state.json"
    return None


def _wrong_evaluation(args: TrainingArguments, has_held_out: bool) -> str | None:
    """Return what is wrong with the arguments of the evaluation during training."""
    if not has_held_out and args.eval_strategy != "no":
        return f"--eval_strategy {args.eval_strategy.value} needs --eval_file, which is not given"
    if not has_held_out and args.eval_on_start:
        return "--eval_on_start True needs --eval_file, which is not given"
    if args.eval_steps is not None and args.eval_strategy != "steps":
        return f"--eval_steps is for --eval_strategy steps, which is {args.eval_strategy.value}"
    if args.eval_steps is not None and not 0 < args.eval_steps < math.inf:
        return f"--eval_steps must be positive and finite, got {args.eval_steps:g}"
    metric, allowed = args.metric_for_best_model, getattr(args, "METRICS", ("loss",))
    if metric is not None and metric.removeprefix("eval_") not in allowed:
        return f"--metric_for_best_model must be one of {', '.join(allowed)}, got {metric}"
    if not 0 <= args.eval_delay < math.inf:
        return f"--eval_delay must be at least 0 and finite, got {args.eval_delay:g}"
    return None


def _wrong_tool(args: TrainingArguments) -> str | None:
    """Return what is wrong with the optimizer, the schedule and other tools, which the Trainer would say late."""
    from transformers import Trainer  # here, since it takes seconds
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    if missing := sorted(set(args.report_to) - set(available)):
        here = ", ".join(["none", *sorted(available)])
        return f"--report_to must be of {here}, whose packages are installed, got {', '.join(missing)}"

    optimizer_name, schedule = (str(getattr(x, "value", x)) for x in (args.optim, args.lr_scheduler_type))
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        return f"--optim {optimizer_name}: {error}"
    except ValueError:
        pass  # of optimizers that look at the model
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    total = max(args.max_steps, 10_000)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, total, dict(args.lr_scheduler_kwargs or {}))
    except (TypeError, ValueError) as error:
        given = json.dumps(args.lr_scheduler_kwargs or {})
        return f"--lr_scheduler_type {schedule} with --lr_scheduler_kwargs {given}: {error}"
    if args.torch_compile:
        from accelerate.utils import DynamoBackend

        backends = [backend.value.lower() for backend in DynamoBackend]
        if args.torch_compile_backend.lower() not in backends:
            return f"--torch_compile_backend must be one of {', '.join(backends)}, got {args.torch_compile_backend}"
        modes = list(torch._inductor.list_mode_options())
        if args.torch_compile_mode not in (None, *modes):
            return f"--torch_compile_mode must be one of {', '.join(modes)}, got {args.torch_compile_mode}"
    if args.gradient_checkpointing_kwargs and not args.gradient_checkpointing:
        return "--gradient_checkpointing_kwargs is for --gradient_checkpointing True, which is not given"
    return None


def check_paths(files: Mapping[str, Sequence[str] | None], output_dir: str) -> None:
    """Refuse paths that cannot be read or written.

    Args:
        files: the files of each argument, by its name.
        output_dir: a folder, or a new one.

    Raises:
        ValueError: a file is missing, or `output_dir` is or lies in a file.
    """
    for name, paths in files.items():
        missing = [path for path in paths or [] if not Path(path).exists()]
        if missing:
            raise ValueError(f"--{name}: there is no {', '.join(missing)}")
    path = Path(output_dir).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if not nearest.is_dir():
        which = "is a file" if nearest == path else f"would lie in the file {nearest}"
        raise ValueError(f"--output_dir {output_dir} {which}; it must be a folder, or a new one")


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Refuse examples that are longer than a model's learned positions.

    Raises:
        ValueError: `--context_length` is above the configuration's `max_position_embeddings`.
    """
    learned = getattr(config, "position_embedding_type", None) == "learned"
    if learned and length > config.max_position_embeddings:
        raise ValueError(
            f"--context_length is {length}, but the model has learned positions for {config.max_position_embeddings} "
            "tokens, its max_position_embeddings"
        )


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
