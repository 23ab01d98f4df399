"""Convert checkpoints of the paper's authors to this package and back, bit for bit.

The authors' model is a stack of pre-norm layers. Their mixers are the gated short convolution (BaseConv), ReBased or
Based. A GELU MLP may follow each mixer, and the output layer is tied to the word embedding. A checkpoint is a
`state_dict` saved with `torch.save`. It has no configuration, so the configuration is read off the tensors.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from modeling_rebased import ReBasedConfig

from .layout import State, by_layer, check_against, find_prefix, make_config, matrix_size, same_bytes, set_same_size
from .reading import load_folder, read_state_dict
from .record import from_record, read_record
from .report import ConversionError, Report, progress, some
from .writing import check_destination, write_model, write_state_dict, written


EMBEDDING = "backbone.embeddings.word_embeddings.weight"
POSITIONS = "backbone.embeddings.position_embeddings.weight"
HEAD = "lm_head.weight"
OUTSIDE = (EMBEDDING, POSITIONS, HEAD, "backbone.ln_f.weight", "backbone.ln_f.bias")
LAYER = re.compile(r"backbone\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")

# Names inside a layer, theirs to ours.
NORMS = {
    "norm1.weight": "input_layernorm.weight",
    "norm1.bias": "input_layernorm.bias",
    "norm2.weight": "post_attention_layernorm.weight",
    "norm2.bias": "post_attention_layernorm.bias",
}
CONV = {
    "projection.weight": "conv.proj.weight",
    "projection.bias": "conv.proj.bias",
    "conv.conv.weight": "conv.conv.weight",
    "conv.conv.bias": "conv.conv.bias",
}
ATTENTION = {f"proj_{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"}
LAYER_NORM = {f"ln_{x}.{name}": f"self_attn.{x}_norm.{name}" for x in "qk" for name in ("weight", "bias")}
GAMMA = {f"ln_{x}.gamma": f"self_attn.{x}_norm.weight" for x in "qk"}
BETA = {f"ln_{x}.beta": f"self_attn.{x}_norm.bias" for x in "qk"}
MLP = {
    "state_mixer.fc1.weight": "mlp.up_proj.weight",
    "state_mixer.fc1.bias": "mlp.up_proj.bias",
    "state_mixer.fc2.weight": "mlp.down_proj.weight",
    "state_mixer.fc2.bias": "mlp.down_proj.bias",
}
# Their hybrid mixer holds the layer's own as `mixer`; a model of one kind of mixer has no such level.
ROOTS = ("sequence_mixer.mixer.", "sequence_mixer.")

# Which mixer has which names, and what that says about the normalisation of q and k.
MIXERS: dict[str, dict[str, str]] = {
    "conv": CONV,
    "layer_norm": ATTENTION | LAYER_NORM,
    "scale": ATTENTION | GAMMA | BETA,
    "bare": ATTENTION,
}


def from_authors(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    num_heads: int | None = None,
    kernel: str | None = None,
    normalize: bool | None = None,
    use_beta: bool | None = None,
    attention_eps: float = 1e-12,
    embedding_dropout: float = 0.0,
    max_position_embeddings: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Convert a checkpoint of the authors' code into a folder for `from_pretrained`.

    Args:
        source: a file of `torch.save` with the `state_dict`, alone or under "state_dict", "model_state_dict" or
            "model". Its names may share a prefix, such as Lightning's "model.".
        destination: the new folder.
        num_heads: number of heads of the attention layers. Needed unless the sizes allow only one number.
        kernel: "rebased" or "based". Needed if queries and keys have no learnt normalisation, because the two kernels
            then have the same names. Otherwise the default is "rebased".
        normalize: whether queries and keys are normalised without parameters. Needed for "rebased" without parameters,
            because the plain x^2 kernel and the normalised one then look the same.
        use_beta: whether a beta stored with a gamma is used. By default it is used if any of its numbers is not 0: an
            unused beta stays at its initial 0.
        attention_eps: number added to the normaliser, which no tensor tells. It is 1e-12 in the authors' code.
        embedding_dropout: dropout for further training, which no tensor tells. It is 0.1 in the MQAR runs.
        max_position_embeddings: the length of training, if there are no learned positions to tell it.
        overwrite: whether to replace `destination` if it exists.
        dry_run: whether to only report what maps where.

    Returns:
        A report of what maps where and what was inferred.

    Raises:
        ConversionError: an argument or tensor is wrong; the message names it. Nothing is left behind.
    """
    check_destination(destination, overwrite, source)
    theirs, wrapper, beside = read_state_dict(source)
    prefix = find_prefix(theirs, EMBEDDING, "a checkpoint of the authors' code")
    names = {name.removeprefix(prefix): tensor for name, tensor in theirs.items()}
    config, mapping, notes = read_layout(
        names,
        num_heads=num_heads,
        kernel=kernel,
        normalize=normalize,
        use_beta=use_beta,
        attention_eps=attention_eps,
        embedding_dropout=embedding_dropout,
        max_position_embeddings=max_position_embeddings,
    )
    if beside:
        notes.append(f"left out, beside the weights in {wrapper!r}: {some(beside)}")
    report = Report(str(source), str(destination), notes=notes, dry_run=dry_run)
    state, unused = {}, {}
    for name, ours in progress(mapping.items(), "converting"):
        report.map(prefix + name, names[name], "- (unused)" if ours is None else ours)
        if ours is None:
            unused[prefix + name] = names[name]
        else:
            state[ours] = names[name]
    check_against(config, state, str(source))
    if not dry_run:
        record = {
            "format": "authors",
            "wrapper": wrapper,
            "keys": {prefix + name: ours for name, ours in mapping.items()},
        }
        with written(destination, overwrite, source) as folder:
            write_model(folder, config, state, record, unused)
    return report


