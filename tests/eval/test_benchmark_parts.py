"""Where the time of `generate()` goes: with a tiny model on a CPU, every part is measured and every call is right."""

import pytest
import torch
from transformers import CompileConfig

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.eval import benchmark_parts
from modeling_rebased.eval.benchmark_parts import Generation


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ReBasedConfig(
        vocab_size=64,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        layer_types=["conv", "linear_attention"],
    )
    return ReBasedForCausalLM(config).eval()


@pytest.mark.parametrize("static", [False, True])
def test_parts_of_a_step(model, static, monkeypatch):
    options = {}
    if static:  # with a step that would be compiled, and is not
        monkeypatch.setattr(model, "get_compiled_call", lambda config: model.__call__)
        options = {"cache_implementation": "static", "compile_config": CompileConfig()}
        options["compile_config"]._compile_all_devices = True
    generate = Generation(model, 2, 8, 3, repeats=1, **options)
    first = generate(4)
    parts = generate.host_parts()
    names = ["preparing its inputs", "keeping its outputs", "processing logits", "stopping criteria"]
    assert {*names, "waiting for the GPU", "call of the model", "the loop itself", "in all"} == set(parts)
    assert sum(parts.values()) == pytest.approx(2 * parts["in all"])
    assert len(generate.without()) == 5
    torch.testing.assert_close(generate(4), first)  # what was patched is as before


def test_calls_of_changing_lengths(model):
    rows = []
    for keeps in (True, False):
        benchmark_parts.calls_table(rows, model, 1, keeps)
    lengths = [(128, 36), (128, 36), (64, 20)]
    expected = [(keeps, *length) for keeps in (True, False) for length in lengths]
    assert [(row["states_kept"], row["context"], row["new_tokens"]) for row in rows] == expected


def test_a_gpu_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="for GPUs"):
        benchmark_parts.main(["--output", str(tmp_path)])
