"""Convert the released models of Based to this package.

The models are those of Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff"
(2024). HazyResearch published them as based-360m, based-1b and based-1b-50b. Most of their layers are gated short
convolutions. Between them stand Taylor linear attention and sliding-window softmax attention with rotary positions.
Norms are RMSNorm and MLPs are SwiGLU. The names of the tensors are those of flash-attn's GPT model. A folder of the
Hub has a `config.json` of transformers' GPT2 with more fields. What neither this file nor the tensors tell must be
given as an argument.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from modeling_rebased import ReBasedConfig

from .layout import State, by_layer, check_against, find_prefix, make_config, matrix_size, same_bytes, set_same_size
from .reading import load_tokenizer, read_state_dict, read_weights
from .report import ConversionError, Report, progress, some
from .writing import check_destination, write_model, written


EMBEDDING = "transformer.embeddings.word_embeddings.weight"
FINAL_NORM = "transformer.ln_f.weight"
HEAD = "lm_head.weight"
# A buffer of some of their models. Their linear attention leaves it aside unless a layer has a `decay_proj` too.
DECAY = "transformer.decay.decay"
LAYER = re.compile(r"transformer\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
# Counters of their trainer that lie among the weights, such as train_metrics.num-tokens.count.
METRICS = r"(^|\.)(train|val|test)_metrics\."

# Names inside a layer, theirs to ours. A tensor that holds several of ours has them one below the other.
BLOCK = {
    "norm1.weight": ("input_layernorm.weight",),
    "norm2.weight": ("post_attention_layernorm.weight",),
    # Their GatedMlp is fc2(y * silu(gate)) with y, gate the halves of fc1's output, in this order.
    "mlp.fc1.weight": ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    "mlp.fc2.weight": ("mlp.down_proj.weight",),
}
MIXERS: dict[str, dict[str, tuple[str, ...]]] = {
    "conv": {
        "mixer.in_proj.weight": ("conv.in_proj.weight",),
        "mixer.in_proj.bias": ("conv.in_proj.bias",),
        "mixer.conv.conv.weight": ("conv.conv.weight",),
        "mixer.conv.conv.bias": ("conv.conv.bias",),
        "mixer.out_proj.weight": ("conv.out_proj.weight",),
        "mixer.out_proj.bias": ("conv.out_proj.bias",),
    },
    "linear_attention": {
        "mixer.proj_q.weight": ("self_attn.q_proj.weight",),
        "mixer.proj_k.weight": ("self_attn.k_proj.weight",),
        "mixer.proj_v.weight": ("self_attn.v_proj.weight",),
        "mixer.out_proj.weight": ("self_attn.o_proj.weight",),
    },
    "sliding_attention": {
        "mixer.Wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "mixer.out_proj.weight": ("self_attn.o_proj.weight",),
    },
}
CONV_BIAS = "mixer.conv.conv.bias"


def from_based(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    num_heads: int | None = None,
    window_size: int | None = None,
    attention_eps: float | None = None,
    norm_eps: float | None = None,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
    tokenizer: str | os.PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Convert a released model of Based into a folder for `from_pretrained`.

    An argument that is given takes precedence over `config.json`.

    Args:
        source: a folder of the Hub (`config.json`, and `model.safetensors` or `pytorch_model.bin`), or a file of
            `torch.save` or safetensors. The file holds the `state_dict`, alone or under "state_dict",
            "model_state_dict" or "model".
        destination: the new folder.
        num_heads: number of heads of the attention layers. No tensor tells it, so it is needed without a
            `config.json`. It is 16 in the released models.
        window_size: the value in the published configurations. A token sees itself and the `window_size // 2` tokens
            before it, so `sliding_window` is half of it and one more. No tensor tells it either.
        attention_eps: number added to the normaliser of the linear attention. By default 1e-12, as published.
        norm_eps: epsilon of RMSNorm. By default 1e-5.
        rope_theta: base of the rotary embedding. By default 10000.
        max_position_embeddings: the length of training. By default 2048.
        tokenizer: folder with the models' tokenizer, which is GPT-2's. By default the one in `source`, if any.
        overwrite: whether to replace `destination` if it exists.
        dry_run: whether to only report what maps where.

    Returns:
        A report of what maps where and what was inferred.

    Raises:
        ConversionError: an argument, a tensor or a field of `config.json` is wrong; the message names it. Nothing is
            left behind.
    """
    check_destination(destination, overwrite, source)
    theirs, state, left_out = read_checkpoint(Path(source))
    check_config(theirs)
    prefix = find_prefix(state, FINAL_NORM, "a model of Based")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    notes = []
    if left_out:
        notes.append(f"left out, no weights: {some(left_out)}")
    if DECAY in state:
        del state[DECAY]
        notes.append(f"left out: {DECAY}, which acts through a decay_proj alone, and this model has none")
    linear, sliding = _mixer(theirs, "LinearAttention"), _mixer(theirs, "Slid")
    settings = {
        "num_heads": _settle("n_head", num_heads, theirs),
        "window_size": _settle("window_size", window_size, sliding),
        "attention_eps": _settle("eps", attention_eps, linear, 1e-12),
        "norm_eps": _settle("layer_norm_epsilon", norm_eps, theirs, 1e-5),
        "rope_theta": _settle("rotary_emb_base", rope_theta, theirs, 10000.0),
        "max_position_embeddings": _settle("n_positions", max_position_embeddings, theirs, 2048),
        "bos_token_id": _settle("bos_token_id", None, theirs),
        "eos_token_id": _settle("eos_token_id", None, theirs),
    }
    config, mapping = read_layout(state, settings, notes)
    _check_used(
        config,
        {
            "--num-heads": (num_heads, {"linear_attention", "sliding_attention"}),
            "--window-size": (window_size, {"sliding_attention"}),
            "--rope-theta": (rope_theta, {"sliding_attention"}),
            "--attention-eps": (attention_eps, {"linear_attention"}),
        },
    )
    tokens = load_tokenizer(Path(source), tokenizer, config) if tokenizer or Path(source).is_dir() else None
    if tokens is None:
        notes.append("no tokenizer: theirs is GPT-2's (--tokenizer)")

    report = Report(str(source), str(destination), notes=notes, dry_run=dry_run)
    result: State = {}
    for name, parts in progress(mapping.items(), "converting"):
        rows = state[name].shape[0] // len(parts)
        for i, ours in enumerate(parts):
            result[ours] = state[name] if len(parts) == 1 else state[name][i * rows : (i + 1) * rows]
            where = "" if len(parts) == 1 else f"[{i * rows}:{(i + 1) * rows}]"
            report.map(prefix + name + where, result[ours], ours)
    check_against(config, result, str(source))
    if not dry_run:
        with written(destination, overwrite, source) as folder:
            write_model(folder, config, result, tokenizer=tokens)
    return report


