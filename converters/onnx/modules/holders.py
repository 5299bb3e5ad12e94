"""Which initializer of a graph holds a parameter of the base.

With the base at hand, the values decide (transposed or not), and the names only between equals.
Without it, an initializer that kept its name is that parameter, and the weight of an operator
with a name is that module's; `stored_gains` says what a norm's is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from converters.onnx.graph.torch_dtypes import TORCH_DTYPES
from converters.onnx.modules.gains_plus_one import gains_plus_one
from converters.onnx.modules.graph_names import NamedSite, weight_of
from converters.onnx.modules.stored_gains import is_gain
from loraport.adapter import ModuleKind
from loraport.base.stored_tensors import stored_tensors
from loraport.naming import bias_name, is_module_path, weight_name
from loraport.runtime.decoder import GENAI_CONFIG

NOT_AS_IT_IS = (
    "the graph does not hold it as it is: it is quantized, packed with others, split over several "
    "operators or part of one; merge the adapter that stores it and export that"
)


class Use(Protocol):
    """A place where an operator reads a value; onnx-ir gives no name to its own."""

    @property
    def node(self) -> ir.Node:
        """The operator."""
        ...

    @property
    def idx(self) -> int:
        """Which of its inputs."""
        ...


_EITHER_GAIN = (
    f"the graph's norms may hold their weights or one more, and no {GENAI_CONFIG} beside it says "
    "which decoder it is; export again with --base"
)
_INEXACT_GAIN = "the graph holds one more than it, rounded; export again with --base"
# What exporters add one to the weights of norms in: float32, or what the checkpoint has.
_ADDING = (torch.float32, torch.bfloat16, torch.float16)
_MAYBE_SHARED = (
    "several operators use it, and equal parameters may share it; export again with --base"
)


@dataclass(frozen=True, eq=False)
class Holder:
    """An initializer, and where it stands for one parameter.

    Attributes:
        value: The initializer.
        uses: Operators and the numbers of their inputs.
        transposed: It holds the parameter's transpose.
        less_one: The parameter, where the initializer holds one more than that.
    """

    value: ir.Value
    uses: tuple[Use, ...]
    transposed: bool
    less_one: torch.Tensor | None = None


class Holders(Protocol):
    """Finds parameters in a graph."""

    def parameters(self) -> Iterable[str]:
        """Return the paths of all parameters that are known."""
        ...

    def find(self, parameter: str) -> Holder | str:
        """Return a parameter's place, or why it has none."""
        ...


class BaseHolders:
    """Finds the parameters of a base by their values.

    Args:
        graph: The graph.
        parameters: Path of a parameter, or of a stored buffer → its value; those that are shared,
            under every path.
        embeddings: Paths of the modules that look rows up: they tell apart the two users of a
            weight that an embedding and an output head share.
        plus_one: Parameters that a graph may hold with one added, see `gains_plus_one`.
    """

    def __init__(
        self,
        graph: ir.Graph,
        parameters: Mapping[str, torch.Tensor],
        embeddings: Iterable[str],
        plus_one: Iterable[str] = (),
    ) -> None:
        self._graph = graph
        self._plus_one = frozenset(plus_one)
        self._parameters = parameters
        self._embeddings = frozenset(map(weight_name, embeddings))
        pointers = [tensor.data_ptr() for tensor in parameters.values()]
        self._shared = {pointer for pointer in pointers if pointers.count(pointer) > 1}

    @classmethod
    def of_module(cls, graph: ir.Graph, module: nn.Module) -> BaseHolders:
        """Return what finds the parameters and stored buffers of a loaded base."""
        embeddings = [p for p, found in module.named_modules() if isinstance(found, nn.Embedding)]
        return cls(graph, stored_tensors(module), embeddings, gains_plus_one(module))

    def parameters(self) -> Iterable[str]:
        """Return the base's parameters."""
        return self._parameters

    def find(self, parameter: str) -> Holder | str:
        """Return the one initializer with the parameter's values."""
        tensor = self._parameters[parameter].detach()
        found = self._holders(parameter, tensor)
        for adding in _ADDING if parameter in self._plus_one else ():
            found = found or self._holders(parameter, tensor, adding)
        named = [holder for holder in found if holder.value.name == parameter]
        # Fresh norms are all ones: those that are called like other parameters are these.
        free = [holder for holder in found if holder.value.name not in self._parameters]
        for chosen in (named, free):
            if len(chosen) == 1:
                return self._unless_shared(parameter, chosen[0])
        if found:
            names = ", ".join(str(holder.value.name) for holder in found[:5])
            return f"the graph holds its values several times: {names}"
        return NOT_AS_IT_IS

    def _holders(
        self, parameter: str, tensor: torch.Tensor, adding: torch.dtype | None = None
    ) -> list[Holder]:
        """Return what holds a parameter, or one more than it, added in a type."""
        found = []
        for value in _stored(self._graph):
            transposed = _holds(value, tensor, adding)
            if transposed is None:
                continue
            uses = tuple(value.uses())
            if tensor.data_ptr() in self._shared:
                lookup = parameter in self._embeddings
                uses = tuple(use for use in uses if _looks_up(use) == lookup)
            less_one = None if adding is None else _less_one(value, tensor)
            if uses and (adding is None or less_one is not None):
                found.append(Holder(value, uses, transposed, less_one))
        return found

    def _unless_shared(self, parameter: str, holder: Holder) -> Holder | str:
        """Refuse an initializer that exporters let several equal parameters share."""
        if holder.value.name == parameter and len(holder.uses) == 1:
            return holder
        tensor = self._parameters[parameter].detach()
        for name, other in self._parameters.items():
            if other.data_ptr() == tensor.data_ptr() or other.shape != tensor.shape:
                continue
            if name not in self._graph.initializers and torch.equal(other.detach(), tensor):
                return f"the graph may have one constant for it and {name}, which is equal"
        return holder


