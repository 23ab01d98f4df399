"""What transformers decides by the names of a model's classes: above all, whether Trainer shifts smoothed labels."""

import os

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.modelcard import TrainingSummary

from modeling_rebased import ReBasedForTokenClassification
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from tests.modeling_rebased.cases import make_config, make_ids, make_model
from tests.processes import run_python


def smoothed(logits, labels, shift=True):
    """0.9 of the negative log-likelihood and 0.1 of its mean over the vocabulary, of the labels that are not -100."""
    losses = []
    for row, targets in zip(logits.double().log_softmax(-1), labels.tolist()):
        for position, label in enumerate(targets):
            if label != -100 and (position or not shift):
                log = row[position - 1] if shift else row[position]
                losses.append(-0.9 * log[label] - 0.1 * log.mean())
    return torch.stack(losses).mean()


def make_labels(ids):
    labels = ids.clone()
    labels[0, :5] = labels[1, 10] = -100
    return labels


def make_trainer(model, folder):
    return Trainer(model, TrainingArguments(folder, label_smoothing_factor=0.1, use_cpu=True, report_to=[]))


def test_label_smoothing_shifts_the_labels(tmp_path):
    model, ids = make_model("paper"), make_ids()
    with torch.no_grad():
        loss = make_trainer(model, tmp_path).compute_loss(model, {"input_ids": ids, "labels": make_labels(ids)})
        expected = smoothed(model(ids).logits, make_labels(ids))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert abs(expected - smoothed(model(ids).logits, make_labels(ids), shift=False)) > 1


def test_label_smoothing_with_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    ids = make_ids()
    model = get_peft_model(make_model("every_type"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        loss = make_trainer(model, tmp_path).compute_loss(model, {"input_ids": ids, "labels": make_labels(ids)})
        expected = smoothed(model(input_ids=ids).logits, make_labels(ids))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_label_smoothing_of_a_subclass_as_fsdp_makes_it(tmp_path):
    model, ids = make_model("paper"), make_ids()
    model.__class__ = type("FSDPReBasedForCausalLM", (type(model),), {})
    with torch.no_grad():
        loss = make_trainer(model, tmp_path).compute_loss(model, {"input_ids": ids, "labels": make_labels(ids)})
        expected = smoothed(model(ids).logits, make_labels(ids))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_label_smoothing_leaves_the_labels_of_tokens_where_they_are(tmp_path):
    torch.manual_seed(0)
    model, ids = ReBasedForTokenClassification(make_config("paper", num_labels=50)).eval(), make_ids()
    with torch.no_grad():
        loss = make_trainer(model, tmp_path).compute_loss(model, {"input_ids": ids, "labels": make_labels(ids)})
        expected = smoothed(model(ids).logits, make_labels(ids), shift=False)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


REMOTE = """
import sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from peft import LoraConfig, get_peft_model

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "modeling_rebased" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
inputs = torch.load(folder + "/inputs.pt", weights_only=True)
arguments = TrainingArguments(folder + "/out", label_smoothing_factor=0.1, use_cpu=True, report_to=[])
losses = []
for adapted in (False, True):
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    losses.append(Trainer(model, arguments).compute_loss(model, dict(inputs)).detach())
torch.save(losses, folder + "/losses.pt")
"""


def test_label_smoothing_of_a_checkpoints_own_code(tmp_path):
    """In a process that has not imported the package. A fresh adapter changes nothing."""
    model, ids = make_model("paper"), make_ids()
    model.save_pretrained(tmp_path)
    torch.save({"input_ids": ids, "labels": make_labels(ids)}, tmp_path / "inputs.pt")
    script = tmp_path / "remote.py"
    script.write_text(REMOTE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = run_python(script, tmp_path, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = smoothed(model(ids).logits, make_labels(ids))
    for loss in torch.load(tmp_path / "losses.pt", weights_only=True):
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("task", "auto_class"),
    [
        ("text-generation", AutoModelForCausalLM),
        ("text-classification", AutoModelForSequenceClassification),
        ("token-classification", AutoModelForTokenClassification),
    ],
)
def test_pipelines_and_cards_know_the_heads(tmp_path, caplog, task, auto_class):
    model = auto_class.from_config(make_config("paper", vocab_size=300, pad_token_id=257))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert pipeline(task, str(tmp_path), trust_remote_code=True)("a text")
    assert "is not supported" not in caplog.text
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    assert TrainingSummary.from_trainer(Trainer(model, arguments)).tasks == task
