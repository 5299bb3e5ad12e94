"""QLinearMatMul and QGemm: integers in and out, an adapter in floating point between."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.onnx.operators import find_site

IN, OUT, ROWS = 7, 5, 4
XS, XZ, YS, YZ = np.float32(0.02), np.uint8(128), np.float32(0.1), np.uint8(120)


def constants(per_column, transposed=False):
    random = np.random.default_rng(0)
    columns = OUT if per_column else 1
    weight = random.integers(-100, 100, (IN, OUT), np.int8)
    found = {
        "w": weight.T.copy() if transposed else weight,
        "ws": random.uniform(0.01, 0.02, columns).astype(np.float32),
        "wz": np.zeros(columns, np.int8) if per_column else np.full(columns, 3, np.int8),
        "xs": XS,
        "xz": XZ,
        "ys": YS,
        "yz": YZ,
    }
    if not per_column:
        found |= {name: found[name].reshape(()) for name in ("ws", "wz")}
    return found, (weight.astype(np.float64) - found["wz"]) * found["ws"]


def graph(nodes, found, y_type=TensorProto.FLOAT, x_type=TensorProto.FLOAT):
    made = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("x", x_type, ["rows", IN])],
        [helper.make_tensor_value_info("y", y_type, ["rows", None])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in found.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=domains, ir_version=8)


def around(kind, node):
    """The operator between floats, between integers, or with its output read twice."""
    quantize = helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"])
    dequantize = helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"])
    if kind == "integers":
        node.input[0], node.output[0] = "x", "y"
        return [node], TensorProto.UINT8, TensorProto.UINT8
    if kind == "relu":
        # A quantizer's graph goes on in integers.
        middle = helper.make_node("Max", ["yq", "yz"], ["positive"])
        dequantize.input[0] = "positive"
        return [quantize, node, middle, dequantize], TensorProto.FLOAT, TensorProto.FLOAT
    return [quantize, node, dequantize], TensorProto.FLOAT, TensorProto.FLOAT


def quantized(values):
    return np.clip(np.round(values / XS) + XZ, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["floats", "integers", "relu"])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("operator", ["QLinearMatMul", "QGemm", "QGemm transposed"])
def test_it_takes_an_adapter(slotted, adapter, operator, per_column, kind):
    transposed = operator.endswith("transposed")
    found, weight = constants(per_column, transposed)
    bias = 0.0
    if operator == "QLinearMatMul":
        inputs = ["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
        node = helper.make_node(operator, inputs, ["yq"], name="mm")
    else:
        found["c"] = np.random.default_rng(3).integers(-900, 900, OUT).astype(np.int32)
        bias = found["c"].astype(np.float64) * XS * found["ws"]
        inputs = ["xq", "xs", "xz", "w", "ws", "wz", "c", "ys", "yz"]
        node = helper.make_node(
            "QGemm", inputs, ["yq"], name="mm", domain="com.microsoft", transB=int(transposed)
        )
    nodes, y_type, x_type = around(kind, node)
    made = slotted(graph(nodes, found, y_type, x_type))
    (slot,) = made.slots
    assert (slot.in_features, slot.out_features) == (IN, OUT)
    x = np.random.default_rng(1).standard_normal((ROWS, IN)).astype(np.float32)
    rounded = (quantized(x).astype(np.float64) - XZ) * XS
    given = quantized(x) if kind == "integers" else x
    base = made.run_original(x=given)[0]
    assert np.array_equal(made.run(x=given)[0], base)
    tensors = adapter(slot, size=0.5)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    delta = (rounded if kind == "integers" else x) @ a @ b
    got = made.run(x=given, **tensors)[0]
    if kind == "integers":
        got, base = ((value.astype(np.float64) - YZ) * YS for value in (got, base))
    wanted = rounded @ weight + bias
    if kind == "relu":
        wanted, low = wanted + delta, 0.0
    else:
        wanted, low = wanted + delta, (0 - float(YZ)) * YS
    wanted = np.clip(wanted, low, (255 - float(YZ)) * YS)
    # The product is rounded to the output's steps, and again after the adapter where integers
    # follow.
    np.testing.assert_allclose(got, wanted, atol=1.01 * YS)
    assert np.abs(wanted - base).max() > 5 * YS


def test_an_output_in_floating_point_is_not_cut_off(slotted, adapter):
    """QGemm without an output scale gives floats."""
    found, weight = constants(True)
    found["c"] = np.zeros(OUT, np.int32)
    inputs = ["xq", "xs", "xz", "w", "ws", "wz", "c"]
    node = helper.make_node("QGemm", inputs, ["y"], name="mm", domain="com.microsoft")
    quantize = helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"])
    made = slotted(graph([quantize, node], found))
    (slot,) = made.slots
    x = np.random.default_rng(1).standard_normal((ROWS, IN)).astype(np.float32)
    tensors = adapter(slot, size=5.0)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    rounded = (quantized(x).astype(np.float64) - XZ) * XS
    wanted = rounded @ weight + x @ a @ b
    np.testing.assert_allclose(made.run(x=x, **tensors)[0], wanted, atol=1e-3)
    assert np.abs(wanted - made.run(x=x)[0]).max() > 255 * YS


@pytest.mark.parametrize("bias", [True, False])
def test_a_gain_that_no_slot_can_have_is_told(slotted, bias):
    """QGemm cuts off what it adds together with the product."""
    found, _ = constants(False)
    inputs = ["xq", "xs", "xz", "w", "ws", "wz", "c" if bias else "", "ys", "yz"]
    if bias:
        found["c"] = np.ones(OUT, np.int32)
    node = helper.make_node("QGemm", inputs, ["yq"], name="/mm/product", domain="com.microsoft")
    made = slotted(graph(around("floats", node)[0], found), "lora", "gain")
    (slot,) = made.slots
    assert slot.gain is not bias
    reason = "this operator adds a bias that no gain may scale and that cannot be taken out of it"
    assert made.unslotted == ({"mm.lora_gain": reason} if bias else {})


@pytest.mark.parametrize("transposed", [False, True])
def test_what_qgemm_scales_its_product_by_scales_what_an_adapter_adds(slotted, adapter, transposed):
    """As ``Gemm``'s alpha does, which the quantizer leaves in the operator."""
    found, weight = constants(True, transposed)
    found["c"] = np.full(OUT, 7, np.int32)
    inputs = ["xq", "xs", "xz", "w", "ws", "wz", "c"]
    node = helper.make_node(
        "QGemm", inputs, ["y"], name="mm", domain="com.microsoft", alpha=0.25, transB=transposed
    )
    quantize = helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"])
    model = graph([quantize, node], found)
    made = slotted(model)
    (slot,) = made.slots
    x = np.random.default_rng(1).standard_normal((ROWS, IN)).astype(np.float32)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    change = made.run(x=x, **tensors)[0] - made.run_original(x=x)[0]
    np.testing.assert_allclose(change, 0.25 * x @ a @ b, atol=1e-5)
    assert np.abs(change).max() > 0.1
    site = find_site(next(n for n in ir.from_proto(model).graph if n.op_type == "QGemm"))
    np.testing.assert_allclose(site.weight(), weight, rtol=1e-6)