def read_layout(
    state: State,
    *,
    num_heads: int | None,
    kernel: str | None,
    normalize: bool | None,
    use_beta: bool | None,
    attention_eps: float,
    embedding_dropout: float,
    max_position_embeddings: int | None,
) -> tuple[ReBasedConfig, dict[str, str | None], list[str]]:
    """Read the configuration off the tensors, whose names have no prefix. The arguments are those of `from_authors`.

    Returns:
        The configuration. For each name in the state, in its order, the name in this package's model, or `None` for a
        tensor that is stored but not used. Notes on what was inferred.
    """
    if kernel not in (None, "rebased", "based"):
        raise ConversionError(f"--kernel is {kernel!r}; it must be 'rebased' or 'based'.")
    notes: list[str] = []
    layers = by_layer(state, LAYER, OUTSIDE, "ReBased, Based or BaseConv model")
    mapping: dict[str, str | None] = {}
    fields: dict[str, Any] = {
        "attention_eps": attention_eps,
        "embedding_dropout": embedding_dropout,
        "architectures": ["ReBasedForCausalLM"],
    }
    fields |= _outside(state, mapping, max_position_embeddings, notes)
    kinds = _layers(layers, fields, mapping)
    hidden_size = fields["hidden_size"]

    attention = [(i, kind) for i, kind in enumerate(kinds) if kind != "conv"]
    if attention:
        if len({kind for _, kind in attention}) > 1:
            raise ConversionError(
                "The attention layers of SOURCE must have one kind of normalisation, but they have "
                + ", ".join(f"{kind} (layer {i})" for i, kind in attention)
                + "."
            )
        fields |= _heads(state, mapping, [i for i, _ in attention], hidden_size, num_heads, notes)
        fields |= _flags(attention[0][1], state, mapping, kernel, normalize, use_beta, notes)
        if fields["use_gamma"] and not fields["use_beta"]:
            for name, place in mapping.items():
                if place is not None and re.search(r"\.ln_[qk]\.beta$", name):
                    mapping[name] = None
    else:
        fields |= {"num_attention_heads": 1, "head_dim": 1}
        given = {"--num-heads": num_heads, "--kernel": kernel, "--normalize": normalize, "--use-beta": use_beta}
        for name, value in given.items():
            if value is not None:
                raise ConversionError(f"{name} is {value!r}, but SOURCE has no attention layers.")
    config = make_config(**fields)
    notes.append(
        f"{config.num_hidden_layers} layers {config.layer_types}, hidden_size {hidden_size}, mlp_type "
        f"{config.mlp_type!r}" + (f", kernel {config.kernel!r}" if attention else "")
    )
    return config, {name: mapping[name] for name in state}, notes


