"""What the code takes for a Gemm's weight is what ONNX Runtime multiplies with."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from onnx_graphs import only_node, run, single_node

from converters.onnx.operators import find_site

IN, OUT = 7, 5


def gemm(inputs, constants, **attributes):
    return single_node(helper.make_node("Gemm", inputs, ["y"], **attributes), constants, IN)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [None, 1.0, 3.0])
def test_weight_is_what_the_runtime_multiplies_with(transposed, alpha, beta):
    random = np.random.default_rng(0)
    weight = random.standard_normal((OUT, IN) if transposed else (IN, OUT)).astype(np.float32)
    bias = random.standard_normal(OUT).astype(np.float32)
    x = random.standard_normal((3, IN)).astype(np.float32)
    constants = {"w": weight} | ({} if beta is None else {"c": bias})
    attributes = {"transB": transposed, "alpha": alpha} | ({} if beta is None else {"beta": beta})
    model = gemm(["x", *constants], constants, **attributes)
    site = find_site(only_node(model))
    assert (site.in_features, site.out_features) == (IN, OUT)
    assert site.alpha == alpha
    got = alpha * x.astype(np.float64) @ site.weight().astype(np.float64)
    if beta is not None:
        got = got + beta * bias.astype(np.float64)
    # float32 sums of 7 products of about 1.
    np.testing.assert_allclose(run(model, x=x), got, atol=2e-6, rtol=1e-6)
    control = got - 0.3 * x.astype(np.float64) @ site.weight().astype(np.float64)
    assert np.abs(control - got).max() > 0.1


def test_a_transposed_activation_is_no_site():
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((3, 4), np.float32)))
    attributes = {"transA": 1}
    assert find_site(ir.node("Gemm", [ir.Value(name="x"), weight], attributes)) is None


def test_a_weight_that_is_computed_is_no_site():
    assert find_site(ir.node("Gemm", [ir.Value(name="x"), ir.Value(name="w")])) is None


def test_integers_are_no_site():
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((3, 4), np.int32)))
    assert find_site(ir.node("Gemm", [ir.Value(name="x"), weight])) is None
