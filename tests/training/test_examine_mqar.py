"""Weights that are saved after each epoch, and what is measured of them."""

import dataclasses
import json

import pytest
import torch

from modeling_rebased.training import examine_mqar, mqar
from modeling_rebased.training.fast_loop import FastTrainer
from modeling_rebased.training.mqar_runs import Run
from modeling_rebased.training.recipe import Options


RUN = Run(model="rebased", hidden=24, length=32, pairs=4, lr=1e-2, seed=0, epochs=2, batch_size=16, vocab_size=64)
RUN = dataclasses.replace(RUN, train_examples=90, test_examples=24, dropout=0.2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    options = Options(device="cpu", bf16=False, compile=False, cuda_graph=False, progress=False)
    trainer = FastTrainer(RUN, dataclasses.replace(options, save_weights=str(folder)))
    return folder / RUN.name, trainer.train(RUN), trainer.model


def test_the_weights_of_every_epoch_are_kept(trained):
    folder, result, model = trained
    files = examine_mqar.saved_epochs(folder)
    assert list(files) == [1, 2]
    first, last = (torch.load(path, weights_only=True) for path in files.values())
    assert [first["measured"], last["measured"]] == result["history"] and Run(**last["run"]) == RUN
    weights = model.state_dict()
    assert all(torch.equal(last["model"][name], weights[name]) for name in weights)
    assert not torch.equal(first["model"]["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_the_measures_of_saved_weights(trained, capsys, tmp_path):
    folder, result, model = trained
    examine_mqar.main([str(folder), "--epochs", "1,2", "--examples", "24", "--output", str(tmp_path / "x")])
    assert "| eager test accuracy |" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "x").read_text().splitlines()]
    for line, logged in zip(lines, result["history"], strict=True):
        assert line["eager_test_accuracy"] == line["logged_accuracy"] == logged["accuracy"]
        assert line["eager_test_loss"] != line["eager_test_dropout_loss"]
    data = mqar.make_examples(RUN.spec, 24, split="test")
    logits = model.eval()(input_ids=data.input_ids()).logits
    labels = data.labels()[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][labels >= 0], labels[labels >= 0]).item()
    assert lines[1]["eager_test_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_normaliser_is_the_sum_of_a_querys_weights(trained):
    model = trained[2].eval()
    data = mqar.make_examples(RUN.spec, 2, split="test")
    found = examine_mqar.normaliser(model, data)
    model.requires_grad_(False)
    layer, x = model.model.layers[1], model.model.embed_tokens(data.input_ids()) + model.model.embed_positions.weight
    x = layer.input_layernorm(model.model.layers[0](x))
    q, k = (
        norm(proj(x)).view(2, 32, 12, 16)
        for norm, proj in (
            (layer.self_attn.q_norm, layer.self_attn.q_proj),
            (layer.self_attn.k_norm, layer.self_attn.k_proj),
        )
    )
    sums = torch.tensor(
        [
            [sum(float(q[n, i, h] @ k[n, j, h] / 4) ** 2 for j in range(i + 1)) for n in (0, 1) for i in asked[n]]
            for asked in [data.positions.tolist()]
            for h in range(12)
        ]
    )
    relative = sums / sums.median(1, keepdim=True).values
    assert found["smallest_normaliser"] == pytest.approx(float(relative.min()), rel=1e-3)
    assert found["small_normalisers"] == 0.0
    assert found["largest_product"] >= float((q[0, 20, 3] @ k[0, 5, 3]).abs() / 4)


def test_a_model_without_linear_attention_has_no_normaliser():
    run = dataclasses.replace(RUN, model="softmax")
    measured = {"epoch": 1, "accuracy": 0.0, "loss": 1.0}
    state = {"run": dataclasses.asdict(run), "model": run.new_model("eager").state_dict(), "measured": measured}
    found = examine_mqar.examine(state, "cpu", examples=4, batch_size=4)
    assert "eager_test_accuracy" in found and "smallest_normaliser" not in found


def test_the_epochs_around_the_deepest_fall_are_chosen():
    accuracies = {3: 0.1, 4: 0.5, 5: 0.45, 6: 0.2, 7: 0.3, 8: 0.3, 9: 0.3, 10: 0.3}
    assert examine_mqar.choose_epochs(accuracies) == [4, 5, 6, 7, 10]
    assert examine_mqar.choose_epochs({1: 0.0, 2: 0.1}) == [2]


def test_what_is_missing_is_told(trained, tmp_path, capsys):
    for argv, words in (
        ([str(tmp_path)], f"{tmp_path} has no weights epoch-N.pt"),
        ([str(trained[0]), "--epochs", "2,9"], "has no weights of 9"),
    ):
        with pytest.raises(SystemExit):
            examine_mqar.main(argv)
        assert words in capsys.readouterr().err
