"""Copy the model's code beside the weights of every checkpoint that ships with the repository.

    python -m training.sync_checkpoints            # or `make sync`, after a change in modeling_rebased/

A checkpoint folder carries its own code (config.json's auto_map names it), so that `trust_remote_code=True` loads it
where this package is not installed. The copies are made by hand, not by save_pretrained, so that weights stay as they
are.
"""

import json
import shutil
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted((REPOSITORY / "modeling_rebased").glob("*_rebased.py"))


def checkpoint_folders() -> list[Path]:
    """Return the folders under checkpoints/ whose config.json refers to code of their own."""
    configs = sorted((REPOSITORY / "checkpoints").glob("*/config.json"))
    return [path.parent for path in configs if "auto_map" in json.loads(path.read_text(encoding="utf-8"))]


def out_of_sync(folder: Path) -> list[str]:
    """Return the names of the files in `folder` that differ from modeling_rebased/, are missing, or too many."""
    expected = {source.name: source.read_bytes() for source in SOURCES}
    found = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def sync(folder: Path) -> None:
    """Make the code in `folder` equal to modeling_rebased/."""
    for path in folder.glob("*.py"):
        path.unlink()
    for source in SOURCES:
        shutil.copyfile(source, folder / source.name)


if __name__ == "__main__":
    for checkpoint in checkpoint_folders():
        changed = out_of_sync(checkpoint)
        sync(checkpoint)
        print(f"{checkpoint.relative_to(REPOSITORY)}: {', '.join(changed) or 'already in sync'}")
