"""Generate the six tasks of MAD, mechanistic architecture design (Poli et al., 2024, arXiv 2403.17844).

- recall: pairs of a key and a value. A key has one value within a sequence, and that of a key that came before is
  asked.
- fuzzy_recall: the same, with keys and values of 1 to 3 tokens.
- noisy_recall: recall with pairs of noise tokens between the pairs.
- selective_copying: tokens with blanks between them, a copy token, and blanks, at which the tokens are asked in order.
- compression: random tokens and one that collects them. All are asked from the state of the last one alone.
- memorization: keys, each with a blank after it, at which its value is asked. One table gives the keys their values,
  the same for all sequences, in training and in the test.

In the recall tasks a model learns every next token, and only the answers are counted in the test. In the other tasks
the same positions count in both. The sizes of `BASE` and `VARIATIONS` are those of the authors (athms/mad-lab).

Every number is a hash (random_numbers.py), so an example does not depend on the others or on the device.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from .random_numbers import IGNORED, below, distinct, example_rows, numbers, root, uniform


MOTIF = 3  # most tokens of a key and of a value of fuzzy recall


@dataclass(frozen=True)
class MADSpec:
    """Hold the sizes of one task.

    Args:
        task: one of the six names.
        vocab_size: number of tokens, with those of noise and the special ones.
        length: tokens of a sequence. A sequence of (noisy) recall has one less, since its last token is only answered.
        noise_vocab_size: of the tokens, how many are noise.
        noise: share of the pairs of noisy recall that are noise.
        copy: how many tokens selective copying copies.

    Raises:
        ValueError: an unknown task, or sizes that it cannot have.
    """

    task: str
    vocab_size: int
    length: int
    noise_vocab_size: int = 0
    noise: float = 0.0
    copy: int = 0

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"{self.task}: {message}")

        if self.task not in BASE_SIZES:
            raise ValueError(f"task must be one of {', '.join(BASE_SIZES)}, got {self.task!r}")
        least = {"fuzzy_recall": 2 * MOTIF + 1, "selective_copying": 3, "compression": 2, "memorization": 3}
        tokens = self.vocab_size - self.noise_vocab_size
        fewest = least.get(self.task, 2)
        require(tokens >= fewest, f"vocab_size without noise must be at least {fewest}, got {tokens}")
        require(self.vocab_size <= 2**15, f"vocab_size must be at most {2**15}, got {self.vocab_size}")
        noisy = self.task == "noisy_recall"
        require(
            self.noise_vocab_size >= 1 if noisy else self.noise_vocab_size == 0 and self.noise == 0,
            f"noise and noise_vocab_size are for noisy_recall, got {self.noise} and {self.noise_vocab_size}",
        )
        require(0 <= self.noise < 1, f"noise must be at least 0 and less than 1, got {self.noise}")
        copying = self.task == "selective_copying"
        require(self.copy >= 1 if copying else self.copy == 0, f"copy is for selective_copying, got {self.copy}")
        shortest = {"fuzzy_recall": 4 * MOTIF + 1, "selective_copying": 2 * self.copy + 2, "memorization": 2}
        fewest = shortest.get(self.task, 4)
        require(self.length >= fewest, f"length must be at least {fewest}, got {self.length}")
        even = self.task in ("recall", "noisy_recall", "memorization")
        require(not even or self.length % 2 == 0, f"length must be even, got {self.length}")

    @property
    def positions(self) -> int:
        """Return the number of tokens that a model sees of a sequence."""
        return self.length - (self.task in ("recall", "noisy_recall"))


BASE_SIZES: dict[str, dict[str, Any]] = {
    "recall": {"vocab_size": 16, "length": 128},
    "fuzzy_recall": {"vocab_size": 16, "length": 128},
    "noisy_recall": {"vocab_size": 32, "length": 128, "noise_vocab_size": 16, "noise": 0.2},
    "selective_copying": {"vocab_size": 16, "length": 256, "copy": 16},
    "compression": {"vocab_size": 16, "length": 32},
    "memorization": {"vocab_size": 256, "length": 32},
}
TASKS = tuple(BASE_SIZES)
BASE = {task: MADSpec(task, **sizes) for task, sizes in BASE_SIZES.items()}
# One size at a time is changed. The number of training examples is varied too, from 12,800 down, but for memorization.
VARIATIONS: dict[str, dict[str, tuple[int | float, ...]]] = {
    "recall": {"vocab_size": (32, 64, 128), "length": (256, 512, 1024)},
    "fuzzy_recall": {"vocab_size": (32, 64, 128), "length": (256, 512, 1024)},
    "noisy_recall": {"vocab_size": (48, 80, 144), "length": (256, 512, 1024), "noise": (0.4, 0.6, 0.8)},
    "selective_copying": {"vocab_size": (32, 64, 128), "length": (512, 1024), "copy": (32, 64, 96)},
    "compression": {"vocab_size": (32, 64, 128), "length": (64, 128, 256)},
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
}
TRAIN_EXAMPLES = dict.fromkeys(TASKS, 12_800) | {"memorization": 256}
FEWER_EXAMPLES = (6400, 3200, 1600, 800)


def make_examples(
    spec: MADSpec,
    count: int,
    *,
    seed: int = 0,
    split: str = "train",
    start: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return examples start .. start + count - 1 of a split.

    Args:
        spec: the task.
        count: how many examples.
        seed: any integer; another seed is another data set. It also decides the table of memorization.
        split: "train" or "test".
        start: the index of the first example.
        device: where the examples are made and stay. All devices give the same examples.

    Returns:
        Tokens and targets, both int16 [count, positions]. The target of a position is what the model must say there,
        or -100 where nothing counts.

    Raises:
        ValueError: an unknown split or a negative count.

    Example:
        >>> tokens, targets = make_examples(BASE["recall"], 4, split="test")
        >>> tokens.shape, targets.shape
        (torch.Size([4, 127]), torch.Size([4, 127]))
    """
    rows = example_rows(seed, split, start, count, device)
    if spec.task == "selective_copying":
        tokens, targets = _selective_copying(rows, spec)
    elif spec.task == "compression":
        tokens = below(numbers(rows[:, None], _lanes(rows, spec.length), 1), spec.vocab_size - 1)
        tokens[:, -1] = spec.vocab_size - 1
        targets = tokens
    elif spec.task == "memorization":
        tokens, targets = _memorization(rows, spec, memorization_table(spec, seed, rows.device))
    else:
        made = _fuzzy_recall(rows, spec, split) if spec.task == "fuzzy_recall" else _recall(rows, spec)
        sequence, answered = made
        tokens, targets = sequence[:, :-1], sequence[:, 1:]
        if split == "test":
            targets = targets.masked_fill(~answered[:, 1:], IGNORED)
    return tokens.to(torch.int16), targets.to(torch.int16)


