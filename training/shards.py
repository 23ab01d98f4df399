"""Keep token ids as numbered files, so that texts of any size are written in parts and mapped into memory.

A folder of shards holds
    shard-00000.bin, shard-00001.bin, ...    token ids, little-endian, one after another, without a header
    shard-00000.bin.xz, ...                  the same compressed; what is not there uncompressed is unpacked when read
    index.json                               what they are

`index.json` has the fields
    "vocab_size"    ids are below this number
    "tokenizer"     hash of the tokenizer (`tokenizer_identity`)
    "dtype"         "uint16", or "uint32" for vocabularies above 65,536
    "tokens"        number of tokens in all shards
    "shards"        a list in the order in which they are read, with "file", "tokens", "bytes" (of the text in UTF-8,
                    without special tokens) and "sha256" per shard
    "made_by"       how the shards were made: whatever the program that wrote them says
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .folders import write_text, written


INDEX = "index.json"


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's rules and vocabulary, or of its vocabulary alone if it has no fast backend.

    How it pads and truncates is left out. A fast tokenizer keeps that from the last call in which it did.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not (backend.padding is None and backend.truncation is None):
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def shard_dtype(vocab_size: int) -> np.dtype:
    """Return the type of ids below `vocab_size`, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_path(folder: str | os.PathLike, number: int) -> Path:
    """Return the path of a shard."""
    return Path(folder) / f"shard-{number:05d}.bin"


def write_shard(folder: str | os.PathLike, number: int, ids: np.ndarray, vocab_size: int) -> None:
    """Write one shard. It appears under its name when it is complete.

    Raises:
        ValueError: an id is negative, or not below `vocab_size`.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids must be 0 to {vocab_size - 1}, but are {ids.min()} to {ids.max()}.")
    with written(shard_path(folder, number)) as path:
        ids.astype(shard_dtype(vocab_size)).tofile(path)


def compress_shard(folder: str | os.PathLike, number: int) -> None:
    """Compress a shard to about half its size, and remove the uncompressed file."""
    plain = shard_path(folder, number)
    with written(f"{plain}.xz") as path:
        path.write_bytes(lzma.compress(plain.read_bytes(), preset=1))  # more takes three times as long for a tenth
    plain.unlink()


def unpack_shard(path: Path) -> None:
    """Write the uncompressed file of a shard from the compressed one beside it.

    Raises:
        ValueError: the compressed file is damaged.
    """
    packed = path.with_name(f"{path.name}.xz")
    try:
        raw = lzma.decompress(packed.read_bytes())
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{packed} is damaged: {error}") from error
    with written(path) as unfinished:
        unfinished.write_bytes(raw)


def write_index(
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    made_by: dict[str, Any],
    num_bytes: Sequence[int] | None = None,
) -> int:
    """Write the index of all shards that are there, and return the number of their tokens.

    Shards that an older index lists with the same size are not read again. `num_bytes` is the size of the text of each
    shard. By default the ids are decoded to learn it.
    """
    folder = Path(folder)
    known = {each["file"]: each for each in load_index(folder).get("shards", [])} if (folder / INDEX).exists() else {}
    dtype = shard_dtype(len(tokenizer))
    shards = []
    for number, path in enumerate(sorted(folder.glob("shard-?????.bin"))):
        tokens = path.stat().st_size // dtype.itemsize
        entry = known.get(path.name)
        if entry is None or entry["tokens"] != tokens:
            raw = path.read_bytes()
            if num_bytes is None:
                text = tokenizer.decode(np.frombuffer(raw, dtype=dtype).tolist(), skip_special_tokens=True)
                size = len(text.encode())
            else:
                size = num_bytes[number]
            digest = hashlib.sha256(raw).hexdigest()
            entry = {"file": path.name, "tokens": tokens, "bytes": size, "sha256": digest}
        shards.append(entry)
    total = sum(each["tokens"] for each in shards)
    content = {
        "vocab_size": len(tokenizer),
        "tokenizer": tokenizer_identity(tokenizer),
        "dtype": dtype.name,
        "tokens": total,
        "shards": shards,
        "made_by": made_by,
    }
    write_text(folder / INDEX, json.dumps(content, indent=1) + "\n")
    return total


def load_index(folder: str | os.PathLike) -> dict[str, Any]:
    """Return the index of a folder, whatever became of the shards.

    Raises:
        ValueError: there is no index, or it cannot be read.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of shards: it has no {INDEX}.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        fields = ("vocab_size", "tokenizer", "dtype", "tokens", "shards")
        missing = [name for name in fields if name not in index]
        if missing or index["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"without {', '.join(missing)}" if missing else f"its dtype is {index['dtype']!r}")
        of_shard = ("file", "tokens", "bytes", "sha256")
        if not all(name in each for each in index["shards"] for name in of_shard):
            raise ValueError(f"a shard lacks one of {', '.join(of_shard)}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no index of shards: {error}") from error
    return index


def read_index(folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Return the index of a folder of shards, whose compressed shards are unpacked first.

    Raises:
        ValueError: there is no index, it cannot be read, a shard is missing or has another size than the index says,
            or `tokenizer` is given and did not make the shards. The message names the folder.
    """
    folder = Path(folder)
    index = load_index(folder)
    if tokenizer is not None and index["tokenizer"] != tokenizer_identity(tokenizer):
        raise ValueError(
            f"{folder} holds ids of another tokenizer: its hash is {index['tokenizer']}, and that of the one given "
            f"is {tokenizer_identity(tokenizer)}."
        )
    itemsize = np.dtype(index["dtype"]).itemsize
    for each in index["shards"]:
        path = folder / each["file"]
        if not path.is_file() and path.with_name(f"{path.name}.xz").is_file():
            unpack_shard(path)
        size = path.stat().st_size if path.is_file() else None
        if size != each["tokens"] * itemsize:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise ValueError(f"{path} {found}, but {INDEX} says {each['tokens']:,} tokens of {itemsize} bytes.")
    return index


def map_shards(folder: str | os.PathLike, index: dict[str, Any]) -> list[np.ndarray]:
    """Return the shards of an index, each mapped into memory, [tokens]."""
    dtype = np.dtype(index["dtype"]).newbyteorder("<")
    names = [each["file"] for each in index["shards"] if each["tokens"]]  # an empty file cannot be mapped
    return [np.memmap(Path(folder) / name, dtype=dtype, mode="r") for name in names]


class JoinedArrays:
    """Read several vectors as one, without a copy of them all.

    Args:
        parts: vectors of numbers.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"the step of a slice must be 1, but is {step}")
        found = []
        for i in range(int(np.searchsorted(self.ends, start, side="right")), len(self.parts)):
            first = int(self.ends[i]) - len(self.parts[i])
            if first >= stop:
                break
            found.append(self.parts[i][max(0, start - first) : stop - first])
        return np.concatenate(found) if found else np.empty(0, np.int64)
