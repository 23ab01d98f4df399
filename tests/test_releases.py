"""The ranges of setup.cfg, the pins of constraints.txt and the script that tests both ends."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "tests" / "run_releases.py"


def requirements() -> list[tuple[str, str]]:
    """Return (name, range) for each requirement of each list in setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line.split(";")[0].strip() for text in lists for line in text.splitlines() if line.strip()]
    return [(re.match(r"[\w.-]+", line)[0], re.sub(r"^[\w.-]+", "", line)) for line in lines]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line)


def test_every_list_of_setup_cfg_states_the_same_range():
    ranges = {}
    for name, given in requirements():
        assert ranges.setdefault(name, given) == given, name


def test_every_pin_lies_in_its_range():
    version = pytest.importorskip("packaging.version")
    for name, given in requirements():
        if name in pins() and given:
            lower = re.fullmatch(r">=([\d.]+)", given)
            assert lower, f"{name}{given}: a range is a lower end, and both ends are tested"
            assert version.Version(pins()[name]) >= version.Version(lower[1]), name


def test_the_oldest_environment_gets_every_lower_end():
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import run_releases as r; print(r.lower_ends())"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.split("\n")
    tested = {name: given for name, given in requirements() if name in done.stdout}
    assert {"torch", "transformers", "triton", "accelerate", "peft", "lm-eval"} <= tested.keys()
    for name, given in tested.items():
        assert any(line.split(";")[0] == name + given.replace(">=", "==") for line in lines), name


def test_an_unknown_release_is_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "latest"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'latest' is unknown, choose from oldest, pinned, newest" in done.stderr
