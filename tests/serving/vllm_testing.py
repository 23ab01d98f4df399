"""What the tests of the vLLM plug-in share: small models, prompts, and transformers' answers one by one."""

import contextlib
import gc
import os
from pathlib import Path

import torch

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM


ENGLISH = Path(__file__).resolve().parents[2] / "checkpoints" / "english-6m"
# In this process, offline, with little memory, and without a word to anybody.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}

COMMON = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "feature_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
# Every kind of layer, kernel, norm, position and MLP appears. vLLM's attention on a CPU starts at a head_dim of 32.
MODELS = {
    "paper": {
        "layer_types": ["conv", "linear_attention"] * 2,
        "position_embedding_type": "learned",
        "mlp_type": "none",
        "head_dim": 10,
        "feature_dim": 5,
    },
    "based": {
        "layer_types": ["conv", "linear_attention", "sliding_attention", "conv", "linear_attention"],
        "kernel": "based",
        "conv_type": "gated",
        "conv_kernel_size": 4,
        "num_key_value_heads": 2,
        "norm_type": "rmsnorm",
        "mlp_type": "swiglu",
        "position_embedding_type": "rope",
        "sliding_window": 9,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
    },
    "norm-by-head": {
        "layer_types": ["linear_attention", "conv", "full_attention", "conv", "linear_attention", "conv"],
        "qk_norm_scope": "head",
        "qk_norm_shared": True,
        "conv_bias": False,
        "conv_kernel_size": 2,
        "attention_bias": True,
        "softmax_qk_norm": True,
        "position_embedding_type": "rope",
        "rope_linear_attention": True,
        "feature_dim": 16,
    },
    "hybrid-window": {
        "layer_types": ["conv", "hybrid_sliding", "full_attention", "hybrid_sliding"],
        "num_key_value_heads": 2,
        "sliding_window": 16,
        "position_embedding_type": "rope",
    },
    "convolutions": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "linear-only": {"layer_types": ["linear_attention"] * 2, "kernel_coefficients": [1, 0, 0.5]},
    "windows": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "position_embedding_type": "rope",
        "sliding_window": 5,
    },
    "softmax": {"layer_types": ["full_attention"] * 2, "position_embedding_type": "rope"},
}


def save_model(name: str, folder: Path, **changes) -> Path:
    """Write a random model whose every part matters, without a tokenizer."""
    config = ReBasedConfig(
        **(COMMON | {"num_hidden_layers": len(MODELS[name]["layer_types"])} | MODELS[name] | changes)
    )
    torch.manual_seed(len(name))
    model = ReBasedForCausalLM(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "gate" in parameter_name.split("."):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def random_prompts(lengths: list[int], vocab_size: int) -> list[list[int]]:
    """Prompts of these lengths. Ids start at 1."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def generate_one_by_one(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What transformers' `generate` answers greedily in float32, each prompt alone."""
    model = ReBasedForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            eos_token_id=-1,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@contextlib.contextmanager
def engine(folder: Path, **options):
    """An `LLM` in this process, and its end."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    threads = torch.get_num_threads()
    llm = LLM(str(folder), **({"dtype": "float32", "enforce_eager": True, "disable_log_stats": False} | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
        torch.set_num_threads(threads)


def greedy(llm, prompts: list[list[int]], new_tokens: int, **options) -> list[list[int]]:
    """vLLM's greedy answers to all prompts at once."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **options)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm, name: str) -> float:
    """The sum of one of vLLM's own counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)
