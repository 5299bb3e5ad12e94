"""What adapters say about each parameter of the model, and what of it is tied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.merge.changes import mirrored, same_replacement, touched_parameters
from converters.merge.layout import BaseLayout
from converters.merge.stored_names import Place
from loraport.adapter import Adapter, LoraModule, ModuleKind, Replacement
from loraport.errors import Problems
from loraport.naming import NameIndex, weight_name

_STORE = (
    "save a base that stores the weight itself (torch.nn.utils.remove_weight_norm, "
    "remove_spectral_norm or parametrize.remove_parametrizations), or keep the adapter beside the "
    "base"
)


@dataclass(frozen=True, eq=False)
class NamedAdapter:
    """An adapter, where it came from and how strongly it is merged."""

    path: Path
    adapter: Adapter
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Said:
    """What one adapter says about one parameter.

    Attributes:
        adapter: The adapter.
        asked: The parameter as the adapter names it.
        module: The low-rank update, where the parameter is its weight.
        bias_of: The low-rank update whose bias goes into this parameter.
        replacement: What the parameter is replaced with.
        part: The expert, or the rows, of the parameter that this is about; all where it is
            ``None``.
    """

    adapter: NamedAdapter
    asked: str
    module: LoraModule | None = None
    bias_of: LoraModule | None = None
    replacement: Replacement | None = None
    part: Place | None = None

    def same_change(self, other: Said) -> bool:
        """Tell whether both come to the same for two parameters that are one tensor."""
        if self is other:
            return True
        if not same_replacement(self.replacement, other.replacement):
            return False
        if self.module is None or other.module is None:
            return self.module is other.module and self.bias_of is other.bias_of
        return mirrored(self.module, other.module)


@dataclass(frozen=True, eq=False)
class Tie:
    """Parameters that are one tensor in the base.

    Attributes:
        members: Their names; the first is the one the model stores.
        kept: They get the same changes and stay one.
    """

    members: tuple[str, ...]
    kept: bool


def resolve(
    adapters: Sequence[NamedAdapter], layout: BaseLayout, problems: Problems
) -> dict[str, list[Said]]:
    """Find the parameter that each adapter tensor is for.

    Returns:
        Parameter of the model → what the adapters say about it, one entry for each adapter, or
        for each part of the parameter that an adapter names by itself.
    """
    index = layout.index()
    said: dict[str, list[Said]] = defaultdict(list)
    for each in adapters:
        claimed: dict[tuple[str, Place | None], str] = {}
        for asked in touched_parameters(each.adapter.modules, each.adapter.replacements):
            subject = f"{each.path}: {asked}"
            found = index.candidates(asked)
            place = None if found else layout.place(asked)
            if place is not None:
                found = [place.parameter]
            part = None if place is None or place.whole else place
            if len(found) != 1:
                got = f"{len(found)} that it may mean: {', '.join(found[:4])}" if found else "none"
                remedy = _remedy(each.adapter, asked)
                sources = [] if found else _computed_from(asked, index)
                if sources:
                    got = f"none: the model computes it from {' and '.join(sources)} in every pass"
                    remedy = _STORE
                problems.add(subject, "one parameter of the base of this name", got, remedy)
                continue
            name = found[0]
            if (name, part) in claimed:
                other = claimed[name, part]
                problems.add(subject, f"one module for {name}", f"{other} for it as well")
                continue
            claimed[name, part] = asked
            said[name].append(replace(_said(each, asked, name, layout), part=part))
    return said


def _computed_from(weight: str, index: NameIndex) -> list[str]:
    """Return what a weight that is normed in every pass is computed from, as torch names it."""
    path, _, leaf = weight.rpartition(".")
    parametrized = f"{path}.parametrizations.{leaf}.original"
    names = (f"{weight}_g", f"{weight}_v", f"{weight}_orig")
    wanted = (*names, parametrized, f"{parametrized}0", f"{parametrized}1")
    return [found for name in wanted for found in index.candidates(name)]


def _remedy(adapter: Adapter, asked: str) -> str:
    path, _, leaf = asked.rpartition(".")
    module = adapter.modules.get(path)
    if leaf == "bias" and module is not None and asked not in adapter.replacements:
        return (
            "the module has no bias, so `lora_bias` has no place in the merged model; keep the "
            "adapter beside the base"
        )
    return "use the base the adapter was trained on"


def _said(each: NamedAdapter, asked: str, name: str, layout: BaseLayout) -> Said:
    path, _, leaf = asked.rpartition(".")
    bare = each.adapter.modules.get(asked)
    if bare is not None and bare.kind is ModuleKind.EXPERTS:
        replacement = each.adapter.replacements.get(asked)
        return Said(adapter=each, asked=asked, module=bare, replacement=replacement)
    module = each.adapter.modules.get(path)
    if module is not None and layout.known:
        # The model's class knows; the adapter's one flag may be wrong for some modules.
        module = replace(module, fan_in_fan_out=name.rpartition(".")[0] in layout.conv1d)
    has_bias = module is not None and module.lora_B_bias is not None
    return Said(
        adapter=each,
        asked=asked,
        module=module if asked == weight_name(path) else None,
        bias_of=module if leaf == "bias" and has_bias else None,
        replacement=each.adapter.replacements.get(asked),
    )


def settle_ties(said: dict[str, list[Said]], layout: BaseLayout) -> list[Tie]:
    """Decide which tied parameters stay one tensor, and share what is meant for all of them.

    Trained rows of the input embedding and a resized vocabulary are for the whole tie, as in
    PEFT.

    Args:
        said: From `resolve`; entries are added for members that share another's.
        layout: The base's.
    """
    ties = []
    for members in layout.tied:
        if not any(said.get(member) for member in members):
            continue
        by_adapter: dict[int, dict[str, Said]] = defaultdict(dict)
        for member in members:
            for one in said.get(member, ()):
                by_adapter[id(one.adapter)][member] = one
        kept = True
        for spoken in by_adapter.values():
            _share(spoken, members, said, layout)
            first = next(iter(spoken.values()))
            same = all(one.same_change(first) for one in spoken.values())
            kept = kept and same and len(spoken) == len(members)
        ties.append(Tie(members, kept))
    return ties


def _share(
    spoken: dict[str, Said],
    members: tuple[str, ...],
    said: dict[str, list[Said]],
    layout: BaseLayout,
) -> None:
    """Give the other members of a tie what an adapter means for all of them."""
    for member, one in list(spoken.items()):
        if not _for_all(one, member, layout):
            continue
        for other in members:
            if other not in spoken:
                said.setdefault(other, []).append(one)
                spoken[other] = one
            elif spoken[other].replacement is None:
                # LoRA on the head and trained rows of the embedding: the head has both.
                both = replace(spoken[other], replacement=one.replacement)
                said[other][said[other].index(spoken[other])] = both
                spoken[other] = both


def _for_all(one: Said, member: str, layout: BaseLayout) -> bool:
    if one.replacement is None or one.module is not None:
        return False
    shape = layout.shapes.get(member)
    resized = shape is not None and tuple(one.replacement.tensor.shape) != shape
    if one.replacement.rows is not None:
        # PEFT follows ties from the model's own input embedding, not from a head or from the
        # embedding of an encoder inside.
        return member in layout.input_embeddings & layout.embeddings
    return resized
