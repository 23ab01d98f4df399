"""transformers' own ways of serving: continuous batching."""

import pytest
from transformers import GenerationConfig

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM


def tiny(layer_types: list[str]) -> ReBasedForCausalLM:
    config = ReBasedConfig(
        vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, layer_types=layer_types
    )
    return ReBasedForCausalLM(config).eval()


@pytest.mark.parametrize("layer_types", [["conv", "linear_attention"], ["full_attention", "hybrid_sliding"]])
def test_continuous_batching_is_refused_at_once(layer_types):
    """`generate_batch` names the layers that it would have to serve, and points to vLLM."""
    model = tiny(layer_types)
    generation_config = GenerationConfig(max_new_tokens=2, eos_token_id=1)
    with pytest.raises(ValueError, match="vllm serve") as error:
        model.generate_batch([[1, 2, 3]], generation_config=generation_config)
    assert all(repr(layer_type) in str(error.value) for layer_type in layer_types)
    with pytest.raises(ValueError, match="vllm serve"):
        model.init_continuous_batching(generation_config=generation_config)
