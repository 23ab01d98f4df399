"""Convert flash-linear-attention's ReBased layers to this package and back, bit for bit.

The library's `ReBasedLinearAttention` normalises each head by itself, with one gamma and beta for queries, keys and
all heads. A checkpoint may hold one such layer, a stack of them, or a model around them. Such a model has RMSNorm and
SwiGLU, and the names that all of the library's models share: `model.embeddings`, `attn_norm`, `mlp_norm` and
`mlp.{gate,up,down}_proj`.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_rebased import ReBasedConfig, ReBasedModel

from .layout import State, check_against, make_config, matrix_size, model_shapes, same_bytes
from .reading import check_tensors, load_config, load_folder, read_safetensors, read_state_dict
from .record import from_record, read_record, write_record
from .report import ConversionError, Report, progress, some
from .writing import check_destination, write_model, write_state_dict, written


# The file of a folder that has attention layers and no model around them.
ATTENTION_FILE = "attention.safetensors"

PROJECTIONS = {f"{x}_proj.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"}
LEARNT = {"feature_map.gamma": "self_attn.q_norm.weight", "feature_map.beta": "self_attn.q_norm.bias"}
BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    **{f"mlp.{x}_proj.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}


def from_fla(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    num_heads: int | None = None,
    normalize: bool | None = None,
    attention_eps: float = 1e-5,
    norm_eps: float | None = None,
    max_position_embeddings: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Convert ReBased layers of flash-linear-attention, or a model of them, into a folder.

    A whole model becomes a folder for `from_pretrained`. Layers alone become a folder with their configuration and
    `attention.safetensors`, which `load_attention` reads.

    Args:
        source: a file of `torch.save` (a `state_dict`, alone or under "state_dict", "model_state_dict" or "model") or
            a `.safetensors` file.
        destination: the new folder.
        num_heads: number of heads of the layers. Needed only if they have neither gamma nor beta, whose size tells it.
        normalize: whether queries and keys are normalised, which no tensor tells. By default `True`, as in the
            library.
        attention_eps: the layer's `eps`, which no tensor tells. The library's default is 1e-5. Its modes "chunk" and
            "fused_chunk" do not read it and add 1e-10.
        norm_eps: epsilon of a whole model's RMSNorm, which no tensor tells. The library's default is 1e-6.
        max_position_embeddings: the length of training, which no tensor tells.
        overwrite: whether to replace `destination` if it exists.
        dry_run: whether to only report what maps where.

    Returns:
        A report of what maps where and what was inferred.

    Raises:
        ConversionError: an argument or tensor is wrong; the message names it. Nothing is left behind.
    """
    check_destination(destination, overwrite, source)
    theirs, wrapper, beside = read_state_dict(source)
    roots, rest = _find_layers(theirs)
    notes: list[str] = []
    mapping = _layer_names(theirs, roots, rest)
    fields: dict[str, Any] = {
        "num_hidden_layers": len(roots),
        "layer_types": ["linear_attention"] * len(roots),
        "kernel": "rebased",
        "qk_norm_scope": "head",
        "qk_norm_shared": True,
        "qk_norm_eps": 1e-5,
        "attention_eps": attention_eps,
        **_layer_fields(theirs, roots, num_heads, normalize, notes),
    }
    if max_position_embeddings is not None:
        fields["max_position_embeddings"] = max_position_embeddings
    if rest:
        mapping = {name: f"model.{ours}" for name, ours in mapping.items()}
        fields |= _model_fields(theirs, roots, rest, mapping) | {"norm_eps": 1e-6 if norm_eps is None else norm_eps}
    else:
        for name, value in (("--norm-eps", norm_eps), ("--max-position-embeddings", max_position_embeddings)):
            if value is not None:
                raise ConversionError(f"{name} is {value}, but SOURCE has attention layers alone and no model around.")
        fields |= {"vocab_size": 1, "mlp_type": "none"}
        notes.append(f"attention layers alone: written as {ATTENTION_FILE}, for {__package__}.load_attention")
    config = make_config(**fields)
    notes.append(
        f"{len(roots)} layers, hidden_size {config.hidden_size}, num_attention_heads {config.num_attention_heads}, "
        f"feature_dim {config.feature_dim}, attention_eps {attention_eps:g}"
    )
    if beside:
        notes.append(f"left out, beside the weights in {wrapper!r}: {some(beside)}")

    report = Report(str(source), str(destination), notes=notes, dry_run=dry_run)
    keys = {name: mapping[name] for name in theirs}
    state = {}
    for name, ours in progress(keys.items(), "converting"):
        report.map(name, theirs[name], ours)
        state[ours] = theirs[name]
    if rest:
        check_against(config, state, str(source))
    else:
        check_attention(config, state, str(source))
    if not dry_run:
        record = {"format": "fla", "wrapper": wrapper, "keys": keys}
        with written(destination, overwrite, source) as folder:
            if rest:
                write_model(folder, config, state, record)
            else:
                folder.mkdir()
                config.save_pretrained(folder)
                write_state_dict(folder / ATTENTION_FILE, state)
                write_record(folder, record)
    return report


