"""Compare linearized models with the softmax model that they came from: perplexity, answers, recall, decoding.

    python -m modeling_rebased.conversion.compare_students output/ --teacher teacher/ --student pure=output/pure \\
        --student hybrid=output/hybrid --text heldout.txt --text other.txt

A student's folder may hold start/, which `linearize` made, and the output folders transfer/, logits/ and long/ of
`conversion.distill`. The last of them is the student. Perplexities of the same text that distill measured are taken
from there, and others are measured here. A text is known by its name without folder and ending. All parts of the
teacher come first, then those of each student in turn, and the perplexities of earlier stages last. The results are
written as they come:

    OUTPUT/results.json    all numbers and answers
    OUTPUT/report.md       perplexities of every stage, decoding speed and memory, what answers are worth, and recall
    OUTPUT/answers.md      the greedy answers of all models to twenty prompts, side by side
    OUTPUT/answers.jsonl   all answers, greedy and sampled, to these and 200 more prompts

`python -m modeling_rebased.eval.plots OUTPUT` draws the losses of training, which are in results.json.

On a GPU perplexities are in float32 with TF32 products, and the rest is in bfloat16. Greedy answers have a repetition
penalty of 1.1 for all models. `prompts.py` has the prompts and the rule for answers on the topic, and `recall.py` the
text in which a number or name is to be found. Decoding goes step by step with the cache of transformers, after a
context of which every model has seen every token.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
)

from modeling_rebased import ReBasedConfig
from modeling_rebased.training.arguments import with_dashes
from modeling_rebased.training.folders import write_text
from modeling_rebased.training.values import count, new_folder, not_negative

from .distill import perplexity, read_held_out
from .generation import MODES, answer, judge_answers
from .prompts import TWENTY, more_prompts
from .reading import load_model
from .recall import DISTANCES, recall


STAGES = {"start": "start", "transfer": "transfer/final", "logits": "logits/final", "long": "long/final"}
STAGE_ORDER = ("", *STAGES, "student")
PARTS = ("perplexity", "answers", "recall", "speed")


def stages_of(folder: Path) -> dict[str, Path]:
    """Return the stages in a student's folder, in order. A folder that is itself a model is one stage."""
    found = {name: folder / path for name, path in STAGES.items() if (folder / path / "config.json").is_file()}
    if not found and (folder / "config.json").is_file():
        found = {"student": folder}
    return found


