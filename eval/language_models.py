"""Measure a trained language model on the held-out domains of a corpus, and write one JSON file per model.

    python -m modeling_rebased.eval.language_models --models rebased=output/150m-rebased/final \\
        --heldout data/corpus/heldout --shards data/corpus/train --output eval/results/language_models
    python -m modeling_rebased.eval.plot_language_models eval/results/language_models      # tables and picture of all

`modeling_rebased.training.prepare_corpus` writes both folders. Measured are

    domains        loss, perplexity and bits per byte of each domain, in windows of `--context` tokens
    slices         tokens that complete a bigram of their window (recall), such tokens whose bigram is frequent in the
                   training text (known), and all others; see `recall_slices`
    by distance    recall tokens by how far back their bigram occurred last
    by frequency   recall tokens and others by how often their bigram occurs in the training text
    positions      loss by the position in windows of 2,048 to 16,384 tokens, all cut from the same long documents
    speed          with `--speed`, on a GPU: tokens per second and memory of a training step and of generation

Each document begins with the end-of-text token, and each of its other tokens is scored once. The weights are computed
in bfloat16 by autocast, as in training on a GPU, and in float32 on a CPU. `generate()` is timed in bfloat16, as
`benchmark_generation` does. Times need a machine on which nothing else runs, so run `--speed` for one model at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.folders import write_text
from modeling_rebased.training.shards import map_shards, read_index
from modeling_rebased.training.text import encode_all, read_documents
from modeling_rebased.training.values import count, known_device, new_folder

from .benchmark_generation import time_generate
from .recall_slices import Slices, last_occurrence, score_windows
from .timing import median_ms


LENGTHS = (2048, 4096, 8192, 16384)
KNOWN_FROM = 1250  # Zoology's: a bigram as frequent as this in the training text is known
FREQUENCIES = (0, 1, 10, 100, 1_000, 10_000)  # where the bins of frequency begin


def windows_of(tokens: list[int], context: int) -> Iterator[list[int]]:
    """Cut a document into windows that overlap by one token, so that each token but the first is scored once."""
    for first in range(0, len(tokens) - 1, context - 1):
        yield tokens[first : first + context]


def count_in_shards(shards: Iterable[np.ndarray], bigrams: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return how often each of some bigrams occurs in the training text, int64 like `bigrams`.

    Args:
        shards: token ids.
        bigrams: first * vocab_size + second, sorted, each once.
        vocab_size: of the tokenizer.
    """
    counts = np.zeros(len(bigrams), np.int64)
    for ids in shards:
        found = ids[:-1].astype(np.int64) * vocab_size + ids[1:]
        places = np.minimum(np.searchsorted(bigrams, found), len(bigrams) - 1)
        counts += np.bincount(places[bigrams[places] == found], minlength=len(bigrams))
    return counts


class Domains:
    """Hold the held-out documents of each domain, as tokens.

    Args:
        folder: holds DOMAIN.jsonl for each domain.
        tokenizer: encodes the documents.
        max_tokens: take no more documents of a domain once it has so many.

    Attributes:
        documents: by domain, the token ids of each document, with the end-of-text token first.
        num_bytes: by domain, the size of these documents in UTF-8.
    """

    def __init__(self, folder: Path, tokenizer: Any, max_tokens: int | None = None) -> None:
        self.documents: dict[str, list[list[int]]] = {}
        self.num_bytes: dict[str, int] = {}
        for path in sorted(folder.glob("*.jsonl")):
            texts = read_documents([path])
            encoded = encode_all(texts, tokenizer) if texts else []
            if max_tokens is not None:
                before = np.cumsum([0, *map(len, encoded)])[:-1]
                encoded = [ids for ids, start in zip(encoded, before) if start < max_tokens]
            if not any(len(ids) > 1 for ids in encoded):
                raise ValueError(f"{path} holds no document of two tokens")
            self.documents[path.stem] = encoded
            self.num_bytes[path.stem] = sum(len(text.encode()) for text in texts[: len(encoded)])
        if not self.documents:
            raise ValueError(f"{folder} holds no .jsonl file" if folder.is_dir() else f"there is no folder {folder}")

    def long(self, length: int) -> list[list[int]]:
        """Return the first `length` tokens of every document that has so many."""
        return [ids[:length] for documents in self.documents.values() for ids in documents if len(ids) >= length]


