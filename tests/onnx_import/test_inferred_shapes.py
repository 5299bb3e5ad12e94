"""Shapes that are noted in a graph before its rows are told apart."""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, session

from converters.onnx.graph.inferred_shapes import infer_shapes
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots.inserting import SlotOptions

FLOAT = TensorProto.FLOAT
info = helper.make_tensor_value_info


def branch(name, shapes):
    """``y = x W + zeros``, as Optimum's merged decoders: both branches have values of one name."""
    nodes = [
        *(helper.make_node("Shape", ["x"], ["n"]) for _ in range(shapes - 1)),
        helper.make_node("Shape", ["n" if shapes == 2 else "x"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Mul", ["zeros" if shapes == 2 else "x", "zeros"], ["many"]),
        helper.make_node("ReduceSum", ["many"], ["zero"], keepdims=0),
        helper.make_node("MatMul", ["x", "W"], ["p"], name="/fc/MatMul"),
        helper.make_node("Add", ["p", "zero"], ["y"]),
    ]
    return helper.make_graph(nodes, name, [], [info("y", FLOAT, ["batch", "s", 5])])


def merged():
    weight = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    either = helper.make_node(
        "If", ["cached"], ["y"], then_branch=branch("one", 2), else_branch=branch("other", 1)
    )
    inputs = [info("x", FLOAT, ["batch", "s", 6]), info("cached", TensorProto.BOOL, [1])]
    outputs = [info("y", FLOAT, ["batch", "s", 5])]
    graph = helper.make_graph(
        [either], "g", inputs, outputs, [numpy_helper.from_array(weight, "W")]
    )
    return helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10), weight


def test_values_of_one_name_in_two_branches_have_shapes_of_their_own():
    model = ir.from_proto(merged()[0])
    infer_shapes(model)
    ranks = {
        subgraph.name: {value.name: len(value.shape or ()) for n in subgraph for value in n.outputs}
        for subgraph in model.graph.subgraphs()
    }
    assert ranks["one"]["zeros"] == 1
    assert ranks["other"]["zeros"] == 3
    assert set(ranks["one"]) == {"n", "size", "zeros", "many", "zero", "p", "y"}


def test_rows_of_merged_branches_have_adapters_of_their_own(tmp_path):
    proto, weight = merged()
    onnx.save(proto, tmp_path / "m.onnx")
    options = ImportOptions(slots=SlotOptions(per_row=True))
    import_model(tmp_path / "m.onnx", tmp_path / "bundle", options)
    opened = session(str(tmp_path / "bundle" / "model.onnx"))
    random = np.random.default_rng(1)
    x, a, b = (random.standard_normal(s).astype(np.float32) for s in ((2, 3, 6), (6, 2), (2, 5)))
    for cached in (True, False):
        fed = {"x": x, "cached": np.array([cached]), "fc.lora_A": a, "fc.lora_B": b}
        (got,) = opened.run(None, {**fed, "adapter_ids": np.array([-1, 0])})
        # float32 sums over six features.
        np.testing.assert_allclose(got[0], x[0] @ weight, atol=1e-5)
        np.testing.assert_allclose(got[1], x[1] @ (weight + a @ b), atol=1e-5)
        assert np.abs(x[1] @ (a @ b)).max() > 0.1


def test_pools_of_integers_have_the_shape_of_those_of_floats():
    found = {}
    for last in (0, 1):
        pool = helper.make_node(
            "QLinearGlobalAveragePool",
            ["x", "scale", "zero", "scale", "zero"],
            ["y"],
            domain="com.microsoft",
            channels_last=last,
        )
        constants = {"scale": np.float32(0.1), "zero": np.uint8(128)}
        graph = helper.make_graph(
            [pool, helper.make_node("Flatten", ["y"], ["z"])],
            "g",
            [info("x", TensorProto.UINT8, ["batch", 3, 5, 5])],
            [info("z", TensorProto.UINT8, ["batch", None])],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
        )
        model = ir.from_proto(helper.make_model(graph, opset_imports=DOMAINS, ir_version=10))
        infer_shapes(model)
        found[last] = model.graph[0].outputs[0].shape
    assert [str(size) for size in found[0]] == ["batch", "3", "1", "1"]
    assert found[1] is None  # no standard operator reads channels last
