"""Einsum with a constant matrix takes an adapter; other equations say why they have none."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from loraport.errors import LoraportError

IN, OUT = 7, 5
OPSETS = [helper.make_opsetid("", 18)]


def einsum(equation, inputs, weight, x_shape, y_shape):
    graph = helper.make_graph(
        [helper.make_node("Einsum", inputs, ["y"], name="/layer/Einsum", equation=equation)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


@pytest.mark.parametrize(
    ("equation", "inputs", "transposed", "leading"),
    [
        ("bsi,io->bso", ["x", "w"], False, 2),
        ("bi,oi->bo", ["x", "w"], True, 1),
        ("... i, io -> ... o", ["x", "w"], False, 3),
        ("oi,...i->...o", ["w", "x"], True, 2),
        ("i,io->o", ["x", "w"], False, 0),
    ],
)
def test_it_takes_an_adapter(slotted, adapter, equation, inputs, transposed, leading):
    random = np.random.default_rng(0)
    weight = random.standard_normal((IN, OUT)).astype(np.float32)
    rows = ["batch", "sequence", 2][:leading]
    stored = weight.T.copy() if transposed else weight
    made = slotted(einsum(equation, inputs, stored, [*rows, IN], [*rows, OUT]), "lora", "gain")
    (slot,) = made.slots
    assert (slot.name, slot.in_features, slot.out_features) == ("layer", IN, OUT)
    x = random.standard_normal((*(3, 4, 2)[:leading], IN)).astype(np.float32)
    base = x.astype(np.float64) @ weight
    np.testing.assert_array_equal(made.run(x=x)[0], made.run_original(x=x)[0])
    np.testing.assert_allclose(made.run(x=x)[0], base, atol=1e-5)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    gain = random.uniform(0.5, 1.5, OUT).astype(np.float32)
    got = made.run(x=x, **{slot.input_gain: gain}, **tensors)[0]
    np.testing.assert_allclose(got, gain * base + x @ a @ b, atol=1e-5)
    assert np.abs(got - base).max() > 0.1


@pytest.mark.parametrize(
    ("equation", "weight_shape", "x_shape", "y_shape"),
    [
        ("bsi,ihd->bshd", (IN, 2, OUT), (2, 3, IN), (2, 3, 2, OUT)),  # a head for each
        ("bsi,io->bos", (IN, OUT), (2, 3, IN), (2, OUT, 3)),  # turned
        ("bis,io->bso", (IN, OUT), (2, IN, 3), (2, 3, OUT)),  # features are not last
        ("bi,ib->b", (IN, 2), (2, IN), (2,)),  # a product for each row
        ("bi,io->b", (IN, OUT), (2, IN), (2,)),  # summed up
        ("bi,io", (IN, OUT), (2, IN), (2, OUT)),  # the result is not said
    ],
)
def test_another_equation_has_a_reason(slotted, equation, weight_shape, x_shape, y_shape):
    weight = np.ones(weight_shape, np.float32)
    with pytest.raises(LoraportError, match="/layer/Einsum: Einsum: its equation is more than"):
        slotted(einsum(equation, ["x", "w"], weight, x_shape, y_shape), "lora")
