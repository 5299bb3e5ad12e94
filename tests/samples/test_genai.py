"""The GenAI sample swaps a bundle's adapters without loraport."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "samples" / "genai" / "swap.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, SAMPLE, *arguments], capture_output=True, text=True, check=False
    )


def test_the_sample_runs_base_and_adapters(bundle):
    imported = re.findall(r"^(?:import|from) ([\w.]+)", SAMPLE.read_text(), re.MULTILINE)
    assert "onnxruntime_genai" in imported
    assert not {"loraport", "converters"} & set(imported)
    done = run(bundle, "the harbour light", "a", "b")
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert said.keys() >= {"base", "a", "b"}
    assert len({said[name] for name in ("base", "a", "b")}) == 3


def test_texts_grow_to_where_other_factors_rotate_them(long_phi3):
    """As in Python, whose own control is that tokens beyond the border depend on it."""
    from loraport.runtime import Runtime, Sampling, generate

    bundle = long_phi3 / "bundle"
    swapper = runpy.run_path(str(SAMPLE))["Swapper"](bundle)
    swapper._chat = str  # it takes more tokens than there are up to the border
    prompt = [int(token) for token in swapper.tokenizer.encode("the")]
    for name in (None, "a"):
        expected = generate(Runtime(bundle), prompt, name, Sampling(max_new_tokens=40))
        assert list(swapper.generate("the", name, 40)) == list(expected)


def test_what_cannot_be_done_is_told_in_one_message(bundle, tmp_path):
    done = run(bundle, "the harbour light", "a", "c", "d")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"error: adapters of {bundle}: expected of a, b, got c, d\n")
    missing = run(tmp_path / "missing", "the harbour light")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: ")
    assert "genai_config.json" in missing.stderr
    assert missing.stderr.count("\n") == 1
