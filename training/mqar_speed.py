"""Measure how long a training step of MQAR takes, and compute how long it must take at least."""

from __future__ import annotations

import time
from typing import Any

import torch

from .fast_loop import FastTrainer
from .mqar_runs import Run


def time_steps(trainer: FastTrainer, run: Run, steps: int = 20) -> dict[str, Any]:
    """Return the seconds of one training step, with nothing else running, and the kernels that take longest."""
    steps = min(steps, run.steps_per_epoch)
    trainer.prepare(run)
    trainer.reset(run)

    def go() -> float:
        trainer.cursor.zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            trainer.graph.replay() if trainer.graph is not None else trainer.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    go()
    seconds = sorted(go() for _ in range(3))[1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        go()
    kernels = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)[:25]
    return {
        "name": run.name,
        "step_seconds": seconds,
        "tokens_per_second": run.batch_size * run.length / seconds,
        "floor": floor_seconds(run),
        "setup_seconds": trainer.setup_seconds,
        "compiled": trainer.backbone is not trainer.model.base_model,
        "cuda_graph": trainer.graph is not None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "kernels_ms_a_step": {event.key[:90]: round(event.device_time_total / 1000 / steps, 4) for event in kernels},
    }


def floor_seconds(run: Run, bandwidth: float = 3.0e12, rate: float = 700e12) -> dict[str, float]:
    """Return how long one training step must take at least, by operations and by bytes, given a GPU's two rates.

    A product of [M, K] and [K, N] counts 2 M K N operations, once forward and twice backward. Of the attention kernel,
    the state form is counted, with all features, written and read for head_dim + 1 columns. Bytes are counted for each
    bfloat16 tensor between two operations that cannot be one (projections, convolution, mixer, loss). It takes five
    passes: written and read forward, read again backward, and its gradient written and read.
    """
    d, tokens, asked = run.hidden, run.batch_size * run.length, run.batch_size * run.pairs
    config = run.config()
    heads, feature_dim, head_dim = config.num_attention_heads, config.feature_dim, config.head_dim
    inner = heads * head_dim
    projections = 2 * d * d + 2 * d * (2 * heads * feature_dim) + 2 * 2 * d * inner
    kernel = heads * 2 * 2 * config.n_features * (head_dim + 1)
    operations = 3 * (tokens * (projections + kernel) + asked * 2 * d * run.vocab_size)
    # embedding, convolution's product, its output, q, k, v, mixer's output, its projection, the last norm
    elements = tokens * (5 * d + 2 * heads * feature_dim + 2 * inner)
    return {
        "operations": operations,
        "operations_seconds": operations / rate,
        "bytes": elements * 2 * 5,
        "bytes_seconds": elements * 2 * 5 / bandwidth,
    }
