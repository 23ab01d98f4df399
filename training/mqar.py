"""Generate multi-query associative recall (MQAR), check it for leakage, and score a model on it directly.

An example starts with `num_pairs` key-value pairs. Each key then comes again once, at an even offset that is drawn
without replacement from a power law. The label at a repeated key is its value (Zoology, arXiv 2312.04927, section 3).
The ReBased paper (arXiv 2402.10644, section 5.1) uses the sizes of `figure_1_spec`.

Every number is a hash (random_numbers.py), so an example does not depend on the others or on the device.

    python -m modeling_rebased.training.mqar --length 2048 --examples 100000 --leakage
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .arguments import HelpFormatter, with_dashes
from .random_numbers import GOLDEN, below, example_rows, mix, numbers, uniform
from .values import count, known_device


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Lengths of the paper's Figure 1, and the number of pairs at each: 16 at 128, a quarter of the length after that.
FIGURE_1_PAIRS = {128: 16, 256: 64, 512: 128, 1024: 256, 2048: 512}

# How many numbers one chunk of examples draws at a time: small enough for a CPU's caches, and on a GPU large
# enough that launches do not count.
_CHUNK_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 25}


@dataclass(frozen=True)
class MQARSpec:
    """Hold the sizes of one MQAR task.

    Args:
        length: tokens in a sequence.
        num_pairs: key-value pairs at the start of a sequence. Every key is asked for once.
        vocab_size: 0 is the filler, 1 .. vocab_size/2 - 1 are keys, and vocab_size/2 .. vocab_size - 1 are values.
        power_a: the power law of the gaps, p(gap) proportional to gap**(power_a - 1).

    Raises:
        ValueError: the pairs and their queries do not fit into the length, or the vocabulary is too small.
    """

    length: int
    num_pairs: int
    vocab_size: int = 8192
    power_a: float = 0.01

    def __post_init__(self) -> None:
        if self.num_pairs < 1 or self.length < 1 or self.length % 2:
            raise ValueError(
                f"length must be even and positive and num_pairs positive, got {self.length} and {self.num_pairs}"
            )
        if 4 * self.num_pairs > self.length:
            raise ValueError(
                f"num_pairs={self.num_pairs} does not fit into length={self.length}: the pairs take two tokens each "
                f"and their queries two more, so at most {self.length // 4} pairs are possible"
            )
        if self.vocab_size % 2 or self.num_pairs > self.num_keys:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be even and have at least num_pairs={self.num_pairs} keys, "
                f"it has {self.num_keys}"
            )

    @property
    def num_keys(self) -> int:
        return self.vocab_size // 2 - 1

    @property
    def num_values(self) -> int:
        return self.vocab_size // 2

    @property
    def context(self) -> int:
        """Return the number of tokens of the key-value pairs."""
        return 2 * self.num_pairs

    @property
    def num_gaps(self) -> int:
        """Return the number of even offsets after the pairs at which a key may come again."""
        return (self.length - self.context) // 2


def figure_1_spec(length: int) -> MQARSpec:
    """Return the task of the paper's Figure 1 at this length (128, 256, 512, 1024 or 2048)."""
    if length not in FIGURE_1_PAIRS:
        raise ValueError(f"length {length} is not in Figure 1, which has {', '.join(map(str, FIGURE_1_PAIRS))}")
    return MQARSpec(length=length, num_pairs=FIGURE_1_PAIRS[length])


