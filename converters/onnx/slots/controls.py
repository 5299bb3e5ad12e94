"""Inputs that say how adapters are used in a run: a strength, and the adapter of each row.

With ``per_row``, several adapters are resident as lanes, one after the other in the same inputs,
and ``adapter_ids`` ``[batch]`` says whose each row is; -1 is the base, bit for bit.

- Linear modules: ``A`` ``[lanes * in, r]`` and ``B`` ``[lanes * r, out]`` hold whole adapters. Each
  row's own are gathered, ``[batch, in, r]`` and ``[batch, r, out]``, and two batched products do no
  more arithmetic than each row needs.
- Embeddings and convolutions: ``A`` holds the columns of all lanes side by side, ``B`` the rows,
  and ``lora_lanes.K`` says whose each column is (in the slots of ``K`` modules, which have ``K``
  times the rank). Of each row's ``x A``, all columns but its own become zero before ``B``.

With a strength, ``x A`` is multiplied by it: by one number, or by its lane's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.nodes import NodeChain
from converters.onnx.graph.site import Site
from converters.onnx.slots.input_names import names_outside, require_free
from loraport.adapter import ModuleKind
from loraport.bundle.slots import (
    ADAPTER_IDS_INPUT,
    BASE,
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
        made: What was put in so far.
    """

    graph: ir.Graph
    strength: bool
    per_row: bool
    made: list[Control] = field(default_factory=list)
    _values: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    _batch: str | int | None = None  # what the first slot's input begins with

    def why_not(self, slot: Slot, site: Site) -> str | None:
        """Return why rows of a batch cannot be told apart here, or ``None`` if they can."""
        if not self.per_row:
            return None
        if slot.gain or slot.bias:
            return "a slot with a gain or bias cannot differ from row to row"
        rows = self._rows_of(site.x)
        if rows is None:
            return "its input is not known to have the batch first, so rows cannot be told apart"
        self._batch = self._batch or rows
        if rows != self._batch:
            return f"its input has {rows} rows, others {self._batch}, and one adapter is for each"
        return None

    def _rows_of(self, x: ir.Value | None) -> str | int | None:
        """Return the batch that a value has as, or in, its first dimension, if it has any."""
        batches = self._batches()
        while x is not None and x.shape:
            size = _size(x.shape[0])
            if size in batches:
                return size
            producer = x.producer()
            flattened = len(x.shape) == 2 and producer is not None and producer.op_type == "Reshape"
            x = producer.inputs[0] if flattened and producer is not None else None
        return None

    def _batches(self) -> set[str | int]:
        """Return what the batch may be: names that inputs begin with, or else their numbers.

        What is another dimension's size too says nothing, and of names those that say batch are
        it.
        """
        shapes = [value.shape for value in self.graph.inputs if value.shape]
        others = {_size(dim) for shape in shapes for dim in shape[1:]}
        first = {size for shape in shapes if (size := _size(shape[0])) is not None} - others
        named: set[str | int] = {size for size in first if isinstance(size, str)}
        return {name for name in named if "batch" in str(name).lower()} or named or first

    def own_change(
        self, chain: NodeChain, slot: Slot, site: Site, inputs: Mapping[str, ir.Value]
    ) -> ir.Value:
        """Return ``(x A) B`` of a linear module with each row's own ``A`` and ``B``.

        Args:
            chain: Where nodes go.
            slot: The slot.
            site: Its place.
            inputs: Role -> graph input.
        """
        x, matrices = site.x, 3
        as_they_are = x.shape is not None and len(x.shape) == matrices
        if not as_they_are:
            x = chain.add("rows", "Reshape", [x, self._sizes("rows", [slot.in_features])])
        sizes = {"lora_A": [slot.in_features, -1], "lora_B": [-1, slot.out_features]}
        own = {}
        for role, shape in sizes.items():
            lanes = self._sizes("lanes", shape, inputs["lora_A"], slot.in_features)
            whole = chain.add(f"{role}/lanes", "Reshape", [inputs[role], lanes])
            axis = {"axis": ir.AttrInt64("axis", 0)}
            own[role] = chain.add(f"{role}/own", "Gather", [whole, self._lane_of_rows()], axis)
        hidden = chain.add("A", "MatMul", [x, own["lora_A"]])
        hidden = chain.add("lane", "Where", [self._adapted(), hidden, self._zero(site.dtype)])
        if self.strength:
            hidden = chain.add("strength", "Mul", [hidden, self._factor_of_rows(site.dtype)])
        change = chain.add("B", "MatMul", [hidden, own["lora_B"]])
        if as_they_are:
            return change
        return chain.add("together", "Reshape", [change, chain.add("y", "Shape", [site.y])])

    def on_hidden(self, chain: NodeChain, slot: Slot, site: Site, hidden: ir.Value) -> ir.Value:
        """Return ``x A`` as the controls change it, where `own_change` is not for it.

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
        return self._remainder(f"strength_of.{members}", lanes, count)

    def _lane_of_rows(self) -> ir.Value:
        """Return each row's lane, 0 for those without."""
        return self._shared(
            "lane_of_rows",
            "Where",
            [self._is_adapted(), self._ids(), self._constant("none", np.array([0]))],
            ir.DataType.INT64,
        )

    def _is_adapted(self) -> ir.Value:
        ids, none = self._ids(), self._constant("base", np.array([BASE]))
        return self._shared("is_adapted", "Greater", [ids, none], ir.DataType.BOOL)

    def _adapted(self) -> ir.Value:
        """Return which rows have an adapter, ``[batch, 1, 1]``."""
        return self._standing(self._is_adapted(), "adapted", 2, ir.DataType.BOOL)

    def _factor_of_rows(self, dtype: ir.DataType) -> ir.Value:
        """Return each row's strength ``[batch, 1, 1]``."""
        strengths = self.factor(dtype)
        count = self._shared("strength_count", "Shape", [strengths], ir.DataType.INT64)
        place = self._remainder("strength_of_rows", self._lane_of_rows(), count)
        name = f"strengths_of_rows.{dtype.name}"
        chosen = self._shared(name, "Gather", [strengths, place], dtype)
        return self._standing(chosen, f"{name}/standing", 2, dtype)

    def _remainder(self, name: str, number: ir.Value, divisor: ir.Value) -> ir.Value:
        """Return what ``Mod`` does, which opsets before 10 do not have."""
        times = self._shared(f"{name}/times", "Div", [number, divisor], ir.DataType.INT64)
        whole = self._shared(f"{name}/whole", "Mul", [times, divisor], ir.DataType.INT64)
        return self._shared(name, "Sub", [number, whole], ir.DataType.INT64)

    def _sizes(
        self, kind: str, rest: list[int], a: ir.Value | None = None, features: int = 0
    ) -> ir.Value:
        """Return a shape that begins with the number of rows, or of the lanes in an ``A``."""
        if a is None:
            first = self._shared("row_count", "Shape", [self._ids()], ir.DataType.INT64)
            rest = [-1, *rest]
        else:
            int64 = ir.DataType.INT64
            shape = self._shared("lane_shape", "Shape", [a], int64)
            length = self._shared(
                "lane_rows", "Gather", [shape, self._constant("none", np.array([0]))], int64
            )
            each = self._constant(f"features.{features}", np.array([features]))
            first = self._shared("lane_count", "Div", [length, each], int64)
        tail = self._constant("sizes." + ".".join(map(str, rest)), np.array(rest))
        return self._shared(
            f"{kind}.{'.'.join(map(str, rest))}", "Concat", [first, tail], ir.DataType.INT64, axis=0
        )

    def _ids(self) -> ir.Value:
        return self._control(ADAPTER_IDS_INPUT, ControlRole.ADAPTER_IDS, "adapter_rows")

    def _lanes(self, members: int) -> ir.Value:
        name = lanes_input(members)
        return self._control(name, ControlRole.LANES, f"{name}.rank", members)

    def _control(self, name: str, role: ControlRole, size: str, members: int = 0) -> ir.Value:
        if (name,) not in self._values:
            require_free(name, self.graph, names_outside(self.graph))
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


def _size(dim: int | ir.SymbolicDim) -> str | int | None:
    """Return a dimension's number or name; ``None`` where it has neither."""
    return dim if isinstance(dim, int) else dim.value
