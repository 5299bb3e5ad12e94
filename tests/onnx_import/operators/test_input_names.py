"""Graphs in which something is called like an input that slots add."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, run

from loraport.errors import LoraportError

SIZE = 4
RANDOM = np.random.default_rng(0)
FC, UP = (RANDOM.standard_normal((SIZE, SIZE)).astype(np.float32) for _ in range(2))
ADDED = np.float32([1, 2, 3, 4])
NAMES = ["fc.lora_A", "up.lora_B", "lora_strength"]


def info(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", SIZE])


def model_of(*, x="x", inner="h", branch="a", stored="s", output="y", constant="c"):
    """``(x fc + added) up``, the sum in a branch, with names for everything."""
    added = helper.make_graph(
        [helper.make_node("Add", [inner, stored], [branch])],
        "added",
        [],
        [info(branch)],
        [numpy_helper.from_array(ADDED, stored)],
    )
    same = helper.make_graph([helper.make_node("Neg", [inner], ["n"])], "same", [], [info("n")])
    nodes = [
        helper.make_node("MatMul", [x, "fc.weight"], [inner], name="/fc/MatMul"),
        helper.make_node("If", ["yes"], ["i"], then_branch=added, else_branch=same),
        helper.make_node("Add", ["i", constant], ["b"]),
        helper.make_node("MatMul", ["b", "up.weight"], [output], name="/up/MatMul"),
    ]
    arrays = {"fc.weight": FC, "up.weight": UP, "yes": np.array(True), constant: ADDED}
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [info(x)], [info(output)], stored)
    return helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["inner", "branch", "stored"])
def test_what_is_inside_gets_another_name(slotted, adapter, place, name):
    model = model_of(**{place: name})
    x = RANDOM.standard_normal((3, SIZE)).astype(np.float32)
    original = run(model, x=x)
    made = slotted(model, "lora", strength=True)
    assert {slot.name for slot in made.slots} == {"fc", "up"}
    (base,) = made.run(x=x)
    assert np.array_equal(base, original)
    tensors, changes = {}, {}
    for seed, slot in enumerate(made.slots):
        tensors |= adapter(slot, seed=seed, size=1.0)
        a, b = tensors[slot.input_a].astype(np.float64), tensors[slot.input_b]
        changes[slot.name] = 0.5 * a @ b
    expected = (x @ (FC + changes["fc"]) + 2 * ADDED) @ (UP + changes["up"])
    (got,) = made.run(x=x, lora_strength=np.float32([0.5]), **tensors)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(got - base).max() > 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("place", "what"), [("x", "an input"), ("output", "an output"), ("constant", "a constant")]
)
def test_what_users_know_by_the_name_is_refused(slotted, place, what, name):
    text = f"{name}: expected a graph without {what} of this name, got one with; .*rename it"
    with pytest.raises(LoraportError, match=text):
        slotted(model_of(**{place: name}), "lora", strength=True)
