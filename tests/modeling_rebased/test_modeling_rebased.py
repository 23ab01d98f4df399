"""The model: its blocks as the authors define them, caches, padding, packing."""

import copy
import dataclasses
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_rebased import (
    ReBasedConfig,
    ReBasedForCausalLM,
    ReBasedForQuestionAnswering,
    ReBasedForSequenceClassification,
    ReBasedForTokenClassification,
    ReBasedModel,
)
from modeling_rebased import modeling_rebased as code
from modeling_rebased.cache_rebased import CACHE_NAME, CACHE_NAMES
from modeling_rebased.eager_rebased import naive_rebased_attention
from modeling_rebased.modeling_rebased import ReBasedLinearRotaryEmbedding, ReBasedQKNorm, ReBasedRotaryEmbedding
from tests.modeling_rebased.cases import MODELS, make_config, make_ids, make_model


LENGTH = 23


def assert_same_logits(actual, expected):
    """fp32 bar, as a relative Frobenius error: where (q.k)**2 is near zero single elements are less exact."""
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-5


def run_pieces(model, ids, sizes, cache, mask=None):
    outputs, start = [], 0
    for size in sizes:
        stop = start + size
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        outputs.append(model(ids[:, start:stop], past_key_values=cache, **options).logits)
        start = stop
    return torch.cat(outputs, dim=1)


def cache_bytes(cache):
    *layers, counter = cache.layers
    tensors = [
        x for layer in layers for states in (layer.conv_states, layer.recurrent_states) for x in states.values()
    ]
    tensors.append(counter.counts)
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


