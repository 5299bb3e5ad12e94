"""What a graph says about its slots: which tool put them in, and into what."""

from __future__ import annotations

import onnx_ir as ir

from loraport import __version__

MADE_BY = f"loraport {__version__}"
_TOOL = "loraport.slots_by"
_SOURCE = "loraport.slots_in"
_SHA256 = "loraport.slots_in_sha256"
_SLOT = "loraport.slot"
_SLOT_FIRST = "loraport.slot_first"


def record_provenance(model: ir.Model, source: str, sha256: str = "") -> None:
    """Write into the model's metadata who made the slots, in place.

    Args:
        model: The graph with slots.
        source: What the graph was made from: a file's name or a base's.
        sha256: Of that file's content, if it is one.
    """
    model.metadata_props[_TOOL] = MADE_BY
    model.metadata_props[_SOURCE] = source
    if sha256:
        model.metadata_props[_SHA256] = sha256


def recorded_provenance(model: ir.Model) -> tuple[str, str] | None:
    """Return who made the slots of a graph and what it was made from, if it says so."""
    said = model.metadata_props
    return (said[_TOOL], said.get(_SOURCE, "the model")) if _TOOL in said else None


def record_slot(node: ir.Node, slot: str, first: int = 0) -> None:
    """Write into an operator's metadata which slot stands beside it, in place.

    Args:
        node: The operator.
        slot: The slot's name.
        first: Which of the slot's outputs is the operator's first; 0 where it has all of them.
    """
    node.metadata_props[_SLOT] = slot
    if first:
        node.metadata_props[_SLOT_FIRST] = str(first)


def recorded_slot(node: ir.Node) -> tuple[str, int] | None:
    """Return the slot that stands beside an operator, if it has one, and its first output there."""
    slot = node.metadata_props.get(_SLOT)
    return None if slot is None else (slot, int(node.metadata_props.get(_SLOT_FIRST, 0)))
