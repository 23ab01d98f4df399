"""The MQAR generator against a slow, literal reading of the task's definition."""

import math
import time

import numpy as np
import pytest
import torch

from modeling_rebased.training import mqar
from modeling_rebased.training.mqar import (
    MQARSpec,
    build_tokenizer,
    check_leakage,
    figure_1_spec,
    make_examples,
    query_subset,
    to_text,
)


def literal_example(rng: np.random.Generator, spec: MQARSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One example as the definition says it, one draw after another: sequence, unshifted labels, gaps in order."""
    half = spec.vocab_size // 2
    keys = rng.choice(np.arange(1, half), size=spec.num_pairs, replace=False)
    values = rng.choice(np.arange(half, spec.vocab_size), size=spec.num_pairs, replace=False)
    sequence = np.zeros(spec.length, dtype=np.int64)
    labels = np.full(spec.length, -100)
    for j in range(spec.num_pairs):
        sequence[2 * j], sequence[2 * j + 1] = keys[j], values[j]
    space = (spec.length - 2 * spec.num_pairs) // 2
    weights = [gap ** (spec.power_a - 1) for gap in range(1, space + 1)]
    gaps = []
    for j in range(spec.num_pairs):
        total = sum(w for g, w in enumerate(weights) if g not in gaps)
        u = rng.random() * total
        for gap in (g for g in range(space) if g not in gaps):
            u -= weights[gap]
            if u <= 0:
                break
        gaps.append(gap)
        sequence[2 * spec.num_pairs + 2 * gap] = keys[j]
        labels[2 * spec.num_pairs + 2 * gap] = values[j]
    return sequence, labels, np.array(gaps)


def two_sample_chi2(a: np.ndarray, b: np.ndarray) -> float:
    """z-score of the two-sample chi-square statistic over the bins that hold anything."""
    keep = (a + b) > 0
    a, b = a[keep].astype(float), b[keep].astype(float)
    scale = math.sqrt(b.sum() / a.sum())
    statistic = ((a * scale - b / scale) ** 2 / (a + b)).sum()
    degrees = keep.sum() - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


SMALL = MQARSpec(length=32, num_pairs=3, vocab_size=32)


@pytest.fixture(scope="module")
def literal() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    examples = [literal_example(rng, SMALL) for _ in range(8_000)]
    return {name: np.stack(column) for name, column in zip(("sequence", "labels", "gaps"), zip(*examples))}


@pytest.fixture(scope="module")
def fast() -> mqar.MQARExamples:
    return make_examples(SMALL, 40_000, seed=3)


def histogram(values: np.ndarray, bins: int) -> np.ndarray:
    return np.bincount(values.ravel(), minlength=bins)


@pytest.mark.parametrize("pair", [0, 1, 2])
def test_gap_of_each_pair_follows_the_power_law_without_replacement(literal, fast, pair):
    gaps = (fast.positions.numpy() - SMALL.context) // 2
    z = two_sample_chi2(histogram(gaps[:, pair], 13), histogram(literal["gaps"][:, pair], 13))
    assert abs(z) < 5


def test_joint_distribution_of_two_gaps(literal, fast):
    gaps = (fast.positions.numpy() - SMALL.context) // 2
    ours = histogram(gaps[:, 0] * 13 + gaps[:, 1], 169)
    assert abs(two_sample_chi2(ours, histogram(literal["gaps"][:, 0] * 13 + literal["gaps"][:, 1], 169))) < 5


def test_first_gap_against_the_formula(fast):
    gaps = (fast.positions.numpy()[:, 0] - SMALL.context) // 2
    weights = np.arange(1, SMALL.num_gaps + 1) ** (SMALL.power_a - 1)
    expected = weights / weights.sum()
    observed = histogram(gaps, SMALL.num_gaps) / len(gaps)
    assert np.abs(observed - expected).max() < 4 * math.sqrt(0.25 / len(gaps))


@pytest.mark.parametrize("what", ["keys", "values"])
def test_ordered_pairs_of_symbols_are_uniform(literal, fast, what):
    ours = getattr(fast, what).numpy().astype(np.int64)
    theirs = literal["sequence"][:, 0:6:2] if what == "keys" else literal["sequence"][:, 1:6:2]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        a = histogram(ours[:, first] * 32 + ours[:, second], 1024)
        b = histogram(theirs[:, first] * 32 + theirs[:, second], 1024)
        assert abs(two_sample_chi2(a, b)) < 5
        # and uniform over exactly the pairs of distinct symbols that the task has
        n = SMALL.num_keys if what == "keys" else SMALL.num_values
        assert (a > 0).sum() == n * (n - 1)


def test_sequences_and_labels_read_as_the_literal_ones(literal, fast):
    """Marginals of every (position, token) of the sequence and of the label there."""
    ids, labels = fast.input_ids().numpy(), fast.labels().numpy()
    place = np.arange(SMALL.length) * 64
    ours, theirs = histogram(ids + place, 2048), histogram(literal["sequence"] + place, 2048)
    assert ((ours > 0) == (theirs > 0)).all()
    assert abs(two_sample_chi2(ours, theirs)) < 5
    unshifted = np.roll(labels, -1, axis=1)
    assert (labels[:, 0] == -100).all()
    ours = histogram(np.maximum(unshifted, 0) + place, 2048)
    theirs = histogram(np.maximum(literal["labels"], 0) + place, 2048)
    assert ((ours > 0) == (theirs > 0)).all()
    assert abs(two_sample_chi2(ours, theirs)) < 5


@pytest.mark.parametrize("length", [128, 256, 512])
def test_every_example_is_a_valid_one(length):
    spec = figure_1_spec(length)
    examples = make_examples(spec, 40, seed=1)
    ids, labels = examples.input_ids(), examples.labels()
    for row, label in zip(ids.tolist(), labels.tolist()):
        keys, values = row[0 : spec.context : 2], row[1 : spec.context : 2]
        assert len(set(keys)) == len(set(values)) == spec.num_pairs
        assert all(1 <= k <= 4095 for k in keys) and all(4096 <= v <= 8191 for v in values)
        value_of = dict(zip(keys, values))
        asked = [t for t in range(length) if label[t] != -100]
        assert len(asked) == spec.num_pairs
        assert all(t > spec.context and (t - 1) % 2 == 0 for t in asked)
        assert [value_of[row[t - 1]] for t in asked] == [label[t] for t in asked]
        assert sorted(row[t - 1] for t in asked) == sorted(keys)
        assert all(row[t] == 0 for t in range(spec.context, length) if t + 1 not in asked)


def test_an_example_does_not_depend_on_its_company():
    spec = figure_1_spec(128)
    whole = make_examples(spec, 50, seed=5)
    part = make_examples(spec, 7, seed=5, start=31)
    for name in ("keys", "values", "positions"):
        assert torch.equal(getattr(whole, name)[31:38], getattr(part, name))


def test_chunks_do_not_change_the_examples(monkeypatch):
    spec = figure_1_spec(256)
    whole = make_examples(spec, 60, seed=2)
    monkeypatch.setitem(mqar._CHUNK_NUMBERS, "cpu", 500)
    again = make_examples(spec, 60, seed=2)
    assert torch.equal(whole.input_ids(), again.input_ids())
    assert torch.equal(whole.labels(), again.labels())


def test_seeds_and_splits_differ_and_repeat():
    spec = figure_1_spec(128)
    first = make_examples(spec, 20, seed=0).input_ids()
    assert torch.equal(first, make_examples(spec, 20, seed=0).input_ids())
    assert not torch.equal(first, make_examples(spec, 20, seed=1).input_ids())
    assert not torch.equal(first, make_examples(spec, 20, seed=0, split="test").input_ids())


def test_the_first_example_stays_what_it_is():
    """Published numbers name a seed, so a seed's data may not change from one version to the next."""
    example = make_examples(figure_1_spec(128), 1, seed=0)
    assert example.keys[0, :4].tolist() == [3962, 2138, 4039, 2443]
    assert example.values[0, :4].tolist() == [6550, 4595, 7115, 8077]
    assert example.positions[0, :4].tolist() == [32, 36, 40, 34]


def test_leakage_is_counted():
    spec = figure_1_spec(128)
    train, test = make_examples(spec, 3_000), make_examples(spec, 300, split="test")
    report = check_leakage(train, test)
    assert report["identical_sequences"] == report["identical_contexts"] == 0
    assert report["seen_pairs"] == pytest.approx(report["seen_pairs_by_chance"], abs=2e-3)
    mixed = make_examples(spec, 300, split="test")
    mixed.keys[:5], mixed.values[:5], mixed.positions[:4] = train.keys[:5], train.values[:5], train.positions[:4]
    report = check_leakage(train, mixed)
    assert (report["identical_sequences"], report["identical_contexts"]) == (4, 5)


def test_it_is_fast():
    """One hundredth of the 100,000 examples of length 2,048; the bound leaves room for a busy machine."""
    spec = figure_1_spec(2048)
    make_examples(spec, 10)
    begin = time.perf_counter()
    make_examples(spec, 1_000).input_ids(torch.int16)
    assert time.perf_counter() - begin < 3


@pytest.mark.gpu
def test_the_gpu_makes_the_same_examples():
    for length in (128, 1024):
        spec = figure_1_spec(length)
        cpu, gpu = make_examples(spec, 200, seed=4), make_examples(spec, 200, seed=4, device="cuda")
        assert torch.equal(cpu.input_ids(), gpu.input_ids().cpu())
        assert torch.equal(cpu.labels(), gpu.labels().cpu())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"length": 128, "num_pairs": 33}, "num_pairs=33"),
        ({"length": 127, "num_pairs": 3}, "length"),
        ({"length": 4096, "num_pairs": 16, "vocab_size": 32}, "vocab_size=32"),
    ],
)
def test_impossible_sizes_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        MQARSpec(**kwargs)


