"""The byte-level tokenizer."""

import pytest
from transformers import AutoTokenizer

from modeling_rebased.training.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer as a user gets it: written to a folder, loaded by AutoTokenizer without remote code."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    ["", "plain text", "  two  blanks , and\ttabs\r\n\n", "naïve café, 東京, 🙂", "".join(map(chr, range(256)))],
)
def test_ids_are_the_bytes_and_decode_to_the_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 256
    assert tokenizer.pad_token_id == 257
    assert len(tokenizer) == 258
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [97, 256, 98]
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"


def test_every_byte_decodes_even_where_it_is_no_utf8(tokenizer):
    for byte in range(256):
        assert len(tokenizer.decode([byte])) == 1


def test_padding(tokenizer):
    batch = tokenizer(["abc", "d"], padding=True)
    assert batch["input_ids"] == [[97, 98, 99], [257, 257, 100]]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
