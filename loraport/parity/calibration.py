"""Tell a graph's own calibrated quantization from other differences.

A static int8 graph rounds activations to 8 bits of ranges that were measured beforehand and cuts
off what lies outside of them, as an adapter's changes may. No slot can help that. Where the
rounding stands beside the operators (``QuantizeLinear`` and ``DequantizeLinear``), the graph can
be run without it: what is as far from PyTorch then has another cause. Where the integers have no
numbers below zero, they may be all that is left of a ``Relu``, which the quantizer took out.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.bundle.manifest import MODEL_FILE
from loraport.parity.changed_graph import ChangedGraph
from loraport.runtime import Runtime, Selection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from onnx import GraphProto, NodeProto, TensorProto

# Read integers of calibrated ranges and write such; what they compute has no other form.
_IN_INTEGERS = ("QLinear", "QGemm")


def without_calibrated_ranges(file: Path) -> bytes | None:
    """Return a graph whose activations stay what they are where it would round and cut them off.

    Weights stay rounded, and ranges that begin at zero still cut off what is below.

    Args:
        file: The ``.onnx`` file; of its data file at most zero points are read.

    Returns:
        The graph serialized, or ``None`` if nothing in it does that.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    computed = _computed(model.graph)
    quantized = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in computed
    }
    changed = False
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized:
            quantize = quantized[node.input[0]]
            cut = _begins_at_zero(quantize, model.graph, file.parent)
            node.op_type, node.domain = "Relu" if cut else "Identity", ""
            del node.input[:], node.attribute[:]
            node.input.append(quantize.input[0])
            changed = True
    return model.SerializeToString() if changed else None


def _begins_at_zero(quantize: NodeProto, graph: GraphProto, folder: Path) -> bool:
    """Tell whether integers stand for no number below zero."""
    import numpy as np
    from onnx import TensorProto

    if len(quantize.input) < 3 or not quantize.input[2]:  # the zero point, which is 0 then
        kinds = (TensorProto.UNDEFINED, TensorProto.UINT8, TensorProto.UINT16)
        told = {attribute.name: attribute.i for attribute in quantize.attribute}
        return told.get("output_dtype", TensorProto.UNDEFINED) in kinds
    for stored in graph.initializer:
        if stored.name == quantize.input[2]:
            zero = _array(stored, folder)
            whole = np.issubdtype(zero.dtype, np.integer)
            return bool(whole and (zero == np.iinfo(zero.dtype).min).all())
    return False


def _array(stored: TensorProto, folder: Path) -> np.ndarray:
    """Return a tensor's values; onnx's own reader refuses a data file that has two names."""
    import numpy as np
    from onnx import helper, numpy_helper

    if stored.data_location != stored.EXTERNAL:
        return numpy_helper.to_array(stored)
    told = {entry.key: entry.value for entry in stored.external_data}
    return np.fromfile(
        folder / told["location"],
        helper.tensor_dtype_to_np_dtype(stored.data_type),
        math.prod(stored.dims),
        offset=int(told.get("offset", 0)),
    )


def _computed(graph: GraphProto) -> set[str]:
    """Return the values that depend on the model's inputs: no weights, and nothing made of them."""
    constants = {tensor.name for tensor in graph.initializer}
    found = {value.name for value in graph.input} - constants
    for node in graph.node:
        if any(name in found for name in node.input):
            found.update(node.output)
    return found


class Calibration:
    """Runs a bundle's graph without its calibrated ranges; nothing is opened before that.

    Args:
        runtime: The bundle.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._file = runtime.directory / MODEL_FILE
        self._without = ChangedGraph(runtime, without_calibrated_ranges)

    @cached_property
    def in_integers(self) -> list[str]:
        """What computes within calibrated ranges and so cannot be run without, by its names."""
        import onnx

        nodes = onnx.load(str(self._file), load_external_data=False).graph.node
        return sorted({node.op_type for node in nodes if node.op_type.startswith(_IN_INTEGERS)})

    @property
    def removable(self) -> bool:
        """Whether the graph has calibrated ranges and runs without them."""
        return not self.in_integers and self._without.changes

    def run(
        self, inputs: Mapping[str, np.ndarray], selection: Selection, outputs: Sequence[str]
    ) -> list[np.ndarray]:
        """Run the graph without its calibrated ranges, where they are `removable`."""
        return self._without.run(inputs, selection, outputs)
