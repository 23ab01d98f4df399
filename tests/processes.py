"""Run Python programs in processes of their own, and scripts on several processes.

A new process takes five seconds to import torch and transformers. The processes here are forked from one that has
imported both and nothing of this repository, so they start at once.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from multiprocessing.connection import Client, Listener
from multiprocessing.process import BaseProcess
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]

forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload(
    ["transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.generation"]
)


def start_python(
    *arguments: object,
    folder: Path = ROOT,
    environment: dict[str, str] | None = None,
    output: Path,
) -> BaseProcess:
    """Start what `python ARGUMENTS` does in `folder`, and write what it prints to `output`/stdout and /stderr.

    The first argument is a script, `-c` or `-m`. `environment` replaces this process's environment.
    """
    words = [str(argument) for argument in arguments]
    environment = dict(os.environ) if environment is None else environment
    process = forking.Process(target=_run, args=(words, str(folder), environment, str(output)))
    process.start()
    return process


def run_python(
    *arguments: object, folder: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run what `python ARGUMENTS` does to its end, as `subprocess.run` would."""
    with tempfile.TemporaryDirectory() as output:
        process = start_python(*arguments, folder=folder, environment=environment, output=Path(output))
        return _wait(process, Path(output))


COMMAND = """#!{python} -SE
import os
import sys
from multiprocessing.connection import Client

with Client({address!r}) as caller:
    caller.send(([*{first!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)))
    status, stdout, stderr = caller.recv()
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(status)
"""


@contextlib.contextmanager
def commands_for_scripts(commands: dict[str, list[str]]) -> Iterator[Path]:
    """Make a folder of commands for a shell script that run as `run_python` does: NAME does `python ARGUMENTS ...`."""
    with tempfile.TemporaryDirectory(prefix="commands-") as name, Listener(f"{name}/socket") as listener:
        folder = Path(name)
        for command, first in commands.items():
            text = COMMAND.format(python=sys.executable, address=listener.address, first=first)
            (folder / command).write_text(text, encoding="utf-8")
            (folder / command).chmod(0o700)

        def serve() -> None:
            with contextlib.suppress(EOFError, OSError):  # until a caller says nothing
                while True:
                    with listener.accept() as caller:
                        arguments, where, environment = caller.recv()
                        done = run_python(*arguments, folder=Path(where), environment=environment)
                        caller.send((done.returncode, done.stdout, done.stderr))

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield folder
        finally:
            Client(listener.address).close()


def run_with_processes(count: int, script: Path, *arguments: object) -> str:
    """Run a script on `count` processes, as torchrun does, with gloo between them. Return what the first printed."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in map(str, range(count)):
            output = Path(folder, rank)
            output.mkdir()
            own = {**environment, "RANK": rank, "LOCAL_RANK": rank}
            processes.append((start_python(script, *arguments, environment=own, output=output), output))
        done = [_wait(process, output) for process, output in processes]
    assert not any(each.returncode for each in done), "\n".join(each.stderr[-3000:] for each in done)
    return done[0].stdout


def _wait(process: BaseProcess, output: Path, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    printed = [(output / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([process.name], process.exitcode or 0, *printed)


def _run(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Become the process that `python WORDS` starts."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), number)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    # Leave out what pytest and transformers have put on the path.
    ours = ("", str(ROOT), os.environ["HF_MODULES_CACHE"], *os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [path for path in sys.path if path not in ours]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _read_environment()
    first = str(Path(words[0]).resolve().parent) if words[0].endswith(".py") else os.getcwd()
    given = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *given, *paths]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), module.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _read_environment() -> None:
    """Do what torch and transformers do with these variables when they are imported."""
    import torch
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "HF_MODULES_CACHE" in os.environ:
        dynamic_module_utils.HF_MODULES_CACHE = hub.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