@torch.no_grad()
def test_the_authors_block_and_its_traps():
    """The MQAR model in plain PyTorch, from the paper's description."""
    config = ReBasedConfig(
        vocab_size=30,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=12,
        mlp_type="none",
        position_embedding_type="learned",
        max_position_embeddings=32,
    )
    assert config.head_dim == 5
    torch.manual_seed(0)
    model = ReBasedForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(0, 30, (2, 20))
    backbone = model.model
    conv_layer, attention_layer = backbone.layers

    x = backbone.embed_tokens.weight[ids] + backbone.embed_positions.weight[:20]

    def norm(module, x):
        return F.layer_norm(x, (64,), module.weight, module.bias, 1e-5)

    # BaseConv has a residual of its own.
    u = norm(conv_layer.input_layernorm, x)
    weight, bias = conv_layer.conv.conv.weight[:, 0], conv_layer.conv.conv.bias
    padded = F.pad(u, (0, 0, 2, 0))
    conv = sum(padded[:, i : i + 20] * weight[:, i] for i in range(3)) + bias
    mixed = conv * (u @ conv_layer.conv.proj.weight.T + conv_layer.conv.proj.bias) + u
    x = x + mixed
    # An identity MLP leaves x + norm(x), not x.
    x = x + norm(conv_layer.post_attention_layernorm, x)
    u = norm(attention_layer.input_layernorm, x)
    attention = attention_layer.self_attn
    assert attention.v_proj.weight.shape == (60, 64)
    # One LayerNorm over all heads for q, another for k.
    q = F.layer_norm(u @ attention.q_proj.weight.T, (192,), attention.q_norm.weight, attention.q_norm.bias, 1e-5)
    k = F.layer_norm(u @ attention.k_proj.weight.T, (192,), attention.k_norm.weight, attention.k_norm.bias, 1e-5)
    v = u @ attention.v_proj.weight.T
    o = naive_rebased_attention(q.view(2, 20, 12, 16), k.view(2, 20, 12, 16), v.view(2, 20, 12, 5))
    x = x + o.reshape(2, 20, 60) @ attention.o_proj.weight.T
    x = x + norm(attention_layer.post_attention_layernorm, x)
    logits = norm(backbone.norm, x) @ backbone.embed_tokens.weight.T

    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_the_gated_convolution(bias):
    """y = W_o (silu(conv(u_1)) * u_2): no residual of its own, and the first half of the input map is convolved."""
    model = make_model("conv", conv_type="gated", conv_intermediate_size=20, conv_kernel_size=4, conv_bias=bias)
    mixer = model.model.layers[0].conv
    assert mixer.in_proj.weight.shape == (40, 48) and (mixer.conv.bias is not None) == bias
    u = torch.randn(2, 9, 48)
    first, second = (u @ mixer.in_proj.weight.T + mixer.in_proj.bias).split(20, dim=-1)
    padded = F.pad(first, (0, 0, 3, 0))
    conv = sum(padded[:, i : i + 9] * mixer.conv.weight[:, 0, i] for i in range(4))
    conv = conv + mixer.conv.bias if bias else conv
    expected = (conv * conv.sigmoid() * second) @ mixer.out_proj.weight.T + mixer.out_proj.bias
    torch.testing.assert_close(mixer(u), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_convolution_rounds_once(dtype):
    """Products and sums of the taps are float32 whatever the weights' dtype, as in `F.conv1d`."""
    mixer = make_model("conv", conv_kernel_size=4).to(dtype).model.layers[0].conv
    x = torch.randn(2, 50, 48).to(dtype)
    exact = F.conv1d(
        F.pad(x.double().transpose(1, 2), (3, 0)), mixer.conv.weight.double(), mixer.conv.bias.double(), groups=48
    )
    actual = mixer.convolve(x, None, None, None)
    assert actual.dtype == dtype
    # Sums in float32 may fall on the other side of a tie between two neighbours, in a few of 4,800 numbers.
    assert (actual != exact.transpose(1, 2).to(dtype)).float().mean() < 0.005


@torch.no_grad()
def test_softmax_layers_normalise_each_head():
    """Queries and keys have a root mean square of 1 in every head before the rotation, times the shared gains."""
    model, ids = (
        make_model(
            "every_type", attn_implementation="eager", position_embedding_type="none", rope_linear_attention=False
        ),
        make_ids(1),
    )
    outputs = {}
    for name, module in model.model.layers[3].self_attn.named_children():
        module.register_forward_hook(lambda *args, name=name: outputs.update({name: args[-1]}))
    weights = model(ids, output_attentions=True).attentions[1]
    attention = model.model.layers[3].self_attn
    q, k = (outputs[f"{x}_proj"].unflatten(-1, (-1, 12)) for x in "qk")
    q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in (q, k))
    q, k = q * attention.q_norm.weight, (k * attention.k_norm.weight).repeat_interleave(2, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 12**-0.5
    expected = scores.masked_fill(torch.ones(23, 23).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    hybrid = model.model.layers[4].self_attn
    assert hybrid.window_q_norm.weight.shape == (12,) and hybrid.q_norm.weight.shape == (32,)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("use_gamma", [True, False])
@pytest.mark.parametrize("use_beta", [True, False])
def test_every_normalisation(normalize, use_gamma, use_beta):
    norm = ReBasedQKNorm(6, ReBasedConfig(normalize=normalize, use_gamma=use_gamma, use_beta=use_beta))
    x = torch.randn(3, 6)
    expected = x
    if normalize:
        expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert len(list(norm.parameters())) == use_gamma + use_beta
    with torch.no_grad():
        if use_gamma:
            norm.weight.copy_(torch.arange(6.0))
            expected = expected * norm.weight
        if use_beta:
            norm.bias.copy_(torch.arange(6.0))
            expected = expected + norm.bias
        torch.testing.assert_close(norm(x), expected)


def test_head_scope_normalises_each_head():
    model = make_model("pure", qk_norm_scope="head")
    attention = model.model.layers[0].self_attn
    assert attention.q_norm.weight.shape == (8,)
    shared = make_model("pure", qk_norm_scope="head", qk_norm_shared=True).model.layers[0].self_attn
    assert shared.k_norm is None


def test_initial_weights():
    torch.manual_seed(0)
    config = ReBasedConfig(hidden_size=256, vocab_size=500, num_hidden_layers=8)
    model = ReBasedForCausalLM(config)
    layer = model.model.layers[1]
    assert abs(layer.self_attn.q_proj.weight.std() / 0.02 - 1) < 0.05
    assert abs(layer.mlp.up_proj.weight.std() / 0.02 - 1) < 0.05
    assert abs(layer.mlp.down_proj.weight.std() / (0.02 / 4) - 1) < 0.05
    assert (layer.self_attn.q_norm.weight == 1).all()
    assert 0.5 < model.model.layers[0].conv.conv.weight.abs().max() <= 3**-0.5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    gated = ReBasedForCausalLM(ReBasedConfig(vocab_size=500, hidden_size=256, num_hidden_layers=8, conv_type="gated"))
    mixer = gated.model.layers[0].conv
    assert abs(mixer.in_proj.weight.std() / 0.02 - 1) < 0.05
    assert abs(mixer.out_proj.weight.std() / (0.02 / 4) - 1) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(23,), (1,) * 23, (5, 7, 1, 10), (2, 21)], ids=str)
