"""``MatMulBnb4``: bitsandbytes' 4-bit floats, as ONNX Runtime's quantizer and Olive store them."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, only_node, run, single_node

from converters.onnx.exporters.storing import stored_precision
from converters.onnx.operators import find_site

FP4, NF4 = 0, 1
N = 6


def quantized(kind, block, k, seed=0):
    """Return a node over random codes: every one is a valid weight."""
    random = np.random.default_rng(seed)
    scales = random.uniform(0.1, 1.0, -(-N * k // block)).astype(np.float32)
    codes = random.integers(0, 256, -(-N * k // 2), np.uint8)
    node = helper.make_node(
        "MatMulBnb4",
        ["x", "q", "s"],
        ["y"],
        name="/block/up/MatMul_Bnb4",
        domain="com.microsoft",
        K=k,
        N=N,
        block_size=block,
        quant_type=kind,
    )
    return single_node(node, {"s": scales, "q": codes}, k)


@pytest.mark.parametrize("kind", [FP4, NF4])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("k", [64, 40])  # blocks of whole rows, and those that two rows share
def test_weight_is_what_the_runtime_multiplies_with(kind, block, k):
    model = quantized(kind, block, k)
    site = find_site(only_node(model))
    assert (site.in_features, site.out_features, site.quantized) == (k, N, True)
    weight = site.weight()
    assert weight.shape == (k, N)
    assert stored_precision([site]) == "int4"
    x = np.random.default_rng(1).standard_normal((3, k)).astype(np.float32)
    expected = run(model, x=x)
    got = x.astype(np.float64) @ weight.astype(np.float64)
    np.testing.assert_allclose(expected, got, rtol=0, atol=2e-6 * k)  # float32 sums of |w| <= 1
    # Control: halves of a byte that are exchanged would be seen.
    exchanged = weight.reshape(k // 2, 2, N)[:, ::-1].reshape(k, N)
    assert np.abs(x @ exchanged - expected).max() > 0.1


@pytest.mark.parametrize("change", ["transB", "quant_type", "computed"])
def test_what_is_stored_otherwise_is_no_site(change):
    node = only_node(quantized(NF4, 32, 64))
    if change == "computed":
        node.replace_input_with(1, ir.Value(name="computed"))
    else:
        node.attributes[change] = ir.AttrInt64(change, {"transB": 0, "quant_type": 2}[change])
    assert find_site(node) is None


@pytest.mark.parametrize(
    ("name", "value"), [("N", N + 1), ("N", 10**12), ("N", 0), ("K", -64), ("block_size", 0)]
)
def test_sizes_that_the_numbers_do_not_have_make_no_site(name, value):
    node = only_node(quantized(NF4, 32, 64))
    assert find_site(node) is not None
    node.attributes[name] = ir.AttrInt64(name, value)
    assert find_site(node) is None


def test_an_adapter_adds_its_product(slotted, adapter):
    made = slotted(quantized(NF4, 32, 64))
    [slot] = made.slots
    assert (slot.name, slot.in_features, slot.out_features) == ("block.up", 64, N)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    lora = adapter(slot)
    a, b = (lora[f"block.up.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    [base] = made.run_original(x=x)
    [same], [adapted] = made.run(x=x), made.run(x=x, **lora)
    np.testing.assert_array_equal(same, base)
    np.testing.assert_allclose(adapted, base + x @ a @ b, rtol=0, atol=1e-4)  # values up to 50
    assert np.abs(adapted - base).max() > 0.1


def test_the_weight_names_the_module_where_its_node_has_none(slotted):
    """As ONNX Runtime's ``MatMulBnb4Quantizer`` writes it."""
    model = quantized(NF4, 32, 64)
    node = model.graph.node[0]
    node.name, node.input[1], node.input[2] = "", "block.up.weight_Bnb4", "block.up.weight_absmax"
    model.graph.initializer[0].name, model.graph.initializer[1].name = node.input[2], node.input[1]
    assert [slot.name for slot in slotted(model).slots] == ["block.up"]


@pytest.mark.parametrize("operator", ["MatMulBnb4", "MatMulFpQ4"])
def test_packed_weights_without_a_slot_are_listed(slotted, operator):
    """They are vectors: beside an operator with a slot they were not mentioned at all."""
    packed = np.zeros(16, np.uint8)
    inputs = ["a", "q", "s" if operator == "MatMulBnb4" else "shape"]
    attributes = {"K": 4, "N": 8, "block_size": 16, "transB": 0, "quant_type": 1}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/router/MatMul"),
        helper.make_node(
            operator, inputs, ["y"], name="/up/MatMul", domain="com.microsoft", **attributes
        ),
    ]
    constants = {
        "w": np.ones((4, 4), np.float32),
        "q": packed,
        "s": np.ones(2, np.float32),
        "shape": np.array([4, 8]),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    made = slotted(helper.make_model(graph, opset_imports=DOMAINS, ir_version=10))
    assert [slot.name for slot in made.slots] == ["router"]
    assert made.unslotted["/up/MatMul"].startswith(f"com.microsoft.{operator}: ")
