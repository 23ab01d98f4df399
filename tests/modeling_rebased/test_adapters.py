"""Adapters, and hooks on the short convolutions, whose weights the model otherwise reads without a call."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from tests.modeling_rebased.cases import MODELS, make_ids, make_model


ADAPTERS = {
    "LoKr": LoKrConfig(target_modules=["conv.conv"], r=2, init_weights=False),
    "LoHa": LoHaConfig(target_modules=["conv.conv"], r=2, init_weights=False),
    "LoRA": LoraConfig(target_modules=["conv.conv"], r=96, init_lora_weights=False),  # a multiple of the groups
    "copy": LoraConfig(target_modules=["q_proj"], modules_to_save=["conv.conv"]),
}
MERGED = ["LoKr", "LoHa", "copy"]  # PEFT does not merge LoRA of a convolution in groups


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def adapt(model, adapter):
    torch.manual_seed(0)
    model = get_peft_model(model, ADAPTERS[adapter]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("adapter", MERGED)
@pytest.mark.parametrize("name", ["paper", "based"])
def test_an_adapter_of_the_convolution_acts_as_it_does_merged(name, adapter):
    base, ids = make_model(name), make_ids()
    model = adapt(copy.deepcopy(base), adapter)
    with torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload().eval()
        assert all(type(m.conv) is nn.Conv1d for m in merged.modules() if hasattr(m, "convolve"))
        expected = merged(ids).logits
        assert error(base(ids).logits, expected) > 0.05
        assert error(model(input_ids=ids).logits, expected) < 1e-5
        mask = torch.ones_like(ids)
        mask[0, :4] = mask[1, 9:11] = 0
        padded = merged(ids, attention_mask=mask).logits
        assert error(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()]) < 1e-5
        cache = DynamicCache(config=base.config)
        pieces = [ids[:, :9], *ids[:, 9:].split(1, dim=1)]
        logits = torch.cat([model(input_ids=piece, past_key_values=cache).logits for piece in pieces], 1)
        assert error(logits, expected) < 1e-5
        with model.disable_adapter():
            assert error(model(input_ids=ids).logits, base(ids).logits) < 1e-5


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_of_the_convolution_over_packed_sequences(adapter):
    """Each sequence by itself is what packing has to give."""
    model = adapt(make_model("paper"), adapter)
    ids = make_ids(1)
    positions = torch.tensor([[*range(7), *range(1), *range(2), *range(13)]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions).logits
        alone = torch.cat([model(input_ids=part).logits for part in ids.split([7, 1, 2, 13], dim=1)], 1)
    assert error(packed, alone) < 1e-5


@pytest.mark.parametrize("adapter", MERGED)
def test_an_adapter_of_the_convolution_is_trained(adapter):
    """A small step against its gradient lowers the merged model's loss by the step times the gradient's square."""
    model, ids = adapt(make_model("paper"), adapter).double(), make_ids()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and ".conv." in n}
    assert parameters

    def loss_of(logits):  # in float64, unlike the model's own
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss = loss_of(model(input_ids=ids).logits)
    loss.backward()
    slope = sum(p.grad.square().sum() for p in parameters.values())
    assert all(p.grad.norm() > 0 for p in parameters.values())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= 1e-7 * parameter.grad
        merged = model.merge_and_unload()
        assert (loss - loss_of(merged(ids).logits)).item() == pytest.approx(1e-7 * slope.item(), rel=1e-3)


def test_hooks_of_the_convolution_run():
    model, ids = make_model("paper"), make_ids()
    expected, conv = model(ids).logits, model.model.layers[0].conv.conv
    inputs, gradients = [], []
    with conv.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        assert error(model(ids).logits, expected) < 1e-5
    assert inputs[0].shape == (2, 48, 25)  # two zeros stand before the 23 tokens
    with conv.register_full_backward_hook(lambda module, grad_in, grad_out: gradients.append(grad_out[0])):
        model(ids).logits.sum().backward()
    assert gradients[0].shape == (2, 48, 23)
    with conv.register_forward_hook(lambda module, args, out: torch.zeros_like(out)):
        changed = model(ids).logits
    nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    assert error(changed, model(ids).logits) < 1e-5 < error(changed, expected)


def test_a_parametrized_convolution():
    model, ids = make_model("paper"), make_ids()
    expected = model(ids).logits
    for module in model.modules():
        if hasattr(module, "convolve"):
            torch.nn.utils.parametrizations.weight_norm(module.conv)
    assert error(model(ids).logits, expected) < 1e-5


def documented_targets():
    """The names in the table of docs/training.md's section on LoRA."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("\n## LoRA\n")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ") and "---" not in line]
    return [name for row in rows for name in re.findall(r"`([\w.]+proj)`", row)]


def test_the_documented_targets_are_all_linear_maps():
    targets = documented_targets()
    assert len(targets) == len(set(targets))
    found = set()
    for name in MODELS:
        model = make_model(name)
        linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        endings = {n: [t for t in targets if n.endswith(f".{t}")] for n in linear}
        assert all(len(each) == 1 for each in endings.values()), endings
        found |= {each[0] for each in endings.values()}
        # PEFT takes the whole list, and finds with it what "all-linear" finds.
        for wanted in (targets, "all-linear"):
            adapted = get_peft_model(make_model(name), LoraConfig(task_type="CAUSAL_LM", target_modules=wanted))
            assert linear == {
                n.removeprefix("base_model.model.").split(".lora_A")[0]
                for n, _ in adapted.named_parameters()
                if ".lora_A" in n
            }
    assert found == set(targets)


def test_lora_without_targets_is_an_error():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(make_model("paper"), LoraConfig(task_type="CAUSAL_LM"))
