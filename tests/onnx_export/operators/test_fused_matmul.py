"""What the code takes for a FusedMatMul's weight is what ONNX Runtime multiplies with."""

import numpy as np
import pytest
from onnx import helper
from onnx_graphs import only_node, run, single_node

from converters.onnx.operators import find_site

IN, OUT = 7, 5


def fused(weight, **attributes):
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", **attributes)
    return single_node(node, {"w": weight}, IN)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_weight_is_what_the_runtime_multiplies_with(transposed, alpha):
    random = np.random.default_rng(0)
    weight = random.standard_normal((OUT, IN) if transposed else (IN, OUT)).astype(np.float32)
    x = random.standard_normal((3, IN)).astype(np.float32)
    model = fused(weight, transB=transposed, alpha=alpha)
    site = find_site(only_node(model))
    assert (site.in_features, site.out_features) == (IN, OUT)
    assert site.alpha == alpha
    got = alpha * x.astype(np.float64) @ site.weight().astype(np.float64)
    # float32 sums of 7 products of about 1.
    np.testing.assert_allclose(run(model, x=x), got, atol=2e-6, rtol=1e-6)
    assert np.abs(run(model, x=x) - 0.5 * got).max() > 0.1


def test_a_transposed_activation_is_no_site():
    assert find_site(only_node(fused(np.ones((IN, OUT), np.float32), transA=1))) is None
