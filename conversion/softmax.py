"""Softmax models of the Llama family, and Based models, as the start of a ReBased model.

Nothing here is exact: what is copied is copied bit for bit, and the queries and keys of the linear layers start from
the closest that (q.k)^2 comes to what they replace. Training does the rest; see `distill.py`.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from modeling_rebased import ReBasedConfig
from modeling_rebased.configuration_rebased import LINEAR_LAYER_TYPES

from .files import (
    ConversionError,
    Report,
    State,
    check_against,
    check_destination,
    load_folder,
    load_model,
    make_config,
    model_shapes,
    progress,
    write_model,
    written,
)
from .hub import _load_tokenizer


FAMILY = ("llama", "mistral", "qwen2", "qwen3")
VARIANTS = ("pure", "window", "hybrid", "softmax")


def linearize(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layers: str = "window",
    feature_dim: int = 16,
    window: int = 64,
    rotate: bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Start a ReBased model from a softmax decoder of the Llama family: Llama, SmolLM, Mistral, Qwen2, Qwen3.

    Or from one that was converted with softmax in every layer before, which spares reading a GGUF file again.

    Embeddings, norms, MLP and the value and output projections are copied, and in layers that keep softmax the query
    and key projections too, with the norms that Qwen3 has on them. The queries and keys of the linear layers start as
    `reduce_heads` says, normalised by head, with a beta that makes the kernel (2 + s)^2 / 4 = 1 + s + s^2/4, close to
    exp(s) for small s.

    The result is no finished model, except with softmax in every layer, which says what the original says: train it
    with `distill`.

    Args:
        source: the folder of the model, with safetensors, or a `.gguf` file (with the package gguf installed), whose
            weights are read as float32.
        destination: the folder to make.
        layers: "pure", every layer linear; "window", every layer linear plus a softmax window; "hybrid", every fourth
            layer keeps softmax; "softmax", all do; or a type for each layer, separated by commas:
            "linear_attention", "hybrid_sliding", "full_attention".
        feature_dim: size of a query or key of the linear layers, at most the model's head_dim.
        window: tokens that the window sees.
        rotate: whether queries and keys of the linear layers are rotated by position, as the model's own are. By
            default, if its rotary embedding is of the plain kind and `feature_dim` divides its head_dim.
        overwrite: replace `destination` if it exists.
        dry_run: only report what maps where.

    Returns:
        What maps where.

    Raises:
        ConversionError: the model has something that ours has no place for, or an argument does not fit it.
    """
    check_destination(destination, overwrite, source)
    folder, options = Path(source), {"local_files_only": True}
    is_gguf = folder.suffix == ".gguf"
    if is_gguf:
        folder, options["gguf_file"] = folder.parent, folder.name
    if not (Path(source).is_file() if is_gguf else folder.is_dir()):
        kind = "a file" if folder.is_file() else "missing"
        raise ConversionError(f"SOURCE {str(source)!r} is {kind}; it must be the folder of a model, or a .gguf file.")
    try:
        theirs = AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # the library's errors about configurations are of many kinds
        raise ConversionError(f"SOURCE {str(source)!r} has no configuration of a known model: {error}") from error
    types = layer_types(theirs, layers)
    if is_gguf and theirs.model_type in FAMILY:
        _check_gguf(Path(source), theirs)
    config = student_config(theirs, types, feature_dim, window, rotate)
    dtype = torch.float32 if is_gguf else "auto"
    teacher = load_model(
        AutoModelForCausalLM, folder, f"SOURCE {str(source)!r}", config=theirs, dtype=dtype, **options
    )
    tokens = _gguf_tokenizer(folder, options, theirs) if is_gguf else _load_tokenizer(folder, None, config)

    report = Report(str(source), str(destination), dry_run=dry_run)
    report.notes.append(
        f"{len(types)} layers: " + ", ".join(f"{types.count(each)} {each}" for each in sorted(set(types)))
    )
    if config.rope_linear_attention:
        report.notes.append("queries and keys of the linear layers are rotated by position")
    elif "linear_attention" in types:
        report.notes.append("queries and keys of the linear layers are not rotated by position")
    state = initial_state(teacher.state_dict(), config, report)
    check_against(config, state, str(source))
    if tokens is None:
        report.notes.append("SOURCE has no tokenizer that can be loaded")
    if set(types) != {"full_attention"}:
        how = f"python -m {__package__}.distill"
        report.notes.append(f"the linear layers are a start, not a model: train them ({how})")
    if not dry_run:
        with written(destination, overwrite, source) as path:
            write_model(path, config, state, generation_config=teacher.generation_config, tokenizer=tokens)
    return report


