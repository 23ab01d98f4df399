"""Train what `linearize` started, against the softmax model it came from, with the transformers Trainer.

    python -m modeling_rebased.conversion.distill --stage transfer --teacher SmolLM2/ --student start/ \\
        --train_file text.txt --output_dir output/transfer --max_steps 1000
    python -m modeling_rebased.conversion.distill --stage logits --teacher SmolLM2/ --student output/transfer/final \\
        --train_file text.txt --eval_file held_out.txt --output_dir output/logits --lora_rank 16
    python -m modeling_rebased.conversion.distill ... --max_seconds 600 --compile True   # the best of ten GPU minutes
    accelerate launch -m modeling_rebased.conversion.distill ...                 # any number of GPUs

Beside the arguments below, every one of transformers' TrainingArguments can be given. Stage "transfer" teaches each
linear layer, by itself, to say what the teacher's attention says of the same input; all but its queries, keys, their
normalisation and the gate is frozen. Stage "logits" teaches the whole student the teacher's distribution of the next
token. The same command goes on from the newest checkpoint in OUTPUT_DIR. The model goes to OUTPUT_DIR/final, held-out
perplexities of teacher and student, before and after, to OUTPUT_DIR/perplexity.json, and the losses to
OUTPUT_DIR/trainer_state.json.
"""

import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
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
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_rebased import ReBasedForCausalLM
from modeling_rebased.configuration_rebased import LINEAR_LAYER_TYPES

from .files import ConversionError, load_config, load_model, progress, written


# What stage "transfer" trains, of the linear layers.
TRANSFERRED = ("q_proj.", "k_proj.", "q_norm.", "k_norm.", "gate")


@dataclass
class DistillArguments:
    """What is taught to what, on what."""

    stage: Literal["transfer", "logits"] = field(metadata={"help": "What is matched: attention outputs, or logits."})
    teacher: str = field(metadata={"help": "Folder of the softmax model."})
    student: str = field(metadata={"help": "Folder that linearize made, or an earlier stage's final."})
    train_file: list[str] = field(
        metadata={
            "help": "Text files, in which <|endoftext|> stands between documents, or .npy files of token ids. A file "
            "that is named twice counts twice."
        }
    )
    eval_file: list[str] | None = field(default=None, metadata={"help": "Held-out files, each measured by itself."})
    context_length: int = field(default=512, metadata={"help": "Tokens of an example."})
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
    kernel_backend: Literal["auto", "eager", "triton"] = field(
        default="auto", metadata={"help": "Implementation of the student's linear attention in training."}
    )
    temperature: float = field(default=2.0, metadata={"help": "Of both distributions in stage logits."})
    text_weight: float = field(
        default=0.1,
        metadata={"help": "Share of the loss of the text itself in stage logits; the rest is the teacher's."},
    )
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank and merge them; 0 trains all."})


