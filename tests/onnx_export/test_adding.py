"""Adding adapters: checked before anything is written, and whole at any moment."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from loraport.bundle.golden import read_golden
from loraport.bundle.manifest import check_files, read_manifest
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.runtime import Runtime


@pytest.fixture
def own_bare(bare_bundle, tmp_path):
    return shutil.copytree(bare_bundle, tmp_path / "bare")


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_both_files_hold_the_same_tensors(bundle):
    for entry in read_manifest(bundle).adapters.values():
        tensors = load_file(bundle / entry.tensors)
        stored = onnxruntime.AdapterFormat.read_adapter(str(bundle / entry.file)).get_parameters()
        assert stored.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert np.array_equal(stored[name].numpy(), tensor.numpy()), name


def test_the_manifest_tells_ranks_scalings_and_hashes(bundle):
    manifest = read_manifest(bundle)
    assert list(manifest.adapters) == ["a", "b"]
    check_files(manifest, bundle)
    packed = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert manifest.adapters["a"].ranks[packed] == 3 * 4
    assert manifest.adapters["b"].ranks[packed] == 2 * 6
    assert manifest.adapters["b"].ranks["model.layers.1.self_attn.q_proj+k_proj+v_proj"] == 6 + 3
    scalings = manifest.adapters["b"].scalings
    assert scalings["model.layers.0.mlp.down_proj"] == pytest.approx(4 / 2**0.5)
    assert scalings["model.layers.1.self_attn.q_proj"] == pytest.approx(4 / 3**0.5)
    assert scalings["model.layers.1.self_attn.v_proj"] == pytest.approx(4 / 6**0.5)


def test_the_graph_does_not_depend_on_adapters(bare_bundle, bundle):
    for file in ("model.onnx", "model.onnx.data", "model.required.onnx", "genai_config.json"):
        assert (bare_bundle / file).read_bytes() == (bundle / file).read_bytes()


def test_golden_cases_of_base_adapters_and_blend(bundle):
    manifest = read_manifest(bundle)
    assert manifest.golden.keys() == {"base", "adapter-a", "adapter-b", "blend"}
    runtime = Runtime(bundle)
    for case in manifest.golden.values():
        inputs, outputs = read_golden(bundle, case)
        got = runtime.run(inputs, dict(case.adapters) or None, outputs)
        assert outputs.keys() == {"logits"}
        assert np.array_equal(got["logits"], outputs["logits"])


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "a b", "CON:"])
def test_names_that_are_no_file_names_are_refused(own_bare, adapter_a, name):
    with pytest.raises(LoraportError, match=r"expected letters, digits, '\.', '_' and '-'"):
        add_adapters(own_bare, {name: read_adapter(adapter_a)})


@pytest.mark.parametrize("name", ["CON", "nul.v2", "com1", "LPT9"])
def test_names_of_devices_are_refused(own_bare, adapter_a, name):
    """A bundle with one could not be unpacked on Windows."""
    with pytest.raises(LoraportError, match=rf"{name}: expected a name for files everywhere"):
        add_adapters(own_bare, {name: read_adapter(adapter_a)})


@pytest.mark.parametrize("names", [["A"], ["A2", "a2"]])
@pytest.mark.parametrize("force", [False, True])
def test_names_that_differ_in_capitals_only_are_refused(own_bundle, adapter_a, names, force):
    """Where a disk tells no capitals apart, one's file would be the other's."""
    before = contents(own_bundle)
    given = dict.fromkeys(names, read_adapter(adapter_a))
    with pytest.raises(
        LoraportError, match=f"{names[-1]}: expected .* differs from .*{names[-1][1:]}"
    ):
        add_adapters(own_bundle, given, force=force)
    assert contents(own_bundle) == before
    add_adapters(own_bundle, {"contents": read_adapter(adapter_a)})  # no device


def test_a_name_that_is_taken_is_refused_and_nothing_changes(own_bundle, adapter_a):
    before = contents(own_bundle)
    with pytest.raises(LoraportError, match="a: expected a new name, got one the bundle has"):
        add_adapters(own_bundle, {"a": read_adapter(adapter_a), "c": read_adapter(adapter_a)})
    assert contents(own_bundle) == before


def test_one_process_at_a_time(own_bare, adapter_a, adapter_b):
    """Whoever wrote the manifest last would have left the other's adapter out of it."""
    refused = []

    def meanwhile(_):
        with pytest.raises(LoraportError, match="expected no other process at work") as told:
            add_adapters(own_bare, {"b": read_adapter(adapter_b)})
        refused.append(told)

    before = set(contents(own_bare))
    add_adapters(own_bare, {"a": read_adapter(adapter_a)}, progress=meanwhile)
    assert refused
    add_adapters(own_bare, {"b": read_adapter(adapter_b)})
    manifest = read_manifest(own_bare)
    assert list(manifest.adapters) == ["a", "b"]
    assert set(contents(own_bare)) == before | manifest.files.keys()


