"""Read results of lm-eval for the card of a model."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .report import ConversionError


# lm-eval's names of metrics, as the Hub's.
METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy",
    "word_perplexity": "perplexity",
    "byte_perplexity": "perplexity",
}


@dataclass
class Evaluation:
    """Hold what files of lm-eval's results say.

    Attributes:
        results: entries of the card's metadata.
        rows: (task, shots, metric, value, standard error) of the card's table.
        versions: releases of lm-eval.
        skipped: figures that are not finite.
        passed_over: sentences about files of other models.
    """

    results: list[EvalResult] = field(default_factory=list)
    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def read_results(paths: list[str | os.PathLike], parameters: int | None = None) -> Evaluation:
    """Read files that `lm-eval --output_path` wrote.

    Args:
        paths: files, or folders, of which the newest `results_*.json` of this model is taken.
        parameters: number of parameters of the model. Files of a model with another number are passed over in a
            folder, and refused where they are given themselves.

    Raises:
        ConversionError: a file does not come from lm-eval, or belongs to another model.
    """
    evaluation = Evaluation()
    for each in map(Path, paths):
        files = [each]
        if each.is_dir():
            files = sorted(each.rglob("results_*.json"), key=lambda file: file.name, reverse=True)
            if not files:
                raise ConversionError(f"--results {str(each)!r} has no results_*.json.")
        for path in files:
            count = _add_file(evaluation, path, parameters)
            if count is None:
                break
            what = f"{str(path)!r} are of a model with {count} parameters; SOURCE has {parameters}."
            if not each.is_dir():
                raise ConversionError(f"--results {what}")
            evaluation.passed_over.append(what)
    return evaluation


def _add_file(evaluation: Evaluation, path: Path, parameters: int | None) -> int | None:
    """Add what a file says. Add nothing if it is of another model, and return the parameters of that model."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        count = loaded.get("config", {}).get("model_num_parameters")
        if parameters is not None and count not in (None, parameters):
            return count
        _add_tasks(evaluation, loaded, loaded["results"])
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"--results {str(path)!r} is not a file of lm-eval's results: {type(error).__name__}: {error}"
        ) from error


def _add_tasks(evaluation: Evaluation, loaded: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    evaluation.versions.add(str(loaded.get("lm_eval_version") or "of an unknown version"))
    for task, figures in tasks.items():
        about = loaded.get("configs", {}).get(task, {})
        shots = loaded.get("n-shot", {}).get(task)
        for key, value in figures.items():
            metric, _, filtering = key.partition(",")
            if not filtering or metric.endswith("_stderr"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                evaluation.skipped.append(f"{task} {metric}: {value!r}")
                continue
            stderr = figures.get(f"{metric}_stderr,{filtering}")
            label = metric if filtering == "none" else f"{metric} ({filtering})"
            with_shots = label if shots is None else f"{label}, {shots}-shot"
            evaluation.results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=str(about.get("dataset_path") or task),
                    dataset_name=str(figures.get("alias") or task).strip(" -"),
                    dataset_config=about.get("dataset_name"),
                    dataset_split=about.get("test_split") or about.get("validation_split"),
                    metric_type=METRICS.get(metric, metric),
                    metric_name=f"{task} {with_shots}",
                    metric_value=value,
                    source_name="lm-evaluation-harness",
                    source_url=HARNESS,
                )
            )
            error = f"{stderr:.4f}" if isinstance(stderr, float) and math.isfinite(stderr) else ""
            evaluation.rows.append((task, "" if shots is None else str(shots), label, f"{value:.4f}", error))


HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
