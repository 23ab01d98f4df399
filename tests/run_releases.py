"""Run the test suite in one environment per release and print a table of the results.

    python tests/run_releases.py                      # the three releases below
    python tests/run_releases.py newest               # one of them
    python tests/run_releases.py oldest --tests tests/training   # a part of the suite

    oldest    every requirement of setup.cfg at the lower end of its range
    pinned    the releases of constraints.txt
    newest    whatever pip chooses today without any pin

The environments stay in `.venv-releases/`, so that a second run installs only what has changed. The exit status is
1 if a test failed or could not be collected in any of them. Only the standard library is needed.
"""

import argparse
import configparser
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from xml.etree import ElementTree


REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENTS = REPOSITORY / ".venv-releases"
RELEASES = ("oldest", "pinned", "newest")
SHOWN = ("torch", "transformers", "triton", "accelerate", "peft")
VERSIONS = """
import importlib.metadata as metadata, json, platform, sys
print(json.dumps([platform.python_version(), *map(metadata.version, sys.argv[1:])]))
"""


def lower_ends() -> str:
    """Return constraints that hold every requirement of setup.cfg at the lower end of its range."""
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    lines = parser["options"]["install_requires"].split("\n") + parser["options.extras_require"]["test"].split("\n")
    return "\n".join(line.replace(">=", "==", 1) for line in lines if ">=" in line) + "\n"


def prepare(release: str) -> Path:
    """Make or update the environment of a release and return its interpreter."""
    folder = ENVIRONMENTS / release
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    options = ["--upgrade", "--upgrade-strategy", "eager"]
    if release == "pinned":
        options = ["--constraint", str(REPOSITORY / "constraints.txt")]
    elif release == "oldest":
        constraints = ENVIRONMENTS / "oldest.txt"
        constraints.write_text(lower_ends(), encoding="utf-8")
        options = ["--constraint", str(constraints)]
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *options, "-e", ".[test]"]
    subprocess.run(pip, cwd=REPOSITORY, check=True)
    return python


def test(release: str, python: Path, tests: list[str], workers: str) -> tuple[list[str], list[str]]:
    """Run the tests with this interpreter and return the table's row and the names of what failed."""
    printed = subprocess.run([python, "-c", VERSIONS, *SHOWN], check=True, capture_output=True, text=True).stdout
    report = ENVIRONMENTS / f"{release}.xml"
    report.unlink(missing_ok=True)
    pytest = [python, "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal", "-p", "no:cacheprovider"]
    pytest += [f"--junit-xml={report}", *tests]
    status = subprocess.run(pytest, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": ""}).returncode
    if not report.exists():
        return [release, *json.loads(printed), "-", "-", "-", "-"], [f"pytest ended with status {status}"]
    suite = ElementTree.parse(report).find("testsuite")
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    seconds = round(float(suite.get("time")))
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if status and not names:
        names = [f"pytest ended with status {status}"]
    return [release, *json.loads(printed), str(passed), str(failed), str(count["skipped"]), str(seconds)], names


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("releases", nargs="*", metavar="release", help=f"any of {', '.join(RELEASES)}; default: all")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files and folders; default: the whole suite")
    parser.add_argument("--workers", default="2", help="processes that run tests side by side; default: 2")
    arguments = parser.parse_args()
    for release in arguments.releases:
        if release not in RELEASES:
            parser.error(f"release: {release!r} is unknown, choose from {', '.join(RELEASES)}")
    ENVIRONMENTS.mkdir(exist_ok=True)
    rows, failures = [], []
    for release in arguments.releases or RELEASES:
        print(f"== {release}: installing", flush=True)
        python = prepare(release)
        print(f"== {release}: testing", flush=True)
        row, names = test(release, python, arguments.tests, arguments.workers)
        rows.append(row)
        failures += [f"{release}: {name}" for name in names]
    header = ["release", "python", *SHOWN, "passed", "failed", "skipped", "seconds"]
    print("\n| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    for name in failures:
        print(f"FAILED {name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
