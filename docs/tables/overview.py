"""The table of results of README.md."""

from __future__ import annotations

import statistics
from typing import Any

from modeling_rebased.eval.plot_mqar import cells, figure_cells

from .conversion import mixed_text
from .form import number, results, shown, table
from .kernels import kernel_times, whole_models
from .models import by_model, over_all
from .recall import mqar_runs


def recall_512() -> tuple[Any, Any]:
    """Return the cells of ReBased and Based at length 512 and hidden size 64."""
    found = {(cell.model, cell.length, cell.hidden): cell for cell in figure_cells(cells(mqar_runs()))}
    return found["rebased", 512, 64], found["based", 512, 64]


@shown("overview")
def overview() -> str:
    """Return the one table of results of the README."""
    training = kernel_times("h100/kernels.csv", "training")
    step = whole_models("generation", batch=1, context=131072, cache="static")
    steps = whole_models("training", T=16384, compiled=True)
    split, ring = (
        next(x for x in results(f"context_parallel/h200/{name}.csv") if (x["gpus"], x["tokens"]) == (4, 131072))
        for name in ("context_parallel", "ring")
    )
    losses = dict(by_model(over_all("all"), "slice", "loss")[1])
    ours, based = recall_512()
    spread = [f"{cell.mean:.2f} ± {statistics.stdev(cell.accuracies):.2f}" for cell in (ours, based)]
    unseen = {
        (row["model"], row["stage"]): row["perplexity"]
        for row in mixed_text()["perplexity"]
        if (row["file"], row["length"]) == ("changelogs-1", 1024)
    }
    rows = [
        [
            "attention kernels, forward and backward at T = 32,768, ms",
            number(training["rebased"][32768], 2),
            f"softmax {number(training['softmax'][32768])}",
            "[kernels](docs/kernels.md)",
        ],
        [
            "training of 150M parameters at T = 16,384, layers compiled, tokens per second",
            f"{steps['rebased']['tokens_per_s']:,.0f}",
            f"softmax {steps['softmax']['tokens_per_s']:,.0f}",
            "[kernels](docs/kernels.md#whole-models)",
        ],
        [
            "the same over one sequence of 131,072 tokens on four H200, tokens per second",
            f"{split['tokens_per_s']:,.0f}",
            f"softmax, ring attention {ring['tokens_per_s']:,.0f}",
            "[training](docs/training.md#what-you-get)",
        ],
        [
            "`generate()` with a static cache after 131,072 tokens, 150M parameters, ms per token",
            f"{step['rebased']['ms_per_token']:.1f}",
            f"softmax {step['softmax']['ms_per_token']:.1f}",
            "[kernels](docs/kernels.md#whole-models)",
        ],
        [
            "its peak memory, GiB",
            f"{step['rebased']['peak_gib']:.1f}",
            f"softmax {step['softmax']['peak_gib']:.1f}",
            "[kernels](docs/kernels.md#whole-models)",
        ],
        [
            "language model of 150M parameters after 400M tokens, two seeds, loss on held-out text in nats per token",
            losses["ReBased"],
            f"Based {losses['Based']}, softmax {losses['softmax']}",
            "[results](docs/results.md#150-million-parameters)",
        ],
        [
            f"associative recall, length 512, hidden size 64, accuracy of {len(ours.accuracies)} seeds",
            spread[0],
            f"Based {spread[1]}",
            "[results](docs/results.md#associative-recall-mqar)",
        ],
        [
            "SmolLM2-135M-Instruct converted (hybrid), perplexity of a kind of text that it was not trained on",
            f"{unseen['hybrid', 'long']:.1f}",
            f"the original {unseen['teacher', '']:.1f}",
            "[conversion](docs/conversion.md#smollm2-135m-instruct-with-more-text)",
        ],
    ]
    return table(["what was measured", "ReBased", "compared with", "details"], rows, 4)