def load(folder: Path, dtype: torch.dtype, backend: str, device: str) -> PreTrainedModel:
    """Return a model for inference. A ReBased model uses the given backend.

    Raises:
        ConversionError: its folder does not hold exactly its weights.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == ReBasedConfig.model_type:
        config.kernel_backend = backend
    return load_model(AutoModelForCausalLM, folder, repr(str(folder)), config=config, dtype=dtype).to(device).eval()


# ---------------------------------------------------------------- decoding


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in a cache."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, Cache):
        for layer in value.layers:
            yield from tensors_of(vars(layer))


@torch.no_grad()
def fill(model: PreTrainedModel, ids: torch.Tensor, piece: int) -> tuple[Cache, torch.Tensor]:
    """Return the cache after ids [1, T], which are fed in pieces, and the next token [1, 1]."""
    cache = None
    for start in range(0, ids.shape[1], piece):
        output = model(
            input_ids=ids[:, start : start + piece], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
    return cache, output.logits[:, -1:].argmax(-1)


@torch.no_grad()
def decode_speed(
    model: PreTrainedModel, ids: torch.Tensor, batches: list[int], steps: int, piece: int = 1024
) -> list[dict[str, Any]]:
    """Measure the tokens per second of greedy steps after the context `ids`, [1, T], at several batch sizes.

    The context is read once, and its cache is repeated for larger batches.

    Returns:
        A row per batch size: "tokens_per_s" of the whole batch, "ms" per step, "cache_mib" of the cache, and on a GPU
        "peak_gib" of weights, cache and the step's work together.
    """
    cuda = ids.is_cuda
    rows = []
    cache, token = fill(model, ids, piece)
    for batch in sorted(batches):
        have = token.shape[0]
        index = torch.arange(have, device=ids.device).repeat(batch // have + 1)[:batch]
        try:
            cache.reorder_cache(index)  # of more rows than there are: it repeats them
            token = token[index]
            if cuda:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            for step in range(steps + 3):
                if step == 3:  # the first ones warm up
                    if cuda:
                        torch.cuda.synchronize()
                    began = time.perf_counter()
                token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            if cuda:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) / steps
            row: dict[str, float | None] = {"batch": batch, "tokens_per_s": batch / seconds, "ms": 1e3 * seconds}
            row["cache_mib"] = sum(each.nbytes for each in tensors_of(cache)) / 2**20
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        except torch.cuda.OutOfMemoryError:
            row = {"batch": batch, "tokens_per_s": None, "ms": None, "cache_mib": None, "peak_gib": None}
            rows.append(row)
            break
        rows.append(row)
    return rows


# ---------------------------------------------------------------- what is written


def table(rows: list[list[Any]]) -> str:
    """Return a table in Markdown, whose first row is its head."""
    lines = ["| " + " | ".join(_cell(each) for each in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(results: dict[str, Any]) -> str:
    """Return the text of report.md."""
    text = ["# Linearized students beside their teacher\n"]
    rows = results.get("perplexity", [])
    kinds = list(dict.fromkeys((row["file"], row["length"]) for row in rows))
    if rows:
        text.append("## Held-out perplexity\n\nIn brackets: times the teacher's.\n")
        lines = [["model and stage", *(f"{name}, {length} tokens" for name, length in kinds)]]
        found = {(row["model"], row["stage"], row["file"], row["length"]): row["perplexity"] for row in rows}
        for model, stage in dict.fromkeys((row["model"], row["stage"]) for row in rows):
            line = [f"{model}, {stage}" if stage else model]
            for kind in kinds:
                own, teachers = found.get((model, stage, *kind)), found.get(("teacher", "", *kind))
                ratio = f" ({own / teachers:.3f})" if own and teachers and model != "teacher" else ""
                line.append("-" if own is None else f"{own:.2f}{ratio}")
            lines.append(line)
        text.append(table(lines))
    if results.get("training"):
        text.append("## Training\n")
        lines = [["student and stage", "steps", "tokens", "seconds", "tokens per second"]]
        lines += [
            [
                f"{row['model']}, {row['stage']}",
                row["steps"],
                row["tokens"],
                row["seconds"],
                round(row["tokens"] / max(row["seconds"], 1e-9)),
            ]
            for row in results["training"]
        ]
        text.append(table(lines))
    if results.get("speed"):
        text.append(f"## Decoding after {results['speed'][0]['context']:,} tokens\n")
        lines = [["model", "batch", "tokens per second", "ms per step", "cache, MiB", "peak memory, GiB"]]
        lines += [
            [row["model"], *(row[key] for key in ("batch", "tokens_per_s", "ms", "cache_mib", "peak_gib"))]
            for row in results["speed"]
        ]
        text.append(table(lines))
    if results.get("generation"):
        text.append("## Answers\n\nThose to twenty prompts stand side by side in answers.md.\n")
        keys = ("judged", "repeated", "ended", "on_topic", "good")
        lines = [
            ["model", "prompts", "decoding", "the teacher's perplexity of them", "runs of four words said before"]
        ]
        lines[0] += ["ended", "on the topic", "both"]
        lines += [
            [row["model"], row["prompts"], row["mode"], *(row[key] for key in keys)] for row in results["generation"]
        ]
        text.append(table(lines))
    if results.get("recall"):
        text.append("## Recall from the prompt\n\nShare of values that are recalled; in brackets: loss per token.\n")
        kinds = list(dict.fromkeys((row["kind"], row["distance"]) for row in results["recall"]))
        lines = [["model", *(f"{kind}, {distance} tokens before" for kind, distance in kinds)]]
        for name in dict.fromkeys(row["model"] for row in results["recall"]):
            values = {(row["kind"], row["distance"]): row for row in results["recall"] if row["model"] == name}
            each = (values.get(kind) for kind in kinds)
            lines.append([name, *("-" if row is None else f"{row['right']:.2f} ({row['loss']:.2f})" for row in each)])
        text.append(table(lines))
    text += [f"{each}\n" for each in results.get("notes", [])]
    return "\n".join(text)


def side_by_side(results: dict[str, Any]) -> str:
    """Return the text of answers.md."""
    answers = results["answers"]
    text = ["# Answers to twenty prompts\n\nGreedy, with a repetition penalty of 1.1, the same for all models.\n"]
    for i, prompt in enumerate(results["prompts"]):
        text.append(f"## {i + 1}. {prompt}\n")
        lines = [list(answers), [row["texts"][i].strip().replace("|", "\\|") for row in answers.values()]]
        lines[1] = [each.replace("\n", "<br>") or "(nothing)" for each in lines[1]]
        body = ["| " + " | ".join(line) + " |" for line in lines]
        text.append("\n".join([body[0], "|" + " --- |" * len(answers), body[1]]) + "\n")
    return "\n".join(text)


def read_training(model: str, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Read what `conversion.distill` left of each stage.

    Returns:
        Rows of the training table, the curves of the losses, and perplexities of the stages before and after.
    """
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    perplexities: list[dict[str, Any]] = []
    before = "start"
    for stage in ("transfer", "logits", "long"):
        if (folder / stage / "perplexity.json").is_file():
            said = json.loads((folder / stage / "perplexity.json").read_text(encoding="utf-8"))
            rows.append({"model": model, **said})
            for row in said["perplexity"]:
                for name, key in ((before, "before"), (stage, "student")):
                    found = {"model": model, "stage": name, "file": row["file"], "length": row["length"]}
                    if key in row and not any(found.items() <= each.items() for each in perplexities):
                        perplexities.append({**found, "perplexity": row[key]})
            before = stage
            state = json.loads((folder / stage / "trainer_state.json").read_text(encoding="utf-8"))
            points = [(row["step"], row["loss"]) for row in state["log_history"] if "loss" in row]
            each = said["tokens"] / max(1, said["steps"])
            curves.append(
                {
                    "model": model,
                    "stage": stage,
                    "tokens": [step * each for step, _ in points],
                    "losses": [loss for _, loss in points],
                }
            )
    return rows, curves, perplexities


