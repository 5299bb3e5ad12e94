"""Packed adapters read in one stretch, against safetensors' own reader."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraport.bundle.content_hash import SHA256, XXH3, ContentHash, file_sha256, file_xxh3
from loraport.errors import LoraportError
from loraport.runtime import packed_file
from loraport.runtime.packed_file import read_whole
from loraport.runtime.values import torch_of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


@pytest.fixture(params=[SHA256, XXH3])
def hash_of(request):
    """Take a file's hash by one algorithm."""
    taken = {SHA256: file_sha256, XXH3: file_xxh3}[request.param]
    return lambda path: ContentHash(request.param, taken(path))


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


def test_parts_read_at_once_are_put_together(file, hash_of, monkeypatch):
    monkeypatch.setattr(packed_file, "_LEAST_PART", 7)
    monkeypatch.setattr(packed_file.os, "cpu_count", lambda: 3)
    expected = load_file(file)
    for content_hash in (None, hash_of(file)):
        got = read_whole(file, content_hash)
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
def test_a_file_that_is_not_the_one_the_hash_says(file, position, hash_of):
    right = hash_of(file)
    read_whole(file, right)
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(LoraportError, match=rf"expected {right}, got|safetensors header"):
        read_whole(file, right)


def test_a_file_without_tensors_is_hashed_too(tmp_path, hash_of):
    save_file({}, tmp_path / "none", {"note": "a"})
    right = hash_of(tmp_path / "none")
    assert read_whole(tmp_path / "none", right) == {}
    wrong = ContentHash(right.algorithm, "0" * len(right.digits))
    with pytest.raises(LoraportError, match=f"expected {right.algorithm} 000"):
        read_whole(tmp_path / "none", wrong)


def test_hashes_are_those_of_the_algorithms(tmp_path):
    """The vectors that come with sha256 (FIPS 180-4) and xxHash's own of nothing."""
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    assert file_sha256(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert file_xxh3(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"


def test_dtypes_that_numpy_lacks_are_named(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(4).to(torch.float8_e5m2)}, tmp_path / "f8")
    with pytest.raises(LoraportError, match=r"  - b: expected one of .*BF16.*, got F8_E5M2"):
        read_whole(tmp_path / "f8")


@pytest.fixture
def after_the_header(monkeypatch):
    """Call this with what is to happen once the header has been read."""
    read = packed_file.read_open_header

    def between(happens):
        def read_and_go_on(stream, path):
            found = read(stream, path)
            happens(path)
            return found

        monkeypatch.setattr(packed_file, "read_open_header", read_and_go_on)

    return between


def test_a_file_that_shrinks_while_it_is_read(file, after_the_header):
    after_the_header(lambda path: os.truncate(path, path.stat().st_size - 1))
    with pytest.raises(LoraportError, match=r"one\.safetensors: expected \d+ bytes, got"):
        read_whole(file)


@pytest.mark.parametrize("hashed", [False, True])
def test_a_file_that_is_replaced_while_it_is_read_is_the_one_that_was_opened(
    file, after_the_header, hashed, hash_of
):
    """The other has the same numbers in other tensors, of which the first header would cut."""
    expected, content = load_file(file), file.read_bytes()
    other = file.with_name("other")
    save_file({f"longer.{name}": tensor for name, tensor in expected.items()}, other)
    replacing = other.read_bytes()
    assert len(replacing) > len(content)
    right = hash_of(file)
    after_the_header(lambda path: os.replace(other, path))
    got = read_whole(file, right if hashed else None)
    assert file.read_bytes() == replacing
    assert all(same(got[name], tensor) for name, tensor in expected.items())
    save_file(expected, other)
    with pytest.raises(LoraportError, match=f"expected {right}"):
        read_whole(file, right)


def test_where_nothing_reads_at_a_position(file, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(packed_file, "_LEAST_PART", 7)
    expected, got = load_file(file), read_whole(file)
    assert all(same(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"PK\x03\x04 no tensors", "a header that fits the file"), (None, "No such file")],
)
def test_a_file_that_is_none_is_named(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "one").write_bytes(content)
    with pytest.raises(LoraportError, match=rf"one: .*{reason}"):
        read_whole(tmp_path / "one")
