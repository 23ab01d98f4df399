"""Write held-out texts of four registers, in three pieces each, for mixed.sh.

    python eval/results/conversion/mixed_texts.py CORPUS/heldout TEXTS

Books, manuals and code are documents that the corpus holds out. Changelogs of Debian packages are those of
/usr/share/doc, a register that the corpus does not have.
"""

import gzip
import json
import random
import sys
from pathlib import Path


SIZE = 230_000  # characters of a piece

held_out, output = map(Path, sys.argv[1:])
output.mkdir(parents=True, exist_ok=True)
registers = {
    name: [json.loads(line)["text"] for line in (held_out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("books", "manuals", "code")
}
registers["changelogs"] = []
for path in sorted(Path("/usr/share/doc").glob("*/changelog*.gz")):
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except UnicodeDecodeError:
        continue
    if len(text) > 2000:
        registers["changelogs"].append(text)
for name, documents in registers.items():
    random.Random(0).shuffle(documents)
    pieces: list[list[str]] = [[], [], []]
    for document in documents:
        smallest = min(pieces, key=lambda piece: sum(map(len, piece)))
        if sum(map(len, smallest)) >= SIZE:
            break
        smallest.append(document[:60_000])
    for number, piece in enumerate(pieces, 1):
        (output / f"{name}-{number}.txt").write_text("<|endoftext|>".join(piece)[:SIZE], encoding="utf-8")
