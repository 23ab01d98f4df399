"""What the tests of pictures share."""

import pytest


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, as they are when they are saved."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept = []
    # Older releases of matplotlib close "all" when they change the backend.
    monkeypatch.setattr(pyplot, "close", lambda figure: None if figure == "all" else kept.append(figure))
    yield kept
    monkeypatch.undo()
    pyplot.close("all")
