"""Train small models on multi-query associative recall (MQAR): one run, or a sweep over models, sizes and rates.

    python -m modeling_rebased.training.train_mqar --models rebased,based --hidden 64 --lengths 1024 --lrs 1e-3,3e-3 \\
        --seeds 0,1 --output output/mqar.jsonl

The recipe is the authors' (ReBased, section 5.1): 100,000 examples, 64 epochs, batch 512, AdamW with weight decay 0.1
on every parameter, the learning rate falling along a cosine from epoch to epoch, no warm-up, no clipping; a run stops
when 99% of the test answers are right.

There are two loops, and a test holds them together. `--loop plain` is transformers' Trainer. `--loop fast` (default)
is the same arithmetic arranged for a GPU: the data lies there, logits are made where an answer is asked only and never
stored (fused_loss.py), the model is compiled, and a whole step, from the choice of the batch to the optimizer, is one
CUDA graph.

A run is one line in OUTPUT, written when it ends. Runs that are already there are skipped, so the same command goes on
where it was stopped; a run that was stopped in the middle goes on from its last saved epoch. `--jobs` trains several
kinds of model at once on one GPU, which pays where they are small; with `--take-turns` they only compile at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM

from . import mqar
from .fused_loss import linear_cross_entropy


# The paper's models: a short convolution first, the mixer second. Its ablation takes parts of the normalisation away.
MODELS: dict[str, dict[str, Any]] = {
    "rebased": {"kernel": "rebased"},
    "based": {"kernel": "based"},
    "x2": {"kernel": "rebased", "normalize": False, "use_gamma": False, "use_beta": False},
    "normalized": {"kernel": "rebased", "normalize": True, "use_gamma": False, "use_beta": False},
    "gamma": {"kernel": "rebased", "normalize": False, "use_gamma": True, "use_beta": False},
    "gamma_beta": {"kernel": "rebased", "normalize": False, "use_gamma": True, "use_beta": True},
    "softmax": {"layer_types": ["conv", "full_attention"]},
    # Not the paper's: the same projections, so the same parameters, cut into fewer and wider heads.
    "rebased_6_heads": {"kernel": "rebased", "num_attention_heads": 6},
    "rebased_3_heads": {"kernel": "rebased", "num_attention_heads": 3},
    "based_3_heads": {"kernel": "based", "num_attention_heads": 3},
}


# Parts of a name that only other values than the defaults have.
_NAMED_IF_OTHER = {
    "t": "test_examples",
    "data": "data_seed",
    "v": "vocab_size",
    "wd": "weight_decay",
    "stop": "stop_at",
}


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's numbers, but for the device and the loop."""

    model: str
    hidden: int
    length: int
    pairs: int
    lr: float
    seed: int
    epochs: int = 64
    batch_size: int = 512
    train_examples: int = 100_000
    test_examples: int = 3_000
    data_seed: int = 0
    vocab_size: int = 8192
    weight_decay: float = 0.1
    dropout: float = 0.1
    stop_at: float = 0.99

    @property
    def name(self) -> str:
        extra = [f"e{self.epochs}", f"b{self.batch_size}", f"n{self.train_examples}", f"d{self.dropout:g}"]
        # The rest is named where it is not the recipe's, so that such a run is not taken for the recipe's own.
        for short, field in _NAMED_IF_OTHER.items():
            if (value := getattr(self, field)) != getattr(type(self), field):
                extra.append(f"{short}{value}")
        return "-".join(
            [
                self.model,
                f"h{self.hidden}",
                f"l{self.length}",
                f"p{self.pairs}",
                f"lr{self.lr:g}",
                f"s{self.seed}",
                *extra,
            ]
        )

    @property
    def spec(self) -> mqar.MQARSpec:
        return mqar.MQARSpec(self.length, self.pairs, self.vocab_size)

    @property
    def steps_per_epoch(self) -> int:
        # the last, smaller batch of an epoch is left out: every epoch has another order, so nothing is lost for good
        return self.train_examples // self.batch_size

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch: a cosine from lr towards 0, one step an epoch."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def order(self, epoch: int) -> torch.Tensor:
        """The order of the training examples in an epoch, cut to whole batches; the same for both loops."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.train_examples, generator=generator)[: self.steps_per_epoch * self.batch_size]

    def config(self, kernel_backend: str = "auto") -> ReBasedConfig:
        """The model: two layers, no MLP, learned positions, as in the authors' MQAR runs."""
        heads = MODELS[self.model].get("num_attention_heads", 12)
        options: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "num_hidden_layers": 2,
            "layer_types": ["conv", "linear_attention"],
            "num_attention_heads": heads,
            "feature_dim": 12 * 16 // heads,
            "head_dim": self.hidden // 12 * 12 // heads,
            "mlp_type": "none",
            "norm_type": "layernorm",
            "position_embedding_type": "learned",
            "max_position_embeddings": self.length,
            "embedding_dropout": self.dropout,
            "tie_word_embeddings": True,
            "kernel_backend": kernel_backend,
            # no padding token: the filler, token 0, has an embedding that is trained like any other
            "pad_token_id": None,
        }
        if self.model == "softmax":
            # one head for every 64 channels: 12 heads of 5 channels are no fair softmax baseline
            heads = max(1, self.hidden // 64)
            options.update(num_attention_heads=heads, head_dim=self.hidden // heads)
        options |= MODELS[self.model]
        config = ReBasedConfig(**options)
        if config.layer_types != options["layer_types"]:  # a library that renames layers would train another model
            raise RuntimeError(f"layer_types became {config.layer_types}, they must stay {options['layer_types']}")
        return config


@dataclass(frozen=True)
class Options:
    """How a run is computed; none of this changes what it should learn."""

    loop: str = "fast"
    device: str = "cuda"
    kernel_backend: str = "auto"
    bf16: bool = True
    compile: bool = True
    cuda_graph: bool = True
    progress: bool = True
    work_dir: str | None = None
    save_seconds: float = 30.0
    race_epoch: int | None = None
    deadline: float | None = None  # a time.time() after which runs stop at the end of their epoch
    take_turns: bool = False
    deterministic: bool = False

    @property
    def late(self) -> bool:
        """Whether the deadline has passed, by now."""
        return self.deadline is not None and time.time() > self.deadline

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)


def use_deterministic_algorithms() -> None:
    """Make this process's training the same to the bit from run to run; before its first work on the GPU.

    The one sum here whose order is open is the gradient of the token embedding: torch.compile adds to its rows with
    atomics, and a quarter of all tokens add to the filler's. Where the learned positions and the asked positions are
    gathered, no element is added to twice.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch demands it of products on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write every new tensor twice
    import torch._inductor.config as inductor

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # takes no kernel because it was the fastest when tried: others round otherwise


def build_model(run: Run, kernel_backend: str = "auto") -> ReBasedForCausalLM:
    """A freshly initialised model; the same weights for the same seed, whatever was drawn before."""
    torch.manual_seed(run.seed)
    return ReBasedForCausalLM(run.config(kernel_backend))


class Optimizer(torch.optim.AdamW):
    """AdamW as both loops use it."""

    def __init__(self, model: nn.Module, run: Run, on_gpu: bool):
        # In a CUDA graph the learning rate must be a tensor, and the step count stay on the GPU.
        options: dict[str, Any] = {"fused": True, "capturable": True} if on_gpu else {}
        lr = torch.tensor(run.lr, device="cuda") if on_gpu else run.lr
        super().__init__(model.parameters(), lr=lr, weight_decay=run.weight_decay, **options)

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


# ---------------------------------------------------------------- the plain loop


class PlainDataset(torch.utils.data.Dataset):
    def __init__(self, examples: mqar.MQARExamples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example = self.examples[index : index + 1]
        return {"input_ids": example.input_ids()[0], "labels": example.labels()[0]}


class OrderSampler(torch.utils.data.Sampler):
    """Hands out `run.order(epoch)`."""

    def __init__(self, run: Run):
        self.run, self.epoch = run, 0

    def __iter__(self) -> Iterator[int]:
        return iter(self.run.order(self.epoch).tolist())

    def __len__(self) -> int:
        return self.run.steps_per_epoch * self.run.batch_size


class PlainTrainer(Trainer):
    """The Trainer with our order of examples and MQAR's accuracy as its evaluation."""

    def __init__(self, run: Run, test: mqar.MQARExamples, **kwargs):
        self.run, self.test, self.sampler = run, test, OrderSampler(run)
        self.history: list[dict[str, float]] = []
        super().__init__(**kwargs)

    def _get_train_sampler(self, *args, **kwargs) -> torch.utils.data.Sampler:
        return self.sampler

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with (
            self.autocast_smart_context_manager()
            if hasattr(self, "autocast_smart_context_manager")
            else torch.no_grad()
        ):
            accuracy = mqar.accuracy(self.model, self.test, batch_size=128)
        metrics = {"eval_accuracy": accuracy}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class PlainCallback(TrainerCallback):
    """Tells the sampler its epoch and stops at the accuracy that ends a run."""

    def __init__(self, run: Run, sampler: OrderSampler, options: Options):
        self.run, self.sampler, self.options = run, sampler, options
        self.stopped: str | None = None

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.epoch = round(state.epoch)

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        done = metrics["eval_accuracy"] >= self.run.stop_at or round(state.epoch) >= self.run.epochs
        if self.options.late and not done:
            self.stopped = "deadline"
        control.should_training_stop |= done or self.stopped is not None


def train_plain(run: Run, options: Options) -> tuple[dict[str, Any], ReBasedForCausalLM]:
    """Train with transformers' Trainer; continues from the last epoch saved in `options.work_dir`."""
    model = build_model(run, options.kernel_backend)
    on_gpu = options.device.startswith("cuda")
    train = PlainDataset(mqar.make_examples(run.spec, run.train_examples, seed=run.data_seed))
    test = mqar.make_examples(run.spec, run.test_examples, seed=run.data_seed, split="test")
    folder = Path(options.work_dir or "output/mqar-work") / run.name
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        max_grad_norm=0.0,  # 0 is no clipping
        bf16=options.bf16,
        use_cpu=not on_gpu,
        torch_compile=options.compile and on_gpu,
        eval_strategy="epoch",
        save_strategy="epoch" if options.work_dir else "no",
        save_total_limit=1,
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=not options.progress,
        seed=run.seed,
        dataloader_drop_last=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=run.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: run.lr_at(min(step // run.steps_per_epoch, run.epochs)) / run.lr
    )
    trainer = PlainTrainer(
        run,
        test,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=PlainDataset(test),
        optimizers=(optimizer, schedule),
    )
    callback = PlainCallback(run, trainer.sampler, options)
    trainer.add_callback(callback)
    begin = time.perf_counter()
    saved = options.work_dir and folder.exists() and any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=bool(saved) or None)
    losses = {round(entry["epoch"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    history = [
        {"epoch": round(entry["epoch"]), "loss": losses.get(round(entry["epoch"])), "accuracy": entry["eval_accuracy"]}
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    ]
    result = _result(run, options, history, time.perf_counter() - begin, _parameters(model))
    if callback.stopped:
        result["stopped"] = callback.stopped
    return result, model


# ---------------------------------------------------------------- the fast loop


class FastTrainer:
    """Trains runs that differ in learning rate and seed only, one after another.

    Model, optimizer, compiled code and CUDA graph are made once: a new run writes its first weights into the
    parameters, and zeros into the optimizer's state.
    """

    def __init__(self, run: Run, options: Options):
        self.options, self.device = options, torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.kind = kind_of(run)
        self.model = build_model(run, options.kernel_backend).to(self.device)
        self.optimizer = Optimizer(self.model, run, self.on_gpu)
        train = mqar.make_examples(run.spec, run.train_examples, seed=run.data_seed, device=self.device)
        self.test = mqar.make_examples(
            run.spec, run.test_examples, seed=run.data_seed, split="test", device=self.device
        )
        self.input_ids = train.input_ids(train.keys.dtype)  # 2 bytes a token: 0.4 GB at length 2,048
        self.positions, self.values = train.positions, train.values
        self.order = torch.zeros(run.steps_per_epoch * run.batch_size, dtype=torch.long, device=self.device)
        self.batch_lanes = torch.arange(run.batch_size, device=self.device)
        # Read and advanced inside the graph, so that a step needs nothing from the host.
        self.cursor = torch.zeros((), dtype=torch.long, device=self.device)
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        self.backbone = self.model.model
        if options.compile and self.on_gpu:
            self.backbone = torch.compile(self.backbone, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.setup_seconds = 0.0

    def loss(self, input_ids: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the answers. input_ids [B, T], positions and values [B, pairs]."""
        with self.options.autocast():
            hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, T, hidden]
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # [B, pairs, hidden]
            return linear_cross_entropy(hidden.flatten(0, 1), self.model.lm_head.weight, values.flatten())

    def step(self) -> None:
        rows = self.order[self.cursor * self.batch_lanes.shape[0] + self.batch_lanes]
        loss = self.loss(self.input_ids[rows].long(), self.positions[rows].long(), self.values[rows].long())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach()
        self.cursor += 1

    def reset(self, run: Run) -> None:
        """Become a fresh run: first weights, empty optimizer state, the run's random numbers."""
        fresh = build_model(run, self.options.kernel_backend)
        with torch.no_grad():
            for old, new in zip(self.model.parameters(), fresh.parameters(), strict=True):
                old.copy_(new)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        self.cursor.zero_()
        self.loss_sum.zero_()
        # building the model drew numbers, another amount for each kind; dropout starts from here
        torch.manual_seed(run.seed)

    def prepare(self, run: Run) -> None:
        """Compile, and record a step. Both take real steps, which `reset` undoes."""
        begin = time.perf_counter()
        self.model.train()
        self.order.copy_(run.order(0))
        try:
            self._warm_up()
        except Exception as error:  # whatever the compiler raises: the run is worth more than its speed
            if self.backbone is self.model.model:
                raise
            tqdm.write(f"{run.name}: trains without torch.compile, which failed: {str(error)[:2000]}")
            self.backbone = self.model.model
            self.optimizer.zero_grad(set_to_none=True)
            self._warm_up()
        if self.options.cuda_graph:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.step()
                self.graph = graph
            except RuntimeError as error:  # an operation that cannot be recorded
                tqdm.write(f"{run.name}: trains without a CUDA graph, which failed: {str(error)[:2000]}")
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.setup_seconds = time.perf_counter() - begin

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self.cursor.zero_()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def time_steps(self, run: Run, steps: int = 20) -> dict[str, Any]:
        """Seconds of one training step, nothing else running, and the kernels that take longest."""
        self.prepare(run)
        self.reset(run)

        def go() -> float:
            self.cursor.zero_()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(steps):
                self.graph.replay() if self.graph is not None else self.step()
            torch.cuda.synchronize()
            return (time.perf_counter() - begin) / steps

        go()
        seconds = sorted(go() for _ in range(3))[1]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            go()
        kernels = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)[:25]
        return {
            "name": run.name,
            "step_seconds": seconds,
            "tokens_per_second": run.batch_size * run.length / seconds,
            "floor": floor_seconds(run),
            "setup_seconds": self.setup_seconds,
            "compiled": self.backbone is not self.model.model,
            "cuda_graph": self.graph is not None,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "kernels_ms_a_step": {
                event.key[:90]: round(event.device_time_total / 1000 / steps, 4) for event in kernels
            },
        }

    def accuracy(self) -> float:
        with self.options.autocast():
            return mqar.accuracy(self.model, self.test, batch_size=256)

    def _state_path(self, run: Run) -> Path | None:
        return Path(self.options.work_dir) / f"{run.name}.pt" if self.options.work_dir else None

    def _save(self, run: Run, history: list[dict[str, float]], seconds: float) -> None:
        path = self._state_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "run": asdict(run),
            "model": self.model.state_dict(),
            "optimizer": [dict(self.optimizer.state[p]) for p in self.model.parameters()],
            "history": history,
            "seconds": seconds,
            "random": torch.cuda.get_rng_state() if self.on_gpu else torch.get_rng_state(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)  # a kill leaves the old file or the new one, never half of one

    def _load(self, run: Run) -> tuple[list[dict[str, float]], float]:
        path = self._state_path(run)
        if path is None or not path.exists():
            return [], 0.0
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for parameter, saved in zip(self.model.parameters(), state["optimizer"], strict=True):
            for key, value in saved.items():
                current = self.optimizer.state[parameter].get(key)
                if isinstance(current, torch.Tensor):
                    current.copy_(value)
                else:
                    self.optimizer.state[parameter][key] = value
        random = state["random"].cpu()
        torch.cuda.set_rng_state(random) if self.on_gpu else torch.set_rng_state(random)
        return state["history"], state["seconds"]

    def train(self, run: Run, position: int = 0, until: int | None = None) -> dict[str, Any]:
        """Train one run to its end, or from its last saved epoch on; with `until`, stop and save after that epoch."""
        if kind_of(run) != self.kind:
            raise ValueError(f"this trainer was built for {self.kind}, the run is {kind_of(run)}")
        if self.on_gpu and self.setup_seconds == 0.0:
            self.prepare(run)
        self.reset(run)
        history, seconds_before = self._load(run)
        self.model.train()
        stopped = None
        begin, last_save = time.perf_counter(), time.perf_counter()
        bar = tqdm(
            range(len(history), run.epochs),
            desc=run.name,
            disable=not self.options.progress,
            position=position,
            leave=False,
            unit="epoch",
        )
        for epoch in bar:
            if history and history[-1]["accuracy"] >= run.stop_at:
                break
            self.order.copy_(run.order(epoch))
            self.optimizer.set_lr(run.lr_at(epoch))
            self.cursor.zero_()
            self.loss_sum.zero_()
            for _ in range(run.steps_per_epoch):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self.step()
            loss = self.loss_sum.item() / run.steps_per_epoch  # the only wait of an epoch
            accuracy = self.accuracy()
            seconds = seconds_before + time.perf_counter() - begin
            history.append({"epoch": epoch + 1, "loss": loss, "accuracy": accuracy, "seconds": round(seconds, 2)})
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
            late = self.options.late
            early = until is not None and epoch + 1 >= until
            if self.options.work_dir and (
                late or early or time.perf_counter() - last_save > self.options.save_seconds
            ):
                self._save(run, history, seconds)
                last_save = time.perf_counter()
            if (late or early) and epoch + 1 < run.epochs and accuracy < run.stop_at:
                stopped = "deadline" if late else f"epoch {until}"
                break
            if not math.isfinite(loss):
                stopped = "loss is not finite"
                break
        bar.close()
        result = _result(
            run, self.options, history, seconds_before + time.perf_counter() - begin, _parameters(self.model)
        )
        if stopped:
            result["stopped"] = stopped
        elif (path := self._state_path(run)) is not None:
            path.unlink(missing_ok=True)
        return result


def kind_of(run: Run) -> tuple:
    """What runs of one FastTrainer have in common."""
    return tuple(value for name, value in asdict(run).items() if name not in ("lr", "seed", "epochs", "stop_at"))


# ---------------------------------------------------------------- results


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _result(
    run: Run, options: Options, history: list[dict[str, float]], seconds: float, parameters: int
) -> dict[str, Any]:
    trained = len(history)
    tokens = trained * run.steps_per_epoch * run.batch_size * run.length
    on_gpu = options.device.startswith("cuda")
    return {
        "name": run.name,
        **asdict(run),
        "accuracy": history[-1]["accuracy"] if history else None,
        "best_accuracy": max((entry["accuracy"] for entry in history), default=None),
        "epochs_trained": trained,
        "parameters": parameters,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds) if seconds else None,
        "loop": options.loop,
        "bf16": options.bf16,
        "deterministic": options.deterministic,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "history": history,
    }


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read a results file; a last line that was cut off by a kill is left out."""
    path = Path(path)
    if not path.exists():
        return []
    results = []
    for line in path.read_text().splitlines():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def append_result(path: str | Path, result: dict[str, Any]) -> None:
    """Append one line, whole: several processes may write to one file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result) + "\n"
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line before was cut off
                text = "\n" + text
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def floor_seconds(run: Run, bandwidth: float = 3.0e12, rate: float = 700e12) -> dict[str, float]:
    """What one training step must take at least, by operations and by bytes, given a GPU's two rates.

    Operations: a product of [M, K] and [K, N] is 2 M K N, once forward and twice backward; the kernel's state form is
    counted, all its features, written and read for head_dim + 1 columns. Bytes: each tensor between two operations
    that cannot be one (projections, convolution, mixer, loss) in bf16, written and read forward, read again backward,
    its gradient written and read: 5 passes.
    """
    d, tokens, asked = run.hidden, run.batch_size * run.length, run.batch_size * run.pairs
    config = run.config()
    heads, feature_dim, head_dim = config.num_attention_heads, config.feature_dim, config.head_dim
    inner = heads * head_dim
    projections = 2 * d * d + 2 * d * (2 * heads * feature_dim) + 2 * 2 * d * inner
    kernel = heads * 2 * 2 * config.n_features * (head_dim + 1)
    operations = 3 * (tokens * (projections + kernel) + asked * 2 * d * run.vocab_size)
    # embedding, convolution's product, its output, q, k, v, mixer's output, its projection, the last norm
    elements = tokens * (5 * d + 2 * heads * feature_dim + 2 * inner)
    return {
        "operations": operations,
        "operations_seconds": operations / rate,
        "bytes": elements * 2 * 5,
        "bytes_seconds": elements * 2 * 5 / bandwidth,
    }


def save_model(model: ReBasedForCausalLM, run: Run, folder: str | Path, result: dict[str, Any] | None = None) -> None:
    """Write a checkpoint folder: bf16 safetensors, config, the model's code, the WordLevel tokenizer, a model card."""
    model = model.to("cpu", torch.bfloat16).eval()
    model.config.kernel_backend = "auto"
    folder = Path(folder)
    model.save_pretrained(folder)
    mqar.build_tokenizer(run.vocab_size, run.length).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(run, result), encoding="utf-8")


def model_card(run: Run, result: dict[str, Any] | None) -> str:
    """The README of a checkpoint, with what its training measured."""
    task = f"mqar_{run.length}_{run.pairs}"
    first_value = run.vocab_size // 2
    trained = ""
    if result is not None:
        trained = f"""
## Training

{result["epochs_trained"]} epochs of {run.steps_per_epoch * run.batch_size:,} examples, batch {run.batch_size}, AdamW,
learning rate {run.lr:g} (a cosine over {run.epochs} epochs), weight decay {run.weight_decay:g}, seed {run.seed}.
It took {result["seconds"]:.0f} seconds on one {result["device"]}. The model then answered {result["accuracy"]:.2%} of
the queries of {run.test_examples:,} test sequences.
"""
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags: [rebased, linear-attention, associative-recall, mqar]
---
# {run.model} for multi-query associative recall, hidden size {run.hidden}

Two layers, a short gated convolution and one layer of {run.model} attention (arXiv 2402.10644), trained on multi-query
associative recall (MQAR): a sequence of {run.length} tokens starts with {run.pairs} key-value pairs, the keys come
again in another order, and the model says each one's value. Its tokens are the task's symbols: "_" the filler, "1" to
"{first_value - 1}" keys, "{first_value}" to "{run.vocab_size - 1}" values. It knows nothing else.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)

Score it with lm-eval:

    lm-eval run --model hf --model_args pretrained=FOLDER,trust_remote_code=True \\
        --include_path "$(rebased-tasks)" --tasks {task} --batch_size 32
{trained}"""


# ---------------------------------------------------------------- the sweep

# Held while a process of a sweep trains, where processes take turns.
_turn: contextlib.AbstractContextManager = contextlib.nullcontext()


def _share_turn(lock: contextlib.AbstractContextManager) -> None:
    """Make `lock` this process's turn: the start of every process of a sweep."""
    global _turn
    _turn = lock


def _race(trainer: FastTrainer, runs: list[Run], epoch: int, worker: int) -> tuple[list[Run], list[dict[str, Any]]]:
    """Train the first seed's runs to an epoch, and keep the learning rate with the lowest loss there.

    Returns the runs that remain (that rate, every seed) and the results of those given up, or of all where the
    deadline has passed and nothing goes on.
    """
    first = [run for run in runs if run.seed == runs[0].seed]
    results = {run: trainer.train(run, worker, until=epoch) for run in first}

    def rank(run: Run) -> float:
        history = results[run]["history"]
        return history[-1]["loss"] if history and math.isfinite(history[-1]["loss"]) else math.inf

    best = min(first, key=rank)
    late = trainer.options.late
    given_up = [results[run] for run in first if run is not best or (late and results[run].get("stopped"))]
    return [run for run in runs if run.lr == best.lr], given_up


def run_group(
    runs: list[Run], options: Options, output: str, save: str | None, worker: int = 0
) -> list[dict[str, Any]]:
    """Train runs of one kind one after another; every one is in `output` as soon as it ends."""
    if options.deterministic:
        use_deterministic_algorithms()
    results = []
    trainer = FastTrainer(runs[0], options) if options.loop == "fast" else None
    if options.take_turns and trainer is not None and trainer.on_gpu and not options.late:
        trainer.prepare(runs[0])  # compiles while another process trains
    with _turn:
        if trainer is not None and options.race_epoch is not None:
            runs, given_up = _race(trainer, runs, options.race_epoch, worker)
            for result in given_up:
                append_result(output, result)
        for run in runs:
            if options.late:
                break
            if trainer is not None:
                result, model = trainer.train(run, position=worker), trainer.model
                result["setup_seconds"] = round(trainer.setup_seconds, 2)
            else:
                result, model = train_plain(run, options)
            if save:  # before the line in `output`, which says that nothing of this run is left to do
                copy = build_model(run, options.kernel_backend)
                copy.load_state_dict(model.state_dict())
                save_model(copy, run, Path(save) / run.name, result)
            append_result(output, result)
            results.append(result)
            shown = {
                key: result[key] for key in ("name", "accuracy", "epochs_trained", "seconds", "tokens_per_second")
            }
            tqdm.write(json.dumps(shown))
    return results


def sweep(runs: list[Run], options: Options, output: str, jobs: int = 1, save: str | None = None) -> list[dict]:
    """Train every run that `output` does not hold yet, groups of one kind at once in `jobs` processes."""
    done = {result["name"] for result in read_results(output) if result.get("stopped") != "deadline"}
    left = [run for run in runs if run.name not in done]
    if len(left) < len(runs):
        tqdm.write(f"{len(runs) - len(left)} of {len(runs)} runs are already in {output}")
    groups: dict[tuple, list[Run]] = {}
    for run in left:
        groups.setdefault(kind_of(run), []).append(run)
    results: list[dict] = []
    if jobs <= 1:
        for group in tqdm(groups.values(), desc="kinds of model", disable=not options.progress, position=1):
            results += run_group(group, options, output, save)
        return results
    context = get_context("spawn")
    turn = {"initializer": _share_turn, "initargs": (context.Lock(),)} if options.take_turns else {}
    with ProcessPoolExecutor(jobs, mp_context=context, **turn) as pool:
        futures = [
            pool.submit(run_group, group, options, output, save, number % jobs)
            for number, group in enumerate(groups.values())
        ]
        bar = tqdm(total=len(futures), desc="kinds of model", disable=not options.progress, position=jobs)
        with bar:
            for future in as_completed(futures):
                results += future.result()
                bar.update()
    return results


def _number(text: str, kind: type, allowed: str, holds: Callable[[Any], bool]) -> Any:
    """Read a number of the command line; argparse puts the argument's name before the error."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
    return value


def _integer(text: str) -> int:
    return _number(text, int, "an integer", lambda value: True)


def _count(text: str) -> int:
    return _number(text, int, "an integer of at least 1", lambda value: value >= 1)


def _positive(text: str) -> float:
    return _number(text, float, "a positive number", lambda value: 0 < value < math.inf)


def _fraction(text: str) -> float:
    return _number(text, float, "at least 0 and less than 1", lambda value: 0 <= value < 1)


def _list(kind: Callable[[str], Any]) -> Callable[[str], list]:
    return lambda text: [kind(item) for item in text.split(",")]


def _check_writable(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error, before anything is trained, where results could not be written afterwards."""
    for name, folder in (("--output", Path(args.output).parent), ("--save", args.save), ("--work-dir", args.work_dir)):
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            parser.error(f"{name}: cannot write into {folder}: {error.strerror}")
    if Path(args.output).is_dir():
        parser.error(f"--output {args.output} is a folder, it must be a file of JSON lines")


def parse(argv: list[str] | None = None) -> tuple[list[Run], Options, argparse.Namespace]:
    """Read the command line: the runs, what they share, and the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", default="rebased", help=f"comma-separated, of {', '.join(MODELS)}")
    add("--hidden", type=_list(_count), default=[64], help="hidden sizes")
    add("--lengths", type=_list(_count), default=[128], help="of 128, 256, 512, 1024, 2048, or any with --pairs")
    add("--pairs", type=_count, help="key-value pairs a sequence; default: Figure 1's for the length")
    add("--lrs", type=_list(_positive), default=[5e-4, 1e-3, 3e-3, 1e-2])
    add("--seeds", type=_list(_integer), default=[0])
    add("--epochs", type=_count, default=64)
    add("--batch-size", type=_count, default=512)
    add("--train-examples", type=_count, default=100_000)
    add("--test-examples", type=_count, default=3_000)
    add("--data-seed", type=int, default=0)
    add("--dropout", type=_fraction, default=0.1, help="of the embeddings")
    add("--stop-at", type=float, default=0.99, help="test accuracy that ends a run; 2 never does")
    add("--output", default="output/mqar.jsonl")
    add("--save", metavar="DIR", help="write every trained model to DIR/NAME")
    add("--work-dir", metavar="DIR", help="where unfinished runs are kept; default: beside OUTPUT")
    add("--jobs", type=_count, default=1, help="kinds of model trained at once on the GPU")
    add("--take-turns", action="store_true", help="with --jobs: compile at once, but train one kind at a time")
    add(
        "--race",
        type=_count,
        metavar="EPOCH",
        help="fast loop: train the first seed to this epoch at every rate, then go on with the one of lowest loss; "
        "MQAR first stays on a plateau for some epochs, and a race that ends there is a lottery",
    )
    add("--loop", choices=("fast", "plain"), default="fast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--kernel-backend", choices=("auto", "eager", "triton"), default="auto")
    add("--fp32", action="store_true", help="no bf16 autocast")
    add("--no-compile", action="store_true")
    add("--no-cuda-graph", action="store_true")
    add(
        "--deterministic",
        action="store_true",
        help="the same numbers to the bit from run to run on one kind of GPU; slower",
    )
    add("--time-steps", action="store_true", help="train nothing: time a step of each kind of model, fast loop, GPU")
    add("--no-progress", action="store_true")
    add(
        "--max-seconds",
        type=_positive,
        help="stop runs at the end of their epoch after so long; they stay unfinished",
    )
    args = parser.parse_args(argv)
    models = args.models.split(",")
    if unknown := [name for name in models if name not in MODELS]:
        parser.error(f"--models: {', '.join(unknown)} is not one of {', '.join(MODELS)}")
    try:
        runs = [
            Run(
                model=model,
                hidden=hidden,
                length=length,
                pairs=args.pairs or mqar.figure_1_spec(length).num_pairs,
                lr=lr,
                seed=seed,
                epochs=args.epochs,
                batch_size=args.batch_size,
                train_examples=args.train_examples,
                test_examples=args.test_examples,
                data_seed=args.data_seed,
                dropout=args.dropout,
                stop_at=args.stop_at,
            )
            for length, hidden, model, seed, lr in itertools.product(
                args.lengths, args.hidden, models, args.seeds, args.lrs
            )
        ]
        for run in runs:
            _ = run.spec
    except ValueError as error:
        parser.error(str(error))
    if (too_small := min(args.hidden)) < 12 and models != ["softmax"]:
        parser.error(f"--hidden must be at least 12, since the models have 12 heads, got {too_small}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no GPU here, --device cpu is possible")
    if args.time_steps and not args.device.startswith("cuda"):
        parser.error(f"--time-steps needs a GPU, --device is {args.device}")
    if args.race and args.loop != "fast":
        parser.error(f"--race goes with --loop fast, not {args.loop}")
    if args.batch_size > args.train_examples:
        parser.error(f"--batch-size {args.batch_size} is larger than --train-examples {args.train_examples}")
    on_gpu = args.device.startswith("cuda")
    _check_writable(parser, args)
    options = Options(
        loop=args.loop,
        device=args.device,
        kernel_backend=args.kernel_backend,
        bf16=on_gpu and not args.fp32,
        compile=on_gpu and not args.no_compile,
        cuda_graph=on_gpu and not args.no_cuda_graph,
        progress=not args.no_progress,
        work_dir=args.work_dir or str(Path(args.output).with_suffix("")) + "-unfinished",
        race_epoch=args.race,
        deadline=time.time() + args.max_seconds if args.max_seconds is not None else None,
        take_turns=args.take_turns,
        deterministic=args.deterministic,
    )
    return runs, options, args


def main(argv: list[str] | None = None) -> None:
    """Train the runs that are asked for."""
    runs, options, args = parse(argv)
    if args.time_steps:
        if options.deterministic:
            use_deterministic_algorithms()
        for run in {kind_of(run): run for run in runs}.values():
            report = FastTrainer(run, options).time_steps(run)
            append_result(args.output, report)
            print(json.dumps(report, indent=1))
        return
    results = sweep(runs, options, args.output, args.jobs, args.save)
    print(f"{len(results)} runs trained, all results in {args.output}")


if __name__ == "__main__":
    main()
