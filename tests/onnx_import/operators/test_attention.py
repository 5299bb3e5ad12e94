"""The projection inside Attention and QAttention takes an adapter; the rest stays what it was."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

IN, D, HEADS, BATCH, LENGTH, PAST = 10, 12, 4, 3, 5, 2
SIZE = D // HEADS
MASKS = {
    "": None,
    "lengths": np.array([5, 3, 2], np.int32),
    "keys": np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], np.int32),
    "pairs": np.tril(np.ones((BATCH, LENGTH, LENGTH), np.int32)),
}


def softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def attention(qkv, mask=None, past=None, causal=False):
    """Attention in float64 of projected values ``[batch, length, 3 D]``."""
    q, k, v = (
        part.reshape(BATCH, LENGTH, HEADS, SIZE).transpose(0, 2, 1, 3)
        for part in np.split(qkv.astype(np.float64), 3, -1)
    )
    if past is not None:
        k, v = (np.concatenate([old, new], 2) for old, new in zip(past, (k, v), strict=True))
    total = k.shape[2]
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(SIZE)
    if mask is not None:
        if mask.ndim == 1:
            mask = np.arange(total) < mask[:, None]
        allowed = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        scores = scores + np.where(allowed, 0, -10000.0)
    if causal:
        later = np.arange(total) > np.arange(LENGTH)[:, None] + total - LENGTH
        scores = np.where(later, -1e30, scores)
    y = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(BATCH, LENGTH, D)
    return y, np.stack([k, v])


def graph(node, constants, mask, past, opset, before=()):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", IN])]
    if mask is not None:
        shape = [None] * (mask.ndim - 1)
        entry = ["batch", *shape] if mask.ndim > 1 else ["batch"]
        inputs.append(helper.make_tensor_value_info("given", TensorProto.INT64, entry))
        before = [
            *before,
            # The optimizer's graphs cast the mask they are given.
            helper.make_node("Cast", ["given"], ["mask"], to=TensorProto.INT32),
        ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)]
    if past is not None:
        shape = [2, "batch", HEADS, "past", SIZE]
        inputs.append(helper.make_tensor_value_info("past", TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info("present", TensorProto.FLOAT, [None] * 5))
    made = helper.make_graph(
        [*before, node],
        "attention",
        inputs,
        outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=domains, ir_version=8)


def data(mask, past):
    random = np.random.default_rng(0)
    inputs = {"x": random.standard_normal((BATCH, LENGTH, IN)).astype(np.float32)}
    if mask is not None:
        if past and mask.ndim > 1:
            mask = np.concatenate([np.ones((*mask.shape[:-1], PAST), mask.dtype), mask], -1)
        inputs["given"] = mask.astype(np.int64)
    if past:
        cache = random.standard_normal((2, BATCH, HEADS, PAST, SIZE))
        inputs["past"] = cache.astype(np.float32)
    weight = random.standard_normal((IN, 3 * D)).astype(np.float32) * 0.3
    bias = random.standard_normal(3 * D).astype(np.float32)
    return inputs, weight, bias


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("kind", [name for name in MASKS if name != "lengths"])
def test_attention(slotted, adapter, kind, past, causal, opset):
    inputs, weight, bias = data(MASKS[kind], past)
    masked = "mask" if kind else ""
    node = helper.make_node(
        "Attention",
        ["x", "W", "b", masked, "past"] if past else ["x", "W", "b", masked],
        ["y", "present"] if past else ["y"],
        name="fused",
        domain="com.microsoft",
        num_heads=HEADS,
        unidirectional=int(causal),
    )
    model = graph(node, {"W": weight, "b": bias}, inputs.get("given"), inputs.get("past"), opset)
    made = slotted(model)
    (slot,) = made.slots
    assert (slot.in_features, slot.out_features) == (IN, 3 * D)
    expected = made.run_original(**inputs)
    for got, wanted in zip(made.run(**inputs), expected, strict=True):
        # The same bits but without any mask or cache, where onnxruntime takes a shortcut.
        np.testing.assert_allclose(got, wanted, atol=0 if kind or past or causal else 2e-6)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    qkv = inputs["x"] @ (weight + a @ b) + bias
    wanted = attention(qkv, inputs.get("given"), inputs.get("past"), causal)
    for got, right in zip(made.run(**inputs, **tensors), wanted, strict=False):
        np.testing.assert_allclose(got, right, atol=2e-5)
    assert np.abs(wanted[0] - expected[0]).max() > 0.1


@pytest.mark.parametrize("opset", [11, 17])
def test_lengths_may_be_summed_of_a_mask(slotted, adapter, opset):
    """As onnxruntime's optimizer makes them where it fuses no embedding, as in RoBERTa's."""
    inputs, weight, bias = data(np.tril(np.ones((LENGTH, LENGTH), np.int32))[2:], False)
    summed = helper.make_node("ReduceSum", ["mask"], ["lengths"], keepdims=0)
    constants = {"W": weight, "b": bias}
    if opset < 13:
        summed.attribute.append(helper.make_attribute("axes", [1]))
    else:
        summed.input.append("axes")
        constants["axes"] = np.array([1])
    node = helper.make_node(
        "Attention", ["x", "W", "b", "lengths"], ["y"], domain="com.microsoft", num_heads=HEADS
    )
    model = graph(node, constants, inputs["given"], None, opset)
    model.graph.node.insert(1, summed)
    made = slotted(model)
    (slot,) = made.slots
    (expected,) = made.run_original(**inputs)
    np.testing.assert_array_equal(made.run(**inputs)[0], expected)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    wanted, _ = attention(inputs["x"] @ (weight + a @ b) + bias, inputs["given"])
    np.testing.assert_allclose(made.run(**inputs, **tensors)[0], wanted, atol=2e-5)
    assert np.abs(wanted - expected).max() > 0.1


def test_a_gain_and_a_bias_reach_the_product_alone(slotted, adapter):
    inputs, weight, bias = data(MASKS["keys"], False)
    node = helper.make_node(
        "Attention", ["x", "W", "b", "mask"], ["y"], domain="com.microsoft", num_heads=HEADS
    )
    made = slotted(graph(node, {"W": weight, "b": bias}, inputs["given"], None, 17), "lora", "gain")
    (slot,) = made.slots
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    gain = np.random.default_rng(3).uniform(0.5, 1.5, 3 * D).astype(np.float32)
    tensors[slot.input_gain] = gain
    wanted, _ = attention(
        gain * (inputs["x"] @ weight) + inputs["x"] @ a @ b + bias, inputs["given"]
    )
    np.testing.assert_allclose(made.run(**inputs, **tensors)[0], wanted, atol=2e-5)
    scaled_bias, _ = attention(
        gain * (inputs["x"] @ weight + bias) + inputs["x"] @ a @ b, inputs["given"]
    )
    assert np.abs(scaled_bias - wanted).max() > 0.1


def test_values_may_be_wider_than_keys(slotted, adapter):
    random = np.random.default_rng(1)
    sizes = [8, 8, 16]
    weight = random.standard_normal((IN, sum(sizes))).astype(np.float32) * 0.3
    node = helper.make_node(
        "Attention",
        ["x", "W", "b"],
        ["y"],
        domain="com.microsoft",
        num_heads=HEADS,
        qkv_hidden_sizes=sizes,
    )
    bias = random.standard_normal(sum(sizes)).astype(np.float32)
    made = slotted(graph(node, {"W": weight, "b": bias}, None, None, 17))
    x = random.standard_normal((BATCH, LENGTH, IN)).astype(np.float32)
    np.testing.assert_allclose(made.run(x=x)[0], made.run_original(x=x)[0], atol=2e-6)
    (slot,) = made.slots
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"] for role in ("lora_A", "lora_B"))
    from onnx_graphs import session

    merged = graph(node, {"W": weight + a @ b, "b": bias}, None, None, 17)
    wanted = session(merged).run(None, {"x": x})[0]
    np.testing.assert_allclose(made.run(x=x, **tensors)[0], wanted, atol=2e-5)
    assert np.abs(wanted - made.run_original(x=x)[0]).max() > 0.1


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("zero", [None, 120, 0], ids=["dynamic", "static", "cut off"])
def test_q_attention(slotted, adapter, past, per_column, zero):
    inputs, _, bias = data(MASKS["keys"], past)
    random = np.random.default_rng(2)
    columns = 3 * D if per_column else 1
    constants = {
        # 7 bits: a processor without VNNI adds two products of 8 bits in 16, which may not suffice.
        "W": random.integers(-64, 64, (IN, 3 * D), np.int8),
        "b": bias,
        "ws": random.uniform(0.002, 0.004, columns).astype(np.float32),
        "wz": random.integers(-3, 4, columns).astype(np.int8),
    }
    if not per_column:
        constants |= {name: constants[name].reshape(()) for name in ("ws", "wz")}
    if zero is not None:
        constants |= {"xs": np.array(0.025, np.float32), "xz": np.array(zero, np.uint8)}
        before = [helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"])]
    else:
        before = [helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"])]
    node = helper.make_node(
        "QAttention",
        ["xq", "W", "b", "xs", "ws", "mask", "xz", "wz", *(["past"] if past else [])],
        ["y", "present"] if past else ["y"],
        name="fused",
        domain="com.microsoft",
        num_heads=HEADS,
    )
    made = slotted(graph(node, constants, inputs["given"], inputs.get("past"), 17, before))
    base = made.run_original(**inputs)
    for got, wanted in zip(made.run(**inputs), base, strict=True):
        # The same integers; their scaling and the bias are rounded in another order.
        np.testing.assert_allclose(got, wanted, atol=2e-6)
    (slot,) = made.slots
    weight = (constants["W"].astype(np.float64) - constants["wz"]) * constants["ws"]
    tensors = adapter(slot, size=0.5)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    x = inputs["x"]
    if zero is not None:
        rounded = (np.clip(np.round(x / 0.025) + zero, 0, 255) - zero) * np.float32(0.025)
    else:
        scale = (max(x.max(), 0) - min(x.min(), 0)) / 255
        rounded = np.round(x / scale) * scale
    # The adapter sees the activation before it is rounded, but not what was cut off with that.
    seen = rounded if zero == 0 else x.astype(np.float64)
    qkv = rounded @ weight + seen @ a @ b + bias
    wanted = attention(qkv, inputs["given"], inputs.get("past"))
    for got, right in zip(made.run(**inputs, **tensors), wanted, strict=False):
        # Half a step of the activation now and then falls to the other side.
        np.testing.assert_allclose(got, right, atol=2e-3)
    assert np.abs(wanted[0] - base[0]).max() > 0.1


@pytest.mark.parametrize(
    "change",
    [{"do_rotary": 1}, {"past_present_share_buffer": 1}, {"mask": "ends and starts"}],
)
def test_what_cannot_be_taken_apart_is_said(change):
    import onnx_ir as ir

    from converters.onnx.importing import ImportOptions, slot_graph
    from loraport.errors import LoraportError

    inputs, weight, bias = data(MASKS["keys"], False)
    options = {name: value for name, value in change.items() if name != "mask"}
    before = []
    mask = inputs["given"]
    name = "mask"
    if "mask" in change:
        name, mask = "both", np.concatenate([MASKS["lengths"], np.zeros(3, np.int32)])
        before = [helper.make_node("Concat", ["s", "s"], ["both"], axis=0)]
    node = helper.make_node(
        "Attention",
        ["x", "W", "b", name],
        ["y"],
        name="fused",
        domain="com.microsoft",
        num_heads=HEADS,
        **options,
    )
    constants = {"W": weight, "b": bias, "s": np.ones(BATCH, np.int32)}
    model = graph(node, constants, mask, None, 17, before)
    with pytest.raises(LoraportError, match="its projection cannot be taken out"):
        slot_graph(ir.from_proto(model), ImportOptions())
