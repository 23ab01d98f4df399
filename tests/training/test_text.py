"""Reading documents and making blocks: one rule for training, distillation and evaluation."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.shards import tokenizer_identity
from modeling_rebased.training.text import TokenBlocks, encode, encode_all, read_documents, read_token_ids


DOCUMENTS = ["one\n", "two", "three: naïve"]


@pytest.fixture(params=["txt", "jsonl"])
def file(request, tmp_path):
    path = tmp_path / f"text.{request.param}"
    if request.param == "txt":
        path.write_text("<|endoftext|>" + "<|endoftext|>".join(DOCUMENTS) + "<|endoftext|>\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"text": each}) + "\n\n" for each in [*DOCUMENTS, " "]), encoding="utf-8")
    return str(path)


def test_documents_are_separated_and_blank_ones_left_out(file):
    assert read_documents([file, file]) == DOCUMENTS * 2
    pytest.importorskip("datasets")
    from modeling_rebased.eval.tasks.rebased_ppl import load_text

    assert load_text(text_file=file)["test"]["text"] == DOCUMENTS


def test_the_end_of_text_token_stands_before_each_document(file, tmp_path):
    expected = [token for each in DOCUMENTS for token in (256, *each.encode())]
    assert [token for each in DOCUMENTS for token in encode(each, byte_tokenizer())] == expected
    for cache_dir in (None, tmp_path / "cache", tmp_path / "cache"):
        blocks = TokenBlocks([file], byte_tokenizer(), 4, cache_dir)
        assert blocks.tokens.tolist() == expected and blocks.tokens.dtype == np.uint16
        assert blocks.num_bytes == sum(len(each.encode()) for each in DOCUMENTS)
        assert blocks.blocks(0, 99).flatten().tolist() == expected[: len(expected) // 4 * 4]
        assert [each["input_ids"].tolist() for each in blocks] == blocks.blocks(0, len(blocks)).tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_token_ids_count_as_their_text(file, tmp_path):
    text = TokenBlocks([file], byte_tokenizer(), 4)
    np.save(tmp_path / "ids.npy", text.tokens)
    ids = TokenBlocks([str(tmp_path / "ids.npy")], byte_tokenizer(), 4)
    assert np.array_equal(ids.tokens, text.tokens) and ids.num_bytes == text.num_bytes


def test_lines_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n\n{"text": "c\\ud83d\\ude00"}\n', encoding="utf-8")
    assert read_documents([tmp_path / "a.jsonl"]) == ["a\u2028b", "c\U0001f600"]
    for line, words in (('{"body": "x"}', 'line 1: no field "text", there is body'), ("{", "line 1: no JSON")):
        (tmp_path / "b.jsonl").write_text(line)
        with pytest.raises(ValueError, match=words):
            read_documents([tmp_path / "b.jsonl"])


def test_another_tokenizer_or_text_has_another_identity(file, tmp_path):
    other = byte_tokenizer()
    other.add_tokens(["the"])
    (tmp_path / "other.txt").write_text("another text")
    found = {TokenBlocks([file], tokenizer, 4).identity for tokenizer in (byte_tokenizer(), other)}
    assert len(found | {TokenBlocks([str(tmp_path / "other.txt")], byte_tokenizer(), 4).identity}) == 3


def test_text_that_cannot_be_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(tmp_path / 'a.txt'))} must be text in UTF-8, at byte 2 it is not: 0xff$"
    ):
        read_documents([tmp_path / "a.txt"])
    path = tmp_path / "b.jsonl"
    for line, words in (
        ('{"text": 3, "id": 1}', 'no field "text", there is text, id'),
        ("[1]", 'no field "text", there is list'),
        ("{", "no JSON: Expecting property name"),
        ('{"text": "a\\ud800"}', "the text has half of a surrogate pair"),
    ):
        path.write_text('{"text": "x"}\n \n' + line)
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path}, line 3: {words}')}"):
            read_documents([path])


def test_token_ids_that_cannot_be(tmp_path):
    tokenizer, path = byte_tokenizer(), tmp_path / "a.npy"
    size = len(tokenizer)
    for ids in (np.array([0, size - 1]), np.array([], dtype=np.uint8), np.array([1], dtype=np.uint16)):
        np.save(path, ids)
        assert np.array_equal(read_token_ids(path, tokenizer), ids)
    start = f"{path} must be a vector of token ids below {size}, but is "
    for ids, words in (
        (np.array([0, size]), f"int64 of shape (2,), from 0 to {size}."),
        (np.array([-1, 5]), "int64 of shape (2,), from -1 to 5."),
        (np.array([[1], [2]], dtype=np.int32), "int32 of shape (2, 1), from 0 to 2."),
        (np.empty((0, 2), dtype=np.int64), "int64 of shape (0, 2), from 0 to 0."),
        (np.array([1.0]), "float64 of shape (1,), from 0.0 to 1.0."),
    ):
        np.save(path, ids)
        with pytest.raises(ValueError, match=f"^{re.escape(start + words)}$"):
            read_token_ids(path, tokenizer)
    for content in (b"no array", b"", np.array([{}], dtype=object)):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no array of numbers: "):
            read_token_ids(path, tokenizer)


def test_blocks_of_several_files(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text("abc<|endoftext|>de")
    np.save(tmp_path / "b.npy", np.array([256, 97, 98]))
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.npy"), str(tmp_path / "a.txt")]
    expected = [256, 97, 98, 99, 256, 100, 101, 256, 97, 98, 256, 97, 98, 99, 256, 100, 101]
    identity = hashlib.sha256(tokenizer_identity(tokenizer).encode())
    for part in ("abc", "de", [256, 97, 98], "abc", "de"):
        if isinstance(part, str):
            identity.update(b"<|endoftext|>" + part.encode())
        else:
            identity.update(b"<|ids|>" + np.array(part, dtype="<i8").tobytes())
    for cache_dir in (None, tmp_path / "a" / "cache", str(tmp_path / "a" / "cache")):
        blocks = TokenBlocks(files, tokenizer, 5, cache_dir)
        assert blocks.tokens.tolist() == expected and blocks.tokens.dtype == np.uint16
        assert (blocks.num_bytes, blocks.identity) == (12, identity.hexdigest()[:16])
        assert (len(blocks), blocks.length) == (3, 5)
        assert torch.equal(blocks[2]["labels"], torch.tensor(expected[10:15]))
        assert blocks[0]["input_ids"].dtype == torch.int64
        assert blocks.blocks(1, 2).tolist() == [expected[5:10]] and blocks.blocks(1, 9).shape == (2, 5)
        for index in (-1, 3):
            with pytest.raises(IndexError, match=f"^block {index} of 3$"):
                blocks[index]
    assert [path.name for path in (tmp_path / "a" / "cache").iterdir()] == [f"tokens-{blocks.identity}.bin"]
    assert len(TokenBlocks(files, tokenizer, 17)) == 1
    with pytest.raises(
        ValueError, match=f"^--context_length is 18, but {re.escape(', '.join(files))} hold only 17 tokens$"
    ):
        TokenBlocks(files, tokenizer, 18)
    (tmp_path / "empty.txt").write_text(" ")
    for cache_dir in (None, tmp_path / "cache"):
        with pytest.raises(ValueError, match="holds only 0 tokens"):
            TokenBlocks([str(tmp_path / "empty.txt")], tokenizer, 2, cache_dir)
    with pytest.raises(ValueError, match="--context_length is 1; it must be at least 2"):
        TokenBlocks(files, tokenizer, 1)


def test_documents_are_encoded_a_thousand_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(2001)))
    sizes = []

    def counted(documents, tokenizer):
        sizes.append(len(documents))
        return encode_all(documents, tokenizer)

    monkeypatch.setattr("modeling_rebased.training.text.encode_all", counted)
    blocks = TokenBlocks([str(tmp_path / "a.jsonl")], byte_tokenizer(), 4)
    assert sizes == [1000, 1000, 1]
    assert blocks.tokens.tolist() == [token for i in range(2001) for token in (256, *str(i).encode())]


def test_stored_tokens_are_not_encoded_again(file, tmp_path, monkeypatch):
    first = TokenBlocks([file], byte_tokenizer(), 4, tmp_path / "cache")
    monkeypatch.setattr("modeling_rebased.training.text.encode_all", None)
    again = TokenBlocks([file], byte_tokenizer(), 4, tmp_path / "cache")
    assert np.array_equal(again.tokens, first.tokens) and isinstance(again.tokens, np.memmap)
    assert not again.tokens.flags.writeable
    monkeypatch.undo()
    bars = []
    monkeypatch.setattr(
        "modeling_rebased.training.text.tqdm", lambda part, *what, **how: bars.append((what, how)) or part
    )
    TokenBlocks([file, file], byte_tokenizer(), 4, tmp_path / "cache")
    assert bars == [(("encoding",), {"disable": None, "leave": False})] * 2


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_type_of_stored_tokens_follows_the_vocabulary(file, tmp_path, size, dtype):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(size - len(tokenizer))])
    assert len(tokenizer) == size
    for cache_dir in (None, tmp_path / "cache"):
        assert TokenBlocks([file], tokenizer, 4, cache_dir).tokens.dtype == dtype


def test_a_tokenizer_without_an_end_or_a_fast_backend():
    class Plain:
        eos_token_id = None

        def get_vocab(self):
            return {"b": 1, "a": 0}

        def __call__(self, documents, **options):
            assert options == {"add_special_tokens": False, "verbose": False}
            return {"input_ids": [[len(document)] for document in documents]}

    assert encode("abc", Plain()) == [3] and encode_all(["abc", "d"], Plain()) == [[3], [1]]
    expected = hashlib.sha256(json.dumps([["a", 0], ["b", 1]]).encode()).hexdigest()[:16]
    assert tokenizer_identity(Plain()) == expected
    fast = byte_tokenizer()
    expected = hashlib.sha256(fast.backend_tokenizer.to_str().encode()).hexdigest()[:16]
    assert tokenizer_identity(fast) == expected
    fast(["a", "bcd"], padding=True, truncation=True, max_length=2)  # which the backend remembers
    assert fast.backend_tokenizer.padding is not None and tokenizer_identity(fast) == expected
    assert fast.backend_tokenizer.padding is not None
