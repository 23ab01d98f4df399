"""vLLM's engine with ReBased models, against transformers' `generate` one prompt at a time, in float32 on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch


pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment that has it")


from tests.serving import vllm_testing as testing


NEW_TOKENS = 24


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    """64 lengths from 1 to 600."""
    return sorted({1, 2, 3, 127, 128, 129, 256, 600, *(round(1 + 599 * (i / 55) ** 2) for i in range(56))})[:64]


@pytest.fixture(scope="module")
def english(lengths):
    """Prompts for english-6m, pieces of English text, and transformers' answers."""
    text = (testing.ENGLISH / "README.md").read_bytes() + (testing.ENGLISH.parents[1] / "README.md").read_bytes()
    prompts = [list(text[7 * i : 7 * i + length]) for i, length in enumerate(lengths)]
    while len(prompts) < 64:
        prompts.append(list(text[len(prompts) : 3 * len(prompts)]))
    return prompts, testing.generate_one_by_one(testing.ENGLISH, prompts, NEW_TOKENS)


@pytest.mark.parametrize("name", sorted(testing.MODELS))
def test_small_models(name, tmp_path):
    """Greedy tokens are those of transformers, with prompts cut into chunks of at most 48 tokens."""
    folder = testing.save_model(name, tmp_path / name)
    prompts = testing.random_prompts([1, 2, 3, 30, 47, 48, 49, 96, 130, 200], 200)
    expected = testing.generate_one_by_one(folder, prompts, NEW_TOKENS)
    assert len({tuple(answer) for answer in expected}) == len(prompts)  # the prompts matter
    with testing.engine(
        folder, skip_tokenizer_init=True, max_num_batched_tokens=48, max_num_seqs=16, enable_prefix_caching=False
    ) as llm:
        assert testing.greedy(llm, prompts, NEW_TOKENS) == expected


def test_sixty_four_prompts_at_once(english):
    """Greedy tokens of 64 prompts in one call are those of transformers one by one; prompts go in pieces of 256."""
    prompts, expected = english
    options = {"max_num_batched_tokens": 256, "max_num_seqs": 64, "enable_prefix_caching": False}
    with testing.engine(testing.ENGLISH, max_model_len=1024, **options) as llm:
        assert testing.greedy(llm, prompts, NEW_TOKENS) == expected
        assert testing.metric(llm, "vllm:kv_cache_usage_perc") == 0
        _check_logprobs(llm, prompts[:6] + prompts[-2:])
        _check_seeds(llm, prompts[4:8])
        _check_that_a_stop_frees_the_slot(llm, prompts[30])


def _check_logprobs(llm, prompts):
    """Log-probabilities of prompts and of new tokens are those of transformers' whole forward."""
    from vllm import SamplingParams

    model = testing.ReBasedForCausalLM.from_pretrained(testing.ENGLISH, dtype=torch.float32).eval()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=0)
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        given = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for i, candidates in enumerate(given):
            for token, candidate in candidates.items():
                assert candidate.logprob == pytest.approx(expected[i, token].item(), abs=2e-4)
        assert all(len(candidates) >= 3 for candidates in output.outputs[0].logprobs)


