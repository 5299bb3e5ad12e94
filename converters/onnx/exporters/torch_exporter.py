"""Export any torch module with ``torch.onnx.export(dynamo=True)``."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves

from converters.onnx.exporters.distinct_parameters import distinct_parameters, put_back
from converters.onnx.exporters.input_output_names import name_inputs_and_outputs
from converters.onnx.exporters.named_arguments import named_arguments
from converters.onnx.exporters.optimizing import optimize
from converters.onnx.exporters.routed_experts import batched_experts
from loraport.base.stored_tensors import stored_tensors
from loraport.errors import LoraportError, first_line

DATA_FILE = "model.onnx.data"
_EXPORTERS_LOGS = ("torch.onnx", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")


def export_module(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    out: Path,
    *,
    dynamic: Mapping[str, Mapping[int, str]],
) -> None:
    """Write ``model.onnx`` and its data file into ``out``.

    Args:
        module: In evaluation mode; on the CPU.
        inputs: An example of every tensor argument of ``forward`` by name. Dynamic dimensions
            should be larger than 1 in the example, else they are taken for constants.
        out: An existing directory.
        dynamic: Input name → dimension → name of that dimension.

    Raises:
        LoraportError: If the module does not run with the inputs, or torch cannot export it.
    """
    names = _output_names(module, inputs)
    left: set[str] = set()
    while True:
        with distinct_parameters(module, left) as changed:
            model = _exported(module, inputs, dynamic, names)
        missing = put_back(model, changed)
        if not missing:
            break
        left |= missing
    ir.save(model, out / "model.onnx", external_data=DATA_FILE)


def _exported(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    output_names: list[str] | None,
) -> ir.Model:
    dimensions: dict[str, Any] = {}
    shapes = {
        name: {
            index: dimensions.setdefault(label, torch.export.Dim(label))
            for index, label in dynamic.get(name, {}).items()
        }
        for name in inputs
    }
    try:
        with _quiet(), named_arguments(module, inputs), batched_experts(module):
            program = torch.onnx.export(
                module,
                kwargs=dict(inputs),
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            if program is not None:
                input_names = [str(value.name) for value in program.model.graph.inputs]
                model = optimize(program, stored_tensors(module))
                name_inputs_and_outputs(model, input_names, output_names)
                return model
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # what is around it says in which step that was
            cause = cause.__cause__
        # The exporter asks each output for its name.
        told = _no_tensor(module, inputs) if isinstance(cause, AttributeError) else None
        first = told or _decision(cause) or first_line(cause)
        raise LoraportError(
            f"torch.onnx.export of {type(module).__name__} failed: {first}"
        ) from error
    raise LoraportError(f"torch.onnx.export of {type(module).__name__} gave no model")


def _decision(error: BaseException) -> str | None:
    """Say where a module's code decides by what is in a tensor, if that is what torch refuses."""
    if not isinstance(error, GuardOnDataDependentSymNode):
        return None
    places = re.findall(r'File "([^"]*)", line (\d+), in (\w+)', str(error))
    place = "".join(f", at {file}:{line} in {name}" for file, line, name in places[-1:])
    return (
        f"{first_line(error)} That is, its code decides by the value of a tensor{place}, which no "
        "graph can follow; let it decide by shapes, or by numbers of Python"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporter prints, and what it and its optimizer warn of."""
    loggers = [logging.getLogger(name) for name in _EXPORTERS_LOGS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        said = io.StringIO()  # where an export fails, the whole graph, on stderr
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _output_names(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[str] | None:
    """Return what the module itself calls its outputs, where it names them all."""
    try:
        with torch.no_grad():
            result = module(**inputs)
    except Exception as error:  # whatever the module's own code raises
        first = first_line(error)
        raise LoraportError(
            f"inputs: expected what {type(module).__name__} takes, got {', '.join(inputs)}, with "
            f"which it fails: {first}"
        ) from error
    names = _leaf_names("", result) if isinstance(result, Mapping) else None
    return names if names is not None and len(set(names)) == len(names) else None


def _no_tensor(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> str | None:
    """Say which of a module's outputs is a number of Python, where one is; no graph has those."""
    with torch.no_grad():
        leaves = tree_leaves(module(**inputs))
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, int | float | complex | str):
            return (
                f"output {number}: expected a tensor, got {leaf!r}, of type {type(leaf).__name__}; "
                "wrap the module in one that returns tensors alone"
            )
    return None


def _leaf_names(name: str, value: object) -> list[str] | None:
    """Return the paths of the tensors in a result (``hidden_states.0``), as torch orders them.

    ``None`` where something in it is no tensor.
    """
    if value is None or isinstance(value, torch.Tensor):
        return [] if value is None else [name]
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    else:
        return None
    names: list[str] = []
    for key, part in parts:
        found = _leaf_names(f"{name}.{key}" if name else str(key), part)
        if found is None:
            return None
        names += found
    return names
