"""Products that ONNX Runtime fused with the ``Transpose`` before them take slots."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, optimized_by_runtime

IN, OUT, LENGTH = 6, 5, 4
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((IN, OUT)).astype(np.float32)


def transposed_product(opset=21):
    """Return ``y = sigmoid(x)^T W``, ``x`` as a convolution gives it: ``[batch, in, length]``."""
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["c"]),
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "onnx::MatMul_7"], ["y"], name="/head/up/MatMul"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", IN, LENGTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", LENGTH, OUT])
    stored = numpy_helper.from_array(WEIGHT, "onnx::MatMul_7")
    graph = helper.make_graph(nodes, "g", [x], [y], [stored])
    domains = [helper.make_opsetid("", opset), *DOMAINS[1:]]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


@pytest.mark.parametrize("opset", [12, 21])
def test_a_product_with_turned_channels_takes_an_adapter(slotted, adapter, tmp_path, opset):
    fused = optimized_by_runtime(transposed_product(opset), tmp_path)
    assert [node.op_type for node in fused.graph.node] == ["Sigmoid", "FusedMatMul"]
    made = slotted(fused, "lora", "bias", "gain")
    (slot,) = made.slots
    assert (slot.name, slot.in_features, slot.out_features) == ("head.up", IN, OUT)
    x = RANDOM.standard_normal((2, IN, LENGTH)).astype(np.float32)
    tensors = adapter(slot)
    change = tensors[slot.input_a].astype(np.float64) @ tensors[slot.input_b]
    rows = (1 / (1 + np.exp(-x.astype(np.float64)))).transpose(0, 2, 1)
    got = made.run(x=x, **tensors)[0]
    np.testing.assert_allclose(got, rows @ (WEIGHT + change), rtol=1e-5, atol=1e-5)
    base = made.run(x=x)[0]
    np.testing.assert_allclose(base, rows @ WEIGHT, rtol=1e-5, atol=1e-5)
    assert np.abs(got - base).max() > 0.1