def _lanes(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.arange(count, device=rows.device)


def _recall(rows: torch.Tensor, spec: MADSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences [N, length] and where they answer. The last pair asks for a key that came before.

    A value is drawn for every key of a sequence at once, which is the same as drawing it when the key first comes.
    """
    symbols = spec.vocab_size - spec.noise_vocab_size  # keys first, then values, then noise
    num_keys, slots = symbols // 2, spec.length // 2
    lanes = _lanes(rows, slots)
    values = num_keys + below(numbers(rows[:, None], _lanes(rows, num_keys), 1), symbols - num_keys)
    keys = below(numbers(rows[:, None], lanes, 2), num_keys).long()
    noise = uniform(numbers(rows[:, None], lanes, 3)) < spec.noise
    clean = below(numbers(rows, lanes[:1], 4), slots - 1).long()  # at least one pair, so that something can be asked
    noise.scatter_(1, clean[:, None], False)
    noise[:, -1] = False
    seen = torch.zeros(len(rows), num_keys, dtype=torch.bool, device=rows.device)
    known = torch.zeros_like(noise)
    for slot in range(slots):
        if slot == slots - 1:  # one of the keys that came, each as likely
            priority = numbers(rows[:, None], _lanes(rows, num_keys), 5) >> 1 & 0x3FFFFFFFFFFFFFFF
            keys[:, slot] = torch.where(seen, priority, -1).argmax(1)
        key = keys[:, slot : slot + 1]
        came = seen.gather(1, key)
        known[:, slot] = (came & ~noise[:, slot : slot + 1])[:, 0]
        seen.scatter_(1, key, came | ~noise[:, slot : slot + 1])
    pairs = torch.stack([keys.to(torch.int32), values.gather(1, keys)], dim=2).flatten(1)
    if spec.noise_vocab_size:
        random = symbols + below(numbers(rows[:, None], _lanes(rows, spec.length), 6), spec.noise_vocab_size)
        pairs = torch.where(noise.repeat_interleave(2, dim=1), random, pairs)
    return pairs, torch.stack([torch.zeros_like(known), known], dim=2).flatten(1)


def _motifs(hashes: torch.Tensor, symbols: int) -> torch.Tensor:
    """Draw MOTIF distinct tokens of 0 .. symbols - 1 for each hash, in random order: [N, MOTIF] int64."""
    return distinct(numbers(hashes[:, None], _lanes(hashes, MOTIF), 1), symbols)


def _fuzzy_recall(rows: torch.Tensor, spec: MADSpec, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences [N, length + 1] with padding at the left, and where they answer.

    Keys have 1 to 3 distinct tokens in training and 3 in the test; values have 1 to 3 in both. The last pair, the
    probe, is put once at a random place before, unless it came by itself. As in the authors' code there is sometimes
    no room for it. They count such a probe nevertheless; here it is not counted, since nobody can answer it.
    """
    num_keys = (spec.vocab_size - 1) // 2  # the last token is padding, the one half are keys, the rest values
    num_values = spec.vocab_size - 1 - num_keys
    lanes = _lanes(rows, spec.length // 2 + 1)
    weights = (num_keys + 1) ** _lanes(rows, MOTIF)

    def size_of(hashes: torch.Tensor, stream: int) -> torch.Tensor:
        return 1 + below(numbers(hashes, lanes[:1], stream), MOTIF).long()

    def key_of(hashes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens, size, and a number that differs between any two keys."""
        tokens = _motifs(hashes, num_keys)
        size = size_of(hashes, 2) if split == "train" else torch.full_like(hashes, MOTIF)
        return tokens, size, ((tokens + 1) * weights * (lanes[:MOTIF] < size[:, None])).sum(1)

    def value_of(identity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hashes = numbers(rows, identity, 3)  # the same whenever this key comes again in this sequence
        return num_keys + _motifs(hashes, num_values), size_of(hashes, 2)

    probe, probe_size, probe_identity = key_of(numbers(rows, lanes[:1], 1))
    _, last_size = value_of(probe_identity)
    total = probe_size + last_size
    place = (uniform(numbers(rows, lanes[:1], 2)) * (spec.length - 2 * total)).long()
    limit = spec.length - total - 2 * MOTIF
    dummy = spec.length + 1  # a column for what is not written
    sequence = torch.full((len(rows), dummy + 1), spec.vocab_size - 1, device=rows.device)
    answered = torch.zeros_like(sequence, dtype=torch.bool)
    cursor = torch.zeros_like(rows)
    history = torch.full((len(rows), len(lanes)), -1, device=rows.device)
    steps = _lanes(rows, 2 * MOTIF)

    def write(tokens: torch.Tensor, size: torch.Tensor, identity: torch.Tensor, active: torch.Tensor) -> None:
        value, value_size = value_of(identity)
        source = torch.where(steps < size[:, None], steps, MOTIF + steps - size[:, None]).clamp(max=2 * MOTIF - 1)
        valid = (steps < (size + value_size)[:, None]) & active[:, None]
        where = torch.where(valid, cursor[:, None] + steps, dummy)
        sequence.scatter_(1, where, torch.cat([tokens, value], dim=1).gather(1, source))
        known = (history == identity[:, None]).any(1, keepdim=True)
        answered.scatter_(1, where, known & (steps >= size[:, None]))
        cursor.add_(torch.where(active, size + value_size, 0))

    added = torch.zeros_like(rows, dtype=torch.bool)
    for slot in itertools.count():
        active = cursor < limit
        if not active.any():
            break
        tokens, size, identity = key_of(numbers(rows, lanes[slot], 4))
        insert = (cursor >= place) & ~added
        tokens = torch.where(insert[:, None], probe, tokens)
        size, identity = torch.where(insert, probe_size, size), torch.where(insert, probe_identity, identity)
        write(tokens, size, identity, active)
        added |= active & (identity == probe_identity)
        history[:, slot] = torch.where(active, identity, -1)
    write(probe, probe_size, probe_identity, torch.ones_like(added))
    source = _lanes(rows, spec.length + 1) - (spec.length + 1 - cursor)[:, None]  # to the right
    source = torch.where(source < 0, dummy - 1, source)  # the last column but one was never written: padding
    return sequence.gather(1, source), answered.gather(1, source)


def _selective_copying(rows: torch.Tensor, spec: MADSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and targets. Each blank stands before one of the tokens to copy, all equally likely."""
    copy_token, blank = spec.vocab_size - 1, spec.vocab_size - 2
    blanks = spec.length - 2 * spec.copy - 1
    copied = below(numbers(rows[:, None], _lanes(rows, spec.copy), 1), blank)
    gaps = below(numbers(rows[:, None], _lanes(rows, blanks), 2), spec.copy).long()
    before = torch.zeros(len(rows), spec.copy, dtype=torch.long, device=rows.device)
    before.scatter_add_(1, gaps, torch.ones_like(gaps))
    tokens = torch.full((len(rows), spec.length), blank, dtype=torch.int32, device=rows.device)
    tokens.scatter_(1, before.cumsum(1) + _lanes(rows, spec.copy), copied)
    tokens[:, -spec.copy - 1] = copy_token
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -spec.copy :] = copied
    return tokens, targets


def memorization_table(spec: MADSpec, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the value of each key, one table for training and test, [keys] int64. No two keys share a value."""
    num_keys = (spec.vocab_size - 1) // 2
    num_values = spec.vocab_size - 1 - num_keys
    order = numbers(root(seed, "train", device), torch.arange(num_values, device=device), 7).argsort()
    return num_keys + order[:num_keys]


def _memorization(rows: torch.Tensor, spec: MADSpec, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys = below(numbers(rows[:, None], _lanes(rows, spec.length // 2), 1), len(table)).long()
    blank, nothing = torch.full_like(keys, spec.vocab_size - 1), torch.full_like(keys, IGNORED)
    tokens, targets = torch.stack([keys, blank], dim=2), torch.stack([nothing, table[keys]], dim=2)
    return tokens.flatten(1), targets.flatten(1)
