"""Train small models on synthetic tasks (MQAR, MAD, ICLL) with a loop that is arranged for a GPU.

The data lies on the device. The model is compiled, and a whole step, from the choice of the batch to the optimizer, is
one CUDA graph. What is trained on what is a `Recipe` (recipe.py).
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .folders import written
from .recipe import Options, Recipe, best_epoch, build_model, fields_of, kind_of
from .run_results import run_result


def use_deterministic_algorithms() -> None:
    """Make training in this process equal to the bit from run to run. Call it before the first work on the GPU.

    Only one sum has an order that may change: the gradient of the token embedding. torch.compile adds to its rows with
    atomic additions, and a quarter of all tokens add to the row of the filler. The gathers of learned positions and of
    asked positions add to no element twice.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch demands it of products on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write every new tensor twice
    import torch._inductor.config as inductor

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # takes no kernel because it was the fastest when tried: others round otherwise


class Optimizer(torch.optim.AdamW):
    """Run AdamW with a learning rate that can change inside a CUDA graph."""

    def __init__(self, model: nn.Module, run: Recipe, on_gpu: bool):
        # In a CUDA graph the learning rate must be a tensor, and the step count stay on the GPU.
        options: dict[str, Any] = {"fused": True, "capturable": True} if on_gpu else {}
        lr = torch.tensor(run.lr, device="cuda") if on_gpu else run.lr
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []  # rates of decay of the peers, which say that they must not be pulled to zero
        for parameter in model.parameters():
            (kept if getattr(parameter, "_no_weight_decay", False) else decayed).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed}]
        if kept:
            groups.append({"params": kept, "weight_decay": 0.0})
        super().__init__(groups, lr=lr, weight_decay=run.weight_decay, **options)
        self.lr = run.lr

    def set_lr(self, lr: float) -> None:
        if lr == self.lr:
            return
        self.lr = lr
        for group in self.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class FastTrainer:
    """Train runs that differ only in learning rate and seed, one after another.

    Model, optimizer, compiled code and CUDA graph are made once. A new run writes its first weights into the
    parameters, and zeros into the optimizer's state.
    """

    def __init__(self, run: Recipe, options: Options):
        self.options, self.device = options, torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.kind = kind_of(run)
        self.model = build_model(run, options.kernel_backend).to(self.device)
        self.optimizer = Optimizer(self.model, run, self.on_gpu)
        self.head = self.model.get_output_embeddings()
        self.task = run.make_task(self.device)
        self.order = torch.zeros(run.steps_per_epoch * run.batch_size, dtype=torch.long, device=self.device)
        self.batch_lanes = torch.arange(run.batch_size, device=self.device)
        # Read and advanced inside the graph, so that a step needs nothing from the host.
        self.cursor = torch.zeros((), dtype=torch.long, device=self.device)
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        self.backbone = self.model.base_model
        if options.compile and self.on_gpu:
            self.backbone = torch.compile(self.backbone, dynamic=False)
        self.best: list[torch.Tensor] | None = None  # the weights of the lowest validation loss, where there is one
        self.graph: torch.cuda.CUDAGraph | None = None
        self.setup_seconds = 0.0

    def loss(self, *batch: torch.Tensor) -> torch.Tensor:
        """Return the loss of rows of the task's tensors."""
        with self.options.autocast():
            return self.task.loss(self.backbone, self.head, *batch)

    def step(self) -> None:
        rows = self.order[self.cursor * self.batch_lanes.shape[0] + self.batch_lanes]
        loss = self.loss(*(tensor[rows].long() for tensor in self.task.train))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach()
        self.cursor += 1

    def reset(self, run: Recipe) -> None:
        """Start a fresh run: first weights, empty optimizer state, and the run's random numbers."""
        fresh = build_model(run, self.options.kernel_backend)
        with torch.no_grad():
            for old, new in zip(self.model.parameters(), fresh.parameters(), strict=True):
                old.copy_(new)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.best = None
        self.optimizer.zero_grad(set_to_none=True)
        self.cursor.zero_()
        self.loss_sum.zero_()
        # building the model drew numbers, another amount for each kind; dropout starts from here
        torch.manual_seed(run.seed)

    def prepare(self, run: Recipe) -> None:
        """Compile and record a step. Both take real steps, which `reset` undoes."""
        begin = time.perf_counter()
        self.model.train()
        self.order.copy_(run.order(0))
        try:
            self._warm_up()
        except Exception as error:  # whatever the compiler raises: the run is worth more than its speed
            if self.backbone is self.model.base_model:
                raise
            tqdm.write(f"{run.name}: trains without torch.compile, which failed: {str(error)[:2000]}")
            self.backbone = self.model.base_model
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
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.cursor.zero_()  # an epoch may have fewer batches
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def measure(self) -> dict[str, float]:
        with self.options.autocast():
            return self.task.measure(self.model)

    def _state_path(self, run: Recipe) -> Path | None:
        return Path(self.options.work_dir) / f"{run.name}.pt" if self.options.work_dir else None

    def _save(self, path: Path, run: Recipe, history: list[dict[str, float]], seconds: float) -> None:
        state = {
            "run": fields_of(run),
            "model": self.model.state_dict(),
            "optimizer": [dict(self.optimizer.state[p]) for p in self.model.parameters()],
            "history": history,
            "seconds": seconds,
            "best": self.best,
            "random": torch.cuda.get_rng_state() if self.on_gpu else torch.get_rng_state(),
        }
        with written(path) as unfinished:
            torch.save(state, unfinished)

    def _save_weights(self, run: Recipe, history: list[dict[str, float]]) -> None:
        """Write the weights of an epoch with the fields of the run and what was measured."""
        if self.options.save_weights is None:
            return
        folder = Path(self.options.save_weights) / run.name
        state = {"run": fields_of(run), "model": self.model.state_dict(), "measured": history[-1]}
        with written(folder / f"epoch-{len(history):03}.pt") as unfinished:
            torch.save(state, unfinished)

    def _load(self, run: Recipe) -> tuple[list[dict[str, float]], float]:
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
        self.best = state.get("best")
        random = state["random"].cpu()
        torch.cuda.set_rng_state(random) if self.on_gpu else torch.set_rng_state(random)
        return state["history"], state["seconds"]

    def train(self, run: Recipe, position: int = 0, until: int | None = None) -> dict[str, Any]:
        """Train one run to its end, from its last saved epoch on. With `until`, stop and save after that epoch."""
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
            if history and run.is_done(history):
                break
            self.order.copy_(run.order(epoch))
            self.cursor.zero_()
            self.loss_sum.zero_()
            for step in range(run.steps_per_epoch):
                self.optimizer.set_lr(run.lr_at(epoch, step))
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self.step()
            loss = self.loss_sum.item() / run.steps_per_epoch  # the only wait of an epoch
            measured = self.measure()
            seconds = seconds_before + time.perf_counter() - begin
            history.append({"epoch": epoch + 1, "loss": loss, **measured, "seconds": round(seconds, 2)})
            self._save_weights(run, history)
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{measured['accuracy']:.3f}")
            if best_epoch(history) == epoch + 1:
                self.best = [parameter.detach().clone() for parameter in self.model.parameters()]
            late = self.options.late
            early = until is not None and epoch + 1 >= until
            due = late or early or time.perf_counter() - last_save > self.options.save_seconds
            if due and (path := self._state_path(run)) is not None:
                self._save(path, run, history, seconds)
                last_save = time.perf_counter()
            if (late or early) and epoch + 1 < run.epochs and not run.is_done(history):
                stopped = "deadline" if late else f"epoch {until}"
                break
            if not math.isfinite(loss):
                stopped = "loss is not finite"
                break
        bar.close()
        seconds = seconds_before + time.perf_counter() - begin
        if self.best is not None:
            with torch.no_grad():
                for parameter, weights in zip(self.model.parameters(), self.best, strict=True):
                    parameter.copy_(weights)
        with self.options.autocast():
            finish = self.task.finish(self.model)
        tokens = self.task.train[0].shape[1]
        result = run_result(run, self.options, history, finish, seconds, tokens, self.model.num_parameters())
        if stopped:
            result["stopped"] = stopped
        elif (path := self._state_path(run)) is not None:
            path.unlink(missing_ok=True)
        return result