def _check_seeds(llm, prompts):
    """A seed gives the same sample alone as among others; another seed gives another.

    The prompts are short: vLLM 0.32 on a CPU fails where a prompt with a seed is cut into pieces.
    """
    from vllm import SamplingParams

    def sample(requests: list[tuple[list[int], int]]) -> list[tuple[int, ...]]:
        params = [SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True, seed=s) for _, s in requests]
        outputs = llm.generate([{"prompt_token_ids": p} for p, _ in requests], params, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    together = sample([(prompt, seed) for prompt in prompts for seed in (1, 2)])
    assert together[::2] == [sample([(prompt, 1)])[0] for prompt in prompts]
    assert all(one != two for one, two in zip(together[::2], together[1::2]))


def _check_that_a_stop_frees_the_slot(llm, prompt):
    """A request that is aborted, or ends at a stop word, in the middle of its answer gives its page back."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.add_request("aborted", {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=300))
    for _ in range(5):
        engine.step()
    assert testing.metric(llm, "vllm:kv_cache_usage_perc") > 0
    engine.abort_request(["aborted"])
    while engine.has_unfinished_requests():
        engine.step()
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, stop=" ")
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    testing.greedy(llm, [prompt], 2)  # vLLM counts the pages in use at the end of a step
    assert testing.metric(llm, "vllm:kv_cache_usage_perc") == 0


def test_sequences_are_preempted_and_resumed(tmp_path):
    """With memory for a few requests only, some are thrown out in the middle and start again, to the same end."""
    folder = testing.save_model("norm-by-head", tmp_path / "model")
    prompts = testing.random_prompts([90, 100, 110, 120, 100, 90], 200)
    expected = testing.generate_one_by_one(folder, prompts, 160)
    options = {"skip_tokenizer_init": True, "max_num_seqs": 6, "enable_prefix_caching": False}
    with testing.engine(folder, num_gpu_blocks_override=20, **options) as llm:
        assert testing.greedy(llm, prompts, 160) == expected
        assert testing.metric(llm, "vllm:num_preemptions") > 0


def test_pages_that_states_have_left(tmp_path):
    """In bfloat16 the answers stay the same when keys and values come to lie where states were."""
    folder = testing.save_model("based", tmp_path / "model")
    prompts = testing.random_prompts([3, 20, 50, 70], 200)
    options = {"dtype": "bfloat16", "num_gpu_blocks_override": 20, "enable_prefix_caching": False}
    with testing.engine(folder, skip_tokenizer_init=True, **options) as llm:
        expected = testing.greedy(llm, prompts, NEW_TOKENS)
        assert len({tuple(answer) for answer in expected}) == len(prompts)
        for _ in range(4):
            assert testing.greedy(llm, prompts, NEW_TOKENS) == expected


@pytest.mark.parametrize("name", ["paper", "norm-by-head"])
def test_prefix_caching(name, tmp_path):
    """Prompts with a common beginning continue from cached states and give the same tokens as without."""
    folder = testing.save_model(name, tmp_path / "model")
    start = testing.random_prompts([300], 200)[0]
    prompts = [start + rest for rest in testing.random_prompts([1, 5, 40, 100], 200)] + [start[:290]]
    expected = testing.generate_one_by_one(folder, prompts, NEW_TOKENS)
    with testing.engine(folder, skip_tokenizer_init=True, enable_prefix_caching=True) as llm:
        for _ in range(2):
            assert [testing.greedy(llm, [prompt], NEW_TOKENS)[0] for prompt in prompts] == expected
            assert testing.greedy(llm, prompts, NEW_TOKENS) == expected
        assert testing.metric(llm, "vllm:prefix_cache_hits") >= 4 * 128


def test_compiled(tmp_path):
    """The model is traced by torch.compile, as on a GPU; the states' operations stay outside."""
    folder = testing.save_model("norm-by-head", tmp_path / "model")
    prompts = testing.random_prompts([1, 30, 100], 200)
    expected = testing.generate_one_by_one(folder, prompts, NEW_TOKENS)
    with testing.engine(folder, skip_tokenizer_init=True, enforce_eager=False) as llm:
        assert testing.greedy(llm, prompts, NEW_TOKENS) == expected


@pytest.mark.parametrize(
    ("name", "changes", "options", "message"),
    [
        ("paper", {"conv_kernel_size": 5}, {}, "`conv_kernel_size` must be one of"),
        ("paper", {"decay": "gate"}, {}, "`decay` must be None"),
        ("softmax", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, {}, "`rope_type` of"),
        ("linear-only", {}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "`speculative"),
        ("paper", {"hidden_size": 63}, {"tensor_parallel_size": 2}, "must divide `hidden_size`"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(name, changes, options, message, tmp_path):
    folder = testing.save_model(name, tmp_path / "model", **changes)
    with pytest.raises(Exception, match=message), testing.engine(folder, skip_tokenizer_init=True, **options):
        pass


TENSOR_PARALLEL = """
import json
import sys
from pathlib import Path

from tests.serving import vllm_testing as testing

if __name__ == "__main__":
    folder, prompts, new_tokens = json.loads(sys.argv[1])
    testing.ENVIRONMENT |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    options = {"skip_tokenizer_init": True, "max_num_batched_tokens": 48, "max_num_seqs": 8}
    with testing.engine(Path(folder), tensor_parallel_size=2, enable_prefix_caching=False, **options) as llm:
        print("answer", json.dumps(testing.greedy(llm, prompts, new_tokens)))
"""


@pytest.mark.parametrize("name", ["based", "hybrid-window"])
def test_tensor_parallel(name, tmp_path):
    """Two processes share the heads and channels, and the states with them, and give the same tokens."""
    folder = testing.save_model(name, tmp_path / "model")
    prompts = testing.random_prompts([1, 3, 30, 100], 200)
    script = tmp_path / "two_processes.py"
    script.write_text(TENSOR_PARALLEL)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([str(folder), prompts, NEW_TOKENS])],
        cwd=testing.ENGLISH.parents[1],
        env={**os.environ, "PYTHONPATH": str(testing.ENGLISH.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert answers, done.stderr[-3000:]
    assert json.loads(answers[0].removeprefix("answer ")) == testing.generate_one_by_one(folder, prompts, NEW_TOKENS)
