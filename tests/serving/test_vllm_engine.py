"""vLLM's engine with ReBased models, against transformers' `generate` one prompt at a time, in float32 on a CPU."""

import pytest


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
