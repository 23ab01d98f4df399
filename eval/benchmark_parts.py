"""Say where the time of a call goes on a GPU: the parts of a step of `generate()`, of short calls, and of first calls.

    python -m modeling_rebased.eval.benchmark_parts --output eval/results/generation/h200

Writes these tables, of models of 150 million parameters in bfloat16:

    steps.csv          the parts of a step of `generate()` with a static and a dynamic cache: milliseconds of the host
                       by function, milliseconds of the GPU by kind of kernel, and the step with parts left out
    calls.csv          calls with prompts of different lengths and a static cache: time, and CUDA graphs so far
    first.csv          seconds of the first training step and the first prefill, with empty and with filled caches
    first-kernels.csv  seconds that the compilers of Triton and of C took for each of their kernels, by stage

A first call runs in a process of its own, with an empty folder for compiled kernels, and again with that folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial, wraps
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from transformers.generation import utils
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_rebased import ReBasedForCausalLM
from modeling_rebased.cache_rebased import CACHE_NAME
from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.values import count, new_folder

from .benchmark_generation import MODELS, load
from .timing import median_ms, write_csv


TABLES = ("steps", "calls", "first")
FEW = 4  # tokens of the shorter of two calls
KINDS = {  # kinds of kernels, by what stands in their names
    "one token of attention": ("decode_kernel",),
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk"),
    "softmax attention": ("flash", "fmha", "sdpa"),
    "compiled norms, convolution and activations": ("triton_",),
    "sums and the largest logit": ("reduce_kernel",),
    "copies of memory": ("memcpy", "memset"),
}
HOST = "host: "
GPU = "GPU: "


class Generation:
    """Call `generate()`, greedy, and time its parts.

    Args:
        model: generates.
        batch, context: rows and tokens of the prompt.
        steps: by which the longer of two calls is longer; their difference counts.
        repeats: calls of each length, of which the median counts.
        options: more arguments of `generate()`.
    """

    def __init__(
        self, model: ReBasedForCausalLM, batch: int, context: int, steps: int, repeats: int = 5, **options: Any
    ):
        self.model, self.batch, self.steps, self.repeats = model, batch, steps, repeats
        self.options = {"do_sample": False, "pad_token_id": 0, **options}
        self.ids = torch.randint(3, model.config.vocab_size, (batch, context), device=model.device)

    def __call__(self, tokens: int, minimum: bool = False) -> torch.Tensor:
        """Return the ids of the prompt and of `tokens` new tokens, with `min_new_tokens` or without."""
        least = {"min_new_tokens": tokens} if minimum else {}
        ids = self.model.generate(self.ids, max_new_tokens=tokens, **least, **self.options)
        assert ids.shape[1] == self.ids.shape[1] + tokens, "the model ended its text early"
        return ids

    def step_ms(self, minimum: bool = False) -> float:
        """Return the milliseconds of a step."""
        short, long = (median_ms(partial(self, n, minimum), self.repeats) for n in (FEW, FEW + self.steps))
        return (long - short) / self.steps

    def host_parts(self) -> dict[str, float]:
        """Return the milliseconds of a step that the host spends in each function of `generate()`, and in all."""
        seconds: dict[str, float] = defaultdict(float)

        def timed(part: str, function: Callable) -> Callable:
            @wraps(function)  # whose signature `generate` reads
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    seconds[part] += time.perf_counter() - begin

            return wrapper

        model, forward = self.model, self.model.forward
        call, compiled_call = "call of the model", model.get_compiled_call
        functions: list[tuple[Any, str, Callable]] = [(model, "forward", timed(call, forward))]
        if "cache_implementation" in self.options:
            functions = [(model, "get_compiled_call", lambda config: timed(call, compiled_call(config)))]
        for thing, name, part in (
            (model, "prepare_inputs_for_generation", "preparing its inputs"),
            (model, "_update_model_kwargs_for_generation", "keeping its outputs"),
            (LogitsProcessorList, "__call__", "processing logits"),
            (StoppingCriteriaList, "__call__", "stopping criteria"),
            (utils.StopCheck, "__call__", "waiting for the GPU"),
            (utils.DeferredStopCheck, "__call__", "waiting for the GPU"),
        ):
            functions.append((thing, name, timed(part, getattr(thing, name))))
        calls = []
        with ExitStack() as stack:
            for change in functions:
                stack.enter_context(patch.object(*change))
            for tokens in (FEW, FEW, FEW + self.steps):  # the first call does not count
                seconds.clear()
                begin = time.perf_counter()
                self(tokens).cpu()
                calls.append({**seconds, "in all": time.perf_counter() - begin})
        _, short, long = calls
        parts = {part: 1e3 * (value - short.get(part, 0.0)) / self.steps for part, value in long.items()}
        whole = parts.pop("in all")
        return {**parts, "the loop itself": whole - sum(parts.values()), "in all": whole}

    def gpu_parts(self) -> dict[str, float]:
        """Return the milliseconds of a step that the GPU spends in each kind of kernel, and how many there are."""
        from torch.profiler import ProfilerActivity, profile

        profiles = []
        for tokens in (FEW, FEW + self.steps):
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                self(tokens)
                torch.cuda.synchronize()
            events = found.key_averages()
            profiles.append({x.key: (x.self_device_time_total, x.count) for x in events if x.self_device_time_total})
        parts: dict[str, float] = defaultdict(float)
        for kernel, (us, launches) in profiles[1].items():
            before, launches_before = profiles[0].get(kernel, (0.0, 0))
            kind = next((k for k, names in KINDS.items() if any(n in kernel.lower() for n in names)), "other kernels")
            parts[kind] += (us - before) / 1e3 / self.steps
            parts["number of kernels"] += (launches - launches_before) / self.steps
        launches = parts.pop("number of kernels", 0.0)
        return {**parts, "in all": sum(parts.values()), "number of kernels": launches}

    def without(self) -> dict[str, float]:
        """Return the milliseconds of a step as it is, with more of the library's work, and with a part left out."""
        at_once = staticmethod(lambda *args, **kwargs: False)
        parts = {"a step": self.step_ms(), "with `min_new_tokens`": self.step_ms(True)}
        with patch.object(utils.DeferredStopCheck, "is_supported", at_once):
            parts["looking for the end at once"] = self.step_ms()
            parts["both"] = self.step_ms(True)
        model, forward = self.model, self.model.forward
        logits = torch.zeros(self.batch, 1, model.config.vocab_size, device=model.device, dtype=model.dtype)
        logits[..., 7] = 1  # not the end-of-text token

        @wraps(forward)
        def nothing(*args: Any, **inputs: Any) -> CausalLMOutputWithPast:
            if inputs["input_ids"].shape[1] > 1:
                return forward(*args, **inputs)
            return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: inputs.get(CACHE_NAME)})

        with patch.multiple(model, forward=nothing, get_compiled_call=lambda config: nothing):
            parts["the loop with a model that does nothing"] = self.step_ms()
        return parts


