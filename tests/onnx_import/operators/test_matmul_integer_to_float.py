"""MatMulIntegerToFloat, which ONNX Runtime's own optimizer writes, takes an adapter."""

import numpy as np
import pytest
from onnx import helper
from onnx_graphs import DOMAINS, session

IN, OUT = 7, 5


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("per_column", [False, True])
def test_it_takes_an_adapter(slotted, adapter, with_bias, per_column):
    from onnx import TensorProto, numpy_helper

    random = np.random.default_rng(0)
    columns = OUT if per_column else 1
    found = {
        "w": random.integers(0, 256, (IN, OUT), np.uint8),
        "ws": random.uniform(0.01, 0.02, columns).astype(np.float32),
        "wz": random.integers(110, 140, columns).astype(np.uint8),
    }
    inputs = ["xq", "w", "xs", "ws", "xz", "wz"]
    if with_bias:
        found["c"] = random.standard_normal(OUT).astype(np.float32)
        inputs.append("c")
    graph = helper.make_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            helper.make_node("MatMulIntegerToFloat", inputs, ["y"], domain="com.microsoft"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUT])],
        [numpy_helper.from_array(array, name) for name, array in found.items()],
    )
    made = slotted(helper.make_model(graph, opset_imports=DOMAINS, ir_version=10), "lora", "gain")
    (slot,) = made.slots
    x = random.standard_normal((3, IN)).astype(np.float32)
    base = made.run_original(x=x)[0]
    np.testing.assert_allclose(made.run(x=x)[0], base, atol=2e-6)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"] for role in ("lora_A", "lora_B"))
    gain = random.uniform(0.5, 1.5, OUT).astype(np.float32)
    bias = found.get("c", np.zeros(OUT, np.float32))
    wanted = gain * (base - bias) + x @ a @ b + bias
    got = session(made.model).run(None, {"x": x, slot.input_gain: gain, **tensors})[0]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(wanted - base).max() > 0.1
    # What the operator multiplies with is what is said of its weight.
    weight = (found["w"].astype(np.float64) - found["wz"]) * found["ws"]
    bound = (x.max() - x.min()) / 255 * np.abs(weight).sum(0).max()
    np.testing.assert_allclose(base, x @ weight + bias, atol=bound)