def test_pieces_equal_the_whole(name, sizes):
    model, ids = make_model(name), make_ids()
    expected = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    assert_same_logits(run_pieces(model, ids, sizes, cache), expected)
    assert cache.get_seq_length() == LENGTH


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_static_cache_and_reset(name):
    model, ids = make_model(name), make_ids()
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    for _ in range(2):
        assert_same_logits(run_pieces(model, ids, (5, 7, 1, 10), cache), expected)
        cache.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", [(23,), (10, 13), (1,) * 23], ids=str)
def test_padded_rows_equal_lone_ones(name, side, sizes):
    model, ids = make_model(name), make_ids()
    real = slice(8, None) if side == "left" else slice(None, 15)
    mask = torch.zeros_like(ids)
    mask[0] = 1
    mask[1, real] = 1
    lone = model(ids[1:, real], use_cache=False).logits[0]
    whole = model(ids[:1], use_cache=False).logits[0]
    padded = run_pieces(model, ids, sizes, DynamicCache(config=model.config), mask)
    assert_same_logits(padded[0], whole)
    assert_same_logits(padded[1, real], lone)
    one = run_pieces(model, ids[1:], sizes, DynamicCache(config=model.config), mask[1:])
    assert_same_logits(one[0, real], lone)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "mqar", "conv"])
def test_padding_between_turns(name):
    """Two rows of a chat, the second with a shorter first turn: padding in the middle once the cache goes on."""
    model, ids = make_model(name), make_ids()
    mask = torch.ones_like(ids)
    mask[1, 6:14] = 0
    lone = model(ids[1:][mask[1:] == 1][None], use_cache=False).logits[0]
    for sizes in ((23,), (14, 9), (7, 1, 8, 7)):
        padded = run_pieces(model, ids, sizes, DynamicCache(config=model.config), mask)
        assert_same_logits(padded[1, mask[1] == 1], lone)


@torch.no_grad()
def test_cache_is_of_constant_size():
    model = make_model("paper")
    cache = DynamicCache(config=model.config)
    model(make_ids(1, 1), past_key_values=cache)
    size = cache_bytes(cache)
    for _ in range(10):
        model(make_ids(1, 10_000), past_key_values=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 100_001
    assert cache_bytes(cache) == size


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "every_type"])
def test_copied_and_reordered_caches_go_on(name):
    model, ids = make_model(name), make_ids()
    cache = DynamicCache(config=model.config)
    model(ids[:, :10], past_key_values=cache)
    twin = copy.deepcopy(cache)
    model(ids[:, 10:], past_key_values=cache)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (23, 10)
    twin.reorder_cache(torch.tensor([1, 0]))
    swapped = model(ids.flip(0)[:, 10:], past_key_values=twin).logits
    expected = model(ids, use_cache=False).logits[:, 10:].flip(0)
    assert_same_logits(swapped, expected)


