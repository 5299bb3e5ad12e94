"""Functions that a model brings along, put in the place of their calls.

Some exporters make a function of every module or of every PyTorch operator (``torch.onnx`` before
2.5, onnxscript); the operators that can have slots are inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.errors import LoraportError, first_line

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Functions of these domains say what an operator means to runtimes that lack it.
_OPERATORS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
_MOST_NODES = 1_000_000  # a few functions that call one another may stand for any number
_COUNTING = -1
_Key = tuple[str, str]


def inlined(model: ModelProto, file: Path) -> ModelProto:
    """Return a model whose own functions' calls are replaced by what they compute.

    Args:
        model: Any model; returned as it is if it has no functions of its own.
        file: Its file, for the error.

    Raises:
        LoraportError: If functions call one another in a circle, stand for more operators than
            any model has, or want another opset than the model has.
    """
    from onnx import inliner

    own = {(f.domain, f.name): f for f in model.functions if f.domain not in _OPERATORS}
    if not own:
        return model
    counted: dict[_Key, int] = {}
    versions = {entry.domain: entry.version for entry in model.opset_import}

    def size(nodes: Iterable[NodeProto]) -> int:
        return sum(size_of((node.domain, node.op_type)) for node in nodes_of(nodes))

    def size_of(key: _Key) -> int:
        if key not in own:
            return 1
        if counted.get(key) == _COUNTING:
            raise ValueError(f"a circle of calls through {key[1]}")
        if key not in counted:
            counted[key] = _COUNTING
            counted[key] = size(own[key].node)
        return counted[key]

    try:
        if size(model.graph.node) > _MOST_NODES:
            raise ValueError(f"calls that stand for more than {_MOST_NODES} operators")
        for function in own.values():
            for entry in function.opset_import:
                version = versions.setdefault(entry.domain, entry.version)
                if entry.version != version:
                    got = f"in opset {entry.version}, the model in {version}"
                    raise ValueError(f"{function.name} {got}")
        result = inliner.inline_selected_functions(model, list(own), exclude=False)
    except (RuntimeError, RecursionError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise LoraportError(
            f"{file}: expected functions that can be put in the place of their calls, got: "
            f"{reason}; inline them with the tool that exported the model"
        ) from error
    return result


def nodes_of(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from nodes_of(inner.node)
