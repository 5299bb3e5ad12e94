"""The GPU script's own logic, tried on the CPU; what it measures is not looked at."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from warm_programs import WarmProgram, run_program

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


def run(directory, *arguments):
    return run_program(arguments, directory, script=SCRIPT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_it_says_so_and_ends_well(tmp_path):
    done = run(tmp_path)
    assert (done.poll(), done.stdout) == (0, "nothing measured: no NVIDIA GPU\n")


def begin(command, *, stdout, stderr, env):
    """Begin what `subprocess.Popen` would."""
    assert command[:2] == [sys.executable, str(SCRIPT)]
    assert stdout is stderr
    log = Path(stdout.name)
    return WarmProgram(command[2:], log.parent, script=SCRIPT, environment=env, log=log)


@pytest.fixture(scope="module")
def exported(tiny_base, tmp_path_factory):
    """What a section said side by side for two precisions, one of them unknown, and its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        from gpu_sections import side_by_side as module
        from gpu_sections.place import Place

        patch.setattr(module, "subprocess", SimpleNamespace(Popen=begin))
        side_by_side = module.side_by_side
        work = tmp_path_factory.mktemp("exported")
        place = Place(str(tiny_base), "cpu", work, 1, ("fp32", "fp64"), tiny=True)
        with side_by_side("bundles", place) as rows:
            assert rows == []
        return rows, work


def test_sections_side_by_side_for_each_precision(exported):
    rows, work = exported
    assert [(row.what, row.figure[:7]) for row in rows] == [
        ("bundles", "fp32"),
        ("bundles", "FAILED:"),
    ]
    for name in ("fp32", "fp32-rows", "fp32-plain"):
        assert (work / name / "model.onnx").is_file()


def test_every_section_gives_its_figures(exported, tiny_base, tmp_path):
    arguments = ("--device", "cpu", "--base", tiny_base, "--steps", 1, "--precisions", "fp32")
    chosen = "parity,swaps,decode,rows,losses,speed,memory"
    options = ("--tiny", "--only", chosen, "--json", tmp_path / "figures.json")
    options += ("--work", exported[1])
    done = run(tmp_path, *arguments, *options)
    assert done.poll() == 0, done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "figures.json").read_text())}
    assert all(row["figure"] in done.stdout for row in rows.values())
    beside = [
        f"training {tiny_base.name}, bf16, rows of 32 to 256, {title}"
        for title in ("PEFT, plain loop", "PEFT, Trainer", "loraport")
    ]
    nf4 = "training tiny, NF4, rank 16, one row of 64"
    assert list(rows) == [
        "machine",
        "parity fp32",
        "parity fp32: rows with adapters of their own",
        "swap, fp32",
        "decode, fp32, rank 16",
        "decode, fp32, rank 16, in place",
        "8 rows with 8 adapters, fp32",
        "training float32, against float64 on the CPU",
        "training bfloat16, against float64 on the CPU",
        *beside,
        nf4,
        f"{nf4}, --dry-run",
        f"{nf4}, PEFT, plain loop",
    ]
    checks = rows["parity fp32"]["figure"].split()
    assert checks[0] == checks[2]
    assert int(checks[0]) > 15


def test_a_section_that_fails_hides_no_other_and_shows_in_the_exit_code(tiny_base, tmp_path):
    arguments = ("--device", "cpu", "--base", tiny_base, "--steps", 1, "--precisions", "fp64")
    done = run(tmp_path, *arguments, "--only", "swaps,rows")
    assert done.poll() == 1
    assert done.stdout.count("FAILED: LoraportError") == 2


def test_what_is_missing_it_says_and_fails_nowhere(tmp_path):
    """No base to be had, no peft, no bitsandbytes."""
    hidden = "import importlib.util as u, sys; find = u.find_spec\n"
    hidden += "u.find_spec = lambda n, *a: None if n in ('peft', 'bitsandbytes') else find(n, *a)\n"
    hidden += f"sys.argv[0] = {str(SCRIPT)!r}; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    hidden += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "hidden.py").write_text(hidden)
    arguments = ("--device", "cpu", "--base", tmp_path / "none", "--tiny")
    arguments += ("--only", "speed,memory")
    done = run_program(arguments, tmp_path, script=tmp_path / "hidden.py")
    assert done.poll() == 0, done.stdout + done.stderr
    assert "random weights  # in SmolLM2's shape, for base" in done.stdout
    assert "PEFT not measured: peft is not installed" in done.stdout
    assert "not measured: bitsandbytes is not installed" in done.stdout
    assert done.stdout.count("ms a step") == 1
