"""``MatMul`` with a matrix that is stored as a batch of one."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

IN, HIDDEN, OUT = 6, 5, 4
RANDOM = np.random.default_rng(0)
FIRST, LAST = (
    RANDOM.standard_normal(shape).astype(np.float32) for shape in ((IN, HIDDEN), (HIDDEN, OUT))
)


def model_of(shape, stored=FIRST[None], told=True):
    """``relu(x first) last``; the shape between them may be unknown."""
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("MatMul", ["same", "w"], ["h"], name="/first/MatMul"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="/last/MatMul"),
    ]
    width = max(len(shape), 3 if stored.ndim == 3 else 2)
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * width),
    ]
    inner = [helper.make_tensor_value_info("same", TensorProto.FLOAT, shape)] if told else []
    constants = [numpy_helper.from_array(stored, "w"), numpy_helper.from_array(LAST, "v")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants, value_info=inner)
    return helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)


def change(slot, tensors):
    return tensors[slot.input_a].astype(np.float64) @ tensors[slot.input_b]


@pytest.mark.parametrize(
    ("shape", "told"),
    [(["b", "s", IN], True), (["b", "s", IN], False), ([2, 3, 4, IN], True), (["s", IN], False)],
)
@pytest.mark.parametrize("variants", [("lora",), ("lora", "gain", "bias")])
def test_a_batch_of_one_matrix_takes_a_slot(slotted, adapter, shape, told, variants):
    made = slotted(model_of(shape, told=told), *variants)
    assert {slot.name: slot.out_features for slot in made.slots} == {"first": HIDDEN, "last": OUT}
    assert not made.unslotted
    size = [length if isinstance(length, int) else 3 for length in shape]
    x = RANDOM.standard_normal(size).astype(np.float32)
    (base,) = made.run(x=x)
    assert np.array_equal(base, made.run_original(x=x)[0])
    first, last = made.slots
    tensors = adapter(first) | adapter(last, seed=6)
    gain, bias = np.ones(HIDDEN), np.zeros(HIDDEN)
    if len(variants) > 1:
        gain, bias = (RANDOM.uniform(0.5, 1.5, HIDDEN).astype(np.float32) for _ in range(2))
        tensors |= {"first.lora_gain": gain, "first.lora_bias": bias}
    hidden = x.astype(np.float64) @ (FIRST * gain.astype(np.float64) + change(first, tensors))
    expected = np.maximum(hidden + bias, 0) @ (LAST + change(last, tensors))
    (got,) = made.run(x=x, **tensors)
    np.testing.assert_allclose(got, expected.reshape(got.shape), rtol=1e-4, atol=1e-4)
    assert got.shape == base.shape
    assert np.abs(got - base).max() > 0.5


def test_each_row_has_its_own_adapter(slotted, adapter):
    made = slotted(model_of(["batch", "s", IN]), "lora", per_row=True)
    first, last = made.slots
    lanes = [adapter(first, seed=seed) | adapter(last, seed=seed + 2) for seed in (5, 6)]
    stacked = {name: np.concatenate([lane[name] for lane in lanes]) for name in lanes[0]}
    x = RANDOM.standard_normal((3, 2, IN)).astype(np.float32)
    (got,) = made.run(x=x, adapter_ids=np.array([1, -1, 0]), **stacked)
    for row, lane in ((0, lanes[1]), (1, None), (2, lanes[0])):
        changes = [0.0 if lane is None else change(slot, lane) for slot in (first, last)]
        hidden = np.maximum(x[row].astype(np.float64) @ (FIRST + changes[0]), 0)
        expected = hidden @ (LAST + changes[1])
        np.testing.assert_allclose(got[row], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(got[0] - made.run(x=x)[0][0]).max() > 0.1


@pytest.mark.parametrize(
    ("shape", "stored"), [(["s", IN], FIRST[None]), (["b", "s", IN], np.stack([FIRST, FIRST]))]
)
def test_what_gives_a_dimension_more_or_is_several_has_none(slotted, shape, stored):
    made = slotted(model_of(shape, stored), "lora")
    assert [slot.name for slot in made.slots] == ["last"]
    why = f"MatMul: its constant of shape {stored.shape} is no matrix of floats"
    assert made.unslotted == {"/first/MatMul": why}
