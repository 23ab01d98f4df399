"""export: what the folder has, what its card says, what would be uploaded. And verify, in its clean process."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors import safe_open

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.conversion import ConversionError, export, verify
from modeling_rebased.conversion.cli import main
from modeling_rebased.conversion.hub import LICENSES, hub_card
from modeling_rebased.conversion.layout import same_bytes
from modeling_rebased.conversion.lm_eval_results import read_results
from modeling_rebased.training.byte_tokenizer import byte_tokenizer


SMALL = {
    "vocab_size": 300,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "feature_dim": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}

# As lm-eval 0.4 writes them, with a group and a filter.
RESULTS = {
    "results": {
        "wikitext": {
            "name": "wikitext",
            "alias": "wikitext",
            "word_perplexity,none": 21.5,
            "word_perplexity_stderr,none": "N/A",
            "bits_per_byte,none": 0.81,
        },
        "piqa": {"alias": " - piqa", "acc,none": 0.625, "acc_stderr,none": 0.01, "acc_norm,none": float("nan")},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.02},
    },
    "configs": {
        "wikitext": {"dataset_path": "EleutherAI/wikitext_document_level", "dataset_name": "w2", "test_split": "test"},
        "piqa": {"dataset_path": "baber/piqa", "validation_split": "validation"},
    },
    "n-shot": {"wikitext": 0, "piqa": 5},
    "config": {"model": "hf", "model_args": {"pretrained": "/home/somebody/secret"}},
    "lm_eval_version": "0.4.13",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    model = ReBasedForCausalLM(ReBasedConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def read_tensors(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def metadata(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_folder_has_all_that_the_hub_needs(tmp_path, source):
    results = tmp_path / "lm_eval"
    results.mkdir()
    (results / "results_2026-01-01.json").write_text(json.dumps({"results": {"piqa": {"acc,none": 0.1}}}))
    (results / "results_2026-01-02.json").write_text(json.dumps(RESULTS))
    (tmp_path / "about.md").write_text("Made on a *rainy* day.")
    report = export(
        source,
        tmp_path / "hub",
        license="apache-2.0",
        name="tiny",
        datasets=["wikitext", "user/my.text"],
        languages=["en"],
        base_model="user/teacher",
        tags=["tiny"],
        results=[results],
        card_text=tmp_path / "about.md",
        max_shard_size="10KB",
    )
    hub = tmp_path / "hub"
    assert len(list(hub.glob("model-*.safetensors"))) > 1 and (hub / "model.safetensors.index.json").is_file()
    code = {path.name for path in source.glob("*_rebased.py")}
    assert code and code | {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in hub.iterdir()
    }
    assert "AutoModelForCausalLM" in json.loads((hub / "config.json").read_text())["auto_map"]
    assert json.loads((hub / "generation_config.json").read_text())["eos_token_id"] == 256
    before, after = read_tensors(source), read_tensors(hub)
    assert set(before) == set(after) and all(same_bytes(before[name], after[name]) for name in before)
    # Nobody learns where it was made.
    for path in hub.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes() and b"somebody" not in path.read_bytes(), path.name

    card = ModelCard.load(hub / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and card.data.datasets == ["wikitext", "user/my.text"]
    assert card.data.language == ["en"] and card.data.base_model == "user/teacher"
    assert card.data.tags == ["rebased", "linear-attention", "tiny"]
    assert card.data.metrics == ["accuracy", "bits_per_byte", "exact_match", "perplexity"]
    values = {(r.dataset_type, r.metric_type): (r.metric_value, r.dataset_split) for r in card.data.eval_results}
    assert values == {
        ("EleutherAI/wikitext_document_level", "perplexity"): (21.5, "test"),
        ("EleutherAI/wikitext_document_level", "bits_per_byte"): (0.81, "test"),
        ("baber/piqa", "accuracy"): (0.625, "validation"),
        ("gsm8k", "exact_match"): (0.25, None),
    }
    assert metadata(hub)["model-index"][0]["name"] == "tiny"
    text = card.text
    assert "| piqa | 5 | acc | 0.6250 | 0.0100 |" in text and "exact_match (strict-match)" in text
    assert "Made on a *rainy* day." in text and "lm-evaluation-harness) 0.4.13" in text
    assert f"| parameters | {sum(t.numel() for t in before.values()):,} |" in text
    assert "3 x 10 x 9 numbers" in text
    assert "piqa acc_norm: nan" in str(report)


def test_the_readme_of_the_source_speaks_for_itself(tmp_path, source):
    with pytest.raises(ConversionError, match="--license is needed"):
        export(source, tmp_path / "hub")
    readme = source / "README.md"
    readme.write_text("---\nlicense: cc-by-4.0\ndatasets: [a/b]\nlanguage: fr\n---\n# Old\n")
    try:
        export(source, tmp_path / "hub", languages=["de"])
    finally:
        readme.unlink()
    said = metadata(tmp_path / "hub")
    assert said["license"] == "cc-by-4.0" and said["datasets"] == ["a/b"] and said["language"] == ["de"]


def test_the_name_of_a_license_belongs_to_it_alone(tmp_path, source):
    readme = source / "README.md"
    readme.write_text("---\nlicense: other\nlicense_name: mine\n---\n# Old\n")
    try:
        export(source, tmp_path / "hub")
        export(source, tmp_path / "mit", license="mit")
    finally:
        readme.unlink()
    assert metadata(tmp_path / "hub")["license_name"] == "mine"
    assert "license_name" not in metadata(tmp_path / "mit")


def test_dtype_and_dry_run(tmp_path, source):
    report = str(export(source, tmp_path / "hub", license="mit", dtype="bfloat16", dry_run=True, push="a/b"))
    assert not (tmp_path / "hub").exists()
    assert "would be uploaded to a/b" in report and "bfloat16[300, 24]" in report
    export(source, tmp_path / "hub", license="mit", dtype="bfloat16")
    model = ReBasedForCausalLM.from_pretrained(tmp_path / "hub")
    assert model.dtype == torch.bfloat16
    assert "mit" in metadata(tmp_path / "hub")["license"]


def test_a_dtype_that_cannot_hold_the_weights_is_refused(tmp_path):
    """float16 ends at 65,504."""
    model = ReBasedForCausalLM(ReBasedConfig(**SMALL))
    with torch.no_grad():
        model.model.norm.weight[3] = -7e4
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(
        ConversionError, match=r"--dtype is 'float16', which cannot hold 70000 in 'model\.norm\.weight'"
    ):
        export(tmp_path / "source", tmp_path / "hub", license="mit", dtype="float16")
    assert not (tmp_path / "hub").exists()
    export(tmp_path / "source", tmp_path / "hub", license="mit", dtype="bfloat16", dry_run=True)


def test_generation_settings_of_the_source_are_kept(tmp_path, source):
    path = source / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "do_sample": True, "temperature": 0.7, "eos_token_id": 5}))
    try:
        export(source, tmp_path / "hub", license="mit")
        settings = json.loads((tmp_path / "hub" / "generation_config.json").read_text())
        assert settings["temperature"] == 0.7 and settings["do_sample"] and settings["eos_token_id"] == 5
        path.write_text(json.dumps({"max_new_tokens": -1}))
        with pytest.raises(ConversionError, match=r"generation_config\.json"):
            export(source, tmp_path / "other", license="mit")
    finally:
        path.write_text(before)


def test_push_creates_the_repository_and_uploads_the_folder(tmp_path, source, monkeypatch):
    """Offline: the calls to the Hub are caught, and what would be uploaded is looked at."""
    calls = []

    def create_repo(self, repo_id, **arguments):
        calls.append(("create_repo", repo_id, arguments))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **arguments):
        calls.append(("upload_folder", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    report = export(source, tmp_path / "hub", license="mit", push="user/my-rebased", private=True)
    (_, created, arguments), (_, uploaded, names) = calls
    assert created == uploaded == "user/my-rebased" and arguments["private"] and arguments["exist_ok"]
    assert names == sorted(path.name for path in (tmp_path / "hub").iterdir())
    assert {"README.md", "config.json", "model.safetensors", "modeling_rebased.py", "tokenizer.json"} <= set(names)
    assert "https://huggingface.co/user/my-rebased" in str(report)
    assert 'from_pretrained("user/my-rebased", trust' in (tmp_path / "hub" / "README.md").read_text()

    def refuse(self, repo_id, **arguments):
        raise ConnectionError("no such host")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ConversionError, match=r"is complete, but its upload to 'user/x' failed.*no such host"):
        export(source, tmp_path / "again", license="mit", push="user/x")
    assert (tmp_path / "again" / "config.json").is_file()


BAD = {
    "license": ({"license": "my-own"}, "--license is 'my-own'; it must be one of"),
    "other": ({"license": "other"}, "needs --license-name"),
    "dataset": ({"datasets": ["not a dataset"]}, "--dataset is 'not a dataset'"),
    "language": ({"languages": ["English"]}, "--language is 'English'"),
    "push": ({"push": "a/b/c"}, "--push is 'a/b/c'"),
    "private": ({"private": True}, "--private is for the repository of --push"),
    "license_name": ({"license_name": "mine"}, "--license-name and --license-link are for license 'other'"),
    "base_model": ({"base_model": "not a model"}, "--base-model is 'not a model'"),
    "name": ({"name": ""}, "--name is empty; give it a value, or leave it out"),
    "tag": ({"tags": ["new", ""]}, "--tag is empty"),
    "dtype": ({"dtype": "int8"}, "--dtype is 'int8'; it must be one of float32"),
    "shards": ({"max_shard_size": "many"}, "--max-shard-size is 'many'"),
    "results": ({"results": ["nowhere.json"]}, "nowhere.json' is not a file of lm-eval's results"),
    "tokenizer": ({"tokenizer": "nowhere"}, "--tokenizer 'nowhere' must be a folder"),
    "card_text": ({"card_text": "nowhere.md"}, "--card-text 'nowhere.md' cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_leave_nothing(tmp_path, source, case):
    arguments, message = BAD[case]
    with pytest.raises(ConversionError, match=message):
        export(source, tmp_path / "hub", **{"license": "mit", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_results_of_another_model_or_of_nothing(tmp_path):
    path = tmp_path / "results_1.json"
    path.write_text(json.dumps({**RESULTS, "config": {"model_num_parameters": 7}}))
    assert len(read_results([tmp_path], 7).results) == 4
    with pytest.raises(ConversionError, match="of a model with 7 parameters; SOURCE has 8"):
        read_results([path], 8)
    assert read_results([tmp_path], 8).results == []
    for text in ("", "[]", "{}", '{"results": 3}', '{"results": {"a": [1]}}'):
        path.write_text(text)
        with pytest.raises(ConversionError, match="is not a file of lm-eval's results"):
            read_results([path])
    with pytest.raises(ConversionError, match=r"has no results_\*\.json"):
        (tmp_path / "empty").mkdir()
        read_results([tmp_path / "empty"])


def test_another_models_results_in_a_folder_are_passed_over(tmp_path, source, capsys):
    """The newest file is another model's, and the next one has the older of two figures of this model."""
    parameters = sum(tensor.numel() for tensor in read_tensors(source).values())
    folder = tmp_path / "lm_eval"
    for name, day, count, value in (
        ("mine", 1, parameters, 0.125),
        ("mine", 2, parameters, 0.25),
        ("theirs", 3, parameters + 1, 0.5),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        content = {"results": {"piqa": {"acc,none": value}}, "config": {"model_num_parameters": count}}
        (folder / name / f"results_2026-01-0{day}.json").write_text(json.dumps(content))

    def run(name: str, results: Path) -> int:
        return main(["export", str(source), str(tmp_path / name), "--license", "mit", "--results", str(results)])

    theirs = folder / "theirs" / "results_2026-01-03.json"
    word = f"note: passed over: --results '{theirs}' are of a model with {parameters + 1} parameters"
    assert run("hub", folder) == 0
    assert word in capsys.readouterr().out
    (result,) = ModelCard.load(tmp_path / "hub" / "README.md").data.eval_results
    assert result.metric_value == 0.25
    assert run("none", folder / "theirs") == 0
    printed = capsys.readouterr().out
    assert word in printed and ", 0 results, " in printed
    assert run("refused", theirs) == 1
    assert str(theirs) in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_a_tokenizer_too_large_for_the_model(tmp_path):
    ReBasedForCausalLM(ReBasedConfig(**{**SMALL, "vocab_size": 100})).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match="token id 257, but the model's vocab_size is 100"):
        export(tmp_path / "source", tmp_path / "hub", license="mit")


