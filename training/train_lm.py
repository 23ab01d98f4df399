"""Train a causal language model on text files, with the transformers Trainer.

    rebased-train RECIPE.yaml --config english-6m --output_dir output/english-6m
    rebased-train --model output/english-6m/final --train_file more.txt --output_dir output/more      # fine-tune
    accelerate launch -m modeling_rebased.training.train_lm RECIPE.yaml ...      # any number of GPUs

`rebased-train` is `python -m modeling_rebased.training.train_lm`. The optional RECIPE.yaml holds one argument per
line, such as `learning_rate: 1.0e-3`. Arguments on the command line take precedence. Besides the arguments below, all
of transformers' TrainingArguments can be given, such as --torch_compile, --max_steps and --eval_steps, except
--use_liger_kernel. With --push_to_hub the finished model is uploaded to the Hub, and no checkpoints are.

Give the same command again to continue a run that was stopped, also by kill -9. It continues from its newest complete
checkpoint and ends with the weights that it would have had without the stop. A finished run is left as it is, and a
folder that holds another run is refused. The finished model goes to OUTPUT_DIR/final: bf16 safetensors, tokenizer,
generation settings, model card, and the code that `trust_remote_code=True` needs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

from modeling_rebased import ReBasedConfig
from modeling_rebased.configuration import config_names, config_path
from modeling_rebased.modeling_rebased import ReBasedRMSNorm
from modeling_rebased.triton_rebased import triton_unavailable_reason

from .arguments import check_length, check_paths, command_line, gpu_defaults, parse_dataclasses, read_yaml
from .byte_tokenizer import byte_tokenizer
from .card import file_size, hardware, model_card, training_section, typed_command, warm_up
from .context_parallel import ContextParallelTrainer
from .folders import gathered_model, save_model, written
from .hub import HubError, open_repository, upload_finished
from .resume import RunError, RunRecord, latest_complete_checkpoint, train_from, weights_identity
from .shards import tokenizer_identity
from .tensor_parallel import TensorParallelTrainer, split_model, tensor_parallel_size
from .text import TokenBlocks
from .values import one_line


logger = logging.get_logger(__name__)

# Models to compare with: of flash-linear-attention, or transformers' own Mamba-2 where that is not installed.
PEERS = ("gated_deltanet", "mamba2", "rwkv7")
# What a configuration says of how it was written or is computed, and not of the model.
NOT_OF_THE_MODEL = ("architectures", "auto_map", "dtype", "kernel_backend", "transformers_version", "_name_or_path")


# ---------------------------------------------------------------- arguments


@dataclass
class ModelArguments:
    """Say what is trained."""

    config: str | None = field(
        default=None,
        metadata={
            "help": "Train a new model of this configuration: a folder with a config.json, or one of "
            f"{', '.join(config_names())}."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "Train the model in this folder further, instead of a new one."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "'bytes' (one token per byte), or the folder or name of a tokenizer. By default that of --model, "
            "or 'bytes' for a new model."
        },
    )
    kernel_backend: Literal["auto", "eager", "triton"] | None = field(
        default=None, metadata={"help": "Overrides the configuration's kernel_backend."}
    )


@dataclass
class DataArguments:
    """Say what it is trained on."""

    train_file: list[str] = field(
        metadata={
            "help": "Files to train on: text, in which <|endoftext|> separates documents, .jsonl with a 'text' per "
            "line, .npy with token ids, or a folder of shards of them, such as prepare_corpus writes."
        }
    )
    eval_file: list[str] | None = field(default=None, metadata={"help": "Held-out files, of the same kinds."})
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens in a training example; default: max_position_embeddings."}
    )


@dataclass
class LMTrainingArguments(TrainingArguments):
    """Hold the arguments of transformers, with defaults that suit a small language model."""

    METRICS: ClassVar[tuple[str, ...]] = ("loss", "bits_per_byte")  # of the evaluation, the lower the better

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or below 1 a share of all."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's; not on biases and norms."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second decay rate."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave losses that are not finite out of the logged mean. To look for them, every step waits for "
            "the GPU."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP looks for weights without a gradient, which no model here has."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Of --metric_for_best_model; by default a lower value is better."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile each layer with torch.compile; by default on a GPU. It takes seconds. --torch_compile "
            "compiles the whole model, which takes a minute and is little faster."
        },
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = False  # as the library has it for names that end in "loss" alone
        super().__post_init__()


def read_recipe(path: Path) -> list[str]:
    """Return the arguments in a recipe, as on a command line.

    Raises:
        ValueError: the file is no YAML, or holds no arguments.
        OSError: it cannot be read.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"the recipe {path} must hold lines such as `learning_rate: 1.0e-3`, but holds {content!r}")
    return command_line(content)


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, LMTrainingArguments]:
    """Read the recipe, if the first argument is one, then the command line on top of it.

    Unless one of them says otherwise, training on a GPU compiles the layers, and it is in mixed precision in bfloat16
    where the GPU has it.
    """
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = [*read_recipe(Path(argv[0])), *argv[1:]]
    classes = (ModelArguments, DataArguments, LMTrainingArguments)
    return parse_dataclasses("rebased-train", __doc__, classes, [*gpu_defaults(argv, "compile_layers"), *argv])


