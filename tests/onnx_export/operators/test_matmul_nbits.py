"""A dequantized MatMulNBits weight times x is the node's own output."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnx_graphs import only_node, run, single_node

from converters.onnx.operators import find_site

N = 6
FLOAT32_ACTIVATIONS = 1


def quantized(bits, block, k, zero_points, seed=0):
    """Return a node over random packed bytes: every bit pattern is a valid weight."""
    random = np.random.default_rng(seed)
    blocks = -(-k // block)
    constants = {
        "s": random.uniform(0.1, 1.0, N * blocks).astype(np.float32),
        "q": random.integers(0, 256, (N, blocks, block * bits // 8), np.uint8),
    }
    inputs = ["x", "q", "s"]
    if zero_points == "packed":
        constants["z"] = random.integers(0, 256, N * -(-blocks * bits // 8), np.uint8)
        inputs.append("z")
    elif zero_points == "float":
        constants["z"] = random.uniform(0, 9, (N, blocks)).astype(np.float32)
        inputs.append("z")
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        ["y"],
        domain="com.microsoft",
        K=k,
        N=N,
        bits=bits,
        block_size=block,
        accuracy_level=FLOAT32_ACTIVATIONS,
    )
    return single_node(node, constants, k)


@pytest.mark.parametrize("zero_points", ["", "packed"])
@pytest.mark.parametrize("k", [32, 48, 96, 33, 95])  # whole, half and ragged blocks; odd counts
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32])
def test_weight_is_what_the_runtime_multiplies_with(bits, block, k, zero_points):
    model = quantized(bits, block, k, zero_points)
    site = find_site(only_node(model))
    assert (site.in_features, site.out_features, site.quantized) == (k, N, True)
    weight = site.weight()
    assert weight.shape == (k, N)
    x = np.random.default_rng(1).standard_normal((3, k)).astype(np.float32)
    expected = run(model, x=x)
    got = x.astype(np.float64) @ weight.astype(np.float64)
    # float32 sums; the terms are up to 128 times the scale.
    np.testing.assert_allclose(expected, got, atol=2e-6 * np.abs(weight).max() * k)
    # Control: the neighbouring byte order or another zero point would be seen.
    assert np.abs(x @ np.roll(weight, 1, axis=0) - expected).max() > 0.1


def test_float_zero_points():
    model = quantized(4, 32, 96, "float")
    site = find_site(only_node(model))
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    got = x.astype(np.float64) @ site.weight().astype(np.float64)
    np.testing.assert_allclose(run(model, x=x), got, atol=2e-3)


def test_a_width_that_is_not_understood_is_no_site():
    node = only_node(quantized(4, 32, 32, ""))
    node.attributes["bits"] = ir.AttrInt64("bits", 3)
    assert find_site(node) is None


def test_a_weight_that_is_computed_is_no_site():
    node = only_node(quantized(4, 32, 32, ""))
    node.replace_input_with(1, ir.Value(name="computed"))
    assert find_site(node) is None


def test_reordered_groups_are_no_site():
    node = only_node(quantized(4, 32, 32, "packed"))
    node.resize_inputs(5)
    node.replace_input_with(4, ir.Value(name="g_idx"))
    assert find_site(node) is None


@pytest.mark.parametrize("name", ["N", "K", "block_size"])
@pytest.mark.parametrize("value", [10**12, 0, -64, 20])
def test_sizes_that_the_numbers_do_not_have_make_no_site(name, value):
    node = only_node(quantized(4, 32, 64, "packed"))
    assert find_site(node) is not None
    node.attributes[name] = ir.AttrInt64(name, value)
    assert find_site(node) is None


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("zero_points", ["packed", "float"])
def test_numbers_that_are_missing_make_no_site(number, zero_points):
    model = quantized(4, 32, 64, zero_points)
    stored = {each.name: each for each in model.graph.initializer}
    torn = stored[model.graph.node[0].input[number]]
    short = numpy_helper.from_array(numpy_helper.to_array(torn)[:-1], torn.name)
    torn.CopyFrom(short)
    assert find_site(only_node(model)) is None
