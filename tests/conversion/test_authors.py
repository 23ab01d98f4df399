"""from_authors and to_authors against the oracle in authors_model.py."""

import json
import pickle

import pytest
import torch

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.conversion import ConversionError, from_authors, to_authors
from modeling_rebased.conversion.authors import authors_names
from modeling_rebased.conversion.layout import same_bytes
from tests.conversion.authors_model import make_authors_model


FLAGS = {
    "all": ({}, {}),
    "normalize": ({"gamma": False, "beta": False}, {"kernel": "rebased", "normalize": True}),
    "normalize_gamma": ({"beta": False}, {"kernel": "rebased", "normalize": True}),
    "normalize_beta": ({"gamma": False}, {"kernel": "rebased", "normalize": True}),
    "gamma_beta": ({"normalize": False}, {}),
    "gamma": ({"normalize": False, "beta": False}, {"use_beta": False}),
    "none": ({"normalize": False, "gamma": False, "beta": False}, {"kernel": "rebased", "normalize": False}),
}
CASES = {
    **{f"flags_{name}": flags for name, flags in FLAGS.items()},
    "based": ({"based": True, "normalize": False, "gamma": False, "beta": False}, {"kernel": "based"}),
    "based_qk_norm": ({"based": True}, {"kernel": "based"}),
    "mlp": ({"mlp": True}, {}),
    "four_layers": ({"kinds": ("conv", "attention") * 2, "mlp": True, "positions": 0}, {}),
    "pure": ({"kinds": ("attention", "attention"), "nested": False}, {}),
    "convolutions": ({"kinds": ("conv", "conv"), "nested": False}, {"num_heads": None}),
    "odd_head_dim": ({"d": 22, "heads": 4, "features": 5}, {"num_heads": 4}),
}


def save(model, path):
    torch.save(model.state_dict(), path)
    return path


def assert_same_file(first, second):
    """The same keys in the same order, the same bytes."""
    first, second = (torch.load(path, weights_only=True) for path in (first, second))
    assert list(first) == list(second)
    for name in first:
        assert same_bytes(first[name], second[name]), name


@pytest.mark.parametrize("case", CASES)
def test_logits_and_round_trip(tmp_path, case):
    arguments, options = CASES[case]
    model = make_authors_model(**arguments)
    source = save(model, tmp_path / "best.pt")
    from_authors(source, tmp_path / "out", **{"num_heads": 3, **options})
    ours = ReBasedForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = model(ids), ours(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    to_authors(tmp_path / "out", tmp_path / "again.pt")
    assert_same_file(source, tmp_path / "again.pt")


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_without_the_record(tmp_path, case):
    """A model saved anew, as after fine-tuning: the authors' code must still find all its names."""
    arguments, options = CASES[case]
    model = make_authors_model(**{**arguments, "nested": True})
    from_authors(save(model, tmp_path / "best.pt"), tmp_path / "out", **{"num_heads": 3, **options})
    ReBasedForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "tuned")
    to_authors(tmp_path / "tuned", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    expected = model.state_dict()
    if case == "flags_gamma":  # the unused beta is new, and 0
        for name in [name for name in expected if name.endswith("beta")]:
            assert again.pop(name).eq(0).all()
            expected.pop(name)
    assert set(again) == set(expected)
    for name in again:
        assert same_bytes(again[name], expected[name]), name
    assert again["lm_head.weight"].data_ptr() == again["backbone.embeddings.word_embeddings.weight"].data_ptr()


def test_the_flags_in_the_configuration(tmp_path):
    for name, (arguments, options) in FLAGS.items():
        from_authors(save(make_authors_model(**arguments), tmp_path / "m.pt"), tmp_path / name, num_heads=3, **options)
        config = ReBasedConfig.from_pretrained(tmp_path / name)
        flags = [flag for flag in ("normalize", "use_gamma", "use_beta") if getattr(config, flag)]
        assert flags == {
            "all": ["normalize", "use_gamma", "use_beta"],
            "gamma_beta": ["use_gamma", "use_beta"],
            "gamma": ["use_gamma"],
            "none": [],
        }.get(name, ["normalize"])


def test_everything_that_is_not_in_the_tensors_is_in_the_configuration(tmp_path):
    source = save(make_authors_model(positions=0), tmp_path / "m.pt")
    options = {"attention_eps": 1e-6, "embedding_dropout": 0.1, "max_position_embeddings": 77}
    from_authors(source, tmp_path / "out", num_heads=3, **options)
    config = ReBasedConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(config, name) for name in options} == options
    assert config.num_attention_heads == 3 and config.feature_dim == 4 and config.head_dim == 10
    assert config.position_embedding_type == "none" and config.mlp_type == "none" and config.tie_word_embeddings


