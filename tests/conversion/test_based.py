"""from_based against the oracle in based_model.py, and on to ReBased."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.conversion import ConversionError, from_based, to_rebased
from modeling_rebased.conversion.cli import main
from modeling_rebased.conversion.layout import same_bytes
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from tests.conversion.based_model import based_config, make_based_model


OPTIONS = {"num_heads": 4, "window_size": 8}
CASES = {
    "released": ({}, {}),
    "untied": ({"tied": False}, {}),
    "conv_bias": ({"bias": True, "size": 4, "expand": 2}, {}),
    "older_conv_name": ({"conv_name": "conv1"}, {}),
    "odd_window": ({"window_size": 5}, {"window_size": 5}),
    "constants": (
        {"eps": 1e-3, "attention_eps": 1e-2, "theta": 100.0},
        {"norm_eps": 1e-3, "attention_eps": 1e-2, "rope_theta": 100.0},
    ),
    "no_window": ({"kinds": ("conv", "linear")}, {"window_size": None}),
    "convolutions": ({"kinds": ("conv", "conv")}, {"window_size": None, "num_heads": None}),
}


def make_ids(vocab=40, length=21):
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits(folder, model):
    """In float32, against the oracle in float64: its own rounding of these large numbers can pass 1e-5."""
    ours = ReBasedForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(make_ids()).float()
        torch.testing.assert_close(ours(make_ids()).logits, expected, atol=1e-5, rtol=1e-5)
    return ours


@pytest.mark.parametrize(
    ("kinds", "option", "message"),
    [
        (("conv", "linear"), "window_size", "--window-size is 8, but SOURCE has no layer of sliding_attention"),
        (("conv", "linear"), "rope_theta", "--rope-theta is 8, but"),
        (("conv", "sliding"), "attention_eps", "--attention-eps is 8.0, but SOURCE has no layer of linear_attention"),
        (
            ("conv", "conv"),
            "num_heads",
            "--num-heads is 8, but SOURCE has no layer of linear_attention or sliding_att",
        ),
    ],
)
def test_arguments_of_layers_that_are_not_there_are_refused(tmp_path, kinds, option, message):
    torch.save(make_based_model(kinds=kinds).state_dict(), tmp_path / "m.bin")
    needed = {"num_heads": 4} if "linear" in kinds else OPTIONS if "sliding" in kinds else {}
    with pytest.raises(ConversionError, match=message):
        from_based(tmp_path / "m.bin", tmp_path / "out", **{**needed, option: 8.0 if option == "attention_eps" else 8})


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    arguments, options = CASES[case]
    model = make_based_model(**arguments)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    from_based(tmp_path / "pytorch_model.bin", tmp_path / "out", **{**OPTIONS, **options})
    assert_same_logits(tmp_path / "out", model)


@torch.no_grad()
def test_the_result_generates_from_its_cache(tmp_path):
    model = make_based_model()
    torch.save(model.state_dict(), tmp_path / "m.bin")
    from_based(tmp_path / "m.bin", tmp_path / "out", **OPTIONS)
    ours = ReBasedForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = make_ids()
    out = ours.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("kind", ["pickle", "safetensors", "sharded"])
def test_a_folder_of_the_hub(tmp_path, kind):
    """All is read from config.json; the trainer's prefix and counters and an idle decay are in the way."""
    model, source = make_based_model(), tmp_path / "based"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(based_config(fixed_decay=True)))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["train_metrics.num-tokens.count"] = torch.tensor(10_000_000_000)
    state["model.transformer.decay.decay"] = torch.ones(4)
    if kind == "pickle":
        torch.save(state, source / "pytorch_model.bin")
    else:
        # Tied weights are stored once, and not always under the embedding's name.
        state.pop("model.transformer.embeddings.word_embeddings.weight")
        shards = [state] if kind == "safetensors" else [dict(list(state.items())[i::2]) for i in range(2)]
        names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i}.safetensors" for i in range(2)]
        for name, shard in zip(names, shards):
            save_file(shard, source / name)
        if kind == "sharded":
            index = {"weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
            (source / "model.safetensors.index.json").write_text(json.dumps(index))
    report = str(from_based(source, tmp_path / "out"))
    ours = assert_same_logits(tmp_path / "out", model)
    config = ours.config
    assert config.layer_types == ["conv", "linear_attention", "sliding_attention", "conv"]
    assert (config.sliding_window, config.feature_dim, config.head_dim) == (5, 5, 8)
    assert (config.max_position_embeddings, config.bos_token_id, config.eos_token_id) == (64, 3, 3)
    assert config.tie_word_embeddings and not config.conv_bias and config.conv_intermediate_size == 64
    assert "train_metrics.num-tokens.count" in report and "transformer.decay.decay" in report
    assert "no tokenizer" in report and "sliding_window is 5" in report


def test_the_tokenizer_comes_along(tmp_path):
    torch.save(make_based_model(vocab=300).state_dict(), tmp_path / "m.bin")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    report = from_based(tmp_path / "m.bin", tmp_path / "out", **OPTIONS, tokenizer=tmp_path / "gpt2")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and "no tokenizer" not in str(report)
    torch.save(make_based_model().state_dict(), tmp_path / "m.bin")
    with pytest.raises(ConversionError, match="vocab_size is 40"):
        from_based(tmp_path / "m.bin", tmp_path / "small", **OPTIONS, tokenizer=tmp_path / "gpt2")


def test_gpt2s_vocabulary_ends_texts_with_its_token(tmp_path):
    torch.save(make_based_model(vocab=50264, d=8, heads=2).state_dict(), tmp_path / "m.bin")
    from_based(tmp_path / "m.bin", tmp_path / "out", num_heads=2, window_size=8)
    config = ReBasedConfig.from_pretrained(tmp_path / "out")
    assert config.bos_token_id == config.eos_token_id == 50256


def test_an_argument_goes_before_the_configuration(tmp_path):
    model, source = make_based_model(window_size=4, eps=1e-3), tmp_path / "based"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(based_config()))
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    from_based(source, tmp_path / "out", window_size=4, norm_eps=1e-3)
    assert_same_logits(tmp_path / "out", model)


