"""Decoding with a cache that is written in place beside one that every step gives to the next.

    python tests/benchmarks/cache.py [--precision int4] [--lengths 64,1024,4096]

Both in one process and in turns, over a bundle of SmolLM2: a step of one token after so many
others, the median of many and its ratio. What both say is compared first, bit for bit.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from timing import medians, share_threads  # the sibling

from converters.onnx import ExportOptions, export_base
from loraport.runtime import Runtime
from loraport.runtime.decoder import read_decoder
from loraport.runtime.steps import GrowingSteps, InPlaceSteps

NEW = 7


def compare(runtime: Runtime, length: int, steps: int) -> tuple[float, float]:
    """Return the seconds of a step after ``length`` tokens: growing, in place."""
    decoder = read_decoder(runtime.directory)
    prompt = [5 + i % 200 for i in range(length)]
    room = length + 2 * steps + 16
    both = GrowingSteps(runtime, decoder, None), InPlaceSteps(runtime, decoder, None, room)
    first, other = (each.run(prompt) for each in both)
    np.testing.assert_array_equal(first, other)
    growing, in_place = medians(steps, *(lambda each=each: each.run([NEW]) for each in both))
    np.testing.assert_array_equal(*(each.run([NEW]) for each in both))
    return growing, in_place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="int4", choices=["fp32", "int4"])
    parser.add_argument("--lengths", default="64,1024,4096")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bundle", type=Path, help="use this bundle instead of exporting")
    arguments = parser.parse_args()
    share_threads()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or Path(scratch) / "bundle"
        if arguments.bundle is None:
            export_base("smollm2", bundle, ExportOptions(precision=arguments.precision))
        runtime = Runtime(bundle, check=False)
        print(f"{'tokens before':>13}  {'growing':>9}  {'in place':>9}  ratio")
        for length in map(int, arguments.lengths.split(",")):
            growing, in_place = compare(runtime, length, arguments.steps)
            times = f"{1e3 * growing:6.2f} ms  {1e3 * in_place:6.2f} ms"
            print(f"{length:13}  {times}  {in_place / growing:.3f}", flush=True)


if __name__ == "__main__":
    main()
