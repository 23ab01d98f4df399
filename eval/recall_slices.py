"""Measure perplexity by slice: tokens that can be recalled from the context, against all others.

A token is a recall token if it completes a bigram that occurred earlier in its context (Zoology, arXiv 2312.04927,
section 3.1). The ReBased paper splits its language-model results in the same way (section 5.2). Linear-attention
models lose most on recall tokens.

Zoology leaves out bigrams that are frequent in the training text, because a model may know those by heart. If you give
that text with `--known-text`, such tokens form a third slice, "known".

Documents are read and encoded as in training: `<|endoftext|>` separates them in a text file. Each is scored by itself,
with the end-of-text token before it.

    python -m modeling_rebased.eval.recall_slices --models DIR_A DIR_B --text book.txt --context 2048 \\
        --output eval/results/slices

The logits of a whole window are never stored. A window goes through the model in chunks that continue a cache. For a
model without a cache (`--mode hidden`), the last hidden states go through the output layer in chunks.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.folders import write_text
from modeling_rebased.training.text import encode, read_documents
from modeling_rebased.training.values import count, known_device, new_folder

from .plots import plot_slices


SLICES = ("recall", "known", "other")


def last_occurrence(tokens: np.ndarray, order: int = 2) -> np.ndarray:
    """Return how far back each token's n-gram occurred last, and 0 if it did not: int64 [T].

    Entry t is the smallest d > 0 such that the `order` tokens that end at t are those that end at t - d.
    """
    if order < 2:
        raise ValueError(f"order must be at least 2, got {order}")
    tokens = np.asarray(tokens, dtype=np.int64)
    distance = np.zeros(len(tokens), dtype=np.int64)
    if len(tokens) <= order:
        return distance
    symbols = np.unique(tokens, return_inverse=True)[1]
    grams = symbols  # grams[i] numbers the n-gram that starts at i
    for n in range(1, order):
        grams = grams[:-1] * len(tokens) + symbols[n:]
        grams = np.unique(grams, return_inverse=True)[1]
    by_gram = np.argsort(grams, kind="stable")
    same = grams[by_gram[1:]] == grams[by_gram[:-1]]
    distance[by_gram[1:][same] + order - 1] = (by_gram[1:] - by_gram[:-1])[same]
    return distance


def count_bigrams(tokens: np.ndarray, vocab_size: int) -> dict[int, int]:
    """Count bigrams, keyed by first * vocab_size + second."""
    tokens = np.asarray(tokens, dtype=np.int64)
    ids, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist()))


@dataclass
class Slices:
    """Hold sums over the tokens of each slice, and over recall tokens by the distance to the last occurrence."""

    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SLICES, 0))
    loss: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SLICES, 0.0))
    correct: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SLICES, 0))
    # bin b holds distances from 2**b to 2**(b + 1) - 1: [count, summed loss]
    by_distance: dict[int, list[float]] = field(default_factory=dict)

    def add(self, losses: np.ndarray, correct: np.ndarray, distance: np.ndarray, known: np.ndarray) -> None:
        """Add tokens; all four are [N]. `known` marks frequent bigrams, which matter where distance > 0 only."""
        recall = distance > 0
        for name, mask in (("recall", recall & ~known), ("known", recall & known), ("other", ~recall)):
            self.tokens[name] += int(mask.sum())
            self.loss[name] += float(losses[mask].sum())
            self.correct[name] += int(correct[mask].sum())
        mask = recall & ~known
        bins = np.floor(np.log2(distance[mask])).astype(int)
        for b in np.unique(bins).tolist():
            entry = self.by_distance.setdefault(b, [0, 0.0])
            entry[0] += int((bins == b).sum())
            entry[1] += float(losses[mask][bins == b].sum())

    def table(self) -> list[dict[str, Any]]:
        """Return one row per slice that holds tokens, and a row "all"."""
        total = sum(self.tokens.values())
        rows = [(name, self.tokens[name], self.loss[name], self.correct[name]) for name in SLICES]
        rows.append(("all", total, sum(self.loss.values()), sum(self.correct.values())))
        return [
            {
                "slice": name,
                "tokens": count,
                "share": count / total,
                "loss": loss / count,
                "perplexity": math.exp(loss / count) if loss / count < 700 else math.inf,
                "accuracy": correct / count,
            }
            for name, count, loss, correct in rows
            if count
        ]


def _score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 losses and whether the best token is right, for logits [N, V] and targets [N]."""
    logits = logits.float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.cpu().numpy().astype(np.float64), (logits.argmax(-1) == targets).cpu().numpy()


