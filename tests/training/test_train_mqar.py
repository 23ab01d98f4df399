"""MQAR training: the fast loop against the Trainer, resuming, sweeping, and what is written."""

import dataclasses
import itertools
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch

from modeling_rebased.eval.tasks import tasks_path
from modeling_rebased.training import (
    fast_loop,
    mqar,
    mqar_checkpoint,
    mqar_speed,
    sweep_arguments,
    train_icll,
    train_mad,
    train_mqar,
)
from modeling_rebased.training import sweep as sweep_module
from modeling_rebased.training.arguments import with_dashes
from modeling_rebased.training.fast_loop import FastTrainer
from modeling_rebased.training.mqar_checkpoint import TASKS
from modeling_rebased.training.mqar_runs import MODELS, Run
from modeling_rebased.training.recipe import Options, build_model
from modeling_rebased.training.run_results import append_result, read_results
from modeling_rebased.training.sweep import sweep
from tests.processes import forking
from tests.training.plain_mqar import train_plain


TINY = Run(
    model="rebased",
    hidden=24,
    length=32,
    pairs=4,
    lr=1e-2,
    seed=0,
    epochs=3,
    batch_size=16,
    train_examples=90,  # five whole batches and a rest
    test_examples=24,
    vocab_size=64,
    dropout=0.0,
    stop_at=2.0,
)
CPU = Options(device="cpu", bf16=False, compile=False, cuda_graph=False, progress=False)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("model", ["rebased", "based", "softmax"])
def test_the_fast_loop_trains_as_the_trainer_does(model, tmp_path):
    """Same batches in the same order, same losses, same accuracies, same weights at the end, in float32."""
    run = dataclasses.replace(TINY, model=model)
    plain, plain_model = train_plain(run, tmp_path)
    trainer = FastTrainer(run, CPU)
    fast = trainer.train(run)
    assert len(fast["history"]) == len(plain) == 3
    for ours, theirs in zip(fast["history"], plain):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["accuracy"] == theirs["accuracy"]
    start = weights(build_model(run))
    moved = (weights(plain_model) - start).norm()
    assert (weights(trainer.model) - weights(plain_model)).norm() < 1e-3 * moved
    assert fast["history"][2]["loss"] < fast["history"][0]["loss"] - 0.1  # it does learn something


def test_a_run_does_not_depend_on_the_one_before():
    first, second = TINY, dataclasses.replace(TINY, lr=3e-3, seed=1)
    trainer = FastTrainer(first, CPU)
    trainer.train(first)
    after = trainer.train(second)
    alone = FastTrainer(second, CPU).train(second)
    assert [e["loss"] for e in after["history"]] == [e["loss"] for e in alone["history"]]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, dropout):
    run = dataclasses.replace(TINY, dropout=dropout)
    whole = FastTrainer(run, CPU).train(run)
    late = dataclasses.replace(CPU, work_dir=str(tmp_path), deadline=time.time() - 1)
    stopped = FastTrainer(run, late).train(run)
    assert (stopped["stopped"], stopped["epochs_trained"]) == ("deadline", 1)
    trainer = FastTrainer(run, dataclasses.replace(late, deadline=None))
    resumed = trainer.train(run)
    assert [e["loss"] for e in resumed["history"]] == [e["loss"] for e in whole["history"]]
    assert [e["epoch"] for e in resumed["history"]] == [1, 2, 3]
    assert not list(tmp_path.iterdir())  # a finished run leaves nothing behind


def test_a_sweep_skips_what_is_done_and_takes_up_what_is_not(tmp_path):
    output = tmp_path / "results.jsonl"
    runs = [dataclasses.replace(TINY, epochs=1, lr=lr) for lr in (1e-3, 1e-2)]
    assert len(sweep([runs[0], runs[0]], CPU, str(output))) == 1  # given twice, trained once
    with output.open("a") as file:
        file.write('{"name": "cut off by a ki')
    trained = sweep(runs, CPU, str(output))
    assert [result["name"] for result in trained] == [runs[1].name]
    assert sorted(result["name"] for result in read_results(output)) == sorted(run.name for run in runs)
    # a run that met its deadline is not done
    append_result(output, {"name": "other", "stopped": "deadline"})
    # and the time of a step, which may stand in the same file, is no result
    append_result(output, {"name": runs[0].name, "step_seconds": 1.0})
    assert sweep(runs, CPU, str(output)) == []
    append_result(output.with_name("times.jsonl"), {"name": runs[0].name, "step_seconds": 1.0})
    assert len(sweep(runs[:1], CPU, str(output.with_name("times.jsonl")))) == 1


