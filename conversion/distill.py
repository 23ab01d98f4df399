"""Train what `linearize` started, against the softmax model it came from, with the transformers Trainer.

    python -m conversion.distill --stage transfer --teacher SmolLM2/ --student start/ --train_file text.txt \\
        --output_dir output/transfer --max_steps 1000
    python -m conversion.distill --stage logits --teacher SmolLM2/ --student output/transfer/final \\
        --train_file text.txt --eval_file held_out.txt --output_dir output/logits --lora_rank 16
    accelerate launch -m conversion.distill ...                 # any number of GPUs

(`python -m modeling_rebased.conversion.distill` where the package is installed.) Beside the arguments below every
one of transformers' TrainingArguments can be given. Stage "transfer" teaches each linear layer, by itself, to say what
the teacher's attention says of the same input; all but its queries, keys, their normalisation and the gate is frozen.
Stage "logits" teaches the whole student the teacher's distribution of the next token. The same command goes on from
the newest checkpoint in OUTPUT_DIR. The model goes to OUTPUT_DIR/final, and held-out perplexities of teacher and
student to OUTPUT_DIR/perplexity.json.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_rebased import ReBasedForCausalLM

from .files import ConversionError, progress


LINEAR = ("linear_attention", "hybrid_sliding")
# What stage "transfer" trains, of the linear layers.
TRANSFERRED = ("q_proj.", "k_proj.", "q_norm.", "k_norm.", "gate")


@dataclass
class DistillArguments:
    """What is taught to what, on what."""

    stage: Literal["transfer", "logits"] = field(metadata={"help": "What is matched: attention outputs, or logits."})
    teacher: str = field(metadata={"help": "Folder of the softmax model."})
    student: str = field(metadata={"help": "Folder that linearize made, or an earlier stage's final."})
    train_file: list[str] = field(metadata={"help": "Text files; <|endoftext|> stands between documents."})
    eval_file: list[str] | None = field(default=None, metadata={"help": "Held-out text files."})
    context_length: int = field(default=512, metadata={"help": "Tokens of an example."})
    temperature: float = field(default=2.0, metadata={"help": "Of both distributions in stage logits."})
    text_weight: float = field(
        default=0.1,
        metadata={"help": "Share of the loss of the text itself in stage logits; the rest is the teacher's."},
    )
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank and merge them; 0 trains all."})


class Blocks(Dataset):
    """Texts as examples of `length` tokens, without remainder.

    Args:
        files: text files.
        tokenizer: its end-of-text token, if it has one, ends each document.
        length: tokens of an example.

    Raises:
        ConversionError: the texts are shorter than one example.
    """

    def __init__(self, files: list[str], tokenizer: PreTrainedTokenizerBase, length: int):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids: list[int] = []
        for name in files:
            documents = Path(name).read_text(encoding="utf-8").split("<|endoftext|>")
            for document in progress([each for each in documents if each], f"reading {name}"):
                ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(ids) < length:
            raise ConversionError(f"{files} have {len(ids)} tokens, fewer than --context_length {length}.")
        self.ids = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int32).view(-1, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = self.ids[i].long()
        return {"input_ids": ids, "labels": ids}


class AttentionTap:
    """Sees, and can replace, what goes into attention modules, and sees what comes out.

    Args:
        modules: the attention modules, by layer.

    Attributes:
        inputs, outputs: [B, T, hidden_size] of each layer in the last forward pass.
        replace: what to put in the inputs' place, by layer. Then the outputs are cut off the graph for the layers that
            follow, so that each layer learns by itself.
    """

    def __init__(self, modules: dict[int, nn.Module]):
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.replace: dict[int, torch.Tensor] | None = None
        for i, module in modules.items():
            module.register_forward_pre_hook(self._before(i), with_kwargs=True)
            module.register_forward_hook(self._after(i))

    def _before(self, i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.inputs[i] = given
            if self.replace is None:
                return None
            other = self.replace[i].to(given.dtype)
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": other}
            return (other, *args[1:]), kwargs

        return hook

    def _after(self, i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> Any:
            self.outputs[i] = output[0]
            return None if self.replace is None else (output[0].detach(), *output[1:])

        return hook


class DistillTrainer(Trainer):
    """The library's Trainer with a teacher.

    Args:
        teacher: the softmax model; not trained, not saved.
        distill: the stage and its settings.
        others: as the library's.
    """

    def __init__(self, *, teacher: PreTrainedModel, distill: DistillArguments, **kwargs: Any):
        super().__init__(**kwargs)
        # Tells the library that the loss is a mean over this batch, to be averaged over accumulated ones.
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.distill = distill
        if distill.stage == "transfer":
            layers = linear_layers(self.model)
            self.teacher_tap = AttentionTap({i: self.teacher.model.layers[i].self_attn for i in layers})
            self.student_tap = AttentionTap({i: self.model.model.layers[i].self_attn for i in layers})

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a batch of `Blocks`, of the stage."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        if self.distill.stage == "transfer":
            loss = self._transfer_loss(model, ids)
            return (loss, {"loss": loss}) if return_outputs else loss
        with torch.no_grad():
            expected = self.teacher(input_ids=ids, use_cache=False).logits
        logits = model(input_ids=ids, use_cache=False).logits
        loss = logits_loss(logits, expected, labels, self.distill.temperature, self.distill.text_weight)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _transfer_loss(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.teacher(input_ids=ids, use_cache=False, logits_to_keep=1)
        self.student_tap.replace = self.teacher_tap.inputs
        try:
            # Through the whole model, so that what wraps it (several GPUs, mixed precision) does its work; each
            # attention module hears the teacher and not the layers before it.
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            self.student_tap.replace = None
        losses = [
            relative_error(output, self.teacher_tap.outputs[i]) for i, output in self.student_tap.outputs.items()
        ]
        return torch.stack(losses).mean()


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|output - expected|^2 / |expected|^2 of each example [T, hidden_size], averaged over the batch.

    Relative, so that layers of large and small outputs count alike; by example, so that a batch split over GPUs or
    accumulated in steps has the same mean.
    """
    output, expected = output.float().flatten(1), expected.float().flatten(1)
    return ((output - expected).square().sum(1) / expected.square().sum(1).clamp_min(1e-20)).mean()


