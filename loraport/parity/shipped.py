"""What other runners read from a bundle says the same as what loraport's runtime reads.

ONNX Runtime's own adapter API reads ``.onnx_adapter`` files, runtimes without overridable
initializers open ``model.required.onnx``, and any of them may check itself against ``golden/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from loraport.bundle.base_values import BaseValues
from loraport.bundle.golden import golden_reason
from loraport.bundle.manifest import REQUIRED_MODEL_FILE
from loraport.counts import counted
from loraport.errors import LoraportError
from loraport.parity.check import Check, first_reasons
from loraport.parity.metrics import compare, worst
from loraport.parity.tolerances import Tolerance
from loraport.runtime import Lane, Runtime
from loraport.runtime.replay import replay
from loraport.runtime.resident import read_packed
from loraport.runtime.session import open_session
from loraport.runtime.values import FLOATS, as_numpy


def same_in_both_files(runtime: Runtime, name: str) -> Check:
    """Compare an adapter's ``.onnx_adapter`` with its ``.safetensors``, bit for bit."""
    import onnxruntime

    title = f"adapter {name}: .onnx_adapter = .safetensors"
    entry = runtime.manifest.require_adapter(name)
    file = runtime.directory / entry.file
    expected = read_packed(runtime.directory / entry.tensors, runtime.manifest.slots)
    try:
        contents = onnxruntime.AdapterFormat.read_adapter(str(file))
        got: Mapping[str, Any] = contents.get_parameters()
    except Exception as error:  # onnxruntime raises classes of its own without a common base
        return Check(title, False, f"{file.name} cannot be read: {str(error).splitlines()[-1]}")
    wrong = [f"{key} is missing" for key in expected if key not in got]
    wrong += [f"{key} is not in the .safetensors" for key in got if key not in expected]
    wrong += [f"{key} differs" for key in expected if key in got and not _same(expected, got, key)]
    return Check(title, not wrong, first_reasons(wrong) or counted(len(got), "tensor"))


def required_graph(
    runtime: Runtime,
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    names: Iterable[str],
    tolerance: Tolerance,
) -> Check:
    """Compare ``model.required.onnx`` with the runtime: the base and every adapter, one input."""
    title = f"{REQUIRED_MODEL_FILE} = model.onnx"
    try:
        session = open_session(
            runtime.directory / REQUIRED_MODEL_FILE,
            provider=runtime.provider,
            float32_activations=True,
            precision=runtime.manifest.precision,
        )
    except LoraportError as error:
        return Check(title, False, str(error))
    entries = {entry.name: entry for entry in session.get_inputs()}
    slots = runtime.manifest.slots
    neutral: dict[str, Any] = {control.input: control.default() for control in slots.controls}
    strange = entries.keys() ^ (inputs.keys() | set(slots.inputs()) | neutral.keys())
    if strange:
        detail = f"its inputs are not the model's and the slots': {first_reasons(sorted(strange))}"
        return Check(title, False, detail)
    base_values = BaseValues(runtime.directory)
    neutral |= {slot.input: base_values[slot.input] for slot in slots.replacements}
    neutral |= {
        entry.name: np.full(entry.neutral_shape, entry.neutral, FLOATS[entries[entry.name].type])
        for _, _, entry in slots.low_rank_inputs()
    }
    comparisons = []
    for name in (None, *names):
        resident = runtime.load(name)
        filled = resident.values if resident else {}
        got = Lane(session, None, runtime.provider).run({**inputs, **neutral, **filled}, outputs)
        expected = runtime.run(inputs, name, outputs)
        comparisons += [compare(expected[key], got[key]) for key in outputs]
    found = worst(comparisons)
    return Check(title, found.within(tolerance), "", found)


def golden_cases(runtime: Runtime) -> Check:
    """Replay the bundle's golden cases, or say why it can have none."""
    try:
        results = replay(runtime)
    except LoraportError as error:
        return Check("golden cases", False, str(error))
    other = "changes the base otherwise than its golden outputs do"
    wrong = [
        f"{r.name}: max abs {r.max_abs:.3g}" if r.swapped else f"{r.name}: {other}"
        for r in results
        if not r.passed
    ]
    if not results:
        reason = golden_reason(runtime.directory)
        listed = reason and f"none: {reason}"
        return Check("golden cases", bool(reason), listed or "the manifest lists none")
    seen = f"{counted(len(results), 'case')} within {runtime.manifest.tolerance:g}"
    return Check("golden cases", not wrong, first_reasons(wrong) or seen)


def _same(expected: Mapping[str, np.ndarray], got: Mapping[str, Any], key: str) -> bool:
    ours, theirs = expected[key], as_numpy(got[key])
    alike = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return bool(alike and ours.tobytes() == theirs.tobytes())
