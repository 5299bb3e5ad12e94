"""Rows of integers that are moved before they are dequantized, as quantizers leave embeddings."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, only_node

from converters.onnx.operators import find_site
from loraport.errors import LoraportError

ROWS, COLUMNS, ZERO = 11, 6, 131
TOKENS = np.array([[0, 3, 10], [7, 7, 1]])
SIZES = ["batch", "length", COLUMNS]


def dequantize(value, to, zero="z", scale="s"):
    return helper.make_node("DequantizeLinear", [value, scale, zero], [to])


def graph(nodes, outputs, kind=TensorProto.UINT8, column_scales=False):
    """``rows`` are what is looked up; ``nodes`` make the outputs of them."""
    values = np.random.default_rng(0).integers(0, 120, (ROWS, COLUMNS))
    scales = [0.02] * (COLUMNS if column_scales else 1)
    constants = [
        helper.make_tensor("q", kind, values.shape, values.ravel()),
        helper.make_tensor("s", TensorProto.FLOAT, [COLUMNS] if column_scales else [], scales),
        helper.make_tensor("z", kind, [COLUMNS] if column_scales else [], [101] * len(scales)),
        helper.make_tensor("other", kind, [], [7]),
        helper.make_tensor("half", TensorProto.FLOAT, [], [0.01]),
        helper.make_tensor("split", TensorProto.INT64, [4], [0, 0, 2, 3]),
        helper.make_tensor("last", TensorProto.INT64, [1], [3]),
    ]
    nodes = [helper.make_node("Gather", ["q", "tokens"], ["rows"], name="embed"), *nodes]
    given = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])]
    made = [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()]
    body = helper.make_graph(nodes, "g", given, made, constants)
    model = helper.make_model(body, opset_imports=DOMAINS, ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
TURN = helper.make_node("Transpose", ["rows"], ["turned"], perm=[1, 0, 2])
MOVED = {
    "transposed": ([TURN, dequantize("turned", "y")], {"y": FLOAT}, lambda r: r.swapaxes(0, 1)),
    "reshaped": (
        [helper.make_node("Reshape", ["rows", "split"], ["parts"]), dequantize("parts", "y")],
        {"y": FLOAT},
        lambda r: r.reshape(*r.shape[:2], 2, 3),
    ),
    "twice": (
        [
            TURN,
            helper.make_node("Unsqueeze", ["turned", "last"], ["wide"]),
            dequantize("wide", "y"),
        ],
        {"y": FLOAT},
        lambda r: r.swapaxes(0, 1)[..., None],
    ),
    "read twice": (
        [
            TURN,
            dequantize("turned", "t"),
            helper.make_node("Relu", ["t"], ["y"]),
            dequantize("rows", "plain"),
            helper.make_node("Shape", ["plain"], ["size"]),
        ],
        {"y": FLOAT, "size": INT64},
        lambda r: np.maximum(r.swapaxes(0, 1), 0),
    ),
}


@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT8])
def test_rows_that_are_moved_first_take_a_slot(slotted, adapter, moved, kind):
    nodes, outputs, move = MOVED[moved]
    model = graph(nodes, outputs, kind)
    made = slotted(model, "embedding")
    (slot,) = made.slots
    assert slot.members[0].module_path == "q"
    base = made.run_original(tokens=TOKENS)
    for mine, other in zip(made.run(tokens=TOKENS), base, strict=True):
        assert np.array_equal(mine, other)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"] for role in ("lora_A", "lora_B"))
    table = onnx.numpy_helper.to_array(model.graph.initializer[0])
    rows = (table[TOKENS].astype(np.float64) - 101) * np.float32(0.02)
    np.testing.assert_allclose(base[0], move(rows), rtol=1e-6)
    got = made.run(tokens=TOKENS, **tensors)
    np.testing.assert_allclose(got[0], move(rows + a[TOKENS] @ b), atol=1e-5)
    assert np.abs(a[TOKENS] @ b).max() > 0.1
    assert all(map(np.array_equal, got[1:], base[1:]))


OTHERS = {
    "as integers too": (
        [
            TURN,
            dequantize("turned", "y"),
            helper.make_node("Cast", ["rows"], ["whole"], to=TensorProto.INT64),
        ],
        {"y": FLOAT, "whole": INT64},
    ),
    "by another zero": (
        [dequantize("rows", "y"), TURN, dequantize("turned", "w", "other")],
        {"y": FLOAT, "w": FLOAT},
    ),
    "by another scale": (
        [dequantize("rows", "y"), TURN, dequantize("turned", "w", scale="half")],
        {"y": FLOAT, "w": FLOAT},
    ),
    "by a zero that depends on what is given": (
        [
            helper.make_node("ReduceMin", ["tokens"], ["least"], keepdims=0),
            helper.make_node("Cast", ["least"], ["floor"], to=TensorProto.UINT8),
            dequantize("rows", "y", "floor"),
        ],
        {"y": FLOAT},
    ),
    "given out": ([dequantize("rows", "y")], {"y": FLOAT, "rows": TensorProto.UINT8}),
}


@pytest.mark.parametrize("read", OTHERS)
def test_rows_that_are_read_otherwise_have_a_reason(slotted, read):
    model = graph(*OTHERS[read])
    assert find_site(only_node(model)) is None
    with pytest.raises(LoraportError, match="embed: Gather: its rows of integers are not only"):
        slotted(model, "embedding")


def test_a_scale_for_each_column_cannot_be_moved(slotted):
    model = graph([TURN, dequantize("turned", "y")], {"y": FLOAT}, column_scales=True)
    with pytest.raises(LoraportError, match="embed: Gather: its rows of integers are not only"):
        slotted(model, "embedding")


def test_rows_that_are_always_the_same_are_not_listed(slotted):
    """They are a constant."""
    model = graph([dequantize("rows", "y")], {"y": FLOAT})
    model.graph.initializer.append(helper.make_tensor("three", INT64, [1], [3]))
    model.graph.node[0].input[1] = "three"
    with pytest.raises(LoraportError) as caught:
        slotted(model, "embedding")
    assert "embed" not in str(caught.value)


def test_numbers_that_are_looked_up_are_no_weights(slotted):
    model = graph(
        [helper.make_node("Cast", ["rows"], ["y"], to=TensorProto.FLOAT)], {"y": FLOAT}, INT64
    )
    with pytest.raises(LoraportError) as caught:
        slotted(model, "embedding")
    assert "embed" not in str(caught.value)


@pytest.mark.parametrize(("axis", "found"), [(0, True), (-2, True), (1, False), (-1, False)])
def test_rows_are_of_the_first_dimension_however_it_is_counted(slotted, adapter, axis, found):
    table = np.random.default_rng(0).standard_normal((ROWS, ROWS)).astype(np.float32)
    node = helper.make_node("Gather", ["table", "tokens"], ["y"], name="embed", axis=axis)
    given = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n"])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    constants = [numpy_helper.from_array(table, "table")]
    body = helper.make_graph([node], "g", [given], [made], constants)
    model = helper.make_model(body, opset_imports=DOMAINS, ir_version=10)
    if not found:
        with pytest.raises(LoraportError, match="can have one, got only Gather"):
            slotted(model, "embedding")
        return
    slotted = slotted(model, "embedding")
    (slot,) = slotted.slots
    tensors = adapter(slot)
    tokens = np.array([0, 3, 10])
    a, b = tensors[slot.input_a].astype(np.float64), tensors[slot.input_b]
    got = slotted.run(tokens=tokens, **tensors)[0]
    np.testing.assert_allclose(got, table[tokens] + a[tokens] @ b, rtol=1e-5, atol=1e-6)
    assert np.abs(got - slotted.run(tokens=tokens)[0]).max() > 0.1


def test_a_table_that_is_cast_and_scaled_takes_an_adapter(slotted, adapter):
    """As tools write it that leave ``DequantizeLinear`` out; so does the product after it."""
    random = np.random.default_rng(0)
    arrays = {
        "q": random.integers(-127, 127, (ROWS, COLUMNS), np.int8),
        "s": random.uniform(0.01, 0.02, (ROWS, 1)).astype(np.float32),
        "w": random.integers(-127, 127, (COLUMNS, 4), np.int8),
        "t": random.uniform(0.01, 0.02, (1, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["q"], ["f"], to=FLOAT),
        helper.make_node("Mul", ["f", "s"], ["table"]),
        helper.make_node("Gather", ["table", "tokens"], ["rows"], name="embed"),
        helper.make_node("Cast", ["w"], ["g"], to=FLOAT),
        helper.make_node("Mul", ["g", "t"], ["weight"]),
        helper.make_node("MatMul", ["rows", "weight"], ["y"], name="product"),
    ]
    given = [helper.make_tensor_value_info("tokens", INT64, ["batch", "length"])]
    made = [helper.make_tensor_value_info("y", FLOAT, ["batch", "length", 4])]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    body = helper.make_graph(nodes, "g", given, made, stored)
    graph = slotted(
        helper.make_model(body, opset_imports=DOMAINS, ir_version=10), "lora", "embedding"
    )
    assert {slot.kind.value for slot in graph.slots} == {"embedding", "linear"}
    assert not graph.unslotted
    weights = {name: array.astype(np.float64) for name, array in arrays.items()}
    table, weight = weights["q"] * weights["s"], weights["w"] * weights["t"]
    plain = table[TOKENS] @ weight
    np.testing.assert_allclose(graph.run(tokens=TOKENS)[0], plain, atol=1e-5)
    tensors = {}
    for number, slot in enumerate(graph.slots):
        own = adapter(slot, seed=number)
        tensors |= own
        a, b = (own[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
        if slot.kind.value == "embedding":
            table = table + a @ b
        else:
            weight = weight + a @ b
    wanted = table[TOKENS] @ weight
    np.testing.assert_allclose(graph.run(tokens=TOKENS, **tensors)[0], wanted, atol=1e-5)
    assert np.abs(wanted - plain).max() > 0.5
