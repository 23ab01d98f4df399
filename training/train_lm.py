"""Train a causal language model on text files, with the transformers Trainer.

    python -m modeling_rebased.training.train_lm RECIPE.yaml --config english-6m --output_dir output/english-6m
    accelerate launch -m modeling_rebased.training.train_lm RECIPE.yaml ...      # any number of GPUs

RECIPE.yaml, which is optional, holds arguments, one per line, as `learning_rate: 1.0e-3`; those on the command line
win over it. Besides the arguments below, every one of transformers' TrainingArguments can be given: --torch_compile,
--max_steps, --eval_steps, ...

A run that was stopped, also by kill -9, goes on from its newest complete checkpoint when the same command is given
again, and ends with the weights it would have had without the stop. The finished model goes to OUTPUT_DIR/final:
bf16 safetensors, tokenizer, generation settings, model card, and the code that `trust_remote_code=True` needs.
"""

import hashlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

import modeling_rebased  # noqa: F401  registers the configuration and the model with the Auto classes

from .byte_tokenizer import byte_tokenizer


logger = logging.get_logger(__name__)
CONFIGURATIONS = Path(__file__).resolve().parent.parent / "configuration"


# ---------------------------------------------------------------- arguments


@dataclass
class ModelArguments:
    """What is trained."""

    config: str = field(metadata={"help": "Folder with a config.json, or the name of one under configuration/."})
    tokenizer: str = field(
        default="bytes", metadata={"help": "'bytes' (one token a byte), or a tokenizer that AutoTokenizer loads."}
    )
    kernel_backend: str | None = field(
        default=None, metadata={"help": "Overrides the configuration's kernel_backend: auto, eager or triton."}
    )


@dataclass
class DataArguments:
    """What it is trained on. In a text file `<|endoftext|>` stands between documents."""

    train_file: list[str] = field(metadata={"help": "Text files to train on."})
    eval_file: list[str] | None = field(default=None, metadata={"help": "Held-out text files."})
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens in a training example; default: max_position_embeddings."}
    )


@dataclass
class LMTrainingArguments(TrainingArguments):
    """transformers' arguments, with defaults that suit a small language model."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or below 1 a share of all."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's; not on biases and norms."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second decay rate."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, LMTrainingArguments]:
    """Read the recipe, if the first argument is one, then the command line on top of it.

    Unless one of them says otherwise, training is in mixed precision in bfloat16 where the GPU has it.
    """
    recipe = ["--bf16", str(torch.cuda.is_available() and torch.cuda.is_bf16_supported())]
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        for name, value in yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")).items():
            recipe += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
        argv = argv[1:]
    parser = HfArgumentParser((ModelArguments, DataArguments, LMTrainingArguments), description=__doc__.split("\n")[0])
    return parser.parse_args_into_dataclasses(recipe + argv)


# ---------------------------------------------------------------- data


def read_documents(files: list[str]) -> list[str]:
    """Return the documents of some text files, in order."""
    texts = (Path(name).read_bytes().decode("utf-8") for name in files)
    return [document for text in texts for document in text.split("<|endoftext|>") if document]


def encode(documents: list[str], tokenizer: PreTrainedTokenizerBase, cache_dir: str) -> np.memmap:
    """Encode documents into one flat file of token ids, once, and return it memory-mapped.

    The file (uint16, or uint32 for a vocabulary above 65,536) is named after a hash of text and tokenizer, and appears
    under that name only when it is complete. Each document is preceded by the end-of-text token.
    """
    identity = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for document in documents:
        identity.update(b"<|endoftext|>" + document.encode())
    path = Path(cache_dir) / f"tokens-{identity.hexdigest()[:16]}.bin"
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with open(unfinished, "wb") as out:
            for document in documents:
                ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
                np.array([tokenizer.eos_token_id, *ids], dtype=dtype).tofile(out)
        os.replace(unfinished, path)
    return np.memmap(path, dtype=dtype, mode="r")


class TokenBlocks(torch.utils.data.Dataset):
    """The tokens of some text files as consecutive blocks of `length`; memory-mapped, so the size does not matter.

    The tokens after the last whole block are left out. Item: {"input_ids": [length], "labels": [length]}, int64; the
    model itself shifts the labels by one.
    """

    def __init__(self, files: list[str], tokenizer: PreTrainedTokenizerBase, length: int, cache_dir: str) -> None:
        documents = read_documents(files)
        self.tokens = encode(documents, tokenizer, cache_dir)
        self.num_bytes = sum(len(document.encode()) for document in documents)
        self.length = length
        if len(self.tokens) < length:
            raise ValueError(f"context_length is {length}, but {files} hold only {len(self.tokens)} tokens")

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        block = self.tokens[index * self.length : (index + 1) * self.length]
        input_ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids}


# ---------------------------------------------------------------- training


class LMTrainer(Trainer):
    """A Trainer that also reports bits per byte, which compares models whatever their tokenizers."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the library's, with `eval_bits_per_byte` beside `eval_loss`."""
        if "eval_loss" in logs:
            tokens_per_byte = len(self.eval_dataset.tokens) / self.eval_dataset.num_bytes
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2) * tokens_per_byte
        super().log(logs, *args, **kwargs)


