"""ICLL's automata, strings and 3-gram model against slow, literal readings of their definitions."""

import time
from collections import Counter
from itertools import combinations

import pytest
import torch

from modeling_rebased.training import icll
from modeling_rebased.training.icll import ICLLSpec, make_examples, minimal, ngram_next_tokens, random_automata
from modeling_rebased.training.random_numbers import example_rows


SPEC = ICLLSpec()
SMALL = ICLLSpec(symbols=5, max_states=6, min_strings=2, max_strings=4, max_length=6)
Automaton = list[dict[int, int]]  # for each state: symbol -> state


def edges_of(automaton: torch.Tensor) -> Automaton:
    return [{s: int(t) for s, t in enumerate(row) if t >= 0} for row in automaton.tolist()]


def same_language(first: Automaton, p: int, second: Automaton, q: int) -> bool:
    """Whether two states accept the same strings: walk both at once and compare which symbols are legal."""
    seen, left = {(p, q)}, [(p, q)]
    while left:
        p, q = left.pop()
        if first[p].keys() != second[q].keys():
            return False
        for symbol in first[p]:
            pair = (first[p][symbol], second[q][symbol])
            if pair not in seen:
                seen.add(pair)
                left.append(pair)
    return True


@pytest.fixture(scope="module")
def raw() -> torch.Tensor:
    return random_automata(example_rows(0, "train", 0, 300), SPEC)


@pytest.fixture(scope="module")
def small_raw() -> torch.Tensor:
    """Automata of few symbols, of which many have states to merge or to drop."""
    return random_automata(example_rows(0, "train", 0, 300), ICLLSpec(symbols=4, max_states=6))


def test_automata_are_drawn_by_the_definition(raw):
    states, letters, degrees = Counter(), Counter(), Counter()
    for automaton in raw:
        edges = [row for row in edges_of(automaton) if row]
        states[len(edges)] += 1
        letters[len({symbol for row in edges for symbol in row})] += 1
        for state, row in enumerate(edges):
            degrees[len(row)] += 1
            assert 1 <= len(row) <= 3 and state not in row.values() and len(set(row.values())) == len(row)
            assert all(0 <= target < len(edges) for target in row.values())
        assert edges_of(automaton)[: len(edges)] == edges
    assert set(states) == set(range(4, 13)) and max(letters) <= 18
    assert all(states[n] == pytest.approx(300 / 9, abs=5 * (300 / 9) ** 0.5) for n in states)
    assert all(degrees[n] == pytest.approx(sum(degrees.values()) / 3, rel=0.1) for n in (1, 2, 3))


@pytest.mark.parametrize("which", ["raw", "small_raw"])
def test_minimal_automata_accept_the_same_and_have_no_state_too_many(which, request):
    raw = request.getfixturevalue(which)
    fewer = 0
    for before, after in zip(raw, minimal(raw)):
        before, after = edges_of(before), edges_of(after)
        count = sum(bool(row) for row in after)
        fewer += count < sum(bool(row) for row in before)
        assert same_language(before, 0, after, 0)
        reached, left = {0}, [0]
        while left:
            new = set(after[left.pop()].values()) - reached
            reached |= new
            left += new
        assert reached == set(range(count))
        assert not any(same_language(after, p, after, q) for p, q in combinations(range(count), 2))
    assert fewer > 10


def test_the_numbers_of_states_do_not_matter(raw):
    """Automata with renumbered states become equal to the last edge."""
    order = torch.tensor([0, 11, 3, 7, 1, 2, 10, 9, 8, 4, 6, 5])  # state i becomes order[i]
    renumbered = torch.full_like(raw, -1)
    renumbered[:, order] = torch.where(raw >= 0, order[raw.long().clamp(min=0)], -1).to(torch.int8)
    assert torch.equal(minimal(raw), minimal(renumbered))
    assert torch.equal(minimal(minimal(raw)), minimal(raw))


def test_merged_states_can_have_an_edge_to_themselves():
    raw = torch.full((1, 4, 2), -1, dtype=torch.int8)
    raw[0, 0, 1], raw[0, 1, 1], raw[0, 2, 0], raw[0, 3, 0] = 1, 0, 3, 2  # two equal states, and two never reached
    expected = torch.full_like(raw, -1)
    expected[0, 0, 1] = 0
    assert torch.equal(minimal(raw), expected)


def test_every_string_is_a_walk_and_every_target_a_legal_symbol():
    examples = make_examples(SPEC, 60, split="test")
    strings, lengths = Counter(), Counter()
    exact = examples.next_tokens()
    for n, row in enumerate(examples.tokens.tolist()):
        tokens = row[: row.index(0)] if 0 in row else row
        assert set(row[len(tokens) :]) <= {0}
        edges, state, length = edges_of(examples.automata[n]), 0, 0
        targets = examples.targets()[n].tolist()
        for t, token in enumerate(tokens):
            if token == 19:
                lengths[length] += 1
                state, length = 0, 0
            else:
                assert token - 1 in edges[state]
                state, length = edges[state][token - 1], length + 1
            assert int(examples.states[n, t]) == state
            if t < len(tokens) - 1:
                assert targets[t] == (-100 if tokens[t + 1] == 19 else tokens[t + 1])
            if t < exact.shape[1]:
                expected = [1 / len(edges[state]) if s - 1 in edges[state] else 0.0 for s in range(20)]
                assert exact[n, t].tolist() == pytest.approx(expected)
        lengths[length] += 1
        strings[tokens.count(19) + 1] += 1
        assert set(targets[len(tokens) - 1 :]) <= {-100} and exact[n, len(tokens) :].sum() == 0
    assert min(strings) >= 10 and max(strings) <= 19 and min(lengths) >= 1 and max(lengths) <= 49
    assert sum(s * c for s, c in strings.items()) / 60 == pytest.approx(14.5, abs=1.5)
    assert sum(s * c for s, c in lengths.items()) / sum(lengths.values()) == pytest.approx(25, abs=2.5)