def test_a_foreign_cache_is_refused():
    model = make_model("paper")
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(make_ids(), past_key_values=DynamicCache())


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_bounds", [False, True])
def test_packed_sequences_equal_separate_ones(name, with_bounds):
    model = make_model(name)
    rows = [{"input_ids": make_ids(1, length)[0].tolist()} for length in (7, 1, 12, 3)]
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=with_bounds)(rows)
    batch.pop("labels")
    packed = model(**batch).logits[0]
    separate = [model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0] for row in rows]
    assert_same_logits(packed, torch.cat(separate))


def test_packed_sequences_train_as_separate_ones():
    model = make_model("paper")
    rows = [{"input_ids": make_ids(1, length)[0].tolist()} for length in (7, 12, 3)]
    batch = DataCollatorWithFlattening(return_tensors="pt")(rows)
    model(**batch).loss.backward()
    packed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    tokens = sum(len(row["input_ids"]) - 1 for row in rows)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        (model(ids, labels=ids).loss * (ids.shape[1] - 1) / tokens).backward()
    for grad, parameter in zip(packed, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inputs_embeds_and_logits_to_keep():
    model, ids = make_model("every_type"), make_ids()
    expected = model(ids).logits
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, expected[:, -2:])
    kept = torch.tensor([0, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected[:, kept])


@torch.no_grad()
def test_labels_of_minus_100_are_not_learnt():
    model, ids = make_model("paper"), make_ids()
    labels = ids.clone()
    labels[:, :10] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, 9:-1].flatten(0, 1), ids[:, 10:].flatten())
    torch.testing.assert_close(out.loss, expected)


@torch.no_grad()
def test_hidden_states_and_attentions():
    model, ids = make_model("every_type", attn_implementation="eager"), make_ids()
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 6
    # The softmax layers' and the window of the hybrid; linear layers have no weights to show.
    assert len(out.attentions) == 3
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, LENGTH))


@torch.no_grad()
@pytest.mark.parametrize("name", ["every_type", "based"])
def test_attention_implementations_agree(name):
    ids = make_ids()
    expected = make_model(name, attn_implementation="eager")(ids).logits
    torch.testing.assert_close(
        make_model(name, attn_implementation="sdpa")(ids).logits, expected, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["softmax", "softmax_first", "hybrid"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padded_rows_in_float64(name, implementation):
    """A padded query has no key to see. In float32 its scores would be minus infinity, and so the rest NaN."""
    window = {"sliding_window": 64}  # padding takes room in a window
    model, ids = make_model(name, attn_implementation=implementation, **window).double(), make_ids()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[1:, 6:], model(ids[1:, 6:]).logits, rtol=1e-4, atol=1e-4
    )


def test_bad_inputs_are_named():
    model, ids = make_model("mqar"), make_ids()
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(ids, attention_mask=torch.ones(2, 1, 23, 23), position_ids=torch.arange(23)[None])
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(make_ids(1, 65))
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=torch.tensor([[*range(10), *range(13)]] * 2))


@pytest.mark.parametrize("field, value", [("num_hidden_layers", 6), ("num_hidden_layers", 2), ("hidden_act", "no")])
def test_a_configuration_that_was_changed_is_checked_again(field, value):
    """`from_pretrained(..., num_hidden_layers=6)` sets the field of a configuration that has been checked."""
    config = make_config("paper")
    setattr(config, field, value)
    with pytest.raises(StrictDataclassError, match=field):
        ReBasedForCausalLM(config)


@pytest.mark.parametrize("name", ["paper", "every_type"])
@pytest.mark.parametrize(
    ("head", "labels", "shape"),
    [
        (ReBasedForSequenceClassification, torch.tensor([0, 2]), (2, 3)),
        (ReBasedForTokenClassification, torch.ones(2, LENGTH, dtype=torch.long), (2, LENGTH, 3)),
    ],
)
def test_classification_heads(name, head, labels, shape):
    model = head(make_config(name, num_labels=3, pad_token_id=0))
    out = model(make_ids(), labels=labels, skip_logits=True)  # as Trainer does with `use_liger_kernel`
    assert out.logits.shape == shape
    out.loss.backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())


