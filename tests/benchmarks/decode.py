"""Decode speed of a slotted SmolLM2 beside the same graph without slots, in one run.

    python tests/benchmarks/decode.py [--precision int4] [--rank 16] [--rounds 9]

In each round a new process opens every session, in another order, since where a session's weights
happen to lie in memory moves it by several per cent. Its sessions share one pool of threads, so
that none spins in another's way, and take turns of a few tokens, the first of which only warms the
caches and is not counted: what else the machine does falls on all alike. A round's ratio is the
median over its turns of one variant's time by that of the graph without slots; printed are the
median of the rounds and the quartiles beside it. "twice" is the plain graph in a second session:
what the method cannot tell apart. Adapters are random, rank R on all linear layers.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import child, print_turns, share_threads  # the sibling

from converters.onnx import add_adapters, export_base
from converters.onnx.exporters.genai_builder import build_with_genai
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.base.finding import resolve_base
from loraport.bundle.manifest import MODEL_FILE
from loraport.runtime import Lane, Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.session import open_session

PROMPT = list(range(100, 164))
STEPS = 4  # of a turn
WARM_TURNS = 2
PLAIN, TWICE, IDLE, ACTIVE = VARIANTS = (
    "graph without slots",
    "the same, twice",
    "slots, no adapter",
    "an adapter",
)
SLOTTED = "slots"  # one session for both


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


def measure(bundle: Path, plain: Path, name: str, turns: int) -> dict[str, list[float]]:
    """Return the seconds of a step of each variant, turn after turn, in this process."""
    share_threads()
    lanes: dict[str, Lane] = {}
    for variant in random.sample([PLAIN, TWICE, SLOTTED], 3):
        if variant == SLOTTED:
            runtime = Runtime(bundle, check=False)
            lanes |= {IDLE: runtime.lane(None), ACTIVE: runtime.lane(name)}
        else:
            lanes[variant] = Lane(open_session(plain / MODEL_FILE), None, "cpu")
    decodings = {variant: Decoding(lanes[variant], runtime) for variant in VARIANTS}
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(-WARM_TURNS, turns):
        for variant in random.sample(VARIANTS, len(VARIANTS)):
            decoding = decodings[variant]
            decoding.step(timed=False)
            before = len(decoding.seconds)
            for _ in range(STEPS):
                decoding.step()
            if turn >= 0:
                found[variant].append(statistics.median(decoding.seconds[before:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bundle", type=Path, help="use this bundle instead of exporting")
    parser.add_argument("--plain", type=Path, help="and this folder's graph without slots")
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    name = f"bench{arguments.rank}"
    if arguments.child:
        print(json.dumps(measure(arguments.bundle, arguments.plain, name, arguments.turns)))
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
        given += ["--turns", str(arguments.turns), "--child"]
        rounds = [child(__file__, *given) for _ in range(arguments.rounds)]
    print(f"SmolLM2-135M {arguments.precision}, rank {arguments.rank}")
    print_turns(f"decode after {len(PROMPT)} tokens", rounds, PLAIN)


if __name__ == "__main__":
    main()