def test_a_sweep_in_other_processes_gives_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "get_context", lambda method: forking)  # new interpreters would take longer
    runs = [dataclasses.replace(TINY, epochs=1, model=model) for model in ("rebased", "based")]
    options = dataclasses.replace(CPU, take_turns=True)
    here = sweep(runs, options, str(tmp_path / "a.jsonl"))
    there = sweep(runs, options, str(tmp_path / "b.jsonl"), jobs=2)
    losses = [{r["name"]: r["history"][0]["loss"] for r in results} for results in (here, there)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("race_epoch", [None, 1])
def test_launched_processes_share_the_runs(tmp_path, monkeypatch, race_epoch):
    """As under accelerate launch: each process trains its part, and a race stays with one of them."""
    runs = [dataclasses.replace(TINY, hidden=hidden, lr=lr) for hidden in (24, 48) for lr in (1e-2, 1e-3, 1e-4)]
    trained = []
    monkeypatch.setattr(sweep_module, "run_group", lambda runs, *_: trained.append(runs) or [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        sweep(runs, Options(device="cpu", progress=False, race_epoch=race_epoch), str(tmp_path / "results.jsonl"))
        parts.append([run for group in trained for run in group])
        trained.clear()
    assert parts == ([runs[::2], runs[1::2]] if race_epoch is None else [runs[:3], runs[3:]])


def test_a_process_trains_in_its_turn_only(tmp_path, monkeypatch):
    events = []

    class Turn:
        def __enter__(self):
            events.append("begins")

        def __exit__(self, *exc):
            events.append("is over")

    train = FastTrainer.train
    monkeypatch.setattr(FastTrainer, "train", lambda *args, **kw: (events.append("trains"), train(*args, **kw))[1])
    monkeypatch.setattr(sweep_module, "_turn", None)  # put back after the test
    sweep_module._share_turn(Turn())
    sweep_module.run_group([dataclasses.replace(TINY, epochs=1)], CPU, str(tmp_path / "r.jsonl"), None)
    assert events == ["begins", "trains", "is over"]


def test_a_race_goes_on_with_the_best_rate_only(tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    runs = [dataclasses.replace(TINY, seed=seed, lr=lr) for seed in (0, 1) for lr in (1e-5, 1e-2)]
    options = dataclasses.replace(CPU, race_epoch=1, work_dir=str(tmp_path / "work"))
    trained = sweep(runs, options, str(output))
    assert [result["name"] for result in trained] == [runs[1].name, runs[3].name]
    lines = {result["name"]: result for result in read_results(output)}
    assert (lines[runs[0].name]["stopped"], lines[runs[0].name]["epochs_trained"]) == ("epoch 1", 1)
    assert runs[2].name not in lines
    # the same race again has nothing to do, and one that was cut off goes on with the rate that had won
    capsys.readouterr()
    assert sweep(runs, options, str(output)) == []
    said = "".join(capsys.readouterr())
    assert "2 of 4 runs are finished" in said and "2 of 4 runs have a rate that lost the race to epoch 1" in said
    cut_off = tmp_path / "cut-off.jsonl"
    for name in (runs[0].name, runs[1].name):
        append_result(cut_off, lines[name])
    assert [result["name"] for result in sweep(runs, options, str(cut_off))] == [runs[3].name]
    # without a race, a run that was given up goes on
    (finished,) = sweep(runs[:2], dataclasses.replace(options, race_epoch=None), str(output))
    assert (finished["name"], finished["epochs_trained"]) == (runs[0].name, 3) and "stopped" not in finished
    # the winner is the run it would have been without the race
    alone = FastTrainer(runs[1], CPU).train(runs[1])
    assert [e["loss"] for e in trained[0]["history"]] == [e["loss"] for e in alone["history"]]


def test_a_race_cut_off_by_the_deadline_records_every_run(tmp_path):
    output = tmp_path / "results.jsonl"
    runs = [dataclasses.replace(TINY, lr=lr) for lr in (1e-5, 1e-2)]
    late = dataclasses.replace(CPU, race_epoch=2, work_dir=str(tmp_path / "work"), deadline=time.time() - 1)
    sweep_module.run_group(runs, late, str(output), None)
    lines = read_results(output)
    assert sorted(line["name"] for line in lines) == sorted(run.name for run in runs)
    assert {line["stopped"] for line in lines} == {"deadline"}
    finished = sweep(runs, dataclasses.replace(late, deadline=None), str(output))
    assert [result["name"] for result in finished] == [runs[1].name]
    assert finished[0]["epochs_trained"] == 3


def test_a_run_ends_at_the_accuracy_asked_for():
    run = dataclasses.replace(TINY, stop_at=0.0)
    assert FastTrainer(run, CPU).train(run)["epochs_trained"] == 1


def test_the_recipe_is_the_papers():
    run = Run(model="rebased", hidden=64, length=512, pairs=128, lr=3e-3, seed=0)
    assert (run.epochs, run.batch_size, run.train_examples, run.test_examples) == (64, 512, 100_000, 3_000)
    assert (run.weight_decay, run.dropout, run.stop_at, run.steps_per_epoch) == (0.1, 0.1, 0.99, 195)
    assert run.lr_at(0) == 3e-3
    assert run.lr_at(32) == pytest.approx(1.5e-3)
    assert run.lr_at(63) == pytest.approx(3e-3 * 0.5 * (1 + math.cos(math.pi * 63 / 64)))
    order = run.order(5)
    assert order.unique().numel() == order.numel() == 195 * 512
    assert not torch.equal(order, run.order(6))


@pytest.mark.parametrize(
    ("model", "parameters"),
    # embeddings, positions, convolution layer, mixer, norms: of hidden size 64 and length 128
    [
        (
            "rebased",
            8192 * 64 + 128 * 64 + (64 * 64 + 64 + 3 * 64 + 64) + (2 * 64 * 192 + 2 * 64 * 60) + 10 * 64 + 4 * 192,
        )
    ],
)
def test_the_model_is_the_papers(model, parameters):
    run = Run(model=model, hidden=64, length=128, pairs=16, lr=1e-3, seed=0)
    built = build_model(run)
    assert sum(p.numel() for p in built.parameters()) == parameters
    attention = built.model.layers[1].self_attn
    assert attention.v_proj.weight.shape == (60, 64) and attention.q_proj.weight.shape == (192, 64)
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert built.model.embed_tokens.padding_idx is None


@pytest.mark.parametrize("model", MODELS)
def test_each_model_is_another_one(model):
    """The ablation's flags reach the model: its output differs from every other model's with the same weights."""
    run = dataclasses.replace(TINY, model=model)
    config = run.config()
    flags = {
        "rebased": (0.0, 0.0, 1.0, True, True, True),
        "based": (1.0, 1.0, 0.5, False, False, False),
        "x2": (0.0, 0.0, 1.0, False, False, False),
        "normalized": (0.0, 0.0, 1.0, False, False, True),
        "gamma": (0.0, 0.0, 1.0, True, False, False),
        "gamma_beta": (0.0, 0.0, 1.0, True, True, False),
    }
    assert config.qk_norm_scope == ("head" if model == "rebased_head_norm" else "all_heads")
    flags |= dict.fromkeys(("rebased_head_norm", "rebased_floor"), flags["rebased"])
    if model == "softmax":
        assert config.layer_types == ["conv", "full_attention"]
    else:
        kernel, _, heads = model.removesuffix("_heads").partition("_") if model.endswith("_heads") else (model, "", 12)
        assert (*config.coefficients, config.use_gamma, config.use_beta, config.normalize) == flags[kernel]
        assert config.num_attention_heads == int(heads)
        # however many heads: the paper's projections
        assert config.num_attention_heads * config.feature_dim == 12 * 16
        assert config.num_attention_heads * config.head_dim == run.hidden // 12 * 12
    names = {name.split(".")[-1] for name, _ in build_model(run).model.layers[1].self_attn.named_parameters()}
    assert "weight" in names


def test_the_floor_subtracts_a_share_of_the_mean_value():
    """Against the sum over keys, in float64. At its start, 0, it is ReBased."""
    run = dataclasses.replace(TINY, model="rebased_floor")
    model, plain = build_model(run).double().eval(), build_model(TINY).double().eval()
    ids = mqar.make_examples(run.spec, 2).input_ids()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    attention = model.model.layers[1].self_attn
    attention.floor.data.uniform_(0.5, 2)
    x = torch.randn(1, 9, 24, dtype=torch.double)
    q = attention.q_norm(attention.q_proj(x)).view(9, 12, 16)
    k = attention.k_norm(attention.k_proj(x)).view(9, 12, 16)
    v, expected = attention.v_proj(x).view(9, 12, 2), torch.zeros(9, 12, 2, dtype=torch.double)
    for i, h in itertools.product(range(9), range(12)):
        weights = torch.stack([(q[i, h] @ k[j, h]) ** 2 for j in range(i + 1)])
        weights = weights / weights.sum() - attention.floor[h] / (i + 1)
        expected[i, h] = weights @ v[: i + 1, h]
    torch.testing.assert_close(attention(x)[0], attention.o_proj(expected.view(1, 9, 24)))


def test_a_saved_model_is_a_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = dataclasses.replace(TINY, epochs=1)
    sweep([run], CPU, str(tmp_path / "r.jsonl"), save=str(tmp_path / "models"))
    folder = tmp_path / "models" / run.name
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_rebased.ReBasedForCausalLM"
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = mqar.to_text(mqar.make_examples(run.spec, 1).input_ids()[0].tolist())
    assert model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.shape == (1, 32, 64)
    files = {path.name for path in folder.iterdir()}
    assert {"modeling_rebased.py", "configuration_rebased.py", "eager_rebased.py", "model.safetensors"} <= files


def test_the_card_of_a_saved_model(tmp_path):
    run = dataclasses.replace(TINY, epochs=1)
    sweep([run], CPU, str(tmp_path / "r.jsonl"), save=str(tmp_path / "models"))
    folder = tmp_path / "models" / run.name
    card = (folder / "README.md").read_text()
    for words in (
        "license",
        "apache",
    ):
        assert words not in card, words
    for words in (
        f'AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)',
        'tokenizer("1 32 2 33 1"',
        f"pretrained={folder},trust_remote_code=True",
        """--tasks mqar_128_16 --metadata '{"length": 32, "num_pairs": 4, "vocab_size": 64}'""",
        "| seed | 0 |",
        "of the queries of 24 test sequences",
    ):
        assert words in card, words
    assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "left"


def test_a_card_names_tasks_that_there_are():
    tasks = {path.stem for path in Path(tasks_path()).glob("mqar_*.yaml")}
    assert {f"mqar_{length}_{pairs}" for length, pairs in TASKS} == {name for name in tasks if name[-1].isdigit()}


def test_a_finished_sweep_says_so(tmp_path, capsys):
    arguments = ["--hidden", "24", "--lengths", "32", "--pairs", "4", "--lrs", "1e-2", "--epochs", "1"]
    arguments += ["--batch-size", "16", "--train-examples", "32", "--test-examples", "8", "--device", "cpu"]
    arguments += ["--no-progress", "--output", str(tmp_path / "r.jsonl")]
    train_mqar.main(arguments)
    capsys.readouterr()
    train_mqar.main([*arguments, "--save", str(tmp_path / "models")])
    said = capsys.readouterr()
    assert (
        "1 of 1 runs are finished and in" in said.out + said.err and "--save has no model of it" in said.out + said.err
    )


def test_floor_counts_a_layer_by_hand():
    run = dataclasses.replace(TINY, batch_size=1)
    floor = mqar_speed.floor_seconds(run, bandwidth=1.0, rate=1.0)
    inner = 24  # 12 heads of 2
    token = 2 * 24 * 24 + 2 * 24 * 384 + 4 * 24 * inner + 12 * 4 * 136 * 3
    assert floor["operations"] == 3 * (32 * token + 4 * 2 * 24 * 64)
    assert floor["bytes"] == 10 * 32 * (5 * 24 + 384 + 2 * inner)


def test_the_laptop_preset_is_a_default_that_arguments_change(tmp_path, capsys, monkeypatch):
    output = ["--output", str(tmp_path / "r.jsonl"), "--device", "cpu"]
    (run,), _, _ = train_mqar.parse(["--preset", "laptop", *output])
    assert (run.length, run.pairs, run.vocab_size, run.lr, run.batch_size, run.stop_at) == (32, 4, 128, 1e-2, 64, 0.99)
    assert capsys.readouterr().err == ""
    assert train_mqar.parse(["--preset", "laptop", "--lrs", "1e-3", *output])[0][0].lr == 1e-3
    train_mqar.parse(output)
    assert "This needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        train_mqar.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "of the data (default: 0)" in said and "rates (default: 0.0005,0.001,0.003,0.01)" in said
    monkeypatch.setattr(sweep_arguments, "triton_unavailable_reason", lambda *given: "no GPU")
    with pytest.raises(SystemExit, match="2"):
        train_mqar.parse(["--kernel-backend", "triton", *output])
    assert "--kernel-backend triton cannot run on --device cpu: no GPU" in capsys.readouterr().err
    for wrong, message in (("--pres laptop", "unrecognized arguments: --pres"), ("--race 64", "--race is 64")):
        with pytest.raises(SystemExit, match="2"):
            train_mqar.parse([*wrong.split(), *output])
        assert message in capsys.readouterr().err


def test_options_are_written_with_dashes_or_underscores(tmp_path, capsys):
    for name in ("--batch-size", "--batch_size"):
        (run,), _, _ = train_mqar.parse(
            [name, "16", "--lrs=1e-3", "--output", str(tmp_path / "a_b.jsonl"), "--device=cpu"]
        )
        assert run.batch_size == 16
    assert with_dashes(["--a_b=c_d", "e_f", "-g_h"]) == ["--a-b=c_d", "e_f", "-g_h"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_mqar.parse(["--help"])
    assert "examples per step (default: 512)" in capsys.readouterr().out


def test_wrong_arguments_are_named(capsys):
    for argv, words in (
        (["--models", "rebased,mamba"], "mamba"),
        (
            ["--models", "rebased_floor", "--save", "x"],
            "--save: only models of this package can be saved, not rebased_",
        ),
        (["--lengths", "300"], "300"),
        (["--lengths", "33", "--pairs", "2"], "length must be even and positive and num_pairs positive, got 33"),
        (["--lengths", "32", "--pairs", "9"], "at most 8 pairs"),
        (["--pairs", "0"], "--pairs: must be an integer of at least 1, got '0'"),
        (["--epochs", "0"], "--epochs: must be an integer of at least 1, got '0'"),
        (["--test-examples", "0"], "--test-examples: must be an integer of at least 1, got '0'"),
        (["--batch-size", "no"], "--batch-size: must be an integer of at least 1, got 'no'"),
        (["--lrs", "1e-3,nan"], "--lrs: must be a positive number, got 'nan'"),
        (["--max-seconds", "-5"], "--max-seconds: must be a positive number, got '-5'"),
        (["--stop-at", "nan"], "--stop-at: must be a number of at least 0, got 'nan'"),
        (["--dropout", "2"], "--dropout: must be at least 0 and less than 1, got '2'"),
        (["--hidden", "64,8"], "--hidden must be at least 12, since the models have 12 heads, got 8"),
        (["--time-steps", "--device", "cpu"], "--time-steps needs a GPU, --device is cpu"),
        (["--device", "gpu"], "--device: must be cpu"),
        (["--batch-size", "9", "--train-examples", "5"], "--batch-size 9"),
    ):
        with pytest.raises(SystemExit):
            train_mqar.parse(argv)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--output", "--save", "--save-weights", "--work-dir"])
def test_what_cannot_be_written_is_told_before_training(tmp_path, capsys, argument):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        train_mqar.parse(["--output", str(tmp_path / "r.jsonl"), argument, str(tmp_path / "file" / "x")])
    assert f"{argument}: cannot write into {tmp_path / 'file'}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_mqar.parse(["--output", str(tmp_path)])
    assert "--output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_of_other_data_is_another_run(tmp_path):
    """Else a sweep with another --data-seed, --test-examples or --stop-at would be skipped as done."""
    recipe = Run(model="rebased", hidden=64, length=512, pairs=128, lr=3e-3, seed=0)
    assert recipe.name == "rebased-h64-l512-p128-lr0.003-s0-e64-b512-n100000-d0.1"  # as in published results
    changes = {"data_seed": 1, "test_examples": 100, "stop_at": 0.999, "vocab_size": 64, "weight_decay": 0.0}
    names = {dataclasses.replace(recipe, **{field: value}).name for field, value in changes.items()}
    assert len(names | {recipe.name}) == 6


def test_a_model_is_written_before_its_run_counts_as_done(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(mqar_checkpoint, "save_model", fails)
    with pytest.raises(OSError, match="no space"):
        sweep([dataclasses.replace(TINY, epochs=1)], CPU, str(tmp_path / "r.jsonl"), save=str(tmp_path / "models"))
    assert read_results(tmp_path / "r.jsonl") == []


def test_results_are_json_lines(tmp_path):
    append_result(tmp_path / "a" / "r.jsonl", {"name": "x"})
    append_result(tmp_path / "a" / "r.jsonl", {"name": "y"})
    assert [json.loads(line) for line in (tmp_path / "a" / "r.jsonl").read_text().splitlines()] == [
        {"name": "x"},
        {"name": "y"},
    ]


@pytest.mark.parametrize("train", [train_mqar, train_mad, train_icll])
def test_a_result_computed_in_another_way_is_not_taken_for_one_that_is_asked_for(tmp_path, capsys, train):
    argv = ["--preset", "laptop", "--output", str(tmp_path / "r.jsonl")]
    name = train.parse(argv)[0][0].name
    (tmp_path / "r.jsonl").write_text(json.dumps({"name": name, "bf16": True, "deterministic": False, "history": []}))
    train.parse(argv)
    for option in ("--fp32", "--deterministic"):
        with pytest.raises(SystemExit):
            train.parse([*argv, option])
        assert f"{option} is given, but {tmp_path}/r.jsonl holds a result of {name} without" in capsys.readouterr().err
    (tmp_path / "r.jsonl").write_text(json.dumps({"name": name, "bf16": False, "deterministic": True, "history": []}))
    assert train.parse([*argv, "--fp32", "--deterministic"])[1].deterministic


@pytest.fixture
def undo_deterministic(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    with inductor.patch({"deterministic": False} if hasattr(inductor, "deterministic") else {}):
        yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_training_repeats_to_the_bit(tmp_path, undo_deterministic):
    run = dataclasses.replace(TINY, dropout=0.1)
    options = dataclasses.replace(CPU, deterministic=True)
    losses = []
    for name in ("a", "b"):
        (result,) = sweep([run], options, str(tmp_path / name))
        assert result["deterministic"] and torch.are_deterministic_algorithms_enabled()
        losses.append([entry["loss"] for entry in result["history"]])
    assert losses[0] == losses[1]
    argv = ["--device", "cpu", "--output", str(tmp_path / "c")]
    assert (
        train_mqar.parse([*argv, "--deterministic"])[1].deterministic and not train_mqar.parse(argv)[1].deterministic
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_deterministic_code_of_the_embedding_has_no_atomics(undo_deterministic):
    """What torch.compile writes for the gradient of an embedding, the one sum of a step whose order is open."""
    from torch._inductor.utils import run_and_get_code

    torch.set_num_threads(2)  # one thread needs no atomics
    ids = torch.randint(0, 64, (8, 1024))

    def code() -> str:
        torch._dynamo.reset()
        embedding = torch.nn.Embedding(64, 24)
        compiled = torch.compile(lambda ids: embedding(ids).square())
        _, parts = run_and_get_code(lambda: compiled(ids).sum().backward())
        return "\n".join(parts)

    assert "atomic_add" in code()
    fast_loop.use_deterministic_algorithms()
    assert "atomic_add" not in code()


@pytest.mark.gpu
def test_graph_and_compiled_code_train_as_eager_code_does():
    """On a GPU: the CUDA graph replays what the plain calls do, and fused loss and bf16 stay near fp32."""
    run = dataclasses.replace(
        TINY, hidden=64, length=128, pairs=16, batch_size=32, train_examples=320, vocab_size=8192
    )
    losses = {}
    for name, options in {
        "eager": Options(compile=False, cuda_graph=False, bf16=False, progress=False),
        "graph": Options(compile=False, cuda_graph=True, bf16=False, progress=False),
        "fast": Options(progress=False),
    }.items():
        losses[name] = [entry["loss"] for entry in FastTrainer(run, options).train(run)["history"]]
    assert losses["graph"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["fast"] == pytest.approx(losses["eager"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "length"), [(64, 1024), (64, 512), (128, 256)])
@pytest.mark.parametrize("model", ["rebased", "based"])
def test_kernels_at_mqars_shapes(model, hidden, length):
    """The GPU kernels in bf16 against float64 at the odd head sizes of MQAR (5, 10): output and gradients."""
    from modeling_rebased import rebased_attention

    coefficients = (0.0, 0.0, 1.0) if model == "rebased" else (1.0, 1.0, 0.5)
    torch.manual_seed(0)
    shapes = ((8, length, 12, 16), (8, length, 12, 16), (8, length, 12, hidden // 12), (8, length, 12, hidden // 12))
    q, k, v, gradient = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    results = []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float64, "eager")):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        output, _ = rebased_attention(*inputs, coefficients=coefficients, backend=backend)
        output.backward(gradient.to(dtype))
        results.append([output.detach(), *(x.grad for x in inputs)])
    # The first queries see a handful of keys: where their sum of weights is nearly 0, bf16 inputs say little.
    for fast, exact in zip(*results):
        fast, exact = fast[:, 64:].double(), exact[:, 64:]
        assert ((fast - exact).norm() / exact.norm()).item() < 2e-2