@dataclass
class MQARExamples:
    """Hold N examples. Pair j of example n is (keys[n, j], values[n, j]) and is asked for at positions[n, j].

    Attributes:
        spec: the task.
        keys: [N, num_pairs], int16 where the vocabulary fits, else int32.
        values: [N, num_pairs], the same type.
        positions: [N, num_pairs], int32, where the key comes again.
    """

    spec: MQARSpec
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor

    def __len__(self) -> int:
        return self.keys.shape[0]

    def __getitem__(self, index: slice | torch.Tensor) -> MQARExamples:
        return MQARExamples(self.spec, self.keys[index], self.values[index], self.positions[index])

    def to(self, device: torch.device | str) -> MQARExamples:
        return MQARExamples(self.spec, self.keys.to(device), self.values.to(device), self.positions.to(device))

    def input_ids(self, dtype: torch.dtype = torch.long) -> torch.Tensor:
        """Return the sequences, [N, length]: pairs, then the keys again, 0 everywhere else."""
        ids = torch.zeros(len(self), self.spec.length, dtype=dtype, device=self.keys.device)
        ids[:, 0 : self.spec.context : 2] = self.keys.to(dtype)
        ids[:, 1 : self.spec.context : 2] = self.values.to(dtype)
        return ids.scatter_(1, self.positions.long(), self.keys.to(dtype))

    def labels(self) -> torch.Tensor:
        """Return labels as transformers models take them, [N, length], int64, -100 where nothing is asked.

        Models shift the labels: the logits at position t are compared with labels[t + 1]. The value therefore stands
        one place after the repeated key, and the logits that count are those at the key itself. The authors' code does
        not shift and puts the label at the key, which is the same.
        """
        labels = torch.full((len(self), self.spec.length), -100, dtype=torch.long, device=self.keys.device)
        return labels.scatter_(1, self.positions.long() + 1, self.values.long())


def _sort_rows(x: torch.Tensor) -> torch.Tensor:
    # numpy sorts with vector instructions and keeps no indices, which torch on the CPU does not
    if x.device.type == "cpu":
        x.numpy().sort(axis=1)
        return x
    return x.sort(dim=1).values


def _distinct(rows: torch.Tensor, count: int, n: int, stream: int) -> torch.Tensor:
    """Draw `count` distinct integers in [0, n) for each row, in uniformly random order: [R, count] int32.

    All are drawn, and those that repeat an earlier place are drawn again, until none does. The rule looks only at
    places, so any renaming of the n symbols commutes with it. All ordered draws of distinct symbols are therefore
    equally likely.
    """
    lanes = torch.arange(count, device=rows.device)
    symbols = below(numbers(rows[:, None], lanes[None, :], stream), n)
    shift = max(count - 1, 1).bit_length()
    packed_type = torch.int32 if n << shift < 2**31 else torch.int64
    active = torch.arange(rows.shape[0], device=rows.device)  # rows that may hold a repetition
    attempt = 0
    while active.numel():
        attempt += 1
        # symbol and place in one integer: after the sort equal symbols are neighbours, the earlier place first
        packed = _sort_rows((symbols[active].to(packed_type) << shift) | lanes.to(packed_type))
        repeated = (packed[:, 1:] >> shift) == (packed[:, :-1] >> shift)
        row, column = repeated.nonzero(as_tuple=True)
        if row.numel() == 0:
            break
        place = (packed[row, column + 1] & ((1 << shift) - 1)).long()
        drawn = numbers(rows[active[row]], place + (attempt << 24), stream)
        symbols[active[row], place] = below(drawn, n)
        active = active[row.unique_consecutive()]
    return symbols


def _ordered_gaps(rows: torch.Tensor, spec: MQARSpec, stream: int) -> torch.Tensor:
    """Draw num_pairs of the gaps 0 .. num_gaps - 1 without replacement, with p ∝ (gap + 1)**(a - 1): [R, num_pairs].

    Waiting times with rates p make such a draw, in the order in which they end.
    """
    lanes = torch.arange(spec.num_gaps, device=rows.device)
    bits = numbers(rows[:, None], lanes[None, :], stream)
    times = -uniform(bits).log() * (lanes + 1.0).double() ** (1.0 - spec.power_a)
    # A positive double sorts as the integer of its bits does, so the gap itself can ride in the lowest ones.
    width = max(spec.num_gaps - 1, 1).bit_length()
    packed = (times.view(torch.int64) & ~((1 << width) - 1)) | lanes
    return _sort_rows(packed)[:, : spec.num_pairs] & ((1 << width) - 1)


