"""Checkpoints are read without trusting them, and written whole: every refusal in the words that a user sees."""

import collections
import json
import pickle
import re
import zipfile
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from modeling_rebased import ReBasedForCausalLM
from modeling_rebased.conversion import ConversionError
from modeling_rebased.conversion.reading import (
    _refusal,
    check_tensors,
    load_config,
    load_folder,
    load_model,
    load_tokenizer,
    read_safetensors,
    read_state_dict,
    read_weights,
)
from modeling_rebased.conversion.record import from_record, read_record, write_record
from modeling_rebased.conversion.writing import check_destination, write_model, write_state_dict, written
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from tests.modeling_rebased.cases import make_config, make_model


STATE = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.float16)}


def refused(message: str, whole: bool = True):
    """The whole message, word by word, or how it begins."""
    return pytest.raises(ConversionError, match=f"^{re.escape(message)}{'$' if whole else ''}")


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_a_state_dict_with_and_without_a_wrapper(tmp_path, wrapper):
    write_state_dict(tmp_path / "a.pt", STATE, wrapper)
    state, found, beside = read_state_dict(tmp_path / "a.pt")
    assert equal(state, STATE) and found == wrapper and beside == []
    torch.save({"epoch": 3, 5: 1, "model": STATE}, tmp_path / "b.pt")
    state, found, beside = read_state_dict(str(tmp_path / "b.pt"))
    assert equal(state, STATE) and found == "model" and beside == ["epoch", "5"]


def test_safetensors_are_written_and_read(tmp_path):
    views = {"whole": STATE["b"], "part": STATE["b"][1:], "turned": torch.arange(6.0).view(2, 3).T}
    write_state_dict(tmp_path / "a.safetensors", views, "ignored")
    state, found, beside = read_state_dict(tmp_path / "a.safetensors")
    assert sorted(state) == sorted(views) and all(torch.equal(state[name], views[name]) for name in views)
    assert (found, beside) == (None, [])
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert equal(read_safetensors(tmp_path / "a.safetensors"), state)


def test_names_that_are_no_weights_are_skipped(tmp_path):
    torch.save({"model": {**STATE, "a.mask": 1, 3: 4}, "x": 1}, tmp_path / "a.pt")
    with refused(f"SOURCE {str(tmp_path / 'a.pt')!r} has the key 3; all keys must be strings."):
        read_state_dict(tmp_path / "a.pt", r"\.mask$")
    torch.save({"model": {**STATE, "a.mask": 1}, "x": 1}, tmp_path / "a.pt")
    state, _, beside = read_state_dict(tmp_path / "a.pt", r"\.mask$")
    assert equal(state, STATE) and beside == ["x", "a.mask"]
    save_file({**STATE, "a.mask": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    skipped = []
    assert equal(read_weights(tmp_path, "mask", skipped), dict(sorted(STATE.items()))) and skipped == ["a.mask"]
    assert equal(read_weights(tmp_path, "mask"), dict(sorted(STATE.items())))


def test_what_is_no_file_of_tensors(tmp_path):
    end = "it must be a file of torch.save or a .safetensors file."
    with refused(f"SOURCE {str(tmp_path)!r} is a folder; {end}"):
        read_state_dict(tmp_path)
    path = tmp_path / "a.pt"
    with refused(f"SOURCE {str(path)!r} is missing; {end}"):
        read_state_dict(path)
    torch.save([1], path)
    with refused(
        f"SOURCE {str(path)!r} holds a list; it must hold a state_dict, or a dict with one under 'state_dict', "
        "'model_state_dict', 'model'."
    ):
        read_state_dict(path)
    path.write_bytes(b"")
    with refused(
        f"SOURCE {str(path)!r} could not be read: it is not a file of torch.save, or truncated or damaged. torch "
        "says: EOFError: "
    ):
        read_state_dict(path)
    path.write_bytes(b"no pickle")
    with refused(
        f"SOURCE {str(path)!r} was refused: it is not a file of torch.save, or truncated, or it asks to import or run "
        "something. torch says: ",
        whole=False,
    ):
        read_state_dict(path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"short")
    with refused(f"{str(path)!r} is not a complete .safetensors file: SafetensorError: ", whole=False):
        read_state_dict(path)


def test_what_a_pickle_asks_for_is_told(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": collections.Counter, "b": print}, path)
    with pytest.raises(ConversionError) as error:
        read_state_dict(path)
    start = (
        f"SOURCE {str(path)!r} was refused: it asks to import or run something, and only plain tensors, numbers, "
        "strings, lists and dicts are read. If you trust the file, save its state_dict alone: "
        "torch.save(model.state_dict(), ...). torch says: "
    )
    assert str(error.value).startswith(start)
    said = str(error.value).removeprefix(start)
    assert re.fullmatch(r"GLOBAL \S*print", said)


def test_a_pickle_is_refused_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"b": print}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="was refused"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Weights only load failed. GLOBAL os.system was not an allowed global", "GLOBAL os.system"),
        (
            "x WeightsUnpickler error:  Unsupported operand 149\n(load with weights_only=False)",
            "Unsupported operand 149",
        ),
        ("something else", "weights only load failed"),
        ("WeightsUnpickler error: " + "x" * 400, "x" * 300),
    ],
)
def test_why_torch_refuses_a_pickle(said, told):
    assert _refusal(pickle.UnpicklingError(said)) == told


