"""Does a folder work for a stranger, who has torch and transformers and nothing else, and say what its source says?"""

import filecmp
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import modeling_rebased
from modeling_rebased import ReBasedForCausalLM

from .files import ConversionError, Report, load_config, load_folder


# Run in a process of its own: `python script.py FOLDER WORK NEW_TOKENS`.
STRANGER = """
import importlib.metadata as metadata
import importlib.util
import json
import re
import sys

from packaging.requirements import Requirement

folder, work, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])


def name_of(name):
    return re.sub(r"[-_.]+", "-", name).lower()


# torch, transformers and what they require, without extras.
needed, queue = set(), ["torch", "transformers"]
while queue:
    name = name_of(queue.pop())
    if name in needed:
        continue
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    needed.add(name)
    for requirement in map(Requirement, requires):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            queue.append(requirement.name)
modules = metadata.packages_distributions()
allowed = {module for module, names in modules.items() if needed & set(map(name_of, names))}
allowed |= set(sys.stdlib_module_names) | {"transformers_modules", "packaging"}


def is_allowed(name):
    return name.split(".")[0] in allowed or name.startswith("_sysconfigdata")


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if not is_allowed(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


for name in [name for name in sys.modules if name.split(".")[0] == "modeling_rebased"]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: find_spec(name, *args) if is_allowed(name) else None

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, loading = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
)
model.eval()
if not type(model).__module__.startswith("transformers_modules."):
    raise SystemExit(f"the model's class is {type(model).__module__}, not the folder's own code")
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    if loading[kind]:
        raise SystemExit(f"{kind}: {sorted(map(str, loading[kind]))[:5]}")
ids = torch.load(work + "/ids.pt", weights_only=True)
with torch.no_grad():
    logits = model(ids, use_cache=False).logits
prompt = ids[:1, : max(1, ids.shape[1] - new_tokens)]
outs = []
for use_cache in (True, False):
    out = model.generate(
        prompt, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, use_cache=use_cache
    )
    outs.append(out[0, prompt.shape[1] :].tolist())
found = {"parameters": model.num_parameters(), "generated": outs[0], "without_cache": outs[1], "text": None}
try:
    tokenizer = AutoTokenizer.from_pretrained(folder)
except Exception as error:
    found["tokenizer"] = f"{type(error).__name__}: {error}"
else:
    found["tokenizer"] = None
    found["text"] = tokenizer.decode(outs[0])
torch.save(logits, work + "/logits.pt")
with open(work + "/found.json", "w") as file:
    json.dump(found, file)
"""


def verify(
    folder: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    tolerance: float = 1e-5,
    new_tokens: int = 8,
    timeout: float = 900,
) -> Report:
    """Load a folder as a stranger would, compare its logits with its source's, and let it generate.

    A process of its own loads the folder with `trust_remote_code=True`; in it only torch, transformers and what these
    require can be imported. That runs the code in the folder: verify only a folder that you would run.

    Args:
        folder: the folder of a model.
        source: the folder of the model it was made from; by default `folder` itself, run by this package's code.
        tolerance: the largest difference of logits in float32, absolute or relative. Weights of another type than the
            source's need a larger one: about 0.05 for bfloat16.
        new_tokens: how many tokens to generate.
        timeout: seconds to wait for the process.

    Returns:
        What was found.

    Raises:
        ConversionError: the folder does not load, says something else than its source, or generates other tokens with
            the cache than without it.
    """
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

    with tempfile.TemporaryDirectory(prefix="rebased-verify-") as work:
        script = Path(work) / "stranger.py"
        script.write_text(STRANGER, encoding="utf-8")
        torch.save(ids, Path(work) / "ids.pt")
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(work) / "modules"), "HF_HUB_OFFLINE": "1"}
        environment.pop("TRITON_INTERPRET", None)
        try:
            done = subprocess.run(
                [sys.executable, str(script), str(path.resolve()), work, str(new_tokens)],
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
