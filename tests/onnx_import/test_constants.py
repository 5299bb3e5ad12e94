"""Constants are seen as ONNX Runtime computes them."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import session

from converters.onnx.graph.constants import constant

ROWS, COLUMNS = 6, 4


@pytest.mark.parametrize("scales", ["one", "rows", "columns", "blocks"])
@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT8, TensorProto.INT4, None])
def test_floats_that_are_rounded_and_dequantized(scales, kind):
    random = np.random.default_rng(0)
    weight = random.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    weight[0, 0], weight[1, 1] = 1e4, -1e4  # outside of what the integers reach
    shape = {"one": (), "rows": (ROWS,), "columns": (COLUMNS,), "blocks": (2, COLUMNS)}[scales]
    scale = random.uniform(0.02, 0.3, shape).astype(np.float32)
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")]
    given = ["s"]
    if kind is not None:
        zeros = random.integers(0, 7, shape)
        constants.append(helper.make_tensor("z", kind, shape, zeros.ravel().tolist()))
        given.append("z")
    attributes = {"axis": 0 if scales in ("rows", "blocks") else 1}
    if scales == "blocks":
        attributes["block_size"] = 3
    nodes = [
        helper.make_node("QuantizeLinear", ["w", *given], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", *given], ["y"], **attributes),
    ]
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])
    graph = helper.make_graph(nodes, "g", [], [made], constants)
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    found = constant(ir.from_proto(model).graph[1].outputs[0])
    assert (found.name, found.shape, found.quantized) == ("w", (ROWS, COLUMNS), True)
    expected = session(model).run(None, {})[0]
    np.testing.assert_array_equal(found.array(), expected)
    assert np.abs(expected - weight).max() > 1e3
