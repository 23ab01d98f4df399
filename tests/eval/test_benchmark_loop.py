"""The host's part of a step of `generate()`: every part is measured."""

import csv

import pytest

from modeling_rebased.eval import benchmark_loop


def test_a_row_per_part(tmp_path, capsys):
    benchmark_loop.main(["--config", "english-6m", "--steps", "4", "--repeats", "1", "--output", str(tmp_path)])
    with (tmp_path / "loop.csv").open(newline="") as file:
        times = {row["part"]: float(row["us"]) for row in csv.DictReader(file)}
    printed = capsys.readouterr().out
    assert len(times) == 7 and all(part in printed for part in times)
    assert times["of it: preparing the inputs of a step"] > 0  # the others are differences, which noise may turn


def test_a_bad_count_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark_loop.main(["--steps", "0", "--output", str(tmp_path)])
    assert "--steps: must be an integer of at least 1, got '0'" in capsys.readouterr().err
