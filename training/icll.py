"""Generate in-context language learning, ICLL (Akyürek et al., 2024, arXiv 2401.12973), and its right answers.

An example is a few strings of one random automaton, with separators between them. A model that reads them must say
which symbols may come next, so it must infer the automaton from the strings.

The automaton is deterministic and all its states accept. Each state has 1 to 3 edges with distinct symbols, that lead
to distinct other states. It is minimised, which can merge states and so make an edge from a state to itself. A string
is a walk from the first state that takes each edge of a state with the same probability.

The split of an automaton follows from itself, by a hash: one in 8 is for tests. So no test ever has an automaton of
any training set, whatever the seeds and numbers of examples. Within a set no two are equal.

Every number is a hash (random_numbers.py), so an example does not depend on the others or on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .random_numbers import IGNORED, below, distinct, example_rows, mix, numbers


PADDING = 0  # the symbols are 1 .. symbols, and the separator comes after them
TEST_SHARE = 8  # one in so many automata
MAX_EDGES = 3
_BLOCK = 1024  # automata that are drawn at a time


@dataclass(frozen=True)
class ICLLSpec:
    """Hold the sizes of the task. The defaults are the authors'.

    Args:
        symbols: the alphabet of all automata. One automaton has 4 or more of them.
        max_states: most states of an automaton before it is minimised. The least is 4.
        min_strings: fewest strings in an example.
        max_strings: most strings in an example.
        max_length: most symbols in a string. The least is 1.

    Raises:
        ValueError: sizes that cannot be.
    """

    symbols: int = 18
    max_states: int = 12
    min_strings: int = 10
    max_strings: int = 19
    max_length: int = 49

    def __post_init__(self) -> None:
        for name in ("symbols", "max_states"):
            if not MAX_EDGES < getattr(self, name) <= 64:
                raise ValueError(f"{name} must be {MAX_EDGES + 1} to 64, got {getattr(self, name)}")
        if not 1 <= self.min_strings <= self.max_strings:
            raise ValueError(
                f"min_strings must be 1 to max_strings, got {self.min_strings} and max_strings={self.max_strings}"
            )
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        if self.length < 2:
            raise ValueError("max_strings or max_length must be at least 2, or there is no next token to say")

    @property
    def separator(self) -> int:
        return self.symbols + 1

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def length(self) -> int:
        """Return the most tokens of an example."""
        return self.max_strings * (self.max_length + 1) - 1


@dataclass
class ICLLExamples:
    """Hold N examples.

    Attributes:
        spec: the task.
        automata: [N, states, symbols] int8, the state that an edge leads to, or -1. State 0 is the first. The symbol
            of column s is the token s + 1.
        tokens: [N, T] int16, padded at the right to the longest.
        states: [N, T] int8, the state after each token; 0 after a separator.
    """

    spec: ICLLSpec
    automata: torch.Tensor
    tokens: torch.Tensor
    states: torch.Tensor

    def input_ids(self) -> torch.Tensor:
        """Return the tokens that a model reads, [N, T - 1] int16: all but the last."""
        return self.tokens[:, :-1]

    def targets(self) -> torch.Tensor:
        """Return the token after each of these, [N, T - 1] int16, and -100 for separators and padding.

        Where a string ends is random, so separators are not learned.
        """
        following = self.tokens[:, 1:]
        return following.masked_fill((following == PADDING) | (following == self.spec.separator), IGNORED)

    def next_tokens(self) -> torch.Tensor:
        """Return the automaton's distribution of the next token at each of these, [N, T - 1, vocab_size] float32.

        All legal symbols have the same probability. It is 0 everywhere at padding.
        """
        legal = (self.automata >= 0).float()
        legal = legal / legal.sum(-1, keepdim=True).clamp(min=1)
        rows = torch.arange(len(legal), device=legal.device)[:, None]
        found = legal[rows, self.states[:, :-1].long()]
        found = torch.nn.functional.pad(found, (1, 1))
        return found * (self.input_ids() != PADDING)[..., None]


def make_examples(
    spec: ICLLSpec,
    count: int,
    *,
    seed: int = 0,
    split: str = "train",
    device: torch.device | str = "cpu",
) -> ICLLExamples:
    """Return the first `count` examples of a split, each of another automaton.

    Args:
        spec: the task.
        count: how many examples.
        seed: any integer; another seed is another data set.
        split: "train" or "test".
        device: where the examples are made and stay. All devices give the same examples.

    Raises:
        ValueError: an unknown split, a count below 1, or a task that has not so many automata.

    Example:
        >>> examples = make_examples(ICLLSpec(), 4, split="test")
        >>> examples.input_ids().shape == examples.targets().shape
        True
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rows, automata = _automata(spec, count, seed, split, device)
    tokens, states = _strings(rows, automata, spec)
    return ICLLExamples(spec, automata, tokens, states)


