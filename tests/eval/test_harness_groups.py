"""The groups over lm-eval's own tasks, run offline on tiny data in each data set's schema."""

from pathlib import Path

import pytest
import torch

from modeling_rebased.eval.tasks import tasks_path


datasets = pytest.importorskip("datasets")
lm_eval = pytest.importorskip("lm_eval")

LETTERS = ["A", "B", "C", "D"]
ARC_ROWS = [
    {
        "id": str(i),
        "question": f"Which of these is number {i}?",
        "choices": {"text": [f"{i + j} things" * (j + 1) for j in range(4)], "label": LETTERS},
        "answerKey": LETTERS[i % 4],
    }
    for i in range(5)
]
RECALL_ROWS = [{"text": f" The name of plant {i} is moss {i}. The name is ", "value": f" moss {i} "} for i in range(3)]
# By (path, name), each with the splits its task reads.
LOCAL = {
    ("EleutherAI/lambada_openai", "default"): {
        "test": [{"text": f"The cat saw the cat number {i}"} for i in range(4)]
    },
    ("Rowan/hellaswag", None): {
        "train": [],
        "validation": [
            {
                "activity_label": "Sewing",
                "ctx_a": "A person sits.",
                "ctx_b": "the person",
                "ctx": "A person sits. the person",
                "endings": ["sews [step] on.", f"runs away {i} times.", "is", "flies over the house and away."],
                "label": "2",  # the shortest: the likeliest as it stands, not once lengths are divided out
            }
            for i in range(6)
        ],
    },
    ("baber/piqa", None): {
        "train": [],
        "validation": [
            {"goal": f"Open door {i}", "sol1": "push it", "sol2": "eat it slowly", "label": i % 2} for i in range(6)
        ],
    },
    ("allenai/ai2_arc", "ARC-Easy"): {"train": ARC_ROWS, "validation": ARC_ROWS, "test": ARC_ROWS},
    ("allenai/ai2_arc", "ARC-Challenge"): {"train": ARC_ROWS, "validation": ARC_ROWS, "test": ARC_ROWS},
    ("allenai/winogrande", "winogrande_xl"): {
        "train": [],
        "validation": [
            {
                "sentence": f"The dog bit the cat because the _ was angry {i}.",
                "option1": "dog",
                "option2": "cat",
                "answer": str(i % 2 + 1),
            }
            for i in range(5)
        ],
    },
    ("hazyresearch/based-swde-v2", "default"): {"validation": RECALL_ROWS},
    ("hazyresearch/based-fda", "default"): {"validation": RECALL_ROWS},
    ("hazyresearch/based-squad", "default"): {"validation": RECALL_ROWS},
}


@pytest.fixture(scope="module")
def language_model():
    """A tiny random model over bytes, through lm-eval's own wrapper."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.initializer_range = 0.5
    return HFLM(pretrained=LlamaForCausalLM(config).eval(), tokenizer=fast, batch_size=8, device="cpu")


@pytest.fixture
def local_data(monkeypatch):
    asked = []

    def load_dataset(path, name=None, **kwargs):
        asked.append(path)
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(rows or LOCAL[path, name]["validation"])
                for split, rows in LOCAL[path, name].items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture(scope="module")
def manager():
    """Ours and those of lm-eval's own tasks that ours refer to: an index of them all takes fifteen seconds."""
    from lm_eval import tasks

    folders = ["lambada", "hellaswag", "piqa", "arc", "winogrande", "swde", "fda", "squad_completion"]
    theirs = Path(tasks.__file__).parent
    return tasks.TaskManager(
        include_path=[tasks_path(), *(str(theirs / folder) for folder in folders)], include_defaults=False
    )


def run(language_model, manager, tasks: list[str]):
    return lm_eval.simple_evaluate(model=language_model, tasks=tasks, task_manager=manager, bootstrap_iters=0)


SCORE = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
}


def test_zeroshot_repeats_the_harness_and_averages_the_papers_metrics(language_model, manager, local_data):
    ours = run(language_model, manager, ["rebased_zeroshot"])["results"]
    theirs = run(language_model, manager, list(SCORE))["results"]
    scores = []
    for task, metric in SCORE.items():
        scores.append(ours[task]["score,none"])
        assert scores[-1] == theirs[task][f"{metric},none"]
        for name, value in theirs[task].items():
            if name.endswith(",none") and "stderr" not in name:
                assert ours[task][name] == value, (task, name)
    assert ours["rebased_zeroshot"]["score,none"] == pytest.approx(sum(scores) / 6)
    assert 0 < ours["rebased_zeroshot"]["score,none"] < 1
    # the two metrics of a task must differ somewhere, else the choice between them is not tested
    assert theirs["hellaswag"]["acc,none"] != theirs["hellaswag"]["acc_norm,none"]
    assert len(local_data) == 12


def test_recall_averages_its_three_tasks(language_model, manager, local_data, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    # The random model never says the answer; these three texts say it in 3, 2 and 1 of the documents.
    def generate(self, requests, **kwargs):
        right = {"swde": 3, "fda": 2, "squad_completion": 1}
        return [f"it is MOSS {r.doc_id}" if r.doc_id < right[r.task_name] else "it is not" for r in requests]

    monkeypatch.setattr(HFLM, "generate_until", generate)
    results = run(language_model, manager, ["rebased_recall"])["results"]
    assert results["swde"]["contains,none"] == 1
    assert results["rebased_recall"]["contains,none"] == pytest.approx(2 / 3)
    assert local_data == ["hazyresearch/based-swde-v2", "hazyresearch/based-fda", "hazyresearch/based-squad"]


def test_recall_generates_with_a_real_model(language_model, manager, local_data):
    results = run(language_model, manager, ["rebased_recall"])["results"]
    assert results["rebased_recall"]["contains,none"] == 0


def test_validate_finds_every_group(manager, monkeypatch, capsys):
    """`lm-eval validate` as the command line runs it, over the index made above."""
    from lm_eval import tasks
    from lm_eval.__main__ import cli_evaluate

    asked = []

    def indexed(include_path=None, **kwargs):
        asked.append(include_path)
        return manager

    monkeypatch.setattr(tasks, "TaskManager", indexed)
    groups = "mqar,mqar_pairs,rebased_zeroshot,rebased_recall"
    monkeypatch.setattr("sys.argv", ["lm-eval", "validate", "--tasks", groups, "--include_path", tasks_path()])
    cli_evaluate()
    assert "All tasks found and valid" in capsys.readouterr().out
    assert asked == [tasks_path()]
