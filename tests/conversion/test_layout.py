"""What all formats share: names, shapes, numbered layers, and what a report says of them."""

import re

import pytest
import torch

from modeling_rebased.conversion import ConversionError, Report
from modeling_rebased.conversion.layout import (
    by_layer,
    check_against,
    check_names,
    find_prefix,
    make_config,
    matrix_size,
    model_shapes,
    own_fields,
    same_bytes,
    set_same_size,
)
from modeling_rebased.conversion.report import progress, some
from tests.modeling_rebased.cases import make_config as small_config
from tests.modeling_rebased.cases import make_model


def refused(message: str):
    """The whole message, word by word."""
    return pytest.raises(ConversionError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "none"), (1, "'0'"), (5, "'0', '1', '2', '3', '4'"), (7, "'0', '1', '2', '3', '4' and 2 more")],
)
def test_a_few_of_many_names(number, text):
    assert some([str(i) for i in range(number)]) == text


def test_a_report():
    report = Report("a.pt", "b")
    report.map("one.weight", torch.zeros(2, 30, dtype=torch.bfloat16), "w")
    report.map("b", torch.zeros(4), "bias")
    report.notes.append("The heads are 4.")
    assert str(report) == "note: The heads are 4.\n2 tensors: a.pt -> b"
    assert str(Report("a", "b", closing="Done.")) == "Done."
    report.dry_run, report.closing = True, "Done."
    assert str(report).split("\n") == [
        "one.weight  bfloat16[2, 30]  -> w",
        "b           float32[4]       -> bias",
        "note: The heads are 4.",
        "dry run: b was not written",
    ]
    assert str(Report("a", "b", dry_run=True)) == "dry run: b was not written"


def test_progress_shows_nothing_where_there_is_no_terminal(capsys):
    assert list(progress([1, 2], "reading")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_names_what_it_does_and_goes_away(monkeypatch):
    calls = []
    monkeypatch.setattr("modeling_rebased.conversion.report.tqdm", lambda items, **options: calls.append(options))
    progress([], "reading")
    assert calls == [{"desc": "reading", "disable": None, "leave": False}]


def test_a_configuration_that_cannot_be():
    message = "^The checkpoint's sizes make no possible model: (.|\n)*num_attention_heads"
    with pytest.raises(ConversionError, match=message):
        make_config(num_attention_heads=0)
    config = small_config("paper")
    assert make_config(**own_fields(config)).to_dict() == config.to_dict()
    config.auto_map = {"AutoConfig": "code.Config"}
    assert not {"model_type", "auto_map", "transformers_version", "dtype"} & own_fields(config).keys()


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_of_a_model(tied):
    model = make_model("every_type", tie_word_embeddings=tied)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    assert model_shapes(model.config) == shapes


def test_names_that_do_not_fit():
    check_names([], [], "it")
    with refused("it does not fit its configuration: missing 'a', 'b'; unknown none."):
        check_names(["b", "a"], [], "it")
    with refused("it does not fit its configuration: missing none; unknown 'c', 'd'."):
        check_names([], {"d", "c"}, "it")
    model = make_model("paper")
    state = dict(model.state_dict())
    del state["lm_head.weight"]
    check_against(model.config, state, "folder")
    name = next(iter(state))
    tensor = state.pop(name)
    with refused(f"'folder' does not fit its configuration: missing {name!r}; unknown 'x'."):
        check_against(model.config, {**state, "x": tensor}, "folder")
    with refused(f"{name!r} in 'folder' has the shape [3]; the configuration asks for {list(tensor.shape)}."):
        check_against(model.config, {**state, name: torch.zeros(3)}, "folder")


def test_equal_bit_for_bit():
    a = torch.tensor([[0.0, float("nan")], [1.0, -2.0]])
    assert same_bytes(a, a.clone()) and same_bytes(a.T.contiguous().T, a) and same_bytes(a[0, 0], a[0, 0].clone())
    assert not same_bytes(a, torch.tensor([[-0.0, float("nan")], [1.0, -2.0]]))
    assert not same_bytes(a, a.flatten()) and not same_bytes(a, a.view(torch.int32))


def test_sizes_of_matrices():
    assert matrix_size({"w": torch.zeros(2, 3)}, "w") == (2, 3)
    for shape in ((2,), (2, 3, 4)):
        with refused(f"'w' has the shape {list(shape)}; it must have two dimensions."):
            matrix_size({"w": torch.zeros(shape)}, "w")
    fields = {}
    set_same_size(fields, "feature_dim", torch.zeros(2, 3), 1, 0)
    set_same_size(fields, "feature_dim", torch.zeros(5, 3), 1, 1)
    set_same_size(fields, "rank", torch.tensor(1.0), 0, 0)
    assert fields == {"feature_dim": 3, "rank": 0}
    with refused("feature_dim must be one for all layers, but it is 3 and, in layer 2, 4."):
        set_same_size(fields, "feature_dim", torch.zeros(3, 4), 1, 2)


def test_the_prefix_of_all_names():
    state = dict.fromkeys(("model.embed.weight", "model.b"), torch.zeros(1))
    assert find_prefix(state, "embed.weight", "a model") == "model."
    assert find_prefix({"embed.weight": torch.zeros(1)}, "embed.weight", "a model") == ""
    with refused(
        "SOURCE is not a model: 0 of its names end in 'head', and one must. It has 'model.b', 'model.embed.weight'."
    ):
        find_prefix(state, "head", "a model")
    with refused("SOURCE is not a model: 2 of its names end in 'b', and one must. It has 'a.b', 'b'."):
        find_prefix(dict.fromkeys(("b", "a.b")), "b", "a model")
    with refused("All names in SOURCE must start with 'model.'; these do not: 'a', 'c'."):
        find_prefix({**state, "c": torch.zeros(1), "a": torch.zeros(1)}, "embed.weight", "a model")


def test_tensors_by_layer():
    pattern = re.compile(r"layers\.(\d+)\.(.+)")
    names = ["layers.1.b", "layers.0.a", "head", "layers.1.a"]
    state = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    layers = by_layer(state, pattern, ["head"], "model")
    assert [{name: x.item() for name, x in layer.items()} for layer in layers] == [{"a": 1.0}, {"b": 0.0, "a": 3.0}]
    with refused("SOURCE has tensors that no model has: 'head', 'xlayers.0.a'."):
        by_layer({**state, "xlayers.0.a": torch.zeros(1)}, pattern, [], "model")
    message = "The layers of SOURCE must be numbered from 0 without a gap, but they are {}."
    for numbers in ([], [1], [0, 2]):
        with refused(message.format(numbers)):
            by_layer({f"layers.{i}.a": torch.zeros(1) for i in numbers}, pattern, [], "model")
    with refused(message.format([*range(1, 21)])):
        by_layer({f"layers.{i}.a": torch.zeros(1) for i in range(1, 25)}, pattern, [], "model")