def _check_gguf(path: Path, theirs: PreTrainedConfig) -> None:
    """Check that the library reads all of a GGUF file, and read the size of a head, which it does not always.

    It passes over tensors that it has no place for, scaled rotary embeddings (and with them those of Llama 3.1 and
    after, whose factors are a tensor) and sliding windows, without a word; and it takes Qwen3's heads to be of 128.

    Args:
        path: the file.
        theirs: what the library made of it; `head_dim` is set.

    Raises:
        ConversionError: naming what it would pass over.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()

    def read(name: str) -> Any:
        field = reader.fields.get(f"{kind}.{name}")
        return None if field is None else field.contents()

    head_dim = read("attention.key_length")
    if isinstance(head_dim, int):
        theirs.head_dim = head_dim
    rotated = read("rope.dimension_count")
    size = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    wrong = [
        f"{name} {value!r}"
        for name, value, plain in (
            ("rope.dimension_count", rotated, (None, size)),
            ("rope.scaling.type", read("rope.scaling.type"), (None, "none")),
            ("attention.sliding_window", read("attention.sliding_window"), (None, 0)),
        )
        if value not in plain
    ]
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), None)
    if arch is not None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(theirs)
        names = gguf.get_tensor_name_map(arch, theirs.num_hidden_layers)
        read_names = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
        for tensor in reader.tensors:
            unscaled = tensor.name == "rope_freqs.weight" and (tensor.data == 1).all()
            if tensor.name not in read_names and not unscaled:
                wrong.append(f"the tensor {tensor.name!r}")
    if wrong:
        raise ConversionError(
            f"SOURCE {str(path)!r} has what transformers does not read of a GGUF file, {', '.join(wrong[:5])}, so "
            "that its model would be another one; give the folder with safetensors that the file was made from."
        )


def _gguf_tokenizer(folder: Path, options: dict[str, Any], theirs: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a GGUF file, or `None` where it has none that the library can read."""
    try:
        tokens = AutoTokenizer.from_pretrained(folder, **options)
    except Exception:  # the library raises what it likes; a model without a tokenizer is still a model
        return None
    # transformers 5.17 takes the beginning of a text for its end, and forgets the padding; the configuration is right.
    for name in ("bos", "eos", "pad"):
        token_id = getattr(theirs, f"{name}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            setattr(tokens, f"{name}_token", tokens.convert_ids_to_tokens(token_id))
            tokens.init_kwargs.pop(f"{name}_token_id", None)
    return tokens


def layer_types(theirs: PreTrainedConfig, layers: str) -> list[str]:
    """The type of each layer.

    Raises:
        ConversionError: `layers` is no variant, and no list of as many types as the model has layers.
    """
    count = theirs.num_hidden_layers
    if layers == "hybrid":
        return ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(count)]
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
    theirs: PreTrainedConfig, types: list[str], feature_dim: int, window: int, rotate: bool | None
) -> ReBasedConfig:
    """The configuration of the ReBased model that starts from a model of configuration `theirs`.

    Raises:
        ConversionError: naming the fields of `theirs` that ours has no place for, or the argument that does not fit.
    """
    fields = _model_fields(theirs)
    head_dim, rope = fields["head_dim"], fields["rope_parameters"] or {}
    linear = set(types) & set(LINEAR_LAYER_TYPES)
    if not linear:
        feature_dim = min(feature_dim, head_dim)
    if not 1 <= feature_dim <= head_dim:
        raise ConversionError(f"--feature-dim is {feature_dim}; it must be 1 to the model's head_dim, {head_dim}.")
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
        "attention_eps": 1e-5,
        "rope_linear_attention": bool(linear) and (can if rotate is None else rotate),
        "sliding_window": window,
        "architectures": ["ReBasedForCausalLM"],
    }
    return make_config(**fields)


