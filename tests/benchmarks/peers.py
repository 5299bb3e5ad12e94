"""Decode speed and switching of every way to run an adapter under ONNX Runtime, in one run.

    python tests/benchmarks/peers.py [--precision int4] [--rounds 5] [--peer-python PYTHON]

The adapter is random, rank 16 on all linear layers of SmolLM2. Every graph is made by its own tool
and must first give what PyTorch gives: "off by" is the distance of its logits from PEFT's, relative
to the adapter's effect; the graph without an adapter must be off by 1. An int4 graph is compared
with PEFT on the rounded weights, with float32 activations. Merging changes what is rounded: the
merged int4 graph is compared with PyTorch on that graph's own weights.

Olive and onnxsim are run by ``--peer-python``, a Python of another environment that has them. They
change an existing graph: Olive the one that GenAI's builder makes with ``adapter_path``, onnxsim
GenAI's plain one. Each session is measured in a process of its own; processes take turns.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from decode import PROMPT, Decoding, random_adapter  # the sibling benchmarks
from merged import export_merged
from rows import strong
from safetensors.numpy import load_file
from timing import child, print_ratios

from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.exporters.genai_builder import build_with_genai
from converters.onnx.modules.graph_weights import load_graph_weights
from loraport.base.finding import resolve_base
from loraport.base.loading import load_model
from loraport.bundle.manifest import MODEL_FILE
from loraport.peft_layout.read import read_peft
from loraport.peft_layout.write import write_peft
from loraport.runtime import Lane, Runtime
from loraport.runtime.decoder import GENAI_CONFIG, first_step_inputs, read_decoder
from loraport.runtime.resident import make_resident
from loraport.runtime.session import open_session

RANK, WARM, LOADS = 16, 10, 3
NAME = f"peers{RANK}"
# Of the adapter's effect; as much as 4 bits per weight leave of A and B, where a tool rounds them.
ALLOWED, ALLOWED_ROUNDED = 1e-3, 0.5
SCRIPTS = Path(__file__).parent / "peer_graphs"
PLAIN, SLOTS, MERGED = "graph without an adapter", "loraport, slots", "merged export"


@dataclass(frozen=True)
class Work:
    """Where graphs are made, and from what."""

    graphs: Path
    precision: str
    adapter: Path
    bundle: Path
    python: str | None

    def directory(self, title: str) -> Path:
        if title == SLOTS:
            return self.bundle
        return self.graphs / title.replace(" ", "-").replace(",", "").replace("/", "-")


class NotMade(Exception):
    """A peer that gives no graph; the text says why."""


def plain(work: Work, out: Path) -> None:
    build_with_genai(resolve_base("smollm2"), out, precision=work.precision, provider="cpu")


def merged(work: Work, out: Path) -> None:
    out.rmdir()
    export_merged(read_peft(work.adapter), out, work.precision)


def genai(work: Work, out: Path, *options: str) -> None:
    """GenAI's builder with ``adapter_path``, which bakes A and B in."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--output", str(out)]
    command += ["--input", str(resolve_base("smollm2")), "--precision", work.precision]
    command += ["--execution_provider", "cpu", "--cache_dir", str(out / "cache")]
    command += ["--extra_options", f"adapter_path={work.adapter}", *options]
    run(command)


def genai_unrounded(work: Work, out: Path) -> None:
    """The same, but A and B are not quantized with the base."""
    if work.precision == "fp32":
        raise NotMade("the same as above in fp32")
    import onnx

    made = work.directory(GENAI) / MODEL_FILE
    if not made.exists():
        raise NotMade("GenAI's builder gave no graph")
    nodes = onnx.load(made, load_external_data=False).graph.node
    names = [node.name.removesuffix("_Q4") for node in nodes if "/lora_" in node.name]
    genai(work, out, f"nodes_to_exclude={','.join(names)}")


def olive(work: Work, out: Path, source: str | None = None) -> None:
    graph = work.directory(source or GENAI) / MODEL_FILE
    if not graph.exists():
        raise NotMade("GenAI's builder gave no graph to take the adapter from")
    peer(work, "olive", "olive_extract.py", str(graph), str(out))
    shutil.copy(graph.parent / GENAI_CONFIG, out)


