"""The parity protocol: prove that a bundle computes what PyTorch computes.

1. files: every file has the hash the manifest gives it;
2. slots: the graph has exactly the slot inputs of the slot table, with its shapes;
3. base: without an adapter, ONNX Runtime = PyTorch;
4. per adapter: the packed tensors are the source adapter's (each module named); in PyTorch
   beside = merged; ONNX Runtime with the adapter = PyTorch with it; the negative control: the
   adapter changes the outputs by more than the tolerance; greedy tokens agree;
5. two adapters blended: ONNX Runtime = PyTorch's weighted sum;
6. swaps: A → B → A → none repeats bit for bit; on a GPU, nothing fell back to the CPU;
7. as shipped: both files of an adapter hold the same bits, ``model.required.onnx`` computes what
   ``model.onnx`` does, and the golden cases are reproduced;
8. as deployed: where a quantized kernel rounds its activations, how far that takes the outputs.

Where outputs are too far from PyTorch's and the graph has calibrated ranges, it is run without
them, too, to tell whether they are the cause; see `loraport.parity.calibration`. Where its kernels
round to 8 bits in every run, it is judged without; see `loraport.parity.dynamic_rounding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from loraport.adapter import Adapter
from loraport.base.stored_tensors import stored_tensor
from loraport.bundle.manifest import check_files
from loraport.counts import counted
from loraport.errors import LoraportError
from loraport.parity.calibration import Calibration
from loraport.parity.changed_graph import ChangedGraph
from loraport.parity.changes import Changes, Original, changes_of
from loraport.parity.check import Check, first_reasons
from loraport.parity.dynamic_rounding import judged_unrounded, without_rounded_activations
from loraport.parity.metrics import Comparison, compare, worst
from loraport.parity.packed import differences
from loraport.parity.placement import placement
from loraport.parity.reference import adapted, merged, next_token_logits, torch_outputs
from loraport.parity.rounding import Rounding, allowed_beside, wider
from loraport.parity.shipped import golden_cases, required_graph, same_in_both_files
from loraport.parity.tolerances import AS_DEPLOYED, Tolerance
from loraport.runtime import Runtime, Sampling, Selection, generate
from loraport.runtime.resident import read_packed
from loraport.runtime.steps import LOGITS
from loraport.runtime.values import torch_of

_GREEDY_TOKENS = 12
_GREEDY_PROMPTS = 3
_MERGED_SAMPLES = 4

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sample:
    """One input to compare on.

    Attributes:
        session: All inputs of the exported model, without slots.
        torch: Arguments of the PyTorch model.
        token_ids: The prompt, for a decoder language model.
    """

    session: Inputs
    torch: Inputs
    token_ids: Sequence[int] = ()


Run = Callable[[Sample], Sequence[np.ndarray]]  # gives the outputs in order


class Protocol:
    """Runs the checks of one bundle against one PyTorch model.

    Args:
        runtime: The bundle, opened without checking its files.
        model: The base in float32, in evaluation mode.
        adapters: Name → the adapter as trained.
        samples: What to compare on.
        tolerance: See `loraport.parity.tolerances`.
        progress: Told what is being done.
        deployed: The bundle as users run it, where that rounds more than ``runtime`` does.
        original: Gives the parameters that the adapters were made for, by path, where the model
            has a quantized graph's; the model's own unless given.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: nn.Module,
        adapters: Mapping[str, Adapter],
        samples: Sequence[Sample],
        tolerance: Tolerance,
        progress: Callable[[str], None] = lambda text: None,  # noqa: ARG005
        deployed: Runtime | None = None,
        original: Original | None = None,
    ) -> None:
        self._runtime = runtime
        self._deployed = deployed
        self._calibration = Calibration(runtime)
        self._unrounded = ChangedGraph(runtime, without_rounded_activations)
        self._model = model
        self._original = original or partial(stored_tensor, model)
        self._adapters = adapters
        self._samples = samples
        self._tolerance = tolerance
        halves = tolerance.floats != "float32"
        self._rounding = Rounding(model, tolerance.floats) if halves else None
        self._widest = tolerance  # that was allowed in any comparison with torch
        self._sensitive: set[int] = set()  # samples that were allowed more
        self._progress = progress
        slots = set(runtime.manifest.slots.inputs())
        cache = ("present", *slots)
        names = [entry.name for entry in runtime.session.get_outputs()]
        self._outputs = [name for name in names if not name.startswith(cache)]

    def run(self) -> list[Check]:
        """Return every check's result, failed ones included."""
        checks = [self._files(), self._slots(), self._base()]
        for name in self._adapters:
            checks += self._adapter(name)
        names = list(self._adapters)
        if len(names) > 1:
            checks.append(self._blend(names[0], names[1]))
        if names:
            checks.append(self._swaps(names[0], names[-1]))
        if self._runtime.provider != "cpu":
            self._progress("providers")
            inputs = self._samples[0].session
            checks.append(placement(self._runtime, inputs, names[0] if names else None))
        checks += self._shipped(names)
        if self._deployed is not None:
            checks.append(self._as_deployed(self._deployed))
        return checks

    def _files(self) -> Check:
        self._progress("files")
        try:
            check_files(self._runtime.manifest, self._runtime.directory)
        except LoraportError as error:
            return Check("files", False, str(error))
        return Check("files", True, f"{len(self._runtime.manifest.files)} hashes")

    def _slots(self) -> Check:
        entries = {
            entry.name: list(entry.shape)
            for entry in self._runtime.session.get_overridable_initializers()
        }
        wrong = []
        table = self._runtime.manifest.slots
        wanted = {
            found.name: table.graph_shape(slot, found) for slot, _, found in table.low_rank_inputs()
        }
        wanted |= {found.input: found.shape for found in table.replacements}
        for name, expected in wanted.items():
            shape = entries.pop(name, None)
            if shape is None:
                wrong.append(f"{name} is missing from the graph")
            elif shape != list(expected):
                wrong.append(f"{name} has shape {shape}, not {list(expected)}")
        wrong += [f"{name} is not in the slot table" for name in entries if ".lora_" in name]
        return Check(
            "slots",
            not wrong,
            "; ".join(wrong) or counted(len(table.slots) + len(table.replacements), "slot"),
        )

    def _base(self) -> Check:
        self._progress("base")
        return self._parity("base: onnxruntime = torch", None, Changes())

    def _adapter(self, name: str) -> list[Check]:
        self._progress(f"adapter {name}")
        try:
            changes = self._changes_of([(self._adapters[name], 1.0)])
            packed = self._packed(name, changes)
            checks = [packed, self._torch_merged(name, changes)]
            beside = self._parity(f"adapter {name}: onnxruntime = torch", name, changes)
            checks += [beside, self._differs(name)]
            if self._samples[0].token_ids and beside.comparison is not None:
                checks.append(self._greedy(name, changes, beside.comparison.max_abs))
        except LoraportError as error:
            return [Check(f"adapter {name}", False, str(error))]
        return checks

    def _changes_of(self, parts: Sequence[tuple[Adapter, float]]) -> Changes:
        return changes_of(parts, self._model, self._original)

    def _packed(self, name: str, changes: Changes) -> Check:
        """Compare what is in the bundle with the source adapter, module by module."""
        manifest = self._runtime.manifest
        file = self._runtime.directory / manifest.require_adapter(name).tensors
        packed = read_packed(file, manifest.slots)
        tensors = {key: torch_of(array) for key, array in packed.items()}
        computed = partial(stored_tensor, self._model)
        wrong = differences(tensors, manifest.slots, changes, self._original, computed)
        count = counted(len(changes.terms), "module")
        if changes.replaced:
            count += f", {counted(len(changes.replaced), 'replaced parameter')}"
        return Check(f"adapter {name}: packed = source", not wrong, first_reasons(wrong) or count)

    def _torch_merged(self, name: str, changes: Changes) -> Check:
        samples = self._samples[:_MERGED_SAMPLES]
        with adapted(self._model, changes):
            beside = [torch_outputs(self._model, sample.torch) for sample in samples]
        with merged(self._model, changes):
            into = [torch_outputs(self._model, sample.torch) for sample in samples]
        comparisons = [
            compare(b, m)
            for pair in zip(beside, into, strict=True)
            for b, m in zip(*pair, strict=True)
        ]
        found = worst(comparisons)
        return Check(
            f"adapter {name}: torch merged = beside", found.within(self._tolerance), "", found
        )

    def _parity(self, title: str, selection: Selection, changes: Changes) -> Check:
        found = self._compared(changes, lambda sample: self._session(sample, selection))
        if isinstance(found, str):
            return Check(title, False, found)
        check = self._judged(title, found, changes)
        return check if check.passed else self._with_cause(check, selection, changes)

    def _judged(self, title: str, each: list[Comparison], changes: Changes) -> Check:
        """Judge distances from torch, where it must be by torch's own in the graph's halves."""
        found = worst(each)
        if self._rounding is None or found.within(self._tolerance):
            return Check(title, found.within(self._tolerance), "", found)
        own = self._rounding.measure((sample.torch for sample in self._samples), changes)
        if own is None:
            return Check(
                title, False, f"torch cannot compute it in {self._tolerance.floats}", found
            )
        allowed = allowed_beside(self._tolerance, own)
        self._widest = wider(self._widest, allowed)
        detail = (
            f"torch itself in {self._tolerance.floats}: max abs {own.max_abs:.2e}, relative "
            f"{own.relative:.2e}; twice that is allowed"
        )
        if found.within(allowed):
            return Check(title, True, detail, found)
        # Agreement in the likeliest token is a share of all: it is not judged by single samples.
        bounds = replace(allowed, top1=0.0)
        far = [number for number, one in enumerate(each) if not one.within(bounds)]
        moved = self._rounding.moved((self._samples[number].torch for number in far), changes)
        passed = found.top1 >= allowed.top1 and all(
            each[number].within(wider(bounds, allowed_beside(bounds, own)))
            for number, own in zip(far, moved, strict=True)
        )
        if passed:
            self._sensitive |= set(far)
        detail += (
            f"; in {len(far)} of {counted(len(each), 'input')} it is further off, torch itself, "
            f"with inputs moved by less than a rounding, up to {worst(moved).max_abs:.2e}"
        )
        return Check(title, passed, detail, found)

    def _compared(self, changes: Changes, run: Run) -> list[Comparison] | str:
        """Compare what a run gives with torch, or tell why it cannot be compared."""
        comparisons = []
        for sample in self._samples:
            with adapted(self._model, changes):
                expected = torch_outputs(self._model, sample.torch)
            got = run(sample)
            # Graphs of language models may give their hidden states too, which lead to the logits.
            if len(expected) == 1 < len(got) and sample.token_ids and LOGITS in self._outputs:
                got = [got[self._outputs.index(LOGITS)]]
            if len(expected) != len(got):
                return f"torch has {counted(len(expected), 'output')}, the bundle {len(got)}"
            comparisons.append(worst([compare(e, g) for e, g in zip(expected, got, strict=True)]))
        return comparisons

    def _with_cause(self, failed: Check, selection: Selection, changes: Changes) -> Check:
        """Say of a difference whether it is what the graph rounds in its runs."""
        calibration = self._calibration
        if calibration.in_integers:
            operators = ", ".join(calibration.in_integers)
            detail = f"calibrated ranges may be the cause: {operators} cannot be run without theirs"
            return replace(failed, detail=detail)
        other = calibration if calibration.removable else self._unrounded
        if other is self._unrounded and not self._unrounded.changes:
            return failed
        found = self._compared(
            changes, lambda sample: other.run(sample.session, selection, self._outputs)
        )
        assert not isinstance(found, str)  # there are as many outputs as before
        without = worst(found)
        if other is self._unrounded:
            return judged_unrounded(failed, without)
        own = without.within(self._tolerance)
        says = "the cause" if own else "not the only cause"
        detail = (
            f"the graph's calibrated ranges are {says}: without them max abs is "
            f"{without.max_abs:.2e}, relative {without.relative:.2e}"
        )
        return replace(failed, detail=detail, calibrated=own)

    def _differs(self, name: str) -> Check:
        """The negative control: an adapter that changes nothing proves nothing."""
        found = worst(
            [
                compare(base, changed)
                for number, sample in enumerate(self._samples)
                if number not in self._sensitive
                for base, changed in zip(
                    self._session(sample, None), self._session(sample, name), strict=True
                )
            ]
        )
        # Infinite or NaN differences are no proof of an effect either.
        large = self._tolerance.max_abs < found.max_abs < np.inf
        passed = bool(large and not found.within(self._widest))
        detail = "" if passed else "the adapter changes no more than the tolerance"
        return Check(f"adapter {name}: differs from base", passed, detail, found)

    def _greedy(self, name: str, changes: Changes, apart: float) -> Check:
        """Compare each generated token with torch's likeliest after the same tokens.

        Logits that are ``apart`` may exchange tokens that are not further from each other than
        twice that: such a token agrees. After one, both go on from it, or nothing would agree.
        """
        title = f"adapter {name}: greedy tokens"
        agreed, total = 0, 0
        for sample in self._samples[:_GREEDY_PROMPTS]:
            sampling = Sampling(max_new_tokens=_GREEDY_TOKENS)
            try:
                got = list(generate(self._runtime, sample.token_ids, name, sampling))
            except LoraportError as error:  # its logits are no numbers
                return Check(title, False, str(error))
            with adapted(self._model, changes):
                logits = next_token_logits(self._model, sample.token_ids, got)
            behind = logits.max(-1) - logits[np.arange(len(got)), got]
            agreed += int((behind <= 2 * apart).sum())
            total += len(got)
        passed = agreed >= self._tolerance.top1 * total
        return Check(title, passed, f"{agreed} of {total} agree")

    def _blend(self, first: str, second: str) -> Check:
        strengths = {first: 0.75, second: 0.5}
        title = f"blend {first}=0.75 {second}=0.5: onnxruntime = torch"
        try:
            parts = [(self._adapters[name], strength) for name, strength in strengths.items()]
            return self._parity(title, strengths, self._changes_of(parts))
        except LoraportError as error:
            return Check(title, False, str(error))

    def _swaps(self, first: str, last: str) -> Check:
        title = f"swaps {first} → {last} → {first} → none repeat bit for bit"
        sample = self._samples[0]
        try:
            base = self._session(sample, None)
            once = self._session(sample, first)
            self._session(sample, last)
            again = self._session(sample, first)
            after = self._session(sample, None)
        except LoraportError as error:
            return Check(title, False, str(error))
        same = all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
        back = all(np.array_equal(a, b) for a, b in zip(base, after, strict=True))
        detail = "" if same and back else "the adapter" if not same else "the base"
        return Check(title, same and back, detail and f"{detail} gives other outputs after a swap")

    def _shipped(self, names: list[str]) -> list[Check]:
        self._progress("files for other runners")
        runtime, inputs = self._runtime, self._samples[0].session
        adapters = [name for name in names if self._loads(name)]
        return [
            *(same_in_both_files(runtime, name) for name in adapters),
            required_graph(runtime, inputs, self._outputs, adapters, self._tolerance),
            golden_cases(self._deployed or runtime),
        ]

    def _loads(self, name: str) -> bool:
        """Tell whether an adapter's tensors fit; why they do not, its own check says."""
        try:
            return self._runtime.load(name) is not None
        except LoraportError:
            return False

    def _as_deployed(self, deployed: Runtime) -> Check:
        comparisons = []
        for sample in self._samples:
            outputs = deployed.run(sample.session, None, self._outputs)
            exact = self._session(sample, None)
            comparisons += [
                compare(expected, outputs[name])
                for name, expected in zip(self._outputs, exact, strict=True)
            ]
        found = worst(comparisons)
        title = f"as deployed: base, {AS_DEPLOYED.reason}"
        return Check(title, found.within(AS_DEPLOYED), "", found)

    def _session(self, sample: Sample, selection: Selection) -> list[np.ndarray]:
        outputs = self._runtime.run(sample.session, selection, self._outputs)
        return [outputs[name] for name in self._outputs]
