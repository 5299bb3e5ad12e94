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


AXES = {"b": 3, "s": 4, "i": IN, "o": OUT, "h": 2, "d": 6, "e": 3}


@pytest.mark.parametrize("variants", [("lora", "gain", "bias"), ("lora",)])
@pytest.mark.parametrize(
    ("equation", "features", "outputs"),
    [
        ("bsi,ihd->bshd", "i", "hd"),  # into heads
        ("bsi,hdi->bshd", "i", "hd"),
        ("bshd,hdo->bso", "hd", "o"),  # out of heads
        ("bshd,ohd->bso", "hd", "o"),
        ("bhd,hdoe->boe", "hd", "oe"),
        ("hd,hdo->o", "hd", "o"),
    ],
)
def test_features_and_outputs_of_several_axes(
    slotted, adapter, equation, features, outputs, variants
):
    left, result = equation.split("->")
    random = np.random.default_rng(0)
    x_axes, w_axes = left.split(",")
    weight = random.standard_normal([AXES[axis] for axis in w_axes]).astype(np.float32)
    x = random.standard_normal([AXES[axis] for axis in x_axes]).astype(np.float32)
    names = {"b": "batch", "s": "sequence"}
    shapes = [[names.get(axis, AXES[axis]) for axis in axes] for axes in (x_axes, result)]
    made = slotted(einsum(equation, ["x", "w"], weight, *shapes), *variants)
    (slot,) = made.slots
    sizes = [int(np.prod([AXES[axis] for axis in axes])) for axes in (features, outputs)]
    assert (slot.name, slot.in_features, slot.out_features) == ("layer", *sizes)
    base = np.einsum(equation, x.astype(np.float64), weight.astype(np.float64))
    for run in (made.run, made.run_original):
        np.testing.assert_allclose(run(x=x)[0], base, atol=1e-5)
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    delta = (x.reshape(*x.shape[: x.ndim - len(features)], -1) @ a @ b).reshape(base.shape)
    got = made.run(x=x, **tensors)[0]
    np.testing.assert_allclose(got, base + delta, atol=1e-4)
    assert np.abs(got - base).max() > 0.1
    if "gain" in variants:
        gain = random.uniform(0.5, 1.5, sizes[1]).astype(np.float32)
        shift = random.standard_normal(sizes[1]).astype(np.float32)
        more = {slot.input_gain: gain, slot.input_bias: shift}
        got = made.run(x=x, **more, **tensors)[0]
        ends = [AXES[axis] for axis in outputs]
        true = gain.reshape(ends) * base + delta + shift.reshape(ends)
        np.testing.assert_allclose(got, true, atol=1e-4)


@pytest.mark.parametrize(
    ("equation", "weight_shape", "x_shape", "y_shape"),
    [
        ("...i,ihd->...hd", (IN, 2, OUT), (2, 3, IN), (2, 3, 2, OUT)),  # of how many axes?
        ("bsi,ihd->bhsd", (IN, 2, OUT), (2, 3, IN), (2, 2, 3, OUT)),  # heads before rows
        ("bsi,hid->bshd", (2, IN, OUT), (2, 3, IN), (2, 3, 2, OUT)),  # features in the midst
        ("bshd,hdo->bo", (2, IN, OUT), (2, 3, 2, IN), (2, OUT)),  # rows are summed up
        ("bhd,dho->bo", (IN, 2, OUT), (3, 2, IN), (3, OUT)),  # features in another order
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
