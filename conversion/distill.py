"""Train what `linearize` started, against the softmax model it came from, with the transformers Trainer.

    rebased-distill --stage transfer --teacher SmolLM2/ --student start/ --train_file text.txt \\
        --output_dir output/transfer --max_steps 400
    rebased-distill --stage logits --teacher SmolLM2/ --student output/transfer/final \\
        --train_file text.txt --eval_file held_out.txt --output_dir output/logits --max_steps 1200
    rebased-distill ... --max_seconds 600 --compile True   # stop after ten minutes
    accelerate launch -m modeling_rebased.conversion.distill ...                 # any number of GPUs
    rebased-distill RECIPE.yaml --stage transfer           # and so on: all stages from one file

`rebased-distill` is `python -m modeling_rebased.conversion.distill`. Beside the arguments below, every one of
transformers' TrainingArguments can be given, except --use_liger_kernel. With --push_to_hub the finished model is
uploaded to the Hub, and no checkpoints are. Stage "transfer" teaches each linear layer by itself to match the output
of the teacher's attention on the same input. It trains only queries, keys, their normalisation and the gate. Stage
"logits" teaches the whole student the teacher's distribution of the next token. Stage "long" does the same with long
examples. The defaults of the stages are the published recipe (docs/conversion.md). `conversion/smollm2.yaml` is a
recipe in YAML, and `read_recipe` says what it may hold.

The same command continues from the newest complete checkpoint in OUTPUT_DIR. A finished run is left as it is, and a
folder that holds another run is refused. A run writes:

    OUTPUT_DIR/final                 the model and its card
    OUTPUT_DIR/perplexity.json       held-out perplexities of the teacher, and of the student before and after
    OUTPUT_DIR/trainer_state.json    the losses
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.training.arguments import check_length, check_paths, gpu_defaults, parse_dataclasses
from modeling_rebased.training.card import file_size, hardware, model_card, training_section, typed_command, warm_up
from modeling_rebased.training.folders import gathered_model, save_model, write_text, written
from modeling_rebased.training.hub import open_repository, upload_finished
from modeling_rebased.training.resume import (
    RunError,
    RunRecord,
    latest_complete_checkpoint,
    train_from,
    weights_identity,
)
from modeling_rebased.training.shards import tokenizer_identity
from modeling_rebased.training.tensor_parallel import split_model, tensor_parallel_size
from modeling_rebased.training.text import TokenBlocks
from modeling_rebased.training.train_lm import check_kernels
from modeling_rebased.training.values import one_line

from .distill_arguments import RECIPES, DistillArguments, DistillTrainingArguments, read_recipe
from .distill_trainer import DistillTrainer, freeze_all_but_transferred, linear_layers, without_mlps
from .reading import load_config, load_model
from .report import ConversionError, progress, sentence


def parse_arguments(argv: Sequence[str]) -> tuple[DistillArguments, DistillTrainingArguments]:
    """Read the command line on top of the recipe of its stage."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage")
    stage = parser.parse_known_args(argv)[0].stage
    recipe = RECIPES.get(stage, {})
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*read_recipe(Path(argv[0]), stage), *argv[1:]]
    given = [
        *gpu_defaults(argv),
        *(text for name, value in recipe.items() for text in (f"--{name}", str(value))),
        *argv,
    ]
    distill, arguments = parse_dataclasses(
        "rebased-distill", __doc__, (DistillArguments, DistillTrainingArguments), given
    )
    if arguments.max_steps > 0 and not any(each.startswith(("--warmup_steps", "--warmup-steps")) for each in argv):
        arguments.warmup_steps = min(arguments.warmup_steps, arguments.max_steps // 10)
    return distill, arguments


def batch_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens to give to a model at once. On a GPU their float32 logits take about 4 GiB at most."""
    if model.device.type != "cuda":
        return 4096
    return min(16384, max(4096, 2**30 // model.config.get_text_config().vocab_size))


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: TokenBlocks) -> float:
    """Return the exponential of the mean loss per token, given the tokens before it in its example."""
    model.eval()
    length = blocks.length
    batch_size = max(1, batch_tokens(model) // length)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    # Compiled layers would be compiled again for these shapes.
    with torch.compiler.set_stance("force_eager"):
        for start in progress(range(0, len(blocks), batch_size), "perplexity"):
            ids = blocks.blocks(start, start + batch_size).to(model.device)
            # Example by example: the logits of the whole batch are not copied.
            for logits, tokens in zip(model(input_ids=ids, use_cache=False).logits, ids):
                total += F.cross_entropy(logits[:-1].float(), tokens[1:], reduction="sum")
    return math.exp(total.item() / (len(blocks) * (length - 1)))


def check_pair(teacher: PreTrainedModel, student: ReBasedForCausalLM) -> None:
    """Check that the student fits the teacher.

    Raises:
        ConversionError: their sizes differ.
    """
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if theirs != ours:
            raise ConversionError(f"{name} must be the same for --teacher and --student, but is {theirs} and {ours}.")


def read_held_out(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], argument: str
) -> dict[tuple[str, int], TokenBlocks]:
    """Return the blocks of each file, by file and length. A file is encoded once.

    Raises:
        ValueError: a file cannot be read, or holds less than one block, or a length is below 2. The message says that
            `argument` gave the lengths.
    """
    found: dict[tuple[str, int], TokenBlocks] = {}
    for name in files:
        first = TokenBlocks([name], tokenizer, lengths[0], argument=argument)
        found |= {(name, length): first.of_length(length, argument) for length in lengths}
    return found


def read_texts(distill: DistillArguments) -> tuple[PreTrainedTokenizerBase, TokenBlocks, dict[tuple, TokenBlocks]]:
    """Return the teacher's tokenizer, the text to train on, and the held-out text by file and length.

    Raises:
        ConversionError: there is no tokenizer, a file cannot be read, or files hold less than one block.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(distill.teacher)
    except (ValueError, OSError) as error:
        raise ConversionError(f"--teacher {distill.teacher!r} gives no tokenizer: {one_line(error)}") from error
    argument = "--context_length" if distill.eval_length is None else "--eval_length"
    lengths = distill.eval_length or [distill.context_length]
    try:
        held_out = read_held_out(distill.eval_file or [], tokenizer, lengths, argument)
        return tokenizer, TokenBlocks(distill.train_file, tokenizer, distill.context_length), held_out
    except ValueError as error:
        raise ConversionError(sentence(error)) from error


def check_arguments(distill: DistillArguments, arguments: TrainingArguments) -> None:
    """Refuse arguments that do not go together, before anything is loaded.

    Raises:
        ConversionError: an argument does not fit; the message names it.
    """
    try:
        check_paths({"train_file": distill.train_file, "eval_file": distill.eval_file}, str(arguments.output_dir))
    except ValueError as error:
        raise ConversionError(sentence(error)) from error
    if distill.eval_length is not None and not distill.eval_file:
        raise ConversionError("--eval_length is given, but no --eval_file to measure.")
    if distill.max_seconds is not None and not distill.max_seconds > 0:
        raise ConversionError(f"--max_seconds is {distill.max_seconds}; it must be positive.")
    if distill.max_seconds is not None and 0 < arguments.warmup_steps < 1:
        raise ConversionError(
            f"--warmup_steps is {arguments.warmup_steps:g}, a share of all steps, whose number --max_seconds leaves "
            "open; it must be 0 or a number of steps."
        )
    if not 0 < distill.temperature < math.inf:
        raise ConversionError(f"--temperature is {distill.temperature}; it must be positive and finite.")
    if not 0 <= distill.text_weight <= 1:
        raise ConversionError(f"--text_weight is {distill.text_weight}; it must be 0 to 1.")
    if distill.lora_rank < 0:
        raise ConversionError(f"--lora_rank is {distill.lora_rank}; it must be at least 0, which trains all weights.")
    if distill.stage == "transfer":
        for name in ("temperature", "text_weight"):
            if getattr(distill, name) != getattr(DistillArguments, name):  # the default
                raise ConversionError(f"--{name} is for stages logits and long; stage transfer reads no logits.")
    if arguments.label_smoothing_factor:
        raise ConversionError("--label_smoothing_factor has no place: the loss is the distance to the teacher.")
    if distill.lora_rank and tensor_parallel_size() > 1:
        raise ConversionError("--lora_rank cannot be used with tp_size above 1: the weights to merge with are split.")
    if distill.stage == "transfer" and distill.lora_rank:
        raise ConversionError("--lora_rank is for stage logits; stage transfer trains few weights as it is.")
    if distill.stage == "transfer" and arguments.gradient_checkpointing:
        raise ConversionError("--gradient_checkpointing is for stage logits; transfer keeps no long graph.")
    student = _student_config(distill)
    if distill.stage == "transfer":
        linear_layers(student)
    try:
        check_kernels(student, arguments)
        check_length(student, distill.context_length)
    except ValueError as error:
        raise ConversionError(sentence(error)) from error
    # Anything else that is no folder is looked for on the Hub, where a misspelt path is not either.
    if not Path(distill.teacher).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.gguf)", distill.teacher):
        raise ConversionError(
            f"--teacher is {distill.teacher!r}; it must be the folder of a softmax model, which linearize makes of a "
            "GGUF file with --layers softmax."
        )