class Blocks(Dataset):
    """Texts as examples of `length` tokens, without remainder.

    Args:
        files: text files, or `.npy` files, each a vector of token ids.
        tokenizer: its end-of-text token, if it has one, ends each document of a text.
        length: tokens of an example.

    Raises:
        ConversionError: the texts are shorter than one example.
    """

    def __init__(self, files: list[str], tokenizer: PreTrainedTokenizerBase, length: int):
        ids = torch.cat([token_ids(name, tokenizer) for name in files])
        if len(ids) < length:
            raise ConversionError(f"{files} have {len(ids)} tokens, fewer than --context_length {length}.")
        self.ids = ids[: len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = self.ids[i].long()
        return {"input_ids": ids, "labels": ids}


def token_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """int32 [tokens] of a text file, or of a `.npy` file that has them.

    Raises:
        ConversionError: a `.npy` file is no vector of ids of the tokenizer.
    """
    if Path(name).suffix == ".npy":
        try:
            stored = np.load(name, allow_pickle=False)
        except ValueError as error:
            raise ConversionError(f"{name} is no array of numbers: {error}") from error
        if stored.ndim != 1 or stored.dtype.kind not in "iu" or (stored.size and stored.max() >= len(tokenizer)):
            raise ConversionError(
                f"{name} must be a vector of token ids below {len(tokenizer)}, but is {stored.dtype} of shape "
                f"{stored.shape}, at most {stored.max(initial=0)}."
            )
        return torch.from_numpy(stored.astype(np.int32))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    documents = Path(name).read_text(encoding="utf-8").split("<|endoftext|>")
    for document in progress([each for each in documents if each], f"reading {name}"):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    return torch.tensor(ids, dtype=torch.int32)


class Clock:
    """A learning rate that falls in a line until the time is up.

    For `LambdaLR`, which stores it with a checkpoint, so that a run that goes on knows how long it has trained. The
    time until the first step ends, when code is compiled, counts, but the learning rate does not fall in it.

    Args:
        warmup_steps: steps in which the learning rate rises.

    Attributes:
        seconds: how long to train.
        spent: seconds since the start, in this process and those before it.
        progress: share of the time that is spent, from the first step on; at 1 the run is over.
    """

    def __init__(self, warmup_steps: int):
        self.warmup_steps = warmup_steps
        self.seconds = math.inf
        self.spent = self.waited = self.progress = self.last = 0.0
        self.stepped = False

    def start(self, seconds: float) -> None:
        """A process begins to train."""
        self.seconds, self.last, self.stepped = seconds, time.monotonic(), False

    def tick(self) -> None:
        """A step has ended."""
        passed = torch.tensor(time.monotonic() - self.last, dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Every process must see the same time, or their weights part ways.
            where = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            passed = passed.to(where)
            torch.distributed.broadcast(passed, 0)
        passed = passed.item()
        self.last += passed
        self.spent += passed
        if not self.stepped:
            self.stepped = True
            self.waited += passed
        self.progress = min(1.0, (self.spent - self.waited) / max(1e-9, self.seconds - self.waited))
        if self.spent >= self.seconds:
            self.progress = 1.0

    def __call__(self, step: int) -> float:
        """The learning rate's factor after `step` steps."""
        return min(1.0, (step + 1) / (self.warmup_steps + 1)) * (1.0 - self.progress)


class StopByClock(TrainerCallback):
    """Tells a `Clock` the time, and ends the run when it is up."""

    def __init__(self, clock: Clock, seconds: float):
        self.clock = clock
        self.seconds = seconds

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.start(self.seconds)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.tick()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.clock.progress >= 1.0:
            control.should_training_stop = True


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
        self.clock = None
        if distill.max_seconds is not None:
            self.clock = Clock(int(self.args.warmup_steps))
            self.add_callback(StopByClock(self.clock, distill.max_seconds))
        student = self.model.get_base_model() if distill.lora_rank else self.model
        if distill.stage == "transfer":
            layers = linear_layers(student)
            self.teacher_tap = AttentionTap({i: self.teacher.model.layers[i].self_attn for i in layers})
            self.student_tap = AttentionTap({i: student.model.layers[i].self_attn for i in layers})
            for layer in student.model.layers:
                layer.mlp.forward = _identity  # each attention module hears the teacher, so nobody hears the MLPs
        if distill.compile:
            # Layer by layer: layers of a kind share their code, which is then compiled once.
            for layer in student.model.layers:
                if distill.stage == "logits":
                    layer.compile(dynamic=False)
                else:
                    layer.self_attn.forward = torch.compile(layer.self_attn.forward, dynamic=False)
            if distill.stage == "logits":
                for layer in self.teacher.model.layers:
                    layer.compile(dynamic=False)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the library's, or by the clock where there is one."""
        if self.clock is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.clock)
        return self.lr_scheduler

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
        settings = self.distill.temperature, self.distill.text_weight, self.distill.compile
        loss = logits_loss(logits, expected, labels, *settings)
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
    logits: torch.Tensor,
    expected: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    text_weight: float,
    compiled: bool = False,
) -> torch.Tensor:
    """The loss of stage "logits", per token.

    (1 - text_weight) * t^2 * KL(teacher_t || student_t) + text_weight * cross entropy of the text, with both
    distributions at temperature t (Hinton et al., 2015).

    Args:
        logits, expected: the student's and the teacher's, [B, T, V].
        labels: the text, [B, T]. It is shifted here.
        temperature: t.
        text_weight: share of the text itself.
        compiled: use torch.compile.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return _LogitsLoss.apply(
        logits.flatten(0, 1), expected.flatten(0, 1), targets.flatten(), temperature, text_weight, compiled
    )


class _LogitsLoss(torch.autograd.Function):
    """The loss and its gradient together, some tokens at a time: float32 logits of all tokens never exist at once."""

    TOKENS = 2048

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        expected: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        text_weight: float,
        compiled: bool,
    ) -> torch.Tensor:
        part = _compiled_part if compiled else _loss_part
        count = logits.shape[0]
        # Of `count` tokens the last of each example has no successor, so the mean over the text has another weight.
        text = text_weight / (targets >= 0).sum()
        gradient = torch.empty_like(logits)
        losses = []
        for start in range(0, count, _LogitsLoss.TOKENS):
            now = slice(start, start + _LogitsLoss.TOKENS)
            loss, gradient[now] = part(
                logits[now], expected[now], targets[now], text, (1 - text_weight) / count, temperature
            )
            losses.append(loss)
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None


def _loss_part(
    logits: torch.Tensor,
    expected: torch.Tensor,
    targets: torch.Tensor,
    text: torch.Tensor,
    teacher: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the weighted losses of some tokens, float32, and its gradient [tokens, V] in the logits' type."""
    own = F.log_softmax(logits.float(), dim=-1)
    softened = own if temperature == 1 else F.log_softmax(logits.float() / temperature, dim=-1)
    aim = F.log_softmax(expected.float() / temperature, dim=-1)
    has_text = (targets >= 0)[:, None]
    is_target = (torch.arange(logits.shape[1], device=logits.device) == targets[:, None]) & has_text
    divergence = (aim.exp() * (aim - softened)).sum()
    loss = teacher * temperature**2 * divergence - text * torch.where(is_target, own, 0.0).sum()
    gradient = teacher * temperature * (softened.exp() - aim.exp())
    gradient = gradient + text * (own.exp() * has_text - is_target.float())
    return loss, gradient.to(logits.dtype)


