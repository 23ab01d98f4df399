"""Load a model's folder where only torch and transformers can be imported: the script that `verify` runs.

    python load_as_stranger.py FOLDER WORK NEW_TOKENS

It reads the token ids in WORK/ids.pt, and writes the logits to WORK/logits.pt and what it found to WORK/found.json.
"""

import importlib.util
import json
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def normalised(name: str) -> str:
    """Return a distribution's name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def allowed_modules() -> set[str]:
    """Return the modules of torch, transformers and what they require, without extras, and of Python."""
    needed, queue = set(), ["torch", "transformers"]
    while queue:
        name = normalised(queue.pop())
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
    allowed = {module for module, names in modules.items() if needed & set(map(normalised, names))}
    return allowed | set(sys.stdlib_module_names) | {"transformers_modules", "packaging"}


def block_others(allowed: set[str]) -> None:
    """Let no other module be imported or found from here on."""

    def is_allowed(name: str) -> bool:
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


def main(folder: str, work: Path, new_tokens: int) -> None:
    """Load the folder, compute logits, generate with the cache and without it, and write what was found."""
    block_others(allowed_modules())
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
    ids = torch.load(work / "ids.pt", weights_only=True)
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
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # each tokenizer class has its own errors
        found["tokenizer"] = f"{type(error).__name__}: {error}"
    else:
        found["tokenizer"] = None
        found["text"] = tokenizer.decode(outs[0])
    torch.save(logits, work / "logits.pt")
    (work / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
