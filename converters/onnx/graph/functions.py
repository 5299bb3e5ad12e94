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
        model: Any model; returned as it is if it has no functions of its own. Those of another
            opset, whose operators are the same in the model's, are changed in place to that.
        file: Its file, for the error.

    Raises:
        LoraportError: If functions call one another in a circle, stand for more operators than
            any model has, or use operators that are others in the model's opset.
    """
    from onnx import inliner

    own = {(f.domain, f.name): f for f in model.functions if f.domain not in _OPERATORS}
    if not own:
        return model
    counted: dict[_Key, int] = {}
    versions = {_domain(entry.domain): entry.version for entry in model.opset_import}

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
                domain = _domain(entry.domain)
                version = versions.setdefault(domain, entry.version)
                if entry.version == version:
                    continue
                for node in nodes_of(function.node):
                    called = (node.domain, node.op_type)
                    if _domain(node.domain) != domain or called in own:
                        continue
                    if _since(called, entry.version) != _since(called, version):
                        got = f"in opset {entry.version}, the model in {version}"
                        why = f"where {node.op_type} is another operator"
                        raise ValueError(f"{function.name} {got}, {why}")
                entry.version = version
        result = inliner.inline_selected_functions(model, list(own), exclude=False)
    except (RuntimeError, RecursionError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise LoraportError(
            f"{file}: expected functions that can be put in the place of their calls, got: "
            f"{reason}; inline them with the tool that exported the model"
        ) from error
    return result


def _domain(name: str) -> str:
    """Return a domain by the one name that it goes by: the standard operators' has two."""
    return "" if name == "ai.onnx" else name


def _since(operator: _Key, opset: int) -> int:
    """Return the opset from which on an operator is as it is in ``opset``, itself if unknown."""
    from onnx import defs

    domain, name = operator
    try:
        return defs.get_schema(name, opset, _domain(domain)).since_version
    except defs.SchemaError:
        return opset


def nodes_of(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from nodes_of(inner.node)
