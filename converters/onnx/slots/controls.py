"""Inputs that say how adapters are used in a run: a strength, and the adapter of each row.

With ``per_row``, several adapters are resident side by side, as lanes: ``A`` holds the columns
of all of them, ``B`` the rows, and the input ``lora_lanes.K`` says whose each column is (in the
slots of ``K`` modules, which have ``K`` times the rank). Per row of the batch, all of ``x A`` but
the columns of its own lane becomes zero before ``B``; so one product serves all rows, no weights
are gathered or copied, and a row without adapter is the base bit for bit.

With a strength, what is left is multiplied by it: by one number, or by its lane's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.nodes import NodeChain
from converters.onnx.graph.site import Site
from loraport.adapter import ModuleKind
from loraport.bundle.slots import (
    ADAPTER_IDS_INPUT,
    STRENGTH_INPUT,
    Control,
    ControlRole,
    Slot,
)
from loraport.naming import lanes_input


@dataclass(eq=False)
class Controls:
    """The controls of a graph; their inputs and shared nodes are made when first needed.

    Attributes:
        graph: The graph, changed in place.
        strength: There is a strength.
        per_row: Every row can have its own adapter.
        flat_dimensions: Names of dimensions that count the positions of all rows, end to end.
        made: What was put in so far.
    """

    graph: ir.Graph
    strength: bool
    per_row: bool
    flat_dimensions: frozenset[str] = frozenset()
    made: list[Control] = field(default_factory=list)
    _values: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def why_not(self, slot: Slot, site: Site) -> str | None:
        """Return why rows of a batch cannot be told apart here, or ``None`` if they can."""
        if not self.per_row:
            return None
        if slot.gain or slot.bias:
            return "a slot with a gain or bias cannot differ from row to row"
        if not self._keeps_rows(site.x):
            return "its input is not known to have the batch first, so rows cannot be told apart"
        return None

    def _keeps_rows(self, x: ir.Value) -> bool:
        """Tell whether a value has the graph's batch as, or in, its first dimension."""
        if x.shape is None:
            return False
        batches = {str(value.shape[0]) for value in self.graph.inputs if value.shape}
        if str(x.shape[0]) in batches or self._is_flat(x):
            return True
        producer = x.producer()
        flattened = len(x.shape) == 2 and producer is not None and producer.op_type == "Reshape"
        if not flattened or producer is None or producer.inputs[0] is None:
            return False
        return self._keeps_rows(producer.inputs[0])

    def _is_flat(self, x: ir.Value) -> bool:
        return x.shape is not None and len(x.shape) == 2 and str(x.shape[0]) in self.flat_dimensions

    def on_hidden(self, chain: NodeChain, slot: Slot, site: Site, hidden: ir.Value) -> ir.Value:
        """Return ``x A`` as the controls change it.

        Args:
            chain: Where nodes go.
            slot: The slot.
            site: Its place.
            hidden: ``x A``, ``[..., r]``; of a convolution ``[batch, r, *size]``.
        """
        if self.per_row:
            hidden = self._own_lane_only(chain, slot, site, hidden)
        if self.strength:
            hidden = chain.add("strength", "Mul", [hidden, self._factor(slot, site)])
        return hidden

    def factor(self, dtype: ir.DataType) -> ir.Value:
        """Return the strength ``[1]`` as this type."""
        source = self._control(STRENGTH_INPUT, ControlRole.STRENGTH, "lora_strengths")
        if dtype == ir.DataType.FLOAT:
            return source
        return self._cast(source, dtype)

    def _own_lane_only(
        self, chain: NodeChain, slot: Slot, site: Site, hidden: ir.Value
    ) -> ir.Value:
        assert site.x.shape is not None
        # An embedding's input is tokens: its output has a dimension more.
        rank = len(site.x.shape) + (slot.kind is ModuleKind.EMBEDDING)
        zero = self._zero(site.dtype)
        if rank == 2:
            return chain.add("lane", "Where", [self._own_of_rows(slot, site.x), hidden, zero])
        own = self._own(slot, rank, conv=slot.kind is ModuleKind.CONV)
        return chain.add("lane", "Where", [own, hidden, zero])

    def _own(self, slot: Slot, rank: int, *, conv: bool) -> ir.Value:
        """Return which columns are a row's: ``[batch, 1, ..., r]`` or ``[batch, r, 1, ...]``."""
        members = len(slot.members)
        key = f"{members}.{rank}{'.conv' if conv else ''}"
        ids = self._standing(self._ids(), f"ids.{rank}", rank - 1, ir.DataType.INT64)
        lanes = self._lanes(members)
        if conv:
            lanes = self._standing(lanes, f"lanes.{key}", rank - 2, ir.DataType.INT64)
        return self._shared(f"own.{key}", "Equal", [ids, lanes], ir.DataType.BOOL)

    def _own_of_rows(self, slot: Slot, x: ir.Value) -> ir.Value:
        """Return which columns are a row's, for each row of a matrix: ``[rows, r]``.

        The matrix holds the batch's rows one after the other, each as many times as it has
        positions.
        """
        members = len(slot.members)
        place = str(x.shape[0]) if self._is_flat(x) and x.shape is not None else str(x.name)
        key = ("own", place, members)
        if key not in self._values:
            chain = NodeChain(f"lora_controls/{place}/{members}", ir.DataType.INT64)
            ids = self._standing(self._ids(), "ids.2", 1, ir.DataType.INT64)
            first = chain.constant("first", np.array([0]))
            rows = chain.add("rows", "Gather", [chain.add("shape", "Shape", [x]), first])
            batch = self._shared("batch", "Shape", [self._ids()], ir.DataType.INT64)
            positions = chain.add("positions", "Div", [rows, batch])
            axis = {"axis": ir.AttrInt64("axis", 0)}
            sizes = chain.add("sizes", "Concat", [batch, positions], axis)
            spread = chain.add("spread", "Expand", [ids, sizes])
            column = chain.constant("column", np.array([-1, 1]))
            by_row = chain.add("by_row", "Reshape", [spread, column])
            own = chain.add("own", "Equal", [by_row, self._lanes(members)])
            own.type = ir.TensorType(ir.DataType.BOOL)
            producer = x.producer()
            assert producer is not None
            owner = self.graph if producer.graph is None else producer.graph
            owner.insert_after(producer, chain.nodes)
            self._values[key] = own
        return self._values[key]

    def _standing(self, vector: ir.Value, name: str, ones: int, dtype: ir.DataType) -> ir.Value:
        """Return a vector as ``[length, 1, ...]``, with so many dimensions of 1."""
        if not ones:
            return vector
        shape = self._constant(f"standing.{ones}", np.array([-1] + [1] * ones))
        return self._shared(name, "Reshape", [vector, shape], dtype)

    def _factor(self, slot: Slot, site: Site) -> ir.Value:
        """Return the strength, of each column where there are lanes."""
        factor = self.factor(site.dtype)
        if not self.per_row:
            return factor
        members = len(slot.members)
        kind = site.dtype.name
        factor = self._shared(
            f"strengths.{members}.{kind}", "Gather", [factor, self._index(members)], site.dtype
        )
        if slot.kind is ModuleKind.CONV:
            dims = len(slot.kernel)
            name = f"strengths.{members}.{kind}.{dims}"
            factor = self._standing(factor, name, dims, site.dtype)
        return factor

    def _index(self, members: int) -> ir.Value:
        """Return each column's place in the strengths: its lane, or 0 if there is one strength."""
        strengths = self.factor(ir.DataType.FLOAT)
        count = self._shared("strength_count", "Shape", [strengths], ir.DataType.INT64)
        lanes = self._lanes(members)
        return self._shared(f"strength_of.{members}", "Mod", [lanes, count], ir.DataType.INT64)

    def _ids(self) -> ir.Value:
        return self._control(ADAPTER_IDS_INPUT, ControlRole.ADAPTER_IDS, "adapter_rows")

    def _lanes(self, members: int) -> ir.Value:
        name = lanes_input(members)
        return self._control(name, ControlRole.LANES, f"{name}.rank", members)

    def _control(self, name: str, role: ControlRole, size: str, members: int = 0) -> ir.Value:
        if (name,) not in self._values:
            control = Control(name, role, members)
            dtype = ir.DataType[control.dtype]
            value = ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(dtype))
            default = np.full(1, control.neutral, dtype.numpy())
            value.const_value = ir.tensor(default, name=name)
            self.graph.inputs.append(value)
            self.graph.register_initializer(value)
            self._values[name,] = value
            self.made.append(control)
        return self._values[name,]

    def _cast(self, source: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{source.name}.{dtype.name}"
        return self._shared(name, "Cast", [source], dtype, to=int(dtype))

    def _zero(self, dtype: ir.DataType) -> ir.Value:
        return self._constant(f"zero.{dtype.name}", np.zeros(1, dtype.numpy()))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        key = ("constant", name)
        if key not in self._values:
            full = f"lora_controls/{name}"
            tensor = ir.tensor(array, name=full)
            value = ir.Value(
                name=full,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.graph.register_initializer(value)
            self._values[key] = value
        return self._values[key]

    def _shared(
        self, name: str, operator: str, inputs: list[ir.Value], dtype: ir.DataType, **options: int
    ) -> ir.Value:
        """Return a node's output that many slots use; the node goes to the graph's beginning."""
        key = ("node", name)
        if key not in self._values:
            node = ir.node(operator, inputs, options, name=f"lora_controls/{name}")
            node.outputs[0].name = f"{node.name}/output_0"
            node.outputs[0].type = ir.TensorType(dtype)
            last = self._values.get(("last",))
            if last is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                producer = last.producer()
                assert producer is not None
                self.graph.insert_after(producer, node)
            self._values["last",] = self._values[key] = node.outputs[0]
        return self._values[key]