def test_weights_are_kept_bit_for_bit(tmp_path):
    model = make_based_model().to(torch.bfloat16)
    theirs = model.state_dict()
    torch.save({"state_dict": theirs, "epoch": 1}, tmp_path / "m.ckpt")
    before = sorted(tmp_path.iterdir())
    text = str(from_based(tmp_path / "m.ckpt", tmp_path / "out", **OPTIONS, dry_run=True))
    assert sorted(tmp_path.iterdir()) == before
    assert all(name in text for name in theirs) and "'epoch'" in text
    assert "transformer.layers.2.mixer.Wqkv.weight[32:64]" in text
    from_based(tmp_path / "m.ckpt", tmp_path / "out", **OPTIONS)
    ours = ReBasedForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    layer, root = "transformer.layers.2.", "model.layers.2."
    parts = {"mixer.Wqkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]}
    parts["mlp.fc1.weight"] = ["mlp.up_proj.weight", "mlp.gate_proj.weight"]
    for name, pieces in parts.items():
        assert same_bytes(torch.cat([ours[root + piece] for piece in pieces]), theirs[layer + name])
    convolution = "model.layers.0.conv.conv.weight"
    assert same_bytes(ours[convolution], theirs["transformer.layers.0.mixer.conv.conv.weight"])
    assert sum(tensor.numel() for tensor in ours.values()) == sum(tensor.numel() for tensor in theirs.values())


def test_on_to_rebased(tmp_path):
    """The first loss of the ReBased model that starts from it is finite and near that of a guess."""
    model = make_based_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2)
    torch.save(model.state_dict(), tmp_path / "m.bin")
    from_based(tmp_path / "m.bin", tmp_path / "based", **OPTIONS)
    GenerationConfig(do_sample=True, temperature=0.3).save_pretrained(tmp_path / "based")
    to_rebased(tmp_path / "based", tmp_path / "start")
    assert GenerationConfig.from_pretrained(tmp_path / "start").temperature == 0.3
    start = ReBasedForCausalLM.from_pretrained(tmp_path / "start")
    assert start.config.coefficients == (0, 0, 1) and start.config.normalize
    assert start.config.conv_type == "gated" and start.config.sliding_window == 5
    based = ReBasedForCausalLM.from_pretrained(tmp_path / "based")
    loss = start(make_ids(), labels=make_ids()).loss
    loss.backward()
    assert abs(loss.item() - based(make_ids(), labels=make_ids()).loss.item()) < 0.1
    assert abs(loss.item() - math.log(40)) < 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in start.parameters())
    for name, tensor in based.state_dict().items():
        assert torch.equal(start.state_dict()[name], tensor), name


def change(name, tensor):
    return lambda state: state.update({name: tensor})


