"""Graphs of opsets 7 and 8, whose ``Constant`` gives floats only."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn.functional import conv2d


@pytest.mark.parametrize("opset", [7, 8, 9])
@pytest.mark.parametrize("strength", [False, True])
def test_a_convolution_takes_gain_and_bias(slotted, adapter, opset, strength):
    random = np.random.default_rng(0)
    kernel, bias = (random.standard_normal(s).astype(np.float32) for s in ((5, 3, 3, 3), (5,)))
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="/conv/Conv", pads=[1, 1, 1, 1])
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, 4, 6])
        for name, channels in (("x", 3), ("y", 5))
    ]
    constants = [numpy_helper.from_array(kernel, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=4)
    made = slotted(model, "conv", "gain", "bias", strength=strength)
    x = random.standard_normal((2, 3, 4, 6)).astype(np.float32)
    # A gain is of the product, so the operator's bias is added after it, not in it.
    np.testing.assert_allclose(made.run(x=x)[0], made.run_original(x=x)[0], rtol=1e-5, atol=1e-5)
    given = adapter(made.slots[0])
    gain, added = (random.standard_normal(5).astype(np.float32) for _ in range(2))
    fed = given | {"conv.lora_gain": gain, "conv.lora_bias": added}
    a, b = (torch.from_numpy(given[f"conv.lora_{role}"]).double() for role in "AB")
    wide = torch.from_numpy(x).double()
    product = conv2d(wide, torch.from_numpy(kernel).double(), padding=1).numpy()
    change = conv2d(conv2d(wide, a, padding=1), b).numpy()

    def over(vector):
        return vector.astype(np.float64)[:, None, None]

    expected = over(gain) * product + change + over(added) + over(bias)
    got = made.run(x=x, **fed)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - (product + over(bias))).max() > 1
