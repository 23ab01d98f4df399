"""Draw random numbers as hashes of (seed, split, example, draw) and not as the next states of a generator.

Example 77 of a synthetic task is therefore always the same: made alone or in a batch, on a CPU or on a GPU, and with
every version of every library. Two processes agree without communication.
"""

from __future__ import annotations

import torch


# The second key of the hash, so that no training example is drawn from the numbers of a test example.
SPLITS = {"train": 1, "test": 2}
IGNORED = -100  # in the targets of a task: this position does not count

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the increment of splitmix64, as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(z: torch.Tensor) -> torch.Tensor:
    """Apply the finaliser of splitmix64 in place. int64 products wrap on a CPU and on a GPU alike."""
    z ^= (z >> 30) & 0x3FFFFFFFF  # >> carries the sign along, the mask takes it off again
    z *= _MIX_1
    z ^= (z >> 27) & 0x1FFFFFFFFF
    z *= _MIX_2
    z ^= (z >> 31) & 0x1FFFFFFFF
    return z


def root(seed: int, split: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the hash of a seed and a split, [1] int64.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return mix(mix(torch.tensor([seed], device=device) * GOLDEN + SPLITS[split]))


def example_rows(seed: int, split: str, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the hash of each example start .. start + count - 1 of a split, [count] int64.

    Raises:
        ValueError: an unknown split, or a negative start or count.
    """
    if count < 0 or start < 0:
        raise ValueError(f"count and start must not be negative, got {count} and {start}")
    return mix(root(seed, split, device) + torch.arange(start, start + count, device=device) * GOLDEN)


def numbers(rows: torch.Tensor, lanes: torch.Tensor, stream: int) -> torch.Tensor:
    """Return 64 random bits for every (row, lane), broadcast; `stream` keeps uses apart."""
    return mix(rows + (lanes + (stream << 32)) * GOLDEN)


def below(bits: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
    """Turn random bits into int32 in [0, n), n up to 2**23; the bias is below n / 2**40."""
    return ((((bits >> 24) & 0xFFFFFFFFFF) * n) >> 40).to(torch.int32)


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Turn random bits into float64 in (0, 1)."""
    return (((bits >> 12) & 0xFFFFFFFFFFFFF).double() + 0.5) * 2.0**-52


def distinct(bits: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
    """Turn random bits [..., k] into k distinct integers in [0, n) in random order, int64. It is for small k.

    `n` is at least k, and a tensor of it has the shape [..., 1].
    """
    drawn: list[torch.Tensor] = []
    for i in range(bits.shape[-1]):
        number = below(bits[..., i : i + 1], n - i).long()
        for earlier in torch.cat(drawn, dim=-1).sort(dim=-1).values.split(1, dim=-1) if drawn else ():
            number = number + (number >= earlier)  # the number-th of those that are left
        drawn.append(number)
    return torch.cat(drawn, dim=-1)


def few_of(mask: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Keep `count` true entries of each row of a mask [N, T], chosen at random; all, where there are no more.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"queries must be positive, got {count}")
    rows = example_rows(seed, "test", 0, len(mask))
    priority = numbers(rows[:, None], torch.arange(mask.shape[1]), 10) >> 1 & 0x3FFFFFFFFFFFFFFF
    rank = torch.where(mask, priority, -1).argsort(dim=1, descending=True).argsort(dim=1)
    return mask & (rank < count)
