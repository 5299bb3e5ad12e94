"""Quantizers take out a Relu that the range of the integers behind it replaces."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.onnx.exporters.storing import sites_of, stored_precision
from converters.onnx.operators import find_site

IN, HIDDEN, OUT, ROWS = 7, 6, 5, 4
SCALES = {"x": np.float32(0.05), "h": np.float32(0.05), "y": np.float32(0.05)}
# Zero points of x, of what the Relu gave and of y; the integers' lowest and highest.
TYPES = {
    "uint8": (np.uint8(128), np.uint8(0), np.uint8(120), 0, 255),
    "int8": (np.int8(0), np.int8(-128), np.int8(-8), -128, 127),
    "uint16": (np.uint16(32768), np.uint16(0), np.uint16(30000), 0, 65535),
    "no zero point": (np.uint8(128), None, np.uint8(120), 0, 255),
}


def integers(shape, seed):
    """Return a weight as integers that no kernel saturates, and what they stand for."""
    stored = np.random.default_rng(seed).integers(-60, 60, shape).astype(np.int8)
    return stored, stored.astype(np.float64) * np.float32(0.01)


def pair(name, out, zero):
    """Return the operators that quantize a value and dequantize it."""
    scales = [f"{name}.scale"] + ([] if zero is None else [f"{name}.zero"])
    return [
        helper.make_node("QuantizeLinear", [name, *scales], [f"{name}.q"]),
        helper.make_node("DequantizeLinear", [f"{name}.q", *scales], [out]),
    ]


def quantized(values, scale, zero, low, high):
    return (np.clip(np.round(values / scale) + zero, low, high) - zero) * np.float64(scale)


def qdq(operator, kind):
    """Return ``x -> fc1 (a Relu that was taken out) -> fc2 -> y``, and both weights."""
    zeros = dict(zip("xhy", TYPES[kind][:3], strict=True))
    found = {f"{name}.scale": SCALES[name] for name in "xhy"}
    found |= {f"{name}.zero": zero for name, zero in zeros.items() if zero is not None}
    found["w.scale"] = np.float32(0.01)
    weights = {}
    nodes = pair("x", "x.d", zeros["x"])
    for seed, (name, shape, before, after) in enumerate(
        [("fc1", (IN, HIDDEN), "x.d", "h"), ("fc2", (HIDDEN, OUT), "h.d", "y")]
    ):
        stored, weights[name] = integers(shape, seed)
        # A kernel, or a Gemm's matrix, has the outputs first.
        found[f"{name}.weight"] = {
            "MatMul": stored,
            "Gemm": stored.T.copy(),
            "Conv": stored.T.reshape(*reversed(shape), 1),
        }[operator]
        nodes += [
            helper.make_node(
                "DequantizeLinear", [f"{name}.weight", "w.scale"], [f"{name}.d"], name=f"{name}.w"
            ),
            helper.make_node(
                operator,
                [before, f"{name}.d"],
                [after],
                name=f"/{name}/{operator}",
                **({"transB": 1} if operator == "Gemm" else {}),
            ),
            *pair(after, {"h": "h.d", "y": "result"}[after], zeros[after]),
        ]
    dims = ["rows", "in"] if operator != "Conv" else [ROWS, "in", 1]
    graph = helper.make_graph(
        nodes,
        "folded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [dims[0], IN, *dims[2:]])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, [dims[0], OUT, *dims[2:]])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in found.items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), weights


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Conv"])
def test_what_the_relu_cut_off_stays_cut_off_with_an_adapter(slotted, adapter, operator, kind):
    model, weights = qdq(operator, kind)
    made = slotted(model, "conv" if operator == "Conv" else "lora")
    assert sorted(slot.name for slot in made.slots) == ["fc1", "fc2"]
    xz, hz, yz, low, high = (0 if number is None else int(number) for number in TYPES[kind])
    x = np.random.default_rng(9).standard_normal((ROWS, IN)).astype(np.float32)
    fed = x[:, :, None] if operator == "Conv" else x
    deltas, tensors = {}, {}
    for seed, slot in enumerate(made.slots):
        own = adapter(slot, seed=seed, size=0.6)
        a, b = (own[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
        if operator == "Conv":
            a, b = a[:, :, 0].T, b[:, :, 0].T
        deltas[slot.name], tensors[slot.name] = a @ b, own

    def wanted(names, relu=True):
        # An adapter reads x as it was before it was rounded, and adds to y after that is.
        first, second = (deltas[name] if name in names else 0 * deltas[name] for name in deltas)
        hidden = quantized(x.astype(np.float64), SCALES["x"], xz, low, high) @ weights["fc1"]
        hidden += x @ first
        if relu:
            hidden = quantized(hidden, SCALES["h"], hz, low, high)
        return quantized(hidden @ weights["fc2"], SCALES["y"], yz, low, high) + hidden @ second

    base = made.run_original(x=fed)[0]
    # Products in floats and in integers may lie on two sides of what is between two steps.
    np.testing.assert_allclose(made.run(x=fed)[0], base, atol=1.01 * SCALES["y"])
    for names in (["fc1"], ["fc2"], ["fc1", "fc2"]):
        given = {k: v for name in names for k, v in tensors[name].items()}
        got = made.run(x=fed, **given)[0].reshape(ROWS, OUT)
        np.testing.assert_allclose(got, wanted(names), atol=1.01 * SCALES["y"])
        assert np.abs(wanted(names) - base.reshape(ROWS, OUT)).max() > 4 * SCALES["y"]
        assert np.abs(wanted(names) - wanted(names, relu=False)).max() > 4 * SCALES["y"]


def test_weights_of_4_bits_behind_it_are_held_to_the_8_bits_of_activations():
    model, weights = qdq("MatMul", "uint8")
    for stored in model.graph.initializer:
        if stored.name in ("fc1.weight", "fc2.weight"):
            ones = np.ones(stored.dims, np.int8).ravel()
            stored.CopyFrom(helper.make_tensor(stored.name, TensorProto.INT4, stored.dims, ones))
    sites = sites_of(ir.from_proto(model))
    assert len(sites) == len(weights)
    assert stored_precision(sites) == "int8"


ALPHA = 0.5  # of QGemm, whose bias it multiplies, too


def in_integers(operator, kind, opset=17):
    """Return ``x -> fc1 (a Relu is folded in) -> fc2 -> y`` of integers, both weights, fc1's bias.

    fc1's weight has a scale for each output.
    """
    zeros = dict(zip("xhy", TYPES[kind][:3], strict=True))
    found = {f"{name}.scale": SCALES[name] for name in "xhy"}
    found |= {f"{name}.zero": zero for name, zero in zeros.items()}
    weights, bias = {}, 0.0
    nodes = [helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.q"])]
    for name, shape, before, after in (("fc1", (IN, HIDDEN), *"xh"), ("fc2", (HIDDEN, OUT), *"hy")):
        stored, weights[name] = integers(shape, len(nodes))
        columns = shape[1] if name == "fc1" else ()
        factors = np.random.default_rng(3).uniform(0.5, 1.5, columns)
        found |= {f"{name}.s": np.float32(0.01 * factors), f"{name}.z": np.zeros(columns, np.int8)}
        weights[name] = stored * found[f"{name}.s"].astype(np.float64)
        inputs = [f"{before}.q", f"{before}.scale", f"{before}.zero"]
        inputs += [f"{name}.weight", f"{name}.s", f"{name}.z"]
        outer = [f"{after}.scale", f"{after}.zero"]
        attributes = {}
        if operator == "QLinearConv":
            stored = stored.T.reshape(*reversed(shape), 1)
        if operator == "QGemm":
            stored, attributes = stored.T.copy(), {"domain": "com.microsoft", "transB": 1}
        if name == "fc1" and operator == "QGemm":
            attributes["alpha"] = ALPHA
        if name == "fc1" and operator != "QLinearMatMul":
            found["bias"] = np.random.default_rng(4).integers(-900, 900, HIDDEN).astype(np.int32)
            bias = found["bias"] * np.float64(SCALES["x"]) * found["fc1.s"]
            outer = ["bias", *outer] if operator == "QGemm" else [*outer, "bias"]
        elif operator == "QGemm":
            outer = ["", *outer]
        found[f"{name}.weight"] = stored
        made = [f"{after}.q"]
        nodes += [helper.make_node(operator, inputs + outer, made, f"/{name}/q", **attributes)]
    nodes += [helper.make_node("DequantizeLinear", ["y.q", "y.scale", "y.zero"], ["y"])]
    dims = ["rows", "in"] if operator != "QLinearConv" else [ROWS, "in", 1]
    stored_as = helper.np_dtype_to_tensor_dtype(zeros["h"].dtype)
    graph = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN, *dims[2:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUT, *dims[2:]])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in found.items()],
        value_info=[helper.make_tensor_value_info("h.q", stored_as, ["rows", HIDDEN, *dims[2:]])],
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8), weights, bias


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("operator", ["QLinearMatMul", "QGemm", "QLinearConv"])
@pytest.mark.parametrize("controls", [{}, {"strength": True}, {"per_row": True}, {"gain": True}])
def test_an_adapter_is_added_before_what_an_operator_of_integers_cuts_off(
    slotted, adapter, operator, kind, controls
):
    model, weights, bias = in_integers(operator, kind)
    variants = ["conv" if operator == "QLinearConv" else "lora"]
    variants += ["gain"] if "gain" in controls else []
    made = slotted(model, *variants, **{k: v for k, v in controls.items() if k != "gain"})
    assert [slot.name for slot in made.slots] == ["fc1", "fc2"]
    xz, hz, yz, low, high = map(int, TYPES[kind])
    x = np.random.default_rng(9).standard_normal((ROWS, IN)).astype(np.float32)
    fed = x[:, :, None] if operator == "QLinearConv" else x
    slot = made.slots[0]
    assert slot.gain == ("gain" in controls)  # the bias is apart from the product
    tensors = adapter(slot, size=0.7)
    a, b = (tensors[f"fc1.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    delta = a[:, :, 0].T @ b[:, :, 0].T if operator == "QLinearConv" else a @ b
    alpha = ALPHA if operator == "QGemm" else 1.0
    gains = np.linspace(0.5, 1.5, HIDDEN) if slot.gain else np.ones(HIDDEN)
    own = np.ones((ROWS, 1))

    def wanted(relu=True):
        rounded = quantized(x.astype(np.float64), SCALES["x"], xz, low, high)
        hidden = alpha * (rounded @ (weights["fc1"] * gains) + bias + own * (x @ delta))
        if relu:
            hidden = quantized(hidden, SCALES["h"], hz, low, high)
        return quantized(hidden @ weights["fc2"], SCALES["y"], yz, low, high)

    base = made.run_original(x=fed)[0]
    # Products in floats and in integers may lie on two sides of what is between two steps.
    np.testing.assert_allclose(made.run(x=fed)[0], base, atol=1.01 * SCALES["y"])
    if slot.gain:
        tensors["fc1.lora_gain"] = gains.astype(np.float32)
    if "strength" in controls:
        tensors["lora_strength"], own = np.array([0.5], np.float32), np.full((ROWS, 1), 0.5)
    if "per_row" in controls:
        own = np.array([[0.0], [1], [0], [1]])
        tensors["adapter_ids"] = own[:, 0].astype(np.int64) - 1
    got = made.run(x=fed, **tensors)[0].reshape(ROWS, OUT)
    # A step of h moves fc2's product by less than a step of y.
    np.testing.assert_allclose(got, wanted(), atol=1.01 * SCALES["y"])
    assert np.abs(wanted() - base.reshape(ROWS, OUT)).max() > 4 * SCALES["y"]
    assert np.abs(wanted() - wanted(relu=False)).max() > 4 * SCALES["y"]


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("operator", ["QLinearMatMul", "QGemm", "QLinearConv"])
def test_an_operator_of_integers_whose_floats_no_operator_can_dequantize_is_told(
    slotted, operator, kind
):
    """Before opset 13 nothing dequantizes by a scale for each output."""
    model, *_ = in_integers(operator, kind, opset=12)
    told = slotted(model, "lora", "conv")
    assert [slot.name for slot in told.slots] == ["fc2"]
    domain = "com.microsoft." if operator == "QGemm" else ""
    assert told.unslotted == {
        "/fc1/q": f"{domain}{operator}: its integers have no numbers below or above zero, as "
        "where an activation is folded in; quantize in the format QDQ"
    }


def integer_product(operator, zero, scales):
    """Return ``y = x w`` whose ``x`` is quantized by a constant scale, and the weight."""
    stored, weight = integers((IN, OUT), 0)
    kernel = stored.T.reshape(OUT, IN, 1) if operator == "ConvInteger" else stored
    found = {"xs": SCALES["x"], "w": kernel, "ws": np.float32(0.01)}
    found |= {"both": found["xs"] * found["ws"]} | ({} if zero is None else {"xz": zero})
    shift = "" if zero is None else "xz"
    nodes = [helper.make_node("QuantizeLinear", ["x", "xs", shift], ["xq"])]
    if operator == "MatMulIntegerToFloat":
        inputs = ["xq", "w", "xs", "ws", shift]
        nodes += [helper.make_node(operator, inputs, ["y"], name="fc", domain="com.microsoft")]
    else:
        if scales != "one":
            order = ["xs", "ws"] if scales == "x first" else ["ws", "xs"]
            nodes += [helper.make_node("Mul", order, ["both.computed"])]
        both = "both" if scales == "one" else "both.computed"
        nodes += [
            helper.make_node(operator, ["xq", "w", shift], ["acc"], name="fc"),
            helper.make_node("Cast", ["acc"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["floats", both], ["y"]),
        ]
    size = [1] if operator == "ConvInteger" else []
    graph = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUT, *size])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in found.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8), weight


@pytest.mark.parametrize("zero", [np.uint8(128), np.uint8(0), None], ids=["middle", "end", "none"])
@pytest.mark.parametrize(
    ("operator", "scales"),
    [
        ("MatMulInteger", "x first"),
        ("MatMulInteger", "x last"),
        ("MatMulInteger", "one"),
        ("ConvInteger", "one"),
        ("MatMulIntegerToFloat", "x first"),
    ],
)
def test_a_product_of_integers_reads_what_its_quantizer_left(
    slotted, adapter, operator, scales, zero
):
    """Of a range without numbers below zero the integers, else the numbers they are of."""
    model, weight = integer_product(operator, zero, scales)
    made = slotted(model, "conv" if operator == "ConvInteger" else "lora")
    (slot,) = made.slots
    x = np.random.default_rng(9).standard_normal((ROWS, IN)).astype(np.float32)
    fed = x[:, :, None] if operator == "ConvInteger" else x
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    delta = a[:, :, 0].T @ b[:, :, 0].T if operator == "ConvInteger" else a @ b
    left = quantized(x.astype(np.float64), SCALES["x"], int(zero or 0), 0, 255)
    base = made.run_original(x=fed)[0].reshape(ROWS, OUT)
    np.testing.assert_allclose(base, left @ weight, atol=1e-5)
    np.testing.assert_allclose(made.run(x=fed)[0].reshape(ROWS, OUT), base, atol=1e-6)
    read, other = (left, x) if not zero else (x, left)
    got = made.run(x=fed, **tensors)[0].reshape(ROWS, OUT)
    np.testing.assert_allclose(got, base + read @ delta, atol=2e-5)
    assert np.abs((read - other) @ delta).max() > 1e-3
    node = ir.from_proto(model).graph.node("fc")
    np.testing.assert_allclose(find_site(node).weight(), weight, rtol=1e-6)
