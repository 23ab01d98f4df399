"""Turn English text that is in the public domain into a training file and a held-out file, always the same ones.

    apt-get install bible-kjv dict-gcide            # two optional sources; both come as Debian packages
    bible -f 'gen1:1-rev22:21' > kjv.txt            # the King James Bible, one verse per line
    python -m modeling_rebased.training.prepare_text --text corpus.tar.xz --bible kjv.txt \\
        --dictionary /usr/share/dictd/gcide.dict.dz --output-dir data/english

writes
    data/english/train.txt        all documents that are not held out, each preceded by <|endoftext|>
    data/english/heldout.jsonl    the held-out documents, one JSON object per line: title, text
    data/english/heldout.txt      the same documents in train.txt's form, for the evaluation during training

Whole documents are held out, never parts of one, so nothing of a held-out text is seen in training.
`prepare_corpus` builds a much larger text of six domains from packages.
"""

import argparse
import gzip
import json
import lzma
import re
import statistics
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .arguments import HelpFormatter, with_dashes
from .corpus_text import decode
from .folders import written
from .text import END_OF_TEXT
from .values import new_folder


# Speeches from Lincoln to Obama, a book of verse and a novel; about 270 KB.
HELD_OUT = (
    "inaugural-1865-Lincoln",
    "inaugural-1933-Roosevelt",
    "inaugural-1961-Kennedy",
    "inaugural-2009-Obama",
    "state_union-1963-Kennedy",
    "state_union-2001-GWBush-2",
    "gutenberg-blake-poems",
    "gutenberg-carroll-alice",
)
# What reading a file of these kinds raises if it is cut short or damaged.
DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every .txt file in a folder, a .zip or a tar archive, sorted by name.

    The name is that of the file without .txt, with its folder where several files have that name.

    Raises:
        ValueError: `path` is none of these, is damaged, or holds no .txt file.
    """
    try:
        if path.is_dir():
            files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.txt")}
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                files = {name: archive.read(name) for name in archive.namelist() if name.endswith(".txt")}
        elif path.is_file() and tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                names = [member.name for member in archive if member.isfile() and member.name.endswith(".txt")]
                files = {name: file.read() for name in names if (file := archive.extractfile(name))}
        else:
            raise ValueError(f"--text {path} is neither a folder nor a zip or tar archive")
    except DAMAGE as error:
        raise ValueError(f"--text {path} is damaged: {error}") from error
    if not files:
        raise ValueError(f"--text {path} holds no .txt file")
    alike = Counter(Path(file).stem for file in files)
    texts = {
        Path(file).stem if alike[Path(file).stem] == 1 else file.removesuffix(".txt"): files[file] for file in files
    }
    for name in sorted(texts):
        yield name, decode(texts[name])


def unwrap(paragraph: str) -> str:
    """Join the lines of a paragraph that was broken at a fixed width, and leave verse, lists and headings alone."""
    lines = paragraph.split("\n")
    indented = any(line.startswith((" ", "\t")) for line in lines[1:])
    if len(lines) < 2 or indented or statistics.median(map(len, lines[:-1])) < 55:
        return paragraph
    return " ".join(line.strip() for line in lines)


def clean(text: str) -> str:
    """Normalise newlines, remove trailing blanks, empty lines in a row and titles in brackets, and unwrap prose."""
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\A\s*\[[^\]\n]{1,120}\]", "", text)
    text = re.sub(r"[ \t\u00a0]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    return "\n\n".join(unwrap(paragraph) for paragraph in text.split("\n\n")) + "\n"


def read_bible(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (book, text) from `bible -f` output (`Ge1:1 In the beginning ...`), with one paragraph per chapter."""
    books: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = re.match(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line)
        if verse:
            book, chapter, words = verse.groups()
            books.setdefault(book, {}).setdefault(chapter, []).append(words.strip())
    if not books:
        raise ValueError(f"--bible {path} holds no line like 'Ge1:1 In the beginning'; make it with `bible -f`")
    for book, chapters in books.items():
        yield f"bible-{book}", "\n\n".join(" ".join(verses) for verses in chapters.values()) + "\n"