def logits_loss(
    logits: torch.Tensor, expected: torch.Tensor, labels: torch.Tensor, temperature: float, text_weight: float
) -> torch.Tensor:
    """The loss of stage "logits", per token.

    (1 - text_weight) * t^2 * KL(teacher_t || student_t) + text_weight * cross entropy of the text, with both
    distributions at temperature t (Hinton et al., 2015). logits and expected [B, T, V], labels [B, T].
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1).flatten(0, 1)
    teacher = F.log_softmax(expected.float() / temperature, dim=-1).flatten(0, 1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    text = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return (1 - text_weight) * divergence + text_weight * text


def linear_layers(student: ReBasedForCausalLM) -> list[int]:
    """Numbers of the layers that have linear attention.

    Raises:
        ConversionError: none has.
    """
    layers = [i for i, layer_type in enumerate(student.config.layer_types) if layer_type in LINEAR]
    if not layers:
        raise ConversionError("--student has no linear layers, so there is nothing to transfer.")
    return layers


def freeze_all_but_transferred(student: ReBasedForCausalLM) -> None:
    """Leave only the queries, keys, their normalisation and the gates of linear layers to be trained."""
    student.requires_grad_(False)
    for i in linear_layers(student):
        for name, parameter in student.model.layers[i].self_attn.named_parameters():
            parameter.requires_grad_(name.startswith(TRANSFERRED))


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: Blocks, batch_size: int = 8) -> float:
    """exp of the mean loss of a token, given those before it in its example."""
    model.eval()
    total, count = 0.0, 0
    for start in progress(range(0, len(blocks), batch_size), "perplexity"):
        ids = blocks.ids[start : start + batch_size].long().to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def check_pair(teacher: PreTrainedModel, student: ReBasedForCausalLM) -> None:
    """Check that the student can be one of the teacher's.

    Raises:
        ConversionError: their sizes differ.
    """
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if theirs != ours:
            raise ConversionError(f"{name} must be the same for --teacher and --student, but is {theirs} and {ours}.")


def run(distill: DistillArguments, arguments: TrainingArguments) -> dict[str, float]:
    """Train one stage; returns the held-out perplexities, which also are in OUTPUT_DIR/perplexity.json."""
    set_seed(arguments.seed)
    half = torch.bfloat16 if arguments.bf16 else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(distill.teacher, dtype=half)
    student: Any = ReBasedForCausalLM.from_pretrained(distill.student, dtype=torch.float32)
    check_pair(teacher, student)
    tokenizer = AutoTokenizer.from_pretrained(distill.teacher)
    train = Blocks(distill.train_file, tokenizer, distill.context_length)
    held_out = Blocks(distill.eval_file, tokenizer, distill.context_length) if distill.eval_file else None

    if distill.stage == "transfer":
        if distill.lora_rank:
            raise ConversionError("--lora_rank is for stage logits; stage transfer trains few weights as it is.")
        if arguments.gradient_checkpointing:
            raise ConversionError("--gradient_checkpointing is for stage logits; transfer keeps no long graph.")
        freeze_all_but_transferred(student)
    elif distill.lora_rank:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=distill.lora_rank, lora_alpha=2 * distill.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        student = get_peft_model(student, adapters)

    arguments.remove_unused_columns = False
    arguments.label_names = ["labels"]
    arguments.prediction_loss_only = True
    # The library would look for unused weights behind the logits, where those of stage transfer are not.
    arguments.ddp_find_unused_parameters = False
    trainer = DistillTrainer(
        model=student, args=arguments, train_dataset=train, eval_dataset=held_out, teacher=teacher, distill=distill
    )
    newest = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=newest)

    trained = trainer.accelerator.unwrap_model(trainer.model)
    if distill.lora_rank:
        trained = trained.merge_and_unload()
    found = {}
    if trainer.is_world_process_zero():
        final = Path(arguments.output_dir) / "final"
        trained.requires_grad_(True)
        trained.save_pretrained(final)
        tokenizer.save_pretrained(final)
        if held_out is not None:
            found = {"teacher": perplexity(teacher, held_out), "student": perplexity(trained, held_out)}
            text = json.dumps({"stage": distill.stage, **found}, indent=2)
            (Path(arguments.output_dir) / "perplexity.json").write_text(text + "\n", encoding="utf-8")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = HfArgumentParser((DistillArguments, TrainingArguments), description=__doc__.split("\n")[0])
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    given = ["--bf16", str(bf16), *(sys.argv[1:] if argv is None else argv)]
    distill, arguments = parser.parse_args_into_dataclasses(given)
    try:
        found = run(distill, arguments)
    except (ConversionError, OSError) as error:
        print(f"distill: error: {error}", file=sys.stderr)
        return 1
    for name, value in found.items():
        print(f"held-out perplexity of the {name}: {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
