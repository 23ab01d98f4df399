"""Time the host's part of a step of `generate()` on a CPU, by a model that computes nothing or next to nothing.

    python -m modeling_rebased.eval.benchmark_loop --output eval/results/generation/cpu

The model has the layers of the configuration, but is 32 wide, and its compiled step returns constants. So the table
`loop.csv` has what `generate()`, the cache and torch.compile's guards take, and neither the computation nor what it
costs to launch it on a GPU. The last row is a step with a dynamic cache, which is not compiled: the whole model
without its attention operator, whose PyTorch form calls torch more often than the Triton one. The times are CPU time
of one thread per step, in microseconds: the smallest difference of a long and a short call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from transformers import CompileConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM, modeling_rebased
from modeling_rebased.configuration import config_names, config_path
from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.values import count, natural, new_folder

from .timing import write_csv


PROMPT = 16  # tokens


def narrow_model(name: str) -> ReBasedForCausalLM:
    """Return a model with the layers of a configuration, 32 wide, with random weights."""
    config = ReBasedConfig.from_pretrained(
        config_path(name),
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        feature_dim=8,
        intermediate_size=64,
        vocab_size=512,
        bos_token_id=0,
        eos_token_id=511,
    )
    return ReBasedForCausalLM(config).eval()


def constants(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph to a function that returns what the graph returns for the first inputs."""
    outputs = graph(*(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs))
    return lambda *_: outputs


class Loop:
    """Time calls of `generate()` that differ by a number of steps.

    Args:
        model: generates after a prompt of 16 tokens.
        steps: by which the long call is longer than the short one.
        repeats: pairs of calls, of which the fastest count.
    """

    def __init__(self, model: ReBasedForCausalLM, steps: int, repeats: int):
        self.model, self.steps, self.repeats = model, steps, repeats
        self.ids = torch.randint(3, 500, (1, PROMPT))
        compile_config = CompileConfig(backend=constants, fullgraph=True, mode=None, dynamic=False)
        compile_config._compile_all_devices = True
        self.options: dict[str, Any] = {"cache_implementation": "static", "compile_config": compile_config}
        self.seconds(1 + steps, False)  # which compiles

    def seconds(self, count: int, minimum: bool) -> float:
        """Return the CPU time of a call that writes `count` tokens, with `min_new_tokens` or without."""
        options = {"min_new_tokens": count} if minimum else {}
        begin = time.thread_time()
        ids = self.model.generate(
            self.ids,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **self.options,
            **options,
        )
        assert ids.shape[1] == PROMPT + count
        return time.thread_time() - begin

    def per_step(self, minimum: bool = False) -> float:
        """Return the microseconds of a step."""
        short, long = [], []
        for _ in range(self.repeats):
            short.append(self.seconds(1, minimum))
            long.append(self.seconds(1 + self.steps, minimum))
        return 1e6 * (min(long) - min(short)) / self.steps


def measure(name: str, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per part of a step: its name, and its microseconds."""
    model = narrow_model(name)
    loop = Loop(model, steps, repeats)
    guarded, guarded_minimum = loop.per_step(), loop.per_step(minimum=True)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        unguarded = loop.per_step()

    logits = torch.zeros(1, 1, model.config.vocab_size)
    logits[..., 7] = 1  # not the end-of-text token
    model.get_compiled_call = lambda config: lambda **inputs: CausalLMOutputWithPast(logits=logits)
    alone, alone_minimum = loop.per_step(), loop.per_step(minimum=True)

    prepare, clock = model.prepare_inputs_for_generation, [0.0]

    def timed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        begin = time.thread_time()
        inputs = prepare(*args, **kwargs)
        clock[0] += time.thread_time() - begin
        return inputs

    fastest = float("inf")
    with patch.object(model, "prepare_inputs_for_generation", timed):
        for _ in range(repeats):
            clock[0] = 0.0
            loop.seconds(1 + steps, False)
            fastest = min(fastest, clock[0])
    del model.get_compiled_call
    loop.options = {}
    with patch.object(modeling_rebased, "rebased_attention_decode", lambda q, k, v, state, **options: v):
        dynamic = loop.per_step()
    parts = {
        "the loop of `generate()` with a model that does nothing": alone,
        "of it: preparing the inputs of a step": 1e6 * fastest / (1 + steps),
        "the loop with `min_new_tokens`": alone_minimum,
        "the loop and a compiled step that computes nothing, without guards": unguarded,
        "the same with guards": guarded,
        "the same with `min_new_tokens`": guarded_minimum,
        "a whole step with a dynamic cache, without the attention operator": dynamic,
    }
    return [{"part": part, "us": microseconds} for part, microseconds in parts.items()]


def main(argv: list[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", default="150m-rebased", choices=config_names(), help="whose layers the model has")
    parser.add_argument("--steps", type=count, default=128, help="by which the long call is longer")
    parser.add_argument("--repeats", type=count, default=45, help="pairs of calls, of which the fastest count")
    parser.add_argument(
        "--skip-unchanged",
        type=natural,
        metavar="NUMBER",
        help="let torch.compile pass over the guards of modules that have not changed, if they have at most so many "
        "tensors and dictionaries (`use_recursive_dict_tags_for_guards` of `torch._dynamo.config`)",
    )
    parser.add_argument("--output", type=new_folder, required=True, metavar="FOLDER", help="for loop.csv")
    args = parser.parse_args(with_dashes(argv))
    if args.skip_unchanged is not None:
        torch._dynamo.config.use_recursive_dict_tags_for_guards = args.skip_unchanged > 0
        torch._dynamo.config.max_saved_pointers_for_recursive_dict_tags_check = args.skip_unchanged
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(args.config, args.steps, args.repeats)
    for row in rows:
        print(f"{row['us']:7.1f} µs  {row['part']}")
    write_csv(rows, args.output / "loop.csv")


if __name__ == "__main__":
    main()
