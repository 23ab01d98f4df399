"""Time training and generation of whole models by the calls that users make, beside the softmax twin.

    python -m modeling_rebased.eval.benchmark_generation --output eval/results/generation/h100

Writes three tables to the output folder, and `models.png`, a picture of the last two:

    decode.csv        time of the one-token kernel by batch size, with states in the order of the rows and by random
                      slots, and of moving the states at the copy bandwidth
    training.csv      time, tokens per second and peak memory of a training step
    generation.csv    time per token and peak memory of `generate()`

A training step is `model(ids, labels=ids).loss.backward()` in training mode, in bfloat16, without an optimizer. It is
timed as it is and with torch.compile of each layer. The time per token is the difference of two calls of `generate()`
that write different numbers of tokens after the same context, so the context's own time is left out. The time of the
shorter call is in a column of its own. `generate()` has a dynamic cache, its default, or a static cache. With a static
cache it compiles its steps.

    python -m modeling_rebased.eval.benchmark_generation --cpu FOLDER ... --output eval/results/generation/cpu

times `generate()` on a CPU instead, and writes `cpu.csv`. Each FOLDER is a checkpoint, which is loaded with the code
that lies beside it, or a configuration, which gets random weights. The models take turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.values import count, new_folder

from .plots import plot_models
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

    def time_us(step: Callable[[], None], calls: int) -> float:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return 1e3 * do_bench(graph.replay, return_mode="median") / calls

    for batch in (1, 8, 64, 256, 1024):
        q, k = (torch.randn(batch, 1, heads, feature_dim, device="cuda").bfloat16() for _ in range(2))
        v = torch.randn(batch, 1, heads, head_dim, device="cuda").bfloat16()
        calls = 8 if batch < 256 else 3
        pool = torch.rand(calls * batch, heads, n_features(feature_dim), head_dim + 1, device="cuda")
        slots = torch.randperm(len(pool), device="cuda").int()

        def step(q=q, k=k, v=v, pool=pool, calls=calls) -> None:
            for state in pool.chunk(calls):
                rebased_attention_decode(q, k, v, state, backend="triton")

        def step_by_slot(q=q, k=k, v=v, pool=pool, slots=slots, calls=calls) -> None:
            for part in slots.chunk(calls):
                rebased_attention_decode(q, k, v, pool, state_indices=part, backend="triton")

        us, by_slot_us = time_us(step, calls), time_us(step_by_slot, calls)
        floor = 1e3 * 2 * pool.nbytes / calls / bandwidth
        rows.append({"batch": batch, "us": us, "by_slot_us": by_slot_us, "floor_us": floor})
        print(
            f"decode      batch {batch:4d}  {us:7.1f} us, by slot {by_slot_us:.1f} us, moving the state {floor:.1f} us"
        )


def training_table(rows: list[dict], tokens: int, lengths: list[int]) -> None:
    """Append the time, tokens per second and peak memory of a training step at each length to `rows`."""
    for length, compiled, name in product(lengths, (False, True), MODELS):
        model = load(name, length).train()
        if compiled:
            torch.compiler.reset()
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        ids = torch.randint(model.config.vocab_size, (max(1, tokens // length), length), device="cuda")

        def step(model=model, ids=ids) -> None:
            model(ids, labels=ids).loss.backward()
            model.zero_grad(set_to_none=True)

        step()
        torch.cuda.reset_peak_memory_stats()
        ms = median_ms(step, 7)
        row: dict[str, Any] = {
            "model": name,
            "T": length,
            "compiled": compiled,
            "ms": ms,
            "tokens_per_s": ids.numel() / ms * 1e3,
        }
        rows.append({**row, "peak_gib": torch.cuda.max_memory_allocated() / 2**30})
        print(f"training    {name:14s} T {length:6d} compiled {compiled!s:5s} {row['tokens_per_s']:8.0f} tokens/s")
        sys.stdout.flush()
        del model, step
        gc.collect()
        torch.cuda.empty_cache()


def time_generate(model: ReBasedForCausalLM, ids: torch.Tensor, steps: int, cache: str) -> dict[str, float]:
    """Return the milliseconds per token, of the context with the first 4 tokens, and the peak memory in GiB."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"

    def generate(tokens: int) -> None:
        text = model.generate(ids, max_new_tokens=tokens, **options)
        assert text.shape[1] == ids.shape[1] + tokens, "the model ended its text early"

    few, many = 4, 4 + steps
    torch.cuda.reset_peak_memory_stats()
    if cache == "static":  # the first call compiles, and the second records CUDA graphs
        generate(many)
        generate(many)
    short, long = median_ms(lambda: generate(few), 3), median_ms(lambda: generate(many), 3)
    per_token = (long - short) / steps
    return {
        "ms_per_token": per_token,
        "first_4_ms": short,
        "tokens_per_s": len(ids) / per_token * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def generation_table(rows: list[dict], batch: int, contexts: list[int], steps: int, caches: list[str]) -> None:
    """Append the figures of `time_generate` for each model, cache and context to `rows`."""
    for name, cache in product(MODELS, caches):
        model = load(name, max(contexts) + 2 * steps).eval()
        torch.compiler.reset()
        for context in contexts:
            ids = torch.randint(3, model.config.vocab_size, (batch, context), device="cuda")
            row = {"model": name, "cache": cache, "batch": batch, "context": context}
            try:
                row |= time_generate(model, ids, steps, cache)
            except torch.cuda.OutOfMemoryError:
                row |= dict.fromkeys(("ms_per_token", "first_4_ms", "tokens_per_s", "peak_gib"), float("nan"))
            rows.append(row)
            figures = (f"{key} {value:.2f}" if isinstance(value, float) else str(value) for key, value in row.items())
            print("generate()  " + "  ".join(figures), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def cpu_table(rows: list[dict], folders: list[Path], rounds: int, steps: int) -> None:
    """Append the time per token of sampling at batch 1 in float32 by one thread of a CPU to `rows`."""
    torch.set_num_threads(1)
    models = []
    for folder in folders:
        if any(folder.glob("*.safetensors")):
            # AutoModelForCausalLM would take the code of this package for every checkpoint.
            code = get_class_from_dynamic_module("modeling_rebased.ReBasedForCausalLM", str(folder))
            models.append(code.from_pretrained(folder, dtype=torch.float32).eval())
        else:
            models.append(ReBasedForCausalLM(ReBasedConfig.from_pretrained(folder)).eval())
    ids = torch.arange(97, 113)[None]
    times: list[list[float]] = [[] for _ in models]
    for _, (model, taken) in product(range(rounds), list(zip(models, times))):
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=True)
        taken.append(1e3 * (time.perf_counter() - start) / steps)
    for folder, taken in zip(folders, times):
        figures = {"min_ms": min(taken), "median_ms": statistics.median(taken), "tokens_per_s": 1e3 / min(taken)}
        rows.append({"model": folder.name, "calls": rounds, "tokens": steps, **figures})
        print("generate()  " + "  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)


def main() -> None:
    """Make the three tables, or the one of a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=new_folder, help="folder for the results")
    parser.add_argument("--tokens", type=count, default=32768, help="tokens of a training step")
    parser.add_argument("--lengths", type=count, nargs="*", default=[2048, 16384], help="tokens of a sequence")
    parser.add_argument(
        "--batches", type=count, nargs="*", default=[1, 64], help="sequences that are generated at once"
    )
    parser.add_argument("--contexts", type=count, nargs="*", default=[128, 2048, 32768, 131072], help="of batch 1")
    parser.add_argument("--batch-contexts", type=count, nargs="*", default=[128, 2048], help="of larger batches")
    parser.add_argument(
        "--caches", nargs="*", default=["static", "dynamic"], choices=["static", "dynamic"], help="kinds of cache"
    )
    parser.add_argument("--steps", type=count, default=128, help="tokens that generate() writes")
    parser.add_argument("--cpu", type=Path, nargs="+", metavar="FOLDER", help="models to time on a CPU instead")
    parser.add_argument("--rounds", type=count, default=20, help="calls per model on a CPU")
    arguments = parser.parse_args(with_dashes())
    if arguments.cpu:
        if missing := [folder for folder in arguments.cpu if not (folder / "config.json").is_file()]:
            parser.error(f"--cpu: {missing[0]} is no folder of a model: it has no config.json")
        rows: list[dict] = []
        cpu_table(rows, arguments.cpu, arguments.rounds, arguments.steps)
        if arguments.output is not None:
            write_csv(rows, arguments.output / "cpu.csv")
        return
    if not torch.cuda.is_available():
        sys.exit("This benchmark is for GPUs, and torch sees none here.")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    tables: dict[str, list] = {"decode": [], "training": [], "generation": []}
    try:
        decode_table(tables["decode"], 12, 16, 64)
        training_table(tables["training"], arguments.tokens, arguments.lengths)
        for batch in arguments.batches:
            contexts = arguments.contexts if batch == 1 else arguments.batch_contexts
            generation_table(tables["generation"], batch, contexts, arguments.steps, arguments.caches)
    finally:  # also what there is when it is interrupted
        for name, rows in tables.items():
            if arguments.output is not None and rows:
                write_csv(rows, arguments.output / f"{name}.csv")
        if arguments.output is not None and tables["generation"]:
            plot_models(tables["training"], tables["generation"], arguments.output / "models.png")


if __name__ == "__main__":
    main()
