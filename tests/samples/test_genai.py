"""The GenAI sample swaps a bundle's adapters without loraport."""

import re
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "samples" / "genai" / "swap.py"


def test_the_sample_runs_base_and_adapters(bundle):
    imported = re.findall(r"^(?:import|from) ([\w.]+)", SAMPLE.read_text(), re.MULTILINE)
    assert "onnxruntime_genai" in imported
    assert not {"loraport", "converters"} & set(imported)
    done = subprocess.run(
        [sys.executable, SAMPLE, bundle, "the harbour light", "a", "b"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert said.keys() >= {"base", "a", "b"}
    assert len({said[name] for name in ("base", "a", "b")}) == 3
