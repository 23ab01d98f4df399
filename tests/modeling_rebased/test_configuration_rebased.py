import itertools
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.configuration_rebased import LAYER_TYPES, RECURRENT_LAYER_TYPES, n_features


CONFIGURATIONS = Path(__file__).parents[2] / "configuration"


def test_defaults():
    config = ReBasedConfig()
    assert config.layer_types == ["conv", "linear_attention"] * 6
    assert config.head_dim == 64
    assert config.coefficients == (0.0, 0.0, 1.0)
    assert config.normalize and config.use_gamma and config.use_beta
    assert ReBasedConfig(kernel="based").coefficients == (1.0, 1.0, 0.5)
    assert not ReBasedConfig(kernel="based").normalize
    assert config.conv_type == "residual" and config.conv_intermediate_size is None
    assert ReBasedConfig(conv_type="gated").conv_intermediate_size == 2 * 768


@pytest.mark.parametrize(
    ("coefficients", "rows"),
    [((0, 0, 1), 15), ((1, 1, 0.5), 21), ((0.5, 0, 1), 16), ((0.25, 1.0, 1.0), 21), ((2.0, 0, 0), 1)],
)
def test_rows_of_a_state(coefficients, rows):
    """A linear layer stores F(F+1)/2 quadratic features, F linear ones and a constant, where its kernel has them."""
    config = ReBasedConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        feature_dim=5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        kernel_coefficients=coefficients,
    )
    assert config.n_features == n_features(5, coefficients) == rows
    cache = ReBasedForCausalLM(config)(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    assert cache.layers[0].recurrent_states[0].shape == (1, 2, rows, 9)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_recurrent_layers_are_those_with_a_recurrent_cache(layer_type):
    config = ReBasedConfig(num_hidden_layers=1, layer_types=[layer_type])
    layer = DynamicCache(config=config).layers[0]
    assert config.is_recurrent == isinstance(layer, LinearAttentionCacheLayerMixin)
    assert config.is_recurrent == (layer_type in RECURRENT_LAYER_TYPES)


@pytest.mark.parametrize("mlp_type", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("conv_type", ["residual", "gated"])
@pytest.mark.parametrize("layer_types", [types for n in (1, 2) for types in itertools.combinations(LAYER_TYPES, n)])
def test_tensor_parallel_plan_names_the_linear_maps_of_the_layers(layer_types, conv_type, mlp_type):
    """Each entry matches a module, as transformers' own test asks, and each linear map of a layer has an entry."""
    config = ReBasedConfig(
        num_hidden_layers=len(layer_types), layer_types=list(layer_types), conv_type=conv_type, mlp_type=mlp_type
    )
    plan = set(config.base_model_tp_plan) - {"embed_tokens"}  # which transformers 5.17 adds for a tied head
    with torch.device("meta"):
        model = ReBasedForCausalLM(config)
    modules = {re.sub(r"\d+", "*", name): module for name, module in model.named_modules()}
    maps = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    assert {f"model.{name}" for name in plan} == maps
    assert set(model.tp_plan) <= set(modules)


def test_every_field_is_documented():
    fields = set(ReBasedConfig.__annotations__)
    documented = set(re.findall(r"^ +(\w+) \(`", ReBasedConfig.__doc__, re.MULTILINE))
    assert documented == fields - {"keys_to_ignore_at_inference", "base_model_pp_plan"}


def test_round_trip(tmp_path):
    config = ReBasedConfig(num_hidden_layers=3, kernel_coefficients=[0, 0, 2.0], position_embedding_type="rope")
    config.save_pretrained(tmp_path)
    assert ReBasedConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_key_value_heads": 5}, ["num_attention_heads", "num_key_value_heads"]),
        ({"hidden_size": 8}, ["head_dim", "hidden_size", "num_attention_heads"]),
        ({"layer_types": ["conv"]}, ["layer_types", "num_hidden_layers"]),
        ({"layer_types": ["rwkv"] * 12}, ["layer_types", "rwkv"]),
        ({"layer_types": ["sliding_attention"] * 12, "sliding_window": None}, ["sliding_window", "layer_types"]),
        ({"rope_linear_attention": True}, ["rope_linear_attention", "position_embedding_type"]),
        (
            {"rope_linear_attention": True, "position_embedding_type": "rope", "feature_dim": 5},
            ["rope_linear_attention", "feature_dim"],
        ),
        (
            {"layer_types": ["full_attention"] * 12, "position_embedding_type": "rope", "head_dim": 5},
            ["head_dim"],
        ),
        (
            {"position_embedding_type": "rope", "rope_parameters": {"partial_rotary_factor": 0.5}},
            ["rope_parameters", "partial_rotary_factor"],
        ),
        ({"qk_norm_shared": True, "num_key_value_heads": 4}, ["qk_norm_shared", "qk_norm_scope"]),
        ({"conv_intermediate_size": 64}, ["conv_intermediate_size=64", "conv_type", "residual"]),
        ({"conv_type": "gated", "conv_intermediate_size": 0}, ["conv_intermediate_size"]),
        ({"conv_type": "hyena"}, ["conv_type"]),
        ({"kernel_coefficients": [0, 1, 0]}, ["kernel_coefficients"]),
        ({"kernel_coefficients": [1, 1]}, ["kernel_coefficients"]),
        ({"feature_dim": 129}, ["feature_dim"]),
        ({"attention_eps": 0.0}, ["attention_eps"]),
        ({"embedding_dropout": 1.0}, ["embedding_dropout"]),
        ({"kernel": "softmax"}, ["kernel"]),
        ({"mlp_type": "moe"}, ["mlp_type"]),
        ({"vocab_size": 0}, ["vocab_size"]),
        ({"vocab_size": 10, "pad_token_id": 10}, ["pad_token_id", "vocab_size"]),
        ({"mlp_type": "swiglu", "intermediate_size": 0}, ["intermediate_size", "mlp_type"]),
        ({"hidden_act": "softmax"}, ["hidden_act", "mlp_type"]),
        (
            {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            ["rope_parameters", "rope_type", "spiral"],
        ),
        (
            {
                "layer_types": ["linear_attention"] * 12,
                "position_embedding_type": "rope",
                "rope_linear_attention": True,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            },
            ["rope_linear_attention", "rope_parameters", "feature_dim", "head_dim"],
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(fields, named):
    with pytest.raises(StrictDataclassError) as info:
        ReBasedConfig(**fields)
    for name in named:
        assert name in str(info.value)


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in CONFIGURATIONS.glob("*/config.json")))
def test_ready_configurations_load(folder):
    config = AutoConfig.from_pretrained(CONFIGURATIONS / folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, ReBasedForCausalLM)
    parameters = model.num_parameters()
    sizes = {"150m": 150e6, "360m": 360e6, "1.3b": 1.3e9}
    for prefix, size in sizes.items():
        if folder.startswith(prefix):
            assert abs(parameters / size - 1) < 0.03


def test_the_150m_twins_are_of_equal_size():
    sizes = []
    for folder in sorted(CONFIGURATIONS.glob("150m-*")):
        with torch.device("meta"):
            sizes.append(ReBasedForCausalLM(AutoConfig.from_pretrained(folder)).num_parameters())
    assert len(sizes) == 4
    assert max(sizes) / min(sizes) < 1.005


def test_mqar_configurations_are_the_papers():
    for hidden_size, head_dim in ((64, 5), (128, 10), (256, 21), (512, 42)):
        config = AutoConfig.from_pretrained(CONFIGURATIONS / f"mqar-d{hidden_size}")
        assert (config.hidden_size, config.head_dim, config.feature_dim) == (hidden_size, head_dim, 16)
        assert config.layer_types == ["conv", "linear_attention"]
        assert config.mlp_type == "none" and config.position_embedding_type == "learned"


def test_rotary_parameters_are_checked_as_the_library_does_where_softmax_layers_rotate():
    parameters = {"rope_type": "linear", "rope_theta": 10000.0}  # without its factor
    fields = {"num_hidden_layers": 1, "position_embedding_type": "rope", "rope_parameters": parameters}
    with pytest.raises((KeyError, StrictDataclassError), match="factor"):
        ReBasedConfig(layer_types=["full_attention"], **fields)
    ReBasedConfig(layer_types=["linear_attention"], **fields)
