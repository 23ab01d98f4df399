"""Start a ReBased model from a Based model of this package."""

import os
from pathlib import Path

import torch

from .layout import State, check_against, make_config, model_shapes, own_fields
from .reading import load_folder, load_generation_config, load_tokenizer
from .reduce_heads import exp_beta
from .report import ConversionError, Report
from .writing import check_destination, write_model, written


def to_rebased(
    source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False, dry_run: bool = False
) -> Report:
    """Start a ReBased model from a Based one of this package.

    All weights, the tokenizer and the settings of generation are kept. The linear layers get the kernel (q.k)^2 and a
    normalisation per head with gamma 1, and with the beta that makes the kernel (1 + s)^2. Based's kernel 1 + s +
    s^2/2 is half of that plus 1/2, the part that keeps a model from ignoring tokens. Queries and keys are now
    normalised, so their scores differ from before, and the model must be trained further. Its first loss is finite.

    Args:
        source: the folder of a Based model.
        destination: the new folder.
        overwrite: whether to replace `destination` if it exists.
        dry_run: whether to only report what maps where.

    Returns:
        A report of what maps where.

    Raises:
        ConversionError: the model is not a Based model, or its queries and keys are normalised already.
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
    fields = own_fields(config)
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
    tokens = load_tokenizer(Path(source), None, new)
    settings = load_generation_config(Path(source), new, tokens)
    if not dry_run:
        with written(destination, overwrite, source) as path:
            write_model(path, new, result, generation_config=settings, tokenizer=tokens)
    return report
