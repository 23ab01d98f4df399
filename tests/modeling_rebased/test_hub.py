"""Checkpoints that carry their code: what from_pretrained(..., trust_remote_code=True) meets on the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import modeling_rebased
from modeling_rebased import ReBasedForCausalLM
from tests.modeling_rebased.cases import make_ids, make_model
from tests.processes import run_python


CODE = sorted(p.name for p in Path(modeling_rebased.__file__).parent.glob("*_rebased.py"))

# A process in which only torch and transformers, and what they need themselves, can be imported.
STRANGER = """
import importlib.util
import sys

ABSENT = {"modeling_rebased", "conversion", "training", "eval", "tests", "triton", "accelerate", "peft", "datasets",
          "lm_eval", "matplotlib", "fla"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.split(".")[0] in ABSENT else find_spec(name, *args)

import multiprocessing
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def load_train_and_save(source, destination):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    ids = torch.load(source + "/ids.pt", weights_only=True)
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    model.save_pretrained(destination)
    again = AutoModelForCausalLM.from_pretrained(destination, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    classifier = AutoModelForSequenceClassification.from_pretrained(destination, trust_remote_code=True, num_labels=3)
    assert classifier.config.num_labels == 3
    classifier.base_model.save_pretrained(destination + "/base")  # a class that no Auto class has loaded
    torch.save(out, destination + "/out.pt")
    torch.save(ids, destination + "/ids.pt")


def be_a_stranger(folder, first, second, names):
    for name in names:
        load_train_and_save(f"{folder}/{first}/{name}", f"{folder}/{second}/{name}")


folder, *names = sys.argv[1:]
for stages in (("source", "first"), ("first", "second")):
    # A process of its own, which has imported what stands above and nothing else.
    stranger = multiprocessing.get_context("fork").Process(target=be_a_stranger, args=(folder, *stages, names))
    stranger.start()
    stranger.join()
    assert stranger.exitcode == 0, stages
"""


def run_script(tmp_path, script, environment, *arguments):
    """A process of its own in an otherwise empty folder, with its own cache of remote code."""
    environment = {**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run_python(script, *arguments, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]


STRANGERS_MODELS = ["paper", "every_type"]


@pytest.fixture(scope="module")
def strangers_work(tmp_path_factory):
    """A folder in which one stranger has read `source` and written `first`, and the next `first` and `second`."""
    folder = tmp_path_factory.mktemp("stranger")
    for name in STRANGERS_MODELS:
        make_model(name).save_pretrained(folder / "source" / name)
        torch.save(make_ids(), folder / "source" / name / "ids.pt")
    (folder / "stranger.py").write_text(STRANGER)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    # A new interpreter: what `run_python` forks has imported what is to be absent.
    command = [sys.executable, "stranger.py", str(folder), *STRANGERS_MODELS]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", STRANGERS_MODELS)
def test_a_saved_folder_is_all_a_stranger_needs(strangers_work, name):
    """What a stranger has saved serves the next one."""
    expected = make_model(name).generate(make_ids(), max_new_tokens=3, do_sample=False)
    assert torch.equal(torch.load(strangers_work / "first" / name / "out.pt", weights_only=True), expected)
    assert (strangers_work / "second" / name / "out.pt").is_file()
    for stage in ("source", "first", "second"):
        assert sorted(p.name for p in (strangers_work / stage / name).glob("*.py")) == CODE
    assert sorted(p.name for p in (strangers_work / "second" / name / "base").glob("*.py")) == CODE


def test_push_to_hub_uploads_what_save_pretrained_writes(tmp_path, monkeypatch):
    """Offline: the calls to the Hub are caught, the folder that would be uploaded is looked at."""
    from huggingface_hub import HfApi, RepoUrl
    from transformers.utils import hub

    model = make_model("paper")
    model.save_pretrained(tmp_path / "saved")
    uploaded = {}

    def catch(self, working_dir, repo_id, files_timestamps, **kwargs):
        uploaded[repo_id] = sorted(p.name for p in Path(working_dir).iterdir())

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", catch)

    def create_repo(*args, **kwargs):
        return RepoUrl("https://hub.example/somebody/rebased", endpoint="https://hub.example")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub, "create_repo", create_repo, raising=False)
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *args, **kwargs: type("Card", (), {"save": lambda *a: None})()
    )
    model.push_to_hub("somebody/rebased")
    saved = sorted(p.name for p in (tmp_path / "saved").iterdir())
    assert [name for name in uploaded["somebody/rebased"] if name != "README.md"] == saved
    assert set(CODE) | {"config.json", "model.safetensors"} <= set(saved)


def test_auto_map_names_every_head(tmp_path):
    make_model("paper").save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_rebased.ReBasedConfig"
    for kind in ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        name = f"ReBased{kind or 'Model'}"
        assert auto_map[f"AutoModel{kind}"] == f"modeling_rebased.{name}"
        assert hasattr(modeling_rebased, name)


def test_with_the_package_no_remote_code_is_needed(tmp_path):
    model, ids = make_model("paper"), make_ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ReBasedForCausalLM
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)
    assert isinstance(AutoModel.from_pretrained(tmp_path), modeling_rebased.ReBasedModel)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(head, modeling_rebased.ReBasedForSequenceClassification)


def save_with_another_version(model, folder):
    """A checkpoint whose code doubles the logits."""
    model.save_pretrained(folder)
    code = folder / "modeling_rebased.py"
    source = code.read_text()
    changed = source.replace(
        "logits = self.lm_head(hidden_states[:, kept])", "logits = 2 * self.lm_head(hidden_states[:, kept])"
    )
    assert changed != source
    code.write_text(changed)


def test_code_of_different_versions_side_by_side(tmp_path):
    """The package and two checkpoints, one of them with another version of the code, in one process.

    Where the package is imported the Auto classes prefer it, by the library's rule, so the checkpoints' classes are
    fetched as the library does.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model, ids = make_model("paper"), make_ids()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "one")
    save_with_another_version(model, tmp_path / "two")
    loaded = [model]
    for version in ("one", "two"):
        folder = str(tmp_path / version)
        cls = get_class_from_dynamic_module("modeling_rebased.ReBasedForCausalLM", folder)
        loaded.append(cls.from_pretrained(folder).eval())
    assert len({type(m) for m in loaded}) == 3
    for _ in range(2):
        for factor, each in zip((1, 1, 2), loaded):
            logits = each(ids, use_cache=False).logits
            torch.testing.assert_close(logits, factor * expected)
            logits.sum().backward()
            assert all(p.grad is not None for p in each.parameters())
    outs = [each.generate(ids, max_new_tokens=3, do_sample=False) for each in loaded]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_remote_code_first_then_the_package(tmp_path):
    """The package is installed but not yet imported: trust_remote_code=True loads each checkpoint's own code."""
    model, ids = make_model("paper"), make_ids()
    model.save_pretrained(tmp_path / "one")
    save_with_another_version(model, tmp_path / "two")
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.pt")
    script = tmp_path / "order.py"
    script.write_text(
        """
import sys
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt", weights_only=True)
one = AutoModelForCausalLM.from_pretrained(folder + "/one", trust_remote_code=True).eval()
two = AutoModelForCausalLM.from_pretrained(folder + "/two", trust_remote_code=True).eval()
assert "modeling_rebased" not in sys.modules
import modeling_rebased
assert modeling_rebased.__file__.startswith(sys.argv[2])
three = AutoModelForCausalLM.from_pretrained(folder + "/two").eval()
assert type(three) is modeling_rebased.ReBasedForCausalLM
for factor, model in ((1, one), (2, two), (1, three)):
    logits = model(expected["ids"]).logits
    torch.testing.assert_close(logits, factor * expected["logits"])
    logits.sum().backward()
"""
    )
    root = Path(modeling_rebased.__file__).parents[1]
    run_script(tmp_path, script, {**os.environ, "PYTHONPATH": str(root)}, tmp_path, root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sharded_safetensors_and_dtype(tmp_path, dtype):
    model, ids = make_model("paper").to(dtype), make_ids()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == dtype
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_missing_and_unknown_keys_are_reported(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model("paper")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.unknown"] = torch.zeros(1)
    del weights["model.layers.1.self_attn.q_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = ReBasedForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.self_attn.q_norm.weight"}
    assert set(info["unexpected_keys"]) == {"model.layers.0.unknown"}
    assert (loaded.model.layers[1].self_attn.q_norm.weight == 1).all()


def spoil(path, damage):
    """Cut a file short, empty it, or replace it by what a checkout without Git LFS holds."""
    path.write_bytes(
        {"cut": path.read_bytes()[:-100], "empty": b"", "pointer": b"version https://git-lfs.github.com/spec/v1\n"}[
            damage
        ]
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer"])
def test_a_damaged_weight_file_is_named(tmp_path, damage):
    make_model("paper").save_pretrained(tmp_path, max_shard_size="50KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    spoil(second, damage)
    for load in (AutoModelForCausalLM, AutoModel, ReBasedForCausalLM):
        with pytest.raises(OSError, match="git lfs pull") as caught:
            load.from_pretrained(tmp_path)
        assert str(tmp_path) in str(caught.value) and second.name in str(caught.value)
        assert first.name not in str(caught.value)


def test_a_damaged_weight_file_of_the_hub_or_a_subfolder_is_named(tmp_path, monkeypatch):
    make_model("paper").save_pretrained(tmp_path / "inner")
    spoil(tmp_path / "inner" / "model.safetensors", "cut")
    with pytest.raises(OSError, match=r"inner.* model\.safetensors"):
        ReBasedForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    files = {name: str(tmp_path / "inner" / name) for name in ("config.json", "model.safetensors")}
    from transformers import modeling_utils

    monkeypatch.setattr(modeling_utils, "cached_file", lambda source, name, **kwargs: files.get(name))
    config = modeling_rebased.ReBasedConfig.from_pretrained(tmp_path / "inner")
    with pytest.raises(OSError, match=r"'somebody/rebased' is cut short.*force_download"):
        ReBasedForCausalLM.from_pretrained("somebody/rebased", config=config)


STRANGER_TO_DAMAGE = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except OSError as error:
    for word in sys.argv[2:]:
        assert word in str(error), error
else:
    raise AssertionError("it was loaded")
assert "modeling_rebased" not in sys.modules
"""


@pytest.mark.parametrize("lost", ["eager_rebased.py", "triton_tiles_rebased.py", "model.safetensors"])
def test_a_stranger_is_told_what_is_missing(tmp_path, lost):
    """A code file that is missing, or weights that are cut short, in a process without the package."""
    source = tmp_path / "source"
    make_model("paper").save_pretrained(source)
    if lost.endswith(".py"):
        (source / lost).unlink()
    else:
        spoil(source / lost, "cut")
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER_TO_DAMAGE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run_script(tmp_path, script, environment, source, str(source), lost, "again")
