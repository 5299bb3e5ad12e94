"""Put slots into a model that is already exported, by whatever tool, and make it a bundle."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from converters.onnx.exporters.long_rotations import long_rotations_after
from converters.onnx.exporters.quantizing import PRECISION_TEXT, require_quantizer
from converters.onnx.exporters.storing import sites_of, store_as, stored_precision
from converters.onnx.first_golden import record_first_golden
from converters.onnx.graph.data_files import copy_companions, move_weights_out, share_data
from converters.onnx.graph.example_inputs import example_inputs
from converters.onnx.graph.inferred_shapes import infer_shapes
from converters.onnx.graph.provenance import MADE_BY, record_provenance
from converters.onnx.graph.site import Site
from converters.onnx.graph.source_graph import data_locations, external_tensors, read_graph
from converters.onnx.modules.graph_modules import GraphModules, fingerprint_graph
from converters.onnx.modules.graph_names import (
    NamedSite,
    folded,
    keep_names,
    name_sites,
    tied_sites,
)
from converters.onnx.modules.holders import BaseHolders, GraphHolders, Holders
from converters.onnx.modules.matching import Match, Matcher, SiteMatcher, Unmatched
from converters.onnx.modules.merged_calls import MergedCalls, merged_calls
from converters.onnx.modules.module_parts import SplitModule
from converters.onnx.modules.stored_gains import added_to_gains
from converters.onnx.modules.unslotted import reasons
from converters.onnx.slots.input_names import require_no_slots
from converters.onnx.slots.inserting import (
    SlotOptions,
    SlottedModel,
    insert_slots,
    require_slot_inputs,
    with_replacements,
)
from converters.onnx.trial_run import TrialRuns, may_end_the_process
from loraport.adapter import ModuleKind
from loraport.bundle.base_values import write_base_values
from loraport.bundle.content_hash import file_sha256
from loraport.bundle.manifest import (
    MODEL_FILE,
    REQUIRED_MODEL_FILE,
    Manifest,
    write_manifest,
)
from loraport.errors import LoraportError, Problems, first_names
from loraport.fingerprint import BaseFingerprint
from loraport.option_checks import (
    as_path,
    check_parts,
    check_switches,
    check_text,
    given_or_default,
)
from loraport.output import new_directory, refuse_existing
from loraport.parity.tolerances import golden_tolerance, golden_tolerances

if TYPE_CHECKING:
    import numpy as np

    from converters.onnx.modules.base_modules import BaseModules

Progress = Callable[[str], None]
_AS_IT_IS = "fp32"  # whatever that is
_PYTORCH = "pytorch"  # as its exporters call themselves
_HEAD = "lm_head"
_NAMED = 5
_LEFT_OUT_HEAD = "left out, as the output head; export again with --lm-head"


@dataclass(frozen=True)
class ImportOptions:
    """How a model that is already exported becomes a bundle.

    Attributes:
        base: The checkpoint it was exported from, see `resolve_base`; names come from the graph
            itself without it.
        slots: What the slots can take.
        lm_head: Put a slot beside the output head too.
        inputs: The golden inputs; made from the graph's own shapes unless given.
        precision: Store the weights so, see `converters.onnx.exporters.quantizing`; as they are
            unless told, and for ``fp32``.
        copy_data: Copy data files instead of linking them.
    """

    base: str | None = None
    slots: SlotOptions = field(default_factory=SlotOptions)
    lm_head: bool = False
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    precision: str | None = None
    copy_data: bool = False

    def __post_init__(self) -> None:
        problems = Problems()
        check_parts(problems, self, slots=SlotOptions, inputs=Mapping)
        check_switches(problems, self, "lm_head", "copy_data")
        if self.precision is not None:
            check_text(problems, "precision", self.precision, PRECISION_TEXT)
        problems.raise_if_any("import options cannot be used")
        if self.base is not None:
            object.__setattr__(self, "base", str(self.base))
        if self.precision == _AS_IT_IS:
            object.__setattr__(self, "precision", None)


def _silent(text: str) -> None:
    del text


def import_model(
    file: Path | str,
    out: Path | str,
    options: ImportOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = _silent,
    finish: Callable[[Path], None] = lambda bundle: None,  # noqa: ARG005
) -> None:
    """Make a bundle of an ``.onnx`` file: its weights are linked, only the graph is written.

    Where another precision is asked for, the weights are written anew.

    Args:
        file: The model.
        out: The new bundle; appears whole or not at all.
        options: See `ImportOptions`.
        force: Replace an existing bundle.
        progress: Told what is being done.
        finish: Called with the bundle while it still has its temporary name.

    Raises:
        LoraportError: If the file is no model, or no operator of it can have a slot.
    """
    options = given_or_default(options, ImportOptions)
    file, out = as_path("the model", file), as_path("the output", out)
    progress(f"reading {file.name}")
    model = read_graph(file)
    require_no_slots(model, file)
    data = [file.parent / location for location in data_locations(model)]
    # The directory of a link, too: what it leads to may be elsewhere.
    refuse_existing(out, force=force, inputs=(*data, *(part.parent for part in data)))
    if options.precision is not None:
        require_quantizer(options.precision)
    base = _open_base(options.base, progress)
    with new_directory(out, force=force) as bundle:
        exact: list[NamedSite] | None = None
        if options.precision is None:
            share_data(model, file.parent, bundle, progress, copy=options.copy_data)
        else:
            progress(f"storing the weights as {options.precision}")
            exact = name_sites(sites_of(model))
            model = store_as(file, bundle, options.precision, progress)
            keep_names(exact, sites_of(model))
        move_weights_out(model, bundle)
        copy_companions(file, bundle)
        examples = [options.inputs] if options.inputs else list(example_inputs(model))
        careful = may_end_the_process(model)
        progress("putting in the slots")
        gains = added_to_gains(model, file.parent)
        imported = slot_graph(model, options, base, exact, gains)
        if base is None and (names := imported.computed):
            progress(
                f"computed by the exporter, maybe with a normalization folded in: "
                f"{first_names(names, _NAMED)}; an adapter that was trained before that does "
                "not fit there, and --base tells, here or where it is added"
            )
        record_provenance(model, file.name, file_sha256(file))
        weights = sum(tensor.nbytes for tensor in external_tensors(model))
        _save(imported.slotted, bundle)
        write_base_values(bundle, imported.slotted.base_values)
        progress("hashing the weights")
        _describe(bundle, file, imported, options, base, exact)
        if options.precision == "fp16" and _ends_the_process(bundle / MODEL_FILE):
            progress(
                "ONNX Runtime ends the process that opens this graph for the CPU with its "
                "NchwcTransformer; loraport opens it without, other programs have to as well"
            )
        progress("recording golden outputs")
        record_first_golden(bundle, file, examples, weights, progress, careful=careful)
        finish(bundle)


@dataclass(frozen=True)
class ImportedGraph:
    """A graph with slots, and what is known of its weights.

    Attributes:
        slotted: The graph.
        named: Every site with its module's name; its operator may have been taken apart since.
        computed: Modules whose weights in the graph are not their own, see `folded`.
    """

    slotted: SlottedModel
    named: list[NamedSite]
    computed: tuple[str, ...]


def slot_graph(
    model: ir.Model,
    options: ImportOptions,
    base: BaseModules | None = None,
    exact: Sequence[NamedSite] | None = None,
    gains: int | None = 0,
) -> ImportedGraph:
    """Put slots into a graph and say of everything with weights that has none why.

    Args:
        model: As `read_graph` gave it; changed in place. Its weights are read only where they
            are compared with the base's.
        options: See `ImportOptions`.
        base: The base's modules, if it is known.
        exact: The graph's sites before its weights were rounded: each reader of a weight that
            modules share has a rounding of its own now.
        gains: What its norms have added to their weights, see `added_to_gains`.

    Raises:
        LoraportError: If there is no operator that can have a slot; with all the reasons.
    """
    from converters.onnx.modules.slottable import tied_modules

    if options.slots.per_row:  # rows are told by the names of dimensions
        infer_shapes(model)
    nodes = list(model.graph.all_nodes())
    sites = sites_of(model)
    served = [site for site in sites if options.slots.serves(site.kind)]
    left = [site for site in sites if not options.slots.serves(site.kind)]
    named = name_sites(served, left)
    computed = tuple(folded(named))  # before operators are taken apart
    why = reasons(nodes, {id(site.node) for site in sites})
    others = name_sites(left, served)
    for entry in others:
        wanted_by = "lora" if entry.site.kind is ModuleKind.LINEAR else entry.site.kind.value
        why[entry.path] = f"not asked for; export again with {wanted_by} among --slots"
    modules = {} if base is None else base.modules
    wanted = {path: m for path, m in modules.items() if options.slots.serves(m.kind)}
    finder: SiteMatcher = GraphModules(named) if base is None else Matcher(wanted)
    merged = merged_calls(model)
    listening = _Listening(finder, merged)
    known = (*named, *others)
    by_name = GraphHolders(
        model.graph,
        known,
        as_stored=model.producer_name == _PYTORCH,
        added_to_gains=gains,
    )
    if not served:
        raise LoraportError(
            f"slots: expected operators that can have one, got {_listed(nodes)}"
            + "".join(f"\n  - {name}: {reason}" for name, reason in list(why.items())[:20])
        )
    slotted = insert_slots(
        model,
        modules,
        options.slots,
        matcher=listening,
        exclude=lambda path: (
            listening.merged.get(path) or (None if options.lm_head else _head_reason(path))
        ),
    )
    unslotted = {**why, **listening.unmatched, **slotted.unslotted}
    if listening.merged:
        unslotted |= dict.fromkeys(merged.lost, merged.reason_of_lost(listening.merged))
    tied = tied_sites(exact or named) if base is None else tied_modules(modules)
    slotted = SlottedModel(slotted.model, replace(slotted.slots, tied=tied), unslotted)
    if options.slots.replace:
        holders = by_name if options.base is None else _base_holders(model, options.base)
        slotted = with_replacements(slotted, options.slots, holders)
    return ImportedGraph(slotted, named, computed)


def _listed(nodes: Iterable[ir.Node]) -> str:
    kinds = sorted({node.op_type for node in nodes})
    more = f" and {len(kinds) - _NAMED} other kinds" if len(kinds) > _NAMED else ""
    return f"only {', '.join(kinds[:_NAMED])}{more}" if kinds else "no operators"


def _base_holders(model: ir.Model, base: str) -> Holders:
    """Find parameters by the values that the base has in PyTorch."""
    from loraport.base.loading import load_model

    return BaseHolders.of_module(model.graph, load_model(base))


class _Listening:
    """Passes matches on and remembers what had none, or is several layers that were merged."""

    def __init__(self, matcher: SiteMatcher, calls: MergedCalls) -> None:
        self._matcher = matcher
        self._calls = calls
        self.unmatched: dict[str, str] = {}
        self.merged: dict[str, str] = {}

    def match(self, site: Site) -> Match | Unmatched:
        """Return the modules of a site."""
        found = self._matcher.match(site)
        if isinstance(found, Unmatched):
            self.unmatched[_called(site)] = found.reason
        elif id(site.node) in self._calls.nodes:
            self.merged |= dict.fromkeys((module.path for module in found), self._calls.reason)
        return found

    def split(self, sites: Sequence[Site], seen: Container[str]) -> Sequence[SplitModule]:
        """Return the modules that several sites compute, which then have a match."""
        found = self._matcher.split(sites, seen)
        for whole in found:
            for site in whole.sites:
                self.unmatched.pop(_called(site), None)
                if id(site.node) in self._calls.nodes:
                    self.merged[whole.module.path] = self._calls.reason
        return found


def _called(site: Site) -> str:
    return site.node.name or site.y.name or site.node.op_type


def _head_reason(path: str) -> str | None:
    return _LEFT_OUT_HEAD if path.rpartition(".")[2] == _HEAD else None


def _open_base(base: str | None, progress: Progress) -> BaseModules | None:
    if base is None:
        return None
    from converters.onnx.modules.base_modules import open_base_modules

    progress(f"looking at {base}")
    return open_base_modules(base)


def _ends_the_process(model: Path) -> bool:
    """Tell whether to open a graph ends the process."""
    with TrialRuns() as trials:
        return trials.end_the_process(model, {})


def _save(slotted: SlottedModel, bundle: Path) -> None:
    ir.save(slotted.model, bundle / MODEL_FILE)
    require_slot_inputs(slotted.model, slotted.slots)
    ir.save(slotted.model, bundle / REQUIRED_MODEL_FILE)


def _describe(
    bundle: Path,
    file: Path,
    imported: ImportedGraph,
    options: ImportOptions,
    base: BaseModules | None,
    exact: list[NamedSite] | None,
) -> None:
    paths = list(imported.slotted.slots.modules())
    precision = stored_precision(entry.site for entry in imported.named)
    manifest = Manifest(
        base_name=file.stem if options.base is None else Path(options.base).name,
        fingerprint=_fingerprint(exact or imported.named, paths, base),
        precision=precision,
        slots=imported.slotted.slots,
        unslotted=imported.slotted.unslotted,
        tolerance=golden_tolerance(precision),
        tolerances=golden_tolerances(precision),
        made_by=MADE_BY,
        computed=() if base is not None else imported.computed,
        long_rotations_after=long_rotations_after(imported.slotted.model),
    )
    files = sorted(f.relative_to(bundle).as_posix() for f in bundle.rglob("*") if f.is_file())
    write_manifest(manifest.with_files(bundle, files), bundle)
    if options.base is not None:
        from loraport.base.finding import resolve_base
        from loraport.bundle.sources import record_base

        record_base(bundle, str(resolve_base(options.base).resolve()))


def _fingerprint(
    named: list[NamedSite], paths: list[str], base: BaseModules | None
) -> BaseFingerprint:
    return fingerprint_graph(named, paths) if base is None else base.fingerprint(paths)
