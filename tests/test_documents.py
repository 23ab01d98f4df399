"""The documents are true: snippets run, links lead somewhere, tables have the figures of the results."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.processes import run_python


REPOSITORY = Path(__file__).resolve().parents[1]
CARDS = sorted((REPOSITORY / "checkpoints").glob("*/README.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")), *CARDS]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def docs_on_the_path():
    """docs/ is no package that is installed: its two programs are imported from the checkout."""
    sys.path.insert(0, str(REPOSITORY))
    yield
    sys.path.remove(str(REPOSITORY))


def program(name: str):
    return importlib.import_module(f"docs.{name}")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len(text_of(REPOSITORY / "README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_python_blocks_run_as_they_stand():
    """Each page's blocks one after another, with names of their own; all pages in one process, in the checkout."""
    others = ("README.md", "CONTRIBUTING.md", "docs/api.md")  # README has a test of its own, api.md has doctests
    names = [page.relative_to(REPOSITORY).as_posix() for page in PAGES]
    pages = {name: "\n".join(PYTHON.findall(text_of(REPOSITORY / name))) for name in names if name not in others}
    pages = {name: code for name, code in pages.items() if code}
    assert {"docs/getting-started.md", "docs/model.md", "docs/kernels.md", "docs/training.md"} <= pages.keys()
    assert len([name for name in pages if name.startswith("checkpoints")]) == len(CARDS)
    code = "\n".join(f"exec(compile({code!r}, {name!r}, 'exec'), {{}})" for name, code in pages.items())
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\n5000\n" in done.stdout  # what the card of mqar-d128 says that its model answers


def test_tables_are_those_of_the_results():
    program("tables").main(["--check"])


def test_a_stale_table_is_noticed(tmp_path, monkeypatch):
    tables = program("tables")
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [tmp_path / "README.md", *(tmp_path / "docs").glob("*.md")])
    page = tmp_path / "docs" / "kernels.md"
    fresh = text_of(page)
    begin = fresh.index("<!-- table: models-training -->")
    page.write_text(fresh[:begin] + fresh[begin:].replace("| 2,048 |", "| 2,049 |", 1), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"kernels\.md has stale tables"):
        tables.main(["--check"])
    tables.main([])
    assert text_of(page) == fresh


def test_every_table_of_the_script_stands_in_a_page():
    tables = program("tables")
    used = [name for page in tables.pages() for name in re.findall(r"<!-- table: ([\w-]+) -->", text_of(page))]
    assert sorted(used) == sorted(tables.TABLES)


def test_tables_of_recall_leave_out_runs_that_are_not_the_papers(monkeypatch):
    tables, recall = program("tables"), program("tables.recall")
    named = ("figure", "differences", "coverage", "rates", "falls", "declines", "ablation", "variants")
    made = {name: tables.TABLES[f"mqar-{name}"] for name in named}
    before = {name: make() for name, make in made.items()}
    runs = recall.every_mqar_run()
    changes = [
        {"stopped": "deadline", "epochs_trained": 3},
        {"epochs": 20, "epochs_trained": 20},
        {"stop_at": 0.5},
        {"batch_size": 64},
    ]
    found = [*runs, *({**run, "accuracy": 0.7, **change} for run in runs for change in changes)]
    monkeypatch.setattr(recall, "every_mqar_run", lambda: found)
    assert {name: make() for name, make in made.items()} == before
    found[:] = [*runs, *({**run, "accuracy": 0.7, "pairs": 2} for run in runs)]
    del made["differences"]  # it compares them in rows of their own
    assert {name: make() for name, make in made.items()} == {name: before[name] for name in made}


def test_the_api_page_is_current():
    program("make_api").main(["--check"])


def test_the_api_page_has_every_public_name():
    make_api = program("make_api")
    page = text_of(make_api.PAGE)
    for module_name, names in make_api.MODULES.items():
        for name in names or importlib.import_module(module_name).__all__:
            assert f"\n### {name}\n" in page, name


def test_a_docstring_as_markdown():
    made = program("make_api").as_markdown(
        """Add.

        Args:
            a, b (`int`): two
                numbers.
            c: one more.

        Returns:
            The sum.
        """
    )
    assert made == (
        "Add.\n\n**Arguments**\n\n- `a`, `b` (`int`): two numbers.\n- `c`: one more.\n\n**Returns**\n\nThe sum."
    )
