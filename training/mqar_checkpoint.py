"""Write the folder of a model that was trained on MQAR."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard

from modeling_rebased import ReBasedForCausalLM

from . import folders, mqar
from .card import model_card, training_section, typed_command


if TYPE_CHECKING:
    from .mqar_runs import Run


# The sizes that lm-eval's tasks in eval/tasks have by themselves, (length, pairs).
TASKS = {(128, 16), (256, 4), (256, 8), (256, 16), (256, 32), (256, 64), (512, 128), (1024, 256), (2048, 512)}


def save_model(model: ReBasedForCausalLM, run: Run, folder: str | Path, result: dict[str, Any] | None = None) -> None:
    """Write a checkpoint folder: bf16 safetensors, configuration, code, the WordLevel tokenizer and a card.

    Args:
        model: the trained model.
        run: what it was trained on.
        folder: the new folder, which appears when it is complete.
        result: the run's line of results, for the card.
    """
    model = model.to("cpu", torch.bfloat16).eval()
    model.config.kernel_backend = "auto"
    tokenizer = mqar.build_tokenizer(run.vocab_size, run.length)
    with folders.written(folder) as path:
        folders.save_model(path, model, tokenizer, mqar_card(model, run, str(folder), result))


def mqar_card(model: ReBasedForCausalLM, run: Run, folder: str, result: dict[str, Any] | None = None) -> ModelCard:
    """Return the card of a model trained on MQAR, with what its training measured."""
    first_value = run.vocab_size // 2
    text = (
        f"Two layers, a short convolution and one layer of {run.model} attention, trained on multi-query associative "
        f"recall (MQAR). A sequence of {run.length} tokens starts with {run.pairs} key-value pairs. The keys come "
        f"again in another order, and the model says each one's value. Its tokens are the symbols of the task: `_` is "
        f"the filler, `1` to `{first_value - 1}` are keys, `{first_value}` to `{run.vocab_size - 1}` are values. It "
        "knows nothing else."
    )
    sections = [f"## Score\n\n```console\n{_lm_eval(run, folder)}\n```"]
    if result is not None:
        sections.append(_training(run, result))
    return model_card(
        model.config,
        model.num_parameters(),
        name=f"{run.model} for multi-query associative recall, hidden size {run.hidden}",
        folder=folder,
        prompt=f"1 {first_value} 2 {first_value + 1} 1",
        new_tokens=1,
        text=text,
        sections=sections,
        tags=["associative-recall", "mqar"],
    )


def _lm_eval(run: Run, folder: str) -> str:
    """Return the command that scores a model with lm-eval, by a task of its sizes or with the sizes given to one."""
    task, sizes = f"mqar_{run.length}_{run.pairs}", {}
    if (run.length, run.pairs) not in TASKS:
        task, sizes = "mqar_128_16", {"length": run.length, "num_pairs": run.pairs}
    if run.vocab_size != mqar.MQARSpec.vocab_size:
        sizes["vocab_size"] = run.vocab_size
    metadata = f" --metadata '{json.dumps(sizes)}'" if sizes else ""
    return (
        f"lm-eval run --model hf --model_args pretrained={folder},trust_remote_code=True \\\n"
        f'    --include_path "$(rebased-tasks)" --tasks {task}{metadata} --batch_size 32'
    )


def _training(run: Run, result: dict[str, Any]) -> str:
    examples = run.steps_per_epoch * run.batch_size
    settings = [
        ("examples per epoch", f"{examples:,}"),
        ("epochs", f"{result['epochs_trained']} of {run.epochs}"),
        ("examples per step", run.batch_size),
        ("optimizer", f"AdamW, weight decay {run.weight_decay:g} on every parameter"),
        ("learning rate", f"{run.lr:g}, falling along a cosine from epoch to epoch"),
        ("dropout", f"{run.dropout:g} of embeddings"),
        ("precision", "bfloat16, mixed" if result["bf16"] else "float32"),
        ("seed", run.seed),
    ]
    return training_section(
        command=typed_command("training.train_mqar", sys.argv[1:]),
        data=[
            (f"MQAR, seed {run.data_seed}", "training", f"{examples * run.length:,} tokens"),
            (f"MQAR, seed {run.data_seed}", "test", f"{run.test_examples * run.length:,} tokens"),
        ],
        settings=settings,
        hardware=result["device"],
        figures=[
            ("accuracy", f"{result['accuracy']:.2%} of the queries of {run.test_examples:,} test sequences"),
            ("training time", f"{result['seconds']:.0f} seconds"),
        ],
    )