class GraphHolders:
    """Finds parameters by the names that a graph has for them.

    Args:
        graph: The graph, before slots are put in.
        named: All its sites with their modules' names.
        as_stored: What has a parameter's name lies as that does, ``Conv1D``'s ``[in, out]`` too:
            so it is where PyTorch exported the graph. ``[out, in]`` is taken for granted else.
        added_to_gains: What norms have added to their weights, see `added_to_gains`.
    """

    def __init__(
        self,
        graph: ir.Graph,
        named: Iterable[NamedSite],
        *,
        as_stored: bool = False,
        added_to_gains: int | None = 0,
    ) -> None:
        self._graph = graph
        self._added_to_gains = added_to_gains
        self._as_stored = as_stored
        copies = [value for value in _stored(graph) for value in _copies(value)]
        self._by_name = {
            value.name: value
            for value in (*_stored(graph), *copies)
            if value.name and "." in value.name and is_module_path(value.name)
        }
        self._by_site: dict[str, tuple[ir.Value, NamedSite | None]] = {}
        self._elsewhere: set[str] = set()  # the modules' operators read something else
        for entry in named:
            inside = entry.site.expose is not None
            if inside and not entry.site.quantized:  # a larger operator may hold other weights
                continue
            name = weight_name(entry.path)
            root = None if entry.site.quantized else _root(entry.site.node)
            if root is not None:
                self._by_site.setdefault(name, (root, entry))
            elif (stored := weight_of(entry.site)) is not None and stored.name != name:
                self._elsewhere.add(name)
            if entry.site.bias_input is not None and not inside:
                bias = entry.site.node.inputs[entry.site.bias_input]
                if bias is not None and bias.const_value is not None:
                    self._by_site.setdefault(bias_name(entry.path), (bias, None))

    def parameters(self) -> Iterable[str]:
        """Return the names of initializers, and of the parameters of modules with a name."""
        return dict.fromkeys((*self._by_site, *self._by_name, *self._elsewhere))

    def find(self, parameter: str) -> Holder | str:
        """Return the initializer of this name, or of the module's operator."""
        if parameter in self._by_site:
            value, entry = self._by_site[parameter]
            if entry is None:
                uses = self._own_uses(value)
                return _MAYBE_SHARED if len(uses) > 1 else Holder(value, uses, transposed=False)
            node = entry.site.node
            uses = tuple(use for use in value.uses() if _leads_to(use.node, node))
            own = self._as_stored and value.name == parameter
            transposed = False if own else _stored_transposed(value, entry)
            if not uses or transposed is None:
                return NOT_AS_IT_IS
            return Holder(value, uses, transposed)
        if parameter in self._elsewhere:  # what has its name is another's: a tied embedding's
            return NOT_AS_IT_IS
        value = self._by_name[parameter]
        if len(self._own_uses(value)) > 1:
            return _MAYBE_SHARED
        if value.const_value is None:
            value = self._by_name[parameter] = _apart(self._graph, value)
        holder = Holder(value, self._own_uses(value), transposed=False)
        return self._gain(holder) if is_gain(value) else holder

    def _gain(self, holder: Holder) -> Holder | str:
        """Return the place of a norm's weight, to which the graph may have added one."""
        if self._added_to_gains == 0:
            return holder
        if self._added_to_gains is None:
            return _EITHER_GAIN
        own = _less_one(holder.value)
        return _INEXACT_GAIN if own is None else replace(holder, less_one=own)

    def _own_uses(self, value: ir.Value) -> tuple[Use, ...]:
        """Return where a constant is read, but for copies of it that are other parameters."""
        others = {id(copy) for copy in _copies(value) if copy.name in self._by_name}
        return tuple(use for use in value.uses() if id(use.node.outputs[0]) not in others)


