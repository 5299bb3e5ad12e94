"""The check that nothing fell back to the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from loraport.errors import first_names
from loraport.parity.check import Check
from loraport.runtime import Runtime, Selection
from loraport.runtime.placement import node_runs, strays

_SHOWN = 5


def placement(runtime: Runtime, inputs: Mapping[str, np.ndarray], selection: Selection) -> Check:
    """Check that every node that computes hidden states runs on the runtime's provider."""
    runs = node_runs(runtime, inputs, selection)
    elsewhere = strays(runs, runtime.provider)
    title = f"every node on {runtime.provider}"
    if elsewhere:
        listed = first_names((f"{run.name} ({run.op_type})" for run in elsewhere), _SHOWN)
        return Check(title, False, f"{listed} on {elsewhere[0].provider}")
    counts = Counter(run.provider.removesuffix("ExecutionProvider") for run in runs)
    return Check(title, bool(runs), ", ".join(f"{n} on {name}" for name, n in counts.items()))
