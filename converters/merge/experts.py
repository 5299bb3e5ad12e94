"""Parameters that are several tensors, or hold several matrices: above all fused experts.

PEFT's factors of a fused parameter are ``A`` ``[experts * r, in]``, one expert after the other,
and ``B`` ``[out, r * experts]``, in which the experts vary fastest. An adapter of an older model
has a pair of its own for each expert, and each of the matrices that lie one under the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from converters.merge.arithmetic import Change
from converters.merge.codes import told_of
from converters.merge.layout import Piece
from converters.merge.sources import FLOATING, Source
from converters.merge.stored_names import Place
from converters.merge.targets import Said
from loraport.adapter import LoraModule, ModuleKind, Replacement
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch


def is_of_pieces(one: Said) -> bool:
    """Tell whether something is about experts, or a part, of a parameter."""
    experts = one.module is not None and one.module.kind is ModuleKind.EXPERTS
    return experts or one.part is not None


def is_part(piece: Piece, part: Place | None) -> bool:
    """Tell whether a tensor is the part that an adapter names, and nothing else."""
    if part is None or piece.whole:
        return False
    return (piece.expert, piece.section) == (part.expert, part.section)


def require_float(
    pieces: Sequence[Piece], sources: Mapping[str, Source], quantized: str | None
) -> None:
    """Refuse tensors that are no plain floats; ``quantized`` is what the base's config tells.

    Raises:
        LoraportError: Naming the first one.
    """
    for piece in pieces:
        dtype = sources[piece.tensor].dtype
        if dtype not in FLOATING:
            told, remedy = told_of(dtype, quantized)
            got = f"{piece.tensor} {told}"
            raise LoraportError(f"expected a float tensor in the base, got {got}; {remedy}")


def piece_changes(
    one: Said,
    pieces: tuple[Piece, ...],
    sources: Mapping[str, Source],
    transposed: bool | None,
) -> Iterator[tuple[str, Change]]:
    """Yield the changes of the stored tensors that an adapter's module comes to.

    Args:
        one: What the adapter says.
        pieces: Where the parameter is stored.
        sources: The base's tensors.
        transposed: The experts are ``[in, out]``; ``None`` to tell from the shapes.

    Raises:
        LoraportError: If shapes or numbers of experts do not fit, or it has no place there.
    """
    module, strength = one.module, one.adapter.strength
    if module is None:
        raise LoraportError("expected LoRA, got a part of a parameter saved in full, or a bias")
    if one.part is not None:
        yield _part_change(module, one.part, pieces, sources, strength)
    elif module.kind is ModuleKind.EXPERTS:
        yield from _expert_changes(module, pieces, sources, strength, transposed)
    else:
        yield from _row_changes(module, pieces, sources, strength)


def replaced_pieces(
    replacement: Replacement, pieces: tuple[Piece, ...], sources: Mapping[str, Source]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a replaced parameter comes to in each of its tensors.

    Raises:
        LoraportError: If the shapes do not fit.
    """
    tensor = replacement.tensor
    rows = sum(piece.rows or 0 for piece in pieces)
    experts = len({piece.expert for piece in pieces})
    for piece in pieces:
        part = tensor
        if not piece.whole and piece.rows is not None:
            if tensor.shape[:-1].numel() != rows or (piece.expert is not None) != (
                tensor.dim() == 3 and tensor.shape[0] == experts
            ):
                raise LoraportError(f"expected {rows} rows altogether, got {list(tensor.shape)}")
            whole = tensor if piece.expert is None else tensor[piece.expert]
            part = whole[piece.first_row : piece.first_row + piece.rows]
        if replacement.rows is not None or tuple(part.shape) != sources[piece.tensor].shape:
            raise LoraportError(
                f"{piece.tensor}: expected {list(sources[piece.tensor].shape)}, "
                f"got {list(part.shape)}"
            )
        yield piece.tensor, part


def _part_change(
    module: LoraModule,
    part: Place,
    pieces: tuple[Piece, ...],
    sources: Mapping[str, Source],
    strength: float,
) -> tuple[str, Change]:
    """Return the change of one expert's matrix where all experts are one tensor."""
    out, features = int(module.lora_B.shape[0]), int(module.lora_A.shape[1])
    name = pieces[0].tensor
    shape = sources[name].shape
    expected = [part.sections * out, features]
    if len(pieces) > 1 or part.expert is None or len(shape) != 3 or list(shape[1:]) != expected:
        raise LoraportError(
            f"{name}: expected experts of {part.sections} x [{out}, {features}], one under the "
            f"other, got {list(shape)}"
        )
    if part.expert >= shape[0]:
        raise LoraportError(f"{name}: expected an expert below {shape[0]}, got {part.expert}")
    return name, Change(
        strength,
        module.lora_B,
        module.lora_A,
        module.scaling,
        magnitude=module.magnitude,
        first_row=part.expert * shape[1] + part.section * out,
    )