def _automata(
    spec: ICLLSpec, count: int, seed: int, split: str, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` distinct automata of a split, and the hashes that they were drawn from."""
    all_rows, all_automata, known = [], [], set()
    found, block = 0, 0
    while found < count:
        rows = example_rows(seed, split, block * _BLOCK, _BLOCK, device)
        automata = minimal(random_automata(rows, spec))
        keys = automaton_keys(automata)
        kept = []
        for i, (key, test) in enumerate(zip(keys.tolist(), (below(keys, TEST_SHARE) == 0).tolist())):
            if test == (split == "test") and key not in known:
                known.add(key)
                kept.append(i)
        chosen = torch.tensor(kept[: count - found], dtype=torch.long, device=rows.device)
        all_rows.append(rows[chosen])
        all_automata.append(automata[chosen])
        found += len(chosen)
        if not kept:
            raise ValueError(f"this task has only about {found} different automata for {split}, got count={count}")
        block += 1
    return torch.cat(all_rows), torch.cat(all_automata)


def automaton_keys(automata: torch.Tensor) -> torch.Tensor:
    """Return a hash of each minimal automaton, [N] int64. It decides the split and tells automata apart."""
    edges = automata.flatten(1).long() + 1
    weights = numbers(torch.zeros_like(edges[:1, :1]), torch.arange(edges.shape[1], device=edges.device), 1)
    return mix((edges * weights).sum(1))


def random_automata(rows: torch.Tensor, spec: ICLLSpec) -> torch.Tensor:
    """Draw an automaton for each hash, [N, max_states, symbols] int8, as `ICLLExamples.automata` but not minimised."""

    def lanes(*shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel(), device=rows.device).view(1, *shape)

    size = MAX_EDGES + 1
    one, three = rows[:, None], rows[:, None, None]
    states = size + below(numbers(one, lanes(1), 1), spec.max_states - size + 1)
    letters = size + below(numbers(one, lanes(1), 2), spec.symbols - size + 1)
    alphabet = numbers(one, lanes(spec.symbols), 3).argsort(dim=1)  # the first `letters` of them are this automaton's
    edges = 1 + below(numbers(one, lanes(spec.max_states), 4), MAX_EDGES)
    symbols = distinct(numbers(three, lanes(spec.max_states, MAX_EDGES), 5), letters[..., None])
    symbols = alphabet[:, None].expand(-1, spec.max_states, -1).gather(2, symbols)
    targets = distinct(numbers(three, lanes(spec.max_states, MAX_EDGES), 6), states[..., None] - 1)
    targets = targets + (targets >= lanes(spec.max_states, 1))  # any state but its own
    exists = (lanes(1, MAX_EDGES) < edges[..., None]) & (lanes(spec.max_states, 1) < states[..., None])
    automata = torch.full((len(rows), spec.max_states, spec.symbols + 1), -1, dtype=torch.int8, device=rows.device)
    automata.scatter_(2, torch.where(exists, symbols, spec.symbols), targets.to(torch.int8))
    return automata[..., :-1]


def minimal(automata: torch.Tensor) -> torch.Tensor:
    """Merge the states that accept the same strings, drop those that no string reaches, and number the rest.

    The numbers follow the order in which a search reaches the states from state 0 that takes symbols in order. Two
    automata accept the same strings if and only if the results are equal.
    """
    count, states, symbols = automata.shape
    edges = automata.long()
    group = torch.zeros(count, states, dtype=torch.long, device=edges.device)  # the first state of its kind
    for _ in range(states):
        after = group[:, None].expand(-1, states, -1).gather(2, edges.clamp(min=0)).masked_fill(edges < 0, -1)
        same = group[:, :, None] == group[:, None]
        for symbol in range(symbols):
            same &= after[:, :, None, symbol] == after[:, None, :, symbol]
        refined = same.to(torch.int8).argmax(dim=2)
        if torch.equal(refined, group):
            break
        group = refined
    rows = torch.arange(count, device=edges.device)
    number = torch.full((count, states + 1), -1, device=edges.device)  # the last column is for no state
    queue = torch.full_like(number, states)
    number[:, 0], queue[:, 0] = 0, 0
    found = torch.ones_like(rows)
    result = torch.full_like(edges, -1)
    edges = torch.cat([edges, torch.full_like(edges[:, :1], -1)], dim=1)
    for place in range(states):
        state = queue[:, place]
        for symbol in range(symbols):
            target = edges[rows, state, symbol]
            target = torch.where(target >= 0, group[rows, target.clamp(min=0)], states)
            new = (target < states) & (number[rows, target] < 0)
            number[rows, target] = torch.where(new, found, number[rows, target])
            queue[rows, torch.where(new, found, states)] = torch.where(new, target, states)
            found += new
            result[:, place, symbol] = number[rows, target]
    return result.to(torch.int8)


def _strings(rows: torch.Tensor, automata: torch.Tensor, spec: ICLLSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of each example, [N, T] int16, and the state after each, [N, T] int8."""
    device = rows.device
    lanes = torch.arange(spec.max_strings, device=device)
    strings = spec.min_strings + below(numbers(rows, lanes[:1], 7), spec.max_strings - spec.min_strings + 1)
    lengths = 1 + below(numbers(rows[:, None], lanes, 8), spec.max_length).long()
    ends = (lengths + 1).cumsum(1) - 1  # where the separator of each string is
    total = ends.gather(1, strings[:, None].long() - 1)
    length = int(total.max())
    is_end = torch.zeros(len(rows), spec.length + 1, dtype=torch.bool, device=device).scatter_(1, ends, True)
    legal = automata >= 0
    edges = legal.sum(2)
    symbols = legal.to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., :MAX_EDGES]
    each = torch.arange(len(rows), device=device)
    state = torch.zeros_like(rows)
    tokens = torch.empty(len(rows), length, dtype=torch.int16, device=device)
    states = torch.empty(len(rows), length, dtype=torch.int8, device=device)
    for t in range(length):
        choice = below(numbers(rows, lanes[:1] + t, 9), edges[each, state])
        symbol = symbols[each, state, choice.long()]
        end = is_end[:, t]
        state = torch.where(end, 0, automata[each, state, symbol]).long()
        tokens[:, t] = torch.where(end, spec.separator, symbol + 1)
        states[:, t] = state
    padding = torch.arange(length, device=device) >= total
    return tokens.masked_fill(padding, PADDING), states.masked_fill(padding, 0)


def ngram_next_tokens(examples: ICLLExamples, n: int = 3) -> torch.Tensor:
    """Return what an n-gram model says, learned from the example up to each token: [N, T - 1, vocab_size] float32.

    It is the authors' model. A symbol that came after the last n - 1 symbols has the share of its count in the count
    of these. What is left of 1 goes to the other symbols, in proportion to the model for n - 1. A string begins with
    n - 1 marks, which count as symbols of the context and in the counts of single symbols.
    """
    spec, tokens = examples.spec, examples.input_ids().long()
    count, length = tokens.shape
    size = spec.symbols + 1  # symbols, and the mark 0
    rows = torch.arange(count, device=tokens.device)
    # counts[m] is of runs of m + 1 symbols, and a run is a number in base `size`
    counts = [torch.zeros(count, size ** (m + 1), device=tokens.device) for m in range(n)]
    context = torch.zeros(count, dtype=torch.long, device=tokens.device)  # the last n - 1 symbols as a number
    result = torch.zeros(count, length, spec.vocab_size, device=tokens.device)

    def begin(who: torch.Tensor) -> None:
        for m in range(n - 1):  # a run of m + 1 marks ends at n - 1 - m of the marks
            counts[m][:, 0] += who * (n - 1 - m)

    begin(torch.ones(count, device=tokens.device))
    for t in range(length):
        token = tokens[:, t]
        end = token == spec.separator
        inside = (~end & (token != PADDING)).float()
        symbol = torch.where(inside > 0, token, 0)
        for m in range(n):
            counts[m][rows, context % size**m * size + symbol] += inside
        context = torch.where(end, 0, (context * size + symbol) % size ** (n - 1))
        begin(end.float())
        probabilities = counts[0][:, 1:] / counts[0].sum(1, keepdim=True)
        for m in range(1, n):
            before = context % size**m
            runs = counts[m].view(count, -1, size)[rows, before, 1:]
            share = runs / counts[m - 1][rows, before][:, None].clamp(min=1)
            rest = probabilities * (runs == 0)
            left = (1 - share.sum(1, keepdim=True)) / rest.sum(1, keepdim=True).clamp(min=1e-30)
            probabilities = torch.where(runs > 0, share, rest * left)
        result[:, t, 1:size] = probabilities * (token != PADDING)[:, None]
    return result
