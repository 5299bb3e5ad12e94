"""Which provider ran each node of a graph, by ONNX Runtime's own profile of one run.

A session that was opened with a GPU's provider may still give nodes without a kernel there to the
CPU, and copy between the two. Shapes and sizes are computed on the CPU on purpose; what must not
be there is a node that computes hidden states.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loraport.bundle.manifest import MODEL_FILE
from loraport.runtime.lane import Lane
from loraport.runtime.session import PROVIDERS, open_session

if TYPE_CHECKING:
    from loraport.runtime.model import Runtime, Selection

_KERNEL = "_kernel_time"
_FLOATING = frozenset(("float", "float16", "bfloat16", "double"))
_MATRIX = 2  # dimensions from which on an output is taken for hidden states, not for a size


@dataclass(frozen=True)
class NodeRun:
    """One node's run.

    Attributes:
        name: The node's name, after the runtime's optimizations.
        op_type: What it does.
        provider: ONNX Runtime's name of the provider that ran it.
        computes: It gives numbers of two dimensions or more in floating point.
    """

    name: str
    op_type: str
    provider: str
    computes: bool


def node_runs(
    runtime: Runtime, inputs: Mapping[str, np.ndarray], selection: Selection = None
) -> list[NodeRun]:
    """Run a bundle's graph once, in a session of its own, and return who ran each node.

    Args:
        runtime: The bundle; its resident adapters are used as they are.
        inputs: Every input of the model, without slots.
        selection: The adapters.
    """
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(
            runtime.directory / MODEL_FILE,
            provider=runtime.provider,
            profile=Path(scratch) / "profile",
            precision=runtime.manifest.precision,
        )
        controls = runtime.manifest.slots.controls
        Lane(session, runtime.load(selection), runtime.provider, controls).run_on_device(inputs)
        return read_profile(Path(session.end_profiling()))


def read_profile(file: Path) -> list[NodeRun]:
    """Return the node runs in a profile that ONNX Runtime wrote."""
    events: list[dict[str, Any]] = json.loads(file.read_bytes())
    found = []
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(_KERNEL):
            continue
        facts = event["args"]
        outputs = facts.get("output_type_shape", [])
        computes = any(
            kind in _FLOATING and len(shape) >= _MATRIX
            for output in outputs
            for kind, shape in output.items()
        )
        node = name.removesuffix(_KERNEL)
        found.append(NodeRun(node, facts["op_name"], facts["provider"], computes))
    return found


def strays(runs: list[NodeRun], provider: str) -> list[NodeRun]:
    """Return the nodes that compute hidden states anywhere but on a provider.

    Args:
        runs: What `node_runs` gave.
        provider: ``"cpu"`` or ``"cuda"``.
    """
    return [run for run in runs if run.computes and run.provider != PROVIDERS[provider]]
