"""loraport-check in C++ and in C: every golden case passes, every fault is refused."""

import json
import shutil

import numpy as np
import pytest
from bundle_faults import FAULTS, REFUSED, edit_manifest, flip_byte, rehash
from native_programs import run_without_python
from safetensors.numpy import load_file, save_file


def test_every_golden_case_passes(check_program, bundle):
    done = run_without_python(check_program, bundle)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    for case in ("base", "adapter-a", "adapter-a (.onnx_adapter)", "adapter-b", "blend"):
        assert any(f" {case}" in line for line in lines), case


def test_an_adapter_must_change_the_base_as_its_golden_outputs_do(check_program, own_bundle):
    """Where the tolerance is as wide as an adapter's effect, nothing else proves the swap."""
    edit_manifest(own_bundle, lambda document: document.update(tolerance=1e6))
    assert run_without_python(check_program, own_bundle).returncode == 0  # the control
    golden = own_bundle / "golden"
    kept = (golden / "adapter-a.safetensors").read_bytes()
    shutil.copyfile(golden / "adapter-b.safetensors", golden / "adapter-a.safetensors")
    (golden / "adapter-b.safetensors").write_bytes(kept)
    rehash(own_bundle, *(f"golden/adapter-{name}.safetensors" for name in "ab"))
    done = run_without_python(check_program, own_bundle)
    assert (done.returncode, done.stderr) == (1, "")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 4  # each as slots and as ONNX Runtime's adapter
    assert all("changes the base otherwise" in line and " adapter-" in line for line in failed)


def test_a_bundle_without_adapters_passes(check_program, bare_bundle):
    done = run_without_python(check_program, bare_bundle)
    assert done.returncode == 0, done.stderr
    assert "base" in done.stdout


def test_a_flipped_byte_in_any_file_is_refused(check_program, own_bundle):
    listed = json.loads((own_bundle / "manifest.json").read_text())["files"]
    assert len(listed) > 10
    for name in listed:
        flip_byte(own_bundle / name)
        done = run_without_python(check_program, own_bundle)
        assert (done.returncode, done.stdout) == (REFUSED, ""), name
        assert done.stderr.count("error:") == 1, name
        assert name in done.stderr, name
        assert done.stderr.count("sha256") == 1, name
        flip_byte(own_bundle / name)
    assert run_without_python(check_program, own_bundle).returncode == 0


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_answered_with_one_message(check_program, own_bundle, name):
    fault = FAULTS[name]
    fault.spoil(own_bundle)
    done = run_without_python(check_program, own_bundle)
    assert done.returncode == fault.code, done.stdout + done.stderr
    if fault.code == REFUSED:
        assert done.stderr.count("error:") == 1
        assert fault.word in done.stderr, done.stderr
        assert "FAILED" not in done.stdout
    else:
        assert fault.word in done.stdout
        assert done.stderr == ""


def test_what_these_programs_do_not_take_is_said(check_program, own_bundle):
    """A DoRA gain fits the bundle, only not the program."""
    tensors = load_file(own_bundle / "adapters" / "a.safetensors")
    document = json.loads((own_bundle / "manifest.json").read_text())
    slot = document["slots"][0]
    gain = f"{slot['name']}.gain"
    tensors[gain] = np.full(slot["out_features"], 1.5, np.float32)
    save_file(tensors, own_bundle / "adapters" / "a.safetensors")
    edit_manifest(own_bundle, lambda entry: entry["slots"][0]["inputs"].update(gain=gain))
    rehash(own_bundle, "adapters/a.safetensors")
    done = run_without_python(check_program, own_bundle)
    assert done.returncode == REFUSED
    assert "this program takes LoRA on linear layers alone" in done.stderr


def test_links_to_the_same_content_are_fine(check_program, own_bundle, tmp_path):
    model = own_bundle / "adapters" / "a.safetensors"
    model.rename(tmp_path / "blob")
    model.symlink_to(tmp_path / "blob")
    assert run_without_python(check_program, own_bundle).returncode == 0


def test_a_blend_with_a_negative_strength(check_program, own_bundle):
    """The golden outputs are made by the Python runtime; only the strengths are new."""
    from safetensors.numpy import load_file, save_file

    from loraport.runtime import Runtime

    strengths = {"a": -0.5, "b": 1.25}
    golden = own_bundle / "golden" / "blend.safetensors"
    tensors = load_file(golden)
    inputs = {n[len("input.") :]: t for n, t in tensors.items() if n.startswith("input.")}
    outputs = Runtime(own_bundle).run(inputs, strengths, ["logits"])
    save_file({**tensors, "output.logits": outputs["logits"]}, golden)
    before = run_without_python(check_program, own_bundle)
    assert before.returncode == REFUSED
    rehash(own_bundle, "golden/blend.safetensors")
    assert run_without_python(check_program, own_bundle).returncode == 1
    edit_manifest(
        own_bundle, lambda document: document["golden"]["blend"].update(adapters=strengths)
    )
    done = run_without_python(check_program, own_bundle)
    assert done.returncode == 0, done.stdout


def test_wrong_usage_is_told(check_program, bundle, tmp_path):
    for arguments in ([], [bundle, "--colour"], [tmp_path / "none"], [bundle, bundle]):
        done = run_without_python(check_program, *arguments)
        assert (done.returncode, done.stdout) == (REFUSED, "")
        assert done.stderr.count("error:") == 1


def test_a_library_that_is_not_onnxruntime_is_told(check_program, bundle, tmp_path):
    for library in (tmp_path / "none.so", "libm.so.6"):
        done = run_without_python(check_program, bundle, "--ort", library)
        assert done.returncode == REFUSED
        assert str(library) in done.stderr


def test_cuda_without_a_gpu_is_refused(check_program, bundle):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine may have a GPU")
    done = run_without_python(check_program, bundle, "--cuda")
    assert done.returncode == REFUSED, done.stdout
    assert "--cuda" in done.stderr
