"""What gets installed: one top-level name, all modules and data files under it, importable without the checkout."""

import ast
import configparser
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.processes import run_python


REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("modeling_rebased", "configuration", "conversion", "training", "serving", "eval")


def _process(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run python in `folder`, outside the checkout."""
    environment = {**os.environ, "PYTHONPATH": "", **environment}  # the checkout may be on the caller's path
    return run_python(*arguments, folder=folder, environment=environment)


def _run(arguments: list[str], folder: Path, **environment: str) -> str:
    """Run python in `folder`, outside the checkout, and return what it printed."""
    done = _process(arguments, folder, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the checkout's sources, unpacked as pip would."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    wheels = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(wheels), str(source)], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_one_top_level_name(unpacked_wheel):
    names = {path.name for path in unpacked_wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"modeling_rebased"}


def test_every_module_and_data_file_is_installed(unpacked_wheel):
    for folder in FOLDERS:
        target = unpacked_wheel / "modeling_rebased" / (folder if folder != "modeling_rebased" else "")
        for path in (REPOSITORY / folder).rglob("*"):
            results = path.relative_to(REPOSITORY / folder).parts[0] == "results"  # they stay in the repository
            if path.suffix in (".py", ".json", ".jsonl", ".yaml", ".txt") and not results:
                assert (target / path.relative_to(REPOSITORY / folder)).is_file(), f"{path} is not installed"


def test_the_installed_package_works_outside_the_checkout(unpacked_wheel, tmp_path):
    code = """
import modeling_rebased.training.train_lm, modeling_rebased.conversion, modeling_rebased.eval
from modeling_rebased.configuration import config_names, config_path
from transformers import AutoConfig
print(AutoConfig.from_pretrained(config_path(config_names()[0])).model_type, modeling_rebased.__file__)
"""
    printed = _run(["-c", code], tmp_path, PYTHONPATH=str(unpacked_wheel))
    assert printed.split() == ["rebased", str(unpacked_wheel / "modeling_rebased" / "__init__.py")]
    printed = _run(["-m", "modeling_rebased.eval.tasks"], tmp_path, PYTHONPATH=str(unpacked_wheel))
    assert printed.strip() == str(unpacked_wheel / "modeling_rebased" / "eval" / "tasks")


# Loads what was trained in a process without the package: a batch of two prompts, and each of them alone.
LOAD_AND_GENERATE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
assert type(model).__module__.startswith("transformers_modules.") and "modeling_rebased" not in sys.modules

def generate(prompts):
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, min_new_tokens=8, max_new_tokens=8, do_sample=False)
    return output[:, inputs["input_ids"].shape[1]:].tolist()

prompts = ["The dog", "A line about the quick brown fox, and"]
batch = generate(prompts)
assert batch == [generate([prompt])[0] for prompt in prompts], batch
print([len(each) for each in batch])
"""


def test_the_shortest_journey_of_a_new_user(unpacked_wheel, tmp_path):
    """Train in an installed environment outside the checkout, train again, and load the result without the package."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 50)
    installed = {"PYTHONPATH": str(unpacked_wheel), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    train = ["-m", "modeling_rebased.training.train_lm", "--train_file", "text.txt", "--output_dir", "run"]
    train += ["--max_steps", "2", "--context_length", "64", "--per_device_train_batch_size", "2", "--use_cpu", "True"]
    known = [*train, "--config", "english-6m"]
    _run(known, tmp_path, **installed)
    final = tmp_path / "run" / "final"
    written = {path: path.stat().st_mtime_ns for path in final.iterdir()}
    assert "is finished, after 2 steps" in _run(known, tmp_path, **installed)
    assert {path: path.stat().st_mtime_ns for path in final.iterdir()} == written

    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    (tmp_path / "load.py").write_text(LOAD_AND_GENERATE)
    assert _run(["load.py", str(final)], tmp_path, **alone).strip() == "[8, 8]"

    done = _process([*train, "--config", "nope"], tmp_path, **installed)
    assert done.returncode != 0 and "--config nope is no folder" in done.stderr
    names = {path.parent.name for path in (REPOSITORY / "configuration").glob("*/config.json")}
    assert names and all(name in done.stderr for name in names)
    done = _process(["-m", "modeling_rebased.eval.demo"], tmp_path, **installed)
    assert done.returncode != 0 and "needs a checkout of the repository" in done.stderr


def test_an_editable_install_finds_the_same_modules(tmp_path):
    """In `make test` the package is installed with `pip install -e`: its folders must not appear at the top."""
    code = """
import importlib.util
names = ("modeling_rebased", "configuration", "conversion", "training", "serving", "eval", "tests")
found = [name for name in names if importlib.util.find_spec(name)]
print(found)
if found:
    import modeling_rebased.training.train_lm as module
    print(module.__file__)
"""
    printed = _run(["-c", code], tmp_path)
    if printed.strip() == "[]":
        pytest.skip("modeling_rebased is not installed in this environment")
    top_level, path = printed.splitlines()
    assert top_level == "['modeling_rebased']"
    assert Path(path).parts[-2:] == ("training", "train_lm.py")


def test_setup_cfg_lists_every_package():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    listed = set(parser["options"]["packages"].split())
    found = set()
    for folder in FOLDERS:
        for init in (REPOSITORY / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(REPOSITORY).parts
            found.add(".".join(parts if folder == "modeling_rebased" else ("modeling_rebased", *parts)))
    assert listed == found


def test_console_commands_are_functions_of_the_package():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    commands = dict(
        line.split(" = ") for line in parser["options.entry_points"]["console_scripts"].split("\n") if line
    )
    names = ["convert", "distill", "icll", "mad", "mqar", "sample", "tasks", "train"]
    assert sorted(commands) == [f"rebased-{name}" for name in names]
    for target in commands.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_package_has_a_version_and_types(unpacked_wheel):
    import modeling_rebased

    (metadata,) = unpacked_wheel.glob("*.dist-info/METADATA")
    assert f"\nVersion: {modeling_rebased.__version__}\n" in metadata.read_text()
    assert (unpacked_wheel / "modeling_rebased" / "py.typed").is_file()


def test_the_model_folder_stays_flat_and_self_contained():
    """transformers copies a checkpoint's code by following `from .name import`, in one folder."""
    folder = REPOSITORY / "modeling_rebased"
    assert [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"] == []
    for path in folder.glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("."):
                assert (folder / f"{words[1][1:]}.py").is_file(), f"{path.name}: {line.strip()}"
    assert importlib.util.find_spec("modeling_rebased").submodule_search_locations


def test_no_command_accepts_shortened_options():
    """A misspelt option must not count as the one that it begins, so every parser is made with allow_abbrev=False."""
    for path in (path for folder in (*FOLDERS, "examples") for path in (REPOSITORY / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("ArgumentParser", ".add_parser")):
                values = [ast.unparse(word.value) for word in call.keywords if word.arg == "allow_abbrev"]
                assert values == ["False"], f"{path}:{call.lineno}"
