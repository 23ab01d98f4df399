"""Documents and scores of the two perplexity tasks in this folder, for lm-eval's YAML files."""

import json
import os
import re
from pathlib import Path
from typing import Any

from datasets import Dataset


def _dataset(documents: list[dict[str, str]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(documents)}


def load_heldout(**_: Any) -> dict[str, Dataset]:
    """Return the held-out documents that lie beside this file, as lm-eval's `custom_dataset` wants them."""
    text = (Path(__file__).resolve().parent / "heldout_english.jsonl").read_text(encoding="utf-8")
    return _dataset([json.loads(line) for line in text.split("\n") if line])


def load_text(text_file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the user's own text: `--metadata '{"text_file": "my.txt"}'`, or the variable REBASED_PPL_TEXT.

    A .jsonl file holds one document a line, under the key "text". Any other file is plain text, documents separated
    by <|endoftext|> where there are several.

    Raises:
        ValueError: no file is named, it cannot be read as UTF-8 or as JSON lines with a "text", or it is empty.
    """
    name = text_file or os.environ.get("REBASED_PPL_TEXT")
    if not name:
        raise ValueError(
            'the task rebased_ppl needs a text file: --metadata \'{"text_file": "my.txt"}\' or REBASED_PPL_TEXT=my.txt'
        )
    if not isinstance(name, str):
        raise ValueError(f"text_file of the task rebased_ppl must be a path, got {name!r}")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text_file {name} of the task rebased_ppl must be a text file in UTF-8: {error}") from error
    if name.endswith(".jsonl"):
        texts = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    texts.append(json.loads(line)["text"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f'text_file {name} of the task rebased_ppl, line {number}: must be JSON with a field "text"'
                    ) from error
    else:
        texts = text.split("<|endoftext|>")
    documents = [{"title": f"{Path(name).stem}-{i}", "text": part} for i, part in enumerate(texts) if part.strip()]
    if not documents:
        raise ValueError(f"the text file {name} of the task rebased_ppl holds no text")
    return _dataset(documents)


def process_results(doc: dict[str, str], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """Return each metric's (log-likelihood, count) pair; lm-eval sums both over the documents and divides."""
    (loglikelihood,) = results
    words = len(re.split(r"\s+", doc["text"].strip()))
    size = len(doc["text"].encode("utf-8"))
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, size),
        "bits_per_byte": (loglikelihood, size),
    }
