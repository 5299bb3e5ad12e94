"""export, add, run, verify and inspect as a user types them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file
from tiny_llm import save_base

from converters.onnx.packing.adding import write_onnx_adapter
from loraport.base.loading import fingerprint_model, load_model
from loraport.bundle.manifest import check_files, read_manifest, write_manifest
from loraport.cli import main
from loraport.errors import LoraportError
from loraport.runtime import Runtime, Sampling, TextGenerator


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def test_export_killed_said_again_and_verified(
    tiny_base, adapters, bare_bundle, bundle, tmp_path, capsys, monkeypatch
):
    # Relative paths, as one types them; a link, so that the base is where one stands.
    (tmp_path / "base").symlink_to(tiny_base)
    monkeypatch.chdir(tmp_path)
    arguments = ["export", "base", "-o", "ship"]
    arguments += [part for n, path in adapters.items() for part in ("--adapter", f"{n}={path}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "loraport", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: list(tmp_path.glob(".ship.partial-*/*")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "ship").exists()
    assert list(tmp_path.glob(".ship.partial-*"))

    code, out, err = call(capsys, *arguments)
    assert (code, out) == (0, "")
    assert "ship: 10 slots for 14 modules, 2 adapters" in err
    assert not list(tmp_path.glob(".ship*"))
    ship = tmp_path / "ship"
    check_files(read_manifest(ship), ship)
    # Adapters or not, the graph is the same, byte for byte.
    for file in ("model.onnx", "model.onnx.data", "model.required.onnx"):
        assert (ship / file).read_bytes() == (bare_bundle / file).read_bytes()
    made, alike = read_manifest(ship), read_manifest(bundle)
    assert made.adapters == alike.adapters
    assert made.files.keys() == alike.files.keys()

    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "already exists" in err

    # The base was named relatively; verification finds it from anywhere.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = call(capsys, "verify", "../ship")
    assert code == 0, err
    assert "parity holds" in err
    assert "FAILED" not in out
    assert "adapter b: onnxruntime = torch" in out


def test_verify_json(bundle, capsys):
    code, out, _ = call(capsys, "verify", bundle, "--json", "--adapter", "b")
    report = json.loads(out)
    assert code == 0
    assert report["passed"] is True
    assert report["samples"] >= 20
    assert all(check["passed"] for check in report["checks"])
    assert not any("adapter a" in check["name"] for check in report["checks"])


def wrong_scaling(bundle, name):
    manifest = read_manifest(bundle)
    entry = manifest.adapters[name]
    tensors = load_file(bundle / entry.tensors)
    tensors = {key: value * 2 if key.endswith("B") else value for key, value in tensors.items()}
    save_file(tensors, bundle / entry.tensors)
    write_onnx_adapter(tensors, bundle / entry.file)
    write_manifest(manifest.with_files(bundle, list(manifest.files)), bundle)


def test_verify_exits_1_and_names_what_fails(own_bundle, capsys):
    wrong_scaling(own_bundle, "b")
    code, out, err = call(capsys, "verify", own_bundle)
    assert code == 1
    assert "parity fails" in err
    failed = [line for line in out.splitlines() if "FAILED" in line]
    assert any("adapter b: packed = source" in line for line in failed)
    assert any("adapter b: onnxruntime = torch" in line for line in failed)
    assert not any("adapter a" in line for line in failed)
    code, out, _ = call(capsys, "verify", own_bundle, "--json")
    report = json.loads(out)
    assert (code, report["passed"]) == (1, False)
    details = {check["name"]: check["detail"] for check in report["checks"] if not check["passed"]}
    assert "relative error 1" in details["adapter b: packed = source"]


def test_verify_json_is_strict_json_when_numbers_are_none(own_bundle, capsys):
    entry = read_manifest(own_bundle).adapters["a"]
    tensors = load_file(own_bundle / entry.tensors)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, own_bundle / entry.tensors)
    code, out, _ = call(capsys, "verify", own_bundle, "--json")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(out, parse_constant=refuse)["passed"] is False
    assert code == 1


def test_verify_with_an_adapter_that_has_moved(bundle, adapter_a, tmp_path, capsys):
    moved = shutil.copytree(adapter_a, tmp_path / "moved")
    code, out, err = call(capsys, "verify", bundle, "--adapter", f"a={moved}")
    assert code == 0, err
    assert "adapter a: onnxruntime = torch" in out


def test_verify_with_another_base_says_which_is_wanted(bundle, tmp_path, capsys):
    other = save_base(tmp_path / "other", seed=5)
    code, out, err = call(capsys, "verify", bundle, "--base", other)
    assert (code, out) == (2, "")
    told = (
        f"bundle {bundle} belongs to another base than base {other}: 14 of 14 base weights differ"
    )
    assert told in err
    module = "model.layers.0.mlp.up_proj"
    known, found = (
        each.modules[module][:12]
        for each in (
            read_manifest(bundle).fingerprint,
            fingerprint_model(load_model(str(other)), [module]),
        )
    )
    remedy = f"use the base that bundle {bundle} was made for"
    assert f"{module}: expected base weight {known}, got {found}; {remedy}" in err


class TestAdd:
    def test_an_adapter_is_added_and_remembered(self, own_bundle, adapter_b, capsys, monkeypatch):
        monkeypatch.chdir(adapter_b.parent)
        code, out, err = call(capsys, "add", own_bundle, f"late={adapter_b.name}")
        assert (code, out) == (0, "")
        size = (own_bundle / "adapters" / "late.onnx_adapter").stat().st_size
        assert f"late: slot ranks [2, 9, 12], {size / 1e3:.1f} kB" in err
        assert read_manifest(own_bundle).adapters.keys() == {"a", "b", "late"}
        monkeypatch.chdir("/")
        code, _, err = call(capsys, "verify", own_bundle, "--adapter", "late")
        assert code == 0, err

    def test_an_existing_name_needs_force(self, own_bundle, adapter_b, capsys):
        before = (own_bundle / "adapters" / "a.safetensors").read_bytes()
        code, _, err = call(capsys, "add", own_bundle, f"a={adapter_b}")
        assert code == 2
        assert "a: expected a new name, got one the bundle has; choose another, or --force" in err
        assert (own_bundle / "adapters" / "a.safetensors").read_bytes() == before
        code, _, _ = call(capsys, "add", own_bundle, f"a={adapter_b}", "--force")
        assert code == 0
        assert (own_bundle / "adapters" / "a.safetensors").read_bytes() != before

    def test_an_adapter_of_another_base(self, own_bundle, adapter_b, tmp_path, capsys):
        from dataclasses import replace

        from loraport.fingerprint import BaseFingerprint
        from loraport.peft_layout import read_peft, write_peft

        path = "model.layers.0.mlp.down_proj"
        foreign = replace(read_peft(adapter_b), base_fingerprint=BaseFingerprint({path: "0" * 32}))
        write_peft(foreign, tmp_path / "foreign")
        code, _, err = call(capsys, "add", own_bundle, f"x={tmp_path / 'foreign'}")
        assert code == 2
        assert f"{path}: expected base weight 000000000000" in err
        added = call(capsys, "add", own_bundle, f"x={tmp_path / 'foreign'}", "--ignore-fingerprint")
        assert added[0] == 0


class TestRun:
    def test_the_text_is_the_runtimes(self, bundle, capsys):
        generator = TextGenerator(Runtime(bundle))
        sampling = Sampling(max_new_tokens=6)
        for options, selection in (
            ([], None),
            (["--adapter", "a"], "a"),
            (["--adapter", "a=0.5", "--adapter", "b=-1"], {"a": 0.5, "b": -1.0}),
        ):
            code, out, err = call(
                capsys, "run", bundle, "--prompt", "Ahoy", "--max-new-tokens", 6, *options
            )
            assert code == 0
            assert out == generator.generate("Ahoy", selection, sampling) + "\n"
            assert "tokens/s" in err

    def test_the_prompt_from_stdin_and_raw(self, bundle, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Ships"))
        options = ["--prompt", "-", "--raw", "--max-new-tokens", 4]
        code, out, _ = call(capsys, "run", bundle, *options)
        generator = TextGenerator(Runtime(bundle))
        expected = generator.generate("Ships", None, Sampling(max_new_tokens=4), chat=False)
        assert (code, out) == (0, expected + "\n")

    def test_a_seed_repeats(self, bundle, capsys):
        options = ["--prompt", "Ahoy", "--temperature", 2, "--top-p", 0.9, "--max-new-tokens", 8]
        said = [call(capsys, "run", bundle, *options, "--seed", seed)[1] for seed in (1, 1, 2)]
        assert said[0] == said[1] != said[2]

    @pytest.mark.parametrize("refused", [(), (True,), (True, False)])
    def test_cuda_graphs_are_used_where_they_can_be(self, bundle, capsys, monkeypatch, refused):
        """On a CPU that stands for a GPU, which has all that the graph needs, or not."""
        opened = []

        class OnGpu(Runtime):
            def __init__(self, directory, *, provider, cuda_graphs):
                assert provider == "cuda"
                opened.append(cuda_graphs)
                if cuda_graphs in refused:
                    raise LoraportError(f"refused, with {cuda_graphs}")
                super().__init__(directory)

        monkeypatch.setattr("loraport.runtime.Runtime", OnGpu)
        options = ["--prompt", "Ahoy", "--max-new-tokens", 3, "--provider", "cuda"]
        code, out, err = call(capsys, "run", bundle, *options)
        if False in refused:
            assert (code, out) == (2, "")
            assert "refused, with False" in err
        else:
            expected = TextGenerator(Runtime(bundle)).generate("Ahoy", None, Sampling(3))
            assert (code, out) == (0, expected + "\n")
        assert opened == ([True] if not refused else [True, False])
        opened.clear()
        assert call(capsys, "run", bundle, *options, "--no-cuda-graphs")[0] in (0, 2)
        assert opened == [False]

    def test_cuda_graphs_that_are_asked_for_need_cuda(self, bundle, capsys):
        code, out, err = call(capsys, "run", bundle, "--prompt", "Ahoy", "--cuda-graphs")
        assert (code, out) == (2, "")
        assert "CUDA graphs: expected provider cuda, got cpu" in err


class TestInspect:
    def facts(self, capsys, path):
        code, out, _ = call(capsys, "inspect", path)
        assert code == 0
        json_code, text, _ = call(capsys, "inspect", path, "--json")
        assert json_code == 0
        document = json.loads(text)
        assert document["kind"] in out
        return document["kind"], document["facts"], document["rows"]

    def test_an_adapter(self, adapter_b, tiny_base, capsys):
        kind, facts, rows = self.facts(capsys, adapter_b)
        assert kind == "LoRA adapter"
        assert facts["format"] == "peft"
        assert facts["base model"] == str(tiny_base)
        assert facts["modules"] == 6
        assert facts["ranks"] == "6 ×3, 2 ×2, 3 ×1"
        assert facts["alpha"] == "4 ×6"
        assert facts["effective scaling"] == "1.63299 ×3, 2.82843 ×2, 2.3094 ×1"
        assert facts["variant"] == "rsLoRA"
        assert facts["targets"] == "down_proj ×2, q_proj ×2, v_proj ×2"
        row = next(row for row in rows if row["module"] == "model.layers.1.self_attn.q_proj")
        assert (row["rank"], row["scaling"]) == ("3", "2.3094")
        assert (row["lora_A"], row["lora_B"]) == ("[3, 32]", "[64, 3]")

    def test_dora_and_rslora_are_both_told(self, tmp_path, capsys):
        from peft_cases import Case, llama, make_case

        options = {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}
        made = make_case(Case(llama, options), tmp_path / "dora")
        assert self.facts(capsys, made.path)[1]["variant"] == "DoRA, rsLoRA"

    def test_a_checkpoint(self, tiny_base, capsys):
        kind, facts, rows = self.facts(capsys, tiny_base)
        assert kind == "checkpoint"
        assert facts["architecture"] == "LlamaForCausalLM"
        assert facts["layers"] == 2
        assert facts["dtypes"].startswith("F32 ×")
        assert {row["tensor"] for row in rows} >= {"lm_head.weight", "model.norm.weight"}

    def test_an_onnx_file(self, bundle, capsys):
        kind, facts, rows = self.facts(capsys, bundle / "model.onnx")
        assert kind == "ONNX model"
        assert facts["slots"] == 10
        slots = [row for row in rows if row[""] == "slot"]
        assert len(slots) == 20
        assert {row["default"] for row in slots} == {"base (zeros)"}
        required = self.facts(capsys, bundle / "model.required.onnx")[2]
        assert {row["default"] for row in required if row[""] == "slot"} == {"required"}

    def test_a_bundle(self, bundle, capsys):
        kind, facts, rows = self.facts(capsys, bundle)
        assert kind == "bundle"
        assert (facts["slots"], facts["modules with a slot"], facts["adapters"]) == (10, 14, 2)
        assert "--lm-head" in facts["modules without"]
        assert [row["adapter"] for row in rows] == ["a", "b"]
        assert rows[0]["scaling"] == "1.5 ×14"
