"""Disk and memory of one bundle with many adapters, beside as many merged models.

    python tests/benchmarks/footprint.py [--precision int4] [--rank 16]

Memory is the resident set of a process of its own per row, after a run over a prompt with
every adapter. A merged model is the same graph opened in a session of its own: four are really
opened, and the figure for fifty is their mean growth times fifty (marked ~).
"""

import argparse
import gc
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from decode import PROMPT, random_adapter  # the sibling benchmark

from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.packing.pack import pack
from loraport.bundle.manifest import MODEL_FILE
from loraport.runtime import Lane, Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.resident import make_resident
from loraport.runtime.session import open_session
from loraport.runtime.values import numpy_of

COUNTS = (0, 1, 10, 50)
MERGED_OPENED = 4
FIFTY = 50


def resident_set() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise SystemExit("memory is read from /proc/self/status, which this system lacks")


def adapters_resident(bundle: Path, count: int, rank: int) -> int:
    """Return the resident set with ``count`` different adapters in memory."""
    runtime = Runtime(bundle, check=False)
    inputs = first_step_inputs(runtime, read_decoder(bundle), PROMPT)
    lanes = [runtime.lane(None)]
    for index in range(count):
        packed = pack(random_adapter(runtime, rank, index), runtime.manifest.slots, {})
        arrays = {name: numpy_of(tensor) for name, tensor in packed.tensors.items()}
        lanes.append(Lane(runtime.session, make_resident(arrays, "cpu"), "cpu"))
    outputs = [lane.run(inputs, ["logits"])["logits"][0, -1] for lane in lanes]
    if any(np.array_equal(outputs[0], other) for other in outputs[1:]):
        raise SystemExit("an adapter had no effect")
    del outputs
    gc.collect()
    return resident_set()


def sessions_open(bundle: Path, count: int) -> int:
    """Return the resident set with ``count`` sessions of the model open."""
    runtime = Runtime(bundle, check=False)
    inputs = first_step_inputs(runtime, read_decoder(bundle), PROMPT)
    sessions = [open_session(bundle / MODEL_FILE) for _ in range(count)]
    for session in sessions:
        Lane(session, None, "cpu").run(inputs, ["logits"])
    return resident_set()


def child(*arguments: str) -> int:
    command = [sys.executable, __file__, "--child", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="int4", choices=["fp32", "int4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--child", nargs=4, metavar=("WHAT", "BUNDLE", "COUNT", "RANK"))
    arguments = parser.parse_args()
    if arguments.child:
        what, bundle, count, rank = arguments.child
        if what == "adapters":
            print(adapters_resident(Path(bundle), int(count), int(rank)))
        else:
            print(sessions_open(Path(bundle), int(count)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        export_base("smollm2", bundle, ExportOptions(precision=arguments.precision))
        runtime = Runtime(bundle, check=False)
        add_adapters(bundle, {"one": random_adapter(runtime, arguments.rank, 0)})
        base = size([bundle / MODEL_FILE, bundle / f"{MODEL_FILE}.data"])
        adapter = size([bundle / "adapters" / "one.onnx_adapter"])
        rank = str(arguments.rank)
        memory = {n: child("adapters", str(bundle), str(n), rank) for n in COUNTS}
        one = child("sessions", str(bundle), "1", rank)
        several = child("sessions", str(bundle), str(1 + MERGED_OPENED), rank)
    per_model = (several - one) / MERGED_OPENED
    merged_memory = memory[0] + (FIFTY - 1) * per_model
    print(f"SmolLM2-135M {arguments.precision}, rank {rank} on all linear layers, MB")
    print(f"{'':28} {'disk':>9} {'memory':>9}")
    for count in COUNTS:
        disk = base + count * adapter
        print(f"{f'base + {count} adapters':28} {disk / 1e6:9.1f} {memory[count] / 1e6:9.1f}")
    print(
        f"{'50 merged models':28} {FIFTY * base / 1e6:9.1f} {'~' + f'{merged_memory / 1e6:.1f}':>9}"
    )
    disk_ratio = FIFTY * base / (base + FIFTY * adapter)
    print(
        f"50 merged models / base + 50 adapters: disk {disk_ratio:.1f}, "
        f"memory ~{merged_memory / memory[FIFTY]:.1f}"
    )


if __name__ == "__main__":
    main()