# ---------------------------------------------------------------- model and tokenizer


def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Return the configuration of the model to train.

    Raises:
        ValueError: neither or both of --config and --model are given, or what is given is no ReBased model and none of
            `PEERS`.
    """
    given = [(f"--{name}", value) for name in ("config", "model") if (value := getattr(model_args, name)) is not None]
    if len(given) != 1:
        raise ValueError("give either --config, to train a new model, or --model, to train one further")
    name, folder = given[0]
    if name == "--config" and folder in config_names() and not Path(folder).exists():
        folder = config_path(folder)
    else:
        if not Path(folder).exists():
            known = f", nor one of the configurations {', '.join(config_names())}" if name == "--config" else ""
            raise ValueError(f"{name} {folder} is no folder{known}")
        has_weights = Path(folder).is_dir() and any(Path(folder).glob("*.safetensors"))
        if name == "--model" and not has_weights:
            raise ValueError(f"--model {folder} holds no .safetensors; --config {folder} would train a new model")
        if name == "--config" and has_weights:
            logger.warning(
                f"--config {folder} trains a new model; --model {folder} would start from the weights there"
            )
    try:
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    except (OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} {folder} has no config.json that is a JSON object: {error}") from error
    if kind in PEERS:
        with contextlib.suppress(ImportError):
            import fla.models  # noqa: F401  makes transformers know its models
        if model_args.kernel_backend is not None:
            raise ValueError(f"--kernel_backend is for ReBased models, and {folder} holds a model of type {kind!r}")
        try:
            return AutoConfig.from_pretrained(folder)
        except ValueError as error:
            needed = "pip install flash-linear-attention"
            raise ValueError(f"{name} {folder} holds a model of type {kind!r}, which needs `{needed}`") from error
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # strict dataclasses raise errors of several kinds
        raise ValueError(
            f"{name} {folder} has no configuration of a known and possible model: {one_line(error)}"
        ) from error
    if not isinstance(config, ReBasedConfig):
        raise ValueError(
            f"{folder} holds a model of type {config.model_type!r}; it must be {ReBasedConfig.model_type!r} "
            "(`rebased-convert linearize` makes one of a Llama-like model)"
        )
    if model_args.kernel_backend is not None:
        config.kernel_backend = model_args.kernel_backend
    return config


def check_kernels(config: PreTrainedConfig, args: TrainingArguments) -> None:
    """Refuse Triton's kernels where they cannot run, before anything is written.

    Raises:
        ValueError: the configuration's kernel_backend is "triton", which cannot run here.
    """
    if getattr(config, "kernel_backend", None) == "triton":
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        sizes = config.feature_dim, config.head_dim
        reason = triton_unavailable_reason(args.device, dtype, *sizes, getattr(config, "decay", None) is not None)
        if reason is not None:
            raise ValueError(f"--kernel_backend triton cannot run here: {reason}; auto or eager can")


def load_tokenizer(model_args: ModelArguments, config: PreTrainedConfig, length: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer, and put its special tokens into the configuration.

    Raises:
        ValueError: there is no such tokenizer, or it has more tokens than the model.
    """
    name = model_args.tokenizer or model_args.model or "bytes"
    try:
        tokenizer = byte_tokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:
        argument = "--model" if model_args.tokenizer is None else "--tokenizer"
        raise ValueError(f"{argument} {name} gives no tokenizer: {one_line(error)}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but vocab_size is only {config.vocab_size}")
    if config.vocab_size > 2 * len(tokenizer):
        logger.warning(
            f"vocab_size is {config.vocab_size}, but the tokenizer {name!r} has only {len(tokenizer)} tokens: the "
            "other embeddings are never trained"
        )
    tokenizer.model_max_length = length
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, getattr(tokenizer, token))
    return tokenizer


