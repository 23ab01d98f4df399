"""Figure 1 from results files: which runs make a cell, and that the files come out."""

import json
import math

import pytest

from modeling_rebased.eval import plot_mqar
from modeling_rebased.eval.plot_mqar import PUBLISHED, cells, markdown, read_runs
from modeling_rebased.eval.plot_style import STYLES, color_of
from modeling_rebased.training.mqar_runs import MODELS
from modeling_rebased.training.peers import PEERS


def run(model="rebased", length=1024, hidden=64, lr=1e-3, seed=0, accuracy=0.5, **extra):
    return {
        "name": f"{model}-{length}-{hidden}-{lr}-{seed}",
        "model": model,
        "length": length,
        "hidden": hidden,
        "lr": lr,
        "seed": seed,
        "accuracy": accuracy,
        "epochs": 64,
        "epochs_trained": 64,
        "history": [{"epoch": 1, "accuracy": 0.1}, {"epoch": 2, "accuracy": accuracy}],
        **extra,
    }


def test_a_cell_is_the_rate_with_the_best_mean():
    runs = [run(lr=1e-3, seed=0, accuracy=0.9), run(lr=1e-3, seed=1, accuracy=0.3)]
    runs += [run(lr=3e-3, seed=0, accuracy=0.7), run(lr=3e-3, seed=1, accuracy=0.6)]
    (cell,) = cells(runs)
    assert (cell.lr, cell.mean, cell.accuracies, cell.complete) == (3e-3, pytest.approx(0.65), [0.7, 0.6], True)
    for rates in ((1e-3, 3e-3), (3e-3, 1e-3)):  # whatever the order of the files
        assert cells([run(lr=lr) for lr in rates])[0].lr == 1e-3


def test_runs_that_were_cut_off_below_the_goal_make_no_cell():
    cut = run(lr=1e-2, accuracy=0.9, stopped="epoch 4", epochs_trained=4)
    assert cells([cut, run(lr=1e-3, accuracy=0.4)])[0].lr == 1e-3
    assert cells([cut]) == []
    (cell,) = cells([{**cut, "accuracy": 0.993}])
    assert (cell.lr, cell.complete) == (1e-2, True)
    assert cells([{**cut, "accuracy": 0.993, "stop_at": 0.999}]) == []  # below its own goal


def test_rates_with_fewer_seeds_than_another_do_not_count():
    runs = [run(lr=3e-3, seed=0, accuracy=0.9)] + [run(lr=1e-2, seed=seed, accuracy=0.5) for seed in range(3)]
    (cell,) = cells(runs)
    assert (cell.lr, cell.by_seed) == (1e-2, {0: 0.5, 1: 0.5, 2: 0.5})
    assert markdown([cell]).endswith("| 0.01 | 0.55 | 0.003: 0.900 (1) |")  # but the table has them


def test_short_runs_are_marked_unless_they_reach_the_goal():
    short = run(epochs=16, epochs_trained=16)
    assert not cells([short])[0].complete
    assert "16 of 64" in markdown(cells([short]))
    assert cells([run(epochs_trained=16, accuracy=0.995)])[0].complete


def test_runs_of_another_recipe_are_cells_of_their_own(tmp_path, figures):
    own = [run(seed=seed, accuracy=0.5) for seed in (0, 1)]
    others = [
        run(seed=0, accuracy=0.9, batch_size=64, dropout=0.0),
        run(seed=0, accuracy=0.7, bf16=False, vocab_size=512),
        run("based", seed=0, accuracy=0.8, bf16=False),
        run("based", seed=1, accuracy=0.8, bf16=False),
        run(seed=2, accuracy=0.31, stop_at=0.3, epochs_trained=9),
    ]
    (tmp_path / "all").write_text("\n".join(json.dumps(line) for line in [*own, *others]))  # runs of one name
    found = cells(read_runs([tmp_path / "all"]))
    assert [(cell.label, cell.paper_text, cell.mean) for cell in found] == [
        ("ReBased", "0.55", 0.5),
        ("ReBased, batch 64, dropout 0.0", "", 0.9),
        ("ReBased, goal 0.3", "", 0.31),
        ("ReBased, vocabulary 512, float32", "", 0.7),
        ("Based, float32", "", 0.8),
    ]
    assert "| ReBased, batch 64, dropout 0.0 | 0.900 |" in markdown(found)
    assert len(plot_mqar.differences(found).splitlines()) == 2  # no Based of the same recipe
    plot_mqar.plot(found, tmp_path / "figure.png")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()][:2] == ["ReBased", "mean"]
    plot_mqar.plot([cell for cell in found if cell.recipe], tmp_path / "figure.png")
    names = [text.get_text() for text in figures[1].legends[0].get_texts()][:4]
    assert [name.replace("\n", " ") for name in names] == [cell.label for cell in found if cell.recipe]
    plot_mqar.plot_curves(read_runs([tmp_path / "all"]), tmp_path / "curves.png")
    titles = [axis.get_title().split("\n")[1] for axis in figures[2].axes]
    assert titles[0] == "rate 0.001" and len(titles) == 5 and "rate 0.001, float32" in titles
    small = [run("x2", 256, hidden, pairs=32, batch_size=64) for hidden in (16, 24, 32, 48)]
    assert len(plot_mqar.ablation(cells(small)).splitlines()) == 2


