"""Turn the teacher's texts into training text, held-out text and a tokenizer.

    python -m modeling_rebased.training.prepare_stories data/stories/raw --output-dir data/stories

reads the shards of `write_stories` and writes
    data/stories/train.txt        each document preceded by <|endoftext|>
    data/stories/heldout.txt      the same for the held-out requests, one request in 200
    data/stories/heldout.jsonl    up to 250 KB of them, one JSON object per line: title, text
    data/stories/tokenizer/       byte-level BPE of 4,096 pieces, learnt on the training text
    data/stories/figures.json     how many texts were dropped, and why

A text is dropped if it did not end, is too short or too long, is not plain text in ASCII, speaks as an assistant,
does not mention its persons, or repeats itself. It is also dropped if it is a near copy: if half of its runs of eight
words stand in texts before it. A training text may share at most a fifth of them with the held-out texts. All names
count as one word there, so that the same story with other names is a copy.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .arguments import with_dashes
from .byte_tokenizer import PAD
from .folders import written
from .story_prompts import WORDS as STORY_WORDS
from .story_prompts import story_prompt
from .text import END_OF_TEXT


HELD_OUT = 200  # of so many requests one is held out
REPOSITORY_BYTES = 250_000
WORDS = (40, 400)
MOST_REPEATED = 0.1  # share of runs of four words that were in the text before
NEAR_COPY, NEAR_HELD_OUT = 0.5, 0.2
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u00a0": " ",
                       "\u2014": " - ", "\u2026": "...", "\u00e9": "e"})  # fmt: skip
MARKUP = re.compile(r"[*#_\[\]{}<>|\\`^~=@/]|^\s*(\d+[.)]|[-+] )|(^|\n)\w[\w ]{0,20}:", re.MULTILINE)
ASSISTANT = re.compile(
    r"\bas an ai\b|language model|\bassistant\b|smollm|hugging face|word count|children's book|bedtime story|"
    r"\bthis (short |simple )?(story|dialogue|tale)\b|moral of|\btitled?\b|\bthe end[.!]?$",
    re.IGNORECASE,
)
NAMES = frozenset(name.lower() for name in STORY_WORDS["girls"] + STORY_WORDS["boys"])


def clean(text: str) -> str:
    """Return a text with straight quotes, one blank between words and one blank line between paragraphs."""
    text = text.translate(PLAIN).replace("\r", "")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n+", text))
    return "\n\n".join(part for part in paragraphs if part)


def runs(words: list[str], length: int) -> np.ndarray:
    """Return a hash of each run of `length` words, [max(0, words - length + 1)], uint64."""
    if len(words) < length:
        return np.empty(0, np.uint64)
    hashes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    powers = np.array([pow(0x9E3779B97F4A7C15, i, 2**64) for i in range(length)], dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(hashes + np.uint64(1), length)
    return (windows * powers).sum(1, dtype=np.uint64)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def repeated(text: str, length: int = 4) -> float:
    """Return the share of runs of `length` words that stood in the text before."""
    found = runs(words_of(text), length)
    return 1 - len(np.unique(found)) / len(found) if len(found) else 0.0


def fault(text: str, ended: bool, names: tuple[str, ...]) -> str | None:
    """Return why a cleaned text is to be dropped, or `None` if it is not.

    Args:
        text: what `clean` returned.
        ended: whether its writer ended it.
        names: what it must mention at least twice.
    """
    if not ended or not re.search(r"[.!?][\"']?$", text):
        return "no ending"
    if not WORDS[0] <= len(text.split()) <= WORDS[1]:
        return "length"
    if not text.isascii() or MARKUP.search(text) or text.count('"') % 2:
        return "not plain text"
    if ASSISTANT.search(text):
        return "speaks as an assistant"
    if any(len(re.findall(rf"\b{name}\b", text)) < 2 for name in names):
        return "without its persons"
    if repeated(text) > MOST_REPEATED:
        return "repeats itself"
    return None


def read_shard(path: Path) -> tuple[list[tuple[int, str, np.ndarray]], Counter[str]]:
    """Return the good texts of a shard as (number, text, hashes of runs of eight words), and counts of the rest."""
    good: list[tuple[int, str, np.ndarray]] = []
    dropped: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        text = clean(entry["text"])
        reason = fault(text, entry["ended"], story_prompt(entry["number"]).names)
        if reason is not None:
            dropped[reason] += 1
            continue
        words = ["name" if word in NAMES else word for word in words_of(text)]
        good.append((entry["number"], text, np.unique(runs(words, 8))))
    return good, dropped


def copies(hashes: list[np.ndarray], held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each text the share of its runs that stand in an earlier text, and in an earlier held-out text.

    Args:
        hashes: the distinct runs of each text.
        held_out: number of texts at the beginning that are held out.
    """
    sizes = np.array([len(each) for each in hashes])
    text = np.repeat(np.arange(len(hashes)), sizes)
    _, place, inverse = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    first = text[place][inverse]  # the first text that has this run
    before = np.bincount(text, (first < text), len(hashes))
    in_held_out = np.bincount(text, (first < text) & (first < held_out), len(hashes))
    return before / np.maximum(sizes, 1), in_held_out / np.maximum(sizes, 1)


