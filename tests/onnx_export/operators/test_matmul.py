"""What the code takes for a MatMul's weight is what ONNX Runtime multiplies with."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from onnx_graphs import only_node, run, single_node

from converters.onnx.operators import find_site

IN, OUT = 7, 5


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float16, 5e-3)])
def test_weight_is_what_the_runtime_multiplies_with(dtype, tolerance):
    random = np.random.default_rng(0)
    weight = random.standard_normal((IN, OUT)).astype(dtype)
    x = random.standard_normal((3, IN)).astype(dtype)
    model = single_node(helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": weight}, IN)
    site = find_site(only_node(model))
    assert (site.in_features, site.out_features, site.quantized) == (IN, OUT, False)
    assert site.dtype.numpy() == dtype
    got = x.astype(np.float64) @ site.weight().astype(np.float64)
    # One rounding of the output and of each partial sum, in the operator's own precision.
    np.testing.assert_allclose(run(model, x=x), got, atol=tolerance, rtol=tolerance)
    control = x.astype(np.float64) @ np.roll(site.weight(), 1, axis=0).astype(np.float64)
    assert np.abs(control - got).max() > 0.1


def test_a_product_of_two_activations_is_no_site():
    x = ir.Value(name="x")
    assert find_site(ir.node("MatMul", [x, ir.Value(name="k")])) is None


def test_a_constant_left_factor_is_no_site():
    constant = ir.Value(name="w", const_value=ir.tensor(np.ones((3, 3), np.float32)))
    weight = ir.Value(name="v", const_value=ir.tensor(np.ones((3, 3), np.float32)))
    assert find_site(ir.node("MatMul", [constant, weight])) is None


@pytest.mark.parametrize("weight", [np.ones((2, 3, 4), np.float32), np.ones((3, 4), np.int32)])
def test_no_matrix_of_floats_is_no_site(weight):
    value = ir.Value(name="w", const_value=ir.tensor(weight))
    assert find_site(ir.node("MatMul", [ir.Value(name="x"), value])) is None


def test_other_operators_are_no_sites():
    assert find_site(ir.node("Relu", [ir.Value(name="x")])) is None
    assert find_site(ir.node("MatMul", [None, None], domain="somebody.else")) is None
