"""Documents and scores of the perplexity tasks in this folder, for lm-eval's YAML files."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset


# lm-eval loads this file by its path. Its console script does not find a checkout that is not installed.
if importlib.util.find_spec("modeling_rebased") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from modeling_rebased.eval.tasks import checks_metadata
from modeling_rebased.training.text import read_documents


def _dataset(documents: list[dict[str, str]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(documents)}


def _beside(name: str) -> dict[str, Dataset]:
    text = (Path(__file__).resolve().parent / name).read_text(encoding="utf-8")
    return _dataset([json.loads(line) for line in text.split("\n") if line])


def load_heldout(**_: Any) -> dict[str, Dataset]:
    """Return the held-out documents that lie beside this file, as lm-eval's `custom_dataset` wants them."""
    return _beside("heldout_english.jsonl")


def load_heldout_stories(**_: Any) -> dict[str, Dataset]:
    """Return the held-out stories that lie beside this file, as lm-eval's `custom_dataset` wants them."""
    return _beside("heldout_stories.jsonl")


@checks_metadata
def load_text(text_file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the user's own text: `--metadata '{"text_file": "my.txt"}'`, or the variable REBASED_PPL_TEXT.

    The file is read as in training: a .jsonl file holds one document per line, under the key "text"; any other file is
    plain text, in which <|endoftext|> separates documents.

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
        texts = read_documents([name])
    except (OSError, ValueError) as error:
        kind = 'JSON lines with a "text" each' if name.endswith(".jsonl") else "a text file in UTF-8"
        raise ValueError(f"text_file {name} of the task rebased_ppl must be {kind}: {error}") from error
    documents = [{"title": f"{Path(name).stem}-{i}", "text": part} for i, part in enumerate(texts)]
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
