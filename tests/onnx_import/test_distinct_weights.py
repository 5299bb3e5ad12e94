"""Graphs that ONNX Runtime's converter to halves does not take as they are."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.onnx.exporters.distinct_weights import make_weights_distinct
from converters.onnx.importing import ImportOptions, import_model
from loraport.errors import LoraportError
from loraport.runtime import Runtime

FLOAT = TensorProto.FLOAT
RANDOM = np.random.default_rng(0)
W, THEN, ELSE = (RANDOM.standard_normal((8, 5)).astype(np.float32) for _ in range(3))
X = RANDOM.standard_normal((3, 8)).astype(np.float32)
HALVES = ImportOptions(precision="fp16")
TOLERANCE = 0.03  # of 8 products of about 1, each rounded to 11 bits


def tensor(name, *shape):
    return helper.make_tensor_value_info(name, FLOAT, shape)


def optional(name, *shape):
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, shape))
    return helper.make_value_info(name, kind)


def layer(y="y", weight="fc.weight"):
    return helper.make_node("MatMul", ["x", weight], [y])


def saved(folder, nodes, inputs, outputs):
    weights = [numpy_helper.from_array(W, "fc.weight")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def branch(name, weight):
    """``x W`` with a stored value called ``w``, which a branch within reads too."""
    stored, result = [numpy_helper.from_array(weight, "w")], tensor(name, "n", 5)
    inner = f"{name}_inner"
    inside = helper.make_graph([layer(inner, "w")], inner, [], [tensor(inner, "n", 5)])
    same = helper.make_graph(
        [helper.make_node("Identity", ["w"], [f"{name}_w"]), layer(f"{name}_same", f"{name}_w")],
        f"{name}_same",
        [],
        [tensor(f"{name}_same", "n", 5)],
    )
    node = helper.make_node("If", ["c"], [name], then_branch=inside, else_branch=same)
    return helper.make_graph([node], name, [], [result], stored)


@pytest.fixture
def branches(tmp_path):
    node = helper.make_node(
        "If", ["c"], ["z"], then_branch=branch("a", THEN), else_branch=branch("b", ELSE)
    )
    nodes = [node, layer("y0"), helper.make_node("Add", ["z", "y0"], ["y"])]
    flag = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    return saved(tmp_path, nodes, [tensor("x", "n", 8), flag], [tensor("y", "n", 5)])


def test_branches_whose_weights_share_a_name(branches, tmp_path):
    import_model(branches, tmp_path / "out", HALVES)
    runtime = Runtime(tmp_path / "out")
    for flag, weight, other in ((True, THEN, ELSE), (False, ELSE, THEN)):
        got = runtime.run({"x": X, "c": np.array(flag)})["y"]
        np.testing.assert_allclose(got, X.astype(np.float64) @ (W + weight), atol=TOLERANCE)
        assert np.abs(got - X @ (W + other)).max() > 10 * TOLERANCE


def test_every_stored_value_has_a_name_of_its_own(branches):
    model = onnx.load(branches)
    make_weights_distinct(model)
    onnx.checker.check_model(model, full_check=True)
    found = [each.g.initializer[0].name for each in model.graph.node[0].attribute]
    assert sorted(found) == ["w", "w_1"]


def test_a_branch_that_gives_what_it_stores(branches):
    model = onnx.load(branches)
    for attribute in model.graph.node[0].attribute:
        del attribute.g.node[:]
        attribute.g.output[0].CopyFrom(tensor("w", 8, 5))
    make_weights_distinct(model)
    found = [each.g for each in model.graph.node[0].attribute]
    assert [each.output[0].name for each in found] == [each.initializer[0].name for each in found]
    assert sorted(each.output[0].name for each in found) == ["w", "w_1"]


def test_a_weight_that_is_an_output_is_refused_for_that(tmp_path):
    outputs = [tensor("y", "n", 5), tensor("fc.weight", 8, 5)]
    file = saved(tmp_path, [layer()], [tensor("x", "n", 8)], outputs)
    with pytest.raises(LoraportError, match=r"got stored values: fc\.weight, .*take them off"):
        import_model(file, tmp_path / "out", HALVES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [True, False])
def test_optional_inputs_and_outputs_are_refused_for_that(given, tmp_path):
    if given:
        nodes = [helper.make_node("OptionalGetElement", ["maybe"], ["x"]), layer()]
        file = saved(tmp_path, nodes, [optional("maybe", "n", 8)], [tensor("y", "n", 5)])
    else:
        nodes = [layer(), helper.make_node("Optional", ["y"], ["maybe"])]
        results = [tensor("y", "n", 5), optional("maybe", "n", 5)]
        file = saved(tmp_path, nodes, [tensor("x", "n", 8)], results)
    with pytest.raises(LoraportError, match=r"expected tensors, got optional ones: maybe, .*int8"):
        import_model(file, tmp_path / "out", HALVES)
    assert not (tmp_path / "out").exists()
