"""Training on MAD and ICLL: the fast loop against a plain one, the measures, and the two command lines."""

import contextlib
import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

from modeling_rebased.training import icll, mad, train_icll, train_mad
from modeling_rebased.training.fast_loop import FastTrainer
from modeling_rebased.training.recipe import Options, build_model
from modeling_rebased.training.train_icll import ICLLRun, ICLLTask
from modeling_rebased.training.train_mad import MADRun


CPU = Options(device="cpu", bf16=False, compile=False, cuda_graph=False, progress=False)
COMMON = {"model": "rebased", "lr": 3e-3, "seed": 0, "hidden": 32, "epochs": 3, "batch_size": 16, "stop_at": 2.0}
SIZES = {
    "recall": {"vocab_size": 8, "length": 16},
    "compression": {"vocab_size": 8, "length": 8},
    "selective_copying": {"vocab_size": 8, "length": 16, "copy": 3},
}
MAD = {
    task: MADRun(task=task, **sizes, **COMMON, train_examples=60, test_examples=40) for task, sizes in SIZES.items()
}
SMALL_ICLL = {"symbols": 5, "max_states": 5, "min_strings": 2, "max_strings": 4, "max_length": 6}
ICLL = ICLLRun(**SMALL_ICLL, **COMMON, layers=2, train_examples=60, test_examples=40, dropout=0.0)


def plain_losses(run, tokens: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """The mean loss of each epoch of a plain loop. A target stands at the place where it is said."""
    model = build_model(run)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=run.weight_decay)
    losses = []
    for epoch in range(run.epochs):
        total = 0.0
        for step, rows in enumerate(run.order(epoch).split(run.batch_size)):
            optimizer.param_groups[0]["lr"] = run.lr_at(epoch, step)
            logits = model(input_ids=tokens[rows].long()).logits
            counted = targets[rows] != -100
            loss = F.cross_entropy(logits[counted], targets[rows][counted].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / run.steps_per_epoch)
    return losses


def test_the_fast_loop_trains_as_a_plain_one():
    data = icll.make_examples(ICLL.spec, 60)
    for run, tokens, targets in (
        (MAD["selective_copying"], *mad.make_examples(MAD["selective_copying"].spec, 60)),
        (ICLL, data.input_ids(), data.targets()),
    ):
        history = FastTrainer(run, CPU).train(run)["history"]
        assert [entry["loss"] for entry in history] == pytest.approx(plain_losses(run, tokens, targets), rel=1e-5)
        assert history[2]["loss"] < history[0]["loss"]


def test_the_accuracy_of_mad_is_the_share_of_right_answers():
    run = MAD["recall"]
    trainer = FastTrainer(run, CPU)
    found = trainer.train(run)["accuracy"]
    right = asked = 0
    with torch.no_grad():
        for tokens, targets in zip(*mad.make_examples(run.spec, 40, split="test")):
            said = trainer.model.eval()(input_ids=tokens[None].long()).logits[0].argmax(-1)
            right += sum(int(a == b) for a, b in zip(said, targets) if b != -100)
            asked += int((targets != -100).sum())
    assert found == right / asked
    assert 0 < found < 1


def test_the_autoencoder_reads_nothing_but_the_last_state():
    run = MAD["compression"]
    model = build_model(run).eval()
    hidden = torch.randn(3, 8, 32, requires_grad=True)
    logits = model.get_output_embeddings()(hidden)
    assert logits.shape == (3, 8, 8)
    logits.square().sum().backward()
    assert not hidden.grad[:, :-1].any() and hidden.grad[:, -1].any()
    assert not torch.allclose(logits[:, 0], logits[:, 1])  # every place says a token of its own
    trainer = FastTrainer(dataclasses.replace(run, epochs=20), CPU)
    history = trainer.train(dataclasses.replace(run, epochs=20))["history"]
    assert history[-1]["accuracy"] > history[0]["accuracy"]  # it says the collecting token at least
    assert trainer.model.num_parameters() == sum(p.numel() for p in trainer.model.parameters())


class Oracle(torch.nn.Module):
    """Says a given distribution for the examples of a test."""

    def __init__(self, tokens: torch.Tensor, probabilities: torch.Tensor):
        super().__init__()
        self.known = {tuple(row.tolist()): p for row, p in zip(tokens, probabilities)}

    @property
    def base_model(self):
        return self.say

    def say(self, input_ids, use_cache):
        said = torch.stack([self.known[tuple(row.tolist())] for row in input_ids])
        return BaseModelOutput(last_hidden_state=said.clamp(min=1e-30).log())

    def get_output_embeddings(self):
        return torch.nn.Identity()


