"""Turn a full fine-tune into an adapter: the difference of two checkpoints, factored."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters.low_rank import Factors, factor_matrix, require_kept
from converters.merge.base import BaseCheckpoint
from converters.merge.layout import BaseLayout
from converters.merge.opening import open_base
from converters.merge.sources import FLOATING, OpenFiles, open_files, torch_dtype
from converters.stored_parameters import (
    StoredParameter,
    checkpoint_layout,
    rounded_weights,
    stored_parameters,
)
from loraport.adapter import BATCH_COUNTER, Adapter, LoraModule, ModuleKind, Replacement
from loraport.errors import LoraportError, Problems
from loraport.fingerprint import BaseFingerprint, hash_weight

if TYPE_CHECKING:
    import torch


_UNKNOWN = (
    "transformers does not know this model: every matrix is taken for a linear layer's weight "
    "[out, in]; embeddings and weights stored [in, out] need the model's config.json beside them"
)
# What is stored of modules that are stored whole; a bias alone is stored by itself.
_WHOLE = frozenset({"weight", "running_mean", "running_var"})


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract; the models may be given as paths.

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", str(self.base))
        object.__setattr__(self, "tuned", str(self.tuned))


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

    Differences of weights are factored by a truncated SVD in float64, each expert's by itself;
    biases, norms and every other one-dimensional parameter that differs are stored whole, and so
    are convolutions with groups, and embeddings and heads of another vocabulary. What is tied is
    said of each parameter that shares the tensor. Routers are parameters as experts are, which is
    how PEFT adapts them, and of a module that is stored whole nothing is left out. A fine-tune in
    fewer bits than its base is compared with the base rounded to them: it was trained from that,
    or saved so.

    Args:
        options: What to extract.
        progress: Told how many more bytes of the base were compared, and of how many.

    Raises:
        LoraportError: If the checkpoints cannot be read, are not of the same model, or what
            changed is not finite.
    """
    if (options.rank is None) == (options.energy is None):
        raise LoraportError("extract: expected either a rank or an energy")
    require_kept(options.rank, options.energy)
    base, tuned = open_base(options.base), open_base(options.tuned)
    layout, tuned_layout = checkpoint_layout(base), checkpoint_layout(tuned)
    _require_floats({"base": (base, layout), "tuned model": (tuned, tuned_layout)})
    before = stored_parameters(base, layout)
    after = stored_parameters(tuned, tuned_layout)
    resized = _check_same_model(before, after, layout)
    modules: dict[str, LoraModule] = {}
    replacements: dict[str, Replacement] = {}
    errors: dict[str, float] = {}
    hashes: dict[str, str] = {}
    rounded: set[str] = set()
    unchanged = 0
    total = sum(stored.nbytes for stored in before.values())
    unhandled = {tensor for tensors in layout.unsupported.values() for tensor in tensors}
    with open_files() as files:
        for parameter, stored in before.items():
            rounded |= _rounded_to(stored, after[parameter])
            if stored.experts:
                found = _experts(parameter, stored, after[parameter], layout, options, files)
                progress(stored.nbytes, total)
                if found is None:
                    unchanged += 1
                else:
                    modules[parameter], errors[parameter] = found
                continue
            old, new = stored.read(files), after[parameter].read(files)
            progress(stored.nbytes, total)
            compared = old.to(new.dtype)
            if compared.equal(new):
                unchanged += 1
                continue
            if parameter in unhandled:
                raise LoraportError(
                    f"{parameter}: expected a tensor that is a parameter of the model as it is, "
                    "got one that transformers takes apart or puts together when it loads it; "
                    "save both models with transformers first"
                )
            _require_finite(parameter, compared, new)
            path, _, leaf = parameter.rpartition(".")
            whole = leaf != "weight" or old.dim() < 2 or path in layout.grouped
            if whole or parameter in resized:
                for name in (parameter, *_tied_to(parameter, before, layout)):
                    replacements[name] = Replacement(new)
                continue
            modules[path], factors = _module(path, compared, new, layout, options)
            errors[path] = factors.error
            hashes[path] = hash_weight(old)
            for name in _tied_to(parameter, before, layout):
                other = name.removesuffix(".weight")
                looked_up = [each in layout.input_embeddings for each in (parameter, name)]
                mirrored = looked_up[0] != looked_up[1]
                modules[other] = _mirrored(modules[path]) if mirrored else modules[path]
                errors[other] = factors.error
        _complete(replacements, after, files)
        counters = _counters(replacements, tuned, tuned_layout, files)
    if not modules and not replacements:
        raise LoraportError(f"{options.tuned} does not differ from {options.base}")
    modules, errors = _routers_as_parameters(modules, errors, layout)
    adapter = Adapter(
        modules=modules,
        replacements=replacements,
        base_model=options.base,
        base_fingerprint=BaseFingerprint(hashes) if hashes else None,
        counters=counters,
    )
    notes = [] if layout.known else [_UNKNOWN]
    if base.quantized is not None:
        notes.append(f"of the base ({base.quantized}) the dequantized weights are compared")
    if tuned.quantized is not None:
        notes.append(
            f"of the tuned model ({tuned.quantized}) the dequantized weights are compared: what "
            "its quantization rounded counts as changed"
        )
    if rounded:
        notes.append(
            f"the tuned model is stored in {', '.join(sorted(rounded))}, the base in more: it is "
            "compared with the base rounded to that, so that the rounding is no change"
        )
    if resized:
        rows = max(after[parameter].shape[0] for parameter in resized)
        notes.append(
            f"the tuned model's vocabulary has another size: {', '.join(sorted(resized))} stored "
            f"whole; `loraport merge` resizes the base, for PEFT resize it to {rows} rows first"
        )
    return Extracted(adapter, errors, unchanged, tuple(notes))


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


