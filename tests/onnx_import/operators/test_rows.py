"""``--per-row`` on graphs: rows are the batch's, or the module has no slot and a reason."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

from converters.onnx.exporters import quantizing
from converters.onnx.operators import find_site
from loraport.errors import LoraportError

IN, OUT = 6, 5
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((IN, OUT)).astype(np.float32)
SQUARE = RANDOM.standard_normal((IN, IN)).astype(np.float32)
UNKNOWN = "its input is not known to have the batch first"


def graph(nodes, inputs, constants, rank):
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    whole = helper.make_graph(nodes, "g", given, [made], tensors)
    return helper.make_model(whole, opset_imports=DOMAINS, ir_version=10)


def product(x, y, name="fc"):
    return helper.make_node("MatMul", [x, f"{name}.weight"], [y], name=f"/{name}/{y}")


def weight_of(model, number):
    """Return what a node multiplies with, in float64."""
    return find_site(ir.from_proto(model).graph[number]).weight().astype(np.float64)


@pytest.mark.parametrize("shape", [[3, 3, IN], [None, None, IN]])
def test_a_batch_that_was_moved_is_no_batch(slotted, shape):
    turn = helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2])
    model = graph([turn, product("t", "y")], {"x": shape}, {"fc.weight": WEIGHT}, 3)
    with pytest.raises(LoraportError, match=UNKNOWN):
        slotted(model, "lora", per_row=True)
    straight = graph([product("x", "y")], {"x": ["batch", 3, IN]}, {"fc.weight": WEIGHT}, 3)
    assert [slot.name for slot in slotted(straight, "lora", per_row=True).slots] == ["fc"]


def test_what_all_rows_share_has_no_slot(slotted):
    """Another input that begins with 1 makes no batch of what else does."""
    nodes = [
        helper.make_node("Mul", ["query", "temperature"], ["q1"]),
        product("q1", "q", "q"),
        product("x", "k", "k"),
        helper.make_node("Add", ["k", "q"], ["y"]),
    ]
    inputs = {"x": ["batch", IN], "temperature": [1]}
    constants = {"q.weight": WEIGHT, "k.weight": WEIGHT + 1, "query": SQUARE[:1]}
    made = slotted(graph(nodes, inputs, constants, 2), "lora", per_row=True)
    assert [slot.name for slot in made.slots] == ["k"]
    assert made.unslotted["q"].startswith(UNKNOWN)


def test_a_module_called_twice_acts_in_both_places(slotted, adapter):
    """The shape between them is inferred."""
    nodes = [product("x", "h"), helper.make_node("Relu", ["h"], ["r"]), product("r", "y")]
    model = graph(nodes, {"x": ["batch", IN]}, {"fc.weight": SQUARE}, 2)
    made = slotted(model, "lora", per_row=True)
    (slot,) = made.slots
    x = RANDOM.standard_normal((3, IN)).astype(np.float32)
    lanes = [adapter(slot, seed=seed) for seed in (5, 6)]
    stacked = {name: np.concatenate([lane[name] for lane in lanes]) for name in lanes[0]}
    got = made.run(x=x, adapter_ids=np.array([1, -1, 0]), **stacked)[0]
    for row, lane in ((0, lanes[1]), (1, None), (2, lanes[0])):
        whole = SQUARE.astype(np.float64)
        if lane is not None:
            whole = whole + lane[slot.input_a].astype(np.float64) @ lane[slot.input_b]
        expected = np.maximum(x[row] @ whole, 0) @ whole
        np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=1e-5)
    assert np.abs(got[0] - made.run(x=x)[0][0]).max() > 0.1


def test_a_module_whose_second_call_cannot_tell_rows_has_no_slot(slotted):
    turn = helper.make_node("Transpose", ["h"], ["t"], perm=[1, 0, 2])
    nodes = [product("x", "h"), turn, product("t", "u"), product("x", "v", "other")]
    nodes.append(helper.make_node("Concat", ["u", "v"], ["y"], axis=2))
    constants = {"fc.weight": SQUARE, "other.weight": SQUARE + 1}
    made = slotted(graph(nodes, {"x": ["n", 3, IN]}, constants, 3), "lora", per_row=True)
    assert [slot.name for slot in made.slots] == ["other"]
    assert made.unslotted["fc"].startswith(UNKNOWN)


def test_rows_of_another_input_are_no_rows_of_the_batch(slotted):
    """Nodes and edges of a graph: ``adapter_ids`` has one length."""
    nodes = [product("x", "y"), product("e", "z", "edge")]
    constants = {"fc.weight": WEIGHT, "edge.weight": WEIGHT + 1}
    for inputs, first in (
        ({"x": ["nodes", IN], "e": ["edges", IN]}, "fc"),
        ({"e": ["edges", IN], "x": ["batch_of_nodes", IN]}, "fc"),
        ({"e": ["batch_of_edges", IN], "x": ["nodes", IN]}, "edge"),
    ):
        model = graph(nodes, inputs, constants, 2)
        model.graph.output.append(
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, OUT])
        )
        made = slotted(model, "lora", per_row=True)
        assert [slot.name for slot in made.slots] == [first]
        (reason,) = made.unslotted.values()
        assert "rows" in reason
    both = graph(nodes, {"x": ["n", IN], "e": ["n", IN]}, constants, 2)
    both.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, OUT]))
    assert len(slotted(both, "lora", per_row=True).slots) == 2


def test_a_name_of_two_dimensions_is_no_batch(slotted):
    model = graph([product("x", "y")], {"x": ["n", "n", IN]}, {"fc.weight": WEIGHT}, 3)
    with pytest.raises(LoraportError, match=UNKNOWN):
        slotted(model, "lora", per_row=True)


@pytest.mark.parametrize("opset", [9, 21])
def test_strengths_of_rows_in_old_opsets(slotted, adapter, opset):
    model = graph([product("x", "y")], {"x": ["batch", IN]}, {"fc.weight": WEIGHT}, 2)
    model.opset_import[0].version = opset
    made = slotted(model, "lora", per_row=True, strength=True)
    (slot,) = made.slots
    x = RANDOM.standard_normal((4, IN)).astype(np.float32)
    lanes = [adapter(slot, seed=seed) for seed in (5, 6)]
    stacked = {name: np.concatenate([lane[name] for lane in lanes]) for name in lanes[0]}
    ids = np.array([1, -1, 0, 1])
    for strengths in ([0.5], [0.25, 2.0]):
        given = {"lora_strength": np.array(strengths, np.float32), "adapter_ids": ids}
        got = made.run(x=x, **given, **stacked)[0]
        for row, lane in enumerate(ids):
            whole = WEIGHT.astype(np.float64)
            if lane >= 0:
                change = lanes[lane][slot.input_a].astype(np.float64) @ lanes[lane][slot.input_b]
                whole = whole + strengths[lane % len(strengths)] * change
            np.testing.assert_allclose(got[row], x[row] @ whole, rtol=1e-5, atol=1e-5)
        assert np.abs(got - made.run(x=x)[0]).max() > 0.1


@pytest.mark.parametrize("ends", ["y", "s"])
def test_a_sequence_between_modules_stays_one(slotted, adapter, ends):
    """onnx-ir notes the type of its elements for it, and ONNX Runtime refused the graph."""
    nodes = [
        product("x", "h"),
        helper.make_node("SequenceConstruct", ["h", "x"], ["s"]),
        helper.make_node("SequenceAt", ["s", "first"], ["t"]),
        product("t", "y", "other"),
    ]
    constants = {"fc.weight": SQUARE, "other.weight": SQUARE + 1, "first": np.array(0)}
    model = graph(nodes, {"x": ["batch", IN]}, constants, 2)
    if ends == "s":
        sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["batch", IN])
        model.graph.output.append(sequence)
    made = slotted(model, "lora", per_row=True)
    assert [slot.name for slot in made.slots] == ["fc", "other"]
    x = RANDOM.standard_normal((3, IN)).astype(np.float32)
    lanes = {}
    for slot in made.slots:
        lanes |= adapter(slot, size=0.5)
    got = made.run(x=x, adapter_ids=np.array([0, -1, 0]), **lanes)
    weights = [SQUARE.astype(np.float64), SQUARE.astype(np.float64) + 1]
    base = x @ weights[0] @ weights[1]
    for slot, weight in zip(made.slots, weights, strict=True):
        weight += lanes[slot.input_a].astype(np.float64) @ lanes[slot.input_b]
    changed = x @ weights[0] @ weights[1]
    for row, expected in enumerate([changed, base, changed]):
        np.testing.assert_allclose(got[0][row], expected[row], rtol=1e-5, atol=1e-4)
    assert np.abs(changed - base).max() > 1
    if ends == "s":
        np.testing.assert_allclose(got[1][0][0], x[0] @ weights[0], rtol=1e-5, atol=1e-5)


def test_rows_are_told_behind_weights_that_are_stored_in_4_bits(slotted, adapter, tmp_path):
    """Nothing infers shapes behind MatMulNBits; they are noted before."""
    nodes = [product("x", "h"), helper.make_node("Relu", ["h"], ["r"]), product("r", "y", "other")]
    constants = {"fc.weight": SQUARE, "other.weight": SQUARE + 1}
    onnx.save(graph(nodes, {"x": ["batch", 4, IN]}, constants, 3), tmp_path / "m.onnx")
    quantizing._QUANTIZERS["int4"](tmp_path / "m.onnx", tmp_path / "int4.onnx")
    model = onnx.load(tmp_path / "int4.onnx")
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits", "Relu", "MatMulNBits"]
    made = slotted(model, "lora", per_row=True)
    assert [slot.name for slot in made.slots] == ["fc", "other"]
    last = made.slots[1]
    x = RANDOM.standard_normal((3, 4, IN)).astype(np.float32)
    hidden = np.maximum(x @ weight_of(model, 0), 0)
    base = hidden @ weight_of(model, 2)
    zeros = {name: 0 * array for name, array in adapter(made.slots[0]).items()}
    tensors = adapter(last)
    got = made.run(x=x, adapter_ids=np.array([0, -1, 0]), **zeros, **tensors)[0]
    change = hidden @ tensors[last.input_a].astype(np.float64) @ tensors[last.input_b]
    plain = made.run(x=x)[0]
    # Activations are rounded to 8 bits in every product.
    np.testing.assert_allclose(plain, base, atol=0.03 * np.abs(base).max())
    for row in (0, 2):
        bound = 0.03 * np.abs(change[row]).max()
        np.testing.assert_allclose(got[row] - plain[row], change[row], atol=bound)
        assert bound > 0.01
    np.testing.assert_array_equal(got[1], plain[1])


@pytest.mark.parametrize("between", ["Relu", "FastGelu", "SkipLayerNormalization"])
def test_rows_are_told_behind_products_that_were_in_4_bits_before(slotted, adapter, between):
    """Whose graph notes no shapes inside, as TorchScript's exporter leaves it."""
    own = {"name": "/fc/MatMulNBits", "domain": "com.microsoft", "bits": 4, "block_size": 16}
    own |= {"K": 16, "N": 16, "accuracy_level": 1}
    domain = "" if between == "Relu" else "com.microsoft"
    given = ["h", "x", "ones"] if between == "SkipLayerNormalization" else ["h"]
    nodes = [
        helper.make_node("MatMulNBits", ["x", "fc.weight", "fc.scales"], ["h"], **own),
        helper.make_node(between, given, ["r"], domain=domain),
        helper.make_node("Reshape", ["r", "heads"], ["split"]),
        helper.make_node("Reshape", ["split", "whole"], ["joined"]),
        product("joined", "y", "other"),
    ]
    random = np.random.default_rng(0)
    constants = {
        "fc.weight": random.integers(0, 256, (16, 1, 8), np.uint8),
        "fc.scales": np.full(16, 0.1, np.float32),
        "ones": np.ones(16, np.float32),
        "heads": np.array([0, 0, 4, 4]),
        "whole": np.array([0, 0, 16]),
        "other.weight": random.standard_normal((16, OUT)).astype(np.float32),
    }
    made = slotted(graph(nodes, {"x": ["batch", 3, 16]}, constants, 3), "lora", per_row=True)
    assert [slot.name for slot in made.slots] == ["fc", "other"]
    assert not made.unslotted
    x = random.standard_normal((3, 3, 16)).astype(np.float32)
    lanes = adapter(made.slots[0]) | adapter(made.slots[1], seed=6)
    plain = made.run_original(x=x)[0]
    got = made.run(x=x, adapter_ids=np.array([0, -1, 0]), **lanes)[0]
    np.testing.assert_allclose(got[1], plain[1], atol=1e-5)
    alone = slotted(made.original, "lora").run(x=x, **lanes)[0]
    np.testing.assert_allclose(got[[0, 2]], alone[[0, 2]], atol=1e-4)
    assert np.abs(got[0] - plain[0]).max() > 1


