"""The arguments of `distill`: the models, the text, and the published recipe as defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from modeling_rebased.training.arguments import command_line, read_yaml

from .report import ConversionError, sentence


# The published recipe, for which the command line can give other values.
RECIPES: dict[str, dict[str, Any]] = {
    "transfer": {"learning_rate": 1e-2, "context_length": 512, "per_device_train_batch_size": 24},
    "logits": {"learning_rate": 6e-4, "context_length": 1024, "per_device_train_batch_size": 12},
    "long": {"learning_rate": 2e-4, "context_length": 4096, "per_device_train_batch_size": 3},
}


@dataclass
class DistillArguments:
    """Hold the models, the text and the settings of one stage."""

    stage: Literal["transfer", "logits", "long"] = field(
        metadata={"help": "What is matched: attention outputs, or logits, of short or long examples."}
    )
    teacher: str = field(metadata={"help": "Folder of the softmax model."})
    student: str = field(metadata={"help": "Folder that linearize made, or an earlier stage's final."})
    train_file: list[str] = field(
        metadata={
            "help": "Text files, in which <|endoftext|> separates documents, .jsonl files with a 'text' per line, "
            ".npy files of token ids, or folders of shards (rebased-sample). What is named twice counts twice."
        }
    )
    eval_file: list[str] | None = field(default=None, metadata={"help": "Held-out files, each measured by itself."})
    context_length: int = field(
        default=512,
        metadata={"help": "Tokens of an example; default: 512 in stage transfer, 1024 in logits, 4096 in long."},
    )
    eval_length: list[int] | None = field(
        default=None, metadata={"help": "Tokens of an example of held-out text (default: CONTEXT_LENGTH)."}
    )
    max_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Train for so long instead of a number of steps: the learning rate falls to 0, in a line, by then."
        },
    )
    compile: bool = field(
        default=False, metadata={"help": "Compile the layers and the loss with torch.compile; pays from a minute on."}
    )
    kernel_backend: Literal["auto", "eager", "triton"] | None = field(
        default=None, metadata={"help": "Overrides the student's kernel_backend in training."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of both distributions in stages logits and long."})
    text_weight: float = field(
        default=0.4,
        metadata={
            "help": "Share of the loss of the text itself in stages logits and long; the rest is the teacher's."
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank and merge them; 0 trains all."})


@dataclass
class DistillTrainingArguments(TrainingArguments):
    """Hold the arguments of transformers, with the published recipe as defaults."""

    learning_rate: float = field(
        default=6e-4,
        metadata={"help": "Peak learning rate; default: 1e-2 in stage transfer, 6e-4 in logits, 2e-4 in long."},
    )
    per_device_train_batch_size: int = field(
        default=12,
        metadata={"help": "Examples per GPU and step; default: 24 in stage transfer, 12 in logits, 3 in long."},
    )
    warmup_steps: float = field(
        default=30, metadata={"help": "Steps of warm-up, or below 1 a share of all; at most a tenth of --max_steps."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second decay rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})


def read_recipe(path: Path, stage: str | None) -> list[str]:
    """Return the arguments that a recipe in YAML gives to one of its stages, as on a command line.

    A recipe holds one argument per line, which all stages share, and under `stages` a section per stage with more of
    them, in the order in which they are trained. Each stage writes to a folder of its name in `output_dir`. The first
    one starts from `student`, and each other one from what the stage before it has made.

    Raises:
        ConversionError: the file is no such recipe, or it has no section for `stage`.
    """
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ConversionError(sentence(error)) from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
        raise ConversionError(f"{path} is no recipe: it must have a section `stages`.")
    sections = content.pop("stages")
    if stage is None or stage not in sections:
        raise ConversionError(f"--stage is {stage}; it must be one of {path}'s stages: {', '.join(sections)}.")
    section = sections[stage] or {}
    if not isinstance(section, dict):
        raise ConversionError(f"{path}'s stage {stage} must hold arguments, one per line, but holds {section!r}.")
    names = list(sections)
    shared = {"output_dir": "output", **content}
    folder = Path(shared["output_dir"])
    before = names.index(stage) - 1
    given = {**shared, "output_dir": str(folder / stage)}
    if before >= 0:
        given["student"] = str(folder / names[before] / "final")
    return command_line(given | section)