def _check_used(config: ReBasedConfig, given: dict[str, tuple[float | None, set[str]]]) -> None:
    """Refuse arguments, each with the types of layers that it is for, that no layer needs."""
    for name, (value, types) in given.items():
        if value is not None and not types & set(config.layer_types):
            raise ConversionError(f"{name} is {value}, but SOURCE has no layer of {' or '.join(sorted(types))}.")


def read_checkpoint(source: Path) -> tuple[dict[str, Any], State, list[str]]:
    """Return the fields of `config.json` (none without that file), the tensors, and what is left out beside them.

    Raises:
        ConversionError: there are no weights, or they or the configuration cannot be read.
    """
    if not source.is_dir():
        state, _, beside = read_state_dict(source, skip=METRICS)
        return {}, state, beside
    fields: dict[str, Any] = {}
    path = source / "config.json"
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ConversionError(f"{str(path)!r} is not a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise ConversionError(f"{str(path)!r} holds a {type(fields).__name__}; it must be a JSON object.")
    pickled = source / "pytorch_model.bin"
    if pickled.is_file() and not any(source.glob("model.safetensors*")):
        state, _, beside = read_state_dict(pickled, skip=METRICS)
        return fields, state, beside
    beside = []
    return fields, read_weights(source, skip=METRICS, skipped=beside), beside


def _mixer(theirs: dict[str, Any], word: str) -> dict[str, Any]:
    """Return the part of `config.json` about the mixer whose class has `word` in its name, empty if there is none."""
    for key in ("mixer", "alt_mixer", "alt_mixer_2"):
        part = theirs.get(key)
        if isinstance(part, dict) and word in str(part.get("_target_", "")).rsplit(".", 1)[-1]:
            return part
    return {}


def _settle(field: str, given: float | None, found: dict[str, Any], default: float | None = None) -> Any:
    """Return the argument, else `field` of a part of `config.json`, else the default."""
    value = given if given is not None else found.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConversionError(f"{field} in the config.json of SOURCE is {value!r}; it must be a number.")
    return value


def check_config(theirs: dict[str, Any]) -> None:
    """Check that `config.json` agrees with the released models in all that decides the computation.

    Raises:
        ConversionError: a field does not fit. The message names each one, what it is and what it must be.
    """
    linear, sliding = _mixer(theirs, "LinearAttention"), _mixer(theirs, "Slid")
    feature_map = linear.get("feature_map", {})
    if isinstance(feature_map, dict):
        feature_map = str(feature_map.get("_target_", "TaylorExp")).rsplit(".", 1)[-1]
    heads = theirs.get("n_head")
    rows = [
        ("activation_function", theirs.get("activation_function", "swiglu"), "swiglu"),
        ("rms_norm", theirs.get("rms_norm", True), True),
        ("prenorm", theirs.get("prenorm", True), True),
        ("parallel_block", theirs.get("parallel_block", False), False),
        ("scale_attn_weights", theirs.get("scale_attn_weights", True), True),
        ("scale_attn_by_inverse_layer_idx", theirs.get("scale_attn_by_inverse_layer_idx", False), False),
        ("rotary_emb_fraction", theirs.get("rotary_emb_fraction", 1), 1),
        ("rotary_emb_interleaved", theirs.get("rotary_emb_interleaved", False), False),
        ("rotary_emb_scale_base", theirs.get("rotary_emb_scale_base"), None),
        ("feature_map of the linear attention", feature_map, "TaylorExp"),
        ("num_heads of the linear attention", linear.get("num_heads", heads), heads),
        ("num_heads of the sliding attention", sliding.get("num_heads", heads), heads),
    ]
    wrong = [(name, value, allowed) for name, value, allowed in rows if value != allowed]
    if wrong:
        raise ConversionError(
            "config.json in SOURCE has what a ReBased model has no place for: "
            + "; ".join(f"{name} is {value!r}, must be {allowed!r}" for name, value, allowed in wrong)
            + "."
        )


def read_layout(
    state: State, settings: dict[str, Any], notes: list[str]
) -> tuple[ReBasedConfig, dict[str, tuple[str, ...]]]:
    """Return the configuration, and for each name in the state the names of its parts in this package's model.

    Args:
        state: tensors by their names, without a prefix.
        settings: what the tensors do not tell, by the names of `from_based`'s arguments, and the ids of the tokens
            that begin and end a text, or `None` without such tokens.
        notes: list to which what is inferred is added.

    Raises:
        ConversionError: the tensors are not of such a model, or a setting that they need is `None`.
    """
    if EMBEDDING not in state and HEAD not in state:
        raise ConversionError(f"SOURCE has neither {EMBEDDING!r} nor {HEAD!r}.")
    tied = EMBEDDING not in state or HEAD not in state or same_bytes(state[EMBEDDING], state[HEAD])
    mapping: dict[str, tuple[str, ...]] = {FINAL_NORM: ("model.norm.weight",)}
    mapping |= {name: ("model.embed_tokens.weight",) for name in (EMBEDDING, HEAD) if name in state}
    if not tied:
        mapping[HEAD] = ("lm_head.weight",)
        notes.append(f"{HEAD} differs from the word embedding, so the two are not tied")
    vocab_size, hidden_size = matrix_size(state, EMBEDDING if EMBEDDING in state else HEAD)
    layers = by_layer(state, LAYER, mapping, "released model of Based")
    fields: dict[str, Any] = {}
    kinds = []
    for i, own in enumerate(layers):
        kind, names = _recognise(i, own)
        kinds.append(kind)
        mapping |= {
            f"transformer.layers.{i}.{name}": tuple(f"model.layers.{i}.{ours}" for ours in parts)
            for name, parts in names.items()
        }
        for name, parts in names.items():
            if len(parts) > 1 and (own[name].ndim != 2 or own[name].shape[0] % len(parts)):
                raise ConversionError(
                    f"{name!r} in layer {i} of SOURCE has the shape {list(own[name].shape)}; it must have two "
                    f"dimensions and a multiple of {len(parts)} rows."
                )
        set_same_size(fields, "intermediate_size", own["mlp.fc2.weight"], -1, i)
        if kind == "conv":
            convolution = own[next(name for name in names if names[name] == ("conv.conv.weight",))]
            set_same_size(fields, "conv_intermediate_size", convolution, 0, i)
            set_same_size(fields, "conv_kernel_size", convolution, -1, i)
            bias = any(parts == ("conv.conv.bias",) for parts in names.values())
            if fields.setdefault("conv_bias", bias) != bias:
                raise ConversionError("Some convolutions of SOURCE have a bias and some have none; all must or none.")
    fields |= _attention_fields(layers, kinds, hidden_size, settings, notes)
    if "conv" in kinds:
        fields["conv_type"] = "gated"
    special = {}
    for field in ("bos_token_id", "eos_token_id"):
        special[field] = settings[field]
        if special[field] is None and vocab_size in (50257, 50264):  # GPT-2's, also as they pad it to a multiple of 8
            special[field] = 50256
    config = make_config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        layer_types=kinds,
        kernel="based",
        attention_eps=settings["attention_eps"],
        mlp_type="swiglu",
        norm_type="rmsnorm",
        norm_eps=settings["norm_eps"],
        max_position_embeddings=settings["max_position_embeddings"],
        tie_word_embeddings=tied,
        architectures=["ReBasedForCausalLM"],
        **special,
        **fields,
    )
    notes.append(
        f"{len(layers)} layers: "
        + ", ".join(f"{kinds.count(each)} {each}" for each in sorted(set(kinds)))
        + f"; hidden_size {hidden_size}, attention_eps {config.attention_eps:g}, norm_eps {config.norm_eps:g}"
    )
    return config, mapping