LAYER = "transformer.layers."
WRONG = {
    "heads_needed": (lambda state: None, {"num_heads": None}, r"--num-heads \(num_attention_heads\) is needed"),
    "heads_wrong": (lambda state: None, {"num_heads": 5}, "--num-heads is 5; it must divide hidden_size, 32"),
    "heads_rows": (lambda state: None, {"num_heads": 8}, "--num-heads is 8, but proj_q of layer 1 has 20 rows"),
    "window_needed": (lambda state: None, {"window_size": None}, "--window-size is needed"),
    "window_wrong": (
        lambda state: None,
        {"window_size": 1},
        "--window-size is 1; it must be a whole number of at least 2",
    ),
    "eps": (lambda state: None, {"attention_eps": -1.0}, "attention_eps"),
    "unknown_tensor": (change("transformer.extra", torch.ones(2)), {}, "'transformer.extra'"),
    "positions": (change("transformer.embeddings.position_embeddings.weight", torch.ones(2, 32)), {}, "position_emb"),
    "unknown_mixer": (change(LAYER + "1.mixer.proj_g.weight", torch.ones(2)), {}, "Layer 1 of SOURCE is none of"),
    "biases": (change(LAYER + "1.mlp.fc1.bias", torch.ones(48)), {}, "SwiGLU without biases"),
    "decay": (change(LAYER + "1.mixer.decay_proj.weight", torch.ones(4, 32)), {}, "decay that depends on the input"),
    "gap": (change(LAYER + "7.norm1.weight", torch.ones(32)), {}, "numbered from 0 without a gap"),
    "no_norm": (lambda state: state.pop("transformer.ln_f.weight"), {}, "SOURCE is not a model of Based"),
    "no_embedding": (
        lambda state: [
            state.pop(name) for name in ("transformer.embeddings.word_embeddings.weight", "lm_head.weight")
        ],
        {},
        "has neither",
    ),
    "missing": (lambda state: state.pop(LAYER + "0.norm2.weight"), {}, "Layer 0 of SOURCE is none of"),
    "some_biases": (change(LAYER + "3.mixer.conv.conv.bias", torch.ones(64)), {}, "have a bias and some have none"),
    "grouped": (change(LAYER + "2.mixer.Wqkv.weight", torch.ones(48, 32)), {}, "Wqkv of layer 2 has 48 rows"),
    "odd_rows": (change(LAYER + "2.mixer.Wqkv.weight", torch.ones(95, 32)), {}, "a multiple of 3 rows"),
    "mlp_not_gated": (change(LAYER + "2.mlp.fc1.weight", torch.ones(24, 32)), {}, r"mlp\..*_proj.*\[12, 32\].*\[24"),
    "shape": (change("transformer.ln_f.weight", torch.ones(5)), {}, r"model.norm.weight.*\[5\].*\[32\]"),
    "integers": (change("transformer.ln_f.weight", torch.ones(32, dtype=torch.int64)), {}, "int64"),
    "other_prefix": (change("loss", torch.ones(1)), {}, "'loss'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_and_leaves_nothing(tmp_path, case):
    spoil, options, message = WRONG[case]
    state = dict(make_based_model().state_dict())
    spoil(state)
    if case == "other_prefix":
        state = {name if name == "loss" else f"model.{name}": tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "m.bin")
    with pytest.raises(ConversionError, match=message):
        from_based(tmp_path / "m.bin", tmp_path / "new" / "out", **{**OPTIONS, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"]


BAD_CONFIG = {
    "activation": (based_config(activation_function="geglu"), "activation_function is 'geglu', must be 'swiglu'"),
    "rotary": (based_config(rotary_emb_fraction=0.5), "rotary_emb_fraction is 0.5, must be 1"),
    "parallel": (based_config(parallel_block=True), "parallel_block is True"),
    "heads": (based_config(n_head=2), "num_heads of the linear attention is 4, must be 2"),
    "eps": (based_config(layer_norm_epsilon="small"), "layer_norm_epsilon in the config.json of SOURCE is 'small'"),
    "list": ([1], "holds a list; it must be a JSON object"),
}
BAD_CONFIG["feature_map"] = (based_config(), "feature_map of the linear attention is 'Exp', must be 'TaylorExp'")
BAD_CONFIG["feature_map"][0]["alt_mixer"]["feature_map"] = {"_target_": "based.models.mixers.linear_attention.Exp"}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_configurations_that_ours_has_no_place_for(tmp_path, case):
    fields, message = BAD_CONFIG[case]
    source = tmp_path / "based"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(fields))
    torch.save(make_based_model().state_dict(), source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=message):
        from_based(source, tmp_path / "out")
    (source / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="is not a JSON object"):
        from_based(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["based"]


class Hostile:
    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_hostile_pickle_is_refused_unrun(tmp_path):
    Hostile.path = str(tmp_path / "pwned")
    source = tmp_path / "based"
    source.mkdir()
    # Among the names that are left out it is read all the same.
    state = {**make_based_model().state_dict(), "train_metrics.extra": Hostile()}
    torch.save(state, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(based_config()))
    with pytest.raises(ConversionError, match="was refused"):
        from_based(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["based"]


def test_by_the_command_line(tmp_path, capsys):
    torch.save(make_based_model().state_dict(), tmp_path / "m.bin")
    out = str(tmp_path / "out")
    assert main(["from-based", str(tmp_path / "m.bin"), out]) == 1
    assert "--num-heads" in capsys.readouterr().err
    assert main(["from-based", str(tmp_path / "m.bin"), out, "--num-heads", "4", "--window-size", "8"]) == 0
    assert "tensors:" in capsys.readouterr().out
    assert_same_logits(tmp_path / "out", make_based_model())
