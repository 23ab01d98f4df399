"""The model card: one writer for every folder that this package makes."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from modeling_rebased import ReBasedConfig
from modeling_rebased.configuration_rebased import LINEAR_LAYER_TYPES

from .shards import load_index


PAPER = "[arXiv 2402.10644](https://arxiv.org/abs/2402.10644)"
Row = Sequence[Any]


def model_card(
    config: ReBasedConfig,
    parameters: int,
    *,
    name: str,
    folder: str,
    prompt: str | None,
    new_tokens: int = 50,
    text: str = "",
    sections: Sequence[str] = (),
    tags: Sequence[str] = (),
    **metadata: Any,
) -> ModelCard:
    """Return the card of a model: what it is, how to load it and generate, and the sections that are given.

    Args:
        config: the model's configuration.
        parameters: its number of parameters.
        name: the card's title.
        folder: the folder or the Hub's "user/name" that the example loads.
        prompt: text for the example to continue. Without one, as for a model without a tokenizer, the example only
            loads the model.
        new_tokens: how many tokens the example generates.
        text: Markdown to stand after the description.
        sections: Markdown to stand at the end, such as `training_section` gives.
        tags: beside "rebased" and "linear-attention".
        metadata: more fields of `huggingface_hub.ModelCardData`, such as `license`. No license is stated that is not
            given.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rebased", "linear-attention", *tags],
        **metadata,
    )
    parts = [f"# {name}", _description(config), text, table(("", ""), _sizes(config, parameters))]
    parts += ["## Use", _example(folder, prompt, new_tokens), *sections]
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _has_linear_layers(config: ReBasedConfig) -> bool:
    return any(layer_type in LINEAR_LAYER_TYPES for layer_type in config.layer_types)


def _description(config: ReBasedConfig) -> str:
    if config.kernel == "rebased" and _has_linear_layers(config):
        return f"A causal language model with ReBased linear attention, a learnable quadratic kernel ({PAPER})."
    return f"A causal language model of the ReBased family ({PAPER})."


def _sizes(config: ReBasedConfig, parameters: int) -> list[Row]:
    counts = ", ".join(f"{count} {layer_type}" for layer_type, count in Counter(config.layer_types).items())
    rows: list[Row] = [
        ("parameters", f"{parameters:,}"),
        ("layers", f"{config.num_hidden_layers}: {counts}"),
        ("hidden size", config.hidden_size),
        ("MLP", config.mlp_type),
        ("positions", config.position_embedding_type),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("length trained on", config.max_position_embeddings),
    ]
    if _has_linear_layers(config):
        state = f"{config.num_key_value_heads} x {config.n_features} x {config.head_dim + 1} numbers, at every length"
        rows += [
            ("kernel", f"{config.kernel}, w = c0 + c1 s + c2 s² with {config.coefficients}"),
            ("heads", f"{config.num_attention_heads}, of {config.head_dim}; queries and keys of {config.feature_dim}"),
            ("state of a linear layer", state),
        ]
    return rows


def _example(folder: str, prompt: str | None, new_tokens: int) -> str:
    load = f'model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)\n'
    if prompt is None:
        code = f"from transformers import AutoModelForCausalLM\n\n{load}"
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)\n{load}'
            f'inputs = tokenizer("{prompt}", return_tensors="pt")\n'
            f"output = model.generate(**inputs, max_new_tokens={new_tokens})\n"
            "print(tokenizer.decode(output[0]))\n"
        )
    return (
        "The model's code is in this repository, so `transformers` and `torch` are all it needs:\n\n"
        f"```python\n{code}```"
    )


def training_section(
    *,
    command: str,
    data: Sequence[Row],
    settings: Sequence[Row],
    hardware: str,
    figures: Sequence[Row],
) -> str:
    """Return the section of a card that says how a model was trained.

    Args:
        command: what was typed.
        data: rows of (file or data set, its use, its size with a unit).
        settings: rows of (hyperparameter, value).
        hardware: the machine, in words.
        figures: rows of (what was measured, value with a unit).
    """
    parts = [
        "## Training",
        f"```console\n{command}\n```",
        table(("data", "use", "size"), data),
        table(("setting", "value"), [*settings, ("versions", versions()), ("hardware", hardware)]),
        table(("figure", "value"), figures),
    ]
    return "\n\n".join(parts)


def typed_command(module: str, argv: Sequence[str] | None = None) -> str:
    """Return the command line of this process as a user would type it, `python -m MODULE ...`, without its token."""
    line = shlex.join(["python", "-m", f"modeling_rebased.{module}", *(sys.argv[1:] if argv is None else argv)])
    return re.sub(r"(--hub[_-]token[= ])\S+", r"\1...", line)  # the card may be public


def versions() -> str:
    """Return the releases of Python and the libraries that decide a run's numbers."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def hardware(device: torch.device, processes: int = 1) -> str:
    """Return what a run was computed on, in words."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    return f"{platform.machine()} CPU, processes: {processes}, threads of each: {torch.get_num_threads()}"


def warm_up(steps: float) -> str:
    """Return the Trainer's `warmup_steps` in words: a number of steps, or below 1 a share of all."""
    return "none" if steps == 0 else f"{steps:g} steps" if steps >= 1 else f"{steps:.3g} of all steps"


def file_size(path: str | os.PathLike) -> str:
    """Return the size of a file, or of the text in a folder of shards, with its unit."""
    if Path(path).is_dir():
        index = load_index(path)
        return f"{sum(shard['bytes'] for shard in index['shards']):,} bytes of text, {index['tokens']:,} tokens"
    return f"{Path(path).stat().st_size:,} bytes"


def table(head: Row, rows: Sequence[Row]) -> str:
    """Return a table in Markdown."""

    def line(cells: Row) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows)])