def _recognise(i: int, own: dict[str, torch.Tensor]) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Return which mixer layer i has, and the names in it, each with this package's name."""
    # Their older class names the convolution conv1.
    alias = {name.replace("mixer.conv1.", "mixer.conv."): name for name in own}
    for kind, names in MIXERS.items():
        expected = BLOCK | names
        if CONV_BIAS in names and CONV_BIAS not in alias:
            expected.pop(CONV_BIAS)
        if set(alias) == set(expected):
            return kind, {alias[name]: parts for name, parts in expected.items()}
    if "mixer.decay_proj.weight" in own:
        raise ConversionError(
            f"Layer {i} of SOURCE has a decay that depends on the input (mixer.decay_proj), which a ReBased model "
            "has for squares alone and not for Based's kernel."
        )
    raise ConversionError(
        f"Layer {i} of SOURCE is none of Based's convolution, linear attention and sliding attention with RMSNorm and "
        f"a SwiGLU without biases; it has {sorted(own)[:20]}. Beside {sorted(BLOCK)} it must have "
        + ", or ".join(str(sorted(names)) for names in MIXERS.values())
        + "."
    )


def _attention_fields(
    layers: list[dict[str, torch.Tensor]],
    kinds: list[str],
    hidden_size: int,
    settings: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """Return the configuration's fields of the attention layers."""
    attention = sorted(set(kinds) - {"conv"})
    heads, window = settings["num_heads"], settings["window_size"]
    if not attention:
        return {"num_attention_heads": 1, "head_dim": 1}
    if heads is None:
        raise ConversionError(
            "--num-heads (num_attention_heads) is needed: no tensor tells it, and there is no config.json with "
            "n_head. The released models have 16."
        )
    if not isinstance(heads, int) or heads < 1 or hidden_size % heads:
        raise ConversionError(f"--num-heads is {heads!r}; it must divide hidden_size, {hidden_size}.")
    fields: dict[str, Any] = {"num_attention_heads": heads, "head_dim": hidden_size // heads}
    for i, own in enumerate(layers):
        if kinds[i] == "linear_attention":
            rows = matrix_size(own, "mixer.proj_q.weight")[0]
            if rows % heads:
                raise ConversionError(f"--num-heads is {heads}, but proj_q of layer {i} has {rows} rows.")
            if fields.setdefault("feature_dim", rows // heads) != rows // heads:
                raise ConversionError(
                    f"feature_dim must be one for all layers, but it is {fields['feature_dim']} and, in layer {i}, "
                    f"{rows // heads}."
                )
        elif kinds[i] == "sliding_attention" and own["mixer.Wqkv.weight"].shape[0] != 3 * hidden_size:
            raise ConversionError(
                f"Wqkv of layer {i} has {own['mixer.Wqkv.weight'].shape[0]} rows; it must have 3 * {hidden_size}: as "
                "many heads of keys and values as of queries."
            )
    if "sliding_attention" in kinds:
        if window is None:
            raise ConversionError(
                "--window-size is needed: no tensor tells it, and there is no config.json with the window_size of the "
                "sliding attention. The released configurations have 128 or 256."
            )
        if not isinstance(window, int) or window < 2:
            raise ConversionError(f"--window-size is {window!r}; it must be a whole number of at least 2.")
        fields |= {
            "sliding_window": window // 2 + 1,
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_type": "default", "rope_theta": float(settings["rope_theta"])},
        }
        notes.append(
            f"sliding_window is {window // 2 + 1}: with their window_size {window} a token sees itself and "
            f"{window // 2} before it"
        )
    notes.append(f"num_attention_heads {heads}, feature_dim {fields.get('feature_dim', 'none')}")
    return fields