def test_the_authors_numbers_stand_beside():
    runs = [run(), run("based"), run(length=256), run("gamma"), run("rebased_3_heads"), run(length=64, hidden=32)]
    table = markdown(cells([*runs, run(length=512, pairs=8), run(length=512, hidden=128, pairs=128)]))
    rows = {
        tuple(cell.strip() for cell in line.split("|")[1:4]): line.split("|")[9].strip() for line in table.split("\n")
    }
    assert rows["1,024", "64", "ReBased"] == "0.55" and rows["1,024", "64", "Based"] == "0.33"
    assert rows["256", "64", "ReBased"] == "≥ 0.97" and rows["512", "128", "ReBased"] == "≥ 0.97"
    for nothing in (("1,024", "64", "γ x"), ("1,024", "64", "ReBased, 3 heads"), ("64", "32", "ReBased")):
        assert rows[nothing] == "", nothing  # the paper has no such model, or no such size
    assert rows["512, 8 pairs", "64", "ReBased"] == ""  # nor this size with 8 pairs
    assert PUBLISHED["rebased"][2048, 128] - PUBLISHED["based"][2048, 128] == pytest.approx(0.17)


def test_a_repeat_of_a_seed_is_not_another_seed(tmp_path):
    first, other, again = run(seed=0, accuracy=0.5), run(seed=1, accuracy=0.2), run(seed=0, accuracy=0.7)
    cut = run(seed=1, accuracy=0.1, stopped="deadline", epochs_trained=9)
    steps = {"name": first["name"], "step_seconds": 0.01, "tokens_per_second": 4e7}  # of train_mqar --time-steps
    files = {"a": [first, other], "repeats": [again, cut], "copy": [first], "steps": [steps]}
    for name, lines in files.items():
        (tmp_path / name).write_text("\n".join(json.dumps(line) for line in lines))
    for order in (files, reversed(files)):
        runs = read_runs([tmp_path / name for name in order])
        assert sorted(r["accuracy"] for r in runs) == [0.2, 0.5, 0.7]
        (cell,) = cells(runs)
        assert (cell.by_seed, cell.runs, cell.complete) == ({0: pytest.approx(0.6), 1: 0.2}, 3, True)
        assert "| 0.400 | 0.200 to 0.600 | 2 (3 runs) |" in markdown([cell])
    (tmp_path / "further").write_text(json.dumps({**cut, "accuracy": 0.05, "epochs_trained": 12}))
    assert [r["epochs_trained"] for r in read_runs([tmp_path / "further", tmp_path / "repeats"])] == [12, 64]


def test_the_rate_is_chosen_by_seeds_not_by_runs():
    # 3e-3: seeds of 0.9 (twice) and 0.1 have the mean 0.5, their three runs 0.63
    runs = [run(lr=3e-3, seed=0, accuracy=0.9), run(lr=3e-3, seed=0, accuracy=0.9), run(lr=3e-3, seed=1, accuracy=0.1)]
    others = [run(lr=1e-3, seed=seed, accuracy=0.55) for seed in (0, 1)]
    assert cells([*runs, *others])[0].lr == 1e-3


def test_welchs_interval_of_a_difference():
    # By hand: means 3 and 5, variances 2.5 and 10, both of 5: t = -2 / sqrt(2.5), 5.882 degrees of freedom.
    found = plot_mqar.welch([1, 2, 3, 4, 5], [1, 3, 5, 7, 9])
    assert found.mean == pytest.approx(-2)
    half = 2.4587 * 2.5**0.5  # the 97.5% quantile of t with 5.882 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(-2 - half, abs=2e-3), pytest.approx(-2 + half, abs=2e-3))
    assert found.p_value == pytest.approx(0.2538, abs=1e-3)