def load_model(model_args: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new model, or the one in --model with all of its weights, in float32.

    Raises:
        ValueError: the weights in --model are not those that its configuration asks for.
    """
    if model_args.model is None:
        return AutoModelForCausalLM.from_config(config)
    model, found = AutoModelForCausalLM.from_pretrained(
        model_args.model, config=config, dtype=torch.float32, output_loading_info=True
    )
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ValueError(
            f"--model {model_args.model} does not fit its configuration: missing "
            f"{sorted(found['missing_keys'])[:5]}, unknown {sorted(found['unexpected_keys'])[:5]}"
        )
    return model


# ---------------------------------------------------------------- training


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer with torch.compile, when it is first called.

    All layers run the same Python function, of which Dynamo keeps eight compiled versions. It needs three for each
    kind of layer: for training, for evaluation, and for a last batch of another size. What comes after the eighth runs
    without compilation, so each kind of layer gets as many versions as Dynamo gives to one function.
    """
    # Under DDP, Dynamo would cut each layer in two, to send gradients in parts of 25 MB. A layer is about such a part.
    torch._dynamo.config.optimize_ddp = False
    kinds = len(set(model.config.layer_types))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * kinds)
    for layer in model.model.layers:
        layer.compile()


def narrow_activations(model: PreTrainedModel) -> None:
    """Let embeddings and the norms of the residual stream return autocast's dtype, where autocast is enabled.

    Autocast leaves them in float32. The residual stream and all that is computed from it outside of matrix products
    then take twice the memory and time of a model in bfloat16.
    """

    def narrow(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        device = output.device.type
        return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output

    for module in model.modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.LayerNorm, ReBasedRMSNorm)):
            module.register_forward_hook(narrow)