def test_archives_that_torch_does_not_write(tmp_path):
    path, other = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(STATE, path)
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w", compression) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
        if compression == zipfile.ZIP_DEFLATED:
            with refused(
                f"SOURCE {str(other)!r} could not be read: it is not a file of torch.save, or truncated or damaged. "
                "torch says: ValueError: the archive is compressed, which torch.save's are not"
            ):
                read_state_dict(other)
    data = bytearray(path.read_bytes())
    place = data.index(torch.arange(3.0).numpy().tobytes())
    data[place] ^= 1
    other.write_bytes(data)
    with pytest.raises(ConversionError, match=r"torch says: ValueError: \S+ does not fit its checksum$"):
        read_state_dict(other)


def test_what_is_no_ordinary_tensor():
    check_tensors(STATE, "it")
    types = "torch.float32, torch.float16, torch.bfloat16, torch.float64"
    for state, message in (
        ({}, "SOURCE 'it' holds no tensors."),
        ({1: STATE["a"]}, "SOURCE 'it' has the key 1; all keys must be strings."),
        ({"a": [1.0]}, "'a' in 'it' is a list; it must be a tensor."),
        (
            {"a": torch.ones(2, dtype=torch.int64)},
            f"'a' in 'it' is a torch.strided tensor of torch.int64 on cpu; it must be a dense tensor of {types}.",
        ),
        (
            {"a": torch.ones(2, device="meta")},
            f"'a' in 'it' is a torch.strided tensor of torch.float32 on meta; it must be a dense tensor of {types}.",
        ),
        (
            {"a": torch.ones(2, 2).to_sparse()},
            f"'a' in 'it' is a torch.sparse_coo tensor of torch.float32 on cpu; it must be a dense tensor of {types}.",
        ),
        (
            {"a": torch.ones(1).expand(3, 5)},
            "'a' in 'it' claims the shape [3, 5], more numbers than the file holds.",
        ),
    ):
        with refused(message):
            check_tensors({"b": STATE["b"], **state} if state else state, "it")