@torch.no_grad()
def score_windows(
    model: torch.nn.Module, windows: torch.Tensor, *, chunk: int = 512, mode: str = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Score every token of each window but the first, with all earlier tokens of the window as its context.

    Args:
        model: any causal language model of transformers.
        windows: [B, T] int64, T > 1.
        chunk: tokens of a window whose logits exist at once: B * chunk * vocabulary floats.
        mode: "cache" (chunks continue a cache), "hidden" (hidden states at once, logits in chunks), or "auto": cache
            if the model returns one, else hidden.

    Returns:
        The losses, float64 [B, T - 1], and whether the best token was right, bool [B, T - 1]. Column t is about token
        t + 1.
    """
    if mode not in ("auto", "cache", "hidden"):
        raise ValueError(f"mode must be auto, cache or hidden, got {mode!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    device = next(model.parameters()).device
    windows = windows.to(device)
    batch, length = windows.shape
    inputs, targets = windows[:, :-1], windows[:, 1:]
    losses = np.empty((batch, length - 1))
    correct = np.empty((batch, length - 1), dtype=bool)

    def put(first: int, logits: torch.Tensor) -> None:
        size = logits.shape[1]
        scored = _score(logits.flatten(0, 1), targets[:, first : first + size].flatten())
        for where, what in zip((losses, correct), scored):
            where[:, first : first + size] = what.reshape(batch, size)

    if mode in ("auto", "cache"):
        cache = None
        for first in range(0, length - 1, chunk):
            output = model(input_ids=inputs[:, first : first + chunk], past_key_values=cache, use_cache=True)
            put(first, output.logits)
            cache = getattr(output, "past_key_values", None)
            if cache is None and first + chunk < length - 1:
                if mode == "cache":
                    raise ValueError(f"{type(model).__name__} returns no cache; use mode='hidden'")
                break
        else:
            return losses, correct
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state  # [B, T - 1, hidden]
    head = model.get_output_embeddings()
    for first in range(0, length - 1, chunk):
        put(first, head(hidden[:, first : first + chunk]))
    return losses, correct


def windows_of(tokens: list[int], context: int) -> Iterator[list[int]]:
    """Cut a document into consecutive windows of `context` tokens, and drop a rest of one token."""
    for first in range(0, len(tokens), context):
        if len(window := tokens[first : first + context]) > 1:
            yield window


def evaluate(
    model: torch.nn.Module,
    documents: Iterable[list[int]],
    *,
    context: int = 2048,
    chunk: int = 512,
    batch_size: int = 1,
    mode: str = "auto",
    known: dict[int, int] | None = None,
    known_from: int = 1250,
    vocab_size: int | None = None,
    order: int = 2,
    progress: bool = False,
) -> Slices:
    """Split the losses of a model on some documents into slices.

    Args:
        model: any causal language model.
        documents: token ids of each.
        context: tokens of a window; nothing is carried over from one window to the next.
        chunk, mode: see `score_windows`.
        batch_size: windows of equal length scored together.
        known: counts of bigrams in the training text, from `count_bigrams` with this `vocab_size`.
        known_from: a bigram seen at least this often there is known (Zoology's 1,250).
        order: tokens of the n-gram that must have occurred, 2 in the papers. Where a token is a byte, two say nothing.
    """
    if known and order != 2:
        raise ValueError(f"known bigrams go with order 2, got order {order}")
    model.eval()
    vocab_size = vocab_size or model.config.vocab_size
    frequent = np.array(sorted(k for k, n in (known or {}).items() if n >= known_from), dtype=np.int64)
    slices = Slices()
    windows = [window for document in documents for window in windows_of(document, context)]
    windows.sort(key=len, reverse=True)  # equal lengths side by side; sums do not mind the order
    bar = tqdm(total=sum(map(len, windows)), unit="token", disable=not progress)
    first = 0
    while first < len(windows):
        size = len(windows[first])
        batch = [w for w in windows[first : first + batch_size] if len(w) == size]
        first += len(batch)
        losses, correct = score_windows(model, torch.tensor(batch), chunk=chunk, mode=mode)
        for tokens, loss, right in zip(np.array(batch), losses, correct):
            bigrams = tokens[:-1] * vocab_size + tokens[1:]
            slices.add(loss, right, last_occurrence(tokens, order)[1:], np.isin(bigrams, frequent))
        bar.update(size * len(batch))
    bar.close()
    return slices


def markdown(results: dict[str, Slices]) -> str:
    """Return the table of all models and slices in Markdown."""
    lines = [
        "| model | slice | tokens | share | loss | perplexity | accuracy |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for name, slices in results.items():
        for row in slices.table():
            lines.append(
                f"| {name} | {row['slice']} | {row['tokens']:,} | {row['share']:.1%} | {row['loss']:.4f} "
                f"| {row['perplexity']:.3f} | {row['accuracy']:.1%} |"
            )
    return "\n".join(lines)


def parse(
    argv: list[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace, dict[str, str], list[str], list[str]]:
    """Read the command line and the texts. All that can be wrong is looked for before the first model is scored.

    Returns:
        The parser, whose `error` ends the program. The options. The folder of each model by its label. The documents
        to score, and those whose frequent bigrams are known.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="DIR",
        help="checkpoint folders or Hub names; NAME=DIR labels one",
    )
    add("--text", nargs="+", required=True, metavar="FILE", help='text files, or .jsonl with a "text" per document')
    add("--known-text", nargs="+", default=[], metavar="FILE", help="training text, whose frequent bigrams are known")
    add("--known-from", type=count, default=1250, help="how often a bigram occurs there to be known")
    add(
        "--order",
        type=int,
        default=2,
        help="tokens of the n-gram that must have occurred; more where tokens are bytes",
    )
    add("--context", type=int, default=2048, help="tokens of a window")
    add("--chunk", type=int, default=512, help="tokens whose logits exist at once")
    add("--batch-size", type=int, default=1, help="windows scored at once")
    add("--mode", choices=("auto", "cache", "hidden"), default="auto", help="how a window is scored")
    add("--max-tokens", type=int, help="stop reading a document here")
    add("--device", type=known_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    add("--trust-remote-code", action="store_true", help="run the code that lies in a checkpoint's folder")
    add("--output", type=new_folder, metavar="DIR", help="write slices.json, slices.md and slices.png there")
    args = parser.parse_args(with_dashes(argv))
    if args.known_text and args.order != 2:
        parser.error(f"--known-text counts bigrams, so it goes with --order 2, not {args.order}")

    for name, value, least in (
        ("--order", args.order, 2),
        ("--context", args.context, 2),
        ("--chunk", args.chunk, 1),
        ("--batch-size", args.batch_size, 1),
        ("--max-tokens", args.max_tokens, 2),
    ):
        if value is not None and value < least:
            parser.error(f"{name} must be at least {least}, got {value}")
    models: dict[str, str] = {}
    for item in args.models:
        label, _, folder = item.rpartition("=")
        label = label or Path(folder).name
        if label in models:
            parser.error(f"--models: two are called {label}, NAME=DIR gives one another name")
        models[label] = folder
    if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        parser.error(f"--dtype is {args.dtype}; it must be auto or a dtype of torch, such as bfloat16")
    read: list[list[str]] = []
    for name, files in (("--text", args.text), ("--known-text", args.known_text)):
        try:
            read.append(read_documents(files))
        except (OSError, ValueError) as error:
            parser.error(f"{name}: {error}")
    documents, known_documents = read
    if not documents:
        parser.error(f"--text: no text in {', '.join(args.text)}")
    return parser, args, models, documents, known_documents


def write_report(results: dict[str, Slices], folder: Path) -> None:
    """Write slices.md, slices.json and slices.png."""
    write_text(folder / "slices.md", markdown(results) + "\n")
    report = {
        label: {"slices": slices.table(), "by_distance": {2**b: v for b, v in sorted(slices.by_distance.items())}}
        for label, slices in results.items()
    }
    write_text(folder / "slices.json", json.dumps(report, indent=1) + "\n")
    plot_slices(report, folder / "slices.png")


def main(argv: list[str] | None = None) -> None:
    """Score the models, and write the table, the numbers and the picture."""
    parser, args, models, documents, known_documents = parse(argv)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    results: dict[str, Slices] = {}
    for label, folder in models.items():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=args.trust_remote_code, dtype=args.dtype
            ).to(args.device)
        except (OSError, ValueError) as error:
            parser.error(f"--models: {folder} cannot be loaded: {error}")

        known: dict[int, int] = {}
        for text in known_documents:
            for bigram, times in count_bigrams(np.array(encode(text, tokenizer)), model.config.vocab_size).items():
                known[bigram] = known.get(bigram, 0) + times
        results[label] = evaluate(
            model,
            [encode(text, tokenizer)[: args.max_tokens] for text in documents],
            context=args.context,
            chunk=args.chunk,
            batch_size=args.batch_size,
            mode=args.mode,
            known=known,
            known_from=args.known_from,
            order=args.order,
            progress=True,
        )
    print(markdown(results))
    if args.output:
        write_report(results, args.output)


if __name__ == "__main__":
    main()
