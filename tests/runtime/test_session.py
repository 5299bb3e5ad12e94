"""Sessions: an input's default can be another than the graph's."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from loraport.errors import LoraportError
from loraport.runtime.full_precision import rounds_activations
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


def dequantized(weight, scale, _packed):
    """A product that ONNX Runtime itself makes a ``MatMulNBits`` of."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"], axis=1),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    return nodes, [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")]


def in_a_branch(_weight, scale, packed):
    """A ``MatMulNBits`` in both branches of an ``If``, as decoders with and without a cache are."""
    sizes = {"K": packed.shape[1] * packed.shape[2], "N": packed.shape[0], "bits": 8}
    branches = {}
    for which in ("then_branch", "else_branch"):
        product = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            [which],
            domain="com.microsoft",
            block_size=packed.shape[2],
            accuracy_level=4,
            **sizes,
        )
        made = helper.make_tensor_value_info(which, TensorProto.FLOAT, None)
        branches[which] = helper.make_graph([product], which, [], [made])
    nodes = [
        helper.make_node("Size", ["x"], ["n"]),
        helper.make_node("Cast", ["n"], ["any"], to=TensorProto.BOOL),
        helper.make_node("If", ["any"], ["y"], **branches),
    ]
    return nodes, [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scale, "s")]


@pytest.mark.parametrize("made", [dequantized, in_a_branch])
def test_activations_stay_in_float32_whoever_made_the_product(made, tmp_path):
    """ONNX Runtime rounds them to 8 bits where it fuses the product itself, unless told not to."""
    random = np.random.default_rng(0)
    inside, outside = 64, 48
    weight = random.integers(-127, 128, (inside, outside)).astype(np.int8)
    scale = random.uniform(0.01, 0.03, outside).astype(np.float32)
    packed = (weight.T.astype(np.int16) + 128).astype(np.uint8).reshape(outside, 1, inside)
    nodes, stored = made(weight, scale, packed)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inside])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outside])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "product", [x], [y], stored)
    file = tmp_path / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    given = random.standard_normal((5, inside)).astype(np.float32)
    wanted = given.astype(np.float64) @ (weight.astype(np.float64) * scale)
    exact = open_session(file, float32_activations=True).run(None, {"x": given})[0]
    np.testing.assert_allclose(exact, wanted, atol=1e-4)
    rounded = open_session(file).run(None, {"x": given})[0]  # the control
    assert np.abs(rounded - wanted).max() > 0.01
    assert rounds_activations(file)


def test_a_graph_of_floats_rounds_no_activations(sum_graph):
    assert not rounds_activations(sum_graph)