def test_edges_are_taken_equally_often():
    examples = make_examples(SPEC, 200)
    taken = examples.next_tokens().gather(2, examples.targets().long().clamp(min=0)[..., None])[..., 0]
    first = Counter()
    for n in range(200):
        edges = edges_of(examples.automata[n])[0]
        if len(edges) == 3:
            starts = [t for t in range(examples.tokens.shape[1]) if t == 0 or examples.tokens[n, t - 1] == 19]
            first.update(sorted(edges).index(int(examples.tokens[n, t]) - 1) for t in starts)
    assert all(first[i] == pytest.approx(sum(first.values()) / 3, rel=0.15) for i in range(3))
    assert (taken[examples.targets() >= 0] > 0).all()


def test_training_and_test_share_no_automaton_and_none_comes_twice():
    known = {}
    for split, seed in (("train", 0), ("train", 1), ("test", 0), ("test", 1)):
        automata = make_examples(SPEC, 400, seed=seed, split=split).automata
        known[split, seed] = {row.numpy().tobytes() for row in automata}
        assert len(known[split, seed]) == 400
    for train in (0, 1):
        for test in (0, 1):
            assert not known["train", train] & known["test", test]


def test_an_example_does_not_depend_on_their_number():
    few, many = make_examples(SPEC, 20, seed=2), make_examples(SPEC, 3000, seed=2)
    assert torch.equal(few.automata, many.automata[:20])
    assert torch.equal(few.tokens, many.tokens[:20, : few.tokens.shape[1]])
    assert not many.tokens[:20, few.tokens.shape[1] :].any()
    assert not torch.equal(few.automata, make_examples(SPEC, 20, seed=3).automata)


def test_the_first_example_stays_what_it_is():
    """Published numbers name a seed, so a seed's data may not change from one version to the next."""
    assert make_examples(SPEC, 1).tokens[0, :10].tolist() == [2, 16, 16, 1, 1, 2, 1, 1, 2, 1]
    assert make_examples(SPEC, 1, split="test").tokens[0, :10].tolist() == [15, 10, 9, 12, 5, 7, 5, 17, 14, 1]


def literal_ngram(strings: list[str], n: int, symbols: str) -> dict[str, float]:
    """The distribution of the symbol after `strings`, of which the last is not over, by counting words in them.

    Strings begin with marks, as many as the model of the highest order needs.
    """

    def count(word: str) -> int:
        return sum(string.startswith(word, i) for string in strings for i in range(len(string)))

    if n == 1:
        return {symbol: count(symbol) / sum(map(len, strings)) for symbol in symbols}
    before = strings[-1][len(strings[-1]) - (n - 1) :]
    known = {symbol: count(before + symbol) / count(before) for symbol in symbols if count(before + symbol)}
    lower = literal_ngram(strings, n - 1, symbols)
    unknown = sum(lower[symbol] for symbol in symbols if symbol not in known)
    left = 1 - sum(known.values())
    return {symbol: known.get(symbol, left * lower[symbol] / unknown if unknown else 0.0) for symbol in symbols}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_ngram_model_counts_words(n):
    examples, letters, marks = make_examples(SMALL, 4), "abcde", "^" * (n - 1)
    found = ngram_next_tokens(examples, n)
    for row, probabilities in zip(examples.tokens.tolist(), found):
        strings = [marks]
        for t, token in enumerate(row[: found.shape[1]]):
            if token == 0:
                assert not probabilities[t].any()
                continue
            if token == SMALL.separator:
                strings.append(marks)
            else:
                strings[-1] += letters[token - 1]
            expected = literal_ngram(strings, n, letters)
            assert probabilities[t, [0, 6]].tolist() == [0, 0]
            assert probabilities[t, 1:6].tolist() == pytest.approx(list(expected.values()), abs=1e-6)


def test_it_is_fast():
    """A fifth of the authors' 5,000 examples; the bound leaves room for a busy machine."""
    begin = time.perf_counter()
    make_examples(SPEC, 1000)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"symbols": 3}, "symbols must be 4 to 64, got 3"),
        ({"max_states": 3}, "max_states must be 4 to 64, got 3"),
        ({"min_strings": 5, "max_strings": 4}, "min_strings must be 1 to max_strings, got 5 and max_strings=4"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 1, "min_strings": 1, "max_strings": 1}, "max_strings or max_length must be at least 2"),
    ],
)
def test_impossible_sizes_are_named(sizes, words):
    with pytest.raises(ValueError, match=words):
        ICLLSpec(**sizes)


def test_too_many_examples_and_unknown_splits_are_named(monkeypatch):
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        make_examples(SPEC, 0)
    with pytest.raises(ValueError, match="'dev'"):
        make_examples(SPEC, 1, split="dev")
    monkeypatch.setattr(icll, "_BLOCK", 1)
    with pytest.raises(ValueError, match="different automata for test, got count=1000"):
        make_examples(SPEC, 1000, split="test")


@pytest.mark.gpu
def test_the_gpu_makes_the_same_examples():
    here, there = make_examples(SPEC, 100), make_examples(SPEC, 100, device="cuda")
    assert torch.equal(here.automata, there.automata.cpu()) and torch.equal(here.tokens, there.tokens.cpu())
    assert torch.allclose(ngram_next_tokens(here), ngram_next_tokens(there).cpu(), atol=1e-6)
