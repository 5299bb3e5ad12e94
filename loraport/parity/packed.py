"""Compare a packed adapter's tensors with the adapter they were packed from."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch

from loraport.adapter import ModuleKind
from loraport.bundle.slots import Slot, SlotMember, SlotTable
from loraport.naming import bias_name, weight_name
from loraport.parity.changes import Changes, NewValue, Original, Term, rows_update

# The packed tensors hold the adapter with one rounding of B to the slot's element type.
_RELATIVE = {"FLOAT": 1e-6, "FLOAT16": 1e-3, "BFLOAT16": 8e-3, "DOUBLE": 1e-6}

Product = tuple[torch.Tensor, torch.Tensor]  # [out, k] and [k, in], float64


def differences(
    tensors: Mapping[str, torch.Tensor],
    table: SlotTable,
    changes: Changes,
    original: Original,
    computed: Original | None = None,
) -> list[str]:
    """Return what of one adapter is not, or not rightly, in its packed tensors.

    Args:
        tensors: Graph input → tensor.
        table: The slot table.
        changes: What the adapter alone does at strength 1.
        original: Gives the base's parameters by path.
        computed: Gives those that the graph computes with, where they are rounded: trained rows
            replace them.
    """
    computed = computed or original
    wrong = []
    places = table.modules()
    rows = {
        name.removesuffix(".weight"): found
        for name, found in changes.replaced.items()
        if found[0].replacement.rows is not None
    }
    biases = _biases(table, changes, original)
    served: set[str] = set()
    for path in dict.fromkeys((*changes.terms, *rows, *biases)):
        if path not in places:
            wrong.append(f"{path}: no slot")
            continue
        slot, member = places[path]
        served.add(slot.name)
        if slot.input_a not in tensors:
            wrong.append(f"{path}: no tensors for slot {slot.name}")
            continue
        expected = [_of_term(term) for term in changes.terms.get(path, ())]
        if path in rows:
            expected.append(_of_rows(rows[path], slot, computed(weight_name(path))))
        terms = changes.terms.get(path, ())
        wrong += _module(path, slot, member, tensors, expected, terms, biases.get(path))
    wrong += [
        f"{name}: not in the source adapter"
        for slot in table.slots
        for name in (entry.name for entry in slot.inputs.values())
        if slot.name not in served and name in tensors
    ]
    return wrong + _replaced(tensors, table, changes, folded=set(map(bias_name, biases)))


def _biases(table: SlotTable, changes: Changes, original: Original) -> dict[str, torch.Tensor]:
    """Return module path → what a trained bias adds, where a slot's bias input takes it."""
    places = table.modules()
    whole = {slot.parameter for slot in table.replacements}
    found = {}
    for name, values in changes.replaced.items():
        path = name.removesuffix(".bias")
        if path != name and name not in whole and path in places and places[path][0].bias:
            tensor = values[0].replacement.tensor
            found[path] = tensor.double() - original(name).detach().cpu().double()
    return found


def _module(
    path: str,
    slot: Slot,
    member: SlotMember,
    tensors: Mapping[str, torch.Tensor],
    expected: Sequence[Product],
    terms: Sequence[Term],
    moved_bias: torch.Tensor | None,
) -> list[str]:
    own = slice(member.start, member.stop)
    a, b = tensors[slot.input_a].double(), tensors[slot.input_b].double()
    flat = slot.kind is ModuleKind.CONV
    right, left = (a.flatten(1), b.flatten(1)) if flat else (a.T, b.T)
    allowed = _RELATIVE[slot.dtype]
    wrong = []
    error = _relative_error((left[own], right), expected)
    if not error <= allowed:
        wrong.append(f"{path}: relative error {error:.2g}")
    for role, neutral in (("gain", 1.0), ("bias", 0.0)):
        wanted = torch.full((member.stop - member.start,), neutral, dtype=torch.float64)
        for term in terms:
            value = getattr(term.update, role)
            wanted = wanted if value is None else value.double().flatten()
        if role == "bias" and moved_bias is not None:
            wanted = wanted + moved_bias
        name = getattr(slot, f"input_{role}")
        got = tensors[name].double()[own] if name in tensors else torch.full_like(wanted, neutral)
        off = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not off <= allowed:
            wrong.append(f"{path}: relative error of its {role} {off:.2g}")
    return wrong


def _of_term(term: Term) -> Product:
    update = term.update
    left = update.b.double() * update.scaling
    if update.gain is not None:
        left = left * update.gain.double()[:, None]
    return left, update.a.double()


def _of_rows(values: Sequence[NewValue], slot: Slot, weight: torch.Tensor) -> Product:
    """Return replaced rows of a matrix ``[vocab, dim]`` as a product."""
    lookup = slot.kind is ModuleKind.EMBEDDING
    update = rows_update(values[0].replacement, weight.detach().cpu(), lookup)
    return update.b, update.a


def _relative_error(got: Product, expected: Sequence[Product]) -> float:
    """Return ``||got - Σ expected|| / ||Σ expected||``, without forming the matrices."""
    lefts, rights = [left for left, _ in expected], [right for _, right in expected]
    if not expected:  # a trained bias alone
        return float("nan") if not _finite(*got) else float(_norm(got[0], [got[1]]))
    distance = _norm(torch.cat([got[0], *(-left for left in lefts)], 1), [got[1], *rights])
    return distance / max(_norm(torch.cat(lefts, 1), rights), 1e-30)


def _norm(left: torch.Tensor, rights: Sequence[torch.Tensor]) -> float:
    right = torch.cat(list(rights))
    if not _finite(left, right):
        return float("nan")
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T).norm())


def _finite(*tensors: torch.Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _replaced(
    tensors: Mapping[str, torch.Tensor], table: SlotTable, changes: Changes, folded: Container[str]
) -> list[str]:
    wrong = []
    places = {slot.parameter: slot for slot in table.replacements}
    whole = {
        name: found[0].replacement.tensor
        for name, found in changes.replaced.items()
        if found[0].replacement.rows is None and name not in folded
    }
    for name, tensor in whole.items():
        if name not in places:
            wrong.append(f"{name}: no slot for a whole parameter")
        elif places[name].input not in tensors:
            wrong.append(f"{name}: no tensor {places[name].input}")
        else:
            got = tensors[places[name].input]
            wanted = tensor.T if places[name].transposed else tensor
            if got.shape != wanted.shape or not torch.equal(got, wanted.to(got)):
                wrong.append(f"{name}: another value")
    wrong += [
        f"{slot.input}: not in the source adapter"
        for slot in table.replacements
        if slot.input in tensors and slot.parameter not in whole
    ]
    return wrong