def olive_unrounded(work: Work, out: Path) -> None:
    if work.precision == "fp32":
        raise NotMade("the same as above in fp32")
    olive(work, out, GENAI_UNROUNDED)


def onnxsim(work: Work, out: Path) -> None:
    graph = work.directory(PLAIN) / MODEL_FILE
    peer(work, "onnxsim", "onnxsim_inject.py", str(graph), str(work.adapter), str(out / MODEL_FILE))
    shutil.copy(graph.parent / GENAI_CONFIG, out)


OLIVE = "Olive ExtractAdapters"
GENAI, GENAI_UNROUNDED = "GenAI adapter_path", "GenAI adapter_path, adapter not rounded"
BUILDERS: dict[str, Callable[[Work, Path], None]] = {
    PLAIN: plain,
    MERGED: merged,
    GENAI: genai,
    GENAI_UNROUNDED: genai_unrounded,
    OLIVE: olive,
    f"{OLIVE}, adapter not rounded": olive_unrounded,
    "onnxsim inject_lora": onnxsim,
}


ROUNDED = (GENAI, OLIVE)


def peer(work: Work, package: str, script: str, *arguments: str) -> None:
    """Run one of the scripts by the Python that has the peer."""
    if work.python is None:
        raise NotMade("not installed; give --peer-python")
    found = subprocess.run([work.python, "-c", f"import {package}"], capture_output=True)
    if found.returncode:
        raise NotMade(f"not installed for {work.python}")
    run([work.python, str(SCRIPTS / script), *arguments])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NotMade(next((x for x in reversed(lines) if "Error" in x), lines[-1])[:200])


def make(title: str, work: Work) -> str | None:
    """Make a graph where there is none yet; return why not, if so."""
    out = work.directory(title)
    if (out / MODEL_FILE).exists():
        return None
    out.mkdir(parents=True)
    try:
        BUILDERS[title](work, out)
    except Exception as error:  # one peer's failure must not hide the others' figures
        shutil.rmtree(out, ignore_errors=True)
        return str(error).strip().splitlines()[0]
    return None


class Ready:
    """A graph that is open, and how it is switched to an adapter."""

    def __init__(self, title: str, directory: Path, *, exact: bool = False) -> None:
        self.directory = directory
        self._weights = directory / "adapter_weights.safetensors"
        self._bundle = title == SLOTS
        if self._bundle:
            runtime = Runtime(directory, check=False, float32_activations=exact)
            self.session, self._resident = runtime.session, runtime.load(NAME)
            self._controls = runtime.manifest.slots.controls
        else:
            self.session = open_session(directory / MODEL_FILE, float32_activations=exact)
            self._controls = ()
            fed = self._weights.exists()
            self._resident = make_resident(load_file(self._weights), "cpu") if fed else None

    def lane(self) -> Lane:
        return Lane(self.session, self._resident, "cpu", self._controls)

    def switch(self) -> float:
        """Return the median seconds from another adapter to this one, ready to run."""
        found = []
        for _ in range(20 if self._resident is not None else LOADS):
            start = time.perf_counter()
            if self._resident is not None:
                kept: Any = self.lane()
            else:
                kept = open_session(self.directory / MODEL_FILE)
            found.append(time.perf_counter() - start)
            del kept
        return statistics.median(found)


def measure(title: str, directory: Path, steps: int) -> dict[str, float]:
    """Return median seconds of a token and of a switch."""
    ready = Ready(title, directory)
    decoding = Decoding(ready.lane(), SimpleNamespace(session=ready.session, directory=directory))
    for number in range(WARM + steps):
        decoding.step(timed=number >= WARM)
    return {"token": statistics.median(decoding.seconds), "switch": ready.switch()}


def logits(title: str, directory: Path) -> np.ndarray:
    """Return a graph's logits for the prompt."""
    ready = Ready(title, directory, exact=True)
    place = SimpleNamespace(session=ready.session, directory=directory)
    prompt = first_step_inputs(place, read_decoder(directory), PROMPT)
    return ready.lane().run(prompt, ["logits"])["logits"]


def torch_logits(graph: Path | None, adapter: Path | None) -> np.ndarray:
    """Return PyTorch's logits, with a graph's weights and PEFT's adapter where given."""
    model = load_model("smollm2")
    if graph is not None:
        load_graph_weights(graph / MODEL_FILE, model)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([PROMPT])).logits.numpy()