class LMTrainer(TensorParallelTrainer, ContextParallelTrainer):
    """Train as the library does, and report bits per byte, which compare models whatever their tokenizers.

    With `label_smoothing_factor` only the training loss is smoothed, so that the evaluation stays one in bits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The library's own way does not shift the labels of a compiled model.
        smoother = self.label_smoother
        self.label_smoother: Any = None
        self.smoothed_loss = None if smoother is None else functools.partial(smoother, shift_labels=True)

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the library does, smoothed in training if asked for."""
        self.compute_loss_func = self.smoothed_loss if model.training else None
        return super().compute_loss(model, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the library does, with `eval_bits_per_byte` beside `eval_loss`."""
        if "eval_loss" in logs:
            tokens_per_byte = len(self.eval_dataset.tokens) / self.eval_dataset.num_bytes
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2) * tokens_per_byte
        super().log(logs, *args, **kwargs)


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate, and write the finished model."""
    try:
        _main(sys.argv[1:] if argv is None else argv)
    except HubError as error:
        raise SystemExit(f"rebased-train: error: {error}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _main(argv: list[str]) -> None:
    try:
        model_args, data_args, args = parse_arguments(argv)
        inputs = read_inputs(model_args, data_args, args)
        repository = open_repository(args)
        if inputs is None:
            if repository is not None:
                upload_finished(args, repository)
            return
        set_seed(args.seed)
        model = load_model(model_args, inputs.config)
        if tensor_parallel_size() > 1:
            model = split_model(model, args)
            args.compile_layers = False  # what splits a layer are hooks, which stand in the way of torch.compile
    except (ValueError, OSError) as error:
        raise SystemExit(f"rebased-train: error: {error}") from error

    trainer = new_trainer(model, inputs, args)
    length = inputs.train_data.length
    logger.warning(
        f"{model.num_parameters() / 1e6:.2f}M parameters, {len(inputs.train_data.tokens):,} training tokens in blocks "
        f"of {length}, {args.world_size} process(es) on {args.device.type}"
    )
    newest = latest_complete_checkpoint(args.output_dir, inputs.record.fewest_processes)
    try:
        train_from(trainer, args.resume_from_checkpoint or newest)
    except RunError as error:
        raise SystemExit(f"rebased-train: error: {error}") from error

    batches = args.world_size // trainer.get_cp_size() // trainer.get_tp_size()  # processes that do not share one
    figures = {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "tokens_per_step": args.train_batch_size * args.gradient_accumulation_steps * batches * length,
        "training_bytes": inputs.train_data.num_bytes,
    }
    if inputs.eval_data is not None:
        metrics = trainer.evaluate()
        figures |= {name: round(metrics[name], 4) for name in ("eval_loss", "eval_bits_per_byte")}
    finished = gathered_model(trainer.accelerator.unwrap_model(trainer.model))
    if finished is not None:
        trainer.save_state()
        settings = _settings(args, figures["tokens_per_step"], length, inputs.config)
        folder = Path(args.output_dir) / "final"
        write_final(finished, inputs.tokenizer, figures, folder, argv, data_args, settings, args)
        inputs.record.write({"steps": trainer.state.global_step, "epochs": trainer.state.epoch or 0.0})
        print(json.dumps(figures, indent=2))
        if repository is not None:
            upload_finished(args, repository)


class Inputs(NamedTuple):
    """Hold what a run starts from, without the weights."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train_data: TokenBlocks
    eval_data: TokenBlocks | None
    record: RunRecord


def read_inputs(model_args: ModelArguments, data_args: DataArguments, args: LMTrainingArguments) -> Inputs | None:
    """Read configuration, tokenizer and text, and record the run in its folder; `None` if the run is finished.

    Raises:
        ValueError, OSError: an argument or a file is wrong, or the folder holds another run.
    """
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # which would only warn
    set_seed(args.seed)
    check_paths({"train_file": data_args.train_file, "eval_file": data_args.eval_file}, args.output_dir)
    config = load_config(model_args)
    check_kernels(config, args)
    length = _own_length(config) if data_args.context_length is None else data_args.context_length
    check_length(config, length)
    tokenizer = load_tokenizer(model_args, config, length)
    with args.main_process_first(desc="tokenizing"):
        train_data = TokenBlocks(data_args.train_file, tokenizer, length, args.output_dir)
        eval_data = None
        if data_args.eval_file:
            eval_data = TokenBlocks(data_args.eval_file, tokenizer, length, args.output_dir)
        identity = _identity(model_args, config, tokenizer, train_data, args.seed)
        record = RunRecord(args.output_dir, identity, args.world_size)
        record.check()
        if record.is_finished(args):
            print(record)
            return None
        if args.process_index == 0:
            record.write()
    return Inputs(config, tokenizer, train_data, eval_data, record)


def new_trainer(model: PreTrainedModel, inputs: Inputs, args: LMTrainingArguments) -> LMTrainer:
    """Return the trainer of a model, compiled and narrowed as the arguments say, or end the program."""
    if isinstance(inputs.config, ReBasedConfig):  # the peers' kernels are not made for torch.compile
        if args.bf16:
            narrow_activations(model)
        if args.compile_layers and not args.torch_compile:
            compile_layers(model)
    try:
        return LMTrainer(
            model=model,
            args=args,
            train_dataset=inputs.train_data,
            eval_dataset=inputs.eval_data,
            processing_class=inputs.tokenizer,
            # Blocks need no padding. The library's collator for a tokenizer would pad them through Python lists, 40 ms
            # for 16 blocks of 2,048 tokens, and add a mask of ones, which every layer would heed.
            data_collator=default_data_collator,
        )
    except ValueError as error:
        raise SystemExit(f"rebased-train: error: {error}") from error


def _own_length(config: PreTrainedConfig) -> int:
    """Return the length that a configuration names."""
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        raise ValueError(f"--context_length must be given: a model of type {config.model_type!r} names no length")
    return length


def _identity(
    model_args: ModelArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    train_data: TokenBlocks,
    seed: int,
) -> dict[str, Any]:
    """Return what makes a run this run and no other."""
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_THE_MODEL}
    return {
        "configuration": fields,
        "--model (a hash of its weights)": None if model_args.model is None else weights_identity(model_args.model),
        "--tokenizer (a hash)": tokenizer_identity(tokenizer),
        "--train_file (a hash of its text)": train_data.identity,
        "--context_length": train_data.length,
        "--seed": seed,
    }


# ---------------------------------------------------------------- the finished model


def _settings(args: TrainingArguments, tokens_per_step: int, length: int, config: PreTrainedConfig) -> list[tuple]:
    """Return the rows of the card's table of hyperparameters."""
    dropout = []
    if isinstance(config, ReBasedConfig):
        share = f"{config.embedding_dropout:g} of embeddings, {config.residual_dropout:g} of what layers add"
        dropout = [("dropout", share)]
    optimizer = str(getattr(args.optim, "value", args.optim))
    return [
        ("tokens per step", f"{tokens_per_step:,}"),
        ("tokens per example", f"{length:,}"),
        ("optimizer", optimizer + (f", betas {args.adam_beta1} and {args.adam_beta2}" if "adam" in optimizer else "")),
        (
            "learning rate",
            f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        ),
        ("warm-up", warm_up(args.warmup_steps)),
        ("weight decay", f"{args.weight_decay:g}"),
        *dropout,
        ("gradient clipping", f"{args.max_grad_norm:g}" if args.max_grad_norm else "none"),
        ("precision", "bfloat16, mixed" if args.bf16 else "float16, mixed" if args.fp16 else "float32"),
        ("seed", args.seed),
    ]


def write_final(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    figures: dict[str, Any],
    folder: Path,
    argv: list[str],
    data_args: DataArguments,
    settings: list[tuple],
    args: TrainingArguments,
) -> None:
    """Write the finished model: bf16 weights, tokenizer, generation settings, code, figures and card."""
    generation = model.generation_config  # a model that is trained further keeps its temperature, and its other ends
    if generation._from_model_config:
        generation = model.generation_config = GenerationConfig()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token, own = getattr(tokenizer, name), getattr(generation, name)
        if not (isinstance(own, list) and token in own):
            setattr(generation, name, token)
    data = [(Path(name).name, "training", file_size(name)) for name in data_args.train_file]
    data += [(Path(name).name, "held out", file_size(name)) for name in data_args.eval_file or []]
    units = {
        "steps": "steps",
        "training_bytes": "bytes of text",
        "eval_loss": "nats per token of the held-out text",
        "eval_bits_per_byte": "bits per byte of the held-out text",
    }
    section = training_section(
        command=typed_command("training.train_lm", argv),
        data=data,
        settings=settings,
        hardware=hardware(args.device, args.world_size),
        figures=[(name, f"{figures[name]:,} {unit}") for name, unit in units.items() if name in figures],
    )
    card = None
    if isinstance(model.config, ReBasedConfig):
        card = model_card(
            model.config,
            figures["parameters"],
            name=folder.resolve().parent.name,
            folder=str(folder),
            prompt="Once upon a time",
            sections=[section],
        )
    with written(folder) as path:
        save_model(path, model, tokenizer, card)
        (path / "training_figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
