"""Start a ReBased model from a softmax model of the Llama family.

What is copied is copied bit for bit. The queries and keys of the linear layers start as close as (q.k)^2 comes to the
softmax that they replace. `distill.py` then trains the model.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.configuration_rebased import LINEAR_LAYER_TYPES
from modeling_rebased.modeling_rebased import GATE_MEMORY
from modeling_rebased.training.text import TokenBlocks
from modeling_rebased.training.values import one_line

from .distill_trainer import TRANSFERRED
from .fit import fit_layers
from .gguf_files import check_gguf, gguf_tokenizer
from .layout import State, check_against, make_config, model_shapes, own_fields
from .reading import load_model, load_tokenizer
from .reduce_heads import exp_beta, reduce_heads
from .report import ConversionError, Report, progress
from .writing import check_destination, write_model, written


FAMILY = ("llama", "mistral", "qwen2", "qwen3")
VARIANTS = ("pure", "window", "hybrid", "softmax")


def linearize(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layers: str = "window",
    feature_dim: int | None = None,
    window: int | None = None,
    rotate: bool | None = None,
    decay: Literal["gate"] | None = None,
    fit: Sequence[str | os.PathLike] | None = None,
    fit_tokens: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Start a ReBased model from a softmax decoder of the Llama family: Llama, SmolLM, Mistral, Qwen2, Qwen3.

    A model that was converted before with softmax in every layer also works, and loads faster than a GGUF file.

    Embeddings, norms, MLP, and the value and output projections are copied. In layers that keep softmax, so are the
    query and key projections, with the norms that Qwen3 has on them. The queries and keys of the linear layers start
    as `reduce_heads` describes. They are normalised per head, with a beta that makes the kernel (2 + s)^2 / 4 = 1 + s
    + s^2/4, which is close to exp(s) for small s.

    The result must be trained with `distill`. Only with softmax in every layer is it a finished model, which computes
    what the original computes.

    Args:
        source: the folder of the model, with safetensors, or a `.gguf` file (with the package gguf installed), whose
            weights are read as float32.
        destination: the new folder.
        layers: "pure" makes every layer linear, and "window" adds a softmax window to each. With "hybrid" every fourth
            layer keeps softmax, and the others are as in "window". With "softmax" all layers keep it. Or a type per
            layer, separated by commas: "linear_attention", "hybrid_sliding", "full_attention".
        feature_dim: size of a query or key of the linear layers, at most the model's head_dim. By default 64, or the
            head_dim if that is smaller.
        window: number of tokens that the window sees, at least 2. By default 64.
        rotate: whether queries and keys of the linear layers are rotated by position, as in the original model. By
            default they are if its rotary embedding is of the plain kind and `feature_dim` divides its head_dim.
        decay: "gate" lets every head of the linear layers forget (the configuration's `decay`). The gate starts the
            same for every token, so that a token keeps 1 / e of its weight after GATE_MEMORY tokens.
        fit: text files, `.npy` files of token ids or folders of shards, to which the linear layers are fitted
            (fit.py). It takes a GPU if there is one.
        fit_tokens: how many tokens of the text are used, in rows of 512 that are spread over it. By default 32,768.
        overwrite: whether to replace `destination` if it exists.
        dry_run: whether to only report what maps where.

    Returns:
        A report of what maps where.

    Raises:
        ConversionError: the model has a part that a ReBased model has no place for, or an argument does not fit it.
    """
    check_destination(destination, overwrite, source)
    folder, options, theirs = _open_source(Path(source))
    types = layer_types(theirs, layers)
    linear = set(types) & set(LINEAR_LAYER_TYPES)
    for name, value in (("--feature-dim", feature_dim), ("--rotate", rotate), ("--decay", decay), ("--fit", fit)):
        if value is not None and not linear:
            raise ConversionError(f"{name} has no place: with --layers {layers!r} no layer is linear.")
    if window is not None and "hybrid_sliding" not in types:
        raise ConversionError(f"--window has no place: with --layers {layers!r} no layer has a window.")
    if fit_tokens is not None and fit is None:
        raise ConversionError("--fit-tokens has no place: nothing is fitted without --fit.")
    config = student_config(theirs, types, feature_dim, 64 if window is None else window, rotate, decay)
    is_gguf = "gguf_file" in options
    dtype = torch.float32 if is_gguf else "auto"
    teacher = load_model(
        AutoModelForCausalLM, folder, f"SOURCE {str(source)!r}", config=theirs, dtype=dtype, **options
    )
    tokens = gguf_tokenizer(folder, options, theirs) if is_gguf else load_tokenizer(folder, None, config)

    report = Report(str(source), str(destination), dry_run=dry_run)
    report.notes.append(
        f"{len(types)} layers: " + ", ".join(f"{types.count(each)} {each}" for each in sorted(set(types)))
    )
    if linear:
        rotated = "rotated" if config.rope_linear_attention else "not rotated"
        report.notes.append(f"queries and keys of the linear layers are {rotated} by position")
    state = initial_state(teacher.state_dict(), config, report)
    check_against(config, state, str(source))
    if tokens is None:
        report.notes.append("SOURCE has no tokenizer that can be loaded")
    if linear:
        report.notes.append("the linear layers are a start, not a model: train them (rebased-distill)")
    if fit is not None:
        if tokens is None:
            raise ConversionError("--fit needs a tokenizer, and SOURCE has none that can be loaded.")
        ids = _rows_to_fit(fit, tokens, 32768 if fit_tokens is None else fit_tokens)
        report.notes.append(
            f"queries, keys, norms, gates and decays are fitted to the teacher's attention on {ids.numel()} tokens"
        )
        if not dry_run:
            state = _fitted(teacher, config, state, ids, report)
    if not dry_run:
        with written(destination, overwrite, source) as path:
            write_model(path, config, state, generation_config=teacher.generation_config, tokenizer=tokens)
    return report