def test_folders_that_are_no_model(tmp_path):
    end = "it must be the folder of a ReBased model, as save_pretrained writes it."
    with refused(f"{str(tmp_path)!r} has no config.json; {end}"):
        load_config(tmp_path)
    file = tmp_path / "config.json"
    for text in ("{", "[]"):
        file.write_text(text)
        with refused(f"{str(file)!r} is not a JSON object: ", whole=False):
            load_config(tmp_path)
    file.write_text('{"model_type": "llama"}')
    with refused(f"{str(file)!r} has model_type 'llama'; it must be 'rebased'."):
        load_config(tmp_path)
    file.write_text('{"model_type": "rebased", "num_attention_heads": 0}')
    with refused(f"{str(file)!r} is not a possible configuration: ", whole=False):
        load_config(tmp_path)
    with refused(f"SOURCE {str(tmp_path)!r} has neither model.safetensors nor an index of it."):
        read_weights(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_folder_is_read_as_it_was_written(tmp_path, size, tied):
    model = make_model("paper", tie_word_embeddings=tied)
    state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    write_model(tmp_path, model.config, state, max_shard_size=size)
    assert (tmp_path / "model.safetensors").is_file() == (size == "1GB")
    config, found = load_folder(str(tmp_path))
    assert config.to_dict() == load_config(tmp_path).to_dict()
    assert equal(dict(sorted(found.items())), dict(sorted(state.items())))
    loaded = load_model(ReBasedForCausalLM, tmp_path, "SOURCE")
    assert equal(dict(sorted(loaded.state_dict().items())), dict(sorted(model.state_dict().items())))


def test_shards_that_are_missing_or_disagree(tmp_path, monkeypatch):
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}'):
        index.write_text(text)
        with refused(f"{str(index)!r} is not an index of safetensors: ", whole=False):
            read_weights(tmp_path)
    save_file(STATE, tmp_path / "one.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(STATE, tmp_path / "folder" / "one.safetensors")
    for shard in ("two.safetensors", "folder/one.safetensors", "folder", 3):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with refused(f"{str(index)!r} names the shard {shard!r}, which is not in the folder."):
            read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}))
    with refused(f"{str(index)!r} and its shards disagree about 'b', 'c'."):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    bars = []
    monkeypatch.setattr("modeling_rebased.conversion.reading.progress", lambda items, what: bars.append(what) or items)
    assert equal(read_weights(tmp_path), dict(sorted(STATE.items()))) and bars == ["reading"]
    save_file({"a": torch.ones(1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with refused(f"'a' in {str(tmp_path)!r} is a torch.strided tensor of torch.int8", whole=False):
        read_weights(tmp_path)


def test_a_model_whose_weights_are_not_all_there(tmp_path):
    make_model("paper").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.norm.weight"
    save_file(
        {**{other: x for other, x in state.items() if other != name}, "x": STATE["b"]}, tmp_path / "model.safetensors"
    )
    with refused(f"SOURCE 'it' does not fit its configuration: missing {name!r}; unknown 'x'."):
        load_model(ReBasedForCausalLM, tmp_path, "SOURCE 'it'")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with refused("The weights in SOURCE 'it' cannot be loaded: ", whole=False):
        load_model(ReBasedForCausalLM, tmp_path, "SOURCE 'it'")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")  # pickles are not read
    with refused("The weights in SOURCE 'it' cannot be loaded: ", whole=False):
        load_model(ReBasedForCausalLM, tmp_path, "SOURCE 'it'")


def test_tokenizers(tmp_path, monkeypatch):
    config = make_config("paper", vocab_size=264)
    assert load_tokenizer(tmp_path, None, config) is None
    files = "tokenizer.json, tokenizer_config.json, tokenizer.model, vocab.json"
    with refused(f"--tokenizer {str(tmp_path)!r} must be a folder with one of {files}."):
        load_tokenizer(tmp_path / "other", str(tmp_path), config)
    byte_tokenizer().save_pretrained(tmp_path)
    for found in (load_tokenizer(tmp_path, None, config), load_tokenizer(tmp_path / "other", tmp_path, config)):
        assert found.get_vocab() == byte_tokenizer().get_vocab()
    last = len(byte_tokenizer()) - 1
    assert load_tokenizer(tmp_path, None, make_config("paper", vocab_size=last + 1)) is not None
    with refused(f"The tokenizer in {str(tmp_path)!r} has the token id {last}, but the model's vocab_size is {last}."):
        load_tokenizer(tmp_path, None, make_config("paper", vocab_size=last))
    empty = SimpleNamespace(get_vocab=dict)
    with monkeypatch.context() as patch:
        patch.setattr(
            "modeling_rebased.conversion.reading.AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: empty)
        )
        assert load_tokenizer(tmp_path, None, make_config("paper", vocab_size=1)) is empty
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{")
    with refused(f"The tokenizer in {str(tmp_path)!r} cannot be loaded: ", whole=False):
        load_tokenizer(tmp_path, None, config)


def test_the_record_of_a_conversion(tmp_path):
    assert read_record(tmp_path, "theirs") == ({}, {})
    write_record(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    record = {"format": "theirs", "keys": {"z": "a", "y": None}}
    write_record(tmp_path, record, {"y": STATE["b"][1:], "x": torch.ones(3, 2).T})
    assert (tmp_path / "conversion.json").read_text() == json.dumps(record, indent=1) + "\n"
    with safe_open(tmp_path / "conversion.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    found, unused = read_record(tmp_path, "theirs")
    assert found == record and equal(dict(sorted(unused.items())), {"x": torch.ones(2, 3), "y": STATE["b"][1:]})
    assert read_record(tmp_path, "others") == ({}, {})
    assert list(from_record(found, {"a": STATE["a"]}, unused)) == ["z", "y"]
    assert equal(from_record(found, {"a": STATE["a"]}, unused), {"z": STATE["a"], "y": STATE["b"][1:]})
    for record, state, rest in (
        ({}, {"a": STATE["a"]}, unused),
        ({"keys": ["a"]}, {"a": STATE["a"]}, unused),
        (found, {}, unused),
        (found, STATE, unused),
        (found, {"a": STATE["a"]}, {"x": STATE["a"]}),
    ):
        assert from_record(record, state, rest) is None
    (tmp_path / "conversion.safetensors").unlink()
    assert read_record(tmp_path, "theirs") == (found, {})
    save_file({"y": torch.ones(1, dtype=torch.int32)}, tmp_path / "conversion.safetensors")
    with refused(f"'y' in {str(tmp_path / 'conversion.safetensors')!r} is a torch.strided tensor", whole=False):
        read_record(tmp_path, "theirs")
    file = tmp_path / "conversion.json"
    for text, why in (("{}", "'format'"), ("3", "'int' object is not subscriptable"), ("{", "Expecting")):
        file.write_text(text)
        with refused(f"{str(file)!r} is damaged ({why}", whole=False) as error:
            read_record(tmp_path, "theirs")
        assert str(error.value).endswith("); remove it to go without.")


def test_destinations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_destination("new/a") == tmp_path / "new" / "a"
    with refused("DESTINATION '/' cannot be written; give a new file or folder."):
        check_destination("/", overwrite=True)
    (tmp_path / "old").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("old", "link"):
        with refused(f"DESTINATION {str(tmp_path / name)!r} exists; give another or allow --overwrite."):
            check_destination(name)
        assert check_destination(name, overwrite=True) == tmp_path / name
    (tmp_path / "old" / "model").mkdir()
    assert check_destination("old/other", source="old/model") == tmp_path / "old" / "other"
    for name in ("old", "old/model"):
        with refused(
            f"DESTINATION {str(tmp_path / name)!r} is or holds SOURCE 'old/model', which writing would destroy; give "
            "another."
        ):
            check_destination(name, overwrite=True, source="old/model")
    with written("old/new", source="old/model") as path:
        path.write_text("a")
    assert (tmp_path / "old" / "new").read_text() == "a"
    with refused(f"DESTINATION {str(tmp_path / 'old' / 'new')!r} exists; give another or allow --overwrite."):
        written("old/new").__enter__()
    with written("old/new", overwrite=True) as path:
        path.write_text("b")
    assert (tmp_path / "old" / "new").read_text() == "b"
    with pytest.raises(ConversionError, match="is or holds SOURCE"):
        written("old", overwrite=True, source="old/model").__enter__()


def test_all_parts_of_a_written_folder(tmp_path):
    model = make_model("paper", max_position_embeddings=64)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    settings = GenerationConfig(temperature=0.5, do_sample=True)
    record = {"format": "theirs"}
    card = ModelCard("---\nlicense: mit\n---\nA card.\n")
    write_model(tmp_path, model.config, state, record, {"y": STATE["b"]}, settings, byte_tokenizer(), card)
    assert (tmp_path / "README.md").read_text() == str(card)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 64
    assert read_record(tmp_path, "theirs")[0] == record
    assert equal(read_record(tmp_path, "theirs")[1], {"y": STATE["b"]})
    assert "modeling_rebased.py" in {path.name for path in tmp_path.iterdir()}
    loaded = ReBasedForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
