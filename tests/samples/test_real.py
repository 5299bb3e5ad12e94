"""Every runner replays every golden output of the real SmolLM2, fp32 and int4, without Python.

The control of each: cases that ask for another adapter than their outputs were made with.
"""

import json
import subprocess

import numpy as np
import pytest
from bundle_faults import MISMATCH, edit_manifest
from native_programs import run_without_python
from npm_packages import node_without_python
from real_bundles import own_copy
from safetensors.numpy import load_file

from loraport.bundle.manifest import read_manifest

pytestmark = pytest.mark.real

CASES = ("base", "adapter-a", "adapter-b", "blend")


@pytest.fixture
def mixed_up(real_bundle, tmp_path):
    """The bundle with each adapter's outputs where the other's should be."""

    def edit(document):
        golden = document["golden"]
        one, other = golden["adapter-a"], golden["adapter-b"]
        one["file"], other["file"] = other["file"], one["file"]

    bundle = own_copy(real_bundle, tmp_path / "bundle")
    edit_manifest(bundle, edit)
    return bundle


def test_the_cases_are_the_base_both_adapters_and_their_blend(real_bundle):
    golden = read_manifest(real_bundle).golden
    assert tuple(golden) == CASES
    assert golden["blend"].adapters.keys() == {"a", "b"}
    outputs = [load_file(real_bundle / case.file)["output.logits"] for case in golden.values()]
    tolerance = read_manifest(real_bundle).tolerance
    for index, one in enumerate(outputs):
        assert all(np.abs(one - other).max() > 2 * tolerance for other in outputs[:index])


@pytest.mark.parametrize("language", ["c++", "c"])
def test_native_programs(request, language, real_bundle, mixed_up):
    if language == "c":
        program = request.getfixturevalue("c_program")
    else:
        program = request.getfixturevalue("cpp_programs") / "loraport-check"
    done = run_without_python(program, real_bundle)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert all(any(f" {case}" in line for line in lines) for case in CASES)
    done = run_without_python(program, mixed_up)
    assert done.returncode == MISMATCH
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed
    assert {name for name in CASES for line in failed if name in line} == {"adapter-a", "adapter-b"}


def test_node(run_node, real_bundle, mixed_up):
    done = run_node("src/cli.js", "check", real_bundle, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    reports = {report["name"]: report["passed"] for report in json.loads(done.stdout)}
    assert reports == dict.fromkeys(CASES, True)
    done = run_node("src/cli.js", "check", mixed_up, "--json")
    assert done.returncode == MISMATCH
    reports = {report["name"]: report["passed"] for report in json.loads(done.stdout)}
    assert reports == {**dict.fromkeys(CASES, True), "adapter-a": False, "adapter-b": False}


def test_the_browser(web_sample, chromium, real_bundle, mixed_up, tmp_path):
    for bundle, differ in ((real_bundle, ""), (mixed_up, "adapter-a,adapter-b")):
        environment = {
            **node_without_python(tmp_path),
            "CHROMIUM": chromium,
            "LORAPORT_BUNDLE": str(bundle),
            "LORAPORT_DIFFER": differ,
        }
        done = subprocess.run(
            ["node", "--test", "test/golden.test.js"],
            cwd=web_sample,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "# pass 1" in done.stdout


def test_genai(real_bundle):
    """GenAI gives the last token's logits, of one adapter at a time."""
    import onnxruntime_genai as og

    manifest = read_manifest(real_bundle)
    model = og.Model(str(real_bundle))
    adapters = og.Adapters(model)
    for name, entry in manifest.adapters.items():
        adapters.load(str(real_bundle / entry.file), name)
    got, expected = {}, {}
    for case in ("base", "adapter-a", "adapter-b"):
        golden = load_file(real_bundle / manifest.golden[case].file)
        (ids,) = golden["input.input_ids"]
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 1)
        generator = og.Generator(model, parameters)
        for name in manifest.golden[case].adapters:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(ids)
        got[case] = generator.get_output("logits")[0, -1]
        expected[case] = golden["output.logits"][0, -1]
        assert np.abs(got[case] - expected[case]).max() <= manifest.tolerance
    assert np.abs(got["adapter-a"] - expected["adapter-b"]).max() > manifest.tolerance
