"""Make a package for Hugging Face's `kernels` library, for programs that have not installed this package.

`kernels.get_local_kernel` loads the package from a folder, and `kernels.get_kernel` from a repository of the Hub to
which the folder was uploaded. It is pure Python and needs torch alone, and Triton on a GPU. Its files are copies of
this package's own, made when the command runs.
"""

import ast
import json
import os
import re
from pathlib import Path

import modeling_rebased

from .writing import written


SOURCE = Path(modeling_rebased.__file__).parent
ENTRY = "attention_rebased"
CONFIGURATION = "configuration_rebased"  # the operator needs a few numbers of it, and no transformers
BACKENDS = ("cpu", "cuda")
VERSION = 1  # of the package's interface, for `kernels.get_kernel(..., version=1)`

INIT = '''"""ReBased attention: causal linear attention with a learnable quadratic kernel (Aksenov et al., 2024)."""

from .attention_rebased import rebased_attention, rebased_attention_decode


__all__ = ["rebased_attention", "rebased_attention_decode"]
'''


def export_kernels(folder: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Write the operator as a package for Hugging Face's `kernels` library.

    Args:
        folder: the new folder. It gets `build/torch-cpu` and `build/torch-cuda`, each with the same Python files
            and a `metadata.json` of its own.
        overwrite: whether to replace `folder` if it exists.

    Returns:
        What was written and how to load it.

    Raises:
        ConversionError: `folder` exists and `overwrite` is false.
    """
    files = operator_files()
    with written(folder, overwrite) as path:
        for backend in BACKENDS:
            build = path / "build" / f"torch-{backend}"
            build.mkdir(parents=True)
            for name, text in files.items():
                (build / name).write_text(text, encoding="utf-8")
            metadata = {
                "id": f"rebased_{backend}_{VERSION}",  # the name under which Python imports it
                "name": "rebased",
                "version": VERSION,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": backend},
            }
            (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return (
        f"Wrote {folder} with {', '.join(files)} for {' and '.join(BACKENDS)}.\n"
        f"Load it with kernels.get_local_kernel(Path({str(folder)!r})).rebased_attention(q, k, v)."
    )


def operator_files() -> dict[str, str]:
    """Return the Python files of the package: the operator's and what they import, by name.

    Of the configuration's file only those definitions are kept that the others import, because the file as a whole
    needs transformers.
    """
    files, wanted, todo = {}, set(), [ENTRY]
    while todo:
        module = todo.pop()
        text = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
        files[f"{module}.py"] = text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                if node.module == CONFIGURATION:
                    wanted |= {alias.name for alias in node.names}
                elif f"{node.module}.py" not in files and node.module not in todo:
                    todo.append(node.module)
    if wanted:
        files[f"{CONFIGURATION}.py"] = definitions_of(CONFIGURATION, wanted)
    return {"__init__.py": INIT} | dict(sorted(files.items()))


def definitions_of(module: str, wanted: set[str]) -> str:
    """Return those top-level functions and constants of a module that have these names, and those that they use."""
    text = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
    kept, todo = set(), sorted(wanted)
    while todo:
        name = todo.pop()
        kept.add(name)
        used = {node.id for node in ast.walk(definitions[name]) if isinstance(node, ast.Name)}
        todo += [other for other in used if other in definitions and other not in kept]
    parts = ['"""Numbers of the operator."""']
    parts += [ast.get_source_segment(text, node) or "" for name, node in definitions.items() if name in kept]
    license_line = re.match(r"#[^\n]*\n", text)
    return (license_line.group() if license_line else "") + "\n\n\n".join(parts) + "\n"