def _layer_names(theirs: State, roots: list[str], rest: list[str]) -> dict[str, str]:
    """Return our name of each tensor of the layers.

    Raises:
        ConversionError: a layer has other tensors than ReBasedLinearAttention.
    """
    mapping: dict[str, str] = {}
    for i, root in enumerate(roots):
        own = {name.removeprefix(root) for name in theirs if name.startswith(root) and name not in rest}
        learnt = {name: ours for name, ours in LEARNT.items() if name in own}
        if own != set(PROJECTIONS) | set(learnt):
            raise ConversionError(
                f"Layer {i} of SOURCE ({root!r}) is not a ReBasedLinearAttention: it has {sorted(own)[:20]}; it must "
                f"have {sorted(PROJECTIONS)} and perhaps {sorted(LEARNT)}."
            )
        for name, ours in (PROJECTIONS | learnt).items():
            mapping[root + name] = f"layers.{i}.{ours}"
    return mapping


def _find_layers(state: State) -> tuple[list[str], list[str]]:
    """Return the prefix of each layer's names by the layer's number, and the names that belong to no layer."""
    roots = {name.removesuffix("q_proj.weight") for name in state if name.endswith("q_proj.weight")}
    if roots == {""}:
        return [""], []
    around, numbers = set(), {}
    for root in roots:
        match = re.fullmatch(r"(|.*?\.)(0|[1-9][0-9]{0,5})\.(.*)", root)
        if match:
            around.add((match[1], match[3]))
            numbers[int(match[2])] = root
    if not roots or len(numbers) != len(roots) or len(around) != 1 or max(numbers) != len(numbers) - 1:
        raise ConversionError(
            "SOURCE must hold one ReBasedLinearAttention (q_proj.weight, ...) or layers numbered from 0 without a gap "
            f"(layers.0.attn.q_proj.weight, ...), but its names are {some(sorted(state))}."
        )
    rest = [name for name in state if not any(name.startswith(root) for root in roots)]
    return [numbers[i] for i in range(len(numbers))], rest


