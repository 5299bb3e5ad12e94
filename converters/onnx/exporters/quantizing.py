"""Store a graph's weights in fewer bits, with ONNX Runtime's own quantizers.

- ``int8``: ``DynamicQuantizeLinear`` and ``MatMulInteger``; activations are rounded to 8 bits in
  every run, weights to 8 bits with a scale for each column;
- ``int4``: ``MatMulNBits``, blocks of 32 weights with a scale each;
- ``fp16``: every weight and activation; inputs and outputs stay float32.

Decoder language models have a quantizer of their own, see
`converters.onnx.exporters.genai_builder`.

Quantizing runs in a process of its own, so its memory goes back when it is done and its prints
stay apart.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from converters.onnx.graph.functions import nodes_of
from loraport.bundle.manifest import MODEL_FILE
from loraport.errors import LoraportError, last_words

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

PRECISION_TEXT = 'a text, such as "int8"'

_DATA_FILE = f"{MODEL_FILE}.data"
_BLOCK = 32
_PRODUCTS = ("MatMul", "Gemm", "Attention")
# As `onnx.TensorProto` numbers them.
_HALVES = frozenset({10, 16})
_DOUBLES = frozenset({11})
_INT8_ACTIVATIONS = 4


def quantize_graph(file: Path, out: Path, precision: str) -> None:
    """Write ``model.onnx`` with its data into a directory.

    Args:
        file: Any ``.onnx`` file with float32 weights.
        out: An existing directory without a ``model.onnx``.
        precision: One of `PRECISIONS`.

    Raises:
        LoraportError: If ONNX Runtime does not compute in this precision where the graph is to
            run, or its quantizer fails; the last lines are shown.
    """
    require_quantizer(precision)
    command = [sys.executable, "-m", __name__, str(file), str(out / MODEL_FILE), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (out / MODEL_FILE).is_file():
        lines = last_words(done.stderr)
        raise LoraportError(
            f"ONNX Runtime's quantizer could not store {file.name} as {precision}:\n  "
            + "\n  ".join(lines)
        )


def require_quantizer(precision: str) -> None:
    """Refuse a precision that no quantizer gives.

    Raises:
        LoraportError: Naming those that there are.
    """
    if precision not in PRECISIONS:
        reason = ""
        if precision == "bf16":
            reason = "; ONNX Runtime's CPU kernels have no bfloat16"
        raise LoraportError(
            f"precision: expected fp32 or {', '.join(PRECISIONS)} for this graph, "
            f"got {precision}{reason}"
        )


def _int8(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Unsigned times unsigned: signed weights overflow on processors without VNNI.
    # The quantizer itself turns the weight of each Gemm in place, a shared one several times.
    model = _load(source, gemms=True)
    left = _name_left(model, _HALVES | _DOUBLES, stacks=True)
    # The quantizer infers the shapes inside a graph anew and trips over those that are noted.
    noted = list(model.graph.value_info)
    del model.graph.value_info[:]
    quantize_dynamic(
        model,
        target,
        weight_type=QuantType.QUInt8,
        per_channel=True,
        use_external_data_format=True,
        op_types_to_quantize=list(_PRODUCTS),
        nodes_to_exclude=left,
        # Types are not known behind ONNX Runtime's own operators.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    _note_shapes(target, noted)


def _note_shapes(target: Path, noted: Iterable[ValueInfoProto]) -> None:
    """Note the shapes of what is still in a graph, by which rows of a batch are told apart."""
    import onnx

    model = onnx.load(target, load_external_data=False)
    left = {name for node in model.graph.node for name in node.output}
    found = {value.name: value for value in model.graph.value_info}
    found.update((value.name, value) for value in noted if value.name in left)
    del model.graph.value_info[:]
    model.graph.value_info.extend(found.values())
    onnx.save(model, target)


def _int4(source: Path, target: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = _load(source, gemms=True, shapes=True)
    domains = {_known_by(node): node.domain for node in nodes_of(model.graph.node)}
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=4,
        block_size=_BLOCK,
        is_symmetric=True,
        accuracy_level=_INT8_ACTIVATIONS,
        nodes_to_exclude=_name_left(model, _DOUBLES),
    )
    quantizer.process()
    made = quantizer.model.model
    # Of operators with graphs inside, BeamSearch say, the quantizer loses whose they are.
    for node in nodes_of(made.graph.node):
        node.domain = domains.get(_known_by(node), node.domain)
    _save(made, target)


def _fp16(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from converters.onnx.exporters.distinct_weights import make_weights_distinct

    model = _load(source)
    make_weights_distinct(model)
    model = convert_float_to_float16(model, keep_io_types=True)
    _drop_repeated_casts(model)
    _save(model, target)


def _drop_repeated_casts(model: ModelProto) -> None:
    """Leave one of the equal casts that the converter adds for each reader, in place."""
    seen = set()
    for node in list(model.graph.node):
        if node.op_type == "Cast":
            cast = node.SerializeToString()
            if cast in seen:
                model.graph.node.remove(node)
            seen.add(cast)


def _known_by(node: NodeProto) -> tuple[str, ...]:
    return node.op_type, *node.output[:1]


def _name_left(model: ModelProto, types: frozenset[int], *, stacks: bool = False) -> list[str]:
    """Return the products that stay as they are, named in place where they have no name.

    Args:
        model: Its weights are initializers.
        types: Of weights that the kernels do not take; the quantizers make what never opens.
        stacks: Leave stacks of matrices: the quantizer for int8 gives them scales that the kernel
            refuses in the run.
    """
    nodes = list(nodes_of(model.graph.node))
    stored = {weight.name: weight for weight in model.graph.initializer}
    for node in nodes:
        stored.update((w.name, w) for entry in node.attribute for w in entry.g.initializer)
    taken = {node.name for node in nodes}
    found: list[str] = []
    for node in nodes:
        if node.op_type not in _PRODUCTS:
            continue
        weights = [stored[name] for name in node.input if name in stored]
        stacked = stacks and node.op_type == "MatMul" and any(len(w.dims) != 2 for w in weights)
        if not stacked and not any(weight.data_type in types for weight in weights):
            continue
        if not node.name:
            node.name = f"product_{len(found)}"  # no path, which would name its module
            while node.name in taken:
                node.name += "_"
        taken.add(node.name)
        found.append(node.name)
    return found


def _load(source: Path, *, gemms: bool = False, shapes: bool = False) -> ModelProto:
    """Read a graph with its weights.

    Args:
        source: Its file.
        gemms: Store the matrix of each Gemm as that of a product.
        shapes: Note the shapes that nothing infers behind ONNX Runtime's own operators.
    """
    import onnx_ir as ir

    from converters.onnx.exporters.computed_weights import store_computed_weights
    from converters.onnx.exporters.plain_weights import make_weights_plain
    from converters.onnx.graph.inferred_shapes import infer_shapes
    from converters.onnx.graph.source_graph import hold_weights, read_graph

    # Not by onnx's own reader, which refuses a data file with two names.
    model = read_graph(source)
    hold_weights(model)
    store_computed_weights(model)
    if shapes:
        infer_shapes(model)
    proto = ir.to_proto(model)
    make_weights_plain(proto, gemms=gemms)
    return proto


def _save(model: ModelProto, target: Path) -> None:
    import onnx

    onnx.save(model, str(target), save_as_external_data=True, location=_DATA_FILE)


_QUANTIZERS: dict[str, Callable[[Path, Path], None]] = {
    "int8": _int8,
    "int4": _int4,
    "fp16": _fp16,
}
PRECISIONS = tuple(_QUANTIZERS)


if __name__ == "__main__":
    _QUANTIZERS[sys.argv[3]](Path(sys.argv[1]), Path(sys.argv[2]))