def distances(work: Work, titles: list[str]) -> dict[str, float]:
    """Return how far each graph's logits are from PyTorch's, relative to the adapter's effect."""
    rounded = work.precision != "fp32"
    weights = work.directory(PLAIN) if rounded else None
    expected = torch_logits(weights, work.adapter)
    effect = np.linalg.norm(torch_logits(weights, None) - expected)
    found = {}
    for title in titles:
        place = work.directory(title)
        own = torch_logits(place, None) if rounded and title == MERGED else expected
        found[title] = float(np.linalg.norm(logits(title, place) - own) / effect)
    if not 0.99 < found[PLAIN] < 1.01:
        raise SystemExit(
            f"{PLAIN}: expected to be off by the adapter, got {found[PLAIN]:.3g} of it"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", help="of an environment with olive-ai and onnxsim")
    parser.add_argument("--graphs", type=Path, help="make graphs here, and use those that are here")
    parser.add_argument("--bundle", type=Path, help="loraport's bundle; exported unless given")
    parser.add_argument("--make-only", action="store_true", help="make the graphs, measure nothing")
    parser.add_argument("--child", nargs=2, metavar=("TITLE", "DIRECTORY"))
    arguments = parser.parse_args()
    if arguments.child:
        title, directory = arguments.child
        print(json.dumps(measure(title, Path(directory), arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        graphs = arguments.graphs or Path(scratch)
        report(arguments, graphs.absolute())


def report(arguments: argparse.Namespace, graphs: Path) -> None:
    work, absent = prepare(arguments, graphs)
    if arguments.make_only:
        print(json.dumps(absent))
        return
    titles = [PLAIN, SLOTS, *(title for title in BUILDERS if title not in {PLAIN, *absent})]
    off = distances(work, titles)
    for title in titles:
        most = ALLOWED_ROUNDED if title in ROUNDED and work.precision != "fp32" else ALLOWED
        if title != PLAIN and not off[title] <= most:
            absent[title] = f"no figure, off by {off[title]:.2g} of the adapter's effect"
    titles = [title for title in titles if title not in absent]
    rounds: list[dict[str, float]] = []
    switches: dict[str, list[float]] = {title: [] for title in titles}
    for number in range(arguments.rounds):
        found = {}
        for title in titles[:: -1 if number % 2 else 1]:
            options = ("--steps", str(arguments.steps), "--child", title)
            found[title] = child(__file__, *options, str(work.directory(title)))
            switches[title].append(found[title]["switch"])
        rounds.append({title: found[title]["token"] for title in titles})
    print_ratios(f"SmolLM2 {work.precision}, a token after {len(PROMPT)}", rounds, PLAIN)
    print(f"{'':44} {'off by':>8} {'switch, ms':>11}")
    for title in titles:
        switch = f"{1e3 * statistics.median(switches[title]):11.3f}" if title != PLAIN else ""
        print(f"{title:44} {off[title]:8.2g} {switch}")
    for title, reason in absent.items():
        print(f"{title}: {reason}")


def prepare(arguments: argparse.Namespace, graphs: Path) -> tuple[Work, dict[str, str]]:
    """Make the adapter and all graphs; return what could not be made and why."""
    graphs.mkdir(exist_ok=True, parents=True)
    bundle, adapter = arguments.bundle or graphs / "bundle", graphs / "adapter"
    if not bundle.exists():
        export_base("smollm2", bundle, ExportOptions(precision=arguments.precision))
    runtime = Runtime(bundle, check=False)
    if not adapter.exists():
        write_peft(strong(random_adapter(runtime, RANK, 0)), adapter)
    if NAME not in runtime.adapters:
        add_adapters(bundle, {NAME: read_peft(adapter)})
    del runtime
    work = Work(graphs, arguments.precision, adapter, bundle, arguments.peer_python)
    absent = {}
    for title in BUILDERS:
        reason = make(title, work)
        if reason is not None:
            absent[title] = reason
        print(f"{title}: {reason or 'made'}", file=sys.stderr, flush=True)
    return work, absent


if __name__ == "__main__":
    main()
