"""Check that a folder works with torch and transformers alone, and computes what its source computes."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import modeling_rebased
from modeling_rebased import ReBasedForCausalLM

from .reading import load_config, load_folder
from .report import ConversionError, Report


def verify(
    folder: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    tolerance: float = 1e-5,
    new_tokens: int = 8,
    timeout: float = 900,
) -> Report:
    """Load a folder as a stranger would, compare its logits with those of its source, and let it generate.

    A separate process loads the folder with `trust_remote_code=True`. That process can import only torch, transformers
    and what these require. It runs the code in the folder, so verify only a folder whose code you would run.

    Args:
        folder: the folder of a model.
        source: the folder of the model that it was made from. By default `folder` itself, run by this package's code.
        tolerance: the largest difference of logits in float32, absolute or relative. If the weights were cast to
            another dtype, a larger tolerance is needed: about 0.05 for bfloat16.
        new_tokens: number of tokens to generate.
        timeout: number of seconds to wait for the process.

    Returns:
        A report of what was found.

    Raises:
        ConversionError: the folder does not load, its logits differ from the source's, or it generates other tokens
            with the cache than without it.
    """
    for name, value in (("--tolerance", tolerance), ("--timeout", timeout)):
        if not value > 0:
            raise ConversionError(f"{name} is {value:g}; it must be positive.")
    if new_tokens < 1:
        raise ConversionError(f"--new-tokens is {new_tokens}; it must be at least 1.")
    path = Path(folder)
    config, state = load_folder(path)
    source_config = config if source is None else load_config(Path(source))
    if source_config.vocab_size != config.vocab_size:
        raise ConversionError(
            f"--source {str(source)!r} has vocab_size {source_config.vocab_size}; DIR has {config.vocab_size}."
        )
    length = 24 + new_tokens
    if config.position_embedding_type == "learned":
        length = min(length, config.max_position_embeddings)
    if length <= new_tokens:
        raise ConversionError(
            f"--new-tokens is {new_tokens}, but the model's learned positions end at {config.max_position_embeddings}."
        )
    ids = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))

    logits, found = _as_stranger(path, ids, new_tokens, timeout)
    model = ReBasedForCausalLM.from_pretrained(path if source is None else source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    difference = float((logits - expected).abs().max())
    if not torch.allclose(logits, expected, atol=tolerance, rtol=tolerance):
        raise ConversionError(
            f"The logits of {str(folder)!r} differ from those of {str(source or 'its own weights')!r} by up to "
            f"{difference:.3g}, more than --tolerance {tolerance:g}."
        )
    if found["generated"] != found["without_cache"]:
        raise ConversionError(
            f"{str(folder)!r} generates {found['generated']} with the cache and {found['without_cache']} without it."
        )
    code = Path(modeling_rebased.__file__).parent
    changed = sorted(
        file.name
        for file in path.glob("*.py")
        if not (code / file.name).is_file() or not filecmp.cmp(file, code / file.name, shallow=False)
    )
    report = Report(str(folder), "", closing=f"{folder}: works")
    report.notes = [
        f"loaded with torch and transformers alone: {found['parameters']:,} parameters, {len(state)} tensors",
        f"code: {'this version of the package' if not changed else 'another version: ' + ', '.join(changed)}",
        f"logits against {source or 'its own weights in this package'}: largest difference {difference:.3g}",
        f"generated {len(found['generated'])} tokens, the same with the cache and without it",
        f"tokenizer: {'none, or it does not load: ' + found['tokenizer'] if found['tokenizer'] else 'loads'}",
    ]
    if found["text"] is not None:
        report.notes.append(f"generated text, after random tokens: {found['text']!r}")
    return report


def _as_stranger(
    folder: Path, ids: torch.Tensor, new_tokens: int, timeout: float
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the logits of `ids` and what else load_as_stranger.py finds, in a process without this package."""
    with tempfile.TemporaryDirectory(prefix="rebased-verify-") as work:
        # A copy, so that the files beside the script cannot be imported from there.
        script = shutil.copy(Path(__file__).with_name("load_as_stranger.py"), work)
        torch.save(ids, Path(work) / "ids.pt")
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(work) / "modules"), "HF_HUB_OFFLINE": "1"}
        environment.pop("TRITON_INTERPRET", None)
        try:
            done = subprocess.run(
                [sys.executable, str(script), str(folder.resolve()), work, str(new_tokens)],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise ConversionError(f"{str(folder)!r} was not loaded and run within {timeout:g} seconds.") from error
        if done.returncode != 0:
            raise ConversionError(
                f"{str(folder)!r} does not load where only torch and transformers are:\n{done.stderr[-3000:].strip()}"
            )
        logits = torch.load(Path(work) / "logits.pt", weights_only=True)
        found = json.loads((Path(work) / "found.json").read_text(encoding="utf-8"))
    return logits, found