def test_differences_want_two_seeds_of_both():
    runs = [run(seed=seed, accuracy=0.5 + 0.1 * seed) for seed in (0, 1)] + [run("based", accuracy=0.4)]
    assert len(plot_mqar.differences(cells(runs)).splitlines()) == 2  # the head alone
    runs += [run("based", seed=1, accuracy=0.2)]
    at_a_hundredth = [{**one, "lr": 1e-2} for one in runs]
    table = plot_mqar.differences(cells(at_a_hundredth))
    assert "| 1,024 | 64 | 0.01 | 2 | 0.550 ± 0.071 | 0.300 ± 0.141 | +0.250 | +0.22 |" in table
    assert table.endswith("| too few seeds |")
    assert len(plot_mqar.differences(cells(runs)).splitlines()) == 2  # not the rate of the rule
    elsewhere = [{**one, "hidden": 128, "lr": one["lr"] * (3 if one["model"] == "based" else 1)} for one in runs]
    table = plot_mqar.differences(cells(elsewhere))
    assert "| 1,024 | 128 | 0.001 and 0.003 | 2 | 0.550 ± 0.071 | 0.300 ± 0.141 | +0.250 | +0.00 |" in table
    solved = [run(model, 256, seed=seed, accuracy=0.995) for model in ("rebased", "based") for seed in (0, 1)]
    assert len(plot_mqar.differences(cells(solved)).splitlines()) == 2  # both stopped at the goal
    solved[0]["accuracy"] = solved[1]["accuracy"] = 0.9
    table = plot_mqar.differences(cells(solved))  # Based stopped there: its spread is cut off
    assert table.endswith("| 0.900 ± 0.000 | 0.995 ± 0.000 | -0.095 |  |  |  |  |")


def test_who_is_ahead_is_told_by_five_seeds_and_a_p_value_for_four_cells():
    def last(shift, seeds=range(5), size=(1024, 64), more=(), **extra):
        runs = [run("based", *size, 1e-2, seed, 0.3 + 0.01 * seed, **extra) for seed in seeds]
        runs += [run("rebased", *size, 1e-2, seed, 0.3 + shift + 0.01 * seed, **extra) for seed in seeds]
        row = plot_mqar.differences(cells([*runs, *more])).splitlines()[-1].split("|")
        return row[-2].strip(), float(row[-3])

    # Both variances are 0.00025, so the error of the difference is 0.01, with 8 degrees of freedom:
    # t is 3, then 4 and -4. Tables of the t distribution have p = 0.0171, more than a quarter of 0.05, and p = 0.0039.
    assert last(0.03) == ("not decided", pytest.approx(0.0171, abs=2e-4))
    assert last(0.04) == ("ReBased", pytest.approx(0.0039, abs=1e-4))
    assert last(-0.04) == ("Based", pytest.approx(0.0039, abs=1e-4))
    assert last(0.04, size=(1024, 128))[0] == ""
    assert last(0.04, pairs=8)[0] == ""
    both = [(model, seed) for model in ("based", "rebased") for seed in range(2)]
    other_task = [run(model, 1024, 64, 1e-2, seed, 0.1 * seed, pairs=8) for model, seed in both]
    assert "\n| 1,024, 8 pairs | 64 |" in plot_mqar.differences(cells(other_task))
    assert last(0.04, seeds=range(4))[0] == "too few seeds"
    # The rule names the rate and the seeds. Neither a better rate of one model nor more seeds enter.
    better = [run("based", lr=3e-3, seed=seed, accuracy=0.9) for seed in range(5)]
    assert last(0.04, more=better)[0] == "ReBased"
    assert last(0.04, more=[*better, run("rebased", lr=1e-2, seed=5, accuracy=0.0)]) == last(0.04)
    assert last(0.04, seeds=range(1, 6))[0] == "too few seeds"


def test_the_curves_tell_models_seeds_and_rates_apart(tmp_path, figures):
    runs = [run(seed=0, lr=3e-3), run(seed=1, lr=3e-3), run("based", lr=1e-2), run(seed=2, stopped="deadline")]
    runs += [run(length=128, accuracy=0.99), run("x2", lr=3e-3, pairs=32, epochs_trained=64)]  # solved: no panel
    runs[-1]["history"] = [{"epoch": 64, "accuracy": 0.5}]
    plot_mqar.plot_curves(runs, tmp_path / "curves.png")
    panels = {axis.get_title(): axis.get_lines() for axis in figures[0].axes}
    # no panel for what was cut off
    assert [name.split("rate ")[1] for name in panels] == ["0.003, 32 pairs", "0.003", "0.01"]
    assert len({axis.get_xlim() for axis in figures[0].axes}) == 1 and figures[0].axes[0].get_xlim()[1] > 64
    _, slow, fast = panels.values()
    assert [line.get_linestyle() for line in slow] == ["-", "--"]
    assert {line.get_color() for line in slow} == {color_of("rebased")} and fast[0].get_color() == color_of("based")
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["ReBased", "Based", "x²", "seed 0", "seed 1"]
    plot_mqar.plot_curves([{**one, "history": []} for one in runs], tmp_path / "none.png")  # known from a log alone
    assert not (tmp_path / "none.png").exists()


