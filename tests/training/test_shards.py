"""Token ids in numbered files, and blocks that are read from them."""

import json

import numpy as np
import pytest
import torch

from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.card import file_size, warm_up
from modeling_rebased.training.shards import JoinedArrays, compress_shard, read_index, write_index, write_shard
from modeling_rebased.training.text import TokenBlocks


@pytest.fixture
def folder(tmp_path):
    tokenizer = byte_tokenizer()
    for number, text in enumerate(["the cat sat", "on a mat with a dog"]):
        write_shard(tmp_path / "ids", number, np.array(tokenizer(text)["input_ids"]), len(tokenizer))
    write_index(tmp_path / "ids", tokenizer, {"program": "a test"})
    return tmp_path / "ids"


def test_blocks_run_across_shards(folder, tmp_path):
    tokenizer = byte_tokenizer()
    blocks = TokenBlocks([str(folder)], tokenizer, 7)
    text = "the cat sat" + "on a mat with a dog"
    assert tokenizer.decode(blocks.blocks(0, len(blocks)).flatten().tolist()) == text[:28]
    assert len(blocks) == 4 and len(blocks.tokens) == blocks.num_bytes == len(text)
    assert torch.equal(blocks[1]["input_ids"], torch.tensor(tokenizer(text[7:14])["input_ids"]))
    # beside a text, and with a folder for encoded tokens, which shards do not use
    (tmp_path / "text.txt").write_text("more")
    both = TokenBlocks([str(tmp_path / "text.txt"), str(folder)], tokenizer, 5, tmp_path / "cache")
    start = tokenizer.eos_token_id
    assert both.blocks(0, 1).tolist() == [[start, *tokenizer("more")["input_ids"]]]
    assert tokenizer.decode(both.blocks(1, 3).flatten().tolist()) == text[:10]
    assert both.num_bytes == len(text) + 4 and not (tmp_path / "cache").exists()


def test_the_files_are_what_their_description_says(folder):
    raw = (folder / "shard-00000.bin").read_bytes()
    assert np.frombuffer(raw, "<u2").tolist() == byte_tokenizer()("the cat sat")["input_ids"]
    index = json.loads((folder / "index.json").read_text())
    assert index["tokens"] == 30 and index["dtype"] == "uint16" and index["vocab_size"] == len(byte_tokenizer())
    assert [each["tokens"] for each in index["shards"]] == [11, 19] and index["made_by"] == {"program": "a test"}


def test_other_shards_are_another_text(folder):
    tokenizer = byte_tokenizer()
    before = TokenBlocks([str(folder)], tokenizer, 4).identity
    assert TokenBlocks([str(folder)], tokenizer, 4).identity == before
    write_shard(folder, 2, np.array([5, 6, 7]), len(tokenizer))
    assert write_index(folder, tokenizer, {}) == 33
    assert TokenBlocks([str(folder)], tokenizer, 4).identity != before


def test_damaged_folders(folder, tmp_path):
    with pytest.raises(ValueError, match=r"ids must be 0 to 2\d\d, but are 3 to 70000"):
        write_shard(folder, 3, np.array([3, 70_000]), len(byte_tokenizer()))
    assert not (folder / "shard-00003.bin").exists()
    with pytest.raises(ValueError, match=r"has no index\.json"):
        TokenBlocks([str(tmp_path)], byte_tokenizer(), 4)
    (folder / "shard-00001.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"shard-00001\.bin has 2 bytes, but index\.json says 19 tokens of 2 bytes"):
        read_index(folder)
    (folder / "shard-00001.bin").unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_index(folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"tokenizer": "0"}))
    with pytest.raises(ValueError, match="another tokenizer: its hash is 0"):
        TokenBlocks([str(folder)], byte_tokenizer(), 4)
    for broken in ("{", "{}", json.dumps(index | {"dtype": "int8"}), json.dumps(index | {"shards": [{"file": ""}]})):
        (folder / "index.json").write_text(broken)
        with pytest.raises(ValueError, match=r"index\.json is no index of shards"):
            read_index(folder)


def test_joined_arrays_are_cut_as_one():
    parts = [np.arange(0, 3), np.arange(3, 3), np.arange(3, 10)]
    joined = JoinedArrays(parts)
    for start in range(11):
        for stop in range(12):
            assert joined[start:stop].tolist() == list(range(10))[start:stop]
    assert len(JoinedArrays([])) == 0 and JoinedArrays([])[0:5].tolist() == []
    with pytest.raises(ValueError, match="must be 1, but is 2"):
        joined[::2]


def test_compressed_shards_are_unpacked_when_they_are_read(folder):
    before = TokenBlocks([str(folder)], byte_tokenizer(), 7)
    compress_shard(folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "shard-00000.bin", "shard-00001.bin.xz"]
    after = TokenBlocks([str(folder)], byte_tokenizer(), 7)
    assert torch.equal(before.blocks(0, 4), after.blocks(0, 4)) and before.identity == after.identity
    (folder / "shard-00001.bin").unlink()
    (folder / "shard-00001.bin.xz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"shard-00001\.bin\.xz is damaged"):
        read_index(folder)
    assert not (folder / "shard-00001.bin").exists()


def test_a_card_gives_the_warm_up_as_steps_or_as_a_share():
    assert [warm_up(steps) for steps in (0, 0.05, 1, 30.0)] == ["none", "0.05 of all steps", "1 steps", "30 steps"]


def test_a_card_gives_the_size_of_the_text_in_shards(folder):
    index = read_index(folder)
    tokens, size = (sum(each[key] for each in index["shards"]) for key in ("tokens", "bytes"))
    assert file_size(folder) == f"{size:,} bytes of text, {tokens:,} tokens" and tokens > 0


def test_the_size_of_the_text_may_be_given(folder):
    (folder / "index.json").unlink()
    write_index(folder, byte_tokenizer(), {}, num_bytes=[5, 6])
    assert TokenBlocks([str(folder)], byte_tokenizer(), 7).num_bytes == 11
