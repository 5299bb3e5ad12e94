"""One section for all precisions at once, each in a process of its own on its share of the cores.

For what is not timed: exports, which need no GPU, and parity.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_sections.place import Place, Row

_CORES = 3  # for one process at least
SCRIPT = Path(__file__).parent.parent / "gpu.py"
_SAME = ("machine", "base")  # what every process says


def worthwhile(place: Place) -> bool:
    """Tell whether there are cores for several processes."""
    return len(place.precisions) > 1 and (os.cpu_count() or 1) >= 2 * _CORES


@contextmanager
def side_by_side(section: str, place: Place) -> Iterator[list[Row]]:
    """Run a section for all precisions; the rows are there when the block has ended."""
    cores = max(_CORES, (os.cpu_count() or 1) // len(place.precisions))
    started, begun = [], time.perf_counter()
    for precision in place.precisions:
        file = place.scratch / f"{section}-{precision}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, str(SCRIPT), "--only", section, "--precisions", precision]
        command += ["--base", place.base, "--device", place.device, "--work", str(place.scratch)]
        command += ["--json", str(file), *(["--tiny"] if place.tiny else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
        # Into a file: a pipe that nobody reads meanwhile would stop it.
        with file.with_suffix(".log").open("w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        started.append((precision, file, child))
    rows: list[Row] = []
    try:
        yield rows
        for precision, file, child in started:
            child.wait()
            print(f"{section}, {precision}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
            if file.exists():
                found = [Row(**row) for row in json.loads(file.read_text())]
                rows += [row for row in found if row.what not in _SAME]
            else:
                told = file.with_suffix(".log").read_text()
                last = (told.strip().splitlines() or ["it said nothing"])[-1]
                rows.append(Row(f"{section} {precision}", f"FAILED: {last}"))
    finally:
        for _, _, child in started:
            child.kill()
