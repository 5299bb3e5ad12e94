"""Checkpoints, sound and damaged: one clear error each, never a crash."""

import json
import shlex
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from loraport.base.checkpoint import Checkpoint, read_header
from loraport.errors import LoraportError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b.weight": torch.arange(4, dtype=torch.float16),
}
SOUND = save(TENSORS, metadata={"format": "pt"})


def with_header(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_safetensors_writes(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(SOUND)
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint) == sorted(TENSORS)
    assert checkpoint.metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.load(name), tensor)
        info = checkpoint.info(name)
        raw = file.read_bytes()[info.start : info.start + info.nbytes]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=tensor.dtype), tensor.flatten())


DTYPES = "float64 float32 float16 bfloat16 complex64 int64 int32 int16 int8 uint64 uint32 uint16"
DTYPES += " uint8 bool float8_e4m3fn float8_e5m2 float8_e8m0fnu"


@pytest.mark.parametrize("shape", [(3, 4), (), (0, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES.split())
def test_every_dtype_and_any_part_is_what_safetensors_reads(dtype, shape, tmp_path):
    numbers = torch.randint(1, 99, shape)
    tensor = numbers.to(getattr(torch, dtype))
    file = tmp_path / "model.safetensors"
    save_file({"one": torch.ones(3, dtype=torch.int8), "x": tensor}, file)  # x begins anywhere
    checkpoint = Checkpoint(file)
    parts = [(), (slice(1, 2),), (slice(None), slice(1, 3))][: 1 + len(shape)]
    for part in parts:
        with safe_open(file, "pt") as opened:
            expected = opened.get_slice("x")[part] if part else opened.get_tensor("x")
        got = checkpoint.load_part("x", *part)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert bits(got) == bits(expected) == bits(tensor[part])


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_the_header_is_read_once(tmp_path):
    """Parsed again for each of the tensors that it lists, it takes minutes for thousands."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(SOUND)
    checkpoint = Checkpoint(file)
    start = min(checkpoint.info(name).start for name in checkpoint)
    file.write_bytes(b"?" * start + SOUND[start:])
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.load(name), tensor)
        assert torch.equal(checkpoint.load_part(name, slice(1, 2)), tensor[1:2])


def test_a_file_cut_short_since_it_was_opened(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(SOUND)
    checkpoint = Checkpoint(file)
    file.write_bytes(SOUND[:-1])
    last = max(checkpoint, key=lambda name: checkpoint.info(name).start)
    for part in ((), (slice(0, 1),)):
        with pytest.raises(LoraportError, match=rf"tensor '{last}' of .*expected .* bytes, got"):
            checkpoint.load_part(last, *part)


def sharded(tmp_path, weight_map=None):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-2.safetensors")
    weight_map = weight_map or {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reads_shards(tmp_path):
    sharded(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert sorted(Checkpoint(path)) == ["a", "b"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_one_file_beside_shards_is_read_where_the_model_s_library_reads_it(stem, tmp_path):
    """transformers takes the file, diffusers the shards; PEFT trains on what they load."""
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / f"{stem}.safetensors.index.json")
    save_file({"a": torch.zeros(2), "c": torch.zeros(1)}, tmp_path / f"{stem}.safetensors")
    names = {"model": ["a", "c"], "diffusion_pytorch_model": ["a", "b"]}[stem]
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint) == names
    assert torch.equal(checkpoint.load("a"), torch.zeros(2)) == (stem == "model")
    assert sorted(Checkpoint(tmp_path / f"{stem}.safetensors.index.json")) == ["a", "b"]


def test_missing_shards_are_all_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(LoraportError, match=r"(?s)model-1\.safetensors.*model-2\.safetensors"):
        Checkpoint(tmp_path)


def test_tensor_missing_from_its_shard(tmp_path):
    sharded(tmp_path, {"a": "model-1.safetensors", "c": "model-1.safetensors"})
    with pytest.raises(LoraportError, match=r"c: expected the tensor that the index lists"):
        Checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "model-2.safetensors")
    with pytest.raises(LoraportError, match="a: expected one tensor of this name"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "sub/model", "..", "."])
def test_shard_names_cannot_leave_the_directory(name, tmp_path):
    sharded(tmp_path, {"a": name})
    with pytest.raises(LoraportError):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../out.safetensors", "sub/../../out.safetensors", None])
def test_a_shard_that_is_there_but_outside_is_refused(name, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "out.safetensors")
    (tmp_path / "model" / "sub").mkdir(parents=True)
    sharded(tmp_path / "model", {"a": name or str(tmp_path / "out.safetensors")})
    with pytest.raises(LoraportError, match=r"expected a path inside .*got one that leads out"):
        Checkpoint(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_broken_index(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LoraportError, match="weight_map"):
        Checkpoint(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(LoraportError, match="expected a safetensors checkpoint"):
        Checkpoint(tmp_path)


HOSTILE = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "length 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length 2^64-1": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "length beyond the file": with_header({}, length=3),
    "truncated data": SOUND[:-1],
    "truncated header": SOUND[:20],
    "no JSON": with_header(b"{nonsense"),
    "no UTF-8": with_header(b'{"\xff": 1}'),
    "a list": with_header([]),
    "deeply nested": with_header(b"[" * 200_000),
    "duplicate keys": with_header(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)),
    "offsets backwards": with_header({"a": entry(offsets=(4, 0))}, bytes(4)),
    "offsets negative": with_header({"a": entry(offsets=(-4, 0))}, bytes(4)),
    "offsets outside": with_header({"a": entry(offsets=(0, 8), shape=(2,))}, bytes(4)),
    "offsets of other kinds": with_header({"a": entry(offsets=("0", "4"))}, bytes(4)),
    "shape that does not fit": with_header({"a": entry(shape=(3,))}, bytes(4)),
    "shape that overflows": with_header({"a": entry(shape=(1 << 40, 1 << 40))}, bytes(4)),
    "negative shape": with_header({"a": entry(shape=(-1, -1))}, bytes(4)),
    "true as a size": with_header({"a": entry(shape=(True,))}, bytes(4)),
    "unknown dtype": with_header({"a": entry(dtype="F33")}, bytes(4)),
    "overlapping": with_header({"a": entry(), "b": entry()}, bytes(4)),
    "hole": with_header({"a": entry(offsets=(4, 8))}, bytes(8)),
    "trailing data": with_header({"a": entry()}, bytes(8)),
    "metadata of other kinds": with_header({"__metadata__": {"format": 1}, "a": entry()}, bytes(4)),
    "metadata a list": with_header({"__metadata__": ["x"], "a": entry()}, bytes(4)),
    "no shape": with_header({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_damaged_files_are_refused_by_header(content, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(LoraportError):
        read_header(file)
    with pytest.raises(LoraportError, match=r"model\.safetensors"):
        Checkpoint(file)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(LoraportError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_an_error_or_a_sound_file(data, tmp_path):
    """Flipped, lost and added bytes: a `LoraportError`, or exactly what safetensors reads."""
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        action = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if action == "flip":
            content[where] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "cut":
            del content[where : where + data.draw(st.integers(1, 9))]
        else:
            content[where:where] = data.draw(st.binary(min_size=1, max_size=9))
        if not content:
            break
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    try:
        checkpoint = Checkpoint(file)
        loaded = {name: checkpoint.load(name) for name in checkpoint}
    except LoraportError:
        return
    for name, tensor in loaded.items():
        assert tuple(tensor.shape) == checkpoint.info(name).shape
        assert tensor.nbytes == checkpoint.info(name).nbytes


def test_metadata_may_be_null_as_mlx_writes_it(tmp_path):
    file = tmp_path / "adapters.safetensors"
    file.write_bytes(with_header({"__metadata__": None, "a": entry()}, bytes(4)))
    checkpoint = Checkpoint(file)
    assert checkpoint.metadata == {}
    assert list(checkpoint) == ["a"] == list(load(file.read_bytes()))


@pytest.mark.parametrize("shards", [1, 2])
def test_the_line_that_converts_pickled_weights_does(shards, tmp_path):
    """Views and shared storage, which safetensors refuses, too; a quote and a space in the path."""
    directory = tmp_path / 'it\'s a "base"'
    directory.mkdir()
    with pytest.raises(LoraportError, match=r"got none; convert pickled checkpoints first$"):
        Checkpoint(directory)
    whole = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    tensors = {"a": whole, "b": whole.T, "c": whole[1:], "d": torch.ones(2, dtype=torch.bfloat16)}
    for shard in range(shards):
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        name = f"pytorch_model-{shard}.bin" if shards > 1 else "pytorch_model.bin"
        torch.save(part, directory / name)
    with pytest.raises(LoraportError, match="got none; its pickled weights become") as refused:
        Checkpoint(directory)
    python, option, program = shlex.split(str(refused.value).splitlines()[1])
    assert (python, option) == ("python", "-c")
    exec(program, {})
    read = Checkpoint(directory)
    assert set(read) == tensors.keys()
    for name, tensor in tensors.items():
        assert read.load(name).dtype is tensor.dtype
        assert torch.equal(read.load(name), tensor)
