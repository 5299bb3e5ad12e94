"""Lazy access to safetensors checkpoints, in one file or many shards."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import ml_dtypes
import numpy as np

from loraport.counts import counted
from loraport.errors import LoraportError, Problems
from loraport.json_object import distinct_keys

if TYPE_CHECKING:
    import torch

INDEX_SUFFIX = ".safetensors.index.json"
_STEMS = ("model", "diffusion_pytorch_model")  # transformers' and diffusers' names
_PICKLED = "pytorch_model*.bin"
_MAX_HEADER = 100 << 20  # the limit the safetensors library sets itself
# Bits per element, by the format's name for a dtype.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# What ONNX Runtime and torch know as well, in numpy.
NUMPY_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# And in torch, which some of it knows only since later versions.
_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, without reading it.

    Attributes:
        file: The safetensors file.
        dtype: The format's name for it, e.g. ``"BF16"``.
        shape: Its shape.
        start: Offset of its first byte in the file.
        nbytes: Its length in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def array(self, content: np.ndarray) -> np.ndarray:
        """Return the tensor's bytes, uint8 ``[nbytes]``, as what they are, over the same memory.

        ``BF16`` is ``ml_dtypes.bfloat16``.

        Raises:
            LoraportError: If numpy has no such dtype.
        """
        if self.dtype not in NUMPY_DTYPES:
            known = ", ".join(NUMPY_DTYPES)
            raise LoraportError(f"expected one of the dtypes {known}, got {self.dtype}")
        array: np.ndarray = content.view(NUMPY_DTYPES[self.dtype])
        return array.reshape(self.shape)


class Checkpoint:
    """A safetensors checkpoint whose tensors are read one by one, on demand.

    Args:
        path: A ``.safetensors`` file, an index file, or a directory that holds either.

    Raises:
        LoraportError: If there is no such checkpoint, a shard is missing, or a header is
            damaged; all problems at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = tuple(_shards(path))
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        problems = Problems()
        for file in self.files:
            try:
                tensors, metadata = read_header(file)
            except LoraportError as error:
                problems.add(str(file), "a readable safetensors header", str(error))
                continue
            for name in self._tensors.keys() & tensors.keys():
                problems.add(
                    name, "one tensor of this name", f"it in {self._tensors[name].file} and {file}"
                )
            self._tensors.update(tensors)
            self.metadata.update(metadata)
        for name in sorted(_indexed(path).keys() - self._tensors.keys()):
            problems.add(name, "the tensor that the index lists", "none in any shard")
        problems.raise_if_any(f"checkpoint {path} cannot be read")

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a tensor of this name."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensor names in file order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies.

        Raises:
            LoraportError: If there is none of this name.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise LoraportError(
                f"tensor {name!r}: expected it in {self.path}, got "
                f"{counted(len(self), 'other tensor')}"
            ) from None

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor into memory.

        Raises:
            LoraportError: If there is none of this name or its bytes cannot be read.
        """
        return self.load_part(name)

    def load_part(self, name: str, *part: slice) -> torch.Tensor:
        """Read a part of one tensor into memory.

        Args:
            name: The tensor.
            part: What to read of its first dimensions; all of it unless given.

        Raises:
            LoraportError: If there is none of this name or its bytes cannot be read.
        """
        import torch

        # Not by the format's library, which parses the whole header again for every tensor.
        info = self.info(name)
        dtype = getattr(torch, _TORCH_DTYPES.get(info.dtype, ""), None)
        try:
            if dtype is None:
                raise LoraportError(f"expected a dtype that torch has, got {info.dtype}")
            content = _content(info, mapped=bool(part))
        except (LoraportError, OSError) as error:
            raise LoraportError(f"tensor {name!r} of {info.file}: {error}") from error
        # As integers, since numpy has not all dtypes.
        numbers = content.view(f"i{_BITS[info.dtype] // 8}").reshape(info.shape)
        if part:
            numbers = numbers[part].copy()
        tensor: torch.Tensor = torch.from_numpy(numbers).view(dtype)
        return tensor

    def load_array(self, name: str) -> np.ndarray:
        """Read one tensor into memory as an array, which takes no torch.

        Raises:
            LoraportError: If there is none of this name, its bytes cannot be read, or numpy has
                no such dtype.
        """
        info = self.info(name)
        try:
            return info.array(_content(info))
        except (LoraportError, OSError) as error:
            raise LoraportError(f"tensor {name!r} of {info.file}: {error}") from error


def _content(info: TensorInfo, *, mapped: bool = False) -> np.ndarray:
    """Return a tensor's bytes, uint8 ``[nbytes]``: read, or mapped where a part is wanted."""
    there = info.file.stat().st_size - info.start
    if there < info.nbytes:
        raise LoraportError(
            f"expected {info.nbytes} bytes, got {max(there, 0)}; the file changed while being read"
        )
    if mapped and info.nbytes:
        return np.memmap(info.file, np.uint8, "r", info.start, (info.nbytes,))
    return np.fromfile(info.file, np.uint8, info.nbytes, offset=info.start)


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read a safetensors header: tensors by name, and the metadata.

    The header's length is checked before anything is allocated; tensors must fill the file
    without holes or overlaps, each as long as its shape and dtype say; a key that occurs
    twice is refused.

    Raises:
        LoraportError: If the file is not a sound safetensors file.
    """
    try:
        with file.open("rb") as stream:
            return read_open_header(stream, file)
    except OSError as error:
        raise LoraportError(f"cannot be read: {error.strerror or error}") from error


def read_open_header(stream: BinaryIO, file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the header of an open safetensors file, see `read_header`.

    Args:
        stream: The file, from its beginning.
        file: Its name.

    Raises:
        LoraportError: If it is not a sound safetensors file.
        OSError: If it cannot be read.
    """
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise LoraportError(
            f"expected a header that fits the file, got length {length} "
            f"in a file of {size} bytes; the file is damaged or not safetensors"
        )
    raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=distinct_keys)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        metadata = header.pop("__metadata__", None)
        if metadata is None:  # MLX writes a null where there is none
            metadata = {}
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ValueError("metadata that is not an object of texts")
        tensors = {
            name: _tensor_info(file, name, entry, 8 + length, size)
            for name, entry in header.items()
        }
        _check_cover(tensors, 8 + length, size)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoraportError(f"expected a safetensors header, got: {error}") from error
    return tensors, metadata