@pytest.mark.parametrize("between", ["QLinearAdd", "QLinearMul", "QLinearSigmoid"])
def test_rows_are_told_behind_operators_of_integers(slotted, adapter, between):
    """As ONNX Runtime's static quantizer leaves them: it notes no shapes of integers."""
    microsoft = {"domain": "com.microsoft"}
    quantized = ["scale", "zero"]
    two = ["x.q", *quantized] if between != "QLinearSigmoid" else []
    weight = ["weight", "scale", "weight.zero"]
    last = {"name": "/other/QGemm", "transB": 1, **microsoft}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *quantized], ["x.q"]),
        helper.make_node(
            *("QGemm", ["x.q", *quantized, *weight, "", *quantized], ["h"], "/fc/QGemm"),
            **microsoft,
        ),
        helper.make_node(between, ["h", *quantized, *two, *quantized], ["r"], **microsoft),
        helper.make_node("QGemm", ["r", *quantized, *weight, "", *quantized], ["y.q"], **last),
        helper.make_node("DequantizeLinear", ["y.q", *quantized], ["y"]),
    ]
    random = np.random.default_rng(0)
    constants = {
        "scale": np.float32(0.05),
        "zero": np.uint8(128),
        "weight": random.integers(-20, 20, (IN, IN), np.int8),
        "weight.zero": np.int8(0),
    }
    made = slotted(graph(nodes, {"x": ["batch", IN]}, constants, 2), "lora", per_row=True)
    assert [slot.name for slot in made.slots] == ["fc", "other"]
    assert not made.unslotted
    x = random.standard_normal((3, IN)).astype(np.float32)
    lanes = adapter(made.slots[0]) | adapter(made.slots[1], seed=6)
    plain = made.run_original(x=x)[0]
    got = made.run(x=x, adapter_ids=np.array([0, -1, 0]), **lanes)[0]
    np.testing.assert_allclose(got[1], plain[1], atol=1e-6)
    alone = slotted(made.original, "lora").run(x=x, **lanes)[0]
    np.testing.assert_allclose(got[[0, 2]], alone[[0, 2]], atol=1e-5)
    assert np.abs(got[0] - plain[0]).max() > 0.5
