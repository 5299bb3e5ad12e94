"""Another adapter in a loaded model, beside loading a merged model's session, in one run.

    python tests/benchmarks/switching.py [--precision int4] [--ranks 8,16,64] [--repeats 20]

From "use this adapter" until the first run can start. Adapters are random, on all linear layers.
Checked first: swaps A -> B -> A repeat bit for bit, also through the disk, and A is not B.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from decode import PROMPT, random_adapter  # the sibling benchmarks
from merged import export_merged

from converters.onnx import ExportOptions, add_adapters, export_base
from loraport.bundle.manifest import MODEL_FILE
from loraport.runtime import Lane, Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.session import open_session


def names_of(rank: int) -> tuple[str, str]:
    return f"switch{rank}-0", f"switch{rank}-1"


def prepare(bundle: Path, precision: str, ranks: list[int]) -> None:
    """Export a bundle where there is none yet, with two adapters of each rank."""
    if not bundle.exists():
        export_base("smollm2", bundle, ExportOptions(precision=precision))
    runtime = Runtime(bundle, check=False)
    missing = {
        name: random_adapter(runtime, rank, seed)
        for rank in ranks
        for seed, name in enumerate(names_of(rank))
        if name not in runtime.adapters
    }
    if missing:
        add_adapters(bundle, missing)


def logits(lane: Lane, inputs: Mapping[str, Any]) -> np.ndarray:
    return lane.run(inputs, ["logits"])["logits"][0, -1]


def verify(runtime: Runtime, inputs: Mapping[str, Any], names: tuple[str, str]) -> float:
    """Return how far the two adapters' logits are apart, once swaps are proved to be swaps."""
    first, second = names
    a, b = (logits(runtime.lane(name), inputs) for name in names)
    again = logits(runtime.lane(first), inputs)
    runtime.unload(first)
    from_disk = logits(runtime.lane(first), inputs)
    if not (np.array_equal(a, again) and np.array_equal(a, from_disk)):
        raise SystemExit(f"{first} differs from itself after a swap to {second} and back")
    apart = float(np.abs(a - b).max())
    if not apart > 0.1:
        raise SystemExit(f"{first} and {second} give the same: {apart}")
    return apart


def seconds(action: Callable[[], Any], before: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of an action; what is done before each is not timed."""
    found = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        kept = action()
        found.append(time.perf_counter() - start)
        del kept
    return statistics.median(found)


def switches(runtime: Runtime, names: tuple[str, str], repeats: int) -> dict[str, float]:
    """Return way of switching → median seconds, until a lane is ready to run."""
    name, other = names
    file = runtime.directory / runtime.manifest.adapters[name].tensors
    whole = runtime.manifest

    def unload() -> None:
        runtime.unload(name)

    def unload_and_evict() -> None:
        runtime.unload(name)
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def as_before_it_was_added() -> None:
        runtime.unload(name)
        runtime.manifest = whole.without([name])

    def lane_of_thread() -> Lane:
        return runtime._lane_of_this_thread(name)  # what `Runtime.run` begins with

    def other_lane() -> Lane:
        return runtime._lane_of_this_thread(other)

    def refresh() -> Lane:
        runtime.refresh()
        return runtime.lane(name)

    return {
        "resident, used by this thread before": seconds(lane_of_thread, other_lane, repeats),
        "resident, a new lane": seconds(lambda: runtime.lane(name), lambda: None, repeats),
        "from disk, in the system's cache": seconds(lambda: runtime.lane(name), unload, repeats),
        "from disk, read anew": seconds(lambda: runtime.lane(name), unload_and_evict, repeats),
        "just added: refresh, from disk": seconds(refresh, as_before_it_was_added, repeats),
    }


def runs(
    runtime: Runtime, inputs: Mapping[str, Any], names: tuple[str, str], repeats: int
) -> dict[str, float]:
    """Return median seconds of whole runs, in turns: what a switch costs later, if anything."""
    name, other = names
    found: dict[str, list[float]] = {title: [] for title in ("same", "switched", "from disk")}

    def timed(title: str, lane: Lane) -> None:
        start = time.perf_counter()
        logits(lane, inputs)
        found[title].append(time.perf_counter() - start)

    for _ in range(repeats):
        logits(runtime.lane(other), inputs)
        lane = runtime.lane(name)
        timed("switched", lane)
        timed("same", lane)
        runtime.unload(name)
        lane = runtime.lane(name)
        timed("from disk", lane)
    return {title: statistics.median(each) for title, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--bundle", type=Path, help="exported here if it is not there")
    parser.add_argument("--merged", type=Path, help="a merged export; made here if not there")
    arguments = parser.parse_args()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or Path(scratch) / "bundle"
        prepare(bundle, arguments.precision, ranks)
        merged = arguments.merged or Path(scratch) / "merged"
        runtime = Runtime(bundle)  # files are compared with their hashes, as by default
        if not merged.exists():
            export_merged(random_adapter(runtime, ranks[0], 0), merged, arguments.precision)
        inputs = first_step_inputs(runtime, read_decoder(bundle), PROMPT[:1])
        print(f"SmolLM2-135M {arguments.precision}, ms until the first run can start", flush=True)
        load = seconds(lambda: open_session(merged / MODEL_FILE), lambda: None, 5)
        print(f"{'a merged model: open its session':38} {1e3 * load:9.3f}")
        for rank in ranks:
            names = names_of(rank)
            apart = verify(runtime, inputs, names)
            size = (bundle / runtime.manifest.adapters[names[0]].tensors).stat().st_size
            print(f"rank {rank}, {size / 1e6:.0f} MB, logits {apart:.2g} apart")
            for way, taken in switches(runtime, names, arguments.repeats).items():
                print(f"  {way:36} {1e3 * taken:9.3f}  1/{load / taken:.0f} of the session")
            taken = runs(runtime, inputs, names, arguments.repeats)
            each = ", ".join(f"{title} {1e3 * value:.2f}" for title, value in taken.items())
            print(f"  {'a run of one token':36} {each}")


if __name__ == "__main__":
    main()
