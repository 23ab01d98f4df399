"""Read documents and make blocks of tokens: the one place that knows how text is stored, joined and cut.

Documents stand in text files, where `<|endoftext|>` separates them, or in JSON lines under the key "text". The rule is
the same in training, distillation and evaluation: each document is encoded by itself, and the end-of-text token stands
before it. So a model always sees that token before a document begins, and it ends a document by writing it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .folders import written
from .shards import JoinedArrays, map_shards, read_index, tokenizer_identity


END_OF_TEXT = "<|endoftext|>"


def read_documents(files: Iterable[str | os.PathLike]) -> list[str]:
    """Return the documents of some files, in order, without those that are blank.

    Args:
        files: text files in UTF-8, in which `<|endoftext|>` separates documents, or `.jsonl` files with one JSON
            object with a "text" per line.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is not UTF-8, or a line of a `.jsonl` file is no JSON object with a string "text". The
            message names the file and the line or byte.
    """
    documents: list[str] = []
    for name in files:
        try:
            text = Path(name).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"{name} must be text in UTF-8, at byte {error.start} it is not: 0x{byte:02x}") from None
        documents += _json_lines(name, text) if Path(name).suffix == ".jsonl" else text.split(END_OF_TEXT)
    return [document for document in documents if document.strip()]


def _json_lines(name: str | os.PathLike, text: str) -> Iterator[str]:
    # not splitlines, which also splits at U+2028 and others that JSON text may hold
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: no JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f'{name}, line {number}: no field "text", there is {found}')
        if "\\u" in line and not is_unicode(entry["text"]):
            raise ValueError(f"{name}, line {number}: the text has half of a surrogate pair, which is no character")
        yield entry["text"]


def is_unicode(text: str) -> bool:
    """Return whether a text can be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a document, with the end-of-text token before it if the tokenizer has one."""
    return encode_all([document], tokenizer)[0]


def encode_all(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return what `encode` returns for each document; a fast tokenizer shares the documents out to all cores."""
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [start + ids for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]]


def read_token_ids(path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the token ids in a `.npy` file, [tokens].

    Raises:
        ValueError: the file is no vector of ids of the tokenizer.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers: {error}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < len(tokenizer)):
        raise ValueError(
            f"{path} must be a vector of token ids below {len(tokenizer)}, but is {ids.dtype} of shape {ids.shape}, "
            f"from {ids.min(initial=0)} to {ids.max(initial=0)}."
        )
    return ids


def _check_length(length: int, argument: str) -> None:
    if length < 2:
        raise ValueError(f"{argument} is {length}; it must be at least 2: a token, and one to predict")