@contextlib.contextmanager
def _each_process_loads_all() -> Iterator[None]:
    """Load whole models in every process. Under FSDP, transformers before 5.23 gives all but the first zeros."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    given = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if given is not None:
            os.environ[name] = given


def load_pair(distill: DistillArguments, dtype: torch.dtype) -> tuple[PreTrainedModel, ReBasedForCausalLM]:
    """Return the teacher, in `dtype`, and the student, in float32.

    Raises:
        ConversionError: weights are missing, or the two do not fit each other.
    """
    with _each_process_loads_all():  # FSDP2 sends the student's weights to all processes, and not the teacher's
        teacher = load_model(AutoModelForCausalLM, distill.teacher, f"--teacher {distill.teacher!r}", dtype=dtype)
    where = f"--student {distill.student!r}"
    student = load_model(
        ReBasedForCausalLM, distill.student, where, config=_student_config(distill), dtype=torch.float32
    )
    check_pair(teacher, student)
    return teacher, student


def _student_config(distill: DistillArguments) -> ReBasedConfig:
    """Return the student's configuration, with the backend that was asked for."""
    config = load_config(Path(distill.student))
    if distill.kernel_backend is not None:
        config.kernel_backend = distill.kernel_backend
    return config


def run(distill: DistillArguments, arguments: TrainingArguments, command: str = "") -> list[dict[str, Any]]:
    """Train one stage.

    Args:
        distill, arguments: what is trained and how.
        command: what was typed, for the model's card.

    Returns:
        A row per held-out file and length, as in OUTPUT_DIR/perplexity.json. It has the perplexities of the "teacher"
        (in the dtype in which it taught), and of the student now ("student") and at the start ("before"). The
        student's are in float32, with TF32 products on a GPU.

    Raises:
        ConversionError: an argument is wrong, or OUTPUT_DIR holds another run.
    """
    set_seed(arguments.seed)
    check_arguments(distill, arguments)
    tokenizer, train, held_out = read_texts(distill)
    summary = Path(arguments.output_dir) / "perplexity.json"
    identity = _identity(distill, tokenizer, train, arguments.seed)
    record = RunRecord(arguments.output_dir, identity, arguments.world_size)
    with arguments.main_process_first(desc="reading the run's record"):
        try:
            record.check()
        except ValueError as error:
            raise ConversionError(sentence(error)) from error
        repository = open_repository(arguments)
        if record.is_finished(arguments, distill.max_seconds) and summary.is_file():
            print(record)
            if repository is not None:
                upload_finished(arguments, repository)
            return json.loads(summary.read_text(encoding="utf-8"))["perplexity"]
    teacher, student = load_pair(distill, torch.bfloat16 if arguments.bf16 else torch.float32)
    if arguments.process_index == 0:
        record.write()

    _fit_arguments(distill, arguments)
    rows: list[dict[str, Any]] = [{"file": Path(name).stem, "length": length} for name, length in held_out]
    before = student.to(arguments.device)
    for row, blocks in zip(rows, held_out.values()):
        row["before"] = perplexity(before, blocks)
    try:
        trained = _part_to_train(distill, student, arguments)
        trainer = DistillTrainer(
            model=trained,
            args=arguments,
            train_dataset=train,
            eval_dataset=next(iter(held_out.values()), None),
            teacher=teacher,
            distill=distill,
        )
    except ValueError as error:  # of the library's checks, or the student cannot be split
        raise ConversionError(sentence(error)) from error
    _check_parallelism(distill, trainer)
    newest = latest_complete_checkpoint(arguments.output_dir, record.fewest_processes)
    started = time.monotonic()
    train_from(trainer, arguments.resume_from_checkpoint or newest)
    seconds = time.monotonic() - started

    finished = _finished_student(distill, trainer, student)
    if finished is not None:
        said = _figures(distill, trainer, seconds) | {"perplexity": rows}
        folder = Path(arguments.output_dir) / "final"
        with written(folder) as path:
            save_model(path, finished, tokenizer)
        trainer.save_state()
        # Before anything is measured too: the model is complete, also where that is cut short.
        write_text(summary, json.dumps(said, indent=2) + "\n")
        for row, blocks in zip(rows, held_out.values()):
            row |= {"teacher": perplexity(teacher, blocks), "student": perplexity(finished, blocks)}
        write_text(summary, json.dumps(said, indent=2) + "\n")
        _card(finished, folder, distill, arguments, command, said).save(folder / "README.md")
        clock = trainer.clock.spent if trainer.clock is not None else 0.0
        record.write({"steps": said["steps"], "epochs": trainer.state.epoch or 0.0, "seconds": clock})
        if repository is not None:
            upload_finished(arguments, repository)
    return rows


