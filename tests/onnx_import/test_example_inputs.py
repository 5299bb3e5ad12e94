"""Inputs that are made for a graph's first golden case."""

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from converters.onnx.graph.example_inputs import example_inputs


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
