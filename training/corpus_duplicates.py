"""Find repeated documents, repeated passages and near copies in a corpus.

A near copy is found with min-hash (Broder, 1997): the share of equal entries in two signatures estimates the Jaccard
similarity of the sets of shingles, runs of consecutive tokens. Everything is deterministic, and works on arrays.
"""

from __future__ import annotations

import hashlib

import numpy as np


SHINGLE = 8  # tokens of a shingle for near copies
QUOTE = 13  # tokens of a shingle that shows that a held-out document stands in the training text (as GPT-3's authors)
BANDS, ROWS = 8, 2  # two documents are compared if one of the bands of their signatures is equal
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Passages:
    """Remember passages, to keep only the first of equal ones.

    A passage is a paragraph, whose white space and case do not count. Paragraphs below `least` characters are kept,
    since short ones, such as headings or the end of a loop, repeat in any text.
    """

    def __init__(self, least: int = 80) -> None:
        self.least = least
        self.seen: set[int] = set()

    def new(self, text: str) -> str:
        """Return a text without the passages that were seen before, and remember the others."""
        kept = []
        for passage in text.split("\n\n"):
            if len(passage) >= self.least:
                digest = hash_of(" ".join(passage.lower().split()))
                if digest in self.seen:
                    continue
                self.seen.add(digest)
            kept.append(passage)
        return "\n\n".join(kept)


def hash_of(text: str) -> int:
    """Return a hash of a text below 2^63, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1


def shingle_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return a hash of the `length` tokens from each position on, uint64 [tokens - length + 1]."""
    count = len(tokens) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes *= _MULTIPLIER
        hashes += tokens[offset : offset + count].astype(np.uint64) + np.uint64(1)
    hashes ^= hashes >> np.uint64(31)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(29))


def signature(tokens: np.ndarray) -> np.ndarray:
    """Return the min-hash signature of a document, uint64 [BANDS * ROWS], of its shingles of `SHINGLE` tokens."""
    hashes = shingle_hashes(tokens, min(SHINGLE, max(len(tokens), 1)))
    result = np.empty(BANDS * ROWS, np.uint64)
    if not len(hashes):
        result[:] = 0
        return result
    for row in range(BANDS * ROWS):
        mixed = hashes * np.uint64(2 * row + 3) + np.uint64((row + 1) * 0x94D049BB133111EB & (1 << 64) - 1)
        mixed ^= mixed >> np.uint64(33)
        result[row] = (mixed * _MULTIPLIER).min()
    return result


def near_copies(signatures: np.ndarray, similarity: float = 0.6) -> np.ndarray:
    """Return which documents are near copies of an earlier one that is none itself, bool [documents].

    So every near copy has a document that is kept, and copies of a copy are judged by the one that is kept.

    Args:
        signatures: of `signature`, [documents, BANDS * ROWS].
        similarity: share of equal entries from which a document is a near copy.
    """
    copies = np.zeros(len(signatures), dtype=bool)
    bands = signatures.reshape(-1, BANDS, ROWS)
    mixed = bands[..., 0].copy()  # [documents, BANDS]
    for row in range(1, ROWS):
        mixed = mixed * _MULTIPLIER + bands[..., row]
    shared = np.empty_like(mixed, dtype=bool)  # is the band equal to that of another document?
    for band in range(BANDS):
        _, inverse, counts = np.unique(mixed[:, band], return_inverse=True, return_counts=True)
        shared[:, band] = counts[inverse] > 1
    kept: dict[tuple[int, int], list[int]] = {}  # by a band's number and its value
    for document in np.flatnonzero(shared.any(axis=1)).tolist():
        values = [(band, int(mixed[document, band])) for band in np.flatnonzero(shared[document]).tolist()]
        earlier = sorted({other for value in values for other in kept.get(value, ())})
        copies[document] = ((signatures[earlier] == signatures[document]).mean(axis=1) >= similarity).any()
        if not copies[document]:
            for value in values:
                kept.setdefault(value, []).append(document)
    return copies


def quoted_share(tokens: np.ndarray, known: np.ndarray) -> float:
    """Return the share of a document's runs of `QUOTE` tokens whose hashes are in `known`, which is sorted."""
    hashes = shingle_hashes(tokens, QUOTE)
    if not len(hashes) or not len(known):
        return 0.0
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return float((known[places] == hashes).mean())
