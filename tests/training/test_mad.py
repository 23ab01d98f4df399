"""MAD's generators against a literal reading of each task's definition."""

from collections import Counter

import pytest
import torch

from modeling_rebased.training import mad
from modeling_rebased.training.mad import BASE, MADSpec, make_examples, memorization_table


def rows_of(spec: MADSpec, count: int, split: str = "test", **options):
    tokens, targets = make_examples(spec, count, split=split, **options)
    return list(zip(tokens.tolist(), targets.tolist()))


@pytest.mark.parametrize("task", ["recall", "noisy_recall"])
def test_recall_asks_for_the_value_of_every_key_that_came_before(task):
    spec = BASE[task]
    symbols = spec.vocab_size - spec.noise_vocab_size
    noisy = 0
    for tokens, targets in rows_of(spec, 200):
        assert len(tokens) == spec.length - 1
        tokens = [*tokens, targets[-1]]  # the last value is only asked
        values = {}
        for t in range(0, spec.length, 2):
            key, value = tokens[t], tokens[t + 1]
            assert t == 0 or targets[t - 1] == -100  # nobody can know a key
            if key >= symbols:
                assert symbols <= value < spec.vocab_size and targets[t] == -100
                noisy += 1
                continue
            assert key < symbols // 2 <= value < symbols
            assert targets[t] == (value if key in values else -100)
            assert values.setdefault(key, value) == value
        assert targets[-1] != -100
    share = noisy / (200 * (spec.length // 2 - 2))
    assert share == pytest.approx(spec.noise, abs=0.015)


def test_recall_asks_last_for_any_key_that_came_equally_often():
    spec = MADSpec("recall", 8, 12)
    place, expected = Counter(), Counter()
    for tokens, _ in rows_of(spec, 6000):
        came = sorted(set(tokens[:-1:2]))
        place[came.index(tokens[-1]), len(came)] += 1
        expected[len(came)] += 1 / len(came)
    for (i, count), seen in place.items():
        assert seen == pytest.approx(expected[count], abs=5 * expected[count] ** 0.5), (i, count)


def test_keys_and_values_of_recall_are_uniform():
    tokens = make_examples(BASE["recall"], 4000)[0]
    for column, low in ((0, 0), (40, 0), (1, 8), (41, 8)):
        counts = torch.bincount(tokens[:, column].long(), minlength=16)[low : low + 8]
        assert counts.sum() == 4000 and ((counts - 500).abs() < 5 * 500**0.5).all()


def motifs(sequence: list[int], num_keys: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The pairs of a sequence of fuzzy recall: a run of key tokens, then a run of value tokens."""
    pairs: list[tuple[list[int], list[int]]] = []
    for token in sequence:
        if token < num_keys and (not pairs or pairs[-1][1]):
            pairs.append(([], []))
        pairs[-1][0 if token < num_keys else 1].append(token)
    return [(tuple(key), tuple(value)) for key, value in pairs]


def test_fuzzy_recall_asks_for_each_token_of_a_known_value():
    spec, unanswerable, sizes = BASE["fuzzy_recall"], 0, Counter()
    for tokens, targets in rows_of(spec, 500):
        filled = [i for i, token in enumerate(tokens) if token != 15]
        assert len(tokens) == 128 and filled == list(range(filled[0], 128))  # padding stands at the left alone
        # the last token of the last value is only asked, and not at all if its key never came
        whole = tokens[filled[0] :] + [token for token in targets[-1:] if token != -100]
        answers = targets[filled[0] - 1 :]
        pairs, values, expected = motifs(whole, 7), {}, []
        for key, value in pairs[:-1]:
            assert len(key) == 3 and 1 <= len(value) <= 3
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
            sizes[len(value)] += 1
            expected += [-100] * 3 + (list(value) if key in values else [-100] * len(value))
            assert values.setdefault(key, value) == value
        key, value = pairs[-1]
        assert (key in values) == (targets[-1] != -100)
        unanswerable += key not in values
        if key in values:
            assert value == values[key]
            assert answers == expected + [-100] * 3 + list(value)
        else:
            assert answers[: len(expected)] == expected and set(answers[len(expected) :]) == {-100}
    assert unanswerable < 0.06 * 500
    assert all(sizes[n] == pytest.approx(sum(sizes.values()) / 3, rel=0.1) for n in (1, 2, 3))


def test_training_with_fuzzy_recall_has_keys_of_all_sizes_and_learns_every_token():
    sizes = Counter()
    for tokens, targets in rows_of(BASE["fuzzy_recall"], 200, split="train"):
        assert tokens[1:] == targets[:-1] and -100 not in targets
        sequence = [token for token in tokens if token != 15]
        sizes.update(len(key) for key, _ in motifs(sequence, 7)[:-1])
    # runs are as often 1, 2 and 3 long
    assert all(sizes[n] == pytest.approx(sum(sizes.values()) / 3, rel=0.1) for n in (1, 2, 3))


@pytest.mark.parametrize("task", ["recall", "noisy_recall"])
def test_training_with_recall_learns_every_next_token(task):
    for tokens, targets in rows_of(BASE[task], 20, split="train"):
        assert tokens[1:] == targets[:-1] and -100 not in targets


def test_selective_copying_asks_for_the_tokens_in_order():
    spec = BASE["selective_copying"]
    gaps = Counter()
    for split in ("train", "test"):
        for tokens, targets in rows_of(spec, 200, split=split):
            assert len(tokens) == 256 and tokens[-17] == 15 and set(tokens[-16:]) == {14}
            places = [t for t, token in enumerate(tokens) if token < 14]
            assert len(places) == 16 and places[-1] == 238  # no blank stands behind the last
            assert targets == [-100] * 240 + [tokens[t] for t in places]
            gaps.update(j for t in range(238) if tokens[t] == 14 for j in [sum(p < t for p in places)])
    assert all(gaps[j] == pytest.approx(400 * 223 / 16, rel=0.06) for j in range(16))


def test_compression_asks_for_all_tokens():
    for split in ("train", "test"):
        for tokens, targets in rows_of(BASE["compression"], 50, split=split):
            assert tokens == targets and len(tokens) == 32
            assert tokens[-1] == 15 and max(tokens[:-1]) < 15


def test_memorization_has_one_table_for_training_and_test():
    spec = BASE["memorization"]
    table = memorization_table(spec, seed=0).tolist()
    assert len(table) == 127 and len(set(table)) == 127 and min(table) >= 127 and max(table) < 255
    for split in ("train", "test"):
        for tokens, targets in rows_of(spec, 256, split=split):
            assert set(tokens[1::2]) == {255} and set(targets[::2]) == {-100}
            assert [table[key] for key in tokens[::2]] == targets[1::2]
    assert memorization_table(spec, seed=1).tolist() != table
    assert len(set(make_examples(spec, 256)[0][:, ::2].flatten().tolist())) == 127  # all can be learned


@pytest.mark.parametrize("task", mad.TASKS)
def test_examples_depend_on_seed_split_and_index_only(task):
    spec = BASE[task]
    whole = make_examples(spec, 30, seed=3)
    part = make_examples(spec, 5, seed=3, start=20)
    assert all(torch.equal(a[20:25], b) for a, b in zip(whole, part))
    assert not torch.equal(whole[0], make_examples(spec, 30, seed=4)[0])
    assert not torch.equal(whole[0], make_examples(spec, 30, seed=3, split="test")[0])


@pytest.mark.parametrize("task", mad.TASKS)
def test_no_test_sequence_is_in_the_training_set(task):
    train = {tuple(row) for row in make_examples(BASE[task], mad.TRAIN_EXAMPLES[task] // 4)[0].tolist()}
    test = {tuple(row) for row in make_examples(BASE[task], 320, split="test")[0].tolist()}
    assert len(test) == 320 and not train & test


def test_the_sizes_are_the_authors():
    assert {
        "recall": MADSpec("recall", 16, 128),
        "fuzzy_recall": MADSpec("fuzzy_recall", 16, 128),
        "noisy_recall": MADSpec("noisy_recall", 32, 128, noise_vocab_size=16, noise=0.2),
        "selective_copying": MADSpec("selective_copying", 16, 256, copy=16),
        "compression": MADSpec("compression", 16, 32),
        "memorization": MADSpec("memorization", 256, 32),
    } == BASE


def test_the_first_examples_stay_what_they_are():
    """Published numbers name a seed, so a seed's data may not change from one version to the next."""
    first = {task: make_examples(spec, 1)[0][0].tolist() for task, spec in BASE.items()}
    assert first["recall"][:8] == [4, 10, 0, 15, 5, 9, 7, 12]
    assert first["noisy_recall"][:8] == [4, 10, 0, 15, 5, 9, 7, 12]
    assert first["fuzzy_recall"][-8:] == [3, 13, 7, 4, 10, 6, 1, 11]
    assert [token for token in first["selective_copying"] if token < 14][:8] == [13, 7, 13, 8, 4, 2, 6, 8]
    assert first["compression"][:8] == [14, 7, 14, 8, 4, 2, 7, 9]
    assert first["memorization"][:8:2] == [122, 66, 125, 75]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (("forgetting", 16, 128), "task must be one of recall,"),
        (("recall", 16, 127), "recall: length must be even, got 127"),
        (("recall", 1, 128), "recall: vocab_size without noise must be at least 2, got 1"),
        (("recall", 16, 128, 4, 0.1), "recall: noise and noise_vocab_size are for noisy_recall, got 0.1 and 4"),
        (("noisy_recall", 32, 128, 16, 1.0), "noise must be at least 0 and less than 1, got 1.0"),
        (("fuzzy_recall", 6, 128), "vocab_size without noise must be at least 7, got 6"),
        (("fuzzy_recall", 16, 12), "length must be at least 13, got 12"),
        (("selective_copying", 16, 33, 0, 0.0, 16), "length must be at least 34, got 33"),
        (("selective_copying", 16, 256), "copy is for selective_copying, got 0"),
        (("memorization", 2**15 + 1, 32), "vocab_size must be at most 32768"),
    ],
)
def test_impossible_sizes_are_named(sizes, words):
    with pytest.raises(ValueError, match=words):
        MADSpec(*sizes)


def test_extreme_sizes_make_examples():
    for spec in (
        MADSpec("recall", 2, 4),
        MADSpec("noisy_recall", 3, 4, 1, 0.999),
        MADSpec("fuzzy_recall", 7, 13),
        MADSpec("selective_copying", 3, 4, copy=1),
        MADSpec("compression", 2, 4),
        MADSpec("memorization", 3, 2),
    ):
        for split in ("train", "test"):
            tokens, targets = make_examples(spec, 50, split=split)
            assert tokens.shape == targets.shape == (50, spec.positions)
            assert tokens.min() >= 0 and tokens.max() < spec.vocab_size and targets.max() < spec.vocab_size
            assert spec.task == "fuzzy_recall" or (targets >= 0).any(1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("task", mad.TASKS)
def test_the_gpu_makes_the_same_examples(task):
    here, there = make_examples(BASE[task], 100), make_examples(BASE[task], 100, device="cuda")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