def _open_source(source: Path) -> tuple[Path, dict[str, Any], PreTrainedConfig]:
    """Return the folder of a model, what `from_pretrained` must be told to read it from there, and its configuration.

    Raises:
        ConversionError: there is no model, or none that a ReBased model can start from.
    """
    folder = source
    options: dict[str, Any] = {"local_files_only": True}
    is_gguf = source.suffix == ".gguf"
    if is_gguf:
        folder, options["gguf_file"] = source.parent, source.name
    if not (source.is_file() if is_gguf else source.is_dir()):
        kind = "a file" if source.is_file() else "missing"
        raise ConversionError(f"SOURCE {str(source)!r} is {kind}; it must be the folder of a model, or a .gguf file.")
    try:
        theirs = AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # the library's errors about configurations are of many kinds
        raise ConversionError(
            f"SOURCE {str(source)!r} has no configuration of a known model: {one_line(error)}"
        ) from error
    if is_gguf and theirs.model_type in FAMILY:
        check_gguf(source, theirs)
    return folder, options, theirs


def _rows_to_fit(files: Sequence[str | os.PathLike], tokenizer: PreTrainedTokenizerBase, count: int) -> torch.Tensor:
    """Return about `count` tokens of the files, int64 [B, 512]."""
    if count < 512:
        raise ConversionError(f"--fit-tokens is {count}; it must be at least 512.")
    try:
        blocks = TokenBlocks(list(map(str, files)), tokenizer, 512, argument="the length of a row")
    except (ValueError, OSError) as error:
        raise ConversionError(f"--fit: {error}") from error
    rows = min(count // 512, len(blocks))
    places = [i * len(blocks) // rows for i in range(rows)]
    return torch.cat([blocks.blocks(i, i + 1) for i in places])


def _fitted(teacher: PreTrainedModel, config: ReBasedConfig, state: State, ids: torch.Tensor, report: Report) -> State:
    """Return the state whose linear layers are fitted to the teacher's attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = ReBasedForCausalLM(config)
    student.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    student.tie_weights()
    errors = fit_layers(teacher.to(device).eval(), student.to(device).eval(), ids)
    before, after = (sum(each) / len(errors) for each in zip(*errors))
    report.notes.append(f"relative error of the linear layers' outputs: {before:.3f} before, {after:.3f} now")
    new = student.cpu().state_dict()
    return {name: new[name].to(tensor.dtype) if _is_fitted(name) else tensor for name, tensor in state.items()}


def _is_fitted(name: str) -> bool:
    return ".self_attn." in name and name.split(".self_attn.")[-1].startswith(TRANSFERRED)


def layer_types(theirs: PreTrainedConfig, layers: str) -> list[str]:
    """Return the type of each layer.

    Raises:
        ConversionError: `layers` is neither a variant nor a list with one type per layer.
    """
    count = theirs.num_hidden_layers
    if layers == "hybrid":
        return ["full_attention" if i % 4 == 3 else "hybrid_sliding" for i in range(count)]
    if layers in VARIANTS:
        return [{"pure": "linear_attention", "window": "hybrid_sliding", "softmax": "full_attention"}[layers]] * count
    types = layers.split(",")
    known = ("linear_attention", "hybrid_sliding", "full_attention")
    if len(types) != count or set(types) - set(known):
        raise ConversionError(
            f"--layers is {layers!r}; it must be one of {', '.join(VARIANTS)}, or {count} of {', '.join(known)}, "
            "separated by commas."
        )
    return types


def student_config(
    theirs: PreTrainedConfig,
    types: list[str],
    feature_dim: int | None,
    window: int,
    rotate: bool | None,
    decay: str | None = None,
) -> ReBasedConfig:
    """Return the configuration of the ReBased model that starts from a model of configuration `theirs`.

    Raises:
        ConversionError: fields of `theirs` have no place in a ReBased model, or an argument does not fit. The message
            names them.
    """
    fields = _model_fields(theirs)
    head_dim, rope = fields["head_dim"], fields["rope_parameters"] or {}
    linear = set(types) & set(LINEAR_LAYER_TYPES)
    if feature_dim is None:
        feature_dim = min(64, head_dim)
    if not 1 <= feature_dim <= head_dim:
        raise ConversionError(f"--feature-dim is {feature_dim}; it must be 1 to the model's head_dim, {head_dim}.")
    if window < 2:
        raise ConversionError(f"--window is {window}; it must be at least 2.")
    plain = fields["position_embedding_type"] == "rope" and rope.get("rope_type", "default") == "default"
    can = plain and feature_dim % 2 == 0 and head_dim % feature_dim == 0
    if rotate and not can:
        raise ConversionError(
            f"--rotate needs an even --feature-dim that divides head_dim ({head_dim}) and a plain rotary embedding, "
            f"but they are {feature_dim} and {rope.get('rope_type', 'default')!r}."
        )
    fields |= {
        "layer_types": types,
        "feature_dim": feature_dim,
        "kernel": "rebased",
        **dict.fromkeys(("kernel_coefficients", "normalize", "use_gamma", "use_beta")),  # as the kernel has them
        "qk_norm_scope": "head",
        "qk_norm_shared": False,
        "decay": decay,
        "attention_eps": 1e-5,
        "rope_linear_attention": bool(linear) and (can if rotate is None else rotate),
        "sliding_window": window,
        "architectures": ["ReBasedForCausalLM"],
    }
    return make_config(**fields)


def _model_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of the ReBased configuration that follow from `theirs`, whatever its layers become.

    Raises:
        ConversionError: fields of `theirs` have no place in a ReBased model. The message names them.
    """
    if theirs.model_type == ReBasedConfig.model_type and set(theirs.layer_types) == {"full_attention"}:
        return own_fields(theirs)
    if theirs.model_type not in FAMILY:
        raise ConversionError(
            f"SOURCE has model_type {theirs.model_type!r}; it must be one of {', '.join(FAMILY)}, or a ReBased model "
            "with full_attention in every layer."
        )
    rope = dict(theirs.rope_parameters)
    qwen2 = theirs.model_type == "qwen2"  # biases on q, k and v, always, and none on o
    sliding = "sliding_attention" in (getattr(theirs, "layer_types", None) or [])
    sliding |= theirs.model_type == "mistral" and theirs.sliding_window is not None
    wrong = [
        (name, value)
        for name, value, allowed in (
            ("hidden_act", theirs.hidden_act, "silu"),
            ("attention_bias", getattr(theirs, "attention_bias", False), False),
            ("mlp_bias", getattr(theirs, "mlp_bias", False), False),
            ("sliding_window", theirs.sliding_window if sliding else None, None),
            ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        )
        if value != allowed
    ]
    if wrong:
        raise ConversionError(
            "SOURCE has what a ReBased model has no place for: " + ", ".join(f"{n} {v!r}" for n, v in wrong) + "."
        )
    return {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "num_hidden_layers": theirs.num_hidden_layers,
        "num_attention_heads": theirs.num_attention_heads,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "attention_bias": qwen2,
        "softmax_qk_norm": theirs.model_type == "qwen3",
        "mlp_type": "swiglu",
        "intermediate_size": theirs.intermediate_size,
        "norm_type": "rmsnorm",
        "norm_eps": theirs.rms_norm_eps,
        "max_position_embeddings": theirs.max_position_embeddings,
        "position_embedding_type": "rope",
        "rope_parameters": rope,
        "initializer_range": theirs.initializer_range,
        "tie_word_embeddings": theirs.tie_word_embeddings,
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
        "pad_token_id": theirs.pad_token_id,
    }


def initial_state(teacher: State, config: ReBasedConfig, report: Report) -> State:
    """Return the weights to start from, by their names in the ReBased model of `config`."""
    state: State = {}
    reduced: dict[int, dict[str, torch.Tensor]] = {}
    beta = exp_beta(config.feature_dim, 2.0)
    for name, shape in progress(model_shapes(config).items(), "copying"):
        origin = name.replace(".window_q_", ".q_").replace(".window_k_", ".k_")
        part = name.split(".self_attn.")[-1]
        i = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        linear = ".self_attn." in name and config.layer_types[i] != "full_attention"
        like = teacher[f"model.layers.{i}.self_attn.q_proj.weight"]
        if linear and part.startswith(("q_norm", "k_norm")):
            state[name] = torch.full(shape, 1.0 if part.endswith("weight") else beta, dtype=like.dtype)
            report.map("- (1 or beta)", state[name], name)
        elif linear and part == "gate":
            state[name] = torch.zeros(shape, dtype=like.dtype)
            report.map("- (0: an even mixture)", state[name], name)
        elif linear and part.startswith("decay_proj"):
            start = math.log(GATE_MEMORY) if part.endswith("bias") else 0.0
            state[name] = torch.full(shape, start, dtype=like.dtype)
            report.map("- (a gate that hardly forgets)", state[name], name)
        elif linear and part.startswith(("q_proj", "k_proj")):
            if i not in reduced:
                reduced.clear()
                reduced[i] = _reduce_layer(teacher, config, i)
            state[name] = reduced[i][part]
            report.map(f"{name} (reduced)", state[name], name)
        else:
            state[name] = teacher[origin]
            report.map(origin, state[name], name)
    return state


def _reduce_layer(teacher: State, config: ReBasedConfig, i: int) -> dict[str, torch.Tensor]:
    """Return q_proj and k_proj of a linear layer, made from those of the teacher.

    If the teacher normalises its queries and keys, the gains become part of the projections. The teacher also divides
    by a head's root mean square, which differs from token to token, so a projection cannot do it. The linear layer's
    own normalisation does it again. Here each head is divided by its root mean square for inputs of unit covariance,
    so that no head outweighs others that share its key.
    """
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    root = f"model.layers.{i}.self_attn."
    stacked = {}
    for x, count in (("q", heads), ("k", kv_heads)):
        weight = teacher[f"{root}{x}_proj.weight"]
        dtype = weight.dtype
        full = weight.double()
        if config.attention_bias:  # a bias is the weight of an input that is always 1
            full = torch.cat([full, teacher[f"{root}{x}_proj.bias"].double()[:, None]], dim=1)
        full = full.unflatten(0, (count, head_dim))  # [H, head_dim, inputs]
        if config.softmax_qk_norm:
            rms = full.square().sum((1, 2), keepdim=True).div(head_dim).sqrt().clamp_min(1e-12)
            full = full / rms * teacher[f"{root}{x}_norm.weight"].double()[:, None]
        stacked[x] = full
    queries, keys = reduce_heads(stacked["q"], stacked["k"], config.feature_dim, config.rope_linear_attention)
    parts = {}
    for x, reduced in (("q", queries), ("k", keys)):
        flat = reduced.flatten(0, 1).to(dtype)
        hidden = config.hidden_size
        parts[f"{x}_proj.weight"] = flat[:, :hidden].contiguous()
        if config.attention_bias:
            parts[f"{x}_proj.bias"] = flat[:, hidden].contiguous()
    return parts
