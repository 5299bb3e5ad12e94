"""Everything that needs a GPU, in one go and one table: parity, latencies, training.

    python tests/benchmarks/gpu.py [--base smollm2] [--steps 50] [--json FILE]

Needs onnxruntime-gpu and onnxruntime-genai; bitsandbytes and peft for some of the training figures.
Says so and ends well where there is no GPU. What is not timed runs first, side by side; then peers
run in the same process, medians after warming up. A base that is not to be had is made with
random weights in SmolLM2's shape. ``--device cpu --tiny`` tries the script itself. Exit code 1 if a
section failed.
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_sections import latency, parity, training
from gpu_sections.place import Place, Row
from gpu_sections.side_by_side import side_by_side, worthwhile
from random_llamas import save_random_base

from converters.onnx.exporters.genai_builder import PRECISIONS
from loraport.base.finding import resolve_base
from loraport.errors import LoraportError


def bundles(place: Place) -> Iterator[Row]:
    """Export all that the other sections need; it takes no GPU, and is not measured."""
    for precision in place.precisions:
        for per_row in (False, True):
            place.bundle(precision, per_row=per_row)
        place.plain(precision)
    yield Row("bundles", ", ".join(place.precisions))


SECTIONS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "bundles": bundles,
    "parity": parity.parity,
    "encoder": parity.encoder,
    "swaps": latency.swaps,
    "decode": latency.decode,
    "rows": latency.rows,
    "losses": training.losses,
    "speed": training.speed,
    "sweep": training.sweep,
    "memory": training.memory,
}
# Beside exports, which leave the GPU alone; beside what is not timed; and alone.
BESIDE_EXPORTS, UNTIMED = ("memory",), ("losses", "encoder")
TIMED = ("swaps", "decode", "rows", "speed", "sweep")
WITHOUT_RUNTIME = frozenset(("bundles", "losses", "speed", "sweep", "memory"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=50, help="repetitions of each timing")
    parser.add_argument("--precisions", default="", help="some of those there are, with commas")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="train tiny models, to try the script")
    parser.add_argument("--work", type=Path, help="keep bundles there, and use those there are")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    sections = [name for name in arguments.only.split(",") if name] or list(SECTIONS)
    missing = why_not(arguments.device, sections)
    if missing:
        print(f"nothing measured: {missing}")
        return
    start = time.perf_counter()
    rows = [Row("machine", machine(arguments.device))]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.work or Path(temporary)
        scratch.mkdir(exist_ok=True)
        base, note = available(arguments.base, scratch, tiny=arguments.tiny)
        rows += [Row("base", "random weights", note)] if note else []
        precisions = tuple(arguments.precisions.split(",")) if arguments.precisions else ()
        place = Place(
            base,
            arguments.device,
            scratch,
            arguments.steps,
            precisions or PRECISIONS[arguments.device],
            arguments.tiny,
        )
        for found in all_of_it(place) if not arguments.only else one_by_one(place, sections):
            rows += found
            if arguments.json:  # after each section: a later one may never end
                arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    rows.append(Row("all of this", f"{time.perf_counter() - start:.0f} s"))
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{row.what:{width}}  {row.figure}{'  # ' + row.note if row.note else ''}")
    sys.exit(1 if any(row.figure.startswith("FAILED") for row in rows) else 0)


def one_by_one(place: Place, sections: Sequence[str]) -> Iterator[list[Row]]:
    for name in sections:
        yield measured(name, place)


def all_of_it(place: Place) -> Iterator[list[Row]]:
    """What is not timed first, side by side where there are cores; then the rest alone."""
    if not worthwhile(place):
        yield from one_by_one(place, tuple(SECTIONS))
        return
    with side_by_side("bundles", place) as exported:
        yield from one_by_one(place, BESIDE_EXPORTS)
    yield exported
    with side_by_side("parity", place) as compared:
        yield from one_by_one(place, UNTIMED)
    yield compared
    yield from one_by_one(place, TIMED)


def measured(name: str, place: Place) -> list[Row]:
    """Return a section's lines; one's failure must not hide the others' figures."""
    start, rows = time.perf_counter(), []
    try:
        for row in SECTIONS[name](place):
            rows.append(row)
            print(f"  {row.what}: {row.figure}", file=sys.stderr, flush=True)
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        rows.append(Row(name, f"FAILED: {type(error).__name__}: {first}"))
    gc.collect()
    if place.device == "cuda":
        torch.cuda.empty_cache()  # the next section's processes need what this one kept
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def available(base: str, scratch: Path, *, tiny: bool) -> tuple[str, str]:
    """Return the base to export, and why it is another than was asked for."""
    try:
        resolve_base(base)
        return base, ""
    except LoraportError as error:
        made = scratch / "base"
        if not made.exists():
            save_random_base("tiny" if tiny else "smollm2-135m", made)
        return str(made), f"in SmolLM2's shape, for {str(error).splitlines()[0]}"


def why_not(device: str, sections: Sequence[str]) -> str:
    """Return why nothing can be measured here, or nothing."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    if WITHOUT_RUNTIME.issuperset(sections):
        return ""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "onnxruntime has no CUDA provider; install onnxruntime-gpu"
    return ""


def machine(device: str) -> str:
    """Name the device and the versions."""
    import onnxruntime

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return f"{name}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"


if __name__ == "__main__":
    main()
