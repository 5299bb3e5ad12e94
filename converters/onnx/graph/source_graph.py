"""Read an ONNX graph that somebody else made; its weights stay where they are.

The files are untrusted: a data file that lies outside the model's directory, is too short or
missing is refused. A data file may have several names (hard links), which onnx and onnx-ir
themselves refuse to read: bundles share their data files with the models they were made from.
"""

from __future__ import annotations

import posixpath
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.functions import inlined, nodes_of
from converters.onnx.graph.loops import read_carried_constants_outside
from loraport.errors import LoraportError, Problems

if TYPE_CHECKING:
    import onnx

_COPY_BYTES = 1 << 22


class MappedTensor(ir.ExternalTensor):
    """A tensor in a data file that was checked by `read_graph`; each read maps it anew.

    Nothing is kept: the memory of a weight goes when its array does.
    """

    def numpy(self) -> np.ndarray:
        """Return the values as a view of the file; of elements below a byte as a copy."""
        shape = tuple(self.shape.numpy())
        if self.size == 0:
            return np.empty(shape, self.dtype.numpy())
        raw = np.memmap(self.path, np.uint8, "r", self.offset or 0, (self.nbytes,))
        if self.dtype.bitwidth < 8:
            return self._unpacked(raw, shape)
        return raw.view(self.dtype.numpy()).reshape(shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.numpy(), dtype)

    def tobytes(self) -> bytes:
        """Return the bytes as they are stored."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset or 0)
            return stream.read(self.nbytes)

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes as they are stored."""
        left = self.nbytes
        with open(self.path, "rb") as stream:
            stream.seek(self.offset or 0)
            while left and (read := stream.read(min(left, _COPY_BYTES))):
                left -= file.write(read)

    def _unpacked(self, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        from onnx import TensorProto

        proto = TensorProto(data_type=int(self.dtype), dims=shape, raw_data=raw.tobytes())
        return ir.TensorProtoTensor(proto).numpy()


def read_graph(file: Path) -> ir.Model:
    """Read an ``.onnx`` file without its weights; functions are inlined, see also `loops`.

    Raises:
        LoraportError: If it is no ONNX model, or its data files are missing, too short or
            outside its directory.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = inlined(onnx.load(str(file), load_external_data=False), file)
        _refuse_maps(proto, file)
        _refuse_sparse(proto, file)
        model = ir.from_proto(proto)
    except OSError as error:
        raise LoraportError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (DecodeError, ValueError, TypeError, KeyError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # what is around it says only where that was
            cause = cause.__cause__
        first = str(cause).strip().splitlines() or [type(cause).__name__]
        raise LoraportError(f"{file}: expected an ONNX model, got: {first[0]}") from error
    if not len(model.graph) and not model.graph.outputs:
        raise LoraportError(f"{file}: expected an ONNX model, got an empty graph")
    _map_external(model, file)
    read_carried_constants_outside(model)
    return model


def _refuse_maps(proto: onnx.ModelProto, file: Path) -> None:
    """Refuse what classifiers of other kinds give: a map of every label's probability."""
    found = []
    for value in (*proto.graph.input, *proto.graph.output):
        kind = value.type
        while kind.WhichOneof("value") == "sequence_type":
            kind = kind.sequence_type.elem_type
        if kind.WhichOneof("value") == "map_type":
            found.append(value.name)
    if found:
        raise LoraportError(
            f"{file}: expected inputs and outputs that are tensors, got maps: {', '.join(found)}; "
            "export again without ZipMap (skl2onnx: options={'zipmap': False})"
        )


def _refuse_sparse(proto: onnx.ModelProto, file: Path) -> None:
    """Refuse weights that are stored without their zeros, which onnx-ir does not read."""
    found = [each.values.name for each in proto.graph.sparse_initializer]
    for node in nodes_of(proto.graph.node):
        for attribute in node.attribute:
            branches = (*attribute.graphs, attribute.g)
            found += [each.values.name for graph in branches for each in graph.sparse_initializer]
            if attribute.HasField("sparse_tensor"):
                found.append(node.output[0])
    if found:
        names = ", ".join(dict.fromkeys(found))
        raise LoraportError(
            f"{file}: expected initializers that are dense, got sparse ones: {names}; "
            "store them as dense tensors"
        )


def hold_weights(model: ir.Model) -> None:
    """Read every tensor that lies in a data file into memory, in place."""
    from onnx import TensorProto

    for holder, tensor in _tensors(model):
        if not isinstance(tensor, MappedTensor):
            continue
        stored = TensorProto(
            name=tensor.name or "",
            data_type=int(tensor.dtype),
            dims=tuple(tensor.shape.numpy()),
            raw_data=tensor.tobytes(),
        )
        _put(holder, ir.TensorProtoTensor(stored))


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Return every tensor that lies in a data file, subgraphs' and attributes' too."""
    return [tensor for _, tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)]


def data_locations(model: ir.Model) -> list[str]:
    """Return the data files by their plain paths, each once, sorted.

    A graph may name a file in several ways: ``./data//w.bin`` is ``data/w.bin``.
    """
    found = {PurePosixPath(str(tensor.location)) for tensor in external_tensors(model)}
    return sorted(path.as_posix() for path in found)


def _tensors(model: ir.Model) -> list[tuple[Any, ir.TensorProtocol]]:
    """Return every constant with what holds it: a value, or an attribute's node and name."""
    found: list[tuple[Any, ir.TensorProtocol]] = []
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                found.append((value, value.const_value))
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    found.append(((node, attribute.name), attribute.value))
    return found


def _put(holder: Any, tensor: ir.TensorProtocol) -> None:
    """Let what holds a constant, see `_tensors`, hold another."""
    if isinstance(holder, ir.Value):
        holder.const_value = tensor
    else:
        node, attribute = holder
        node.attributes[attribute] = ir.AttrTensor(attribute, tensor)


def _map_external(model: ir.Model, file: Path) -> None:
    problems = Problems()
    files: dict[str, tuple[str, int] | None] = {}
    for holder, tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        named = str(tensor.location)
        if named not in files:
            files[named] = _data_file(file.parent, named, problems)
        found = files[named]
        if found is None:
            continue
        location, size = found
        mapped = MappedTensor(
            location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=str(file.parent),
        )
        name = tensor.name or ""
        start, length = tensor.offset or 0, tensor.length
        if length not in (None, 0, mapped.nbytes):
            problems.add(name, f"{mapped.nbytes} bytes for its shape and type", f"{length}")
        elif start < 0 or start + mapped.nbytes > size:
            end = start + mapped.nbytes
            got = f"{size} bytes in {location}"
            problems.add(name, f"data up to byte {end}", got, "fetch the data file again")
        else:
            _put(holder, mapped)
    problems.raise_if_any(f"{file}: its data cannot be read")


def _data_file(directory: Path, location: str, problems: Problems) -> tuple[str, int] | None:
    """Return a data file's plain path, which takes no way back, and its size in bytes."""
    expected = "a data file in the model's directory"
    again = "store the model's data again, under another name: onnx.save_model(..., location=...)"
    if "\\" in location or ":" in location:
        got = "a colon or backslash, which the names of a bundle's files cannot have"
        problems.add(location, expected, got, again)
        return None
    plain = posixpath.normpath(location) if location else ".."
    if plain.startswith("/") or plain.split("/")[0] == "..":
        problems.add(location, expected, "a path that leaves it", again)
        return None
    try:
        file = directory / location
        if not file.is_file():
            raise FileNotFoundError(2, "no such file")
        # Behind a symbolic link, .. is another directory.
        if not (directory / plain).exists() or not file.samefile(directory / plain):
            problems.add(location, expected, f"another one than {plain}", again)
            return None
        return plain, file.stat().st_size
    except OSError as error:
        got = error.strerror or str(error)
        problems.add(location, "the data file that the graph names", got, "fetch it again")
        return None
