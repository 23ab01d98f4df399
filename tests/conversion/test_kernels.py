"""export_kernels: a package that runs where neither modeling_rebased nor transformers can be imported."""

import ast
import json
import subprocess
import sys

import pytest
import torch

from modeling_rebased import rebased_attention
from modeling_rebased.attention_rebased import rebased_attention_decode
from modeling_rebased.conversion.cli import main
from modeling_rebased.conversion.kernels import BACKENDS


LOAD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_rebased", "transformers", "huggingface_hub"):
            raise ModuleNotFoundError(name)

folder, inputs, outputs, *names = sys.argv[1:]
packages = []
if names == ["kernels"]:
    from pathlib import Path

    import kernels

    sys.meta_path.insert(0, Blocker())
    packages.append(kernels.get_local_kernel(Path(folder)))
else:
    sys.meta_path.insert(0, Blocker())
    import importlib.util

    for name in names:
        path = f"{folder}/build/torch-{name}/__init__.py"
        spec = importlib.util.spec_from_file_location(f"rebased_{name}", path)
        packages.append(importlib.util.module_from_spec(spec))
        sys.modules[f"rebased_{name}"] = packages[-1]
        spec.loader.exec_module(packages[-1])

import torch

found = []
for package in packages:
    for q, k, v, options in torch.load(inputs):
        o, state = package.rebased_attention(q[:, :-1], k[:, :-1], v[:, :-1], output_final_state=True, **options)
        last = package.rebased_attention_decode(q[:, -1:], k[:, -1:], v[:, -1:], state, **options)
        found.append((o, last, state))
torch.save(found, outputs)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "rebased"
    assert main(["kernels", str(path)]) == 0
    return path


@pytest.mark.parametrize("names", [list(BACKENDS), ["kernels"]], ids=["as it is", "by the library"])
def test_same_numbers_without_this_package(names, folder, tmp_path):
    if names == ["kernels"]:
        pytest.importorskip("kernels", reason="the kernels library is not installed")
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 30, 4, 5), torch.randn(2, 30, 2, 5), torch.randn(2, 30, 2, 10)
    kernels = [{"coefficients": coefficients, "backend": "eager"} for coefficients in ((0, 0, 1), (1, 1, 0.5))]
    torch.save([(q, k, v, options) for options in kernels], tmp_path / "inputs.pt")
    arguments = [str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt"), *names]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for options, (o, last, state) in zip(kernels * len(names), torch.load(tmp_path / "outputs.pt"), strict=True):
        before, token = [x[:, :-1] for x in (q, k, v)], [x[:, -1:] for x in (q, k, v)]
        expected, expected_state = rebased_attention(*before, output_final_state=True, **options)
        expected_last = rebased_attention_decode(*token, expected_state, **options)
        assert torch.equal(o, expected)
        assert torch.equal(last, expected_last)
        assert torch.equal(state, expected_state)


def test_the_package_is_as_the_library_wants_it(folder):
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        metadata = json.loads((build / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["id"].isidentifier()
        for file in build.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1 and (build / f"{node.module}.py").is_file()
                elif isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "triton"}


def test_an_existing_folder_is_kept(folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["kernels", str(folder)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    assert main(["kernels", str(folder), "--overwrite"]) == 0