def _outside(
    state: State, mapping: dict[str, str | None], max_position_embeddings: int | None, notes: list[str]
) -> dict[str, Any]:
    """Return the fields that embeddings, last norm and output layer give, and add their names to `mapping`."""
    vocab_size, hidden_size = matrix_size(state, EMBEDDING)
    fields: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": hidden_size}
    mapping[EMBEDDING] = "model.embed_tokens.weight"
    for name in ("weight", "bias"):
        if f"backbone.ln_f.{name}" not in state:
            raise ConversionError(f"SOURCE lacks 'backbone.ln_f.{name}'; the authors' models all have it.")
        mapping[f"backbone.ln_f.{name}"] = f"model.norm.{name}"
    if POSITIONS in state:
        mapping[POSITIONS] = "model.embed_positions.weight"
        positions = matrix_size(state, POSITIONS)[0]
        if max_position_embeddings not in (None, positions):
            raise ConversionError(
                f"--max-position-embeddings is {max_position_embeddings}, but {POSITIONS!r} has {positions} rows."
            )
        fields |= {"position_embedding_type": "learned", "max_position_embeddings": positions}
    elif max_position_embeddings is not None:
        fields["max_position_embeddings"] = max_position_embeddings
    fields["tie_word_embeddings"] = HEAD not in state or same_bytes(state[HEAD], state[EMBEDDING])
    if HEAD in state:
        mapping[HEAD] = mapping[EMBEDDING] if fields["tie_word_embeddings"] else "lm_head.weight"
        if not fields["tie_word_embeddings"]:
            notes.append(f"{HEAD} differs from the word embedding, so the two are not tied")
    return fields


def _layers(
    layers: list[dict[str, torch.Tensor]], fields: dict[str, Any], mapping: dict[str, str | None]
) -> list[str]:
    """Return the kind of each layer's mixer. Add what the layers say to `fields`, and their names to `mapping`."""
    kinds, has_mlp = [], []
    for i, own in enumerate(layers):
        kind, root, mlp = _recognise(i, own)
        kinds.append(kind)
        has_mlp.append(mlp)
        pairs = NORMS | {root + theirs: ours for theirs, ours in MIXERS[kind].items()} | (MLP if mlp else {})
        for theirs, ours in pairs.items():
            mapping[f"backbone.layers.{i}.{theirs}"] = f"model.layers.{i}.{ours}"
        if kind == "conv":
            set_same_size(fields, "conv_kernel_size", own[f"{root}conv.conv.weight"], -1, i)
        if mlp:
            set_same_size(fields, "intermediate_size", own["state_mixer.fc1.weight"], 0, i)
    if len(set(has_mlp)) > 1:
        without = [i for i, mlp in enumerate(has_mlp) if not mlp]
        raise ConversionError(f"Layers {without} of SOURCE have no MLP and the others have one; all must or none.")
    fields["num_hidden_layers"] = len(layers)
    fields["mlp_type"] = "gelu" if has_mlp[0] else "none"
    fields["layer_types"] = ["conv" if kind == "conv" else "linear_attention" for kind in kinds]
    return kinds


def _recognise(i: int, own: dict[str, torch.Tensor]) -> tuple[str, str, bool]:
    """Return which mixer layer i has, under which name, and whether it has an MLP."""
    mlp = any(name.startswith("state_mixer.") for name in own)
    expected = set(NORMS) | (set(MLP) if mlp else set())
    mixer = {name for name in own if name.startswith("sequence_mixer.")}
    for root in ROOTS:
        for kind, names in MIXERS.items():
            if mixer == {root + name for name in names} and set(own) == expected | mixer:
                return kind, root, mlp
    raise ConversionError(
        f"Layer {i} of SOURCE is none of BaseConv, ReBased and Based with a GELU MLP or none; it has "
        f"{sorted(own)[:20]}. Beside norm1 and norm2, a BaseConv layer has {sorted(CONV)}, an attention layer "
        f"{sorted(ATTENTION)} and perhaps {sorted(LAYER_NORM)} or {sorted(GAMMA | BETA)}, all under {ROOTS[0]!r}."
    )


