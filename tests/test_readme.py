"""Every python and bash block of README.md runs as it stands, in a copy of the checkout."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.processes import commands_for_scripts, run_python


REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)

# What the command `lm-eval` does, without its own tasks: reading some 13,000 files takes longer than all else.
LM_EVAL = """
from pathlib import Path
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import manager

build = manager.TaskIndex.build
own = Path(manager.__file__).parent
manager.TaskIndex.build = staticmethod(lambda paths: build([path for path in paths if path != own]))
cli_evaluate()
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder that looks like the checkout, in which output may be written."""
    for path in REPOSITORY.iterdir():
        if not path.name.startswith(".") and path.name not in ("output", "data"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_the_python_blocks_one_after_another(checkout):
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    done = run_python("-c", code, folder=checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a little girl named Lily." in done.stdout
    assert "torch.Size([2, 1000, 8, 64])" in done.stdout


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "bash"])
def test_a_bash_block(checkout, code):
    if "lm-eval" in code:
        pytest.importorskip("lm_eval")
    command = ["bash", "-euo", "pipefail", "-c", code]
    with commands_for_scripts({"python": [], "lm-eval": ["-c", LM_EVAL]}) as commands:
        environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bits_per_byte" in done.stdout or "model.safetensors" in done.stdout


def test_there_is_a_block_for_each_main_job():
    code = "\n".join(block for _, block in BLOCKS)
    for needed in (
        "AutoModelForCausalLM.from_pretrained",
        ".generate(",
        "modeling_rebased.training.train_lm",
        "lm-eval run",
    ):
        assert needed in code


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (REPOSITORY / target).exists(), target