def learn_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts <|endoftext|> before a text and pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A prompt begins a story, and in training this token stands before each of them.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="folder of the shards")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer (%(default)s)")
    parser.add_argument("--tokenizer-texts", type=int, default=50_000, help="texts it learns from (%(default)s)")
    args = parser.parse_args(with_dashes(argv))
    shards = sorted(args.raw.glob("shard-*.jsonl"))
    if not shards:
        parser.error(f"{args.raw} holds no shard-*.jsonl; write_stories makes them")

    dropped: Counter[str] = Counter()
    texts: list[tuple[int, str, np.ndarray]] = []
    with ProcessPoolExecutor() as pool:
        for good, counts in pool.map(read_shard, shards):
            texts += good
            dropped += counts
    texts.sort(key=lambda each: each[0] % HELD_OUT != 0)  # the held-out texts first
    held_out = sum(number % HELD_OUT == 0 for number, _, _ in texts)
    before, near_held_out = copies([hashes for _, _, hashes in texts], held_out)
    kept: dict[bool, list[str]] = {True: [], False: []}
    for i, (_, text, _) in enumerate(texts):
        is_held_out = i < held_out
        if before[i] >= NEAR_COPY or (not is_held_out and near_held_out[i] >= NEAR_HELD_OUT):
            dropped["near copy"] += 1
        else:
            kept[is_held_out].append(text)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, is_held_out in (("train.txt", False), ("heldout.txt", True)):
        with written(args.output_dir / name) as path:
            path.write_text("".join(f"{END_OF_TEXT}{text}\n" for text in kept[is_held_out]), encoding="utf-8")
    lines, size = [], 0
    for i, text in enumerate(kept[True]):
        lines.append(json.dumps({"title": f"story-{i}", "text": text}) + "\n")
        size += len(lines[-1])
        if size > REPOSITORY_BYTES:
            break
    with written(args.output_dir / "heldout.jsonl") as path:
        path.write_text("".join(lines), encoding="utf-8")
    tokenizer = learn_tokenizer(kept[False][: args.tokenizer_texts], args.vocab_size)
    with written(args.output_dir / "tokenizer") as path:
        tokenizer.save_pretrained(path)
    figures: dict[str, Any] = {
        "texts written": len(texts) + dropped.total() - dropped["near copy"],
        "texts for training": len(kept[False]),
        "texts held out": len(kept[True]),
        "dropped": dict(dropped),
        "training bytes": sum(map(len, kept[False])),
    }
    with written(args.output_dir / "figures.json") as path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
