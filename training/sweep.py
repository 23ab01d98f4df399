"""Train many runs on synthetic tasks, with kinds of model one after another or at once, and keep all results."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .fast_loop import FastTrainer, use_deterministic_algorithms
from .recipe import Options, Recipe, build_model, kind_of
from .run_results import append_result, read_results


# Held while a process of a sweep trains, where processes take turns.
_turn: contextlib.AbstractContextManager = contextlib.nullcontext()


def _share_turn(lock: contextlib.AbstractContextManager) -> None:
    """Use `lock` for the turns of this process. Every process of a sweep starts with this."""
    global _turn
    _turn = lock


def _lines_of(output: str) -> dict[str, dict[str, Any]]:
    """Return the newest result of each run in a file. A line of `--time-steps` is no result: nothing was trained."""
    return {line["name"]: line for line in read_results(output) if "history" in line}


def _is_finished(line: dict[str, Any] | None) -> bool:
    """Return whether a run has this result and is at its end. After a deadline or a race that gave it up it is not."""
    if line is None:
        return False
    stopped = line.get("stopped", "")
    return stopped != "deadline" and not stopped.startswith("epoch ")


def _reached(line: dict[str, Any] | None, epoch: int) -> bool:
    return line is not None and (_is_finished(line) or len(line["history"]) >= epoch)


def _first_seed(runs: list[Recipe]) -> list[Recipe]:
    return [run for run in runs if run.seed == runs[0].seed]


def _best_rate(runs: list[Recipe], lines: dict[str, dict[str, Any]], epoch: int) -> float | None:
    """Return the learning rate that won the race to an epoch, `None` if a run of the first seed is not there yet."""
    first = _first_seed(runs)
    if not all(_reached(lines.get(run.name), epoch) for run in first):
        return None

    def loss(run: Recipe) -> float:
        history = lines[run.name]["history"][:epoch]
        return history[-1]["loss"] if history and math.isfinite(history[-1]["loss"]) else math.inf

    return min(first, key=loss).lr


def _race(
    trainer: FastTrainer, runs: list[Recipe], lines: dict[str, dict[str, Any]], epoch: int, worker: int
) -> tuple[list[Recipe], list[dict[str, Any]]]:
    """Train the first seed's runs to an epoch, and keep the learning rate with the lowest loss there.

    Returns the runs that remain (every seed at that rate) and the new results of those given up. If the deadline has
    passed, the results are those of all runs that are not at their end.
    """
    trained = {
        run.name: trainer.train(run, worker, until=epoch)
        for run in _first_seed(runs)
        if not _reached(lines.get(run.name), epoch)
    }
    rate = _best_rate(runs, lines | trained, epoch)
    late = trainer.options.late
    given_up = [result for result in trained.values() if ("stopped" in result if late else result["lr"] != rate)]
    return [run for run in runs if run.lr == rate], given_up


def _left(runs: list[Recipe], lines: dict[str, dict[str, Any]], race_epoch: int | None) -> list[Recipe]:
    """Return which runs of a kind are still to train. After a race, these are runs at the best rate only."""
    rate = None if race_epoch is None else _best_rate(runs, lines, race_epoch)
    return [run for run in runs if rate in (None, run.lr) and not _is_finished(lines.get(run.name))]


def _runs_of_process(runs: Sequence[Recipe], by_kind: bool) -> list[Recipe]:
    """Return every W-th run, or every W-th kind of run, for one of W processes of torchrun or accelerate launch."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kinds = list(dict.fromkeys(kind_of(run) for run in runs))
    return [
        run
        for number, run in enumerate(runs)
        if (kinds.index(kind_of(run)) if by_kind else number) % processes == rank
    ]


def run_group(
    runs: list[Recipe], options: Options, output: str, save: str | None, worker: int = 0
) -> list[dict[str, Any]]:
    """Train runs of one kind that `output` does not hold yet, and write each to it as soon as it ends."""
    if options.deterministic:
        use_deterministic_algorithms()
    if options.device == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    results = []
    trainer = FastTrainer(runs[0], options)
    if options.take_turns and trainer.on_gpu and not options.late:
        trainer.prepare(runs[0])  # compiles while another process trains
    with _turn:
        lines = _lines_of(output)
        if options.race_epoch is not None:
            runs, given_up = _race(trainer, runs, lines, options.race_epoch, worker)
            for result in given_up:
                append_result(output, result)
        for run in runs:
            if _is_finished(lines.get(run.name)):
                continue
            if options.late:
                break
            result = trainer.train(run, position=worker)
            result["setup_seconds"] = round(trainer.setup_seconds, 2)
            if save:  # before the line in `output`, which says that nothing of this run is left to do
                copy = build_model(run, options.kernel_backend)
                copy.load_state_dict(trainer.model.state_dict())
                run.save(copy, Path(save) / run.name, result)
            append_result(output, result)
            results.append(result)
            shown = {
                key: result[key] for key in ("name", "accuracy", "epochs_trained", "seconds", "tokens_per_second")
            }
            tqdm.write(json.dumps(shown))
    return results


def sweep(runs: Sequence[Recipe], options: Options, output: str, jobs: int = 1, save: str | None = None) -> list[dict]:
    """Train every run that `output` does not hold yet, with groups of one kind at once in `jobs` processes.

    A run that is given twice is trained once.
    Where torchrun or accelerate launch has started several processes, each trains its share on a GPU of its own.
    """
    runs = list(dict.fromkeys(runs))
    runs = _runs_of_process(runs, by_kind=options.race_epoch is not None)  # a race is between runs of one kind
    lines = _lines_of(output)
    done = [run for run in runs if _is_finished(lines.get(run.name))]
    if done:
        tqdm.write(f"{len(done)} of {len(runs)} runs are finished and in {output}")
    if save:
        for run in done:
            if not (Path(save) / run.name).is_dir():
                tqdm.write(f"{run.name} was trained before without being saved: --save has no model of it")
    groups: dict[tuple, list[Recipe]] = {}
    for run in runs:
        groups.setdefault(kind_of(run), []).append(run)
    left = {kind: _left(group, lines, options.race_epoch) for kind, group in groups.items()}
    if lost := len(runs) - len(done) - sum(map(len, left.values())):
        tqdm.write(f"{lost} of {len(runs)} runs have a rate that lost the race to epoch {options.race_epoch}")
    groups = {kind: group for kind, group in groups.items() if left[kind]}
    results: list[dict] = []
    if jobs <= 1:
        for group in tqdm(groups.values(), desc="kinds of model", disable=not options.progress, position=1):
            results += run_group(group, options, output, save)
        return results
    context = get_context("spawn")
    turn: dict[str, Any] = {"initializer": _share_turn, "initargs": (context.Lock(),)} if options.take_turns else {}
    with ProcessPoolExecutor(jobs, mp_context=context, **turn) as pool:
        futures = [
            pool.submit(run_group, group, options, output, save, number % jobs)
            for number, group in enumerate(groups.values())
        ]
        bar = tqdm(total=len(futures), desc="kinds of model", disable=not options.progress, position=jobs)
        with bar:
            for future in as_completed(futures):
                results += future.result()
                bar.update()
    return results
