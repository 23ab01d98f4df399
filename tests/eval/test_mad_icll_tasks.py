"""The `mad` and `icll` tasks of lm-eval give the numbers of the direct evaluation, to the last digit."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_rebased.eval.tasks import tasks_path
from modeling_rebased.training import icll, mad, mqar
from modeling_rebased.training.random_numbers import few_of
from modeling_rebased.training.recipe import build_model
from modeling_rebased.training.train_icll import ICLLRun
from modeling_rebased.training.train_mad import MADRun


pytest.importorskip("lm_eval")

TASKS = Path(tasks_path())
COMMON = {"model": "rebased", "lr": 1e-3, "seed": 0, "hidden": 32, "head": 8}
SMALL = {"symbols": 5, "max_states": 5, "min_strings": 2, "max_strings": 4, "max_length": 6}


def scores(folder: Path, task: str, metadata: dict) -> dict[str, float]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=16, device="cpu")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    found = simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0)["results"][task]
    return {name.removesuffix(",none"): value for name, value in found.items() if name.endswith(",none")}


def saved(run, folder: Path):
    """A model with random weights that are large enough for it to give all kinds of answers, and its folder."""
    model = build_model(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * (20 if parameter.ndim > 1 else 1)).bfloat16())
    run.save(model, folder, {"accuracy": 0.5})
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.mark.parametrize("task", ["recall", "selective_copying"])
def test_mad_both_ways(task, tmp_path):
    sizes = {"vocab_size": 8, "length": 16, "copy": 3 if task == "selective_copying" else 0}
    run = MADRun(**COMMON, task=task, **sizes, train_examples=1)
    model = saved(run, tmp_path / "model")
    tokens, targets = mad.make_examples(run.spec, 30, seed=2, split="test")
    asked = few_of(targets >= 0, 3, seed=2)
    with torch.no_grad():
        right = model(tokens.long()).logits.argmax(-1) == targets
    metadata = {"num_examples": 30, "queries": 3, "seed": 2, **sizes}
    expected = float(right[asked].double().mean())
    assert scores(tmp_path / "model", f"mad_{task}", metadata)["acc"] == expected
    assert 0 < expected < 1


def test_icll_both_ways(tmp_path):
    run = ICLLRun(**COMMON, **SMALL, layers=2)
    model = saved(run, tmp_path / "model")
    examples = icll.make_examples(run.spec, 20, seed=2, split="test")
    asked = few_of(examples.targets() >= 0, 4, seed=2)
    with torch.no_grad():
        said = model(examples.input_ids().long()).logits.softmax(-1)[asked]
    exact, ngram = examples.next_tokens()[asked], icll.ngram_next_tokens(examples)[asked]
    sizes = {"longest_string" if name == "max_length" else name: size for name, size in SMALL.items()}
    assert json.dumps(sizes)[1:-1] in (tmp_path / "model" / "README.md").read_text()
    # lm-eval hands over the model's arguments with the task's own
    metadata = {"pretrained": "x", "max_length": 77, "num_examples": 20, "queries": 4, "seed": 2, **sizes}
    found = scores(tmp_path / "model", "icll", metadata)
    expected = float((exact.gather(1, said.argmax(-1, keepdim=True)) > 0).double().mean())
    assert found["acc"] == expected and 0 < expected < 1
    assert found["distance_to_automaton"] == pytest.approx(float((said - exact).abs().sum(-1).mean()), rel=1e-4)
    assert found["distance_to_3gram"] == pytest.approx(float((said - ngram).abs().sum(-1).mean()), rel=1e-4)


def test_the_card_says_how_to_score_the_model(tmp_path):
    run = MADRun(**COMMON, task="memorization", vocab_size=16, length=8, train_examples=1, data_seed=3)
    saved(run, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "--tasks mad_memorization" in card and '"seed": 3, "vocab_size": 16, "length": 8' in card


def test_the_files_are_the_tasks_their_names_say():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"num_examples": 3, "queries": 2, "seed": 5}
    )
    tasks = manager.load(["mad", "icll"])["tasks"]
    assert set(tasks) == {"icll", *(f"mad_{task}" for task in mad.TASKS if task != "compression")}
    for task in mad.TASKS:
        if task == "compression":
            continue
        tokens, targets = mad.make_examples(mad.BASE[task], 3, seed=5, split="test")
        docs = list(tasks[f"mad_{task}"].test_docs())
        assert 3 < len(docs) <= 6
        for doc in docs:
            row, place = doc["example"], doc["position"]
            assert doc["text"] == mqar.to_text(tokens[row, : place + 1].tolist())
            assert doc["value"] == mqar.to_text([int(targets[row, place])]) != mqar.to_text([-100])
    docs = list(tasks["icll"].test_docs())
    assert len(docs) == 6
    for doc in docs:
        assert len(doc["tokens"]) == len(doc["automaton"]) == len(doc["ngram"]) == 20
        assert sum(doc["automaton"]) == pytest.approx(1)


@pytest.mark.parametrize(
    "module, given, message",
    [
        ("mqar", {"length": 64.5, "num_pairs": 4}, "length in --metadata must be a whole number, got 64.5"),
        ("mqar", {"length": 64, "num_pairs": 4, "queries": 0}, "queries in --metadata must be at least 1, got 0"),
        ("mad", {"mad_task": "recall", "num_examples": "many"}, "num_examples in --metadata must be a whole number"),
        ("mad", {"mad_task": "noisy_recall", "noise": [1]}, r"noise in --metadata must be a number, got \[1\]"),
        ("icll", {"max_states": True}, "max_states in --metadata must be a whole number, got True"),
        ("needle", {"distance": -100}, "distance in --metadata must be at least 1, got -100"),
    ],
)
def test_a_number_in_the_metadata_that_is_none_or_too_small_is_an_error(module, given, message):
    make = getattr(importlib.import_module(f"modeling_rebased.eval.tasks.{module}_utils"), f"{module}_dataset")
    with pytest.raises(ValueError, match=message):
        make(**given)


@pytest.mark.parametrize(
    "module, function, name, meant",
    [
        ("mqar_utils", "mqar_dataset", "quries", "queries"),
        ("mad_utils", "mad_dataset", "num_example", "num_examples"),
        ("icll_utils", "icll_dataset", "max_state", "max_states"),
        ("needle_utils", "needle_dataset", "distances", "distance"),
        ("rebased_ppl", "load_text", "textfile", "text_file"),
    ],
)
def test_a_misspelt_name_in_the_metadata_is_an_error(module, function, name, meant):
    make = getattr(importlib.import_module(f"modeling_rebased.eval.tasks.{module}"), function)
    with pytest.raises(ValueError, match=f"--metadata has '{name}', .* it knows '{meant}'"):
        make(**{name: 1})


def test_wrong_sizes_are_named():
    run = dataclasses.replace(ICLLRun(**COMMON), symbols=3)
    with pytest.raises(ValueError, match="symbols must be 4 to 64, got 3"):
        _ = run.spec
    with pytest.raises(ValueError, match="queries must be positive, got 0"):
        few_of(torch.ones(1, 2, dtype=torch.bool), 0)
