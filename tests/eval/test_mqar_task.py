"""The `mqar` tasks of lm-eval give the same accuracy, to the last digit, as the direct evaluation."""

from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from modeling_rebased.eval.tasks import tasks_path
from modeling_rebased.training import mqar


pytest.importorskip("lm_eval")

TASKS = Path(tasks_path())


class LookupConfig(PretrainedConfig):
    model_type = "lookup_for_test"

    def __init__(self, vocab_size: int = 8192, max_position_embeddings: int = 2048, **kwargs):
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        super().__init__(**kwargs)


class LookupModel(PreTrainedModel):
    """Answers with the token after the current one's first occurrence, but is wrong about every third value."""

    config_class = LookupConfig
    base_model_prefix = ""

    def __init__(self, config: LookupConfig):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.lm_head.weight)
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, labels=None, **kwargs) -> CausalLMOutput:
        self.calls += 1
        logits = torch.randn(*input_ids.shape, self.config.vocab_size, generator=torch.Generator().manual_seed(0))
        for b, row in enumerate(input_ids.tolist()):
            first: dict[int, int] = {}
            for t, token in enumerate(row):
                seen = first.setdefault(token, t)
                answer = row[seen + 1] if seen < t else 0
                logits[b, t, answer if answer % 3 else (answer + 1) % self.config.vocab_size] += 30
        return CausalLMOutput(logits=logits)

    @property
    def base_model(self):
        return lambda **kwargs: BaseModelOutput(last_hidden_state=self(**kwargs).logits)

    def get_output_embeddings(self):
        return torch.nn.Identity()


def harness_accuracy(model, tokenizer, task: str, metadata: dict, batch_size: int = 8) -> dict[str, float]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    results = simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return {name: values["acc,none"] for name, values in (results["results"] | results.get("groups", {})).items()}


def test_harness_and_direct_evaluation_agree_to_the_digit():
    model, tokenizer = LookupModel(LookupConfig()), mqar.build_tokenizer()
    metadata = {"num_examples": 6, "queries": 5, "seed": 3}
    harness = harness_accuracy(model, tokenizer, "mqar_pairs", metadata)
    direct = []
    for pairs in (4, 8, 16, 32, 64):
        spec = mqar.MQARSpec(256, pairs)
        examples = mqar.make_examples(spec, 6, seed=3, split="test")
        queries = mqar.query_subset(spec, 6, 5, seed=3)
        direct.append(mqar.accuracy(model, examples, queries=queries, batch_size=4))
        assert harness[f"mqar_256_{pairs}"] == direct[-1]
    assert harness["mqar_pairs"] == pytest.approx(sum(direct) / 5)
    assert 0.4 < harness["mqar_pairs"] < 0.9  # the model is wrong about a third, so agreement says something


def test_a_rebased_model_scores_the_same_both_ways(tmp_path):
    """Through the model's own folder, as a user runs it: random weights, biased to answer 5 values only."""
    modeling_rebased = pytest.importorskip("modeling_rebased")
    torch.manual_seed(0)
    config = modeling_rebased.ReBasedConfig(
        vocab_size=8192,
        hidden_size=24,
        num_hidden_layers=2,
        layer_types=["conv", "linear_attention"],
        num_attention_heads=2,
        mlp_type="none",
        position_embedding_type="learned",
        max_position_embeddings=256,
        initializer_range=1.0,
    )
    model = modeling_rebased.ReBasedForCausalLM(config).eval()
    tokenizer = mqar.build_tokenizer(model_max_length=256)
    spec = mqar.MQARSpec(256, 8)
    examples = mqar.make_examples(spec, 6, split="test")
    # Make the model right about some: the values it answers become the right ones, in its output weights.
    hidden = model.model(input_ids=examples.input_ids()).last_hidden_state.detach()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for n in range(6):
        answer = hidden[n, examples.positions[n, 0].long()]
        model.lm_head.weight.data[examples.values[n, 0].long()] = 5 * answer
    harness = harness_accuracy(model, tokenizer, "mqar_256_8", {"num_examples": 6, "queries": 8})
    direct = mqar.accuracy(model, examples)
    assert harness["mqar_256_8"] == direct
    assert 0 < direct < 1