def test_the_measures_of_icll_are_right_for_models_that_know_the_answer():
    examples = icll.make_examples(ICLL.spec, 30, split="test")
    task = ICLLTask(icll.make_examples(ICLL.spec, 2), examples)
    tokens, exact, ngram = examples.input_ids(), examples.next_tokens(), icll.ngram_next_tokens(examples)
    ngram = ngram / ngram.sum(-1, keepdim=True).clamp(min=1e-9)
    best = Oracle(tokens, exact)
    chosen = task.measure(best)
    assert chosen["accuracy"] == 1.0
    said = exact.gather(2, examples.targets().long().clamp(min=0)[..., None])[15:, :, 0]
    entropy = float(-said[examples.targets()[15:] >= 0].log().mean())
    assert chosen["validation_loss"] == pytest.approx(entropy)  # of the half that is not the test
    found = task.finish(best)
    assert found["distance_to_automaton"] == pytest.approx(0, abs=1e-5)
    assert found["distance_to_3gram"] == pytest.approx(found["distance_of_3gram"], abs=1e-5)
    counting = Oracle(tokens, ngram)
    assert task.measure(counting)["accuracy"] == pytest.approx(found["accuracy_of_3gram"], abs=0.03)  # it has ties
    assert task.finish(counting)["distance_to_3gram"] < 0.02  # a few of its distributions do not sum to 1
    wrong = Oracle(tokens, torch.nn.functional.one_hot(torch.full_like(tokens, 6).long(), 7).float())
    assert task.measure(wrong)["accuracy"] == 0  # a separator is never a legal symbol
    assert task.finish(wrong)["distance_to_automaton"] == pytest.approx(2)


def test_a_run_ends_with_the_weights_of_the_lowest_validation_loss(monkeypatch):
    run = dataclasses.replace(ICLL, epochs=6)
    losses = iter([5.0, 3.0, 4.0, 3.5, 2.0, 9.0])
    measure = ICLLTask.measure

    def scripted(self, model):
        return {**measure(self, model), "validation_loss": next(losses, 0.0)}

    monkeypatch.setattr(ICLLTask, "measure", scripted)
    trainer = FastTrainer(run, CPU)
    result = trainer.train(run)
    monkeypatch.undo()
    assert (result["best_epoch"], result["epochs_trained"]) == (5, 6)
    assert result["accuracy"] == result["history"][4]["accuracy"]
    assert result["accuracy"] != result["history"][5]["accuracy"]


def test_a_stopped_run_keeps_its_best_weights(monkeypatch, tmp_path):
    losses = itertools.count(1.0)  # the first epoch stays the best
    measure = ICLLTask.measure
    monkeypatch.setattr(ICLLTask, "measure", lambda *args: {**measure(*args), "validation_loss": next(losses)})
    late = dataclasses.replace(CPU, work_dir=str(tmp_path), deadline=0.0)
    stopped = FastTrainer(ICLL, late).train(ICLL)
    assert (stopped["stopped"], stopped["epochs_trained"]) == ("deadline", 1)
    resumed = FastTrainer(ICLL, dataclasses.replace(late, deadline=None)).train(ICLL)
    assert (resumed["best_epoch"], resumed["epochs_trained"]) == (1, 3)
    for measured in ("accuracy", "distance_to_automaton"):
        assert resumed[measured] == stopped[measured]


def test_patience_ends_a_run_that_does_not_get_better():
    run = dataclasses.replace(ICLL, patience=2)
    history = [
        {"epoch": i + 1, "accuracy": 0.5, "validation_loss": loss} for i, loss in enumerate([3.0, 2.0, 2.5, 2.4])
    ]
    assert not run.is_done(history[:3]) and run.is_done(history)
    assert not dataclasses.replace(run, patience=0).is_done(history)


