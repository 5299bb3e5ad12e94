"""Quantized embeddings: their rows are what the runtime gives, and they take slots."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, only_node, session

from converters.onnx.operators import find_site

ROWS, COLUMNS, BLOCK = 11, 64, 16
TOKENS = np.array([[0, 3, 10], [7, 7, 1]])


def graph(bits, form, zeros, seed=0):
    random = np.random.default_rng(seed)
    blocks = COLUMNS // BLOCK
    scales = random.uniform(0.1, 0.9, (ROWS, blocks)).astype(np.float32)
    constants = [helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.ravel())]
    if form == "packed":
        per_byte = 8 // bits
        data = random.integers(0, 256, (ROWS, COLUMNS // per_byte))
        zero = random.integers(0, 256, (ROWS, -(-blocks // per_byte)))
        kind = TensorProto.UINT8
    else:
        kind = TensorProto.UINT4 if form == "uint4" else TensorProto.INT4
        low = 0 if form == "uint4" else -8
        data = random.integers(low, low + 16, (ROWS, COLUMNS))
        zero = random.integers(low, low + 16, (ROWS, blocks))
    constants.append(helper.make_tensor("q", kind, data.shape, data.ravel()))
    if zeros:
        constants.append(helper.make_tensor("z", kind, zero.shape, zero.ravel()))
    node = helper.make_node(
        "GatherBlockQuantized",
        ["q", "tokens", "s", *(["z"] if zeros else [])],
        ["y"],
        name="/model/embed_tokens/Gather",
        domain="com.microsoft",
        bits=bits,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    made = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", COLUMNS])],
        constants,
    )
    return helper.make_model(made, opset_imports=DOMAINS, ir_version=10)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("bits", "form"), [(4, "packed"), (8, "packed"), (4, "uint4"), (4, "int4")]
)
def test_its_rows_and_an_adapter(slotted, adapter, bits, form, zeros):
    model = graph(bits, form, zeros)
    site = find_site(only_node(model))
    assert (site.in_features, site.out_features, site.quantized) == (ROWS, COLUMNS, True)
    table = site.weight()
    base = session(model).run(None, {"tokens": TOKENS})[0]
    np.testing.assert_allclose(base, table[TOKENS], rtol=1e-6)
    assert np.abs(base - np.roll(table, 1, 1)[TOKENS]).max() > 1
    made = slotted(model, "embedding")
    (slot,) = made.slots
    assert slot.members[0].module_path == "model.embed_tokens"
    assert np.array_equal(made.run(tokens=TOKENS)[0], base)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"] for role in ("lora_A", "lora_B"))
    np.testing.assert_allclose(
        made.run(tokens=TOKENS, **tensors)[0], base + a[TOKENS] @ b, atol=1e-5
    )
    assert np.abs(a[TOKENS] @ b).max() > 0.1


def test_another_axis_is_no_site():
    node = only_node(graph(4, "packed", False))
    node.attributes["gather_axis"] = ir.AttrInt64("gather_axis", 1)
    assert find_site(node) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("bits", 0), ("bits", 3), ("bits", 16), ("block_size", -16), ("block_size", 32)],
)
def test_sizes_that_the_numbers_do_not_have_are_no_site(name, value):
    node = only_node(graph(4, "packed", True))
    assert find_site(node) is not None
    node.attributes[name] = ir.AttrInt64(name, value)
    assert find_site(node) is None


@pytest.mark.parametrize("torn", ["s", "z"])
def test_numbers_that_are_missing_are_no_site(torn):
    model = graph(8, "packed", True)
    stored = next(each for each in model.graph.initializer if each.name == torn)
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored)[:, :-1], torn))
    assert find_site(only_node(model)) is None


@pytest.mark.parametrize("zero", [None, 131])
def test_a_gather_of_integers_that_are_dequantized_after(slotted, adapter, zero):
    random = np.random.default_rng(0)
    table = random.integers(0, 256, (ROWS, COLUMNS), np.uint8)
    constants = [
        helper.make_tensor("q", TensorProto.UINT8, table.shape, table.ravel()),
        helper.make_tensor("s", TensorProto.FLOAT, [], [0.02]),
    ]
    if zero is not None:
        constants.append(helper.make_tensor("z", TensorProto.UINT8, [], [zero]))
    nodes = [
        helper.make_node("Gather", ["q", "tokens"], ["rows"], name="embed"),
        helper.make_node("DequantizeLinear", ["rows", "s", *(["z"] if zero else [])], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", COLUMNS])],
        constants,
    )
    made = slotted(helper.make_model(made, opset_imports=DOMAINS, ir_version=10), "embedding")
    (slot,) = made.slots
    base = made.run_original(tokens=TOKENS)[0]
    assert np.array_equal(made.run(tokens=TOKENS)[0], base)
    expected = (table[TOKENS].astype(np.float64) - (zero or 0)) * np.float32(0.02)
    np.testing.assert_allclose(base, expected, rtol=1e-6)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"] for role in ("lora_A", "lora_B"))
    np.testing.assert_allclose(
        made.run(tokens=TOKENS, **tensors)[0], base + a[TOKENS] @ b, atol=1e-5
    )
    assert np.abs(a[TOKENS] @ b).max() > 0.1
