"""linearize and to_rebased: what must be exact is, and the start is the closest there is."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.conversion import ConversionError, linearize, to_rebased
from modeling_rebased.conversion.gguf_files import gguf_tokenizer
from modeling_rebased.conversion.linearize import _reduce_layer
from modeling_rebased.conversion.reduce_heads import exp_beta, reduce_heads
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.text import TokenBlocks


SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
FAMILY = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"head_dim": 8, "rope_parameters": LLAMA_3}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
}


def make_teacher(folder, kind="llama", **changes):
    model_class, config_class, fields = FAMILY[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **fields, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(mean=1.0, std=0.3)
            else:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def make_ids(length=20):
    return torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", FAMILY)
def test_layers_that_keep_softmax_are_exact(tmp_path, kind):
    teacher = make_teacher(tmp_path / "teacher", kind)
    linearize(tmp_path / "teacher", tmp_path / "start", layers="softmax")
    student = ReBasedForCausalLM.from_pretrained(tmp_path / "start").eval()
    with torch.no_grad():
        torch.testing.assert_close(student(make_ids()).logits, teacher(make_ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "qwen3"])
def test_a_copy_with_softmax_in_every_layer_starts_the_same_students(tmp_path, kind):
    make_teacher(tmp_path / "teacher", kind)
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    linearize(tmp_path / "teacher", tmp_path / "copy", layers="softmax")
    for source in ("teacher", "copy"):
        linearize(tmp_path / source, tmp_path / f"from_{source}", layers="hybrid", feature_dim=4, window=5)
    expected, found = tmp_path / "from_teacher", tmp_path / "from_copy"
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if (expected / file).exists():
            assert (found / file).read_bytes() == (expected / file).read_bytes(), file
    with pytest.raises(ConversionError, match="or a ReBased model with full_attention in every layer"):
        linearize(found, tmp_path / "again")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_window_over_everything_is_exact_where_the_gate_is_closed(tmp_path, kind):
    teacher = make_teacher(tmp_path / "teacher", kind)
    linearize(tmp_path / "teacher", tmp_path / "start", layers="window", window=20, feature_dim=4)
    student = ReBasedForCausalLM.from_pretrained(tmp_path / "start").eval()
    assert student.config.layer_types == ["hybrid_sliding"] * 4
    with torch.no_grad():
        for layer in student.model.layers:
            assert (layer.self_attn.gate == 0).all()
            layer.self_attn.gate.fill_(-100.0)
        torch.testing.assert_close(student(make_ids()).logits, teacher(make_ids()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", "pure"),
        ("llama", "window"),
        ("llama3", "hybrid"),
        ("mistral", "pure"),
        ("qwen2", "hybrid"),
        ("qwen3", "window"),
        ("qwen3", "pure"),
    ],
)
def test_every_variant_starts_finite_and_saves(tmp_path, kind, layers):
    make_teacher(tmp_path / "teacher", kind)
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    GenerationConfig(eos_token_id=[7, 8], do_sample=True, temperature=0.3).save_pretrained(tmp_path / "teacher")
    report = linearize(tmp_path / "teacher", tmp_path / "start", layers=layers, feature_dim=4)
    student = ReBasedForCausalLM.from_pretrained(tmp_path / "start").eval()
    assert student.config.rope_linear_attention == (kind != "llama3")
    assert (tmp_path / "start" / "tokenizer.json").is_file()
    assert student.generation_config.eos_token_id == [7, 8] and student.generation_config.temperature == 0.3
    with torch.no_grad():
        assert student(make_ids()).logits.isfinite().all()
    kinds = {
        "pure": "4 linear_attention",
        "window": "4 hybrid_sliding",
        "hybrid": "1 full_attention, 3 hybrid_sliding",
    }
    assert kinds[layers] in str(report)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_what_is_copied_is_copied_bit_for_bit(tmp_path, kind):
    teacher = make_teacher(tmp_path / "teacher", kind).state_dict()
    linearize(tmp_path / "teacher", tmp_path / "start", layers="window")
    student = ReBasedForCausalLM.from_pretrained(tmp_path / "start").state_dict()
    for name, tensor in teacher.items():
        window = re.sub(r"\.([qk]_(proj|norm)\.)", r".window_\1", name)
        assert torch.equal(student[window], tensor), name


def test_the_whole_head_is_kept_where_there_is_room():
    queries, keys = torch.randn(6, 8, 20).double(), torch.randn(3, 8, 20).double()
    new_q, new_k = reduce_heads(queries, keys, 8, rotated=False)
    for i in range(6):
        torch.testing.assert_close(new_q[i].T @ new_k[i // 2], queries[i].T @ keys[i // 2])


@pytest.mark.parametrize("rotated", [False, True])
def test_the_reduction_finds_what_there_is(rotated):
    """Heads of size 8 that vary in two numbers only, a pair of one frequency, lose nothing in four."""
    torch.manual_seed(0)
    queries, keys = torch.zeros(4, 8, 20).double(), torch.zeros(2, 8, 20).double()
    queries[:, 2::4], keys[:, 2::4] = torch.randn(4, 2, 20).double(), torch.randn(2, 2, 20).double()
    new_q, new_k = reduce_heads(queries, keys, 4, rotated)
    assert new_q.shape == (4, 4, 20) and new_k.shape == (2, 4, 20)
    for i in range(4):
        torch.testing.assert_close(new_q[i].T @ new_k[i // 2], queries[i].T @ keys[i // 2])


def test_the_reduction_is_the_best_one():
    """For one head it is the truncated singular value decomposition of the bilinear form."""
    queries, keys = torch.randn(1, 8, 20).double(), torch.randn(1, 8, 20).double()
    new_q, new_k = reduce_heads(queries, keys, 3, rotated=False)
    s = torch.linalg.svdvals(queries[0].T @ keys[0])
    error = (queries[0].T @ keys[0] - new_q[0].T @ new_k[0]).square().sum()
    torch.testing.assert_close(error, s[3:].square().sum())


def test_norms_of_the_teacher_go_into_the_linear_projections(tmp_path):
    """With room for the whole head its scores are the teacher's but for a factor of each query and key head."""
    teacher = make_teacher(tmp_path / "teacher", "qwen3").state_dict()
    linearize(tmp_path / "teacher", tmp_path / "start", layers="pure", feature_dim=24, rotate=False)
    config = ReBasedForCausalLM.from_pretrained(tmp_path / "start").config
    assert config.softmax_qk_norm and config.feature_dim == config.head_dim == 24
    root = "model.layers.1.self_attn."
    q, k = (teacher[f"{root}{x}_proj.weight"].unflatten(0, (-1, 24)) for x in "qk")
    q, k = (x / x.square().sum((1, 2), keepdim=True).div(24).sqrt() for x in (q, k))
    q, k = (x * teacher[f"{root}{name}_norm.weight"][:, None] for x, name in ((q, "q"), (k, "k")))
    parts = _reduce_layer(teacher, config, 1)
    new_q, new_k = (parts[f"{x}_proj.weight"].unflatten(0, (-1, 24)) for x in "qk")
    for i in range(4):
        torch.testing.assert_close(new_q[i].T @ new_k[i // 2], q[i].T @ k[i // 2], rtol=1e-4, atol=1e-5)


def test_rotation_commutes_with_the_reduction():
    """A head whose pair 2 of 4 alone varies: after rotation its scores over a distance are what they were."""
    torch.manual_seed(0)
    queries, keys = torch.zeros(1, 8, 20).double(), torch.zeros(1, 8, 20).double()
    queries[:, 2::4], keys[:, 2::4] = torch.randn(1, 2, 20).double(), torch.randn(1, 2, 20).double()
    new_q, new_k = reduce_heads(queries, keys, 4, rotated=True)

    def rotate(x, position):
        size = x.shape[0]
        angle = position * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
        cos, sin = angle.cos().repeat(2)[:, None], angle.sin().repeat(2)[:, None]
        return x * cos + torch.cat([-x[size // 2 :], x[: size // 2]]) * sin

    for distance in (0, 1, 7):
        before = rotate(queries[0], distance).T @ keys[0]
        torch.testing.assert_close(rotate(new_q[0], distance).T @ new_k[0], before)


def test_beta_makes_the_kernel_that_is_promised():
    features = 16
    q, k = (torch.nn.functional.layer_norm(torch.randn(5, features), (features,)) for _ in range(2))
    s = (q * k).sum(-1) / math.sqrt(features)
    beta = exp_beta(features, 2.0)
    with_beta = ((q + beta) * (k + beta)).sum(-1) / math.sqrt(features)
    torch.testing.assert_close(with_beta.square(), (2 + s) ** 2)


BAD = {
    "layers": ({"layers": "none"}, {}, "--layers is 'none'; it must be one of pure, window, hybrid, softmax, or 4 of"),
    "count": ({"layers": "full_attention"}, {}, "--layers is 'full_attention'"),
    "window": ({"window": 0}, {}, "--window is 0; it must be at least 2"),
    "feature_dim": ({"feature_dim": 17}, {}, "--feature-dim is 17; it must be 1 to the model's head_dim, 16"),
    "rotate": ({"feature_dim": 5, "rotate": True}, {}, "--rotate needs an even --feature-dim"),
    "bias": ({}, {"attention_bias": True}, "attention_bias True"),
    "act": ({}, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_and_models_leave_nothing(tmp_path, case):
    options, fields, message = BAD[case]
    make_teacher(tmp_path / "teacher", **fields)
    with pytest.raises(ConversionError, match=message):
        linearize(tmp_path / "teacher", tmp_path / "start", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_other_families_and_damaged_weights(tmp_path):
    with pytest.raises(ConversionError, match="no configuration of a known model"):
        linearize(tmp_path, tmp_path / "start")
    for name in ("nowhere", "nowhere.gguf"):
        with pytest.raises(ConversionError, match=f"{name}' is missing; it must be the folder of a model, or a .gguf"):
            linearize(tmp_path / name, tmp_path / "start")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"model\.pt' is a file; it must be the folder of a model, or a .gguf"):
        linearize(tmp_path / "model.pt", tmp_path / "start")
    make_teacher(tmp_path / "mistral", "mistral", sliding_window=8)
    with pytest.raises(ConversionError, match="sliding_window 8"):
        linearize(tmp_path / "mistral", tmp_path / "start")
    ReBasedForCausalLM(ReBasedConfig(vocab_size=11, hidden_size=12, num_hidden_layers=1)).save_pretrained(
        tmp_path / "ours"
    )
    known = "llama, mistral, qwen2, qwen3, or a ReBased model with full_attention"
    with pytest.raises(ConversionError, match=f"model_type 'rebased'; it must be one of {known}"):
        linearize(tmp_path / "ours", tmp_path / "start")
    make_teacher(tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ConversionError, match="cannot be loaded"):
        linearize(tmp_path / "teacher", tmp_path / "start", dry_run=True)
    assert not (tmp_path / "start").exists()


def write_gguf(path, teacher, fields=None, tensors=None):
    """The teacher as llama.cpp's converter writes it, without a tokenizer.

    Pairs of rotated numbers lie side by side in architecture llama only, and `head_dim` is `key_length` but in qwen2.
    `fields` (strings and numbers) and `tensors` are added to the file's own.
    """
    gguf = pytest.importorskip("gguf")
    config = teacher.config
    kind = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    if kind == "llama":
        writer.add_rope_dimension_count(head_dim)
    if kind == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), config.num_hidden_layers
    )
    for name, tensor in teacher.state_dict().items():
        for x, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if kind == "llama" and f".{x}_proj." in name:
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"head_dim": 24, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 of the size the library takes for granted": ("qwen3", {"head_dim": 128}),
}
# Not the library's default, nor that of any of these models.
ROPE = {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(tmp_path, case):
    """transformers reads qwen2 with its biases, and qwen3 with its norms, but takes heads of qwen3 to be of 128."""
    kind, fields = GGUF[case]
    teacher = make_teacher(tmp_path / "teacher", kind, rope_parameters=ROPE, **fields)
    write_gguf(tmp_path / "model.gguf", teacher)
    linearize(tmp_path / "model.gguf", tmp_path / "softmax", layers="softmax")
    student = ReBasedForCausalLM.from_pretrained(tmp_path / "softmax").eval()
    with torch.no_grad():
        torch.testing.assert_close(student(make_ids()).logits, teacher(make_ids()).logits, atol=1e-5, rtol=1e-5)

    report = linearize(tmp_path / "model.gguf", tmp_path / "from_gguf", layers="hybrid", feature_dim=4)
    linearize(tmp_path / "teacher", tmp_path / "from_folder", layers="hybrid", feature_dim=4)
    one, other = (ReBasedForCausalLM.from_pretrained(tmp_path / name) for name in ("from_gguf", "from_folder"))
    assert one.config.rope_parameters == other.config.rope_parameters
    assert one.config.tie_word_embeddings == other.config.tie_word_embeddings
    one, other = one.state_dict(), other.state_dict()
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert "no tokenizer" in str(report)


PASSED_OVER = {
    "llama 3's rotation": ({"tensors": {"rope_freqs.weight": torch.arange(1.0, 9.0)}}, "'rope_freqs.weight'"),
    "scaled rotation": ({"fields": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type 'yarn'"),
    "bias": ({"tensors": {"blk.2.attn_q.bias": torch.ones(64)}}, "the tensor 'blk.2.attn_q.bias'"),
    "window": ({"fields": {"llama.attention.sliding_window": 32}}, "attention.sliding_window 32"),
    "partial rotation": ({"fields": {"llama.attention.key_length": 32}}, "rope.dimension_count 16"),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_a_gguf_of_which_the_library_passes_over_something_is_refused(tmp_path, case):
    written, message = PASSED_OVER[case]
    write_gguf(tmp_path / "model.gguf", make_teacher(tmp_path / "teacher"), **written)
    with pytest.raises(ConversionError, match=f"does not read of a GGUF file, .*{message}"):
        linearize(tmp_path / "model.gguf", tmp_path / "start")
    assert not (tmp_path / "start").exists()


def test_a_gguf_with_a_rotation_scaled_by_one_and_a_damaged_one(tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    write_gguf(tmp_path / "model.gguf", teacher, tensors={"rope_freqs.weight": torch.ones(8)})
    linearize(tmp_path / "model.gguf", tmp_path / "start")
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (10, 500, len(whole) // 2, len(whole) - 50):
        (tmp_path / "model.gguf").write_bytes(whole[:size])
        with pytest.raises(ConversionError, match=r"model\.gguf"):
            linearize(tmp_path / "model.gguf", tmp_path / "start", overwrite=True)
    partial = {name: tensor for name, tensor in teacher.state_dict().items() if "2.mlp.up" not in name}
    teacher.state_dict = lambda: partial
    write_gguf(tmp_path / "model.gguf", teacher)
    with pytest.raises(ConversionError, match=r"missing 'model.layers.2.mlp.up_proj.weight'; unknown none"):
        linearize(tmp_path / "model.gguf", tmp_path / "start", overwrite=True)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_weights_that_the_library_makes_up_or_passes_over(tmp_path, change):
    make_teacher(tmp_path / "teacher")
    path = tmp_path / "teacher" / "model.safetensors"
    state = load_file(path)
    weight = state.pop("model.layers.1.mlp.up_proj.weight")
    if change == "unknown":
        state |= {"model.layers.1.mlp.up_proj.weight": weight, "model.layers.1.mlp.up_proj.bias": weight[:, 0].clone()}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=f"does not fit its configuration: .*{change} 'model.layers.1.mlp.up"):
        linearize(tmp_path / "teacher", tmp_path / "start")
    assert not (tmp_path / "start").exists()


def test_the_special_tokens_of_a_gguf_are_the_configurations(tmp_path, monkeypatch):
    """transformers 5.17 reads them wrong."""
    config = LlamaConfig(**SIZES, bos_token_id=65, eos_token_id=256, pad_token_id=257)
    wrong = byte_tokenizer()
    wrong.eos_token, wrong.pad_token = "A", None
    wrong.init_kwargs |= {"eos_token_id": 65, "pad_token_id": None}
    with monkeypatch.context() as patched:
        patched.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: wrong)
        gguf_tokenizer(tmp_path, {}, config).save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (65, 256, 257)


def test_to_rebased(tmp_path):
    torch.manual_seed(0)
    config = ReBasedConfig(vocab_size=50, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, kernel="based")
    based = ReBasedForCausalLM(config)
    based.save_pretrained(tmp_path / "based")
    to_rebased(tmp_path / "based", tmp_path / "start")
    start = ReBasedForCausalLM.from_pretrained(tmp_path / "start")
    assert start.config.kernel == "rebased" and start.config.coefficients == (0, 0, 1)
    assert start.config.normalize and start.config.use_gamma and start.config.use_beta
    for name, tensor in based.state_dict().items():
        assert torch.equal(start.state_dict()[name], tensor), name
    ids = torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(0))
    loss = start(ids, labels=ids).loss
    loss.backward()
    assert abs(loss.item() - based(ids, labels=ids).loss.item()) < 0.2
    assert all(p.grad is None or p.grad.isfinite().all() for p in start.parameters())
    with pytest.raises(ConversionError, match="must be a Based model"):
        to_rebased(tmp_path / "start", tmp_path / "again")


def test_a_start_that_is_fitted(tmp_path):
    """Only what attends is changed, each layer's output comes closer to the teacher's, and the model too."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "teacher")
    sizes = SIZES | {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5)).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(2000)))
    options = {"layers": "linear_attention,hybrid_sliding", "feature_dim": 8, "window": 8, "decay": "gate"}
    linearize(tmp_path / "teacher", tmp_path / "plain", **options)
    fit = {"fit": [tmp_path / "text.txt"], "fit_tokens": 512}
    report = linearize(tmp_path / "teacher", tmp_path / "fitted", **options, **fit)
    said = next(note for note in report.notes if note.startswith("relative error"))
    before, after = (float(number) for number in re.findall(r"\d\.\d+", said))
    assert after < 0.9 * before
    plain, fitted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fitted"))
    # The decay starts with next to none: what is left after a token is 1 / 8192 less than all.
    decay = {part: plain[f"model.layers.0.self_attn.decay_proj.{part}"] for part in ("weight", "bias")}
    assert not decay["weight"].any()
    torch.testing.assert_close(1 - decay["bias"].double().sigmoid(), torch.full_like(decay["bias"], 1 / 8193).double())
    changed = {name for name in plain if not torch.equal(plain[name], fitted[name])}
    parts = [f"{x}_{part}" for x in "qk" for part in ("proj.weight", "norm.weight", "norm.bias")]
    parts += ["decay_proj.weight", "decay_proj.bias"]
    expected = {f"model.layers.{i}.self_attn.{part}" for i in (0, 1) for part in parts}
    assert changed == expected | {"model.layers.1.self_attn.gate"}
    ids = TokenBlocks([str(tmp_path / "text.txt")], tokenizer, 512).blocks(1, 2)
    with torch.no_grad():
        target = teacher(ids).logits
        far, near = (
            (ReBasedForCausalLM.from_pretrained(tmp_path / name)(ids).logits - target).square().mean()
            for name in ("plain", "fitted")
        )
    assert near < 0.9 * far


def test_what_is_for_linear_layers_needs_one(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "teacher")
    for option in ({"decay": "gate"}, {"feature_dim": 4}, {"rotate": False}, {"fit": ["text.txt"]}):
        name = next(iter(option)).replace("_", "-")
        with pytest.raises(
            ConversionError, match=f"--{name} has no place: with --layers 'softmax' no layer is linear"
        ):
            linearize(tmp_path / "teacher", tmp_path / "out", layers="softmax", **option)
    for option, message in (
        ({"layers": "pure", "window": 8}, "--window has no place: with --layers 'pure' no layer has a window"),
        ({"layers": "pure", "fit_tokens": 1024}, "--fit-tokens has no place: nothing is fitted without --fit"),
        ({"layers": "window", "window": 1}, "--window is 1; it must be at least 2"),
    ):
        with pytest.raises(ConversionError, match=message):
            linearize(tmp_path / "teacher", tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_what_a_fit_needs(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(ConversionError, match="--fit needs a tokenizer"):
        linearize(tmp_path / "teacher", tmp_path / "out", fit=[tmp_path / "text.txt"])
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    for fit, message in (
        ({"fit": [tmp_path / "text.txt"]}, "the length of a row is 512, but .* holds only 6 tokens"),
        ({"fit": [tmp_path / "none.txt"]}, "--fit: .*none"),
        ({"fit": [tmp_path / "text.txt"], "fit_tokens": 5}, "--fit-tokens is 5"),
    ):
        with pytest.raises(ConversionError, match=message):
            linearize(tmp_path / "teacher", tmp_path / "out", **fit)
    assert not (tmp_path / "out").exists()