def _layer_fields(
    state: State, roots: list[str], heads: int | None, normalize: bool | None, notes: list[str]
) -> dict[str, Any]:
    """Return the configuration's fields of the attention, which all layers must share."""
    found = set()
    for root in roots:
        shapes = {name: matrix_size(state, root + name) for name in PROJECTIONS}
        (q, hidden), v, o = shapes["q_proj.weight"], shapes["v_proj.weight"][0], shapes["o_proj.weight"][1]
        gamma, beta = (root + name in state for name in LEARNT)
        sizes = {state[root + name].numel() for name in LEARNT if root + name in state}
        if len(sizes) > 1:
            raise ConversionError(
                f"gamma and beta of {root!r} in SOURCE must be of one size, but have {sorted(sizes)}."
            )
        found.add((q, v, o, hidden, gamma, beta, next(iter(sizes), None)))
    if len(found) > 1:
        raise ConversionError("The layers of SOURCE must be of one size and kind of normalisation, but they differ.")
    ((q, v, o, hidden, gamma, beta, feature_dim),) = found
    if feature_dim is not None:
        if q % feature_dim:
            raise ConversionError(f"q_proj has {q} rows in SOURCE, which is no multiple of gamma's {feature_dim}.")
        if heads not in (None, q // feature_dim):
            raise ConversionError(f"--num-heads is {heads}, but q_proj and the feature map make {q // feature_dim}.")
        heads = q // feature_dim
    elif heads is None:
        raise ConversionError(
            "--num-heads (num_attention_heads) is needed: SOURCE has neither gamma nor beta, whose size would tell. "
            "The library's default is 16."
        )
    elif heads < 1 or q % heads:
        raise ConversionError(f"--num-heads is {heads}, but q_proj has {q} rows.")
    if v != o or v != heads * (hidden // heads):
        raise ConversionError(
            f"With num_heads {heads} and hidden_size {hidden}, v_proj must have {heads * (hidden // heads)} rows and "
            f"o_proj as many columns, but they have {v} and {o}. (The library itself cannot run a layer with "
            "num_key_value_heads other than num_heads.)"
        )
    if not (gamma or beta) or (beta and not gamma):
        if normalize is False:
            raise ConversionError(
                "--no-normalize was given, but the library has no feature map without normalisation and gamma."
            )
    elif normalize is None:
        notes.append("normalize is True, the library's default; no tensor tells (--no-normalize)")
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "feature_dim": q // heads,
        "head_dim": v // heads,
        "normalize": normalize is not False,
        "use_gamma": gamma,
        "use_beta": beta,
    }


def _model_fields(state: State, roots: list[str], rest: list[str], mapping: dict[str, str]) -> dict[str, Any]:
    """Return the fields of the model around the layers, and add its names to `mapping`."""
    blocks = [root.removesuffix("attn.") for root in roots]
    base = blocks[0].removesuffix("layers.0.")
    embedding, head = f"{base}embeddings.weight", "lm_head.weight"
    names = {embedding: "model.embed_tokens.weight", f"{base}norm.weight": "model.norm.weight"}
    for i, block in enumerate(blocks):
        names |= {block + name: f"model.layers.{i}.{ours}" for name, ours in BLOCK.items()}
    missing, unknown = sorted(set(names) - set(rest)), sorted(set(rest) - set(names) - {head})
    if missing or unknown:
        raise ConversionError(
            "SOURCE has ReBased layers and more, so it must be a whole model with the names that flash-linear-"
            f"attention's models have; missing {some(missing)}; unknown {some(unknown)}."
        )
    tied = head not in state or same_bytes(state[head], state[embedding])
    if head in state:
        names[head] = "model.embed_tokens.weight" if tied else "lm_head.weight"
    mapping |= names
    return {
        "vocab_size": matrix_size(state, embedding)[0],
        "intermediate_size": matrix_size(state, f"{blocks[0]}mlp.up_proj.weight")[0],
        "mlp_type": "swiglu",
        "norm_type": "rmsnorm",
        "tie_word_embeddings": tied,
        "architectures": ["ReBasedForCausalLM"],
    }


def attention_shapes(config: ReBasedConfig) -> dict[str, torch.Size]:
    """Return the name and shape of every tensor in `attention.safetensors`."""
    shapes = {name.removeprefix("model."): shape for name, shape in model_shapes(config).items()}
    return {name: shape for name, shape in shapes.items() if ".self_attn." in name}


def check_attention(config: ReBasedConfig, state: State, where: str) -> None:
    """Check that `state` has exactly the attention tensors that `config` asks for.

    Raises:
        ConversionError: a tensor is missing, unknown or of a wrong shape; the message names it.
    """
    shapes = attention_shapes(config)
    for name in sorted(set(shapes) | set(state)):
        found = list(state[name].shape) if name in state else "missing"
        asked = list(shapes[name]) if name in shapes else "no such tensor"
        if found != asked:
            raise ConversionError(f"{name!r} in {where!r} is {found}; the configuration asks for {asked}.")


def load_attention(folder: str | os.PathLike) -> nn.ModuleList:
    """Load the layers that `from_fla` wrote without a model around them.

    Args:
        folder: the folder that `from_fla` made.

    Returns:
        One attention module per layer. `module(hidden_states)[0]` maps [B, T, hidden_size] to the same shape.

    Raises:
        ConversionError: the folder is not complete.
    """
    config, state = _load_attention_file(Path(folder))
    with torch.device("meta"):
        model = ReBasedModel(config)
    layers = nn.ModuleList([layer.self_attn for layer in model.layers])
    own = {name.removeprefix("layers.").replace("self_attn.", "", 1): tensor for name, tensor in state.items()}
    layers.load_state_dict(own, assign=True)
    return layers


def _load_attention_file(folder: Path) -> tuple[ReBasedConfig, State]:
    config = load_config(folder)
    state = read_safetensors(folder / ATTENTION_FILE)
    check_tensors(state, str(folder))
    check_attention(config, state, str(folder))
    return config, state


# ---------------------------------------------------------------- and back


def to_fla(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layer: int | None = None,
    attention_only: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Convert ReBased layers, or a model of them, into a `state_dict` for flash-linear-attention.

    If the folder came from `from_fla`, the names, their order and the wrapper are those of the original file, and
    unchanged weights are equal bit for bit. Otherwise the names are those of the library's models.

    Args:
        source: the folder of a model, or one that `from_fla` made of layers alone.
        destination: the new file, written by `torch.save`, or as safetensors if its name ends in ".safetensors".
        layer: number from 0 of the only layer to convert, into the `state_dict` of a `ReBasedLinearAttention`.
        attention_only: whether to convert only the attention layers, as `layers.{i}.attn.`, of any model.
        overwrite, dry_run: as in `from_fla`.

    Returns:
        A report of what maps where, with the arguments that build the library's layer.

    Raises:
        ConversionError: the library has no such layer or model. The message names the fields that it cannot express.
    """
    check_destination(destination, overwrite, source)
    folder = Path(source)
    alone = (folder / ATTENTION_FILE).is_file() and not (folder / "model.safetensors").is_file()
    config, state = _load_attention_file(folder) if alone else load_folder(folder)
    layers = range(config.num_hidden_layers)
    if layer is not None:
        if attention_only:
            raise ConversionError("--layer and --attention-only were both given; one layer is attention only.")
        if layer not in layers:
            raise ConversionError(f"--layer is {layer}; SOURCE has layers 0 to {config.num_hidden_layers - 1}.")
        layers = range(layer, layer + 1)
    part = layer is not None or attention_only
    check_fla_has(config, layers, whole=not (part or alone))

    record: dict[str, Any] = {}
    theirs = None
    if not part:
        record, _ = read_record(folder, "fla")
        theirs = from_record(record, state, {})
    if theirs is None:
        record = {}
        names = fla_names(config, layers, bare=layer is not None, whole=not (part or alone))
        theirs = {name: state[ours.removeprefix("model.") if alone else ours] for name, ours in names}
    arguments = {
        "hidden_size": config.hidden_size,
        "feature_dim": config.feature_dim,
        "num_key_value_heads": config.num_attention_heads,
        "num_heads": config.num_attention_heads,
        "use_gamma": config.use_gamma,
        "use_beta": config.use_beta,
        "normalize": config.normalize,
        "eps": config.attention_eps,
    }
    notes = ["build ReBasedLinearAttention(" + ", ".join(f"{k}={v!r}" for k, v in arguments.items()) + ")"]
    report = Report(str(source), str(destination), notes=notes, dry_run=dry_run)
    ours_of = {id(tensor): name for name, tensor in state.items()}
    for name, tensor in progress(theirs.items(), "converting"):
        report.map(ours_of[id(tensor)], tensor, name)
    if not dry_run:
        with written(destination, overwrite, source) as path:
            write_state_dict(path, theirs, record.get("wrapper"))
    return report


def fla_names(config: ReBasedConfig, layers: range, bare: bool, whole: bool) -> Iterator[tuple[str, str]]:
    """Return the library's names of a layer, a stack of layers or a model, each with this package's name."""
    base = "model." if whole else ""
    if whole:
        yield "model.embeddings.weight", "model.embed_tokens.weight"
    for i in layers:
        root, ours_root = "" if bare else f"{base}layers.{i}.attn.", f"model.layers.{i}."
        if whole:
            yield f"{base}layers.{i}.attn_norm.weight", ours_root + BLOCK["attn_norm.weight"]
        for (name, ours), used in zip(LEARNT.items(), (config.use_gamma, config.use_beta)):
            if used:
                yield root + name, ours_root + ours
        for name, ours in PROJECTIONS.items():
            yield root + name, ours_root + ours
        if whole:
            for name, ours in list(BLOCK.items())[1:]:
                yield f"{base}layers.{i}.{name}", ours_root + ours
    if whole:
        yield "model.norm.weight", "model.norm.weight"
        yield "lm_head.weight", "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def check_fla_has(config: ReBasedConfig, layers: range, whole: bool) -> None:
    """Check that the library can build these layers, and the model around them if it is asked for.

    Raises:
        ConversionError: a field does not fit. The message names each one, what it is and what it must be.
    """
    types = sorted({config.layer_types[i] for i in layers})
    flags = (config.normalize, config.use_gamma, config.use_beta)
    possible = [(True, a, b) for a in (True, False) for b in (True, False)] + [
        (False, True, True),
        (False, True, False),
    ]
    rows: list[tuple[str, Any, list[Any]]] = [
        ("layer_types", types, [["linear_attention"]]),
        ("(normalize, use_gamma, use_beta)", flags, possible),
        ("kernel_coefficients", config.coefficients, [(0.0, 0.0, 1.0)]),
        ("num_key_value_heads", config.num_key_value_heads, [config.num_attention_heads]),
        ("head_dim", config.head_dim, [config.hidden_size // config.num_attention_heads]),
        ("attention_bias", config.attention_bias, [False]),
        ("decay", config.decay, [None]),
        ("rope_linear_attention", config.rope_linear_attention, [False]),
    ]
    if config.normalize:
        rows.append(("qk_norm_eps", config.qk_norm_eps, [1e-5]))
    rows.append(("qk_norm_scope", config.qk_norm_scope, ["head"]))
    if config.use_gamma or config.use_beta:
        rows.append(("qk_norm_shared", config.qk_norm_shared, [True]))
    if whole:
        rows += [
            ("norm_type", config.norm_type, ["rmsnorm"]),
            ("mlp_type", config.mlp_type, ["swiglu"]),
            ("position_embedding_type", config.position_embedding_type, ["none"]),
        ]
        if config.mlp_type == "swiglu":
            rows += [("hidden_act", config.hidden_act, ["silu"]), ("mlp_bias", config.mlp_bias, [False])]
    wrong = [(name, value, allowed) for name, value, allowed in rows if value not in allowed]
    if wrong:
        raise ConversionError(
            f"flash-linear-attention has no {'model' if whole else 'layer'} of this configuration: "
            + "; ".join(f"{n} is {v!r}, must be {' or '.join(map(repr, a))}" for n, v, a in wrong)
            + ("." if not whole else ". (--attention-only or --layer convert the attention without the model.)")
        )