def _routers_as_parameters(
    modules: Mapping[str, LoraModule], errors: Mapping[str, float], layout: BaseLayout
) -> tuple[dict[str, LoraModule], dict[str, float]]:
    """Name the weights of routers as parameters: PEFT adapts no routers as modules."""
    bare = {name.removesuffix(".weight"): name for name in layout.bare}
    kinds = {
        path: replace(m, kind=ModuleKind.EXPERTS) for path, m in modules.items() if path in bare
    }
    named = {bare.get(path, path): kinds.get(path, module) for path, module in modules.items()}
    return named, {bare.get(path, path): error for path, error in errors.items()}


def _complete(
    replacements: dict[str, Replacement], tuned: Mapping[str, StoredParameter], files: OpenFiles
) -> None:
    """Add what did not change of modules that are stored whole: PEFT loads all of one or none."""
    parts = ((owner, leaf) for owner, _, leaf in (name.rpartition(".") for name in replacements))
    whole = {owner for owner, leaf in parts if leaf in _WHOLE}
    for name, stored in tuned.items():
        if name not in replacements and name.rpartition(".")[0] in whole:
            replacements[name] = Replacement(stored.read(files))


def _counters(
    replacements: Collection[str], tuned: BaseCheckpoint, layout: BaseLayout, files: OpenFiles
) -> dict[str, torch.Tensor]:
    """Return how many batches the batch norms that are stored whole have seen."""
    import torch

    found = {}
    for name in replacements:
        owner, _, leaf = name.rpartition(".")
        counter = f"{owner}.{BATCH_COUNTER}" if owner else BATCH_COUNTER
        if leaf == "running_mean" and counter in layout.pieces:
            stored = tuned.sources()[layout.pieces[counter][0].tensor].stored
            if stored is not None and stored.dtype == "I64" and stored.shape == ():
                raw = files.read(stored.file, stored.start, torch.int64.itemsize)
                found[counter] = raw.view(torch.int64).clone().reshape(())
    return found


def _rounded_to(before: StoredParameter, after: StoredParameter) -> set[str]:
    """Return the dtypes of a fine-tuned parameter that do not hold all values of the base's."""
    import torch

    old, new = (
        [torch_dtype(part.dtype) for _, part in each.parts if part.dtype in FLOATING]
        for each in (before, after)
    )
    infos = [torch.finfo(dtype) for dtype in old]
    return {
        str(dtype).removeprefix("torch.")
        for dtype in new
        if any(torch.finfo(dtype).eps > i.eps or torch.finfo(dtype).max < i.max for i in infos)
    }


