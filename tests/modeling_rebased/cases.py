"""Small models of every kind of layer, for the tests beside this file."""

import torch

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM


BASE = {
    "vocab_size": 50,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "feature_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "sliding_window": 5,
}
MODELS = {
    "paper": {"num_key_value_heads": 4, "num_hidden_layers": 4},
    "mqar": {"position_embedding_type": "learned", "mlp_type": "none"},
    "pure": {"layer_types": ["linear_attention"] * 2},
    "conv": {"layer_types": ["conv"] * 2, "position_embedding_type": "learned"},
    "every_type": {
        "num_hidden_layers": 5,
        "layer_types": ["conv", "sliding_attention", "linear_attention", "full_attention", "hybrid_sliding"],
        "position_embedding_type": "rope",
        "rope_linear_attention": True,
        "mlp_type": "swiglu",
        "norm_type": "rmsnorm",
        "softmax_qk_norm": True,
        "decay": "gate",
    },
    "softmax_first": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "conv", "full_attention", "linear_attention"],
        "position_embedding_type": "learned",
        "qk_norm_scope": "head",
        "qk_norm_shared": True,
        "decay": "gate",
    },
    "based": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "linear_attention", "sliding_attention"],
        "kernel": "based",
        "position_embedding_type": "rope",
        "conv_type": "gated",
        "conv_bias": False,
        "mlp_type": "swiglu",
        "norm_type": "rmsnorm",
    },
    "hybrid": {"layer_types": ["hybrid_sliding"] * 2},
    "softmax": {"layer_types": ["full_attention"] * 2, "position_embedding_type": "rope"},
}
RECURRENT = [name for name in MODELS if name != "softmax"]


def make_config(name: str, **changes) -> ReBasedConfig:
    return ReBasedConfig(**{**BASE, **MODELS[name], **changes})


def make_model(name: str, **changes) -> ReBasedForCausalLM:
    """A model whose weights are large enough that a token out of place changes its logits."""
    torch.manual_seed(1)
    model = ReBasedForCausalLM(make_config(name, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
            if name.endswith("decay_proj.bias"):
                parameter.sub_(8.0)  # a quarter is gone after each token
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


# "hybrid_sliding" has linear attention and a softmax window in one layer.
SMALL = {
    "paper": {"num_hidden_layers": 2},
    "every_type": {"layer_types": ["conv", "hybrid_sliding", "full_attention"], "num_hidden_layers": 3},
}


def make_small_model(name: str, **changes) -> ReBasedForCausalLM:
    """The same with one layer of each kind, for tests that compile: every layer takes time."""
    return make_model(name, **{**SMALL.get(name, {}), **changes})


def make_ids(batch: int = 2, length: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    # 0 is the padding of some tests.
    return torch.randint(1, BASE["vocab_size"], (batch, length), generator=generator)