def read_dictionary(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (letter, text) from a dictd file of GCIDE: the definitions of Webster's dictionary of 1913.

    Each definition carries its source, and entries from younger sources are left out. So are pronunciations,
    etymologies, and anything that still has markup. Only the first usable definition of an entry is kept, so that the
    dictionary does not outweigh the prose. Each entry is one line: `Lark: A frolic; a jolly time.`
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix in (".dz", ".gz") else path.read_bytes()
    except DAMAGE as error:
        raise ValueError(f"--dictionary {path} is damaged: {error}") from error
    letters: dict[str, list[str]] = {}
    # An entry starts at the margin, its body is indented.
    for entry in re.split(r"\n(?=\S)", decode(raw)):
        head, _, body = entry.partition("\n")
        word = re.match(r"([A-Z][A-Za-z' -]+) \\", head)
        sources = set(re.findall(r"\[((?:1913 Webster|WordNet|PJC|Century|RP|AS|JDM)[^\]]*)\]", body))
        if word is None or sources != {"1913 Webster"}:
            continue
        for definition in body.split("[1913 Webster]"):
            text = re.sub(r"\s+", " ", definition).strip()
            text = re.sub(r"^(\d+\.|\([a-z]\)|Note:|Syn:) ", "", text)
            text = re.sub(r"^\([A-Z][A-Za-z. &]*\) ", "", text)  # the subject, such as (Zool.)
            text = re.sub(r" ?\[(Obs|R|Colloq|Archaic|Poetic|Eng|Scot|Low|Written also)[^\]]*\]", "", text)
            text = text.replace("{", "").replace("}", "").replace(" --", " -- ").replace("  ", " ").strip()
            if len(text) >= 40 and text[0].isupper() and text[-1] in ".?!" and not re.search(r"[\[\]\\|_=<>]", text):
                letters.setdefault(word[1][0].lower(), []).append(f"{word[1]}: {text}")
                break
    if not letters:
        raise ValueError(f"--dictionary {path} holds no entry of Webster's 1913 in GCIDE's dictd form")
    for letter in sorted(letters):
        yield f"dictionary-{letter}", "\n".join(letters[letter]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Read the sources named on the command line and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--text", type=Path, required=True, help="folder, zip or tar archive of .txt files")
    parser.add_argument("--bible", type=Path, help="output of `bible -f 'gen1:1-rev22:21'`")
    parser.add_argument("--dictionary", type=Path, help="gcide.dict.dz")
    parser.add_argument("--held-out", nargs="*", default=list(HELD_OUT), help="names (without .txt) to hold out")
    parser.add_argument("--output-dir", type=new_folder, required=True, help="folder for the files")
    args = parser.parse_args(with_dashes(argv))

    try:
        documents = {name: clean(text) for name, text in read_texts(args.text)}
        missing = sorted(set(args.held_out) - set(documents))
        if missing:
            raise ValueError(f"--held-out names documents that --text does not hold: {', '.join(missing)}")
        held_out = {name: documents.pop(name) for name in dict.fromkeys(args.held_out)}
        if args.bible:
            documents.update(read_bible(args.bible))
        if args.dictionary:
            documents.update(read_dictionary(args.dictionary))
    except (OSError, ValueError) as error:
        parser.error(str(error))

    lines = [json.dumps({"title": title, "text": text}, ensure_ascii=False) for title, text in held_out.items()]
    contents = {"heldout.jsonl": "\n".join(lines) + "\n"}
    for name, texts in (("train.txt", documents), ("heldout.txt", held_out)):
        contents[name] = "".join(END_OF_TEXT + text for text in texts.values())
        print(f"{args.output_dir / name}: {len(texts)} documents, {len(contents[name].encode('utf-8')):,} bytes")
    for name, content in contents.items():
        with written(args.output_dir / name) as path:
            path.write_bytes(content.encode("utf-8"))


if __name__ == "__main__":
    main()