class TokenBlocks(torch.utils.data.Dataset):
    """Give the tokens of some files as consecutive blocks of one length, without remainder.

    Item: {"input_ids": [length], "labels": [length]}, int64. The model itself shifts the labels by one.

    Args:
        files: files that `read_documents` reads, `.npy` files of token ids, or folders of shards (shards.py). One that
            is named twice counts twice.
        tokenizer: encodes the documents.
        length: tokens of a block.
        cache_dir: folder for the encoded tokens. They are encoded once, stored there under a name that depends on text
            and tokenizer, and mapped into memory. Without a folder they are kept in memory. Shards are always mapped
            from where they are, and texts beside them are kept in memory.
        argument: that gives the length, for messages.

    Attributes:
        tokens: all tokens, [tokens], uint16, or uint32 if the tokenizer has more than 65,536 tokens.
        num_bytes: size of the text in UTF-8, without the end-of-text tokens.
        identity: hash of the text and the tokenizer.

    Raises:
        ValueError: a file cannot be read, the files hold less than one block, or a block is shorter than 2 tokens.
    """

    def __init__(
        self,
        files: list[str],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        cache_dir: str | os.PathLike | None = None,
        argument: str = "--context_length",
    ) -> None:
        _check_length(length, argument)
        self.files = files
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.num_bytes, identity = 0, hashlib.sha256(tokenizer_identity(tokenizer).encode())
        parts: list[np.ndarray | list[str]] = []
        has_shards = any(Path(name).is_dir() for name in files)
        for name in files:
            if Path(name).is_dir():
                index = read_index(name, tokenizer)
                parts += map_shards(name, index)
                for shard in index["shards"]:
                    identity.update(b"<|shard|>" + shard["sha256"].encode())
                    self.num_bytes += shard["bytes"]
            elif Path(name).suffix == ".npy":
                ids = read_token_ids(name, tokenizer)
                parts.append(ids)
                identity.update(b"<|ids|>" + np.ascontiguousarray(ids, dtype=np.int64).tobytes())
                self.num_bytes += len(tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode())
            else:
                documents = read_documents([name])
                parts.append(documents)
                for document in documents:
                    identity.update(END_OF_TEXT.encode() + document.encode())
                    self.num_bytes += len(document.encode())
        self.identity = identity.hexdigest()[:16]
        self.tokens: np.ndarray | JoinedArrays
        if has_shards:
            self.tokens = JoinedArrays(
                [part if isinstance(part, np.ndarray) else self._in_memory([part], tokenizer) for part in parts]
            )
        elif cache_dir is None:
            self.tokens = self._in_memory(parts, tokenizer)
        else:
            self.tokens = self._stored(parts, tokenizer, cache_dir, length, argument)
        self._set_length(length, argument)

    def _set_length(self, length: int, argument: str) -> None:
        _check_length(length, argument)
        self._check_size(len(self.tokens), length, argument)
        self.length = length

    def _check_size(self, size: int, length: int, argument: str) -> None:
        if size < length:
            names = ", ".join(map(str, self.files))
            verb = "holds" if len(self.files) == 1 else "hold"
            raise ValueError(f"{argument} is {length}, but {names} {verb} only {size} tokens")

    def of_length(self, length: int, argument: str = "--context_length") -> TokenBlocks:
        """Return blocks of another length of the same tokens, which are neither read nor encoded again.

        Raises:
            ValueError: the files hold less than one block, or a block is shorter than 2 tokens.
        """
        others = copy.copy(self)
        others._set_length(length, argument)
        return others

    def _encoded(
        self, parts: list[np.ndarray | list[str]], tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[np.ndarray]:
        for part in parts:
            if isinstance(part, np.ndarray):
                yield part.astype(self.dtype)
                continue
            for first in tqdm(range(0, len(part), 1000), "encoding", disable=None, leave=False):
                for ids in encode_all(part[first : first + 1000], tokenizer):
                    yield np.array(ids, dtype=self.dtype)

    def _in_memory(self, parts: list[np.ndarray | list[str]], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        return np.concatenate([np.empty(0, self.dtype), *self._encoded(parts, tokenizer)])

    def _stored(
        self,
        parts: list[np.ndarray | list[str]],
        tokenizer: PreTrainedTokenizerBase,
        cache_dir: str | os.PathLike,
        length: int,
        argument: str,
    ) -> np.ndarray:
        path = Path(cache_dir) / f"tokens-{self.identity}.bin"
        if not path.exists():
            with written(path) as unfinished:
                with open(unfinished, "wb") as out:
                    for ids in self._encoded(parts, tokenizer):
                        ids.tofile(out)
                # Too few tokens are an error, which leaves no file. An empty one could not be mapped either.
                self._check_size(unfinished.stat().st_size // self.dtype.itemsize, length, argument)
        return np.memmap(path, dtype=self.dtype, mode="r")

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        input_ids = self.blocks(index, index + 1)[0]
        return {"input_ids": input_ids, "labels": input_ids}

    def blocks(self, first: int, last: int) -> torch.Tensor:
        """Return the blocks first .. last - 1, [last - first, length], int64."""
        last = min(last, len(self))
        ids = self.tokens[first * self.length : last * self.length].astype(np.int64)
        return torch.from_numpy(ids).view(last - first, self.length)