def _check_cover(tensors: Mapping[str, TensorInfo], data: int, size: int) -> None:
    reached = data
    for name, info in sorted(
        tensors.items(), key=lambda item: (item[1].start, item[1].nbytes, item[0])
    ):
        if info.start != reached:
            raise ValueError(
                f"tensor {name!r} at byte {info.start} where byte {reached} comes next"
            )
        reached += info.nbytes
    if reached != size:
        raise ValueError(f"{size - reached} bytes that belong to no tensor")


def _tensor_info(file: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    # type(), as True is an int to isinstance().
    whole = all(type(value) is int and value >= 0 for value in (begin, end, *shape))
    if not whole or begin > end or data + end > size:
        raise ValueError(
            f"tensor {name!r} at {begin}..{end} outside the file's {size - data} bytes"
        )
    if dtype not in _BITS:
        raise ValueError(f"tensor {name!r} of unknown dtype {dtype!r}")
    if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise ValueError(
            f"tensor {name!r} of {end - begin} bytes, too few or too many for {dtype} {list(shape)}"
        )
    return TensorInfo(file, dtype, shape, data + begin, end - begin)


def _shards(path: Path) -> list[Path]:
    if path.is_file() and not path.name.endswith(INDEX_SUFFIX):
        return [path]
    index = _index_file(path)
    if index is None:
        for stem in _STEMS:
            single = path / f"{stem}.safetensors"
            if single.is_file():
                return [single]
        raise LoraportError(
            f"{path}: expected a safetensors checkpoint (model.safetensors or "
            f"model{INDEX_SUFFIX}), got none; {_how_to_convert(path)}"
        )
    names = sorted(set(_indexed(path).values()))
    problems = Problems()
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            inside = f"a path inside {index.parent}"
            problems.add(name, inside, "one that leads out of it", "repair the index")
        elif not (index.parent / name).is_file():
            problems.add(name, f"the shard in {index.parent}", "no such file", "fetch it again")
    problems.raise_if_any(f"checkpoint {path}: shards are missing")
    return [index.parent / name for name in names]


def _how_to_convert(directory: Path) -> str:
    """Return what makes safetensors of a directory's pickled weights, as a line to type."""
    if not any(directory.glob(_PICKLED)):
        return "convert pickled checkpoints first"
    place = json.dumps(str(directory), ensure_ascii=False)
    program = (
        "import pathlib, torch, safetensors.torch as s; "
        f"p = pathlib.Path({place}); "
        "s.save_file({k: v.contiguous().clone() "
        f'for f in p.glob("{_PICKLED}") for k, v in torch.load(f, weights_only=True).items()}}, '
        'p / "model.safetensors", {"format": "pt"})'
    )
    return f"its pickled weights become one by\n  python -c {shlex.quote(program)}"


def _index_file(path: Path) -> Path | None:
    if path.name.endswith(INDEX_SUFFIX):
        return path
    # With both, transformers loads the one file and diffusers the shards.
    if (path / f"{_STEMS[0]}.safetensors").is_file():
        return None
    found = [path / f"{stem}{INDEX_SUFFIX}" for stem in _STEMS]
    return next((file for file in found if file.is_file()), None)


def _indexed(path: Path) -> Mapping[str, str]:
    """Return tensor name → shard file name; empty where there is no index."""
    index = _index_file(path)
    if index is None:
        return {}
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(value, str) for value in weight_map.values()):
            raise TypeError("shard names are not strings")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise LoraportError(
            f"{index}: expected an index with a weight_map, got {error!r}"
        ) from error
    return dict(weight_map)
