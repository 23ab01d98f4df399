"""The arguments of `distill`: the models, the text, and the published recipe as defaults."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments


# The published recipe, for which the command line can give other values.
RECIPES: dict[str, dict[str, Any]] = {
    "transfer": {"learning_rate": 1e-2, "context_length": 512, "per_device_train_batch_size": 24},
    "logits": {"learning_rate": 6e-4, "context_length": 1024, "per_device_train_batch_size": 12},
}


@dataclass
class DistillArguments:
    """Hold the models, the text and the settings of one stage."""

    stage: Literal["transfer", "logits"] = field(metadata={"help": "What is matched: attention outputs, or logits."})
    teacher: str = field(metadata={"help": "Folder of the softmax model."})
    student: str = field(metadata={"help": "Folder that linearize made, or an earlier stage's final."})
    train_file: list[str] = field(
        metadata={
            "help": "Text files, in which <|endoftext|> separates documents, .jsonl files with a 'text' per line, or "
            ".npy files of token ids. A file that is named twice counts twice."
        }
    )
    eval_file: list[str] | None = field(default=None, metadata={"help": "Held-out files, each measured by itself."})
    context_length: int = field(
        default=512, metadata={"help": "Tokens of an example; default: 512 in stage transfer, 1024 in logits."}
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
    temperature: float = field(default=1.0, metadata={"help": "Of both distributions in stage logits."})
    text_weight: float = field(
        default=0.4,
        metadata={"help": "Share of the loss of the text itself in stage logits; the rest is the teacher's."},
    )
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank and merge them; 0 trains all."})


@dataclass
class DistillTrainingArguments(TrainingArguments):
    """Hold the arguments of transformers, with the published recipe as defaults."""

    learning_rate: float = field(
        default=6e-4, metadata={"help": "Peak learning rate; default: 1e-2 in stage transfer, 6e-4 in logits."}
    )
    per_device_train_batch_size: int = field(
        default=12, metadata={"help": "Examples per GPU and step; default: 24 in stage transfer, 12 in logits."}
    )
    warmup_steps: float = field(
        default=30, metadata={"help": "Steps of warm-up, or below 1 a share of all; at most a tenth of --max_steps."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second decay rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