def test_question_answering_head():
    model = ReBasedForQuestionAnswering(make_config("paper"))
    out = model(make_ids(), start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4]))
    assert out.start_logits.shape == (2, LENGTH)
    out.loss.backward()


CACHE_USERS = [
    ReBasedForCausalLM,
    ReBasedForQuestionAnswering,
    ReBasedForSequenceClassification,
    ReBasedForTokenClassification,
    ReBasedModel,
]


@torch.no_grad()
@pytest.mark.parametrize("model_class", CACHE_USERS)
def test_both_names_of_the_cache(model_class):
    """transformers 5.24 renamed `past_key_values` to `cache`; each release accepts both and returns its own."""
    model, ids = model_class(make_config("every_type", pad_token_id=0)).eval(), make_ids(1)
    assert CACHE_NAME in inspect.signature(model.forward).parameters
    assert CACHE_NAME in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}

    def last(outputs):
        return next(x for x in outputs.values() if isinstance(x, torch.Tensor))[:, -1]

    expected = last(model(ids))
    for name in CACHE_NAMES:
        cache = DynamicCache(config=model.config)
        model(ids[:, :10], **{name: cache})
        outputs = model(ids[:, 10:], **{name: cache})
        assert cache.get_seq_length() == LENGTH
        torch.testing.assert_close(last(outputs), expected, rtol=1e-4, atol=1e-5)
        if hasattr(outputs, CACHE_NAME):
            assert getattr(outputs, CACHE_NAME) is cache
        again = model(ids, **{name: None})
        torch.testing.assert_close(last(again), expected)
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        model(ids, cache=cache, past_key_values=DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache, past_key_values=cache)  # one cache under both names, as generate hands it over for PEFT
    assert cache.get_seq_length() == LENGTH
    assert model(ids, cache=None, past_key_values=DynamicCache(config=model.config)) is not None


@torch.no_grad()
def test_generate_continues_from_the_cache_of_every_release():
    """The whole forward of a prompt, and the same prompt in a step per token through what `generate` passes."""
    model, ids = make_model("every_type"), make_ids(1)
    seen = []
    model.register_forward_hook(
        lambda module, args, kwargs, outputs: seen.append((kwargs, outputs.logits[:, -1])), with_kwargs=True
    )
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert all({*CACHE_NAMES} & {*kwargs} == {"past_key_values"} for kwargs, _ in seen)  # where PEFT looks for it
    steps = torch.stack([logits for _, logits in seen], dim=1)
    assert_same_logits(steps, model(out, use_cache=False).logits[:, 22:-1])


def test_generation_where_queries_and_keys_are_large():
    """Gains of 3e9 make squares that float32 cannot hold; step by step gives the logits of the whole forward."""
    model, ids = make_model("paper"), make_ids()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.mul_(3e9)
        expected = model(ids).logits
        exact = copy.deepcopy(model).double()(ids).logits
        actual = run_pieces(model, ids, [5] + [1] * 18, DynamicCache(config=model.config))
    assert_same_logits(expected, exact)
    assert_same_logits(actual, exact)


