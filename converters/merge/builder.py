"""Collects what adapters say about parameters into the plan of each tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.merge.arithmetic import Change
from converters.merge.base import BaseCheckpoint
from converters.merge.changes import bias_change, replacement_change, weight_change
from converters.merge.codes import stored_codes, told_of
from converters.merge.experts import (
    is_of_pieces,
    is_part,
    piece_changes,
    replaced_pieces,
    require_float,
)
from converters.merge.layout import BaseLayout, Piece
from converters.merge.plan import TensorPlan
from converters.merge.sources import COUNTER, FLOATING, GivenSource, Source
from converters.merge.targets import NamedAdapter, Said, Tie
from loraport.adapter import LoraModule, ModuleKind
from loraport.base.storage import is_transposed
from loraport.errors import LoraportError, Problems


@dataclass
class PlanBuilder:
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
    square: list[Said] = field(default_factory=list)
    contradicted: set[Path] = field(default_factory=set)  # adapters with a wrong fan_in_fan_out
    untied: bool = False

    def __post_init__(self) -> None:
        self.sources = self.base.sources()
        self.pieces = dict(self.layout.pieces)

    def untie(self, ties: list[Tie]) -> None:
        """Give each member of a tie that does not stay one a tensor of its own.

        One flag in the configuration unties everything, so then every tie is taken apart.
        """
        for tie in ties:
            if not tie.kept and self._split(tie.members, "as only one of them is adapted"):
                self.untied = True
        if self.untied:
            for members in self.layout.tied:
                self._split(members, "as another pair is")

    def _split(self, members: tuple[str, ...], why: str) -> bool:
        stored = next((m for m in members if self.pieces.get(m)), None)
        if stored is None:
            return False
        holder = self.pieces[stored][0].tensor
        for member in members:
            if not self.pieces.get(member):
                self.sources[member] = self.sources[holder]
                self.pieces[member] = (Piece(member),)
                self.added[member] = holder
                self.notes.append(
                    f"{member}: untied from {stored}, {why}; written as "
                    "a tensor of its own, tie_word_embeddings set to false"
                )
        return True

    def change(self, parameter: str, entries: list[Said], ties: list[Tie]) -> None:
        """Plan what the adapters say about one parameter."""
        pieces = self.pieces.get(parameter, ())
        subject = f"{entries[0].adapter.path}: {entries[0].asked}"
        if parameter in self.layout.unsupported:
            stored = self.layout.unsupported[parameter]
            self.problems.add(
                subject,
                "a parameter stored as it is, or as separate experts",
                "one that transformers computes from " + ", ".join(stored[:3]),
                "merge it with transformers and PEFT",
            )
            return
        if not pieces:
            if any(tie.kept and parameter in tie.members for tie in ties):
                return  # its partner is stored and gets the same changes
            self._add(parameter, entries, subject)
            return
        if not pieces[0].whole or any(is_of_pieces(one) for one in entries):
            self._change_pieces(parameter, pieces, entries)
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
            told, remedy = told_of(source.dtype, self.base.quantized)
            self.problems.add(subject, "a float tensor in the base", f"{name} {told}", remedy)
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
                if one.module.magnitude is not None:
                    raise LoraportError("trained token rows and DoRA on the same weight")
                self.changes[name].append(replacement_change(replacement, strength))
                replacement = None
            if not self.layout.known:
                self._note_orientation(one, one.module, source.shape)
            tensor = None if replacement is None else replacement.tensor
            self.changes[name].append(weight_change(one.module, source.shape, strength, tensor))
        elif replacement is not None:
            self.changes[name].append(replacement_change(replacement, strength))
        if one.bias_of is not None:
            bias = bias_change(one.bias_of, strength)
            if bias is not None:
                self.changes[name].append(bias)

    def _note_orientation(self, one: Said, module: LoraModule, shape: tuple[int, ...]) -> None:
        if module.kind is not ModuleKind.LINEAR or len(shape) != 2:
            return
        if shape[0] == shape[1]:
            self.square.append(one)
        elif is_transposed(module, shape) != module.fan_in_fan_out:
            self.contradicted.add(one.adapter.path)

    def check_orientations(self) -> None:
        """Record square weights that may be stored either way round.

        The adapter's one flag decides on them; where its other modules show the flag to be
        wrong, and no model is known that would tell, nothing does.
        """
        for one in self.square:
            if one.adapter.path in self.contradicted:
                self.problems.add(
                    f"{one.adapter.path}: {one.asked}",
                    "to know which way round the square weight is stored",
                    "an adapter whose fan_in_fan_out is wrong for its other modules, and no "
                    "model that transformers knows",
                    "put the model's config.json beside its weights, or mend fan_in_fan_out",
                )

    def count(self, adapters: Sequence[NamedAdapter]) -> None:
        """Take normalizations' counters from the one adapter at strength 1; sums count nothing."""
        index = self.layout.index()
        for each in adapters:
            for asked, counter in each.adapter.counters.items():
                names = index.candidates(asked)
                pieces = self.pieces.get(names[0], ()) if len(names) == 1 else ()
                alone = sum(asked in other.adapter.counters for other in adapters) == 1
                if pieces and alone and each.strength == 1.0:
                    name = pieces[0].tensor
                    if self.sources[name].dtype == COUNTER and self.sources[name].shape == ():
                        self.sources[name] = GivenSource(counter, COUNTER)

    def _check_rows(self, rows: tuple[int, ...] | None, shape: tuple[int, ...]) -> None:
        beyond = [row for row in rows or () if row >= shape[0]]
        if beyond:
            raise LoraportError(f"token rows {beyond[:5]} of a vocabulary of {shape[0]}")

    def _resize(self, parameter: str, new: tuple[int, ...], old: tuple[int, ...]) -> None:
        if new[1:] != old[1:] or not self.layout.known:
            raise LoraportError(f"expected {list(old)}, got {list(new)}")
        self.resized[parameter] = new
        self.notes.append(f"{parameter}: resized from {old[0]} to {new[0]} rows")

    def _change_pieces(
        self, parameter: str, pieces: tuple[Piece, ...], entries: list[Said]
    ) -> None:
        """Plan changes of a parameter that is several tensors, or holds several experts."""
        for one in entries:
            alone = sum(each.part in (None, one.part) for each in entries) == 1
            try:
                require_float(pieces, self.sources, self.base.quantized)
                own = next((piece for piece in pieces if is_part(piece, one.part)), None)
                matrix = pieces[0].whole and len(self.sources[pieces[0].tensor].shape) == 2
                if is_of_pieces(one) and one.part is None and one.replacement is not None:
                    if not matrix:
                        raise LoraportError("LoRA on a parameter that is saved in full as well")
                    # As PEFT stores embeddings beside their LoRA; the update comes on top.
                    stored = replace(one, module=None)
                    self._change_whole(pieces[0].tensor, parameter, stored, alone=alone)
                    one = replace(one, replacement=None)
                if matrix and not is_of_pieces(one):
                    # Another adapter names the module where one names its weight.
                    self.columns[pieces[0].tensor] = self.sources[pieces[0].tensor].shape[1]
                    self._change_whole(pieces[0].tensor, parameter, one, alone=alone)
                elif own is not None:
                    self._change_split(own, one, alone=alone)
                elif one.replacement is not None and one.part is None:
                    self._replace_pieces(pieces, one, alone=alone)
                else:
                    transposed = parameter in self.layout.transposed if self.layout.known else None
                    for name, change in piece_changes(one, pieces, self.sources, transposed):
                        self.columns[name] = self.sources[name].shape[-1]
                        self.changes[name].append(change)
            except LoraportError as error:
                subject = f"{one.adapter.path}: {one.asked}"
                self.problems.add(subject, "it to fit the base's experts", str(error))

    def _change_split(self, piece: Piece, one: Said, *, alone: bool) -> None:
        """Plan the change of one expert's matrix that is a tensor of its own."""
        shape = self.sources[piece.tensor].shape
        if one.replacement is not None and tuple(one.replacement.tensor.shape) != shape:
            found = list(one.replacement.tensor.shape)
            raise LoraportError(f"{piece.tensor}: expected {list(shape)}, got {found}")
        self.columns[piece.tensor] = math.prod(shape[1:])
        self._change_whole(piece.tensor, piece.tensor, one, alone=alone)

    def _replace_pieces(self, pieces: tuple[Piece, ...], one: Said, *, alone: bool) -> None:
        """Plan a parameter's replacement, piece by piece."""
        assert one.replacement is not None
        for name, tensor in replaced_pieces(one.replacement, pieces, self.sources):
            self.columns[name] = tensor.shape[-1]
            if alone and one.adapter.strength == 1.0:
                self.sources[name] = GivenSource(tensor, self.sources[name].dtype)
                continue
            rows = tensor.reshape(-1, tensor.shape[-1])
            self.changes[name].append(Change(one.adapter.strength, replacement=rows))

    def _add(self, parameter: str, entries: list[Said], subject: str) -> None:
        codes = stored_codes(parameter, self.pieces)
        if codes is not None:
            self.problems.add(
                subject,
                f"{parameter} in the base",
                f"the codes of a quantization, {codes}, of which no config.json tells",
                "merge into the float model it was made from",
            )
            return
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
            result[file.as_posix()] = tuple(
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