def _heads(
    state: State, mapping: dict[str, Any], layers: list[int], hidden_size: int, heads: int | None, notes: list[str]
) -> dict[str, int]:
    """Return num_attention_heads, feature_dim and head_dim of the attention layers, which must agree."""
    theirs = {ours: name for name, ours in mapping.items()}
    sizes = {}
    for i in layers:
        q, k, v = (matrix_size(state, theirs[f"model.layers.{i}.self_attn.{x}_proj.weight"])[0] for x in "qkv")
        if q != k:
            raise ConversionError(f"In layer {i} of SOURCE proj_q has {q} rows and proj_k {k}; they must be as many.")
        sizes[q, v] = i
    if len(sizes) > 1:
        raise ConversionError(
            f"The attention layers of SOURCE must be of one size, but rows of proj_q and proj_v are {sorted(sizes)}."
        )
    ((q, v),) = sizes
    possible = [
        h
        for h in range(1, min(q, v, hidden_size) + 1)
        if h * (hidden_size // h) == v and q % h == 0 and q // h <= 128 and hidden_size // h <= 256
    ]
    where = f"proj_q has {q} rows, proj_v {v} and hidden_size is {hidden_size}, which fits {possible} heads"
    if heads is None:
        if len(possible) != 1:
            raise ConversionError(f"--num-heads (num_attention_heads) is needed: {where}. The MQAR runs have 12.")
        heads = possible[0]
        notes.append(f"num_attention_heads is {heads}, the only number that fits")
    if heads not in possible:
        raise ConversionError(f"--num-heads is {heads}, but {where}.")
    return {"num_attention_heads": heads, "feature_dim": q // heads, "head_dim": v // heads}


def _flags(
    kind: str,
    state: State,
    mapping: dict[str, Any],
    kernel: str | None,
    normalize: bool | None,
    use_beta: bool | None,
    notes: list[str],
) -> dict[str, Any]:
    """Return the kernel and the flags of the normalisation, from the tensors where they tell, else the arguments."""

    def settle(field: str, found: bool, given: bool | None, why: str) -> bool:
        if given not in (None, found):
            raise ConversionError(f"--{'' if given else 'no-'}{field} was given, but {why}.")
        return found

    if kind == "layer_norm":
        why = "SOURCE has ln_q.weight and ln_q.bias, of a LayerNorm"
        if kernel is None:
            notes.append("kernel is 'rebased': a Based layer with qk_norm would have the same names (--kernel based)")
        return {
            "kernel": kernel or "rebased",
            "normalize": settle("normalize", True, normalize, why),
            "use_gamma": True,
            "use_beta": settle("use-beta", True, use_beta, why),
        }
    if kind == "scale":
        why = "SOURCE has ln_q.gamma, of a scale without normalisation"
        if kernel == "based":
            raise ConversionError(f"--kernel is 'based', but {why}, which no Based layer has.")
        betas = [state[name] for name in mapping if re.search(r"\.ln_[qk]\.beta$", name)]
        if use_beta is None:
            use_beta = any(bool((beta != 0).any()) for beta in betas)
            notes.append(
                "use_beta is True: some number in ln_{q,k}.beta is not 0"
                if use_beta
                else "use_beta is False: all of ln_{q,k}.beta is 0, where an unused one stays (--use-beta to train it)"
            )
        return {
            "kernel": "rebased",
            "normalize": settle("normalize", False, normalize, why),
            "use_gamma": True,
            "use_beta": use_beta,
        }
    if kernel is None:
        raise ConversionError(
            "--kernel (kernel) is needed: SOURCE has no ln_q and ln_k, so its attention may be Based ('based') or "
            "ReBased without parameters of normalisation ('rebased')."
        )
    settle("use-beta", False, use_beta, "SOURCE has no ln_q.beta")
    if kernel == "based":
        settle("normalize", False, normalize, "no Based layer normalises without ln_q and ln_k")
    elif normalize is None:
        raise ConversionError(
            "--normalize or --no-normalize (normalize) is needed: SOURCE has no ln_q and ln_k, so its ReBased layers "
            "normalise without parameters or not at all."
        )
    return {"kernel": kernel, "normalize": bool(normalize), "use_gamma": False, "use_beta": False}


# ---------------------------------------------------------------- and back


def to_authors(
    source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False, dry_run: bool = False
) -> Report:
    """Convert a ReBased folder into a checkpoint of the authors' code.

    If the folder came from `from_authors`, the names, their order and the wrapper are those of the original file, and
    unchanged weights are equal bit for bit. Otherwise the names are those that the authors' trainer saves.

    Args:
        source: the folder of a model.
        destination: the new file, written by `torch.save`, or as safetensors if its name ends in ".safetensors".
        overwrite, dry_run: as in `from_authors`.

    Returns:
        A report of what maps where.

    Raises:
        ConversionError: the authors' code has no such model. The message names the fields of the configuration that it
            cannot express.
    """
    check_destination(destination, overwrite, source)
    config, state = load_folder(source)
    check_authors_have(config)
    record, unused = read_record(Path(source), "authors")
    theirs = from_record(record, state, unused)
    notes = []
    if theirs is None:
        names, record = dict(authors_names(config)), {}
        theirs = {name: state[ours] for name, ours in names.items() if ours is not None}
        for name, ours in names.items():
            if ours is None:  # the beta that they store and do not use
                theirs[name] = torch.zeros_like(theirs[name.removesuffix("beta") + "gamma"])
    if config.attention_eps != 1e-12:
        notes.append(f"attention_eps is {config.attention_eps}: give it to their mixer, whose default is 1e-12")
    report = Report(str(source), str(destination), notes=notes, dry_run=dry_run)
    ours_of = {id(tensor): name for name, tensor in state.items()}
    for name, tensor in theirs.items():
        report.map(ours_of.get(id(tensor), "-"), tensor, name)
    if not dry_run:
        with written(destination, overwrite, source) as path:
            write_state_dict(path, theirs, record.get("wrapper"))
    return report


def authors_names(config: ReBasedConfig) -> Iterator[tuple[str, str | None]]:
    """Return the authors' names in their order, each with this package's name, or `None` for an unused beta."""
    yield EMBEDDING, "model.embed_tokens.weight"
    if config.position_embedding_type == "learned":
        yield POSITIONS, "model.embed_positions.weight"
    for i, layer_type in enumerate(config.layer_types):
        if layer_type == "conv":
            mixer: dict[str, str | None] = dict(CONV)
        else:
            mixer = dict(ATTENTION)
            if config.normalize and config.use_gamma:
                mixer |= LAYER_NORM
            elif config.use_gamma:
                for gamma, beta in zip(GAMMA, BETA):
                    mixer |= {gamma: GAMMA[gamma], beta: BETA[beta] if config.use_beta else None}
        names = {ROOTS[0] + theirs: ours for theirs, ours in mixer.items()}
        for theirs, ours in (names | (MLP if config.mlp_type == "gelu" else {}) | NORMS).items():
            yield f"backbone.layers.{i}.{theirs}", None if ours is None else f"model.layers.{i}.{ours}"
    yield "backbone.ln_f.weight", "model.norm.weight"
    yield "backbone.ln_f.bias", "model.norm.bias"
    yield HEAD, "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def check_authors_have(config: ReBasedConfig) -> None:
    """Check that the authors' code can build the model.

    Raises:
        ConversionError: a field does not fit. The message names each one, what it is and what it must be.
    """
    rows: list[tuple[str, Any, list[Any]]] = [
        ("norm_type", config.norm_type, ["layernorm"]),
        ("norm_eps", config.norm_eps, [1e-5]),
        ("mlp_type", config.mlp_type, ["none", "gelu"]),
        ("position_embedding_type", config.position_embedding_type, ["none", "learned"]),
    ]
    if config.mlp_type == "gelu":
        rows += [("hidden_act", config.hidden_act, ["gelu"]), ("mlp_bias", config.mlp_bias, [True])]
    wrong = [(name, value, allowed) for name, value, allowed in rows if value not in allowed]
    others = sorted(set(config.layer_types) - {"conv", "linear_attention"})
    if others:
        wrong.append(("layer_types", others, ["conv", "linear_attention"]))
    if "conv" in config.layer_types:
        rows = [("conv_type", config.conv_type, ["residual"]), ("conv_bias", config.conv_bias, [True])]
        wrong += [(name, value, allowed) for name, value, allowed in rows if value not in allowed]
    if "linear_attention" in config.layer_types:
        learnt = config.use_gamma or config.use_beta
        flags = (config.normalize, config.use_gamma, config.use_beta)
        kernels = {"rebased": (0.0, 0.0, 1.0), "based": (1.0, 1.0, 0.5)}
        possible = [(True, True, True), (False, False, False)]
        if config.kernel == "rebased":
            possible += [(True, False, False), (False, True, True), (False, True, False)]
        rows = [
            ("(normalize, use_gamma, use_beta)", flags, possible),
            ("num_key_value_heads", config.num_key_value_heads, [config.num_attention_heads]),
            ("head_dim", config.head_dim, [config.hidden_size // config.num_attention_heads]),
            ("attention_bias", config.attention_bias, [False]),
            ("decay", config.decay, [None]),
            ("kernel_coefficients", config.coefficients, [kernels[config.kernel]]),
        ]
        if config.normalize or learnt:
            rows.append(("qk_norm_scope", config.qk_norm_scope, ["all_heads"]))
        if config.normalize:
            rows.append(("qk_norm_eps", config.qk_norm_eps, [1e-5]))
        if learnt:
            rows.append(("qk_norm_shared", config.qk_norm_shared, [False]))
        wrong += [(name, value, allowed) for name, value, allowed in rows if value not in allowed]
    if wrong:
        raise ConversionError(
            "The authors' code has no model of this configuration: "
            + "; ".join(f"{n} is {v!r}, must be {' or '.join(map(repr, a))}" for n, v, a in wrong)
            + "."
        )
