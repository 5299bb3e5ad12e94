"""Decode speed of a slotted SmolLM2 beside the same graph without slots, in one run.

    python tests/benchmarks/decode.py [--precision int4] [--rank 16] [--rounds 9]

Each measurement is a process of its own with one session: where its weights happen to lie in
memory moves a whole session by several per cent, and the threads of a second session would get in
the way. The variants take turns, round after round; a process's figure is the median of its steps,
a ratio is taken within a round, and the median of the rounds is printed, with the quartiles beside
it. The fastest process of each is what the machine can do when nothing else disturbs it. "twice" is
the plain graph against itself: what the method cannot tell apart. Adapters are random, rank R on
all linear layers.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from converters.onnx import add_adapters, export_base
from converters.onnx.exporters.genai_builder import build_with_genai
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.base_model import resolve_base
from loraport.bundle.manifest import MODEL_FILE
from loraport.runtime import Lane, Runtime
from loraport.runtime.generation import first_step_inputs, read_decoder
from loraport.runtime.session import open_session

PROMPT = list(range(100, 164))
WARM = 10  # steps
PLAIN, TWICE, IDLE, ACTIVE = (
    "graph without slots",
    "the same, twice",
    "slots, no adapter",
    "adapter",
)


def random_adapter(runtime: Runtime, rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, (slot, member) in runtime.manifest.slots.modules().items():
        a = torch.randn(rank, slot.in_features, generator=generator) * 0.02
        b = torch.randn(member.stop - member.start, rank, generator=generator) * 0.02
        modules[path] = LoraModule(ModuleKind.LINEAR, a, b, alpha=rank)
    return Adapter(modules)


class Decoding:
    """One sequence being decoded; each call of `step` times one token."""

    def __init__(self, lane: Lane, runtime: Runtime) -> None:
        self._lane = lane
        self._decoder = read_decoder(runtime.directory)
        self._inputs = dict(first_step_inputs(runtime, self._decoder, PROMPT))
        self._names = set(self._inputs)
        self._length = len(PROMPT)
        self.seconds: list[float] = []
        self.step(timed=False)

    def step(self, *, timed: bool = True) -> None:
        start = time.perf_counter()
        outputs = self._lane.run_on_device(self._inputs)
        token = int(outputs["logits"].numpy()[0, -1].argmax())
        if timed:
            self.seconds.append(time.perf_counter() - start)
        inputs = {
            "input_ids": np.array([[token]], np.int64),
            "attention_mask": np.ones((1, self._length + 1), np.int64),
            "position_ids": np.array([[self._length]], np.int64),
        }
        for layer in range(self._decoder.layers):
            for past, present in zip(self._decoder.past, self._decoder.present, strict=True):
                inputs[past % layer] = outputs[present % layer]
        self._inputs = {name: inputs[name] for name in self._names}
        self._length += 1


def measure(variant: str, bundle: Path, plain: Path, name: str, steps: int) -> float:
    """Return the median seconds of a step, in this process."""
    runtime = Runtime(bundle, check=False)
    if variant in (PLAIN, TWICE):
        runtime.session = open_session(plain / MODEL_FILE)  # the other one goes, with its threads
        lane = Lane(runtime.session, None, "cpu")
    else:
        lane = runtime.lane(name if variant == ACTIVE else None)
    decoding = Decoding(lane, runtime)
    for number in range(WARM + steps):
        decoding.step(timed=number >= WARM)
    return statistics.median(decoding.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bundle", type=Path, help="use this bundle instead of exporting")
    parser.add_argument("--plain", type=Path, help="and this folder's graph without slots")
    parser.add_argument("--child", choices=[PLAIN, TWICE, IDLE, ACTIVE])
    arguments = parser.parse_args()
    name = f"bench{arguments.rank}"
    if arguments.child:
        bundle, plain = arguments.bundle, arguments.plain
        print(measure(arguments.child, bundle, plain, name, arguments.steps))
        return
    with tempfile.TemporaryDirectory() as scratch:
        from converters.onnx import ExportOptions

        bundle = arguments.bundle or Path(scratch) / "bundle"
        if arguments.bundle is None:
            export_base("smollm2", bundle, ExportOptions(precision=arguments.precision))
        plain = arguments.plain or Path(scratch) / "plain"
        if arguments.plain is None:
            plain.mkdir()
            base = resolve_base("smollm2")
            build_with_genai(base, plain, precision=arguments.precision, provider="cpu")
        runtime = Runtime(bundle, check=False)
        if name not in runtime.adapters:
            add_adapters(bundle, {name: random_adapter(runtime, arguments.rank, 0)})
        del runtime
        given = ["--bundle", str(bundle), "--plain", str(plain), "--rank", str(arguments.rank)]
        command = [sys.executable, __file__, *given, "--steps", str(arguments.steps), "--child"]
        found: dict[str, list[float]] = {PLAIN: [], IDLE: [], ACTIVE: [], TWICE: []}
        for number in range(arguments.rounds):
            for variant in list(found)[:: 1 if number % 2 else -1]:
                done = subprocess.run([*command, variant], check=True, capture_output=True)
                found[variant].append(float(done.stdout))
    print(f"SmolLM2-135M {arguments.precision}, decode after {len(PROMPT)} tokens")
    print(f"{'variant':24} {'ms/token':>9} {'ratio':>6}  {'quartiles':14}  fastest, ratio")
    for variant, seconds in found.items():
        title = f"{variant}, rank {arguments.rank}" if variant == ACTIVE else variant
        ratios = [mine / other for mine, other in zip(seconds, found[PLAIN], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        milliseconds = 1e3 * statistics.median(seconds)
        fastest = f"{1e3 * min(seconds):.2f}, {min(seconds) / min(found[PLAIN]):.3f}"
        print(f"{title:24} {milliseconds:9.2f} {middle:6.3f}  {low:.3f} to {high:.3f}  {fastest}")


if __name__ == "__main__":
    main()