def _figures(distill: DistillArguments, trainer: DistillTrainer, seconds: float) -> dict[str, Any]:
    """Return what perplexity.json says of the training."""
    args, steps = trainer.args, trainer.state.global_step
    batches = args.world_size // trainer.get_tp_size()  # processes that do not share one
    batch = args.train_batch_size * args.gradient_accumulation_steps * batches
    tokens = steps * batch * distill.context_length
    return {"stage": distill.stage, "steps": steps, "tokens": tokens, "seconds": round(seconds, 1)}


def _fit_arguments(distill: DistillArguments, arguments: TrainingArguments) -> None:
    """Set what the library must do in every distillation, whatever was asked for."""
    # Not the library's --tf32: torch.compile before 2.13 cannot read what that sets.
    if arguments.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        arguments.dataloader_pin_memory = False  # which would only warn
    if distill.max_seconds is not None and arguments.max_steps <= 0:
        arguments.max_steps = 10**9
    arguments.remove_unused_columns = False
    arguments.label_names = ["labels"]
    arguments.prediction_loss_only = True
    # The library would look for unused weights behind the logits, where those of stage transfer are not.
    arguments.ddp_find_unused_parameters = False
    # Asking every step whether the loss is finite makes a GPU's host wait.
    arguments.logging_nan_inf_filter = False
    if distill.compile:
        arguments.dataloader_drop_last = True  # a last, smaller batch would be compiled for by itself