@pytest.mark.parametrize("name", ["a: b", "--- \n x", 'q"uote | pipe', "- [x]"])
def test_odd_names_do_not_break_the_card(name):
    results = {"results": {name: {"alias": name, "acc,none": 1.0}}, "configs": {}, "n-shot": {}}
    evaluation = read_results([])
    from modeling_rebased.conversion.lm_eval_results import _add_tasks

    _add_tasks(evaluation, results, results["results"])
    card = hub_card(ReBasedConfig(**SMALL), 5, name="m", license="mit", license_name=name, evaluation=evaluation)
    again = ModelCard(str(card))
    assert again.data.eval_results[0].dataset_type == name and again.data.license_name == name
    assert {"apache-2.0", "mit", "other"} <= LICENSES


# Put into a folder's code: fails where something else than torch and transformers can be imported.
PROBE = """
import importlib

for _name in ("modeling_rebased", "conversion", "tests", "accelerate", "peft", "datasets", "pytest", "lm_eval"):
    try:
        importlib.import_module(_name)
    except ModuleNotFoundError:
        continue
    raise RuntimeError(f"{_name} can be imported")
"""


def test_the_card_states_the_size_of_the_state():
    """The kernel (0.5, 0, 1) has 36 quadratic features and a constant; it has no linear ones."""
    config = ReBasedConfig(**SMALL | {"kernel_coefficients": [0.5, 0, 1], "feature_dim": 8, "head_dim": 4})
    card = hub_card(config, 5, name="m", license="mit")
    assert f"{config.num_key_value_heads} x 37 x 5 numbers" in str(card)