def precision(device: str) -> contextlib.AbstractContextManager:
    """Return the context in which a model is computed: bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


def scored(
    model: torch.nn.Module, windows: list[list[int]], tokens_at_once: int, device: str, name: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (tokens [T], losses [T - 1], correct [T - 1]) of each window; those of equal length are batched."""
    order = sorted(range(len(windows)), key=lambda number: -len(windows[number]))
    bar = tqdm(total=sum(map(len, windows)), desc=name, unit=" tokens", disable=None, leave=False)
    first = 0
    while first < len(order):
        size = len(windows[order[first]])
        rows = max(1, tokens_at_once // size)
        batch = [number for number in order[first : first + rows] if len(windows[number]) == size]
        first += len(batch)
        ids = torch.tensor([windows[number] for number in batch])
        with precision(device):
            losses, correct = score_windows(model, ids, chunk=max(1, 8192 // len(batch)), mode="hidden")
        yield from zip(ids.numpy(), losses, correct)
        bar.update(size * len(batch))
    bar.close()


def by_bins(values: np.ndarray, losses: np.ndarray, edges: Iterable[int]) -> list[list[float]]:
    """Return [first value of the bin, tokens, sum of losses] for each bin that holds tokens."""
    edges = list(edges)
    bins = np.searchsorted(edges, values, side="right") - 1
    rows = []
    for number in np.unique(bins).tolist():
        rows.append([edges[number], int((bins == number).sum()), float(losses[bins == number].sum())])
    return rows


def measure_domains(
    model: torch.nn.Module, domains: Domains, counts: dict[int, int], *, context: int, tokens_at_once: int, device: str
) -> dict[str, Any]:
    """Return the figures of each domain, of the slices, by distance and by frequency.

    Args:
        model: any causal language model.
        domains: what is scored.
        counts: how often each bigram of the held-out text occurs in the training text; empty if that is not known.
        context: tokens of a window.
        tokens_at_once: tokens of a batch.
        device: where the model is.
    """
    vocab_size = model.config.vocab_size
    keys = np.array(sorted(counts), np.int64)
    values = np.array([counts[key] for key in keys.tolist()], np.int64)
    everything = Slices()
    frequency: dict[str, list[np.ndarray]] = {"recall": [], "other": []}
    result: dict[str, Any] = {"domains": {}, "slices": {}}
    for domain, documents in domains.documents.items():
        windows = [window for document in documents for window in windows_of(document, context)]
        slices = Slices()
        for tokens, losses, correct in scored(model, windows, tokens_at_once, device, domain):
            distance = last_occurrence(tokens)[1:]
            bigrams = tokens[:-1] * vocab_size + tokens[1:]
            often = values[np.searchsorted(keys, bigrams)] if len(keys) else np.zeros(len(bigrams), np.int64)
            for each in (slices, everything):
                each.add(losses, correct, distance, often >= KNOWN_FROM)
            for name, mask in (("recall", distance > 0), ("other", distance == 0)):
                frequency[name].append(np.stack([often[mask], losses[mask]]))
        loss, scored_tokens = sum(slices.loss.values()), sum(slices.tokens.values())
        result["domains"][domain] = {
            "documents": len(documents),
            "tokens": scored_tokens,
            "bytes": domains.num_bytes[domain],
            "loss": loss / scored_tokens,
            "perplexity": math.exp(loss / scored_tokens),
            "bits_per_byte": loss / math.log(2) / domains.num_bytes[domain],
        }
        result["slices"][domain] = slices.table()
    result["slices"]["all"] = everything.table()
    result["by_distance"] = [[2**bin_, *entry] for bin_, entry in sorted(everything.by_distance.items())]
    if counts:
        result["by_frequency"] = {}
        for name, parts in frequency.items():
            often, losses = np.concatenate(parts, axis=1)
            result["by_frequency"][name] = by_bins(often, losses, FREQUENCIES)
    return result


def measure_positions(
    model: torch.nn.Module, domains: Domains, *, lengths: tuple[int, ...], tokens_at_once: int, device: str
) -> dict[str, Any]:
    """Return the loss by position in windows of each length, cut from the same documents, in bins of powers of two."""
    documents = domains.long(max(lengths))
    result: dict[str, Any] = {"documents": len(documents), "tokens_of_each": max(lengths), "lengths": {}}
    if not documents:
        return result
    for length in lengths:
        starts = range(0, max(lengths) - length + 1, length)  # without a shorter rest
        windows = [ids[first : first + length] for ids in documents for first in starts]
        sums, counts = np.zeros(length - 1), 0
        for _, losses, _ in scored(model, windows, tokens_at_once, device, f"{length:,} tokens"):
            sums += losses
            counts += 1
        edges = [0, *(2**power for power in range(7, 30) if 2**power < length)]
        positions = np.arange(1, length)
        rows = [
            [edge, int(mask.sum()) * counts, float(sums[mask].sum())]
            for edge, end in zip(edges, [*edges[1:], length])
            if (mask := (positions >= edge) & (positions < end)).any()
        ]
        result["lengths"][str(length)] = {"loss": float(sums.sum() / counts / (length - 1)), "bins": rows}
    return result


def measure_training(model: Any, context: int) -> dict[str, Any]:
    """Return the speed and the peak memory of a training step of 16 windows of `context` tokens, on a GPU.

    A step is the forward and the backward pass in bfloat16 by autocast, without the optimizer. The layers of models of
    this package are compiled.
    """
    ids = torch.randint(1000, (16, context), device="cuda")
    model.train()
    if model.config.model_type == "rebased":
        for layer in model.base_model.layers:
            layer.compile(dynamic=False)

    def step() -> None:
        with precision("cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step, 7)
    peak = torch.cuda.max_memory_allocated()
    torch.compiler.reset()  # what was compiled may keep the weights in memory
    return {"training_tokens_per_second": 1e3 * ids.numel() / ms, "training_gib": peak / 2**30}


def measure_generation(model: Any, prompt: int) -> dict[str, Any]:
    """Return the time per token and the peak memory of `generate()` with its default cache after a prompt, on a GPU.

    Args:
        model: in bfloat16, as it is served. Autocast would keep the keys of softmax layers in float32.
        prompt: tokens before the first that is generated.
    """
    try:
        figures = time_generate(model, torch.randint(1000, (1, prompt), device=model.device), 128, "dynamic")
    except Exception as error:  # a library's model that cannot generate: the other figures are worth having
        return {"generation_error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {
        "generation_prompt": prompt,
        "generation_ms_per_token": figures["ms_per_token"],
        "generation_gib": figures["peak_gib"],
    }


def training_curve(folder: Path) -> list[dict[str, float]]:
    """Return step, loss and learning rate of each line that the Trainer logged beside a finished model, or nothing."""
    path = folder.parent / "trainer_state.json"
    if not path.is_file():
        return []
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return [
        {"step": row["step"], "loss": row["loss"], "learning_rate": row.get("learning_rate")}
        for row in history
        if "loss" in row
    ]


def load(folder: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model, or end the command. Models of flash-linear-attention come with their kernels."""
    with contextlib.suppress(ImportError):
        import fla.models  # noqa: F401  makes transformers know its models
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise SystemExit(f"language_models: error: --models: {folder} cannot be loaded: {error}") from error


def count_bigrams(domains: Domains, shards: Iterable[np.ndarray], vocab_size: int) -> dict[int, int]:
    """Return how often each bigram of the held-out text, first * vocab_size + second, occurs in the training text."""
    parts = [np.array(ids, np.int64) for documents in domains.documents.values() for ids in documents]
    bigrams = np.unique(np.concatenate([ids[:-1] * vocab_size + ids[1:] for ids in parts]))
    counts = count_in_shards(tqdm(shards, "bigrams", disable=None), bigrams, vocab_size)
    return dict(zip(bigrams.tolist(), counts.tolist()))


def measure(name: str, folder: str, domains: Domains, shards: list[np.ndarray], args: argparse.Namespace) -> None:
    """Measure a model and write its file.

    Args:
        name: of the model, and of the file.
        folder: holds the model.
        domains: the held-out documents.
        shards: the training text, or nothing.
        args: the command's.
    """
    model = load(folder, args.device)
    counts = count_bigrams(domains, shards, model.config.vocab_size) if shards else {}
    options = {"tokens_at_once": args.tokens_at_once, "device": args.device}
    result: dict[str, Any] = {
        "model": name,
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "context": args.context,
        **measure_domains(model, domains, counts, context=args.context, **options),
        "positions": measure_positions(model, domains, lengths=tuple(args.lengths), **options) if args.lengths else {},
        "curve": training_curve(Path(folder)),
    }
    figures = Path(folder) / "training_figures.json"
    if figures.is_file():
        result["training"] = json.loads(figures.read_text(encoding="utf-8"))
    if args.speed:
        result["speed"] = measure_training(model, args.context)
        del model
        gc.collect()
        longest = max(args.lengths, default=max(LENGTHS))
        result["speed"] |= measure_generation(load(folder, args.device, torch.bfloat16), longest)
    write_text(args.output / f"{name}.json", json.dumps(result, indent=1) + "\n")
    for domain, row in result["domains"].items():
        print(f"{name:16s} {domain:14s} {row['perplexity']:9.3f} perplexity {row['bits_per_byte']:.4f} bits per byte")


def named_models(items: list[str]) -> dict[str, str]:
    """Return the folders of NAME=DIR, or of DIR with its last part as the name, by name.

    Raises:
        ValueError: two have the same name, or a name is no name of a file.
    """
    models: dict[str, str] = {}
    for item in items:
        name, folder = item.split("=", 1) if "=" in item else (Path(item).name, item)
        if not name or "/" in name or not folder:
            raise ValueError(f"--models: {item!r} must be NAME=DIR, or DIR, with a name that can be a file's")
        if name in models:
            raise ValueError(f"--models: {models[name]} and {folder} are both named {name!r}; NAME=DIR gives a name")
        models[name] = folder
    return models


def arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read and check the command line. `models` of the result are folders by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=DIR", help="finished models, such as output/x/final")
    add("--heldout", type=Path, required=True, metavar="FOLDER", help="DOMAIN.jsonl of each domain")
    add("--shards", type=Path, metavar="FOLDER", help="training text, for the frequency of bigrams")
    add("--context", type=int, default=2048, help="tokens of a window")
    add("--lengths", type=int, nargs="*", default=list(LENGTHS), help="lengths for the loss by position")
    add("--max-tokens", type=count, help="take no more documents of a domain once it has so many")
    add("--tokens-at-once", type=count, default=65536, help="tokens of a batch")
    add("--speed", action="store_true", help="also measure speed and memory, on a GPU")
    add("--device", type=known_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--output", type=new_folder, required=True, metavar="FOLDER", help="folder for the results")
    args = parser.parse_args(with_dashes(argv))
    for option, values in (("--context", [args.context]), ("--lengths", args.lengths)):
        if min(values, default=2) < 2:
            parser.error(f"{option} must be at least 2, got {min(values)}")
    if args.speed and not args.device.startswith("cuda"):
        parser.error(f"--speed needs a GPU, and --device is {args.device}")
    return parser, args


def main(argv: list[str] | None = None) -> None:
    """Measure each model and write its file."""
    parser, args = arguments(argv)
    try:
        models = named_models(args.models)
    except ValueError as error:
        parser.error(str(error))
    for name, folder in models.items():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            parser.error(f"--models: {folder} cannot be loaded: {error}")
        try:
            shards = [] if args.shards is None else map_shards(args.shards, read_index(args.shards, tokenizer))
        except ValueError as error:
            parser.error(f"--shards: {error}")
        try:
            domains = Domains(args.heldout, tokenizer, args.max_tokens)
        except (OSError, ValueError) as error:
            parser.error(f"--heldout: {error}")
        measure(name, folder, domains, shards, args)


if __name__ == "__main__":
    main()
