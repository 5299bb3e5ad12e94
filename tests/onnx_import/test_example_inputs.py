"""Inputs that are made for a graph's first golden case."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

from converters.onnx.graph.example_inputs import example_inputs
from converters.onnx.importing import ImportOptions, import_model
from loraport.bundle.golden import read_golden
from loraport.bundle.manifest import read_manifest
from loraport.runtime.replay import replay_golden


@pytest.mark.parametrize(
    ("shapes", "made"),
    [
        ({"x": ["steps", "n", 5], "state": ["n", 5]}, {"x": (2, 8, 5), "state": (8, 5)}),
        ({"x": ["b", "s", 5], "where": ["s"]}, {"x": (2, 8, 5), "where": (8,)}),
        ({"x": ["n", 5], "edges": ["n", "n"]}, {"x": (8, 5), "edges": (8, 8)}),
        (  # a batch is one wherever it stands
            {"x": ["batch", "s"], "h": ["layers", "batch", 5]},
            {"x": (2, 8), "h": (2, 2, 5)},
        ),
        ({"x": ["n", 5], "y": ["n", 4]}, {"x": (2, 5), "y": (2, 4)}),
        ({"x": [None, None, 5], "y": [None, 5]}, {"x": (2, 8, 5), "y": (2, 5)}),
    ],
)
def test_a_name_is_of_one_size_wherever_it_stands(shapes, made):
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph([], "g", info, info)
    model = ir.from_proto(helper.make_model(graph))
    found = next(example_inputs(model))
    assert {name: array.shape for name, array in found.items()} == made


@pytest.mark.parametrize(
    ("state", "tried"),
    [
        ([2, None, 5], [(2, 8, 5), (2, 2, 5)]),  # rows of a batch of 2, then layers before a batch
        ([2, "n", 5], [(2, 8, 5)]),
        ([None, None, 5], [(2, 8, 5)]),
    ],
)
def test_what_stands_behind_a_number_is_tried_as_the_batch_too(state, tried):
    """As in a recurrent layer's state, of whose dimensions the exporter kept no names."""
    shapes = {"x": [None, None], "state": state}
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    model = ir.from_proto(helper.make_model(helper.make_graph([], "g", info, info)))
    found = [inputs for inputs in example_inputs(model) if inputs["x"].shape == (2, 8)]
    assert [inputs["state"].shape for inputs in found] == tried


@pytest.fixture
def positions(tmp_path):
    """A graph that looks token and position up: ``y = (tokens[ids] + places[position_ids]) W``."""
    random = np.random.default_rng(0)
    sizes = {"tokens": (11, 6), "places": (8, 6), "W": (6, 5)}
    nodes = [
        helper.make_node("Gather", ["tokens", "ids"], ["t"]),
        helper.make_node("Gather", ["places", "position_ids"], ["p"]),
        helper.make_node("Add", ["t", "p"], ["x"]),
        helper.make_node("MatMul", ["x", "W"], ["y"], name="/fc/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "s"])
            for name in ("ids", "position_ids")
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "s", 5])],
        [
            numpy_helper.from_array(random.standard_normal(size, np.float32), name)
            for name, size in sizes.items()
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=DOMAINS, ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("given", ["made", "by_columns"])
def test_golden_inputs_are_kept_however_they_lie_in_memory(positions, given, tmp_path):
    """safetensors writes memory as it lies, whatever an array's strides say."""
    ids = np.arange(6).reshape(2, 3)
    inputs = {"ids": ids, "position_ids": np.asfortranarray(ids)}
    options = ImportOptions(inputs=inputs if given == "by_columns" else {})
    import_model(positions, tmp_path / "bundle", options)
    manifest = read_manifest(tmp_path / "bundle")
    kept = read_golden(tmp_path / "bundle", manifest.golden["base"])[0]
    expected = ids if given == "by_columns" else np.tile(np.arange(8), (2, 1))
    np.testing.assert_array_equal(kept["position_ids"], expected)
    (result,) = replay_golden(tmp_path / "bundle")
    assert result.passed, result
