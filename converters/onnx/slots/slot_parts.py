"""A slot's inputs for operators that compute a module in parts: one ``A``, a ``B`` for each.

``B`` ``[r, out]``, a gain and a bias are cut into the parts' columns once, before everything else
in the graph, whatever an adapter fills them with. So the slot's inputs are the whole module's, and
nothing that fills them need know of the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from converters.onnx.graph.rewriting import Rewrite
from loraport.bundle.slots import Slot


@dataclass(frozen=True)
class Columns:
    """Which of a slot's outputs are an operator's.

    Attributes:
        widths: How many outputs each operator has, in their order.
        number: The operator's place among them.
    """

    widths: tuple[int, ...]
    number: int = 0

    @property
    def first(self) -> int:
        """The operator's first output."""
        return sum(self.widths[: self.number])


class SlotParts:
    """Cuts slots; their nodes go to the beginning of the graph.

    Args:
        graph: The graph, changed in place.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._cut: dict[tuple[str, tuple[int, ...]], dict[str, list[ir.Value]]] = {}

    def of(
        self, slot: Slot, inputs: Mapping[str, ir.Value], columns: Columns
    ) -> tuple[Slot, Mapping[str, ir.Value]]:
        """Return the slot as one operator has it, and the values in its inputs' places.

        Args:
            slot: A slot of a linear module, where there are several operators.
            inputs: Role → graph input.
            columns: The operator's.
        """
        if len(columns.widths) == 1:
            return slot, inputs
        key = slot.name, columns.widths
        if key not in self._cut:
            rewrite = Rewrite(self._graph[0], f"{slot.name}.lora/{len(self._cut)}")
            self._cut[key] = {
                role: rewrite.split(role, value, columns.widths, int(role == "lora_B"), value.dtype)
                for role, value in inputs.items()
                if role != "lora_A" and value.dtype is not None
            }
            rewrite.put_before()
        cut = {role: values[columns.number] for role, values in self._cut[key].items()}
        return replace(slot, out_features=columns.widths[columns.number]), {**inputs, **cut}