def test_verify(tmp_path, source):
    """The one test with a real process, because that takes long: it loads, is alone there, and generates."""
    export(source, tmp_path / "hub", license="mit")
    with open(tmp_path / "hub" / "configuration_rebased.py", "a") as file:
        file.write(PROBE)
    report = str(verify(tmp_path / "hub", source=source))
    assert "works" in report and "another version: configuration_rebased.py" in report
    assert "generated 8 tokens, the same with the cache" in report and "tokenizer: loads" in report
    difference = re.search("largest difference (.*)", report)[1]
    assert float(difference) < 1e-5


def test_numbers_of_verify_are_checked(source):
    for wrong, message in (
        ({"tolerance": float("nan")}, "--tolerance is nan; it must be positive"),
        ({"timeout": 0}, "--timeout is 0"),
        ({"new_tokens": 0}, "--new-tokens is 0; it must be at least 1"),
    ):
        with pytest.raises(ConversionError, match=message):
            verify(source, **wrong)


def test_verify_notices_what_is_wrong(tmp_path, source, monkeypatch):
    """With the process replaced by one that does as `stranger` says."""
    ids = []

    def run(command, **_):
        work = Path(command[3])
        ids.append(torch.load(work / "ids.pt", weights_only=True))
        logits = ReBasedForCausalLM.from_pretrained(source).eval()(ids[-1]).logits.detach() + stranger["shift"]
        torch.save(logits, work / "logits.pt")
        found = {"parameters": 1, "generated": [1, 2], "without_cache": stranger["other"], "text": None}
        (work / "found.json").write_text(json.dumps({**found, "tokenizer": None}))
        if stranger["slow"]:
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, stranger["status"], stderr="no module named peft")

    monkeypatch.setattr("subprocess.run", run)
    good = {"shift": 0.0, "other": [1, 2], "slow": False, "status": 0}
    stranger = good
    assert "works" in str(verify(source)) and "this version of the package" in str(verify(source))
    for change, message in (
        ({"shift": 1e-3}, "differ from those of 'its own weights' by up to 0.001"),
        ({"shift": float("nan")}, "differ"),
        ({"other": [1, 3]}, r"generates \[1, 2\] with the cache and \[1, 3\] without"),
        ({"slow": True}, "not loaded and run within 900 seconds"),
        ({"status": 1}, "(?s)only torch and transformers are:.*peft"),
    ):
        stranger = {**good, **change}
        with pytest.raises(ConversionError, match=message):
            verify(source)
    stranger = {**good, "shift": 1e-3}
    verify(source, tolerance=1e-2)
    assert all(torch.equal(ids[0], each) for each in ids)
    with pytest.raises(ConversionError, match=r"no config\.json"):
        verify(tmp_path)
