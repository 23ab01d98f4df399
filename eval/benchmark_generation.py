# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Time one decoding step of the attention, and training and generation end to end, against the softmax twin.

    python -m modeling_rebased.eval.benchmark_generation --output eval/results/generation/h100

Writes three tables to the output folder:

    decode.csv        time of the one-token kernel by batch size, and of moving its state at the copy bandwidth
    training.csv      tokens per second of a training step of the 150m-rebased and 150m-softmax configurations
    generation.csv    tokens per second and peak memory of greedy steps after a context

A training step is the forward and backward pass of the loss in bfloat16, without an optimizer. It is timed as it is
and with torch.compile of each layer. Generation uses one batch size for both models and a compiled static cache. The
context is fed in pieces.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from transformers import StaticCache

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM

from .timing import median_ms, write_csv


ROOT = Path(__file__).resolve().parents[1] / "configuration"
MODELS = ("150m-rebased", "150m-softmax")


def load(name: str, length: int) -> ReBasedForCausalLM:
    """Return a model with random bfloat16 weights on the GPU, with positions up to `length`."""
    config = ReBasedConfig.from_pretrained(ROOT / name, kernel_backend="triton")
    config.max_position_embeddings = max(config.max_position_embeddings, length)
    with torch.device("cuda"):
        return ReBasedForCausalLM(config).bfloat16()


def decode_table(rows: list[dict], heads: int, feature_dim: int, head_dim: int) -> None:
    """Time the one-token kernel inside a CUDA graph, over so many states that none stays in the GPU's cache."""
    from triton.testing import do_bench

    from modeling_rebased.attention_rebased import rebased_attention_decode
    from modeling_rebased.configuration_rebased import n_features

    x = torch.empty(2**28, device="cuda")
    y = torch.randn_like(x)
    bandwidth = 2 * x.nbytes / do_bench(lambda: x.copy_(y), return_mode="median")
    for batch in (1, 8, 64, 256):
        q, k = (torch.randn(batch, 1, heads, feature_dim, device="cuda").bfloat16() for _ in range(2))
        v = torch.randn(batch, 1, heads, head_dim, device="cuda").bfloat16()
        shape = (batch, heads, n_features(feature_dim), head_dim + 1)
        states = [torch.rand(shape, device="cuda") for _ in range(8 if batch < 256 else 3)]

        def step(q=q, k=k, v=v, states=states) -> None:
            for state in states:
                rebased_attention_decode(q, k, v, state, backend="triton")

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        us = 1e3 * do_bench(graph.replay, return_mode="median") / len(states)
        rows.append({"batch": batch, "us": us, "floor_us": 1e3 * 2 * states[0].nbytes / bandwidth})
        print(f"decode      batch {batch:4d}  {us:7.1f} us, state read and written once {rows[-1]['floor_us']:.1f} us")


def training_table(rows: list[dict], tokens: int, lengths: list[int]) -> None:
    """Append the tokens per second of a training step at each length to `rows`."""
    for length, compiled, name in product(lengths, (False, True), MODELS):
        model = load(name, length).train()
        if compiled:
            torch.compiler.reset()
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        ids = torch.randint(model.config.vocab_size, (max(1, tokens // length), length), device="cuda")

        def step(model=model, ids=ids) -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        rate = ids.numel() / median_ms(step, 5) * 1e3
        rows.append({"model": name, "T": length, "compiled": compiled, "tokens_per_s": rate})
        print(f"training    {name:14s} T {length:6d}  compiled {compiled!s:5s}  {rate:10.0f} tokens/s", flush=True)
        del model, step
        gc.collect()
        torch.cuda.empty_cache()


def compiled_step(model: ReBasedForCausalLM, cache: StaticCache) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return one greedy step as generate() runs it with a static cache: compiled, in a CUDA graph."""

    def step(token: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        return logits[:, -1:].argmax(-1)

    compiled = torch.compile(step, mode="reduce-overhead")

    def run(token: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token).clone()  # the graph's own memory is written again in the next step

    return run


@torch.no_grad()
def generation_table(rows: list[dict], batch: int, contexts: list[int], steps: int, piece: int) -> None:
    """Append the tokens per second and the peak memory of greedy steps after each context to `rows`."""
    for context in contexts:
        for name in MODELS:
            torch.cuda.reset_peak_memory_stats()
            length = context + 8 * steps
            model = load(name, length).eval()
            cache = step = None
            try:
                cache = StaticCache(model.config, max_cache_len=length)
                for start in range(0, context, piece):
                    size = min(piece, context - start)
                    ids = torch.randint(model.config.vocab_size, (batch, size), device="cuda")
                    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                step, token = compiled_step(model, cache), output.logits[:, -1:].argmax(-1)
                for _ in range(steps):  # compiles, then records the graph
                    token = step(token)

                def generate(step=step, token=token) -> None:
                    for _ in range(steps):
                        token = step(token)

                rate = batch * steps / median_ms(generate, 3) * 1e3
                memory = torch.cuda.max_memory_allocated() / 2**30
            except torch.cuda.OutOfMemoryError:
                rate, memory = float("nan"), float("nan")
            rows.append({"model": name, "batch": batch, "context": context, "tokens_per_s": rate, "peak_gib": memory})
            print(f"generation  {name:14s} context {context:6d}  {rate:8.0f} tokens/s  {memory:6.2f} GiB", flush=True)
            del model, cache, step
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()


def main() -> None:
    """Make the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a training step")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 16384])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--contexts", type=int, nargs="*", default=[2048, 32768])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--piece", type=int, default=2048, help="tokens of the context fed at once")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark is for GPUs, and torch sees none here.")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    tables = {"decode": [], "training": [], "generation": []}
    try:
        decode_table(tables["decode"], 12, 16, 64)
        training_table(tables["training"], arguments.tokens, arguments.lengths)
        generation_table(tables["generation"], arguments.batch, arguments.contexts, arguments.steps, arguments.piece)
    finally:  # also what there is when it is interrupted
        for name, rows in tables.items():
            if arguments.output is not None and rows:
                write_csv(rows, arguments.output / f"{name}.csv")


if __name__ == "__main__":
    main()