def steps_table(rows: list[dict], name: str, cache: str, batch: int, steps: int) -> None:
    """Append the parts of a step of `generate()` after a context of 128 tokens to `rows`."""
    model = load(name, 4096).eval()
    torch.compiler.reset()
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    generate = Generation(model, batch, 128, steps, **options)
    for _ in range(2):  # the first call compiles, and the second records CUDA graphs
        generate(FEW + steps)
    parts = generate.without()
    parts |= {HOST + part: ms for part, ms in generate.host_parts().items()}
    parts |= {GPU + part: ms for part, ms in generate.gpu_parts().items()}
    for part, ms in parts.items():
        rows.append({"model": name, "cache": cache, "batch": batch, "part": part, "ms": ms})
        print(f"steps  {name}  {cache}  batch {batch}  {part}: {ms:.4f}", flush=True)


def count_graphs() -> int:
    """Return how many CUDA graphs torch.compile has recorded on the current GPU and keeps."""
    from torch._inductor import cudagraph_trees

    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else sum(map(len, manager.roots.values()))


def calls_table(rows: list[dict], model: ReBasedForCausalLM, calls: int, keeps: bool, **options: Any) -> None:
    """Append two calls of one length and `calls` of others to `rows`. `keeps`: states stay at their addresses."""
    lengths = [(128, 36)] * 2 + [(64 + 37 * i % 900, 20 + 7 * i % 23) for i in range(calls)]
    with nullcontext() if keeps else patch.object(model, "_keep_states", lambda cache: None):
        for call, (context, tokens) in enumerate(lengths):
            ids = torch.randint(3, model.config.vocab_size, (1, context), device=model.device)
            begin = time.perf_counter()
            model.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
            )
            row = {"states_kept": keeps, "call": call, "context": context, "new_tokens": tokens}
            rows.append({**row, "ms": 1e3 * (time.perf_counter() - begin)})
            rows[-1]["graphs"] = count_graphs() if model.device.type == "cuda" else 0
    print(f"calls  states kept {keeps}  last {rows[-1]}", flush=True)


