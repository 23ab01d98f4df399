"""Reading documents and making blocks: one rule for training, distillation and evaluation."""

import json

import numpy as np
import pytest

from modeling_rebased.eval.tasks.rebased_ppl import load_text
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.text import TokenBlocks, encode, read_documents


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
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert read_documents([tmp_path / "a.jsonl"]) == ["a\u2028b", "c"]
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
