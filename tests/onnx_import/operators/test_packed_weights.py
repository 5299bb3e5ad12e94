"""Weights that the graph itself takes apart or puts together take adapters where they are used."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

SIZE, WIDTH = 4, 3
RANDOM = np.random.default_rng(0)
PARTS = [RANDOM.standard_normal((SIZE, WIDTH)).astype(np.float32) for _ in range(3)]


def model_of(nodes, arrays, width):
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", length])
        for n, length in (("x", SIZE), ("y", width))
    )
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)


def change_of(slot, tensors):
    return tensors[slot.input_a].astype(np.float64) @ tensors[slot.input_b]


def test_each_part_of_a_packed_weight_has_a_slot(slotted, adapter):
    names = [f"/attn/{leaf}/MatMul" for leaf in "qkv"]
    parts = [f"part{number}" for number in range(3)]
    nodes = [
        helper.make_node("Split", ["attn.in_proj_weight", "sizes"], parts, axis=1),
        *(
            helper.make_node("MatMul", ["x", part], [f"y{part}"], name=name)
            for part, name in zip(parts, names, strict=True)
        ),
        helper.make_node("Concat", [f"y{part}" for part in parts], ["y"], axis=1),
    ]
    sizes = np.full(3, WIDTH)
    packed = np.concatenate(PARTS, axis=1)
    made = slotted(
        model_of(nodes, {"attn.in_proj_weight": packed, "sizes": sizes}, packed.shape[1])
    )
    assert [slot.name for slot in made.slots] == ["attn.q", "attn.k", "attn.v"]
    assert not made.unslotted
    x = RANDOM.standard_normal((2, SIZE)).astype(np.float32)
    _, key, value = made.slots
    first, second = adapter(key, seed=1), adapter(value, seed=2)
    changed = [PARTS[0], PARTS[1] + change_of(key, first), PARTS[2] + change_of(value, second)]
    expected = np.concatenate([x.astype(np.float64) @ weight for weight in changed], axis=1)
    got = made.run(x=x, **first, **second)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(got - made.run_original(x=x)[0])[:, WIDTH:].max() > 0.1


def test_weights_that_are_put_together_have_one_slot(slotted, adapter):
    """As onnxoptimizer lets products of one input be one."""
    arrays = {f"val_{number}": part for number, part in enumerate(PARTS)}
    nodes = [
        helper.make_node("Concat", list(arrays), ["_v_7"], axis=1),
        helper.make_node("MatMul", ["x", "_v_7"], ["y"], name="node_MatMul_3"),
    ]
    made = slotted(model_of(nodes, arrays, 3 * WIDTH))
    (slot,) = made.slots
    assert (slot.name, slot.out_features) == ("node_MatMul_3", 3 * WIDTH)
    x = RANDOM.standard_normal((2, SIZE)).astype(np.float32)
    tensors = adapter(slot)
    weight = np.concatenate(PARTS, axis=1) + change_of(slot, tensors)
    got = made.run(x=x, **tensors)[0]
    np.testing.assert_allclose(got, x.astype(np.float64) @ weight, rtol=1e-5, atol=1e-5)
    assert np.abs(got - made.run_original(x=x)[0]).max() > 0.1
