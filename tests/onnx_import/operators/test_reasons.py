"""What an operator that carries weights and takes no slot is listed with."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

from loraport.errors import LoraportError

WHOLE = numpy_helper.from_array(np.ones((4, 3), np.uint8), "w")


@pytest.mark.parametrize(
    ("node", "weight", "given", "reason"),
    [
        (
            helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="product"),
            WHOLE,
            helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 4]),
            "product: MatMulInteger: its input is not quantized right before it",
        ),
    ],
)
def test_the_reason_says_what_to_change(slotted, node, weight, given, reason):
    made = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    graph = helper.make_graph([node], "g", [given], [made], [weight])
    model = helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)
    with pytest.raises(LoraportError, match=reason):
        slotted(model, "lora", "conv")