def _copies(value: ir.Value) -> list[ir.Value]:
    """Return the copies of a constant: TorchScript's exporter makes them of equal parameters."""
    readers = [use.node for use in value.uses() if use.node.op_type == "Identity"]
    return [node.outputs[0] for node in readers if not node.outputs[0].is_graph_output()]


def _apart(graph: ir.Graph, copy: ir.Value) -> ir.Value:
    """Make a copy of a constant a constant of its own, in place."""
    node = copy.producer()
    assert node is not None
    source = node.inputs[0]
    assert source is not None
    value = ir.Value(
        name=copy.name, shape=source.shape, type=source.type, const_value=source.const_value
    )
    copy.replace_all_uses_with(value)
    owner = node.graph
    assert isinstance(owner, ir.Graph)
    owner.remove(node, safe=True)
    graph.register_initializer(value)
    return value


def _stored(graph: ir.Graph) -> list[ir.Value]:
    """Return the initializers of floats that are no inputs."""
    inputs = {value.name for value in graph.inputs}
    return [
        value
        for value in graph.initializers.values()
        if value.name not in inputs
        and value.const_value is not None
        and value.const_value.dtype.name in TORCH_DTYPES
    ]


def _holds(value: ir.Value, tensor: torch.Tensor, adding: torch.dtype | None) -> bool | None:
    """Tell whether an initializer is a tensor (``False``) or its transpose (``True``).

    Args:
        value: The initializer.
        tensor: The tensor.
        adding: Type in which one is added to it first; nothing is added unless told.
    """
    stored = value.const_value
    assert stored is not None
    shape, wanted = tuple(stored.shape.numpy()), tuple(tensor.shape)
    dtype = TORCH_DTYPES[stored.dtype.name]
    for turned in (False, True):
        if turned and len(wanted) != 2:
            return None
        ours = tensor.T if turned else tensor
        if shape != tuple(ours.shape):
            continue
        array = stored.numpy()
        # A first row tells most apart; whole weights are large.
        if all(
            torch.equal(
                torch.from_numpy(np.array(part, np.float32)), _as(dtype, mine, adding).float()
            )
            for part, mine in ((array[:1], ours[:1]), (array, ours))
        ):
            return turned
    return None


def _as(dtype: torch.dtype, tensor: torch.Tensor, adding: torch.dtype | None) -> torch.Tensor:
    own = tensor.cpu()
    return own.to(dtype) if adding is None else (own.to(adding) + 1).to(dtype)


def _less_one(value: ir.Value, tensor: torch.Tensor | None = None) -> torch.Tensor | None:
    """Return what gives a constant when one is added, all in its type; ``None`` if nothing does.

    Args:
        value: The constant.
        tensor: What it is rather than one less than the constant, if it can be.
    """
    stored = value.const_value
    assert stored is not None
    dtype = TORCH_DTYPES[stored.dtype.name]
    known = torch.from_numpy(np.array(stored.numpy(), np.float32)).to(dtype)
    candidates = [known - 1] if tensor is None else [tensor.cpu().to(dtype), known - 1]
    return next((own for own in candidates if torch.equal(own + 1, known)), None)


def _looks_up(use: Use) -> bool:
    node = use.node
    if node.op_type in ("Transpose", "Identity"):
        return any(_looks_up(reader) for reader in node.outputs[0].uses())
    return node.op_type == "Gather" and use.idx == 0


def _root(node: ir.Node) -> ir.Value | None:
    """Return the initializer that an operator's matrix is, maybe through a ``Transpose``."""
    for value in node.inputs:
        seen = value
        while seen is not None:
            if seen.const_value is not None:
                if len(seen.const_value.shape) >= 2:
                    return seen
                break
            producer = seen.producer()
            if producer is None or producer.op_type not in ("Transpose", "Identity"):
                break
            seen = producer.inputs[0]
    return None


def _leads_to(node: ir.Node, target: ir.Node) -> bool:
    if node is target:
        return True
    if node.op_type not in ("Transpose", "Identity"):
        return False
    return any(_leads_to(use.node, target) for use in node.outputs[0].uses())


def _stored_transposed(value: ir.Value, entry: NamedSite) -> bool | None:
    """Tell how a weight lies beside the module's own ``[out, in]``; ``None`` if neither way."""
    stored = value.const_value
    assert stored is not None
    if entry.site.kind is not ModuleKind.LINEAR:
        return False
    array, weight = stored.numpy(), entry.site.weight()  # [in, out]
    if array.shape == weight.shape and np.array_equal(array, weight):
        return True
    if array.shape == weight.T.shape and np.array_equal(array, weight.T):
        return False
    return None
