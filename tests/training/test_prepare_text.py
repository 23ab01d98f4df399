"""Text preparation: reading, cleaning, and the split by whole documents."""

import gzip
import json
import tarfile
import zipfile

import pytest

from modeling_rebased.training.prepare_text import clean, main, read_bible, read_dictionary, read_texts


DICTIONARY = """00-database-info
This is a header.

Lark \\Lark\\ (l[aum]rk), n. [Perh fr. AS. l[=a]c play, sport. Cf.
   {Lake}, v. i.]
   A frolic; a jolly time, spent in {mirth}
   with friends. [Colloq.] --Dickens.
   [1913 Webster]

Byte \\Byte\\ n.
   A sequence of eight bits, enough to hold one character.
   [WordNet 1.5]

Oar \\Oar\\, n.
   (Naut.)
   An implement for impelling a boat, being a slender piece of
   timber.
   [1913 Webster]

   2. An oarsman, and a very good one he is upon the water.
   [1913 Webster]
"""


def test_clean_unwraps_prose_and_leaves_verse():
    prose = "A line of prose that was broken at a fixed width of seventy\r\ncharacters, and goes on here.\r\n"
    verse = "Tyger Tyger, burning bright,\nIn the forests of the night;"
    text = clean(f"[A Book by Some Author 1900]\n\n\n\n{prose}\n{verse}   \n\n\n")
    first, second = text.rstrip("\n").split("\n\n")
    assert first.endswith("a fixed width of seventy characters, and goes on here.") and "\n" not in first
    assert second == verse


def test_read_texts_from_folder_zip_and_tar_alike(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_bytes("Zürich".encode("latin-1"))
    (folder / "a.txt").write_bytes("Zürich".encode())
    (folder / "notes.md").write_text("not read")
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"inner/{file.name}")
    with tarfile.open(tmp_path / "texts.tar.xz", "w:xz") as archive:
        archive.add(folder, "inner")
    expected = [("a", "Zürich"), ("b", "Zürich")]
    for path in (folder, tmp_path / "texts.zip", tmp_path / "texts.tar.xz"):
        assert list(read_texts(path)) == expected
    (folder / "more").mkdir()
    (folder / "more" / "a.txt").write_text("Bern")
    assert list(read_texts(folder)) == [("a", "Zürich"), ("b", "Zürich"), ("more/a", "Bern")]


def test_read_texts_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(ValueError, match="neither a folder nor"):
        list(read_texts(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"no \.txt file"):
        list(read_texts(tmp_path))
    with pytest.raises(SystemExit):
        main(["--text", str(tmp_path / "missing"), "--output-dir", str(tmp_path / "out")])
    assert "missing is neither a folder nor" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_files_that_are_cut_short_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("".join(map(str, range(9999))))
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    (tmp_path / "g.dz").write_bytes(gzip.compress(DICTIONARY.encode())[:-20])
    (tmp_path / "a.tar.xz").write_bytes((tmp_path / "a.tar.xz").read_bytes()[:-2000])
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(b"a.txta", b"a.txtb"))
    out = ["--output-dir", str(tmp_path / "out"), "--held-out", "a", "a"]
    for options, words in (
        (["--text", "a.tar.xz"], "--text a.tar.xz is damaged: "),
        (["--text", "a.zip"], "--text a.zip is damaged: "),
        (["--text", str(tmp_path), "--dictionary", "g.dz"], "--dictionary g.dz is damaged: "),
    ):
        with pytest.raises(SystemExit):
            main([*options, *out])
        assert words in capsys.readouterr().err


def test_read_bible(tmp_path):
    path = tmp_path / "kjv.txt"
    path.write_text("Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus.\n1Ti1:1 Paul.\n")
    assert list(read_bible(path)) == [
        ("bible-Ge", "In the beginning. And the earth.\n\nThus.\n"),
        ("bible-1Ti", "Paul.\n"),
    ]


def test_read_dictionary_keeps_webster_1913_only(tmp_path):
    path = tmp_path / "gcide.dict.dz"
    path.write_bytes(gzip.compress(DICTIONARY.encode()))
    assert list(read_dictionary(path)) == [
        ("dictionary-o", "Oar: An implement for impelling a boat, being a slender piece of timber.\n"),
    ]


def test_whole_documents_are_held_out_and_the_result_is_always_the_same(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("one", "two", "three"):
        (texts / f"{name}.txt").write_text(f"This is document {name}.\n")
    outputs = []
    for run in ("first", "second"):
        main(["--text", str(texts), "--held_out", "two", "--output_dir", str(tmp_path / run)])
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / run).iterdir()})
    assert outputs[0] == outputs[1]
    assert outputs[0]["train.txt"] == b"<|endoftext|>This is document one.\n<|endoftext|>This is document three.\n"
    assert outputs[0]["heldout.txt"] == b"<|endoftext|>This is document two.\n"
    assert json.loads(outputs[0]["heldout.jsonl"]) == {"title": "two", "text": "This is document two.\n"}