def _chunk_rows(spec: MQARSpec, device: torch.device) -> int:
    return max(1, _CHUNK_NUMBERS.get(device.type, _CHUNK_NUMBERS["cpu"]) // max(spec.num_pairs, spec.num_gaps))


def make_examples(
    spec: MQARSpec,
    count: int,
    *,
    seed: int = 0,
    split: str = "train",
    start: int = 0,
    device: torch.device | str = "cpu",
) -> MQARExamples:
    """Return examples start .. start + count - 1 of a split.

    Args:
        spec: the task.
        count: how many examples.
        seed: any integer; another seed is another data set.
        split: "train" or "test".
        start: the index of the first example.
        device: where the examples are made and stay. All devices give the same examples.

    Returns:
        `MQARExamples`, with 2 or 4 bytes per number: 100,000 examples of length 2,048 take 0.4 GB.

    Raises:
        ValueError: an unknown split or a negative count.

    Example:
        >>> examples = make_examples(figure_1_spec(128), 4, seed=0, split="test")
        >>> examples.input_ids().shape, examples.labels().shape
        (torch.Size([4, 128]), torch.Size([4, 128]))
    """
    all_rows = example_rows(seed, split, start, count, device)
    device = torch.device(device)
    symbol_type = torch.int16 if spec.vocab_size <= 2**15 else torch.int32
    shape = (count, spec.num_pairs)
    keys = torch.empty(shape, dtype=symbol_type, device=device)
    values = torch.empty(shape, dtype=symbol_type, device=device)
    positions = torch.empty(shape, dtype=torch.int32, device=device)
    step = _chunk_rows(spec, device)
    for first in range(0, count, step):
        last = min(first + step, count)
        rows = all_rows[first:last]
        keys[first:last] = _distinct(rows, spec.num_pairs, spec.num_keys, stream=1) + 1
        values[first:last] = _distinct(rows, spec.num_pairs, spec.num_values, stream=2) + spec.vocab_size // 2
        positions[first:last] = spec.context + 2 * _ordered_gaps(rows, spec, stream=3)
    return MQARExamples(spec, keys, values, positions)


def check_leakage(train: MQARExamples, test: MQARExamples) -> dict[str, float]:
    """Count what the test set shares with the training set.

    Returns:
        identical_sequences: test sequences that are also training sequences. Must be 0.
        identical_contexts: test examples whose key-value pairs, in order, are those of a training example. Must be 0.
        seen_pairs: the fraction of test pairs (key, value) that occur in some training example.
        seen_pairs_by_chance: the fraction that independent draws give. The task has only num_keys * num_values pairs,
            so 100,000 long examples contain nearly all. A pair holds only within its own sequence, so this helps no
            model.
    """
    if train.spec != test.spec:
        raise ValueError(f"train and test must be of one task, got {train.spec} and {test.spec}")
    spec = train.spec

    def contexts(x: MQARExamples) -> torch.Tensor:
        return torch.cat([x.keys, x.values], dim=1).cpu()

    def shared(a: torch.Tensor, b: torch.Tensor) -> int:
        tests = collections.Counter(row.tobytes() for row in b.numpy())
        seen = {key for row in a.numpy() if (key := row.tobytes()) in tests}  # holds none of the many others
        return sum(tests[key] for key in seen)

    def sequences(x: MQARExamples) -> torch.Tensor:
        # the queries in order of position say the same as the sequence itself, in less memory
        return torch.cat([contexts(x), x.positions.cpu().to(x.keys.dtype)], dim=1)

    def pair_ids(x: MQARExamples) -> torch.Tensor:
        return (x.keys.long().cpu() * spec.vocab_size + x.values.long().cpu()).flatten()

    seen = torch.zeros(spec.vocab_size**2, dtype=torch.bool)
    seen[pair_ids(train)] = True
    draws = train.keys.numel()
    return {
        "identical_sequences": shared(sequences(train), sequences(test)),
        "identical_contexts": shared(contexts(train), contexts(test)),
        "seen_pairs": seen[pair_ids(test)].double().mean().item(),
        "seen_pairs_by_chance": -math.expm1(draws * math.log1p(-1.0 / (spec.num_keys * spec.num_values))),
    }


def query_subset(spec: MQARSpec, examples: int, queries: int, *, seed: int = 0) -> torch.Tensor:
    """Choose `queries` of the num_pairs queries of each example uniformly, or all if there are no more.

    Returns:
        int64 [examples, queries], in rising order. The choice for an example does not depend on the number of
        examples.
    """
    if queries < 1:
        raise ValueError(f"queries must be positive, got {queries}")
    if queries >= spec.num_pairs:
        return torch.arange(spec.num_pairs).repeat(examples, 1)
    rows = mix(torch.arange(examples) * GOLDEN + seed)
    return _distinct(rows, queries, spec.num_pairs, stream=4).long().sort(dim=1).values


@torch.no_grad()
def count_correct(
    model: torch.nn.Module,
    examples: MQARExamples,
    *,
    batch_size: int = 64,
    queries: torch.Tensor | None = None,
) -> tuple[int, int]:
    """Count the queries whose value has the largest logit of the whole vocabulary.

    Args:
        model: any causal language model of transformers.
        examples: the test set; batches move to the model's device.
        batch_size: sequences per forward pass.
        queries: [N, Q], which queries of each example count. `None` counts all.

    Returns:
        The number of right answers and of queries. The logits are made only at the repeated keys.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    head = model.get_output_embeddings()
    correct = torch.zeros((), dtype=torch.long, device=device)
    asked = 0
    for first in range(0, len(examples), batch_size):
        batch = slice(first, first + batch_size)
        part = examples[batch].to(device)
        positions, values = part.positions.long(), part.values.long()
        if queries is not None:
            chosen = queries[batch].to(device)
            positions, values = positions.gather(1, chosen), values.gather(1, chosen)
        hidden = model.base_model(input_ids=part.input_ids(), use_cache=False).last_hidden_state
        hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        correct += (head(hidden).argmax(dim=-1) == values).sum()
        asked += values.numel()
    model.train(training)
    return int(correct), asked


def accuracy(model: torch.nn.Module, examples: MQARExamples, **kwargs: Any) -> float:
    """Return the share of queries that `count_correct` counts as right."""
    correct, asked = count_correct(model, examples, **kwargs)
    return correct / asked


FILLER = "_"


def symbols(vocab_size: int = 8192) -> list[str]:
    """Return the task's symbols as text, by token id: the filler "_", then the numbers themselves."""
    return [FILLER, *(str(i) for i in range(1, vocab_size))]


def build_tokenizer(vocab_size: int = 8192, model_max_length: int = 2048) -> PreTrainedTokenizerFast:
    """Return the WordLevel tokenizer of MQAR checkpoints: one token per symbol, split at spaces, nothing added.

    A word that is not a symbol raises an error when it is encoded. The filler is also the end-of-text and padding
    token, because lm-eval asks every tokenizer for one. It cannot be part of another symbol.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(symbols(vocab_size))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=FILLER,
        pad_token=FILLER,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def to_text(token_ids: list[int]) -> str:
    """Return token ids as text that the tokenizer of `build_tokenizer` reads."""
    return " ".join(FILLER if i == 0 else str(i) for i in token_ids)


def main(argv: list[str] | None = None) -> None:
    """Make the examples, time their generation, and print what was asked for."""
    parser = argparse.ArgumentParser(
        description="Generate MQAR data, time it, and look for leakage.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--pairs", type=int, help="default: Figure 1's number for the length")
    parser.add_argument("--examples", type=count, default=100_000, help="examples to generate")
    parser.add_argument("--test-examples", type=count, default=3_000, help="examples of the test set")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--device", type=known_device, default="cpu", help="where to compute")
    parser.add_argument("--leakage", action="store_true", help="compare with the test set")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N sequences and labels")
    args = parser.parse_args(with_dashes(argv))

    try:
        spec = figure_1_spec(args.length) if args.pairs is None else MQARSpec(args.length, args.pairs)
    except ValueError as error:
        parser.error(str(error))
    begin = time.perf_counter()
    train = make_examples(spec, args.examples, seed=args.seed, device=args.device)
    input_ids = train.input_ids(torch.int16)
    if input_ids.is_cuda:
        torch.cuda.synchronize()
    report: dict[str, object] = {
        "length": spec.length,
        "pairs": spec.num_pairs,
        "examples": len(train),
        "device": args.device,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    if args.leakage:
        test = make_examples(spec, args.test_examples, seed=args.seed, split="test", device=args.device)
        report.update(check_leakage(train, test))
    print(json.dumps(report))
    for i in range(min(args.show, len(train))):
        print(to_text(train[i : i + 1].input_ids()[0].tolist()))
        labels = train[i : i + 1].labels()[0]
        print({int(t) - 1: int(labels[t]) for t in (labels >= 0).nonzero()[:, 0]})


if __name__ == "__main__":
    main()
