"""What a merge will do to each tensor, decided before anything is written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from converters.merge.arithmetic import Change
from converters.merge.base import BaseCheckpoint
from converters.merge.changes import bias_change, replacement_change, weight_change
from converters.merge.config_changes import config_after
from converters.merge.experts import expert_changes
from converters.merge.layout import BaseLayout, Piece
from converters.merge.sources import FLOATING, GivenSource, Source
from converters.merge.targets import NamedAdapter, Said, Tie, resolve, settle_ties
from loraport.adapter import ModuleKind
from loraport.errors import LoraportError, Problems

_DEQUANTIZED = "the output is its dequantized weights, merged, as a float checkpoint"


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: Its name.
        source: Where its values come from.
        dtype: The safetensors name of its dtype.
        columns: Columns of the matrix that the changes see.
        changes: What is added; without any it is copied.
        note: What is special about it, for the user.
    """

    name: str
    source: Source
    dtype: str
    columns: int = 1
    changes: tuple[Change, ...] = ()
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.source.shape

    @property
    def rows(self) -> int:
        """Rows of the matrix that the changes see."""
        return math.prod(self.shape) // self.columns if self.columns else 0

    @property
    def copied(self) -> bool:
        """Whether its bytes are some of the base's."""
        return not self.changes and self.source.stored is not None

    @property
    def nbytes(self) -> int:
        """Its bytes in the output."""
        if not self.changes and self.source.stored is not None:
            return self.source.stored.nbytes
        return math.prod(self.shape) * FLOATING[self.dtype]


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A whole merge.

    Attributes:
        base: The base.
        shards: Output file name → its tensors in order.
        config: The output's ``config.json``, or ``None`` where the base's is right.
        notes: What the user should know.
    """

    base: BaseCheckpoint
    shards: Mapping[str, tuple[TensorPlan, ...]]
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[TensorPlan]:
        """All tensors."""
        return [tensor for shard in self.shards.values() for tensor in shard]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_merge(
    base: BaseCheckpoint, layout: BaseLayout, adapters: Sequence[NamedAdapter]
) -> MergePlan:
    """Decide what becomes of every tensor.

    Raises:
        LoraportError: Everything that has no place in the base or cannot be merged exactly.
    """
    problems = Problems()
    said = resolve(adapters, layout, problems)
    ties = settle_ties(said, layout)
    builder = _Builder(base, layout, problems)
    for tie in ties:
        builder.untie(tie)
    for parameter, entries in said.items():
        builder.change(parameter, entries, ties)
    config = config_after(
        base.config,
        layout,
        untied=builder.untied,
        resized=builder.resized,
        dequantized=base.quantized is not None,
        problems=problems,
    )
    problems.raise_if_any("the merge cannot be exact")
    if base.quantized is not None:
        builder.notes.insert(0, f"the base was quantized ({base.quantized}); {_DEQUANTIZED}")
    return MergePlan(base, builder.shards(), config, tuple(builder.notes))


@dataclass
class _Builder:
    """Collects the plan of each tensor."""

    base: BaseCheckpoint
    layout: BaseLayout
    problems: Problems
    sources: dict[str, Source] = field(default_factory=dict)
    changes: dict[str, list[Change]] = field(default_factory=lambda: defaultdict(list))
    columns: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)  # new tensor → the one it lies behind
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    untied: bool = False

    def __post_init__(self) -> None:
        self.sources = self.base.sources()
        self.pieces = dict(self.layout.pieces)

    def untie(self, tie: Tie) -> None:
        """Give each member of a tie that does not hold a tensor of its own."""
        stored = next((m for m in tie.members if self.pieces.get(m)), None)
        if stored is None or tie.kept:
            return
        self.untied = True
        holder = self.pieces[stored][0].tensor
        for member in tie.members:
            if not self.pieces.get(member):
                self.sources[member] = self.sources[holder]
                self.pieces[member] = (Piece(member),)
                self.added[member] = holder
                self.notes.append(
                    f"{member}: untied from {stored}, as only one of them is adapted; written as "
                    "a tensor of its own, tie_word_embeddings set to false"
                )

    def change(self, parameter: str, entries: list[Said], ties: list[Tie]) -> None:
        """Plan what the adapters say about one parameter."""
        pieces = self.pieces.get(parameter, ())
        subject = f"{entries[0].adapter.path}: {entries[0].asked}"
        if parameter in self.layout.unsupported:
            self.problems.add(
                subject,
                "a parameter stored as it is, or as separate experts",
                "one that transformers computes from " + ", ".join(p.tensor for p in pieces[:3]),
                "merge it with transformers and PEFT",
            )
            return
        if not pieces:
            if any(tie.kept and parameter in tie.members for tie in ties):
                return  # its partner is stored and gets the same changes
            self._add(parameter, entries, subject)
            return
        experts = [one for one in entries if one.module and one.module.kind is ModuleKind.EXPERTS]
        if experts or len(pieces) > 1 or pieces[0].expert is not None:
            self._change_experts(pieces, entries, subject)
            return
        name = pieces[0].tensor
        source = self.sources[name]
        if self._perhaps_tied(source) and any(one.module or one.bias_of for one in entries):
            self.problems.add(
                subject,
                "to know whether the output head shares this embedding",
                "a model that transformers does not know, whose config.json does not tell",
                'set "tie_word_embeddings": false in its config.json if it does not',
            )
            return
        if source.dtype not in FLOATING:
            self.problems.add(
                subject,
                "a float tensor in the base",
                f"{name} stored as {source.dtype}",
                "merge into the float model it was made from",
            )
            return
        self.columns[name] = math.prod(source.shape[1:]) if len(source.shape) > 1 else 1
        for one in entries:
            try:
                self._change_whole(name, parameter, one, alone=len(entries) == 1)
            except LoraportError as error:
                self.problems.add(
                    f"{one.adapter.path}: {one.asked}", "it to fit the base", str(error)
                )

    def _perhaps_tied(self, source: Source) -> bool:
        config = self.base.config
        if self.layout.known or not config or config.get("tie_word_embeddings") is False:
            return False
        vocabulary = config.get("vocab_size")
        if len(source.shape) != 2 or source.shape[0] != vocabulary:
            return False
        same = [other for other in self.sources.values() if other.shape == source.shape]
        return len(same) == 1

    def _change_whole(self, name: str, parameter: str, one: Said, *, alone: bool) -> None:
        source, strength = self.sources[name], one.adapter.strength
        replacement = one.replacement
        whole = replacement is not None and replacement.rows is None
        if replacement is not None:
            self._check_rows(replacement.rows, source.shape)
        if whole and replacement is not None and alone and strength == 1.0:
            # Nothing of the base's own values is left.
            given = GivenSource(replacement.tensor, source.dtype)
            if given.shape != source.shape:
                self._resize(parameter, given.shape, source.shape)
            source = self.sources[name] = given
            replacement = None
        elif whole and replacement is not None and tuple(replacement.tensor.shape) != source.shape:
            raise LoraportError(
                f"a parameter of another size ({list(replacement.tensor.shape)} for "
                f"{list(source.shape)}) can be merged from one adapter at strength 1 only"
            )
        if one.module is not None:
            if replacement is not None and replacement.rows is not None:
                raise LoraportError("trained token rows and LoRA on the same weight")
            tensor = None if replacement is None else replacement.tensor
            self.changes[name].append(weight_change(one.module, source.shape, strength, tensor))
        elif replacement is not None:
            self.changes[name].append(replacement_change(replacement, strength))
        if one.bias_of is not None:
            bias = bias_change(one.bias_of, strength)
            if bias is not None:
                self.changes[name].append(bias)

    def _check_rows(self, rows: tuple[int, ...] | None, shape: tuple[int, ...]) -> None:
        beyond = [row for row in rows or () if row >= shape[0]]
        if beyond:
            raise LoraportError(f"token rows {beyond[:5]} of a vocabulary of {shape[0]}")

    def _resize(self, parameter: str, new: tuple[int, ...], old: tuple[int, ...]) -> None:
        if new[1:] != old[1:] or not self.layout.known:
            raise LoraportError(f"expected {list(old)}, got {list(new)}")
        self.resized[parameter] = new
        self.notes.append(f"{parameter}: resized from {old[0]} to {new[0]} rows")

    def _change_experts(self, pieces: tuple[Piece, ...], entries: list[Said], subject: str) -> None:
        for one in entries:
            if one.module is None or one.module.kind is not ModuleKind.EXPERTS:
                self.problems.add(
                    subject,
                    "LoRA on the fused expert parameter",
                    "another kind of change",
                    "merge it with transformers and PEFT",
                )
                continue
            try:
                for name, change in expert_changes(
                    one.module, pieces, self.sources, one.adapter.strength
                ):
                    self.columns[name] = self.sources[name].shape[-1]
                    self.changes[name].append(change)
            except LoraportError as error:
                self.problems.add(subject, "it to fit the base's experts", str(error))

    def _add(self, parameter: str, entries: list[Said], subject: str) -> None:
        one = entries[0]
        whole = one.replacement is not None and one.replacement.rows is None
        if one.module is not None or not whole or len(entries) > 1 or one.adapter.strength != 1.0:
            self.problems.add(
                subject,
                f"a tensor for {parameter} in the base",
                "none",
                "use the base the adapter was trained on",
            )
            return
        assert one.replacement is not None
        tensor = one.replacement.tensor
        self.sources[parameter] = GivenSource(tensor, self.base.common_dtype())
        last = list(self.base.sources())[-1]
        self.added[parameter] = last
        self.resized[parameter] = tuple(tensor.shape)
        self.notes.append(f"{parameter}: new, from the adapter")

    def shards(self) -> dict[str, tuple[TensorPlan, ...]]:
        """Return the plan of every tensor, shard by shard."""
        result = {}
        behind = defaultdict(list)
        for name, holder in self.added.items():
            behind[holder].append(name)
        for file, tensors in self.base.shards.items():
            ordered: list[str] = list(tensors)
            ordered += [name for holder in tensors for name in behind.get(holder, ())]
            result[file.name] = tuple(
                TensorPlan(
                    name=name,
                    source=self.sources[name],
                    dtype=self.sources[name].dtype,
                    columns=self.columns.get(name, 1),
                    changes=tuple(self.changes.get(name, ())),
                )
                for name in ordered
            )
        return result
