"""Fused experts: each expert has a low-rank update of its own.

PEFT's factors of a fused parameter are ``A`` ``[experts * r, in]``, one expert after the other,
and ``B`` ``[out, r * experts]``, in which the experts vary fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from converters.merge.arithmetic import Change
from converters.merge.layout import Piece
from converters.merge.sources import FLOATING, Source
from loraport.adapter import LoraModule
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch


def expert_changes(
    module: LoraModule,
    pieces: tuple[Piece, ...],
    sources: Mapping[str, Source],
    strength: float,
    *,
    is_transposed: bool | None = None,
) -> Iterator[tuple[str, Change]]:
    """Yield the changes of every stored tensor of a fused parameter.

    Args:
        module: The update of the whole parameter.
        pieces: Where it is stored.
        sources: The base's tensors.
        strength: Factor on the change.
        is_transposed: The experts are ``[in, out]``; ``None`` to tell from the shapes.

    Raises:
        LoraportError: If shapes or numbers of experts do not fit.
    """
    out, features = int(module.lora_B.shape[0]), int(module.lora_A.shape[1])
    fused = len(pieces) == 1 and pieces[0].expert is None
    _check_complete(module, pieces, sources, fused=fused)
    for piece in pieces:
        shape = sources[piece.tensor].shape
        if sources[piece.tensor].dtype not in FLOATING:
            raise LoraportError(
                f"{piece.tensor}: expected a float tensor, got {sources[piece.tensor].dtype}; "
                "merge into the float model it was made from"
            )
        if not fused:
            first = piece.first_row
            if piece.expert is None or shape[1] != features or first + shape[0] > out:
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
        turned = _turned(shape[-2:], (out, features), is_transposed, piece.tensor)
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
