"""The demo's own parts; `make demo` is the whole of it."""

import sys

import pytest

from modeling_rebased.eval import demo


def test_a_long_command_shows_that_it_lives(tmp_path, capsys):
    code = "import sys, time; time.sleep(1); print('out'); print('err', file=sys.stderr); sys.exit(3)"
    status, said = demo.run_with_clock([sys.executable, "-c", code], {}, tmp_path / "log", every=0.2)
    assert status == 3 and sorted(said.split()) == ["err", "out"]
    assert capsys.readouterr().out.count("s so far") >= 2


def test_what_the_demo_needs_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", str(tmp_path)])
    with pytest.raises(SystemExit):
        demo.main()
    assert f"{tmp_path} holds no model. The demo needs a checkout" in capsys.readouterr().err
