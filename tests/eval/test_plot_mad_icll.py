"""The pictures and tables of MAD and ICLL: which runs count, and that the files come out."""

import json

import pytest

from modeling_rebased.eval import plot_icll, plot_mad


SIZES = {"vocab_size": 16, "length": 128, "noise": 0.0, "copy": 0, "train_examples": 12800, "hidden": 128}


def run(model="rebased", task="recall", accuracy=0.5, lr=5e-4, weight_decay=0.1, seed=0, **extra):
    sizes = {**SIZES, **extra}
    name = f"{model}-{task}-{lr}-{weight_decay}-{seed}-{sizes}"
    fields = {"name": name, "model": model, "task": task, "accuracy": accuracy, "epochs_trained": 200}
    return {**fields, "lr": lr, "weight_decay": weight_decay, "seed": seed, **sizes}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]


def test_the_best_rate_of_each_setting_counts():
    runs = [run(lr=1e-4, accuracy=0.4), run(lr=1e-3, accuracy=0.8), run(lr=1e-3, weight_decay=0.0, accuracy=0.7)]
    runs += [run(lr=1e-3, length=256, accuracy=0.2), run(lr=1e-4, length=256, accuracy=0.6)]
    assert plot_mad.scores(runs) == {"recall": {"rebased": [0.8, 0.6]}}
    two_seeds = [run(seed=seed, accuracy=0.5) for seed in (0, 1)]  # a single lucky seed does not win over them
    assert plot_mad.scores([*two_seeds, run(lr=1e-3, accuracy=0.9)]) == {"recall": {"rebased": [0.5]}}


def test_models_are_compared_where_both_have_a_run():
    runs = [run(accuracy=0.8), run(length=256, accuracy=0.2), run("softmax", accuracy=0.9)]
    runs += [run(task="compression", accuracy=0.4), run("softmax", length=512, accuracy=0.1, stopped="deadline")]
    assert plot_mad.scores(runs) == {
        "recall": {"rebased": [0.8], "softmax": [0.9]},
        "compression": {"rebased": [0.4]},
    }
    assert cells(plot_mad.markdown(runs)) == [
        ["task", "settings", "ReBased", "softmax"],
        ["---", "--:", "--:", "--:"],
        ["recall", "1", "0.800", "0.900"],
        ["compression", "1", "0.400", ""],
        ["mean of tasks", "", "0.600", ""],
    ]


def icll_run(model="rebased", hidden=128, accuracy=0.9, lr=5e-4, seed=0):
    measures = {"distance_to_automaton": 0.5, "distance_to_3gram": 0.4, "accuracy_of_3gram": 0.93}
    fields = {"name": f"{model}-{hidden}-{lr}-{seed}", "model": model, "hidden": hidden, "train_examples": 5000}
    fields |= {"lr": lr, "weight_decay": 0.1, "seed": seed, "accuracy": accuracy, "epochs_trained": 200}
    return {**fields, **measures, "distance_of_3gram": 0.53}


def test_the_table_of_icll_has_the_3gram_model_first():
    runs = [icll_run(accuracy=0.8, lr=2.5e-4), icll_run(), icll_run("softmax", accuracy=0.95)]
    assert cells(plot_icll.markdown(runs))[2:] == [
        ["", "", "3-gram", "", "", "0.930", "0.530", "0.000"],
        ["5,000", "128", "ReBased", "1", "0.0005", "0.900", "0.500", "0.400"],
        ["5,000", "128", "softmax", "1", "0.0005", "0.950", "0.500", "0.400"],
    ]


@pytest.mark.parametrize(("field", "values"), [("layers", (2, 4)), ("batch_size", (128, 64)), ("max_states", (12, 6))])
def test_runs_of_different_recipes_are_refused(tmp_path, capsys, field, values):
    make, plot = (icll_run, plot_icll.main) if field == "max_states" else (run, plot_mad.main)
    runs = [{**make(seed=seed), field: value} for seed, value in enumerate(values)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, runs)))
    with pytest.raises(SystemExit):
        plot([str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "out")])
    assert f"different {field}: {values[0]}, {values[1]}." in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_pictures_are_drawn(tmp_path, figures, capsys):
    runs = [run(model, task) for model in ("rebased", "softmax") for task in ("recall", "memorization")]
    (tmp_path / "mad.jsonl").write_text("\n".join(map(json.dumps, runs)))
    plot_mad.main([str(tmp_path / "mad.jsonl"), "--output", str(tmp_path / "out")])
    runs = [
        icll_run(model, hidden, seed=seed) for model in ("based", "mamba2") for hidden in (64, 128) for seed in (0, 1)
    ]
    (tmp_path / "icll.jsonl").write_text("\n".join(map(json.dumps, runs)))
    plot_icll.main([str(tmp_path / "icll.jsonl"), "--output", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mad.md", "mad.png", "icll.md", "icll.png"}
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["Based", "Mamba-2", "3-gram model"]
    (tmp_path / "none.jsonl").write_text("")
    for command in (plot_mad, plot_icll):
        with pytest.raises(SystemExit):
            command.main([str(tmp_path / "none.jsonl")])
        assert "no finished run in" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            command.main([str(tmp_path / "missing.jsonl")])
        assert "missing.jsonl" in capsys.readouterr().err