@pytest.mark.parametrize("file", sorted(path.name for path in TASKS.glob("mqar_*_*.yaml")))
def test_a_file_is_the_task_its_name_says(file):
    from lm_eval.tasks import TaskManager

    task_name = file.removesuffix(".yaml")
    length, pairs = map(int, task_name.split("_")[1:])
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"num_examples": 2, "queries": 3})
    task = manager.load([task_name])["tasks"][task_name]
    docs = list(task.test_docs())
    assert len(docs) == 6
    assert (task.config.metadata["length"], task.config.metadata["num_pairs"]) == (length, pairs)
    text = docs[0]["text"].split()
    assert 2 * pairs < len(text) <= length and text[-1] in text[0 : 2 * pairs : 2]
    assert docs[0]["value"] == text[text.index(text[-1]) + 1]


def test_figure_1_is_the_group():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"num_examples": 1, "queries": 1})
    names = set(manager.load(["mqar"])["tasks"])
    assert names == {f"mqar_{length}_{pairs}" for length, pairs in mqar.FIGURE_1_PAIRS.items()}


def test_two_processes_ask_every_query_once():
    """What each process of `accelerate launch` gets, and that it makes the same documents without a word."""
    from lm_eval.tasks import TaskManager

    def documents(rank: int, world_size: int) -> list[tuple[int, str]]:
        metadata = {"num_examples": 5, "queries": 3}
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
        task = manager.load(["mqar_256_8"])["tasks"]["mqar_256_8"]
        return [(i, doc["text"]) for i, doc in task.doc_iterator(rank=rank, world_size=world_size)]

    parts = [documents(rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [8, 7]
    assert sorted(parts[0] + parts[1]) == sorted(documents(0, 1))


@pytest.mark.parametrize(
    ("task", "option"), [("mqar_128_16", "vocab_size"), ("mad_recall", "vocab_size"), ("icll", "symbols")]
)
def test_a_task_of_other_words_than_the_models_is_refused(task, option, tmp_path):
    from lm_eval.tasks import TaskManager

    mqar.build_tokenizer(8).save_pretrained(tmp_path)
    model = {"pretrained": str(tmp_path), "num_examples": 1, "queries": 1}

    def load(**sizes: int) -> None:
        metadata = model | sizes
        TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load([task])

    with pytest.raises(ValueError, match=rf"\d+ words and the tokenizer of .* only 8, without '8'.*'{option}'"):
        load()
    if task == "mqar_128_16":
        load(length=16, num_pairs=2, vocab_size=8)


def test_the_shipped_checkpoint_recalls_at_its_length():
    """From its folder, with the code that lies there, both ways: 0.99 or more, and the same to the digit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "mqar-d128"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = mqar.figure_1_spec(256)
    examples = mqar.make_examples(spec, 16, split="test")
    queries = mqar.query_subset(spec, 16, 8)
    direct = mqar.accuracy(model, examples, queries=queries, batch_size=8)
    harness = harness_accuracy(model, tokenizer, "mqar_256_64", {"num_examples": 16, "queries": 8})
    assert harness["mqar_256_64"] == direct
    assert direct >= 0.99
    assert mqar.accuracy(model, examples, batch_size=8) >= 0.99


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_kernel_backend_can_be_chosen_in_model_args(backend):
    from lm_eval.models.huggingface import HFLM

    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "mqar-d128"
    lm = HFLM(pretrained=str(folder), trust_remote_code=True, kernel_backend=backend, dtype="float32", device="cpu")
    assert lm.model.config.kernel_backend == lm.model.model.layers[1].self_attn.backend == backend
