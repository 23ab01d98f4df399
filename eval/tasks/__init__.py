"""lm-eval tasks. `lm-eval run --include_path "$(rebased-tasks)" --tasks heldout_english ...` finds them."""

from pathlib import Path


def tasks_path() -> str:
    """Return the folder that lm-eval's `--include_path` wants."""
    return str(Path(__file__).resolve().parent)


def main() -> None:
    """Print that folder; the console script `rebased-tasks` and `python -m modeling_rebased.eval.tasks`."""
    print(tasks_path())