def test_figure_1_has_the_papers_panels_and_a_point_for_each_seed(tmp_path, figures):
    runs = [run(seed=seed, accuracy=0.1 * seed) for seed in range(5)] + [run("gamma"), run("softmax", accuracy=0.9)]
    runs += [run(length=256, stopped="deadline"), run(length=32), run(hidden=48), run(length=512, pairs=8)]
    plot_mqar.plot(cells(runs), tmp_path / "figure.png")
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    assert list(panels) == [f"length {length:,}" for length in plot_mqar.LENGTHS]
    axis = panels["length 1,024"]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["64", "128", "256", "512"]
    red = [line for line in axis.get_lines() if line.get_color() == color_of("rebased")]
    (points,) = (line for line in red if line.get_marker() == ".")
    assert list(points.get_ydata()) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    (stars,) = (line for line in red if line.get_marker() == "*")
    assert list(stars.get_ydata()) == [PUBLISHED["rebased"][1024, 64], 0.98, 0.985, 0.985]
    assert not any(line.get_marker() == "." for line in panels["length 512"].get_lines())  # that one is another task
    assert [text.get_text() for text in figures[0].legends[0].get_texts()][:2] == ["ReBased", "softmax"]


def test_no_line_passes_over_a_cell_that_is_missing(tmp_path, figures):
    plot_mqar.plot(cells([run(hidden=hidden, accuracy=0.5) for hidden in (64, 128, 512)]), tmp_path / "figure.png")
    (axis,) = (axis for axis in figures[0].axes if axis.get_title() == "length 1,024")
    (line,) = (line for line in axis.get_lines() if line.get_linewidth() == 1.8)
    assert list(line.get_ydata()) == pytest.approx([0.5, 0.5, math.nan, 0.5], nan_ok=True)


def test_sizes_that_the_paper_does_not_have_are_drawn_alone(tmp_path, figures):
    plot_mqar.plot(cells([run(length=32, hidden=48), run("x2", length=32, hidden=24)]), tmp_path / "figure.png")
    (axis,) = figures[0].axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ["24", "48"]
    assert not any(line.get_marker() == "*" for line in axis.get_lines())


def test_table_1_is_the_mean_over_its_four_hidden_sizes():
    runs = [
        run(model, 256, hidden, seed=seed, accuracy=(0.1 if model == "x2" else 0.2) + hidden / 100, pairs=32)
        for model in ("x2", "rebased")
        for hidden in (16, 24, 32, 48)
        for seed in (0, 1)
    ]
    runs += [run("based", 256, hidden, pairs=32) for hidden in (16, 24)] + [run("x2", 256, 64, pairs=64)]
    assert plot_mqar.ablation(cells(runs)).splitlines()[2:] == [
        "| 256 | x² | 0.400 | 0.260 | 0.340 | 0.420 | 0.580 | 2 | 0.54 |",
        "| 256 | ReBased | 0.500 | 0.360 | 0.440 | 0.520 | 0.680 | 2 | 0.63 |",
    ]


def test_every_model_has_its_name_its_colour_and_its_place():
    assert set(plot_mqar.ORDER) == {*MODELS, *PEERS}
    for values in zip(*(STYLES[model] for model in plot_mqar.ORDER)):
        assert len(set(values)) == len(plot_mqar.ORDER)


def test_files_are_written_from_damaged_results_too(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results = tmp_path / "r.jsonl"
    older = run(accuracy=0.1)
    lines = [json.dumps(r) for r in (older, run(), run("based", accuracy=0.3), run("x2", length=512, accuracy=0.2))]
    results.write_text("\n".join(lines) + '\n{"name": "cut')
    assert [r["accuracy"] for r in read_runs([results])] == [0.5, 0.3, 0.2]
    plot_mqar.main([str(results), "--output", str(tmp_path / "out")])
    assert "| 1,024 | 64 | ReBased | 0.500 |" in capsys.readouterr().out
    for name in ("figure_1.png", "curves.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    assert not (tmp_path / "out" / "differences.md").exists()  # one seed of each: nothing to compare
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit):
        plot_mqar.main([str(tmp_path / "empty.jsonl")])
