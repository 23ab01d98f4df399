"""Values of a command line: what is read, and what the error says that argparse puts the argument's name before."""

import argparse

import pytest
import torch

from modeling_rebased.training.values import (
    count,
    fraction,
    integer,
    known_device,
    list_of,
    natural,
    new_folder,
    not_negative,
    positive,
)


def test_what_is_allowed_is_read(tmp_path):
    assert (integer("-3"), natural("0"), count("1"), not_negative("0"), fraction("0")) == (-3, 0, 1, 0.0, 0.0)
    assert list_of(positive)("1e-3,2") == [1e-3, 2.0]
    assert known_device("cpu") == "cpu"
    assert new_folder(str(tmp_path)) == tmp_path and new_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    assert str(new_folder("new")) == "new"


@pytest.mark.parametrize(
    "read, text, message",
    [
        (integer, "1.5", "must be an integer, got '1.5'"),
        (natural, "-1", "must be an integer of at least 0, got '-1'"),
        (count, "0", "must be an integer of at least 1, got '0'"),
        (positive, "nan", "must be a positive number, got 'nan'"),
        (not_negative, "inf", "must be a number of at least 0, got 'inf'"),
        (fraction, "1", "must be at least 0 and less than 1, got '1'"),
        (list_of(count), "3,,4", "must be an integer of at least 1, got ''"),
        (known_device, "xpu", "must be cpu.* here, got 'xpu'"),
        (known_device, "gpu", "must be cpu.* here, got 'gpu'"),
        (known_device, "cuda:99", "must be cpu.* here, got 'cuda:99'"),
        (new_folder, __file__, "must be a folder, or a new one, but .*test_values.py is a file"),
        (new_folder, f"{__file__}/x/y", "must be a folder, or a new one, but .*test_values.py is a file"),
    ],
)
def test_what_is_not_allowed_is_named(read, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{message}$"):
        read(text)


def test_the_gpus_that_there_are_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [known_device(text) for text in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(argparse.ArgumentTypeError, match="got 'cuda:2'"):
        known_device("cuda:2")
    with pytest.raises(argparse.ArgumentTypeError, match="must be cpu, cuda:0, cuda:1 or cuda here, got 'gpu'"):
        known_device("gpu")