@pytest.mark.parametrize(
    ("rotary", "size"), [(ReBasedRotaryEmbedding, "head_dim"), (ReBasedLinearRotaryEmbedding, "feature_dim")]
)
def test_rotary_embedding_is_the_librarys(rotary, size):
    """Llama's class gives the same cosines and sines for a head of the same size."""
    config = make_config("every_type", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    llama = LlamaRotaryEmbedding(LlamaConfig(head_dim=getattr(config, size), rope_parameters=config.rope_parameters))
    x, positions = torch.zeros(1), torch.tensor([[0, 1, 5, 60], [3, 3, 9, 2]])
    for actual, expected in zip(rotary(config, device="cpu")(x, positions), llama(x, positions)):
        assert torch.equal(actual, expected)


def test_rotary_embedding_scaled_as_the_library_does():
    parameters = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    config = make_config("every_type", rope_parameters=parameters, feature_dim=12)
    llama = LlamaRotaryEmbedding(LlamaConfig(head_dim=12, rope_parameters=parameters))
    for rotary in (ReBasedRotaryEmbedding, ReBasedLinearRotaryEmbedding):
        assert torch.equal(rotary(config).inv_freq, llama.inv_freq)


def test_rotary_frequencies_stay_in_float32_where_a_model_is_narrowed():
    """`model.half()`, and Trainer with `bf16_full_eval`, would round them and turn far positions by some radians."""
    model, exact = make_model("every_type"), make_model("every_type").model
    for narrow in (model.bfloat16, model.half, model.float, lambda: model.to("meta")):
        narrow()
        for name in ("rotary_emb", "linear_rotary_emb"):
            for buffer, frequencies in getattr(model.model, name).named_buffers():
                assert frequencies.dtype == torch.float32
                assert frequencies.is_meta or torch.equal(frequencies, getattr(exact, name).get_buffer(buffer))
    assert frequencies.is_meta


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_softmax_layers_are_qwen2s(implementation, window):
    """The same weights in the library's class: rotation, grouped heads, biases, windows, the MLP and the norms."""
    kind = "full_attention" if window is None else "sliding_attention"
    model = make_model(
        "softmax", layer_types=[kind] * 2, mlp_type="swiglu", norm_type="rmsnorm", attention_bias=True, norm_eps=1e-5
    )
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            **{field: getattr(model.config, field) for field in fields},
            intermediate_size=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            layer_types=[kind] * 2,
            use_sliding_window=window is not None,
            sliding_window=window,
            rope_parameters=model.config.rope_parameters,
        )
    ).eval()
    qwen.load_state_dict(model.state_dict())
    for each in (model, qwen):
        each.set_attn_implementation(implementation)
    assert_same_logits(model(make_ids()).logits, qwen(make_ids()).logits)