def first_call(what: str) -> tuple[float, float, list[dict]]:
    """Time the first training step or prefill of this process.

    Returns:
        `tuple`: the seconds of the first call, the milliseconds of later calls, and a row per kernel and stage of
            the compilers, Triton's and the one of C, which makes what launches a kernel.
    """
    import triton
    from triton.backends.nvidia import driver as nvidia

    torch.zeros(1, device="cuda")
    model = load(MODELS[0], 65536).train(what == "step")
    kernels: list[dict] = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        for stage, us in (("python", times.ir_initialization), *times.lowering_stages):
            kernels.append({"kernel": src.name, "from_cache": cache_hit, "stage": stage, "seconds": us / 1e6})

    def compile_module(*args: Any, name: str, **options: Any) -> Any:
        begin = time.perf_counter()
        module = made_by_c_compiler(*args, name=name, **options)
        seconds = time.perf_counter() - begin
        kernels.append({"kernel": name, "from_cache": False, "stage": "C compiler", "seconds": seconds})
        return module

    triton.knobs.compilation.listener = listen
    made_by_c_compiler, nvidia.compile_module_from_src = nvidia.compile_module_from_src, compile_module
    ids = torch.randint(3, 50000, (8, 2048) if what == "step" else (1, 32768), device="cuda")

    def call() -> None:
        if what == "step":
            model(ids, labels=ids).loss.backward()
        else:
            with torch.no_grad():
                model(ids, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin, median_ms(call, 3), kernels


def first_table(rows: list[dict], kernel_rows: list[dict], what: str) -> None:
    """Append first calls with empty and with filled caches, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        for caches in ("empty", "filled"):
            with ProcessPoolExecutor(1, spawn) as process:
                seconds, later, kernels = process.submit(first_call, what).result()
            rows.append({"what": what, "caches": caches, "first_s": seconds, "later_ms": later})
            kernel_rows += ({"what": what, "caches": caches, **row} for row in kernels)
            print(f"first  {what}, {caches} caches: {seconds:.2f} s, later {later:.1f} ms", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=new_folder, required=True, metavar="FOLDER", help="for the tables")
    parser.add_argument("--tables", nargs="*", default=TABLES, choices=TABLES, help="which to make")
    parser.add_argument(
        "--batches", type=count, nargs="*", default=[1, 64], help="sequences that are generated at once"
    )
    parser.add_argument("--caches", nargs="*", default=["static", "dynamic"], choices=["static", "dynamic"])
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS, help="whose steps to time")
    parser.add_argument("--steps", type=count, default=128, help="tokens by which a long call is longer")
    parser.add_argument("--calls", type=count, default=60, help="calls of changing lengths, after two of one length")
    args = parser.parse_args(with_dashes(argv))
    if not torch.cuda.is_available():
        sys.exit("This benchmark is for GPUs, and torch sees none here.")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    tables: dict[str, list[dict]] = {"steps": [], "calls": [], "first": [], "first-kernels": []}
    try:
        if "first" in args.tables:
            for what in ("step", "prefill"):
                first_table(tables["first"], tables["first-kernels"], what)
        if "steps" in args.tables:
            for batch, cache, name in product(args.batches, args.caches, args.models):
                steps_table(tables["steps"], name, cache, batch, args.steps)
        if "calls" in args.tables:
            for keeps in (True, False):
                torch.compiler.reset()
                model = load(MODELS[0], 4096).eval()
                calls_table(tables["calls"], model, args.calls, keeps, cache_implementation="static")
    finally:  # also what there is when it is interrupted
        for name, rows in tables.items():
            if rows:
                write_csv(rows, args.output / f"{name}.csv")


if __name__ == "__main__":
    main()
