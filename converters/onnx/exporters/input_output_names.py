"""Call a graph's inputs and outputs what the module calls them.

ONNX has one name for one value: a module may return an input as it is, or call a result like an
input. That output is called ``NAME_out``, and the input keeps its name.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass


def name_inputs_and_outputs(
    model: ir.Model, inputs: Sequence[str], outputs: Sequence[str] | None
) -> None:
    """Name both, in place.

    Args:
        model: An export whose outputs are values of their own.
        inputs: Names of all inputs.
        outputs: Names of all outputs; what they are called already unless told.
    """
    graph = model.graph
    outputs = outputs or [str(value.name) for value in graph.outputs]
    taken = {*inputs, *graph.initializers}
    names = [f"{name}_out" if name in taken else name for name in outputs]
    for values, wanted in ((graph.outputs, names), (graph.inputs, inputs)):
        for value, name in zip(values, wanted, strict=True):
            value.name = name
    NameFixPass()(model)  # what else was called so
