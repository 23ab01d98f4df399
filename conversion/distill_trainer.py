"""The Trainer of `distill`: what each stage trains, and its loss against the teacher."""

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.configuration_rebased import LINEAR_LAYER_TYPES
from modeling_rebased.training.tensor_parallel import TensorParallelTrainer

from .clock import Clock, StopByClock
from .distill_arguments import DistillArguments
from .losses import logits_loss, relative_error
from .report import ConversionError


# What stage "transfer" trains, of the linear layers.
TRANSFERRED = ("q_proj.", "k_proj.", "q_norm.", "k_norm.", "gate", "decay_proj.")


class AttentionTap:
    """Record the inputs and outputs of attention modules, and replace inputs on request.

    Args:
        modules: the attention modules, by layer.

    Attributes:
        inputs, outputs: [B, T, hidden_size] of each layer in the last forward pass.
        replace: inputs to use instead, by layer. The outputs are then detached from the graph for the layers that
            follow, so that each layer learns by itself.
    """

    def __init__(self, modules: dict[int, nn.Module]):
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.replace: dict[int, torch.Tensor] | None = None
        self.handles: list[Any] = []
        for i, module in modules.items():
            self.handles.append(module.register_forward_pre_hook(self._before(i), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after(i)))

    def remove(self) -> None:
        """Leave the modules as they were."""
        for each in self.handles:
            each.remove()

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


class DistillTrainer(TensorParallelTrainer):
    """Train a student with the Trainer of transformers and a teacher.

    Args:
        model: the student, or in stage "transfer" what `without_mlps` makes of it.
        teacher: the softmax model, which is neither trained nor saved.
        distill: the stage and its settings.
        others: as in the Trainer.
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
        self.expected: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if distill.stage != "transfer":
            self._take_the_loss_in_the_head(student.lm_head)
        else:
            layers = linear_layers(student.config)
            self.teacher_tap = AttentionTap({i: self.teacher.model.layers[i].self_attn for i in layers})
            self.student_tap: AttentionTap | None = None
        if distill.compile:
            torch._dynamo.config.optimize_ddp = False  # as `compile_layers` of train_lm
            # Layer by layer: layers of a kind share their code, which is then compiled once.
            # What splits a layer are hooks, which stand in the way of torch.compile.
            for layer in student.model.layers if self.get_tp_size() == 1 else []:
                if distill.stage == "transfer":
                    layer.self_attn.forward = torch.compile(layer.self_attn.forward, dynamic=False)
                else:
                    layer.compile(dynamic=False)
            if distill.stage != "transfer":
                for layer in self.teacher.model.layers:
                    layer.compile(dynamic=False)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of the Trainer, or one by the clock if there is a clock."""
        if self.clock is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.clock)
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the stage's mean loss of a batch of `TokenBlocks`."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        if self.distill.stage == "transfer":
            loss = self._transfer_loss(model, ids)
            return (loss, {"loss": loss}) if return_outputs else loss
        if self.distill.text_weight == 1:
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            return (loss, {"loss": loss}) if return_outputs else loss
        with torch.no_grad():
            states = self.teacher.model(input_ids=ids, use_cache=False).last_hidden_state
        self.expected = states, self.teacher.lm_head.weight, labels
        try:
            # The "logits" are the loss: the output layer is where the hidden states and the whole weight meet, inside
            # of what wraps the model for several GPUs and for mixed precision.
            loss = model(input_ids=ids, use_cache=False).logits
        finally:
            self.expected = None
        return (loss, {"loss": loss}) if return_outputs else loss

    def _take_the_loss_in_the_head(self, head: nn.Linear) -> None:
        """Let the output layer return the stage's loss, a scalar, while `expected` is set."""
        plain = head.forward
        settings = self.distill.temperature, self.distill.text_weight, self.distill.compile

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            if self.expected is None:
                return plain(hidden_states)
            states, weight, labels = self.expected
            own = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight  # split by tokens
            return logits_loss(hidden_states, own, states, weight, labels, *settings)

        head.forward = forward

    def _transfer_loss(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.teacher(input_ids=ids, use_cache=False, logits_to_keep=1)
        if self.student_tap is None:
            # Not earlier: hooks run in the order in which they were added, and FSDP2's, which gathers the weights for
            # the backward pass, must see the outputs before they are detached.
            attention = self.accelerator.unwrap_model(model).model.layers
            self.student_tap = AttentionTap({i: attention[i].self_attn for i in self.teacher_tap.outputs})
        self.student_tap.replace = self.teacher_tap.inputs
        try:
            # Through the whole model, so that what wraps it (several GPUs, mixed precision) does its work; each
            # attention module gets the inputs of the teacher's, and not those of the layers before it.
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            self.student_tap.replace = None
        losses = [
            relative_error(output, self.teacher_tap.outputs[i]) for i, output in self.student_tap.outputs.items()
        ]
        return torch.stack(losses).mean()


def linear_layers(student: ReBasedConfig) -> list[int]:
    """Return the numbers of the layers that have linear attention.

    Raises:
        ConversionError: no layer has it.
    """
    layers = [i for i, layer_type in enumerate(student.layer_types) if layer_type in LINEAR_LAYER_TYPES]
    if not layers:
        raise ConversionError("--student has no linear layers, so there is nothing to transfer.")
    return layers


def without_mlps(student: ReBasedForCausalLM) -> ReBasedForCausalLM:
    """Return a model that shares the student's parameters and has no MLPs.

    In stage "transfer" each attention module gets the teacher's inputs, so the student's MLPs have no effect.
    """
    config = copy.deepcopy(student.config)
    config.mlp_type = "none"
    model = ReBasedForCausalLM(config)
    model.load_state_dict(student.state_dict(keep_vars=True), strict=False, assign=True)
    model.tie_weights()
    # What FSDP2 shards by itself: modules whose outputs the loss is of. Those of whole layers have no part in it.
    model._no_split_modules = sorted(
        {type(layer.self_attn).__name__ for layer in model.model.layers if not layer.is_conv}
    )
    return model


def freeze_all_but_transferred(student: ReBasedForCausalLM) -> None:
    """Freeze everything but the queries, keys, their normalisation and the gates of linear layers."""
    student.requires_grad_(False)
    for i in linear_layers(student.config):
        for name, parameter in student.model.layers[i].self_attn.named_parameters():
            parameter.requires_grad_(name.startswith(TRANSFERRED))
