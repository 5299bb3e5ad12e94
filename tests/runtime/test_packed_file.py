"""Packed adapters read in one stretch, against safetensors' own reader."""

import hashlib
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraport.errors import LoraportError
from loraport.runtime.packed_file import read_whole
from loraport.runtime.values import torch_of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


@pytest.fixture
def file(tmp_path):
    """A file with every dtype, odd sizes and an empty tensor."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"{number}.{dtype}": (torch.randn(3, 5 + number, generator=random) * 9).to(dtype)
        for number, dtype in enumerate(DTYPES)
    }
    tensors["empty"] = torch.empty(0, 7)
    save_file(tensors, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def same(array, tensor):
    """Tell whether an array has a tensor's dtype, shape and bits."""
    alike = array.shape == tuple(tensor.shape) and torch_of(array).dtype == tensor.dtype
    bits = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return alike and np.array_equal(array.ravel().view(np.uint8), bits)


def test_tensors_are_those_of_safetensors(file):
    expected, got = load_file(file), read_whole(file)
    assert got.keys() == expected.keys()
    assert all(same(got[name], tensor) for name, tensor in expected.items())
    assert not same(got["1.torch.float32"][::-1].copy(), expected["1.torch.float32"])


def test_parts_read_at_once_are_put_together(file, monkeypatch):
    from loraport.runtime import packed_file

    monkeypatch.setattr(packed_file, "_LEAST_PART", 7)
    monkeypatch.setattr(packed_file, "_HASHED_PART", 11)
    monkeypatch.setattr(packed_file.os, "cpu_count", lambda: 3)
    expected = load_file(file)
    for sha256 in (None, hashlib.sha256(file.read_bytes()).hexdigest()):
        got = read_whole(file, sha256)
        assert all(same(got[name], tensor) for name, tensor in expected.items())


def test_the_file_may_be_cut_short_afterwards(file):
    expected, got = load_file(file), read_whole(file)
    kept = {name: tensor.clone() for name, tensor in expected.items()}
    del expected
    os.truncate(file, 10)
    assert all(same(got[name], tensor) for name, tensor in kept.items())


def test_tensors_begin_where_vector_instructions_like_it(file):
    assert min(array.ctypes.data for array in read_whole(file).values() if len(array)) % 64 == 0


@pytest.mark.parametrize("position", [30, -1], ids=["header", "tensors"])
def test_a_file_that_is_not_the_one_the_hash_says(file, position):
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    read_whole(file, sha256)
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(LoraportError, match=rf"expected sha256 {sha256[:12]}|safetensors header"):
        read_whole(file, sha256)


def test_a_file_without_tensors_is_hashed_too(tmp_path):
    save_file({}, tmp_path / "none", {"note": "a"})
    sha256 = hashlib.sha256((tmp_path / "none").read_bytes()).hexdigest()
    assert read_whole(tmp_path / "none", sha256) == {}
    with pytest.raises(LoraportError, match="expected sha256 000"):
        read_whole(tmp_path / "none", "0" * 64)


def test_dtypes_that_numpy_lacks_are_named(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(4).to(torch.float8_e5m2)}, tmp_path / "f8")
    with pytest.raises(LoraportError, match=r"  - b: expected one of .*BF16.*, got F8_E5M2"):
        read_whole(tmp_path / "f8")


def test_a_file_that_shrinks_while_it_is_read(file, monkeypatch):
    from loraport.runtime import packed_file

    class Shrinking(packed_file.Checkpoint):
        def __init__(self, path):
            super().__init__(path)
            os.truncate(path, path.stat().st_size - 1)

    monkeypatch.setattr(packed_file, "Checkpoint", Shrinking)
    with pytest.raises(LoraportError, match=r"one\.safetensors: expected \d+ bytes, got"):
        read_whole(file)