def _part_to_train(distill: DistillArguments, student: ReBasedForCausalLM, arguments: TrainingArguments) -> Any:
    """Return what the stage trains: the attention of a student's linear layers, adapters to it, or all of it.

    With tensor parallelism that is a copy, which is split over the processes.

    Raises:
        ValueError: it cannot be split.
    """
    part = without_mlps(student) if distill.stage == "transfer" else student
    if tensor_parallel_size() > 1:
        student.to("cpu")
        part = split_model(part, arguments)
    if distill.stage == "transfer":
        freeze_all_but_transferred(part)
        return part
    if distill.lora_rank:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=distill.lora_rank, lora_alpha=2 * distill.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(part, adapters)
    return part


def _check_parallelism(distill: DistillArguments, trainer: DistillTrainer) -> None:
    """Refuse to split a run over processes in a way that a distillation cannot be.

    Raises:
        ConversionError: names the setting.
    """
    if trainer.get_cp_size() > 1:
        raise ConversionError("cp_size is above 1, but a teacher's sequences cannot be split over processes.")
    if distill.lora_rank and trainer.is_fsdp_enabled:
        raise ConversionError("--lora_rank cannot be used with FSDP, which would have to merge sharded weights.")


def _finished_student(
    distill: DistillArguments, trainer: DistillTrainer, student: ReBasedForCausalLM
) -> ReBasedForCausalLM | None:
    """Return the whole student with what was trained, in float32, on the main process, and `None` on the others."""
    # Without what the library wrapped around it for mixed precision: what is measured later is float32.
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    whole = trained.merge_and_unload() if distill.lora_rank else gathered_model(trained, torch.float32)
    if not trainer.is_world_process_zero():
        return None
    if distill.lora_rank:
        student = whole
    else:
        if distill.stage != "transfer":  # the model that was trained may be sharded
            student = ReBasedForCausalLM(whole.config)
            student.generation_config = whole.generation_config
        student.to(trainer.args.device).load_state_dict(whole.state_dict(), strict=distill.stage != "transfer")
    student.requires_grad_(True)
    student.config.kernel_backend = load_config(Path(distill.student)).kernel_backend
    return student


