"""Weights of one name that are not one module's: each is changed where it is used."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

from converters.onnx.exporters.storing import sites_of
from converters.onnx.modules.graph_names import name_sites

SIZE = 4
RANDOM = np.random.default_rng(0)


def model_of(nodes, inputs, width, constants=()):
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])
    graph = helper.make_graph(nodes, "g", inputs, [made], list(constants))
    return helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)


X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIZE])


@pytest.mark.parametrize("hidden", [SIZE, SIZE + 1])
def test_a_matrix_and_its_transpose_take_adapters_of_their_own(slotted, adapter, hidden):
    weight = RANDOM.standard_normal((SIZE, hidden)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w.weight"], ["h"], name="encode"),
        helper.make_node("Transpose", ["w.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "turned"], ["y"], name="decode"),
    ]
    made = slotted(model_of(nodes, [X], SIZE, [numpy_helper.from_array(weight, "w.weight")]))
    assert [slot.name for slot in made.slots] == ["w.encode", "w.decode"]
    x = RANDOM.standard_normal((3, SIZE)).astype(np.float32)
    tensors = [adapter(slot, seed=seed) for seed, slot in enumerate(made.slots)]
    first, second = (
        part[slot.input_a].astype(np.float64) @ part[slot.input_b]
        for part, slot in zip(tensors, made.slots, strict=True)
    )
    got = made.run(x=x, **tensors[0], **tensors[1])[0]
    expected = x.astype(np.float64) @ (weight + first) @ (weight.T + second)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(got - made.run_original(x=x)[0]).max() > 0.1


def test_branches_with_weights_of_one_name_take_adapters_of_their_own(slotted, adapter):
    weights = [RANDOM.standard_normal((SIZE, 3)).astype(np.float32) for _ in range(2)]

    def branch(number):
        out = f"y{number}"
        node = helper.make_node("MatMul", ["x", "w.weight"], [out], name=f"product_{number}")
        made = helper.make_tensor_value_info(out, TensorProto.FLOAT, ["n", 3])
        stored = numpy_helper.from_array(weights[number], "w.weight")
        return helper.make_graph([node], f"branch{number}", [], [made], [stored])

    choice = helper.make_tensor_value_info("choice", TensorProto.BOOL, [])
    node = helper.make_node("If", ["choice"], ["y"], then_branch=branch(0), else_branch=branch(1))
    made = slotted(model_of([node], [X, choice], 3))
    assert len(made.slots) == 2
    x = RANDOM.standard_normal((2, SIZE)).astype(np.float32)
    for number, taken in ((0, True), (1, False)):
        (slot,) = (each for each in made.slots if each.name.endswith(f"product_{number}"))
        tensors = adapter(slot)
        change = tensors[slot.input_a].astype(np.float64) @ tensors[slot.input_b]
        got = made.run(x=x, choice=np.array(taken), **tensors)[0]
        np.testing.assert_allclose(got, x @ (weights[number] + change), rtol=1e-5, atol=1e-5)
        other = made.run(x=x, choice=np.array(not taken), **tensors)[0]
        np.testing.assert_array_equal(other, made.run_original(x=x, choice=np.array(not taken))[0])


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("decoder_reconstruction_W", "decoder_reconstruction_W"),
        ("p_constituents", "p_constituents"),
        ("const_fold_opt__12", "linear_0"),
        ("model/dense/Const_2:0", "linear_0"),
        ("_const_3", "linear_0"),
    ],
)
def test_only_constants_are_anonymous(slotted, stored, name):
    weight = numpy_helper.from_array(np.ones((SIZE, 3), np.float32), stored)
    node = helper.make_node("MatMul", ["x", stored], ["y"])
    (slot,) = slotted(model_of([node], [X], 3, [weight])).slots
    assert slot.name == name


def test_many_weights_of_one_name_are_each_read_once():
    model = ir.from_proto(
        model_of(
            [
                helper.make_node("MatMul", ["x", f"onnx::{n}"], [f"y{n}"], name=f"/all/product{n}")
                for n in range(200)
            ]
            + [helper.make_node("Sum", [f"y{n}" for n in range(200)], ["y"])],
            [X],
            SIZE,
            [
                numpy_helper.from_array(np.full((SIZE, SIZE), n % 150, np.float32), f"onnx::{n}")
                for n in range(200)
            ],
        )
    )
    read = []

    def counted(site):
        return replace(site, weight=lambda: read.append(site) or site.weight())

    named = name_sites([counted(site) for site in sites_of(model)])
    assert len(read) == 200
    # Equal weights are one module called twice.
    paths = [entry.path for entry in named]
    assert len(set(paths)) == 150
    assert paths[150:] == paths[:50]
    assert paths[:2] == ["all.product0", "all.product1"]


@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_that_is_called_again_is_not_read(turned):
    """Steps of a recurrent cell and branches of an ``If`` read one constant many times."""
    weight = RANDOM.standard_normal((SIZE, SIZE)).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", [f"h{n}", "cell.weight"], [f"h{n + 1}"], transB=1, name=f"/c/{n}")
        for n in range(8)
    ]
    nodes[0].input[0], nodes[-1].output[0] = "x", "y"
    if turned:  # W and its transpose are two weights
        nodes[4].attribute[0].i = 0
    stored = numpy_helper.from_array(weight, "cell.weight")
    model = ir.from_proto(model_of(nodes, [X], SIZE, [stored]))
    read = []

    def counted(site):
        return replace(site, weight=lambda: read.append(site.node.name) or site.weight())

    paths = [entry.path for entry in name_sites([counted(site) for site in sites_of(model)])]
    assert set(read) == ({"/c/0", "/c/4"} if turned else set())
    others = {path for number, path in enumerate(paths) if number != 4}
    assert len(others) == 1
    assert (paths[4] in others) is not turned