def test_unknown_split_and_length_are_named():
    with pytest.raises(ValueError, match="'dev'"):
        make_examples(SMALL, 1, split="dev")
    with pytest.raises(ValueError, match="300"):
        figure_1_spec(300)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (["--length", "127", "--pairs", "3"], "got 127 and 3"),
        (["--pairs", "0"], "got 2048 and 0"),
        (["--length", "300"], "length 300 is not in Figure 1"),
        (["--examples", "-3"], "--examples: must be an integer of at least 1, got '-3'"),
        (["--test_examples", "0"], "--test-examples: must be an integer of at least 1, got '0'"),
    ],
)
def test_the_command_line_names_impossible_sizes(sizes, words, capsys):
    with pytest.raises(SystemExit):
        mqar.main(sizes)
    assert words in capsys.readouterr().err


def test_queries_are_a_stable_subset():
    spec = figure_1_spec(256)
    chosen = query_subset(spec, 50, 8)
    assert chosen.shape == (50, 8)
    assert all(len(set(row)) == 8 and row == sorted(row) for row in chosen.tolist())
    assert torch.equal(chosen[:20], query_subset(spec, 20, 8))
    assert torch.equal(query_subset(spec, 2, 99)[0], torch.arange(64))
    counts = torch.bincount(query_subset(spec, 8_000, 8).flatten(), minlength=64).double()
    assert (counts / 1000 - 1).abs().max() < 0.2


def test_tokenizer_reads_what_to_text_writes(tmp_path):
    from transformers import AutoTokenizer

    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = make_examples(figure_1_spec(128), 3).input_ids().tolist()
    assert [tokenizer(to_text(row))["input_ids"] for row in ids] == ids
    assert len(tokenizer) == 8192
    assert tokenizer.decode(ids[0][:4]) == to_text(ids[0][:4])
    with pytest.raises(Exception, match="UNK"):
        tokenizer("17 apple")
