import itertools
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM, configuration_rebased
from modeling_rebased.configuration_rebased import (
    LAYER_TYPES,
    RECURRENT_LAYER_TYPES,
    SOFTMAX_LAYER_TYPES,
    _check_code,
    n_features,
)


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
    assert config.is_purely_recurrent == (layer_type not in SOFTMAX_LAYER_TYPES)


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
        ({"decay": "gate", "kernel": "based"}, ["decay='gate'", "(1.0, 1.0, 0.5)"]),
        ({"decay": "constant"}, ["decay"]),
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


SOFTMAX = ["full_attention"] * 12
ROPE = {"position_embedding_type": "rope"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({field: 0}, f"`{field}` must be at least 1, but got 0.")
            for field in (
                "vocab_size",
                "hidden_size",
                "num_attention_heads",
                "num_key_value_heads",
                "conv_kernel_size",
            )
        ),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, but got 0."),
        ({"max_position_embeddings": 0}, "`max_position_embeddings` must be at least 1, but got 0."),
        ({"vocab_size": 10, "pad_token_id": 10}, "`pad_token_id` (10) must be less than `vocab_size` (10)."),
        *(
            ({field: 0.0}, f"`{field}` must be positive, but got 0.0.")
            for field in ("qk_norm_eps", "attention_eps", "norm_eps")
        ),
        *(
            ({field: value}, f"`{field}` must be at least 0 and less than 1, but got {value}.")
            for field in ("embedding_dropout", "residual_dropout")
            for value in (1, -0.1)
        ),
        ({"initializer_range": -0.1}, "`initializer_range` must not be negative, but got -0.1."),
        (
            {"num_key_value_heads": 5},
            "`num_attention_heads` (12) must be a multiple of `num_key_value_heads` (5).",
        ),
        (
            {"hidden_size": 8},
            "`head_dim` must be 1 to 256, but it is 0 (`hidden_size`=8, `num_attention_heads`=12).",
        ),
        (
            {"head_dim": 257},
            "`head_dim` must be 1 to 256, but it is 257 (`hidden_size`=768, `num_attention_heads`=12).",
        ),
        ({"feature_dim": 0}, "`feature_dim` must be 1 to 128, but got 0."),
        ({"feature_dim": 129}, "`feature_dim` must be 1 to 128, but got 129."),
        *(
            (
                {"kernel_coefficients": list(c)},
                "`kernel_coefficients` must be (c0, c1, c2) of a polynomial that is never negative and not zero: "
                f"c0 >= 0, c2 >= 0 and c1^2 <= 4 c0 c2, but got {c}.",
            )
            for c in (
                (0.0, 0.0, 0.0),
                (1.0, 1.0),
                (1.0, 0.0, -1.0),
                (-1.0, 0.0, 1.0),
                (-1.0, 0.0, -1.0),
                (1.0, 2.1, 1.0),
                (1.0, -2.1, 1.0),
                (0.0, 1.0, 0.0),
            )
        ),
        (
            {"qk_norm_shared": True, "num_key_value_heads": 4},
            "`qk_norm_shared=True` with `qk_norm_scope='all_heads'` needs as many `num_key_value_heads` (4) as "
            "`num_attention_heads` (12): queries and keys have different sizes.",
        ),
        (
            {"conv_intermediate_size": 64},
            "`conv_intermediate_size=64` needs `conv_type='gated'`, but that is 'residual'.",
        ),
        (
            {"conv_type": "gated", "conv_intermediate_size": 0},
            "`conv_intermediate_size` must be at least 1, but got 0.",
        ),
        (
            {"mlp_type": "swiglu", "intermediate_size": 0},
            "`intermediate_size` must be at least 1 for `mlp_type='swiglu'`, but got 0.",
        ),
        (
            {"hidden_act": "softmax"},
            "`hidden_act` must be an activation of transformers for `mlp_type='gelu'`, one of "
            f"{sorted(ACT2FN)}, but got 'softmax'.",
        ),
        *(
            (
                {"layer_types": [*layers, "full_attention"] * (12 // (len(layers) + 1)), "sliding_window": window},
                f"`sliding_window` must be at least 2 where `layer_types` has {sorted(layers)}, but got {window}.",
            )
            for layers, window in ((["sliding_attention"], None), (["sliding_attention", "hybrid_sliding"], 1))
        ),
        (
            {**ROPE, "layer_types": SOFTMAX, "head_dim": 5},
            "`position_embedding_type='rope'` needs an even `head_dim` in softmax layers, but it is 5.",
        ),
        (
            {**ROPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "`rope_parameters` must be one flat set of parameters without a `partial_rotary_factor`, but they are "
            "{'rope_type': 'default', 'rope_theta': 10000.0, 'partial_rotary_factor': 0.5}.",
        ),
        (
            {**ROPE, "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "`rope_parameters` must have a `rope_type` that transformers knows, one of "
            f"{sorted({'default', *ROPE_INIT_FUNCTIONS})}, but it is 'spiral'.",
        ),
        (
            {"rope_linear_attention": True},
            "`rope_linear_attention=True` needs `position_embedding_type='rope'`, but that is 'none'.",
        ),
        (
            {**ROPE, "rope_linear_attention": True, "feature_dim": 5},
            "`rope_linear_attention=True` needs an even `feature_dim`, but it is 5.",
        ),
        (
            {
                **ROPE,
                "layer_types": ["linear_attention"] * 12,
                "rope_linear_attention": True,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            },
            "`rope_linear_attention=True` with `rope_parameters` of type 'linear' needs `feature_dim` (16) to be "
            "`head_dim` (64); only the 'default' type serves two sizes.",
        ),
        (
            {"layer_types": ["rwkv", "conv", "a"] * 4},
            f"`layer_types` must be of {LAYER_TYPES}, but holds ['a', 'rwkv'].",
        ),
        (
            {"layer_types": ["conv"]},
            "`layer_types` must have one entry for each of `num_hidden_layers`=12, but has 1.",
        ),
    ],
    ids=lambda x: str(x)[:60],
)
def test_refusals_say_what_was_given_and_what_is_allowed(fields, message):
    with pytest.raises(StrictDataclassError) as info:
        ReBasedConfig(**fields)
    assert str(info.value).rstrip().endswith(message)


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(
            ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "conv_kernel_size"), 1
        ),
        {"num_hidden_layers": 1, "max_position_embeddings": 1, "feature_dim": 1, "intermediate_size": 1},
        {"vocab_size": 10, "pad_token_id": 9},
        {"embedding_dropout": 0, "residual_dropout": 0.99, "initializer_range": 0.0, "feature_dim": 128},
        {"head_dim": 256},
        {"head_dim": 1},
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        {"kernel_coefficients": [1.0, 2.0, 1.0]},
        {"kernel_coefficients": [1.0, -2.0, 1.0]},
        {"kernel_coefficients": [0.0, 0.0, 0.1]},
        {"kernel_coefficients": [0.1, 0.0, 0.0]},
        {"qk_norm_shared": True},
        {"qk_norm_shared": True, "num_key_value_heads": 4, "qk_norm_scope": "head"},
        {"qk_norm_shared": True, "num_key_value_heads": 4, "use_gamma": False, "use_beta": False},
        {"conv_type": "gated", "conv_intermediate_size": 1},
        {"mlp_type": "none", "intermediate_size": 0, "hidden_act": "softmax"},
        {"layer_types": ["sliding_attention"] * 12, "sliding_window": 2},
        {"layer_types": SOFTMAX, "sliding_window": None},
        {"layer_types": SOFTMAX, "head_dim": 5},
        {**ROPE, "layer_types": ["linear_attention"] * 12, "head_dim": 5},
        {**ROPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        {**ROPE, "rope_linear_attention": True, "feature_dim": 2},
        {
            **ROPE,
            "rope_linear_attention": True,
            "feature_dim": 64,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ],
    ids=str,
)
def test_what_can_just_work(fields):
    ReBasedConfig(**fields)


def test_an_unknown_field_is_named_in_a_warning(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(configuration_rebased.logger, "warning", said.append)
    ReBasedConfig(featur_dim=8, num_heads=4, num_labels=3, torch_dtype="bfloat16", output_attentions=True)
    assert said == ["ReBasedConfig has no field 'featur_dim', 'num_heads'; the model ignores it."]
    ReBasedConfig(position_embedding_type="rope", rope_theta=5.0)  # which the library puts into `rope_parameters`
    options = {"auto_map": {}, "quantization_config": {}, "attn_implementation": "eager", "_commit_hash": "0"}
    ReBasedConfig(**options).save_pretrained(tmp_path)
    ReBasedConfig(**ReBasedConfig.from_pretrained(tmp_path, num_labels=3).to_dict())
    assert len(said) == 1


def test_fields_that_follow_from_others():
    assert ReBasedConfig(num_hidden_layers=5).layer_types == [
        "conv", "linear_attention", "conv", "linear_attention", "conv",
    ]  # fmt: skip
    config = ReBasedConfig(hidden_size=100, num_attention_heads=8)
    assert (config.num_key_value_heads, config.head_dim) == (8, 12)
    assert (config.intermediate_size, config.hidden_act, config.mlp_bias) == (400, "gelu", True)
    # 8/3 of the hidden size, up to a multiple of 64
    for hidden_size, size in ((24, 64), (25, 128), (768, 2048), (769, 2112)):
        config = ReBasedConfig(hidden_size=hidden_size, mlp_type="swiglu", num_attention_heads=1, head_dim=8)
        assert (config.intermediate_size, config.hidden_act, config.mlp_bias) == (size, "silu", False)
    given = {"intermediate_size": 7, "hidden_act": "relu", "mlp_bias": True}
    for fields in ({"mlp_type": "swiglu", **given}, {**given, "mlp_bias": False}):
        config = ReBasedConfig(**fields)
        assert (config.intermediate_size, config.hidden_act, config.mlp_bias) == (7, "relu", fields["mlp_bias"])
    config = ReBasedConfig(mlp_type="none")
    assert config.intermediate_size is config.hidden_act is config.mlp_bias is None
    assert ReBasedConfig(conv_type="gated", conv_intermediate_size=5).conv_intermediate_size == 5
    for kernel, by_default in (("rebased", True), ("based", False)):
        for flag in ("normalize", "use_gamma", "use_beta"):
            assert getattr(ReBasedConfig(kernel=kernel), flag) is by_default
            for value in (True, False):
                assert getattr(ReBasedConfig(kernel=kernel, **{flag: value}), flag) is value
    assert ReBasedConfig(kernel_coefficients=[1, 0, 2], kernel="based").coefficients == (1.0, 0.0, 2.0)
    assert all(type(c) is float for c in ReBasedConfig(kernel_coefficients=[1, 0, 2]).coefficients)
    assert ReBasedConfig().rope_parameters is None
    assert ReBasedConfig(**ROPE).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_tensor_parallel_plan():
    """Heads are split where each can be worked on alone."""
    whole, split = ("colwise_gather_output", "rowwise_split_input"), ("colwise", "rowwise")
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def plan(**fields):
        found = ReBasedConfig(num_hidden_layers=1, **fields).base_model_tp_plan
        return {name.removeprefix("layers.*."): style for name, style in found.items() if name != "embed_tokens"}

    def attention(styles):
        return {**dict.fromkeys(projections, styles[0]), "self_attn.o_proj": styles[1]}

    mlp = {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
    linear, none = {"layer_types": ["linear_attention"]}, {"normalize": False, "use_gamma": False, "use_beta": False}
    assert plan(**linear) == {**attention(whole), **mlp}
    assert plan(**linear, qk_norm_scope="head") == plan(**linear, **none) == {**attention(split), **mlp}
    for flag in none:
        assert plan(**linear, **{**none, flag: True}) == {**attention(whole), **mlp}
    assert plan(**linear, **none, mlp_type="none") == attention(split)
    assert plan(**linear, **none, mlp_type="swiglu") == {**attention(split), "mlp.gate_proj": "colwise", **mlp}
    assert plan(layer_types=SOFTMAX[:1], **none, softmax_qk_norm=True) == {**attention(whole), **mlp}
    window = dict.fromkeys(("self_attn.window_q_proj", "self_attn.window_k_proj"), whole[0])
    assert plan(layer_types=["hybrid_sliding"], **none) == {**attention(whole), **window, **mlp}
    conv = {"layer_types": ["conv"]}
    assert plan(**conv) == {"conv.proj": whole[0], **mlp}
    assert plan(**conv, conv_type="gated") == {"conv.in_proj": whole[0], "conv.out_proj": whole[1], **mlp}


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


def test_code_files_that_are_missing_are_named(tmp_path):
    (tmp_path / "a_rebased.py").write_text("import torch\nfrom .b_rebased import x\n    from .c import y\n")
    (tmp_path / "b_rebased.py").write_text("from torch import nn  # naïve\n", encoding="utf-8")
    (tmp_path / "0_rebased.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other.py").write_text("from .missing import x\n")
    _check_code(tmp_path)
    (tmp_path / "b_rebased.py").write_text("from .missing_rebased import x\n")
    message = (
        f"The folder {str(tmp_path)!r} lacks the code file missing_rebased.py, which b_rebased.py imports. Copy or "
        "download the whole folder again, with all of its *.py files (`cp -rL` also copies what links point to). Or "
        "install the package and `import modeling_rebased`, which needs no code in the folder."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        _check_code(tmp_path)