def test_no_bundle_is_made_where_there_is_none(tmp_path, adapter_a):
    with pytest.raises(LoraportError):
        add_adapters(tmp_path / "none", {"a": read_adapter(adapter_a)})
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_named_by_a_string_too(own_bare, adapter_a):
    manifest = add_adapters(str(own_bare), {"a": read_adapter(adapter_a)})
    assert read_manifest(own_bare) == manifest
    assert list(manifest.adapters) == ["a"]


def test_one_bad_adapter_keeps_all_out(own_bare, adapter_a):
    good = read_adapter(adapter_a)
    bad = replace(good, modules={"nowhere": next(iter(good.modules.values()))})
    before = contents(own_bare)
    with pytest.raises(LoraportError, match=r"adapter 'bad'.*\n  - nowhere: expected a slot"):
        add_adapters(own_bare, {"good": good, "bad": bad})
    assert contents(own_bare) == before


def test_force_replaces_an_adapter_and_its_golden_cases(own_bundle, adapter_b):
    add_adapters(own_bundle, {"a": read_adapter(adapter_b)}, force=True)
    manifest = read_manifest(own_bundle)
    check_files(manifest, own_bundle)
    a, b = (load_file(own_bundle / manifest.adapters[name].tensors) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    runtime = Runtime(own_bundle)
    for case in manifest.golden.values():
        inputs, outputs = read_golden(own_bundle, case)
        got = runtime.run(inputs, dict(case.adapters) or None, outputs)
        assert np.array_equal(got["logits"], outputs["logits"])


class TestFingerprint:
    Q = "model.layers.0.self_attn.q_proj"
    UP = "model.layers.1.mlp.up_proj"

    def other_base(self, bundle, adapter):
        """The adapter, as if trained on a base in which two weights differ."""
        known = read_manifest(bundle).fingerprint.modules
        changed = {**known, self.Q: "0" * 32, self.UP: "f" * 32}
        return replace(read_adapter(adapter), base_fingerprint=BaseFingerprint(changed))

    def test_an_adapter_for_another_base_is_refused_by_module(self, own_bare, adapter_a):
        foreign = self.other_base(own_bare, adapter_a)
        before = contents(own_bare)
        with pytest.raises(LoraportError) as refused:
            add_adapters(own_bare, {"x": foreign})
        text = str(refused.value)
        assert "adapter 'x' belongs to another base" in text
        assert "2 of 14 base weights differ" in text
        assert f"{self.Q}: expected base weight 000000000000" in text
        assert f"{self.UP}: expected base weight ffffffffffff" in text
        assert contents(own_bare) == before

    def test_it_is_accepted_when_asked_for(self, own_bare, adapter_a):
        foreign = self.other_base(own_bare, adapter_a)
        assert "x" in add_adapters(own_bare, {"x": foreign}, ignore_fingerprint=True).adapters

    def test_the_same_base_is_accepted(self, own_bare, adapter_a):
        known = read_manifest(own_bare).fingerprint
        adapter = replace(read_adapter(adapter_a), base_fingerprint=known)
        assert "x" in add_adapters(own_bare, {"x": adapter}).adapters


@pytest.mark.parametrize("forced", [False, True])
def test_a_kill_between_any_two_writes_leaves_a_whole_bundle(
    own_bundle, adapter_b, tmp_path, monkeypatch, forced
):
    # Whatever lies in the directory just before a rename is what a kill at that moment leaves.
    snapshots = []
    rename = Path.replace

    def snapshot_and_rename(self, target):
        if own_bundle in Path(target).parents:
            snapshots.append(shutil.copytree(own_bundle, tmp_path / f"killed-{len(snapshots)}"))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", snapshot_and_rename)
    added = {"a" if forced else "c": read_adapter(adapter_b)}
    add_adapters(own_bundle, added, force=forced)
    monkeypatch.undo()
    assert len(snapshots) >= 4  # two files of the adapter, a golden case, the manifest
    for killed in snapshots:
        manifest = read_manifest(killed)
        check_files(manifest, killed)
        runtime = Runtime(killed)
        for case in manifest.golden.values():
            inputs, outputs = read_golden(killed, case)
            got = runtime.run(inputs, dict(case.adapters) or None, outputs)
            assert np.array_equal(got["logits"], outputs["logits"])
        # Saying it again succeeds, without --force where none was needed before.
        again = add_adapters(killed, added, force=forced)
        check_files(again, killed)
        assert again.golden.keys() == read_manifest(own_bundle).golden.keys()
