"""What is said of a module's inputs: tensors by name, and which dimensions vary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from converters.onnx.graph.source_graph import read_graph
from loraport.counts import counted
from loraport.errors import LoraportError, Problems
from loraport.option_checks import is_whole


def require_named_tensors(inputs: Mapping[str, torch.Tensor]) -> None:
    """Refuse inputs that do not say which of the arguments each is, or are no tensors."""
    expected = "inputs: expected a mapping from the names of forward's arguments to tensors"
    if not isinstance(inputs, Mapping):
        raise LoraportError(f'{expected}, such as {{"x": x}}, got {type(inputs).__name__}')
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise LoraportError(f"{expected}, got {name} as {type(value).__name__}")


def require_dimensions(dynamic: object, inputs: Mapping[str, torch.Tensor]) -> None:
    """Refuse names for dimensions that the inputs do not have; torch would pass some over."""
    expected = 'names by dimension, such as {0: "batch"}'
    if not isinstance(dynamic, Mapping):
        raise LoraportError(f"dynamic: expected, for each input, {expected}, got {dynamic!r}")
    problems = Problems()
    for name, dimensions in dynamic.items():
        if name not in inputs:
            problems.add(str(name), f"an input ({', '.join(inputs)})", "none of this name")
        elif not isinstance(dimensions, Mapping):
            problems.add(name, expected, repr(dimensions))
        else:
            rank = inputs[name].ndim
            for number, label in dimensions.items():
                if not (is_whole(number) and -rank <= number < rank):
                    problems.add(name, f"one of its {counted(rank, 'dimension')}", repr(number))
                if not (isinstance(label, str) and label.isidentifier()):
                    told = f"a name of letters, digits and _ for dimension {number}"
                    problems.add(name, told, repr(label))
    problems.raise_if_any("dynamic does not fit the inputs")


def require_varying(model: Path, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """Refuse names for dimensions that the module takes of one size alone."""
    shapes = {value.name: value.shape for value in read_graph(model).graph.inputs}
    problems = Problems()
    for name, dimensions in dynamic.items():
        for number, label in dimensions.items():
            if (shape := shapes.get(name)) is not None and isinstance(shape[number], int):
                told = f"a dimension that may vary as {label!r}"
                remedy = "leave it out, or make the module take others"
                problems.add(name, told, f"dimension {number} always {shape[number]}", remedy)
    problems.raise_if_any("dynamic does not fit the module")
