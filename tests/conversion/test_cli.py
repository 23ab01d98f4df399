"""The command line: help, examples, exit statuses."""

import os
import runpy
import signal
from pathlib import Path

import pytest
import torch

from modeling_rebased.conversion.cli import EXAMPLES, main
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
    from modeling_rebased.conversion.cli import _parser

    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert status.value.code == 0 and "examples:" in printed
    for line in EXAMPLES[command].splitlines():
        assert line in printed
        program, *words = line.split()
        assert program == "rebased-convert"
        assert _parser().parse_args(words).command == command


@pytest.mark.filterwarnings("ignore:.*conversion.cli.*found in sys.modules")
def test_as_a_module(monkeypatch, capsys):
    """As `python -m modeling_rebased.conversion.cli` runs it."""
    monkeypatch.setattr("sys.argv", ["modeling_rebased.conversion.cli", "--help"])
    with pytest.raises(SystemExit) as status:
        runpy.run_module("modeling_rebased.conversion.cli", run_name="__main__")
    printed = capsys.readouterr().out
    assert status.value.code == 0 and all(command in printed for command in EXAMPLES)


def test_a_terminated_run_cleans_up(tmp_path, monkeypatch):
    torch.save(make_authors_model().state_dict(), tmp_path / "best.pt")
    monkeypatch.setattr(
        "modeling_rebased.conversion.writing.write_record", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as status:
        main(["from-authors", str(tmp_path / "best.pt"), str(tmp_path / "out"), "--num-heads", "3"])
    assert status.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