def _tied_to(
    parameter: str, stored: Mapping[str, StoredParameter], layout: BaseLayout
) -> list[str]:
    """Return the parameters that are one tensor with this one, which a checkpoint stores once."""
    return [
        member
        for members in layout.tied
        for member in members
        if parameter in members and member not in stored
    ]


def _mirrored(module: LoraModule) -> LoraModule:
    """Return what changes a tied head as the embedding is changed, or the other way about.

    PEFT changes one alone; the pair is the one that its ``ensure_weight_tying`` makes, and
    merged, both stay one tensor.
    """
    head = module.kind is ModuleKind.EMBEDDING
    return replace(
        module,
        kind=ModuleKind.LINEAR if head else ModuleKind.EMBEDDING,
        lora_A=module.lora_B.T.contiguous(),
        lora_B=module.lora_A.T.contiguous(),
    )


def _experts(
    parameter: str,
    before: StoredParameter,
    after: StoredParameter,
    layout: BaseLayout,
    options: ExtractOptions,
    files: OpenFiles,
) -> tuple[LoraModule, float] | None:
    """Factor what changed in each expert by itself; ``None`` where nothing did."""
    import torch
    from torch.nn.functional import pad

    found: list[Factors] = []
    missed = whole = 0.0
    for expert in range(before.experts):
        new = after.read_expert(expert, files)
        delta = new.double() - before.read_expert(expert, files).to(new.dtype).double()
        _require_finite(f"{parameter}, expert {expert}", delta)
        matrix = delta.T if parameter in layout.transposed else delta
        factors = factor_matrix(matrix, options.rank, options.energy)
        norm = float(matrix.square().sum())
        missed, whole = missed + factors.error**2 * norm, whole + norm
        found.append(factors)
    if not whole:
        return None
    rank = max(each.rank for each in found)
    a = [pad(each.a, (0, 0, 0, rank - each.rank)) for each in found]
    b = [pad(each.b, (0, rank - each.rank)) for each in found]
    module = LoraModule(
        kind=ModuleKind.EXPERTS,
        lora_A=torch.cat(a),
        lora_B=torch.stack(b, dim=-1).flatten(1),
        alpha=float(rank),  # scaling 1
        experts=before.experts,
    )
    return module, math.sqrt(missed / whole)


def _require_finite(subject: str, *tensors: torch.Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise LoraportError(
            f"{subject}: expected finite values in both models, got NaN or infinity; the training "
            "diverged; train again"
        )


def _require_floats(models: Mapping[str, tuple[BaseCheckpoint, BaseLayout]]) -> None:
    problems = Problems()
    for role, (checkpoint, layout) in models.items():
        for name, dtype in rounded_weights(checkpoint, layout).items():
            problems.add(
                f"{role}: {name}",
                "a weight in floating point",
                f"one stored as {dtype}, of which no config.json tells",
                "give the config.json that it was saved with, or the float model it was made from",
            )
    problems.raise_if_any("the weights of the two models cannot be compared")


def _check_same_model(
    before: Mapping[str, StoredParameter], after: Mapping[str, StoredParameter], layout: BaseLayout
) -> set[str]:
    """Return the embeddings and heads that have other numbers of rows; refuse all else."""
    resized = set()
    problems = Problems()
    for name in sorted(before.keys() ^ after.keys()):
        where = "base" if name in before else "tuned model"
        problems.add(name, "it in both models", f"it in the {where} only")
    for name in before.keys() & after.keys():
        old, new = before[name].shape, after[name].shape
        if name in layout.embeddings and len(old) == len(new) == 2 and old[1] == new[1]:
            resized |= {name} if old != new else set()
        elif old != new:
            problems.add(name, f"{list(old)}", f"{list(new)}")
    problems.raise_if_any("the two models are not the same but for their values")
    return resized
