"""The best low-rank factors of a matrix, by singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraport.errors import LoraportError
from loraport.option_checks import is_finite, is_whole, shown

if TYPE_CHECKING:
    import torch


_LARGE = 1024  # shorter side from which a full decomposition is not worth its time
_SMALL_RANK = 4  # and the rank is this many times smaller
_POWER_STEPS = 6


@dataclass(frozen=True, eq=False)
class Factors:
    """``b @ a`` approximates a matrix.

    Attributes:
        a: ``[r, in]`` float32.
        b: ``[out, r]`` float32.
        error: ``||matrix - b a|| / ||matrix||`` in the Frobenius norm, of the factors as
            they are here; 0 for a zero matrix.
    """

    a: torch.Tensor
    b: torch.Tensor
    error: float

    @property
    def rank(self) -> int:
        """Number of rows of ``a``."""
        return int(self.a.shape[0])


def truncate(
    left: torch.Tensor, singular: torch.Tensor, right: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 ``b`` and ``a`` of rank ``kept``, each with the roots of the values."""
    root = singular[:kept].sqrt()
    return (left[:, :kept] * root).float(), (root[:, None] * right[:kept]).float()


def rank_for(singular: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """Return how many singular values to keep, at least 1.

    Args:
        singular: All of them, falling.
        rank: So many, or as many as there are.
        energy: Or the fewest whose squares make up this share of all squares.
    """
    import torch

    available = max(1, len(singular))
    if rank is not None:
        return min(rank, available)
    assert energy is not None
    share = singular.square().cumsum(0)
    if share[-1] == 0:
        return 1
    wanted = torch.tensor(energy, dtype=share.dtype) * share[-1]
    return min(available, int((share < wanted).sum()) + 1)


def factor_matrix(
    matrix: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> Factors:
    """Return the best factors of a matrix, see `rank_for`.

    The singular vectors of the shorter side come from the Gram matrix in float64, which is much
    faster than a full decomposition and exact far beyond float32. Where the matrix is large and
    the rank small they come from subspace iteration (Halko et al. 2011, arXiv:0909.4061).

    Args:
        matrix: ``[out, in]``; computed in float64.
        rank: Rank to keep.
        energy: Or share of the energy to keep.
    """
    import torch

    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = matrix if wide else matrix.T
    shorter = rows.shape[0]
    if rank is not None and shorter > _LARGE and _SMALL_RANK * rank < shorter:
        vectors = _leading_vectors(rows, rank)
        kept = rank
    else:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        vectors = vectors.flip(1)
        kept = rank_for(values.flip(0).clamp(min=0).sqrt(), rank, energy)
    vectors = vectors[:, :kept]
    other = vectors.T @ rows
    # Both factors get the root of each singular value, so that neither is tiny.
    root = other.norm(dim=1).sqrt()
    root[root == 0] = 1
    near, far = (vectors * root).float(), (other / root[:, None]).float()
    b, a = (near, far) if wide else (far.T.contiguous(), near.T.contiguous())
    return Factors(a, b, _relative(matrix - b.double() @ a.double(), matrix))


def _leading_vectors(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the ``rank`` leading left singular vectors, by subspace iteration."""
    import torch

    generator = torch.Generator().manual_seed(0)
    width = 2 * rank + 16
    start = torch.randn(rows.shape[1], width, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(rows @ start).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(rows @ torch.linalg.qr(rows.T @ basis).Q).Q
    small = basis.T @ rows
    vectors = torch.linalg.eigh(small @ small.T).eigenvectors.flip(1)
    leading: torch.Tensor = basis @ vectors[:, :rank]
    return leading


def refactor(
    b: torch.Tensor, a: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> Factors:
    """Return the best factors of lower rank of ``b @ a``, without forming it.

    Args:
        b: ``[out, r]``.
        a: ``[r, in]``.
        rank: Rank to keep.
        energy: Or share of the energy to keep.
    """
    import torch

    q_left, r_left = torch.linalg.qr(b.double())
    q_right, r_right = torch.linalg.qr(a.double().T)
    core = r_left @ r_right.T
    left, singular, right = torch.linalg.svd(core, full_matrices=False)
    new_b, new_a = truncate(
        q_left @ left, singular, right @ q_right.T, rank_for(singular, rank, energy)
    )
    # ||b a - b' a'|| through the small factors of [b, -b'] and [a; a'].
    wide_b = torch.cat([b.double(), -new_b.double()], dim=1)
    wide_a = torch.cat([a.double(), new_a.double()])
    rest = torch.linalg.qr(wide_b).R @ torch.linalg.qr(wide_a.T).R.T
    return Factors(new_a, new_b, _relative(rest, core))


def _relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    norm = float(whole.norm())
    return float(difference.norm()) / norm if norm else 0.0


def require_kept(rank: int | None, energy: float | None) -> None:
    """Refuse a rank that is no count, and an energy that is no share of a whole.

    Raises:
        LoraportError: If the rank is no whole number above 0, or the energy not above 0 and up
            to 1.
    """
    if rank is not None and not (is_whole(rank) and rank >= 1):
        raise LoraportError(f"--rank: expected a whole number, at least 1, got {shown(rank)}")
    if energy is not None and not (is_finite(energy) and 0 < energy <= 1):
        raise LoraportError(f"--energy: expected a share above 0 and up to 1, got {shown(energy)}")
