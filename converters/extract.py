"""Turn a full fine-tune into an adapter: the difference of two checkpoints, factored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.low_rank import Factors, factor_matrix
from converters.merge.base import BaseCheckpoint, open_base
from converters.merge.layout import BaseLayout, base_layout
from converters.merge.sources import FLOATING, OpenFiles, Source, open_files
from loraport.adapter import Adapter, LoraModule, ModuleKind, Replacement
from loraport.errors import LoraportError, Problems
from loraport.fingerprint import BaseFingerprint, hash_weight

if TYPE_CHECKING:
    import torch


_UNKNOWN = (
    "transformers does not know this model: every matrix is taken for a linear layer's weight "
    "[out, in]; embeddings and weights stored [in, out] need the model's config.json beside them"
)


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract.

    Attributes:
        base: The model the fine-tune started from.
        tuned: The fine-tuned model.
        rank: Rank of every module.
        energy: Or the share of each difference's energy to keep.
    """

    base: str
    tuned: str
    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Extracted:
    """An adapter made from two checkpoints.

    Attributes:
        adapter: The adapter.
        errors: Module → relative error of its update.
        unchanged: Number of tensors that are the same in both.
        notes: What the user should know.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    unchanged: int
    notes: tuple[str, ...] = ()


def extract(options: ExtractOptions, progress: Callable[[int, int], None]) -> Extracted:
    """Factor what a fine-tune changed.

    Differences of weights are factored by a truncated SVD in float64; biases, norms and every
    other one-dimensional parameter that differs are stored whole.

    Args:
        options: What to extract.
        progress: Told how many more bytes of the base were compared, and of how many.

    Raises:
        LoraportError: If the checkpoints cannot be read or are not of the same model.
    """
    if (options.rank is None) == (options.energy is None):
        raise LoraportError("extract: expected either a rank or an energy")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise LoraportError(f"--energy: expected a share above 0 and up to 1, got {options.energy}")
    base, tuned = open_base(options.base), open_base(options.tuned)
    before, after = _parameters(base), _parameters(tuned)
    _check_same_model(before, after)
    layout = _layout(base)
    modules: dict[str, LoraModule] = {}
    replacements: dict[str, Replacement] = {}
    errors: dict[str, float] = {}
    hashes: dict[str, str] = {}
    unchanged = 0
    total = sum(math.prod(source.shape) * FLOATING[source.dtype] for source in before.values())
    with open_files() as files:
        for parameter, source in before.items():
            old, new = _read(source, files), _read(after[parameter], files)
            progress(old.nbytes, total)
            if old.double().equal(new.double()):
                unchanged += 1
                continue
            path, _, leaf = parameter.rpartition(".")
            if leaf != "weight" or old.dim() < 2:
                replacements[parameter] = Replacement(new.clone())
                continue
            modules[path], factors = _module(path, old, new, layout, options)
            errors[path] = factors.error
            hashes[path] = hash_weight(old)
    if not modules and not replacements:
        raise LoraportError(f"{options.tuned} does not differ from {options.base}")
    adapter = Adapter(
        modules=modules,
        replacements=replacements,
        base_model=options.base,
        base_fingerprint=BaseFingerprint(hashes) if hashes else None,
    )
    return Extracted(adapter, errors, unchanged, () if layout.known else (_UNKNOWN,))


def _module(
    path: str, old: torch.Tensor, new: torch.Tensor, layout: BaseLayout, options: ExtractOptions
) -> tuple[LoraModule, Factors]:
    delta = new.double() - old.double()
    kind = ModuleKind.CONV if old.dim() > 2 else ModuleKind.LINEAR
    if f"{path}.weight" in layout.input_embeddings:
        kind = ModuleKind.EMBEDDING
    transposed = kind is ModuleKind.EMBEDDING or path in layout.conv1d
    matrix = delta.T if transposed else delta.flatten(1)
    factors = factor_matrix(matrix, options.rank, options.energy)
    a, b = factors.a, factors.b
    if kind is ModuleKind.CONV:
        a = a.reshape(-1, *old.shape[1:])
        b = b.reshape(*b.shape, *(1 for _ in old.shape[2:]))
    return (
        LoraModule(
            kind=kind,
            lora_A=a,
            lora_B=b,
            alpha=float(factors.rank),  # scaling 1
            fan_in_fan_out=path in layout.conv1d,
        ),
        factors,
    )


def _parameters(checkpoint: BaseCheckpoint) -> dict[str, Source]:
    """Return float tensors by the name of the parameter they hold."""
    layout = _layout(checkpoint)
    sources = checkpoint.sources()
    found = {}
    for parameter, pieces in layout.pieces.items():
        if len(pieces) > 1 or pieces[0].expert is not None:
            # Experts stored one by one are matrices of their own; PEFT names none of them.
            raise LoraportError(
                f"{parameter}: expected one tensor, got {len(pieces)} experts; mixtures of "
                "experts cannot be extracted"
            )
        if sources[pieces[0].tensor].dtype in FLOATING:
            found[parameter] = sources[pieces[0].tensor]
    return found


def _layout(checkpoint: BaseCheckpoint) -> BaseLayout:
    shapes = {name: source.shape for name, source in checkpoint.sources().items()}
    return base_layout(checkpoint.directory if checkpoint.config else None, shapes)


def _check_same_model(before: Mapping[str, Source], after: Mapping[str, Source]) -> None:
    problems = Problems()
    for name in sorted(before.keys() ^ after.keys()):
        where = "base" if name in before else "tuned model"
        problems.add(name, "it in both models", f"it in the {where} only")
    for name in before.keys() & after.keys():
        if before[name].shape != after[name].shape:
            problems.add(name, f"{list(before[name].shape)}", f"{list(after[name].shape)}")
    problems.raise_if_any("the two models are not the same but for their values")


def _read(source: Source, files: OpenFiles) -> torch.Tensor:
    # The next read overwrites what this one returns, and two weights are compared.
    return source.read(files, 0, math.prod(source.shape)).clone().reshape(source.shape)