_compiled_part = torch.compile(_loss_part, dynamic=False)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def linear_layers(student: ReBasedForCausalLM) -> list[int]:
    """Numbers of the layers that have linear attention.

    Raises:
        ConversionError: none has.
    """
    layers = [i for i, layer_type in enumerate(student.config.layer_types) if layer_type in LINEAR_LAYER_TYPES]
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
def perplexity(model: PreTrainedModel, blocks: Blocks, batch_tokens: int = 4096) -> float:
    """exp of the mean loss of a token, given those before it in its example."""
    model.eval()
    length = blocks.ids.shape[1]
    batch_size = max(1, batch_tokens // length)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    # Compiled layers would be compiled again for these shapes.
    with torch.compiler.set_stance("force_eager"):
        for start in progress(range(0, len(blocks), batch_size), "perplexity"):
            ids = blocks.ids[start : start + batch_size].long().to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return math.exp(total.item() / (len(blocks) * (length - 1)))


def check_pair(teacher: PreTrainedModel, student: ReBasedForCausalLM) -> None:
    """Check that the student can be one of the teacher's.

    Raises:
        ConversionError: their sizes differ.
    """
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if theirs != ours:
            raise ConversionError(f"{name} must be the same for --teacher and --student, but is {theirs} and {ours}.")


def run(distill: DistillArguments, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """Train one stage.

    Returns:
        For each held-out file and length a row with the perplexities of the "teacher" (in the type in which it taught)
        and of the "student" and what it was "before" (in float32, with TF32 products on a GPU), as
        OUTPUT_DIR/perplexity.json has them.
    """
    set_seed(arguments.seed)
    # Not the library's --tf32: torch.compile before 2.13 cannot read what that sets.
    if arguments.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    half = torch.bfloat16 if arguments.bf16 else torch.float32
    if distill.max_seconds is not None:
        if distill.max_seconds <= 0:
            raise ConversionError(f"--max_seconds is {distill.max_seconds}; it must be positive.")
        arguments.max_steps = 10**9 if arguments.max_steps <= 0 else arguments.max_steps
    load_config(Path(distill.student))
    # Anything else that is no folder is looked for on the Hub, where a misspelt path is not either.
    if not Path(distill.teacher).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.gguf)", distill.teacher):
        raise ConversionError(
            f"--teacher is {distill.teacher!r}; it must be the folder of a softmax model, which linearize makes of a "
            "GGUF file with --layers softmax."
        )
    teacher = load_model(AutoModelForCausalLM, distill.teacher, f"--teacher {distill.teacher!r}", dtype=half)
    student: Any = load_model(
        ReBasedForCausalLM, distill.student, f"--student {distill.student!r}", dtype=torch.float32
    )
    check_pair(teacher, student)
    for i in linear_layers(student) if distill.stage == "transfer" or distill.kernel_backend != "auto" else []:
        student.model.layers[i].self_attn.backend = distill.kernel_backend
    tokenizer = AutoTokenizer.from_pretrained(distill.teacher)
    train = Blocks(distill.train_file, tokenizer, distill.context_length)
    held_out = {
        (name, length): Blocks([name], tokenizer, length)
        for name in distill.eval_file or []
        for length in distill.eval_length or [distill.context_length]
    }

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
    # Asking every step whether the loss is finite makes a GPU's host wait.
    arguments.logging_nan_inf_filter = False
    if distill.compile:
        arguments.dataloader_drop_last = True  # a last, smaller batch would be compiled for by itself
    rows = [{"file": Path(name).stem, "length": length} for name, length in held_out]
    before = student.to(arguments.device)
    for row, blocks in zip(rows, held_out.values()):
        row["before"] = perplexity(before, blocks)
    trainer = DistillTrainer(
        model=student,
        args=arguments,
        train_dataset=train,
        eval_dataset=next(iter(held_out.values()), None),
        teacher=teacher,
        distill=distill,
    )
    newest = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=newest)
    seconds = time.monotonic() - started

    # Without what the library wrapped around it for mixed precision: what is measured below is float32.
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if distill.lora_rank:
        trained = trained.merge_and_unload()
    for layer in trained.model.layers:  # what the trainer replaced
        for module in layer.children():
            module.__dict__.pop("forward", None)
    if trainer.is_world_process_zero():
        trained.requires_grad_(True)
        with written(Path(arguments.output_dir) / "final", overwrite=True) as final:
            trained.save_pretrained(final)
            tokenizer.save_pretrained(final)
        trainer.save_state()
        steps = trainer.state.global_step
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        said = {
            "stage": distill.stage,
            "steps": steps,
            "tokens": steps * batch * distill.context_length,
            "seconds": round(seconds, 1),
            "perplexity": rows,
        }
        summary = Path(arguments.output_dir) / "perplexity.json"
        # Before anything is measured too: the model is complete, also where that is cut short.
        summary.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        for row, blocks in zip(rows, held_out.values()):
            row |= {"teacher": perplexity(teacher, blocks), "student": perplexity(trained, blocks)}
        summary.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return rows


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
    for row in found:
        print(
            f"{row['file']}, {row['length']} tokens: held-out perplexity {row.get('before'):.3f} before, "
            f"{row.get('student', math.nan):.3f} now, the teacher's {row.get('teacher', math.nan):.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