def latest_complete_checkpoint(output_dir: str, world_size: int = 1) -> str | None:
    """Return the newest checkpoint folder in `output_dir` that was written to its end, or None.

    Trainer writes into the folder's final name, trainer_state.json after the weights, the optimizer and the schedule.
    A process killed meanwhile leaves a folder without that file or with a torn one: it is passed over, with a warning.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            if len(list(folder.glob("rng_state*.pth"))) < world_size:
                raise ValueError("the states of some processes' random number generators are missing")
        except (OSError, ValueError) as error:
            logger.warning(f"{folder} is incomplete and is ignored: {error}")
            continue
        if state["global_step"] == int(folder.name.split("-")[1]):
            return str(folder)
    return None


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate, and write the finished model."""
    model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)

    tokenizer = (
        byte_tokenizer() if model_args.tokenizer == "bytes" else AutoTokenizer.from_pretrained(model_args.tokenizer)
    )
    folder = Path(model_args.config)
    config = AutoConfig.from_pretrained(folder if folder.exists() else CONFIGURATIONS / model_args.config)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but vocab_size is only {config.vocab_size}")
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    if model_args.kernel_backend is not None:
        config.kernel_backend = model_args.kernel_backend
    model = AutoModelForCausalLM.from_config(config)

    length = data_args.context_length or config.max_position_embeddings
    with args.main_process_first(desc="tokenizing"):
        train_data = TokenBlocks(data_args.train_file, tokenizer, length, args.output_dir)
        eval_data = None
        if data_args.eval_file:
            eval_data = TokenBlocks(data_args.eval_file, tokenizer, length, args.output_dir)

    trainer = LMTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        # Blocks need no padding. The library's collator for a tokenizer would pad them through Python lists, 40 ms for
        # 16 blocks of 2,048 tokens, and add a mask of ones, which every layer would heed.
        data_collator=default_data_collator,
    )
    logger.warning(
        f"{model.num_parameters() / 1e6:.2f}M parameters, {len(train_data.tokens):,} training tokens in blocks of "
        f"{length}, {args.world_size} process(es) on {args.device.type}"
    )
    checkpoint = args.resume_from_checkpoint or latest_complete_checkpoint(args.output_dir, args.world_size)
    if checkpoint is not None:
        logger.warning(f"Resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)

    figures = {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "tokens_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size * length,
        "training_bytes": train_data.num_bytes,
    }
    if eval_data is not None:
        metrics = trainer.evaluate()
        figures |= {name: round(metrics[name], 4) for name in ("eval_loss", "eval_bits_per_byte")}
    if trainer.is_world_process_zero():
        trainer.save_state()
        export(model, tokenizer, figures, Path(args.output_dir) / "final")
        print(json.dumps(figures, indent=2))


# ---------------------------------------------------------------- export


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, figures: dict[str, float], folder: Path
) -> None:
    """Write the folder that `from_pretrained(folder, trust_remote_code=True)` loads: all that the Hub would get."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.85,
        top_p=0.9,
        max_new_tokens=400,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training_figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rebased, linear-attention]
---
# {folder.resolve().parent.name}

A causal language model trained with training/train_lm.py. Load it with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

| figure | value |
| --- | --- |
{rows}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