def machine() -> dict[str, str]:
    """Return the device and the releases of this run."""
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


class Comparison:
    """Measure models, and write the results to a folder whenever something is added.

    Args:
        arguments: those of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.half = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
        self.results: dict[str, Any] = {"machine": machine(), "prompts": list(TWENTY), "notes": []}
        self.folders = {"teacher": arguments.teacher}
        self.folders |= {name: Path(folder) for name, folder in (each.split("=", 1) for each in arguments.student)}
        self.models: dict[str, dict[str, Path]] = {"teacher": {"": arguments.teacher}}
        for name, folder in list(self.folders.items())[1:]:
            stages = stages_of(folder)
            if stages:
                self.models[name] = stages
            else:
                self.results["notes"].append(f"{folder} holds no stage of {name}.")
            for key, found in zip(("training", "curves", "perplexity"), read_training(name, folder)):
                self.results.setdefault(key, []).extend(found)
        self.texts = read_held_out(arguments.text, self.tokenizer, arguments.lengths, "--lengths")
        self.lines: dict[str, list[str]] = {}  # of answers.jsonl, by model
        self.judge: PreTrainedModel | None = None

    def run(self) -> None:
        """Measure everything. A failure is noted, and what comes after it is still measured."""
        end = time.monotonic() + self.arguments.max_seconds
        self.write()
        # All parts of one finished model after another, so that a run that is cut off has all of the first ones. The
        # stages before come last.
        last = [(name, list(stages)[-1]) for name, stages in self.models.items()]
        before = [(name, stage) for name, stages in self.models.items() for stage in list(stages)[:-1]]
        jobs = [(part, *each) for each in last for part in PARTS] + [("perplexity", *each) for each in before]
        for part, name, stage in jobs:
            if part not in self.arguments.parts or (part == "perplexity" and not self.texts):
                continue
            what = f"{part} of {name} {stage}".rstrip()
            if time.monotonic() > end:
                self.results["notes"].append(f"There was no time for {what}.")
                continue
            if part == "perplexity":
                self._try(what, self.measure_perplexity, name, stage)
                continue
            measure = getattr(self, f"measure_{part}")
            backend = self.arguments.kernel_backend
            if not self._try(what, measure, name, stage, backend) and backend != "eager":
                self._try(f"{what}, eager", measure, name, stage, "eager")
        self.write()

    def _try(self, what: str, measure: Callable[..., None], *given: str) -> bool:
        try:
            measure(*given)
        except Exception:
            traceback.print_exc()
            self.results["notes"].append(f"Failed: {what}.")
            return False
        finally:
            self.write()
            if self.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        return True

    def measure_perplexity(self, name: str, stage: str) -> None:
        """Measure the perplexity of one stage of a model on every text and length where it is not known yet."""
        model = None
        rows = self.results.setdefault("perplexity", [])
        for (path, length), blocks in self.texts.items():
            row = {"model": name, "stage": stage, "file": Path(path).stem, "length": length}
            if any(row.items() <= each.items() for each in rows):
                continue
            model = model or load(self.models[name][stage], torch.float32, "eager", self.device)
            rows.append({**row, "perplexity": perplexity(model, blocks)})
            print(*rows[-1].values(), flush=True)
            rows.sort(key=lambda row: (list(self.folders).index(row["model"]), STAGE_ORDER.index(row["stage"])))
            self.write()

    def measure_answers(self, name: str, stage: str, backend: str) -> None:
        """Collect a model's answers, and let the teacher judge them."""
        if self.judge is None:
            self.judge = load(self.arguments.teacher, torch.float32, "eager", self.device)
        model = load(self.models[name][stage], self.half, backend, self.device)
        sets = {"twenty": TWENTY, "more": more_prompts()} if self.arguments.more else {"twenty": TWENTY}
        topics = {prompt: words for each in sets.values() for prompt, words in each.items()}
        # What a backend that failed has left of this model is replaced.
        rows = self.results["generation"] = [row for row in self.results.get("generation", []) if row["model"] != name]
        lines = self.lines[name] = []
        for mode in MODES:
            said = dict(zip(topics, answer(model, self.tokenizer, list(topics), self.arguments.new_tokens, mode)))
            for which, asked in sets.items():
                worth = judge_answers(self.judge, self.tokenizer, asked, [said[prompt] for prompt in asked])
                rows.append({"model": name, "prompts": which, "mode": mode, **worth})
                print(*(f"{each:.3g}" if isinstance(each, float) else each for each in rows[-1].values()), flush=True)
            for prompt, (text, ended) in said.items():
                line = {"model": name, "mode": mode, "prompt": prompt, "answer": text, "ended": ended}
                lines.append(json.dumps(line) + "\n")
            if mode == "greedy":
                shown = {key: rows[-len(sets)][key] for key in ("judged", "repeated")}
                shown["texts"] = [said[prompt][0] for prompt in TWENTY]
                self.results.setdefault("answers", {})[name] = shown
            self.write()

    def measure_recall(self, name: str, stage: str, backend: str) -> None:
        """Measure what a model recalls from its prompt."""
        model = load(self.models[name][stage], self.half, backend, self.device)
        rows = recall(model, self.tokenizer, self.arguments.distances, self.arguments.items)
        kept = [row for row in self.results.get("recall", []) if row["model"] != name]
        self.results["recall"] = kept + [{"model": name, **row} for row in rows]
        for row in rows:
            print(name, *row.values(), flush=True)

    def measure_speed(self, name: str, stage: str, backend: str) -> None:
        """Measure how fast a model decodes after a long context of random tokens."""
        self.judge = None
        model = load(self.models[name][stage], self.half, backend, self.device)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(self.tokenizer), (1, self.arguments.context), generator=generator).to(self.device)
        rows = decode_speed(model, ids, self.arguments.batches, self.arguments.steps)
        given = {"model": name, "context": self.arguments.context}
        self.results.setdefault("speed", []).extend({**given, **row, "backend": backend} for row in rows)
        for row in rows:
            print(name, *row.values(), flush=True)

    def write(self) -> None:
        """Write results.json and report.md, and answers.md and answers.jsonl once there are answers."""
        folder = self.arguments.output
        write_text(folder / "results.json", json.dumps(self.results, indent=1) + "\n")
        write_text(folder / "report.md", report(self.results))
        if self.results.get("answers"):
            write_text(folder / "answers.md", side_by_side(self.results))
            write_text(folder / "answers.jsonl", "".join(line for lines in self.lines.values() for line in lines))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("output", type=new_folder)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--text", action="append", default=[], help="held-out text, or .npy file of token ids")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 8192], help="tokens of an example")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--new-tokens", type=count, default=256, help="of an answer")
    parser.add_argument("--more", action=argparse.BooleanOptionalAction, default=True, help="ask 200 more prompts")
    parser.add_argument("--distances", type=count, nargs="+", default=list(DISTANCES), help="tokens to recall over")
    parser.add_argument("--items", type=count, default=50, help="values to recall per kind and distance")
    parser.add_argument("--context", type=count, default=32768, help="tokens before the decoding is timed")
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 8, 32], help="sequences decoded at once")
    parser.add_argument("--steps", type=count, default=32, help="tokens that are timed")
    parser.add_argument(
        "--max-seconds", type=not_negative, default=math.inf, help="begin no part of a model after so long"
    )
    parser.add_argument(
        "--kernel-backend",
        choices=["auto", "eager", "triton"],
        default="auto",
        help="of the linear layers in answers and decoding; what fails is tried again with eager",
    )
    arguments = parser.parse_args(with_dashes(argv))
    if any("" in each.partition("=") for each in arguments.student):
        parser.error(f"--student is {arguments.student}; each must be NAME=FOLDER")
    names = ["teacher", *(each.split("=", 1)[0] for each in arguments.student)]
    if len(set(names)) < len(names):
        parser.error(f"--student: two models have the same name, of {', '.join(names)}")
    stems = [Path(each).stem for each in arguments.text]
    if len(set(stems)) < len(stems):  # by which results tell them apart
        parser.error(f"--text: two texts have the same name without folder and ending, of {', '.join(stems)}")
    if not (arguments.teacher / "config.json").is_file():
        parser.error(f"--teacher {str(arguments.teacher)!r} has no config.json; it must be the folder of a model")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        comparison = Comparison(arguments)
    except (OSError, ValueError) as error:  # of the tokenizer and the texts
        parser.error(str(error))
    comparison.run()
    print((arguments.output / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