def test_an_epoch_may_have_fewer_batches_than_the_warm_up_has_steps(monkeypatch):
    """Memorization has two batches. On a CPU, with stand-ins for streams."""
    run = dataclasses.replace(MAD["recall"], train_examples=17)
    trainer = FastTrainer(run, CPU)
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    for name, value in {"Stream": stream, "current_stream": stream, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    trainer.order.copy_(run.order(0))
    trainer._warm_up()
    assert trainer.cursor == 1


def test_the_schedules_are_the_authors():
    run = dataclasses.replace(MAD["recall"], lr=1e-3, epochs=200)
    assert run.lr_at(0) == pytest.approx(1e-3) and run.lr_at(100) == pytest.approx(0.5 * (1e-3 + 1e-6))
    assert run.lr_at(199) == pytest.approx(1e-6, rel=0.1)
    run = ICLLRun(model="rebased", lr=5e-4, seed=0)
    assert (run.steps_per_epoch, run.epochs, run.batch_size, run.weight_decay, run.layers) == (156, 200, 32, 0.1, 4)
    assert run.lr_at(0, 0) == 1e-6
    assert run.lr_at(10, 0) == pytest.approx(1e-6 + (5e-4 - 1e-6) / 2)
    assert run.lr_at(100, 0) == pytest.approx(5e-5 + 0.5 * 4.5e-4)
    assert run.lr_at(199, 155) == pytest.approx(5e-5, rel=1e-3)
    assert run.lr_at(20, 1) < run.lr_at(20, 0)


@pytest.mark.parametrize("run", [MAD["recall"], ICLL], ids=["mad", "icll"])
def test_any_two_runs_have_different_names(run):
    changes = {"model": "based", "hidden": 64, "lr": 1.0, "seed": 7, "epochs": 7, "batch_size": 7, "head": 4}
    changes |= {"train_examples": 7, "test_examples": 7, "data_seed": 7, "weight_decay": 7.0, "dropout": 0.7}
    changes |= {"stop_at": 0.7, "layers": 6}
    own = {"patience": 7, "symbols": 7, "max_states": 7, "min_strings": 1, "max_strings": 7, "max_length": 7}
    mads = {"vocab_size": 7, "length": 18}
    changes |= own if run is ICLL else mads
    names = {dataclasses.replace(run, **{field: value}).name for field, value in changes.items()}
    assert len(names | {run.name}) == len(changes) + 1
    for field, value, other in (
        ("seed", 1_234_567, 1_234_568),
        ("data_seed", 1_234_567, 1_234_568),
        ("lr", 1e-3, 1.0000001e-3),
    ):
        assert dataclasses.replace(run, **{field: value}).name != dataclasses.replace(run, **{field: other}).name
    left = {field.name for field in dataclasses.fields(run)} - set(changes)
    assert left <= {"task", "noise", "noise_vocab_size", "copy"}


def test_the_names_of_mad_tell_tasks_apart():
    names = {run.name for run in MAD.values()}
    noisy = MADRun(
        task="noisy_recall", vocab_size=16, length=16, noise_vocab_size=8, noise=0.2, **COMMON, train_examples=9
    )
    names |= {
        noisy.name,
        dataclasses.replace(noisy, noise=0.4).name,
        dataclasses.replace(noisy, noise_vocab_size=7).name,
    }
    names.add(dataclasses.replace(MAD["selective_copying"], copy=2).name)
    assert len(names) == 7


@pytest.mark.parametrize("model", ["rebased", "based", "softmax", "hybrid"])
def test_each_model_is_what_its_name_says(model):
    config = build_model(dataclasses.replace(MAD["recall"], model=model)).config
    mixer = {"softmax": "full_attention", "hybrid": "hybrid_sliding"}.get(model, "linear_attention")
    assert config.layer_types == ["conv", mixer] and config.mlp_type == "swiglu"
    assert config.coefficients == ((1.0, 1.0, 0.5) if model == "based" else (0.0, 0.0, 1.0))
    assert (config.num_attention_heads, config.feature_dim, config.head_dim) == (4, 8, 8)
    if model == "hybrid":
        assert config.sliding_window == 16
    layers = build_model(dataclasses.replace(ICLL, model=model, layers=4)).config.layer_types
    assert layers == ["conv", mixer] * 2


def test_mad_trains_all_tasks_with_one_command_and_goes_on(tmp_path, capsys):
    argv = ["--epochs", "1", "--train-examples", "16", "--test-examples", "8", "--batch-size", "8", "--hidden", "16"]
    argv += ["--lrs", "1e-3", "--weight-decays", "0", "--device", "cpu", "--no-progress"]
    argv += ["--output", str(tmp_path / "mad.jsonl")]
    train_mad.main(argv)
    lines = [json.loads(line) for line in (tmp_path / "mad.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == list(mad.TASKS)
    assert all(0 <= line["accuracy"] <= 1 and line["epochs_trained"] == 1 for line in lines)
    train_mad.main(argv)
    assert "0 runs trained" in capsys.readouterr().out


def test_the_variations_of_mad_are_the_authors(tmp_path):
    argv = ["--vary", "--lrs", "5e-4", "--weight-decays", "0.1", "--output", str(tmp_path / "r"), "--device", "cpu"]
    runs = train_mad.parse(argv)[0]
    assert len({run.name for run in runs}) == len(runs)
    count = {task: sum(run.task == task for run in runs) for task in mad.TASKS}
    assert count == {
        "recall": 11,
        "fuzzy_recall": 11,
        "noisy_recall": 14,
        "selective_copying": 13,
        "compression": 11,
        "memorization": 6,
    }
    assert {run.train_examples for run in runs if run.task == "memorization"} == {256}
    assert {run.train_examples for run in runs if run.task == "recall"} == {12800, 6400, 3200, 1600, 800}


def test_the_recipes_are_the_authors(tmp_path, capsys):
    output = ["--device", "cpu", "--output", str(tmp_path / "r")]
    runs = train_mad.parse(output)[0]
    assert "This needs a GPU" in capsys.readouterr().err
    assert len(runs) == 6 * 3 * 2
    assert {(run.hidden, run.epochs, run.batch_size, run.test_examples, run.layers) for run in runs} == {
        (128, 200, 128, 1280, 2)
    }
    assert {(run.lr, run.weight_decay) for run in runs} == {(lr, wd) for lr in (1e-4, 5e-4, 1e-3) for wd in (0.0, 0.1)}
    runs = train_icll.parse(output)[0]
    assert [(run.lr, run.weight_decay, run.train_examples, run.test_examples) for run in runs] == [
        (2.5e-4, 0.1, 5000, 500),
        (5e-4, 0.1, 5000, 500),
    ]


@pytest.mark.parametrize("command", [train_mad, train_icll])
def test_the_laptop_presets_are_small(command, tmp_path, capsys):
    runs = command.parse(["--preset", "laptop", "--device", "cpu", "--output", str(tmp_path / "r")])[0]
    assert len(runs) == 1 and runs[0].hidden == 64
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "argv", "words"),
    [
        (
            train_mad,
            ["--models", "rwkv"],
            "--models: rwkv is not one of rebased, based, softmax, hybrid,",
        ),
        (train_mad, ["--tasks", "recall,chess"], "--tasks: chess is not one of recall,"),
        (train_mad, ["--head", "7"], "--head 7 does not divide --hidden 128"),
        (train_mad, ["--hidden", "2", "--head", "1"], "--hidden must be even and at least 4 for the decoder"),
        (train_mad, ["--length", "9"], "recall: length must be even, got 9"),
        (train_mad, ["--save", "models"], "--save: the autoencoder of compression is no language model"),
        (train_mad, ["--vary", "--length", "64"], "--vary: the variations have sizes of their own"),
        (train_mad, ["--batch-size", "512"], "--batch-size 512 is larger than --train-examples 256"),
        (train_icll, ["--layers", "3"], "--layers must be even, got 3"),
        (train_icll, ["--take-turns"], "--take-turns is for --jobs above 1"),
        (train_icll, ["--patience", "-1"], "--patience: must be an integer of at least 0, got '-1'"),
        (train_icll, ["--symbols", "3"], "symbols must be 4 to 64, got 3"),
        (train_icll, ["--test-examples", "1"], "--test-examples must be at least 2"),
        (train_icll, ["--weight-decays", "-1"], "--weight-decays: must be"),
    ],
)
def test_wrong_arguments_are_named(command, argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.parse([*argv, "--device", "cpu"])
    assert words in capsys.readouterr().err


@pytest.mark.gpu
def test_graph_and_compiled_code_train_as_eager_code_does():
    for run in (MAD["recall"], MAD["compression"], ICLL):
        run = dataclasses.replace(run, hidden=64, head=8)
        losses = {}
        for name, options in {
            "eager": Options(compile=False, cuda_graph=False, bf16=False, progress=False),
            "graph": Options(compile=False, bf16=False, progress=False),
            "fast": Options(progress=False),
        }.items():
            losses[name] = [entry["loss"] for entry in FastTrainer(run, options).train(run)["history"]]
        assert losses["graph"] == pytest.approx(losses["eager"], rel=1e-4)
        assert losses["fast"] == pytest.approx(losses["eager"], rel=2e-2)
