"""Functions that a model brings along, put in the place of their calls.

Some exporters make a function of every module or of every PyTorch operator (``torch.onnx`` before
2.5, onnxscript); the operators that can have slots are inside.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from loraport.errors import LoraportError

# Functions of these domains say what an operator means to runtimes that lack it.
_OPERATORS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


def inline_functions(model: ir.Model, file: Path) -> None:
    """Replace calls of a model's own functions by what they compute, in place.

    Args:
        model: Any model.
        file: Its file, for the error.

    Raises:
        LoraportError: If functions call one another in a circle, or want another opset than the
            model has.
    """
    from onnx_ir.passes.common import InlinePass

    if not model.functions:
        return
    try:
        InlinePass(lambda function: function.domain not in _OPERATORS)(model)
    except (ir.passes.InvariantError, ir.passes.PassError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise LoraportError(
            f"{file}: expected functions that can be put in the place of their calls, got: "
            f"{reason}; inline them with the tool that exported the model"
        ) from error
