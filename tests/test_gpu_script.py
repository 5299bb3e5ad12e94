"""The GPU script's own logic, tried on the CPU; what it measures is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_it_says_so_and_ends_well():
    done = run()
    assert (done.returncode, done.stdout) == (0, "nothing measured: no NVIDIA GPU\n")


def test_every_section_gives_its_figures(tiny_base, tmp_path):
    arguments = ("--device", "cpu", "--base", tiny_base, "--steps", 1, "--precisions", "fp32")
    chosen = "parity,swaps,decode,rows"
    done = run(*arguments, "--only", chosen, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "figures.json").read_text())}
    names = ("machine", "parity fp32", "swap, fp32", "decode, fp32, rank 16")
    assert list(rows) == [*names, "8 rows with 8 adapters, fp32"]
    checks = rows["parity fp32"]["figure"].split()
    assert checks[0] == checks[2]
    assert int(checks[0]) > 15
    assert all(row["figure"] in done.stdout for row in rows.values())


def test_a_section_that_fails_hides_no_other_and_shows_in_the_exit_code(tiny_base):
    arguments = ("--device", "cpu", "--base", tiny_base, "--steps", 1, "--precisions", "fp64")
    done = run(*arguments, "--only", "swaps,rows")
    assert done.returncode == 1
    assert done.stdout.count("FAILED: LoraportError") == 2
