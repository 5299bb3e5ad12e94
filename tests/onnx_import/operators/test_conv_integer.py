"""Convolutions of 8-bit integers take an adapter in floating point."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

CHANNELS, OUT, SIZE = 4, 6, (9, 7, 4)
YS, YZ = np.float32(0.1), np.uint8(120)


def graph(nodes, found, dims=2):
    made = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", CHANNELS, *SIZE[:dims]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", OUT, *dims * [None]])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in found.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def conv(x, weight, groups, **options):
    x, weight = torch.from_numpy(x).double(), torch.from_numpy(weight).double()
    convolve = {4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}[weight.dim()]
    return convolve(x, weight, groups=groups, **options).numpy()


@pytest.mark.parametrize("operator", ["ConvInteger", "QLinearConv"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (2, 3, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_takes_an_adapter(slotted, adapter, operator, kernel, groups):
    random = np.random.default_rng(0)
    shape = (OUT, CHANNELS // groups, *kernel)
    # Larger ones overflow on processors without VNNI.
    found = {"w": random.integers(-64, 64, shape, np.int8)}
    dims = len(kernel)
    stride, padding, ones = (2, 1, 1)[:dims], (1, 0, 0)[:dims], (1,) * dims
    options = {"strides": stride, "pads": 2 * padding, "group": groups}
    if operator == "ConvInteger":
        found["ws"] = np.float32(0.004)
        found["wz"] = np.int8(2)
        scales = np.full(OUT, found["ws"])
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            helper.make_node(operator, ["xq", "w", "xz", "wz"], ["acc"], name="conv", **options),
            helper.make_node("Cast", ["acc"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["xs", "ws"], ["both"]),
            helper.make_node("Mul", ["floats", "both"], ["y"]),
        ]
        bias = 0.0
    else:
        scales = random.uniform(0.003, 0.005, OUT).astype(np.float32)
        found |= {"ws": scales, "wz": np.zeros(OUT, np.int8), "xs": np.float32(0.03)}
        found |= {"xz": np.uint8(128), "ys": YS, "yz": YZ}
        found["c"] = random.integers(-900, 900, OUT).astype(np.int32)
        bias = (found["c"] * 0.03 * scales).reshape(-1, *ones)
        inputs = ["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz", "c"]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node(operator, inputs, ["yq"], name="conv", **options),
            helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
        ]
    made = slotted(graph(nodes, found, dims), "conv")
    (slot,) = made.slots
    assert (slot.in_features, slot.out_features, slot.kernel) == (CHANNELS, OUT, kernel)
    x = random.standard_normal((3, CHANNELS, *SIZE[:dims])).astype(np.float32)
    base = made.run_original(x=x)[0]
    assert np.array_equal(made.run(x=x)[0], base)
    zero, scale = (each.reshape(-1, 1, *ones) for each in (found["wz"], scales))
    weight = (found["w"].astype(np.float64) - zero) * scale
    tensors = adapter(slot, size=0.3)
    a, b = (tensors[f"{slot.name}.{role}"] for role in ("lora_A", "lora_B"))
    own = {"stride": stride, "padding": padding}
    delta = conv(conv(x, a, 1, **own).astype(np.float32), b, 1)
    wanted = conv(x, weight, groups, **own) + bias
    step = YS if operator == "QLinearConv" else 0
    # Activations are rounded to steps of 0.03 in every product.
    bound = step + 0.5 * 0.03 * np.abs(weight).reshape(OUT, -1).sum(1).max()
    np.testing.assert_allclose(base, wanted, atol=bound)
    np.testing.assert_allclose(made.run(x=x, **tensors)[0], base + delta, atol=1e-4 + 2e-6)
    assert np.abs(delta).max() > 2 * bound


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("operator", ["ConvInteger", "MatMulInteger"])
def test_a_bias_of_integers_before_the_scale(slotted, adapter, operator, first):
    """As ONNX Runtime's first quantizer wrote it: rounded by the scale that each run has."""
    random = np.random.default_rng(0)
    is_conv = operator == "ConvInteger"
    variant = "conv" if is_conv else "lora"
    shape = (OUT, CHANNELS, 3, 2) if is_conv else (CHANNELS, OUT)
    # Larger ones overflow on processors without VNNI.
    found = {"w": random.integers(-60, 60, shape, np.int8), "wz": np.int8(2)}
    found |= {"ws": np.float32(0.004), "b": random.standard_normal(OUT).astype(np.float32)}
    bias = found["b"] = found["b"].reshape(-1, 1, 1) if is_conv else found["b"]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("Mul", ["xs", "ws"], ["both"]),
        helper.make_node("Div", ["b", "both"], ["steps"]),
        helper.make_node("Round", ["steps"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["integers"], to=TensorProto.INT32),
        helper.make_node(operator, ["xq", "w", "xz", "wz"], ["acc"], name="product"),
        helper.make_node("Add", ["integers", "acc"] if first else ["acc", "integers"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "both"], ["y"]),
    ]
    model = graph(nodes, found)
    if not is_conv:
        for value, features in ((model.graph.input[0], CHANNELS), (model.graph.output[0], OUT)):
            dims = ["rows", features]
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, dims))
    made = slotted(model, variant)
    (slot,) = made.slots
    x = random.standard_normal((3, CHANNELS, *SIZE[:2]) if is_conv else (3, CHANNELS))
    x = x.astype(np.float32)
    tensors = adapter(slot, size=0.3)
    a, b = (tensors[f"{slot.name}.{role}"] for role in ("lora_A", "lora_B"))
    weight = (found["w"].astype(np.float64) - 2) * found["ws"]
    if is_conv:
        wanted = conv(x, weight, 1) + bias
        delta = conv(conv(x, a, 1).astype(np.float32), b, 1)
        size = np.abs(weight).sum((1, 2, 3)).max()
    else:
        wanted, delta = x @ weight + bias, x.astype(np.float64) @ a @ b
        size = np.abs(weight).sum(0).max()
    base = made.run_original(x=x)[0]
    assert np.array_equal(made.run(x=x)[0], base)
    # Activations are rounded to 255 steps from the least to the largest.
    bound = 0.51 * (x.max() - x.min()) / 255 * size
    np.testing.assert_allclose(base, wanted, atol=bound)
    np.testing.assert_allclose(made.run(x=x, **tensors)[0], base + delta, atol=1e-5)
    assert min(np.abs(delta).max(), np.abs(bias).max()) > 2 * bound
    told = slotted(model, variant, "gain").unslotted
    assert list(told) == [f"{slot.name}.lora_gain"]
    assert "a bias that no gain may scale" in told[f"{slot.name}.lora_gain"]
