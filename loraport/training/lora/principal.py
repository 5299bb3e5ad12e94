"""Initial matrices taken from the base weight itself: PiSSA and OLoRA.

Both begin with ``A0`` and ``B0`` that are not zero and take ``scaling * B0 A0`` off the base, so
that the model starts as it was. Here the base stays as it is: the layer computes
``W x + scaling * (B A - B0 A0) x``, which is a plain adapter of twice the rank and is saved as
that. So nothing is rounded into the base, it may be quantized, and there is no base to ship.
"""

from __future__ import annotations

import torch

from loraport.errors import LoraportError

_WHOLE_UP_TO = 1024  # smaller side of a weight that is decomposed wholly; larger ones iteratively
_ITERATIONS, _MORE = 8, 8


@torch.no_grad()
def principal_matrices(
    weight: torch.Tensor, rank: int, scaling: float, init: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A0`` ``[rank, in]`` and ``B0`` ``[out, rank]``.

    Args:
        weight: ``[out, in]``, in the dtype of the result.
        rank: Of the two.
        scaling: Factor on their product.
        init: ``pissa``: the weight's principal singular vectors, each side with the root of the
            singular value (Meng et al. 2024, arXiv:2404.02948). ``olora``: the first columns of
            Q and rows of R of its QR decomposition (Büyükakyüz 2024, arXiv:2406.01775).
        seed: Of the subspace that an iterative decomposition of large weights begins with.

    Raises:
        LoraportError: If the rank is larger than the weight's.
    """
    most = min(weight.shape)
    if rank > most:
        raise LoraportError(f"init {init}: expected a rank up to the weight's {most}, got {rank}")
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        # Copies, or all of R and Q would stay in memory.
        return r[:rank].clone(), q[:, :rank].clone()
    u, values, v = _singular(weight, rank, seed)
    roots = (values / scaling).sqrt()
    return roots[:, None] * v.T, u * roots


def _singular(
    weight: torch.Tensor, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``u [out, rank]``, values ``[rank]`` and ``v [in, rank]``."""
    if min(weight.shape) <= _WHOLE_UP_TO:
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], values[:rank], vh[:rank].T
    # What is taken for principal is subtracted again exactly, so it need not be exact itself.
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        u, values, v = torch.svd_lowrank(weight, q=rank + _MORE, niter=_ITERATIONS)
    return u[:, :rank], values[:rank], v[:, :rank]