def test_use_beta_is_inferred(tmp_path):
    model = make_authors_model(normalize=False)
    report = from_authors(save(model, tmp_path / "m.pt"), tmp_path / "used", num_heads=3)
    assert ReBasedConfig.from_pretrained(tmp_path / "used").use_beta and "use_beta is True" in str(report)
    state = {k: torch.zeros_like(v) if k.endswith("beta") else v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "zero.pt")
    report = from_authors(tmp_path / "zero.pt", tmp_path / "zero", num_heads=3)
    assert not ReBasedConfig.from_pretrained(tmp_path / "zero").use_beta and "use_beta is False" in str(report)
    to_authors(tmp_path / "zero", tmp_path / "again.pt")
    assert_same_file(tmp_path / "zero.pt", tmp_path / "again.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_round_trip(tmp_path, dtype):
    source = save(make_authors_model(mlp=True).to(dtype), tmp_path / "m.pt")
    from_authors(source, tmp_path / "out", num_heads=3)
    to_authors(tmp_path / "out", tmp_path / "again.pt")
    assert_same_file(source, tmp_path / "again.pt")


def test_mixed_types_and_odd_bits_round_trip(tmp_path):
    state = make_authors_model().state_dict()
    state["backbone.ln_f.bias"] = state["backbone.ln_f.bias"].double()
    state["backbone.layers.0.norm1.bias"][:3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    torch.save(state, tmp_path / "m.pt")
    from_authors(tmp_path / "m.pt", tmp_path / "out", num_heads=3)
    to_authors(tmp_path / "out", tmp_path / "again.pt")
    assert_same_file(tmp_path / "m.pt", tmp_path / "again.pt")


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("state_dict", "model."), ("model_state_dict", "module.model."), ("model", ""), (None, "_orig_mod.")],
)
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    state = {prefix + name: tensor for name, tensor in make_authors_model().state_dict().items()}
    if wrapper:
        torch.save({"epoch": 3, wrapper: state, "optimizer_states": [{}]}, tmp_path / "m.pt")
    else:
        torch.save(state, tmp_path / "m.pt")
    report = from_authors(tmp_path / "m.pt", tmp_path / "out", num_heads=3)
    assert ("'epoch', 'optimizer_states'" in str(report)) == bool(wrapper)
    to_authors(tmp_path / "out", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    again = again[wrapper] if wrapper else again
    assert list(again) == list(state) and all(same_bytes(again[name], state[name]) for name in state)


def test_untied_head_and_no_head(tmp_path):
    state = make_authors_model().state_dict()
    for name, head in (("untied", torch.randn(31, 32)), ("absent", None)):
        changed = {**state, "lm_head.weight": head} if head is not None else {**state}
        if head is None:
            del changed["lm_head.weight"]
        torch.save(changed, tmp_path / "m.pt")
        from_authors(tmp_path / "m.pt", tmp_path / name, num_heads=3)
        assert ReBasedConfig.from_pretrained(tmp_path / name).tie_word_embeddings == (head is None)
        to_authors(tmp_path / name, tmp_path / f"{name}.pt")
        assert_same_file(tmp_path / "m.pt", tmp_path / f"{name}.pt")


def test_the_only_possible_number_of_heads_is_found(tmp_path):
    source = save(make_authors_model(d=22, heads=5, features=7), tmp_path / "m.pt")
    report = from_authors(source, tmp_path / "out")
    assert ReBasedConfig.from_pretrained(tmp_path / "out").num_attention_heads == 5
    assert "num_attention_heads is 5" in str(report)


def test_dry_run_lists_every_tensor_and_writes_nothing(tmp_path):
    model = make_authors_model(normalize=False, beta=False)
    source = save(model, tmp_path / "m.pt")
    before = sorted(tmp_path.iterdir())
    text = str(from_authors(source, tmp_path / "out", num_heads=3, use_beta=False, dry_run=True))
    assert sorted(tmp_path.iterdir()) == before
    for name in model.state_dict():
        assert name in text
    assert "-> model.layers.1.self_attn.q_norm.weight" in text and "- (unused)" in text and "float32[12, 32]" in text
    from_authors(source, tmp_path / "out", num_heads=3, use_beta=False)
    before = sorted(tmp_path.iterdir())
    text = str(to_authors(tmp_path / "out", tmp_path / "again.pt", dry_run=True))
    assert sorted(tmp_path.iterdir()) == before
    assert "-> backbone.layers.1.sequence_mixer.mixer.proj_q.weight" in text


def change(name, tensor):
    return lambda state: state.update({name: tensor})


def only_convolutions(state):
    for name in [name for name in state if name.startswith("backbone.layers.1.")]:
        del state[name]
    layer = {name.replace("layers.0.", "layers.1."): tensor for name, tensor in state.items() if "layers.0." in name}
    state |= layer


WRONG = {
    "heads_needed": (lambda state: None, {"num_heads": None}, r"--num-heads .*is needed.* fits \[3, 6\] heads"),
    "heads_wrong": (lambda state: None, {"num_heads": 5}, "--num-heads is 5, but proj_q has 12 rows"),
    "heads_zero": (lambda state: None, {"num_heads": 0}, "--num-heads is 0"),
    "kernel_unknown": (lambda state: None, {"kernel": "cosine"}, "--kernel is 'cosine'; it must be"),
    "normalize": (lambda state: None, {"normalize": False}, "--no-normalize was given, but SOURCE has ln_q.weight"),
    "convolutions": (
        only_convolutions,
        {"num_heads": None, "normalize": False},
        "--normalize is False, but SOURCE has no",
    ),
    "eps": (lambda state: None, {"attention_eps": -1.0}, "attention_eps"),
    "positions": (lambda state: None, {"max_position_embeddings": 5}, "is 5, but .* has 16 rows"),
    "unknown_tensor": (change("backbone.extra", torch.ones(2)), {}, "'backbone.extra'"),
    "unknown_mixer": (
        change("backbone.layers.1.sequence_mixer.mixer.Wqkv.weight", torch.ones(2)),
        {},
        "Layer 1 of SOURCE is none of",
    ),
    "gap": (change("backbone.layers.7.norm1.weight", torch.ones(32)), {}, r"numbered from 0 without a gap.*0, 1, 7"),
    "huge_layer": (change("backbone.layers.999999999999.norm1.weight", torch.ones(32)), {}, "999999999999"),
    "no_norm": (lambda state: state.pop("backbone.ln_f.weight"), {}, "lacks 'backbone.ln_f.weight'"),
    "missing": (lambda state: state.pop("backbone.layers.0.norm2.bias"), {}, "Layer 0 of SOURCE is none of"),
    "not_theirs": (lambda state: state.pop("backbone.embeddings.word_embeddings.weight"), {}, "not a checkpoint of"),
    "shape": (change("backbone.ln_f.bias", torch.ones(5)), {}, r"model.norm.bias.*\[5\].*\[32\]"),
    "flat": (change("backbone.layers.1.sequence_mixer.mixer.proj_q.weight", torch.ones(5)), {}, "two dimensions"),
    "integers": (change("backbone.ln_f.bias", torch.ones(32, dtype=torch.int64)), {}, "'backbone.ln_f.bias'.*int64"),
    "no_tensor": (change("backbone.ln_f.bias", "text"), {}, "'backbone.ln_f.bias'.*is a str"),
    "expanded": (change("backbone.ln_f.bias", torch.ones(1).expand(10**12)), {}, "more numbers than the file holds"),
    "sparse": (change("backbone.ln_f.bias", torch.ones(32).to_sparse()), {}, "sparse"),
    "other_prefix": (change("loss.scale", torch.ones(1)), {}, "'loss.scale'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_and_leaves_nothing(tmp_path, case):
    spoil, options, message = WRONG[case]
    state = dict(make_authors_model().state_dict())
    spoil(state)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ConversionError, match=message):
        from_authors(tmp_path / "m.pt", tmp_path / "new" / "out", **{"num_heads": 3, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_what_the_tensors_do_not_tell_is_asked_for(tmp_path):
    source = save(make_authors_model(normalize=False, gamma=False, beta=False), tmp_path / "m.pt")
    with pytest.raises(ConversionError, match=r"--kernel \(kernel\) is needed"):
        from_authors(source, tmp_path / "out", num_heads=3)
    with pytest.raises(ConversionError, match=r"--no-normalize \(normalize\) is needed"):
        from_authors(source, tmp_path / "out", num_heads=3, kernel="rebased")
    with pytest.raises(ConversionError, match="--normalize was given, but no Based layer normalises"):
        from_authors(source, tmp_path / "out", num_heads=3, kernel="based", normalize=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


class Hostile:
    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_a_hostile_pickle_is_refused_unrun(tmp_path, kind):
    Hostile.path = str(tmp_path / "pwned")
    state = {**make_authors_model().state_dict(), "extra": Hostile()}
    if kind == "bare":
        (tmp_path / "m.pt").write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ConversionError, match=r"m\.pt' was refused") as refused:
        from_authors(tmp_path / "m.pt", tmp_path / "out", num_heads=3)
    # torch's own words end in the advice to load the file with weights_only=False.
    assert "weights_only" not in str(refused.value)
    name = f"{open.__module__}.open"  # "io.open" up to Python 3.11, "_io.open" from 3.12 on
    assert kind == "bare" or f"torch says: GLOBAL {name}" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.99])
def test_truncated_and_damaged_files(tmp_path, keep):
    whole = save(make_authors_model(), tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(ConversionError, match="truncated"):
        from_authors(tmp_path / "m.pt", tmp_path / "out", num_heads=3)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    (tmp_path / "m.safetensors").write_bytes(whole[:40])
    with pytest.raises(ConversionError, match="not a complete"):
        from_authors(tmp_path / "m.safetensors", tmp_path / "out", num_heads=3)


def test_a_flipped_byte_is_noticed(tmp_path):
    source = save(make_authors_model(), tmp_path / "m.pt")
    whole = bytearray(source.read_bytes())
    tensor = make_authors_model().state_dict()["backbone.layers.0.norm1.weight"].numpy().tobytes()
    at = bytes(whole).find(tensor)
    assert at > 0
    whole[at] ^= 1
    source.write_bytes(whole)
    with pytest.raises(ConversionError, match="damaged"):
        from_authors(source, tmp_path / "out", num_heads=3)


def test_missing_source_and_existing_destination(tmp_path):
    with pytest.raises(ConversionError, match="is missing"):
        from_authors(tmp_path / "no.pt", tmp_path / "out")
    with pytest.raises(ConversionError, match="is a folder"):
        from_authors(tmp_path, tmp_path / "out")
    source = save(make_authors_model(), tmp_path / "m.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ConversionError, match="exists; give another or allow --overwrite"):
        from_authors(source, tmp_path / "out", num_heads=3)
    with pytest.raises(ConversionError):
        from_authors(source, tmp_path / "out", num_heads=5, overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    with pytest.raises(ConversionError, match="is or holds SOURCE"):
        from_authors(source, tmp_path, num_heads=3, overwrite=True)
    from_authors(source, tmp_path / "out", num_heads=3, overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists() and (tmp_path / "out" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "out"]


def test_an_interrupted_write_leaves_the_old_output(tmp_path, monkeypatch):
    source = save(make_authors_model(), tmp_path / "m.pt")
    from_authors(source, tmp_path / "out", num_heads=3)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_rebased.conversion.writing.write_record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_authors(source, tmp_path / "out", num_heads=3, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        from_authors(source, tmp_path / "deep" / "new", num_heads=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


SMALL = {"vocab_size": 11, "hidden_size": 12, "num_attention_heads": 2, "feature_dim": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_type": "rmsnorm"},
        {"norm_eps": 1e-6},
        {"mlp_type": "swiglu"},
        {"hidden_act": "relu"},
        {"mlp_bias": False},
        {"position_embedding_type": "rope"},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"conv_type": "gated"},
        {"conv_bias": False},
        {"num_key_value_heads": 1},
        {"head_dim": 5},
        {"attention_bias": True},
        {"decay": "gate"},
        {"kernel_coefficients": [0, 0, 2]},
        {"qk_norm_scope": "head"},
        {"qk_norm_shared": True},
        {"qk_norm_eps": 1e-6},
        {"use_beta": False},
        {"normalize": False, "use_gamma": False},
        {"use_gamma": True, "kernel": "based"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_models_the_authors_code_does_not_have(tmp_path, fields):
    ReBasedForCausalLM(ReBasedConfig(**{**SMALL, **fields})).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=next(iter(fields))):
        to_authors(tmp_path / "ours", tmp_path / "again.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_to_authors_of_something_else(tmp_path):
    with pytest.raises(ConversionError, match=r"no config\.json"):
        to_authors(tmp_path, tmp_path / "again.pt")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConversionError, match="model_type 'llama'; it must be 'rebased'"):
        to_authors(tmp_path / "ours", tmp_path / "again.pt")
    (tmp_path / "ours" / "config.json").write_text("[1")
    with pytest.raises(ConversionError, match="not a JSON object"):
        to_authors(tmp_path / "ours", tmp_path / "again.pt")
    config = ReBasedConfig(**SMALL)
    config.save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"neither model\.safetensors nor"):
        to_authors(tmp_path / "ours", tmp_path / "again.pt")
    index = {"weight_map": {"model.norm.weight": "../m.safetensors"}}
    (tmp_path / "ours" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="is not in the folder"):
        to_authors(tmp_path / "ours", tmp_path / "again.pt")


def test_sharded_folders_are_read(tmp_path):
    model = ReBasedForCausalLM(ReBasedConfig(**SMALL))
    model.save_pretrained(tmp_path / "ours", max_shard_size="2KB")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    to_authors(tmp_path / "ours", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert set(again) == set(dict(authors_names(model.config)))
    shard = next((tmp_path / "ours").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ConversionError, match=shard.name):
        to_authors(tmp_path / "ours", tmp_path / "more.pt")
