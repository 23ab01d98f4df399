"""Which layer keeps its state where, and what a request takes. Needs no vLLM."""

import csv

import pytest
import torch

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.configuration import config_path
from modeling_rebased.serving.plan import softmax_bytes_per_token, state_bytes, state_pages, state_shapes
from tests.serving.vllm_testing import ENGLISH


def config_of(layer_types: list[str], **fields) -> ReBasedConfig:
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 4, "head_dim": 5, "feature_dim": 3}
    return ReBasedConfig(**sizes, num_hidden_layers=len(layer_types), layer_types=layer_types, **fields)


@pytest.mark.parametrize(
    "layer_types",
    [
        ["conv", "linear_attention"] * 3,
        ["conv", "conv", "linear_attention", "conv", "hybrid_sliding", "full_attention"],
        ["conv", "full_attention", "conv"],
        ["linear_attention", "sliding_attention"],
        ["full_attention"],
    ],
)
def test_every_recurrent_layer_has_a_place_of_its_own(layer_types):
    config = config_of(layer_types)
    pages = state_pages(config)
    assert set(pages.linear) == {i for i, t in enumerate(layer_types) if t in ("linear_attention", "hybrid_sliding")}
    assert set(pages.conv) == {i for i, t in enumerate(layer_types) if t == "conv"}
    assert len(set(pages.linear.values())) == len(pages.linear)
    assert len(set(pages.conv.values())) == len(pages.conv)
    assert all(page < len(pages.owners) and place < pages.conv_slots for page, place in pages.conv.values())
    assert len(state_shapes(config)) == pages.conv_slots + bool(pages.linear)


def test_bytes_are_those_of_the_states_of_transformers():
    """The linear states of transformers' own cache, and all inputs of its convolutions but the newest."""
    config = config_of(["conv", "linear_attention"] * 2, kernel="based", num_key_value_heads=2)
    cache = ReBasedForCausalLM(config)(torch.tensor([[1, 2, 3, 4]]), use_cache=True).past_key_values
    linear = sum(cache.layers[i].recurrent_states[0].nbytes for i in (1, 3))
    conv = sum(cache.layers[i].conv_states[0][..., 1:].nbytes for i in (0, 2))
    assert state_bytes(config, torch.float32) == linear + conv
    assert state_bytes(config, torch.bfloat16) == linear + conv // 2
    assert state_bytes(config, torch.float32, tensor_parallel=2) * 2 == linear + conv


def test_bytes_are_those_that_vllm_reported():
    """The arithmetic gives what the measurement in eval/results found, up to the rounding of vLLM's log."""
    with (ENGLISH.parents[1] / "eval" / "results" / "serving" / "memory.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["prefix_caching"] == "False"]
    for row in rows:
        config = ReBasedConfig.from_pretrained(config_path(row["model"]))
        if row["model"] == "150m-rebased":
            assert int(row["bytes_per_request"]) == pytest.approx(state_bytes(config), rel=2e-3)
        elif (
            row["model"] == "150m-softmax" and row["context_tokens"] != "512"
        ):  # shorter ones do not fill their blocks
            tokens = int(row["context_tokens"])
            assert int(row["bytes_per_request"]) == pytest.approx(tokens * softmax_bytes_per_token(config), rel=0.02)
