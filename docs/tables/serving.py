"""Tables of docs/serving.md."""

from __future__ import annotations

from modeling_rebased import ReBasedConfig
from modeling_rebased.configuration import config_path
from modeling_rebased.serving.plan import state_bytes

from .form import down, number, results, shown, table


@shown("serving-plan")
def serving_plan() -> str:
    """Return how many requests of pure ReBased models fit into a pool of 60 GiB."""
    rows = []
    for name in ("english-6m", "150m-rebased", "360m-rebased", "1.3b-rebased"):
        held = state_bytes(ReBasedConfig.from_pretrained(config_path(name)))
        rows.append([f"`{name}`", number(held / 1e6), f"{60 * 2**30 // held:,}", f"{60 * 2**30 // (2 * held):,}"])
    return table(["configuration", "megabytes per request", "requests", "requests with prefix caching"], rows)


@shown("serving-memory")
def serving_memory() -> str:
    """Return the bytes that a request holds in vLLM, by the length of its context."""
    rows = results("serving/memory.csv")
    lengths = sorted({row["context_tokens"] for row in rows})

    def megabytes(model: str, cached: str, length: int) -> str:
        found = next(
            row
            for row in rows
            if (row["model"], str(row["prefix_caching"]), row["context_tokens"]) == (model, cached, length)
        )
        return number(found["bytes_per_request"] / 1e6)

    names = {"150m-rebased": "ReBased", "150m-hybrid": "ReBased and sliding windows", "150m-softmax": "softmax"}
    return table(
        ["model of 150M parameters", "prefix caching", *(f"{length:,} tokens" for length in lengths)],
        [
            [name, {"False": "off", "True": "on"}[cached], *(megabytes(model, cached, length) for length in lengths)]
            for model, name in names.items()
            for cached in ("False", "True")
        ],
        2,
    )


@shown("serving-speed")
def serving_speed() -> str:
    """Return the tokens per second of vLLM and of transformers on a CPU."""
    names = {"vllm": "vLLM", "transformers": "transformers' `generate`, one padded batch"}
    return down(
        ({**row, "engine": names[row["engine"]]} for row in results("serving/speed.csv")),
        "engine: {engine} | seconds, best of 3: {seconds_best_of_3:3sig} | "
        "seconds, worst of 3: {seconds_worst_of_3:3sig} | new tokens per second: {new_tokens_per_second:3sig}",
    )