def _identity(
    distill: DistillArguments, tokenizer: PreTrainedTokenizerBase, train: TokenBlocks, seed: int
) -> dict[str, Any]:
    """Return the values that tell this run from another."""
    settings = ("stage", "context_length", "temperature", "text_weight", "lora_rank")
    return {
        "--student (a hash of its weights)": weights_identity(distill.student),
        "--teacher (a hash of its weights)": weights_identity(distill.teacher),
        "--teacher's tokenizer (a hash)": tokenizer_identity(tokenizer),
        "--train_file (a hash of its text)": train.identity,
        "--seed": seed,
        **{f"--{name}": getattr(distill, name) for name in settings},
    }


def _card(
    student: ReBasedForCausalLM,
    folder: Path,
    distill: DistillArguments,
    arguments: TrainingArguments,
    command: str,
    said: dict[str, Any],
) -> Any:
    """Return the card of a distilled model."""
    data = [(Path(name).name, "training", file_size(name)) for name in distill.train_file]
    data += [(Path(name).name, "held out", file_size(name)) for name in distill.eval_file or []]
    settings = [
        ("stage", distill.stage),
        ("teacher", Path(distill.teacher).name),
        ("started from", Path(distill.student).name),
        ("tokens per example", f"{distill.context_length:,}"),
        ("tokens", f"{said['tokens']:,}"),
        ("learning rate", f"{arguments.learning_rate:g}"),
        ("warm-up", warm_up(arguments.warmup_steps)),
        ("precision", "bfloat16, mixed" if arguments.bf16 else "float32"),
        ("seed", arguments.seed),
    ]
    if distill.stage != "transfer":
        adapters = f"of rank {distill.lora_rank}, merged" if distill.lora_rank else "none, all weights are trained"
        settings += [
            ("temperature", f"{distill.temperature:g}"),
            ("share of the text's own loss", f"{distill.text_weight:g}"),
            ("adapters", adapters),
        ]
    figures = [("training time", f"{said['seconds']:,} seconds"), ("steps", f"{said['steps']:,}")]
    for row in said["perplexity"]:
        where = f"perplexity per token of {row['file']}, {row['length']} tokens"
        figures.append((where, f"{row['student']:.3f}; before {row['before']:.3f}, the teacher {row['teacher']:.3f}"))
    section = training_section(
        command=command,
        data=data,
        settings=settings,
        hardware=hardware(arguments.device, arguments.world_size),
        figures=figures,
    )
    return model_card(
        student.config,
        student.num_parameters(),
        name=f"{Path(distill.teacher).name or 'A softmax model'} with ReBased attention, stage {distill.stage}",
        folder=str(folder),
        prompt="Once upon a time",
        tags=["distillation"],
        sections=[section],
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        distill, arguments = parse_arguments(argv)
        found = run(distill, arguments, typed_command("conversion.distill", argv))
    except (ConversionError, RunError, OSError) as error:
        print(f"rebased-distill: error: {error}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    for row in found:
        if "student" in row:  # on the main process
            print(
                f"{row['file']}, {row['length']} tokens: held-out perplexity {row['before']:.3f} before, "
                f"{row['student']:.3f} now, the teacher's {row['teacher']:.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
