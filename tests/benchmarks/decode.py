"""Decode speed of a slotted SmolLM2 beside the same graph without slots, in one run.

    python tests/benchmarks/decode.py [--precision int4] [--rank 16] [--steps 200]

Steps of the variants alternate, so that what else the machine does falls on all of them alike;
medians are compared. Adapters are random, rank R on all linear layers.
"""

import argparse
import statistics
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bundle", type=Path, help="use this bundle instead of exporting")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        from converters.onnx import ExportOptions

        bundle = arguments.bundle or Path(scratch) / "bundle"
        if arguments.bundle is None:
            export_base("smollm2", bundle, ExportOptions(precision=arguments.precision))
        plain = Path(scratch) / "plain"
        plain.mkdir()
        base = resolve_base("smollm2")
        build_with_genai(base, plain, precision=arguments.precision, provider="cpu")
        runtime = Runtime(bundle, check=False)
        name = f"bench{arguments.rank}"
        if name not in runtime.adapters:
            add_adapters(bundle, {name: random_adapter(runtime, arguments.rank, 0)})
        runtime.refresh()
        without = Lane(open_session(plain / MODEL_FILE), None, "cpu")
        variants = {
            "graph without slots": Decoding(without, runtime),
            "slots, no adapter": Decoding(runtime.lane(None), runtime),
            f"adapter, rank {arguments.rank}": Decoding(runtime.lane(name), runtime),
        }
        for _ in range(arguments.steps):
            for variant in variants.values():
                variant.step()
    reference = statistics.median(variants["graph without slots"].seconds)
    print(f"SmolLM2-135M {arguments.precision}, decode after {len(PROMPT)} tokens")
    print(f"{'variant':24} {'ms/token':>9} {'ratio':>6}")
    for title, variant in variants.items():
        median = statistics.median(variant.seconds)
        print(f"{title:24} {1e3 * median:9.2f} {median / reference:6.3f}")


if __name__ == "__main__":
    main()