@torch.no_grad()
def test_linear_layers_rotate_by_position_and_have_biases():
    """A layer of the model with rotation and biases against its definition, with rotations of complex numbers."""
    model = make_model(
        "pure", num_hidden_layers=1, layer_types=["linear_attention"], attention_bias=True,
        position_embedding_type="rope", rope_linear_attention=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    ).double()  # fmt: skip
    layer, seen = model.model.layers[0].self_attn, {}

    def keep(module, args, kwargs, out):
        seen.update(x=args[0] if args else kwargs["hidden_states"], out=out[0])

    layer.register_forward_hook(keep, with_kwargs=True)
    model(make_ids())
    x = seen["x"]
    turn = torch.outer(torch.arange(LENGTH).double(), 100.0 ** -(torch.arange(4).double() / 4))

    def rotate(z):  # [B, T, H, 8], whose halves are real and imaginary parts
        z = torch.complex(z[..., :4], z[..., 4:]) * torch.polar(torch.ones_like(turn), turn)[:, None]
        return torch.cat([z.real, z.imag], -1)

    def project(linear, norm=None):
        y = F.linear(x, linear.weight, linear.bias)
        return y if norm is None else F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps)

    q = rotate(project(layer.q_proj, layer.q_norm).unflatten(-1, (4, 8)))
    k = rotate(project(layer.k_proj, layer.k_norm).unflatten(-1, (2, 8)))
    o = naive_rebased_attention(q, k, project(layer.v_proj).unflatten(-1, (2, 12)))
    assert all(linear.bias is not None for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert layer.o_proj.bias is None
    assert_same_logits(seen["out"], o.flatten(-2) @ layer.o_proj.weight.T)  # the cosines are in float32


@pytest.mark.parametrize("normalize", [True, False])
def test_layers_promise_normalised_queries_and_keys(monkeypatch, normalize):
    promised = []
    operator = code.rebased_attention

    def watched(*args, **options):
        promised.append(options["normalized"])
        return operator(*args, **options)

    monkeypatch.setattr(code, "rebased_attention", watched)
    make_model("pure", normalize=normalize)(make_ids())
    assert promised == [normalize] * 2


def test_what_modules_print():
    config = make_config("every_type")
    assert code.ReBasedRMSNorm(5, 1e-6).extra_repr() == "(5,), eps=1e-06"
    assert ReBasedQKNorm(8, config).extra_repr() == "8, normalize=True, gamma=True, beta=True"
    for flag, text in (("use_gamma", "gamma=False, beta=True"), ("use_beta", "gamma=True, beta=False")):
        assert ReBasedQKNorm(8, make_config("paper", **{flag: False})).extra_repr() == f"8, normalize=True, {text}"


def test_a_turn_of_one_token_is_checked_before_it_is_generated():
    """As `generate` prepares it: a GPU's `forward` does not read the mask of one token."""
    model, ids = make_model("paper"), make_ids()
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    mask = torch.ones(2, LENGTH + 1, dtype=torch.long)
    together = torch.cat([ids, ids[:, :1]], dim=1)

    def prepare(mask, first=True, ids=together):
        return model.prepare_inputs_for_generation(
            ids, attention_mask=mask, is_first_iteration=first, **{CACHE_NAME: cache}, use_cache=True,
            next_sequence_length=ids.shape[1] - LENGTH,
        )  # fmt: skip

    assert prepare(mask)["input_ids"].shape == (2, 1)
    mask[1, 20:23] = 0
    with pytest.raises(ValueError, match="not padding among the 23 cached columns of row 1"):
        prepare(mask)
    prepare(mask, first=False)
    prepare(mask[:, 1:])  # as PEFT gives it, without its virtual tokens
    prepare(None)


def test_damaged_weights_are_told(tmp_path):
    about = code._about_damaged_weights
    assert about("some/body", "inner") == (
        "A weight file of 'some/body' is cut short or damaged. Download it again: "
        "from_pretrained(..., force_download=True)."
    )
    folder = tmp_path / "inner"
    make_model("conv").save_pretrained(folder)
    (folder / "a.safetensors").write_bytes(b"x" * 1234)
    (folder / "b.safetensors").write_bytes(b"")
    (folder / "c.bin").write_bytes(b"")
    for arguments in ((tmp_path, "inner"), (str(folder), "")):
        assert about(*arguments) == (
            f"The folder {str(folder)!r} holds weights that are cut short or damaged: a.safetensors (1,234 bytes), "
            "b.safetensors (0 bytes). Copy or download them again. A file of about 130 bytes is a pointer of Git LFS: "
            "`git lfs pull` fetches the weights."
        )


def test_refusals_of_the_model_in_whole_words():
    model, ids = make_model("paper"), make_ids()
    softmax = make_model("softmax")

    def refused(message, error=ValueError):
        return pytest.raises(error, match=f"^{re.escape(message)}$")

    with refused("You must specify exactly one of input_ids or inputs_embeds"):
        model()
    with refused("`input_ids` or `inputs_embeds` must have at least one token per row, but it has 0."):
        model(ids[:, :0])
    with refused("ReBasedModel.forward() got an unexpected keyword argument 'x'.", TypeError):
        model(ids, x=1)
    with refused("`is_causal=False` is not possible: a recurrent layer sees only what came before."):
        model(ids, is_causal=False)
    softmax(ids, is_causal=True)
    with refused("`position_ids` must be [batch, tokens] = (2, 23) or (1, 23), but its shape is (2, 22)."):
        model(ids, position_ids=ids[:, 1:])
    for tokens, shape in (({"input_ids": ids[0]}, "(23, 48)"), ({"inputs_embeds": torch.zeros(2, 5, 4)}, "(2, 5, 4)")):
        with refused(
            "`input_ids` must be [batch, tokens], or `inputs_embeds` [batch, tokens, 48], but the embeddings have the "
            f"shape {shape}."
        ):
            model(**tokens)
    with refused("`attention_mask` must be a tensor [batch, tokens], but it is a list.", TypeError):
        model(ids, attention_mask=[[1] * 23] * 2)
    with refused("`logits_to_keep` must be 0 or more, or a tensor of indices, but it is -1."):
        model(ids, logits_to_keep=-1)
    # As many labels as tokens, in other rows: the loss would take them.
    for name, labels in (("labels", {}), ("shift_labels", {"labels": ids})):
        with refused(f"`{name}` must be [batch, tokens with logits] = (2, 23), but its shape is (23, 2)."):
            model(ids, **{**labels, name: ids.T})
    with refused("`labels` must be [batch, tokens with logits] = (2, 23), but its shape is (23, 2)."):
        ReBasedForTokenClassification(make_config("paper"))(ids, labels=ids.T % 2)
    with refused("`labels` must be [batch, tokens with logits] = (2, 3), but its shape is (2, 23)."):
        model(ids, labels=ids, logits_to_keep=3)
    with refused("`cu_seq_lens_k` needs `cu_seq_lens_q`, which has the bounds of packed sequences."):
        model(ids, cu_seq_lens_k=torch.tensor([0, 23]))
    model.train().gradient_checkpointing_enable()
    with refused(
        f"`{CACHE_NAME}` cannot be used in training with gradient checkpointing, which runs every layer twice. Call "
        "`model.gradient_checkpointing_disable()`, or give the tokens of the cache as well."
    ):
        model(ids, past_key_values=DynamicCache(config=model.config))
    with refused(
        "`generate_batch` and continuous batching of transformers cannot serve a ReBased model, here with layers of "
        "the types ['conv', 'linear_attention']. Use `generate`, or serve the model with vLLM: "
        "`pip install modeling-rebased[vllm]`, then `vllm serve FOLDER`."
    ):
        model.init_continuous_batching()
    learned = make_model("mqar")
    learned(ids[:, :1], position_ids=torch.tensor([[63]]))
    with refused("A token has position 64, but learned positions end at `max_position_embeddings` - 1 = 63."):
        learned(ids[:, :1], position_ids=torch.tensor([[64]]))


def test_padding_inside_packed_sequences_needs_another_attention(monkeypatch):
    monkeypatch.setattr("modeling_rebased.batch_rebased.is_flash_attention_requested", lambda config: True)
    model, ids = make_model("softmax"), make_ids(1)
    mask = torch.ones_like(ids)
    mask[:, 4] = 0
    message = (
        "`attention_mask` has padding inside packed sequences, which FlashAttention cannot tell apart: leave the "
        "padding out, or choose `attn_implementation='sdpa'`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(ids, attention_mask=mask, cu_seq_lens_q=torch.tensor([0, 10, 23]))


@torch.no_grad()
@pytest.mark.parametrize("field", ["residual_dropout", "embedding_dropout"])
def test_dropout_is_for_training_and_of_the_size_that_is_given(field):
    ids = make_ids()
    expected = make_model("paper")(ids).logits
    for value in (0.0, 0.5):
        model = make_model("paper", **{field: value})
        assert torch.equal(model(ids).logits, expected)
        torch.manual_seed(0)
        assert torch.equal(model.train()(ids).logits, expected) == (value == 0)


def test_dropout_can_be_switched_off_by_module():
    """TRL's DPOTrainer and RewardTrainer do it so, before they compare a model with another."""
    model, ids = ReBasedForCausalLM(make_config("paper", residual_dropout=0.5, embedding_dropout=0.5)), make_ids()
    expected = model.eval()(ids).logits
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    torch.testing.assert_close(model(ids).logits, expected)
