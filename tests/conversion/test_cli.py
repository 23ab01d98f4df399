"""The command line: help, examples, exit statuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion.cli import EXAMPLES, main
from tests.conversion.authors_model import make_authors_model


def test_there_and_back(tmp_path, capsys):
    torch.save(make_authors_model().state_dict(), tmp_path / "best.pt")
    out, again = str(tmp_path / "out"), str(tmp_path / "again.pt")
    assert main(["from-authors", str(tmp_path / "best.pt"), out, "--num-heads", "3", "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out and not Path(out).exists()
    assert main(["from-authors", str(tmp_path / "best.pt"), out, "--num-heads", "3"]) == 0
    assert main(["to-authors", out, again]) == 0
    assert "tensors:" in capsys.readouterr().out
    assert main(["to-authors", out, again]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["to-authors", out, again, "--overwrite"]) == 0


def test_an_error_is_one_line_and_a_status(tmp_path, capsys):
    assert main(["from-authors", str(tmp_path / "no.pt"), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("rebased-convert: error: SOURCE")
    with pytest.raises(SystemExit) as status:
        main(["from-authors", "a", "b", "--kernel", "cosine"])
    assert status.value.code == 2


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_has_examples_that_parse(command, capsys):
    from conversion.cli import _parser

    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert status.value.code == 0 and "examples:" in printed
    for line in EXAMPLES[command].splitlines():
        assert line in printed
        program, *words = line.split()
        assert program == "rebased-convert"
        assert _parser().parse_args(words).command == command


def test_from_a_checkout(tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "conversion.cli", "--help"],
        cwd=root,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "from-authors" in done.stdout, done.stderr