def _row_changes(
    module: LoraModule, pieces: tuple[Piece, ...], sources: Mapping[str, Source], strength: float
) -> Iterator[tuple[str, Change]]:
    """Yield the changes of a linear layer whose weight is stored as several, stacked by rows."""
    out, features = int(module.lora_B.shape[0]), int(module.lora_A.shape[1])
    fit = all(sources[piece.tensor].shape[1:] == (features,) for piece in pieces)
    rows = sum(piece.rows or 0 for piece in pieces)
    if any(piece.expert is not None for piece in pieces) or not fit or rows != out:
        raise LoraportError(
            f"expected rows of [{out}, {features}], got "
            + ", ".join(f"{piece.tensor} {list(sources[piece.tensor].shape)}" for piece in pieces)
        )
    for piece in pieces:
        own = slice(piece.first_row, piece.first_row + (piece.rows or 0))
        magnitude = None if module.magnitude is None else module.magnitude.flatten()[own]
        change = Change(
            strength, module.lora_B[own], module.lora_A, module.scaling, magnitude=magnitude
        )
        yield piece.tensor, change


def _expert_changes(
    module: LoraModule,
    pieces: tuple[Piece, ...],
    sources: Mapping[str, Source],
    strength: float,
    transposed: bool | None,
) -> Iterator[tuple[str, Change]]:
    out, features = int(module.lora_B.shape[0]), int(module.lora_A.shape[1])
    fused = pieces[0].whole
    _check_complete(module, pieces, sources, fused=fused)
    for piece in pieces:
        shape = sources[piece.tensor].shape
        if not fused:
            first = piece.first_row
            if piece.expert is None or shape[1:] != (features,) or first + shape[0] > out:
                raise LoraportError(
                    f"{piece.tensor}: expected rows of an expert [{out}, {features}], "
                    f"got {list(shape)}"
                )
            left, right = _factors(module, piece.expert)
            yield (
                piece.tensor,
                Change(strength, left[first : first + shape[0]], right, module.scaling),
            )
            continue
        # PEFT takes a parameter of two dimensions for [out, in], whatever module it is of.
        known = False if len(shape) == 2 else transposed
        turned = _turned(shape[-2:], (out, features), known, piece.tensor)
        for expert in range(module.experts):
            left, right = _factors(module, expert)
            if turned:
                left, right = right.T, left.T
            yield (
                piece.tensor,
                Change(strength, left, right, module.scaling, first_row=expert * shape[-2]),
            )


def _factors(module: LoraModule, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = module.lora_A.reshape(module.experts, module.rank, -1)[expert]
    b = module.lora_B.reshape(module.lora_B.shape[0], module.rank, module.experts)[:, :, expert]
    return b, a


def _check_complete(
    module: LoraModule, pieces: tuple[Piece, ...], sources: Mapping[str, Source], *, fused: bool
) -> None:
    if fused:
        shape = sources[pieces[0].tensor].shape
        found = shape[0] if len(shape) == 3 else 1
    else:
        found = len({piece.expert for piece in pieces})
        rows = sum(sources[piece.tensor].shape[0] for piece in pieces)
        if rows != found * module.lora_B.shape[0]:
            raise LoraportError(
                f"expected {module.lora_B.shape[0]} rows for each of {found} experts, "
                f"got {rows} altogether"
            )
    if found != module.experts:
        raise LoraportError(f"expected {module.experts} experts, got {found}")


def _turned(found: tuple[int, ...], plain: tuple[int, int], known: bool | None, name: str) -> bool:
    turned = plain[::-1]
    if found not in (plain, turned):
        raise LoraportError(f"{name}: expected [{plain[0]}, {plain[1]}] each, got {list(found)}")
    if plain != turned:
        return found == turned
    if known is None:
        raise LoraportError(
            f"{name}: square experts, which may be stored either way round; the model's class "
            "would tell, and transformers does not know it"
        )
    return known