def _model_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    """The fields of our configuration that say what `theirs` is, whatever its layers become.

    Raises:
        ConversionError: naming the fields of `theirs` that ours has no place for.
    """
    if theirs.model_type == ReBasedConfig.model_type and set(theirs.layer_types) == {"full_attention"}:
        return _own_fields(theirs)
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
            ("a sliding window", sliding, False),
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


def _own_fields(config: ReBasedConfig) -> dict[str, Any]:
    """The fields of a configuration of ours, to make another one of."""
    ignored = ("model_type", "auto_map", "transformers_version", "dtype")
    return {name: value for name, value in config.to_dict().items() if name not in ignored}


def initial_state(teacher: State, config: ReBasedConfig, report: Report) -> State:
    """The weights to start from, by their names in the ReBased model of `config`."""
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


def exp_beta(feature_dim: int, constant: float) -> float:
    """The beta with which the kernel of queries and keys normalised by head is (constant + s)^2.

    Such queries have mean 0, so the vector that is beta everywhere is at right angles to them, and
    (q + beta)(k + beta) = q.k + F beta^2. Over sqrt(F) that is s + constant for beta^2 = constant / sqrt(F).
    """
    return math.sqrt(constant / math.sqrt(feature_dim))


def _reduce_layer(teacher: State, config: ReBasedConfig, i: int) -> dict[str, torch.Tensor]:
    """q_proj and k_proj of a linear layer, from the teacher's.

    Where the teacher normalises its queries and keys their gains become part of the projections. Its division by a
    head's root mean square differs from token to token, which no projection can do and the linear layer's own
    normalisation does again; here it is by what it is for inputs of unit covariance, so that no head outweighs others
    that share its key.
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


def reduce_heads(
    queries: torch.Tensor, keys: torch.Tensor, feature_dim: int, rotated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of `feature_dim` numbers whose products come closest to those of the full ones.

    For x and y of unit covariance the error of the score x^T Q^T K y is the Frobenius norm of Q^T K - Q'^T K', summed
    over the query heads that share a key head. With Q' = B^T Q and K' = A K the best B and A come from a singular
    value decomposition of the size of a head.

    Where queries and keys are rotated by position, pairs of numbers are complex numbers that turn at one frequency
    each, and only numbers of like frequency may be added. The head's pairs are parted into `feature_dim / 2` bands,
    whose first frequency is that of the reduced pair, and each band is reduced to one complex number.

    Args:
        queries: float64 [H, head_dim, inputs].
        keys: float64 [H_kv, head_dim, inputs].
        feature_dim: at most head_dim; with `rotated` an even divisor of it.
        rotated: whether a rotary embedding follows.

    Returns:
        [H, feature_dim, inputs] and [H_kv, feature_dim, inputs].
    """
    group = queries.shape[0] // keys.shape[0]
    queries = queries.unflatten(0, (-1, group))  # [H_kv, group, head_dim, inputs]
    if not rotated:
        new_q, new_k = _best_projection(queries, keys, feature_dim)
        return new_q.flatten(0, 1), new_k
    band = queries.shape[-2] // feature_dim

    def bands(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-2)
        return torch.complex(first, second).unflatten(-2, (feature_dim // 2, band))

    def pairs(x: list[torch.Tensor]) -> torch.Tensor:
        together = torch.cat(x, dim=-2)
        return torch.cat([together.real, together.imag], dim=-2)

    q_bands, k_bands = bands(queries), bands(keys)
    reduced = [_best_projection(q_bands[..., j, :, :], k_bands[..., j, :, :], 1) for j in range(feature_dim // 2)]
    new_q, new_k = pairs([q for q, _ in reduced]), pairs([k for _, k in reduced])
    return new_q.flatten(0, 1), new_k


def _best_projection(queries: torch.Tensor, keys: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, group, d, inputs] and [n, d, inputs] to [n, group, size, inputs] and [n, size, inputs], real or complex."""
    root_q, inverse_q = _square_root((queries @ queries.mH).sum(1))
    root_k, inverse_k = _square_root(keys @ keys.mH)
    u, s, vh = torch.linalg.svd(root_q @ root_k)
    scale = s[:, :size, None].sqrt()
    to_q = scale * (u[..., :size].mH @ inverse_q)
    to_k = scale * (vh[:, :size] @ inverse_k)
    return to_q[:, None] @ queries, to_k @ keys


def _square_root(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of positive semi-definite matrices, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.amax(-1, keepdim=True) * 1e-12
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(values > floor, 1 / root.clamp_min(1e-300), torch.zeros_like(root))

    def build(diagonal: torch.Tensor) -> torch.Tensor:
        return (vectors * diagonal[..., None, :]) @ vectors.mH

    return build(root), build(inverse)


# ---------------------------------------------------------------- Based


def to_rebased(
    source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False, dry_run: bool = False
) -> Report:
    """Start a ReBased model from a Based one of this package.

    All weights are kept. The linear layers get the kernel (q.k)^2 and a normalisation by head with gamma 1 and the
    beta that makes it (1 + s)^2: Based's 1 + s + s^2/2 is half of that plus a half, the part that cannot be ignored.
    Since queries and keys are now normalised their scores are others than before, so the model must be trained
    further; its first loss is finite.

    Args:
        source: the folder of a Based model.
        destination: the folder to make.
        overwrite: replace `destination` if it exists.
        dry_run: only report what maps where.

    Returns:
        What maps where.

    Raises:
        ConversionError: the model is not Based, or its queries and keys are normalised already.
    """
    check_destination(destination, overwrite, source)
    config, state = load_folder(source)
    learnt = config.normalize or config.use_gamma or config.use_beta
    if config.coefficients != (1.0, 1.0, 0.5) or learnt:
        raise ConversionError(
            f"SOURCE {str(source)!r} must be a Based model, kernel_coefficients (1, 1, 0.5) without normalisation, "
            f"but they are {config.coefficients} and (normalize, use_gamma, use_beta) is "
            f"{(config.normalize, config.use_gamma, config.use_beta)}."
        )
    fields = _own_fields(config)
    fields |= {"kernel": "rebased", "kernel_coefficients": None, "qk_norm_scope": "head", "qk_norm_shared": False}
    fields |= {"normalize": True, "use_gamma": True, "use_beta": True}
    new = make_config(**fields)
    report = Report(str(source), str(destination), dry_run=dry_run)
    beta = exp_beta(config.feature_dim, 1.0)
    result: State = {}
    for name, shape in model_shapes(new).items():
        if name in state:
            result[name] = state[name]
            report.map(name, state[name], name)
        else:
            like = state[name.split(".self_attn.")[0] + ".self_attn.q_proj.weight"]
            result[name] = torch.full(shape, 1.0 if name.endswith("weight") else beta, dtype=like.dtype)
            report.map("- (1 or beta)", result[name], name)
    check_against(new, result, str(source))
    report.notes.append("queries and keys are normalised now: train the model further")
    if not dry_run:
        tokens = _load_tokenizer(Path(source), None, new)
        with written(destination, overwrite, source) as path:
            write_model(path, new, result, tokenizer=tokens)
    return report
