"""MQAR training on transformers' Trainer: slow and plain, what the fast loop is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_rebased import ReBasedForCausalLM
from modeling_rebased.training import mqar
from modeling_rebased.training.mqar_runs import Run
from modeling_rebased.training.recipe import build_model


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

    def __init__(self, run: Run, sampler: OrderSampler):
        self.run, self.sampler = run, sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.epoch = round(state.epoch)

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        control.should_training_stop |= metrics["eval_accuracy"] >= self.run.stop_at


def train_plain(run: Run, folder: Path) -> tuple[list[dict[str, float]], ReBasedForCausalLM]:
    """Train on the CPU with transformers' Trainer. Return what was measured by epoch, and the model."""
    model = build_model(run)
    train = PlainDataset(mqar.make_examples(run.spec, run.train_examples, seed=run.data_seed))
    test = mqar.make_examples(run.spec, run.test_examples, seed=run.data_seed, split="test")
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        max_grad_norm=0.0,  # 0 is no clipping
        use_cpu=True,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
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
    trainer.add_callback(PlainCallback(run, trainer.sampler))
    trainer.train()
    losses = {round(entry["epoch"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    history = [
        {"epoch": round(entry["epoch"]), "loss": losses.get(round(entry["epoch"])), "accuracy": entry["eval_accuracy"]}
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    ]
    return history, model
