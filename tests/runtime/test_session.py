"""Sessions: an input's default can be another than the graph's."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from loraport.errors import LoraportError
from loraport.runtime.session import open_session
from loraport.runtime.values import as_value


@pytest.fixture
def sum_graph(tmp_path):
    """``y = x + added``, where ``added`` is 1 unless told."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "added", "y")
    ]
    default = numpy_helper.from_array(np.ones(2, np.float32), "added")
    node = helper.make_node("Add", ["x", "added"], ["y"])
    graph = helper.make_graph([node], "sum", values[:2], values[2:], [default])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "sum.onnx")
    return tmp_path / "sum.onnx"


def test_another_default(sum_graph):
    x = np.array([2, 3], np.float32)
    value, array = as_value(np.array([10, 20], np.float32), "cpu")
    session = open_session(sum_graph, defaults={"added": value})
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x + array)
    given = np.array([5, 7], np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x, "added": given})[0], x + given)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x + array)
    np.testing.assert_array_equal(open_session(sum_graph).run(None, {"x": x})[0], x + 1)


def test_defaults_that_onnx_runtime_refuses(sum_graph):
    """Names of a damaged manifest: to ONNX Runtime both end before the zero, and are one."""
    value, _ = as_value(np.zeros(2, np.float32), "cpu")
    with pytest.raises(LoraportError, match=r"sum\.onnx: ONNX Runtime cannot open it"):
        open_session(sum_graph, defaults={"a\0b": value, "a\0c": value})
