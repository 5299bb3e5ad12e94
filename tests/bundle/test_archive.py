"""Archives of bundles: whole and delta, honest and hostile."""

import json
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import command

from loraport.bundle.archive import pack_bundle, unpack_bundle
from loraport.bundle.manifest import (
    BundledAdapter,
    Manifest,
    SlotTable,
    check_files,
    read_manifest,
    write_manifest,
)
from loraport.bundle.seal import sealed
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint


def make_bundle(directory: Path, adapters: dict[str, bytes]) -> Path:
    """A bundle as far as archives care: files, and a manifest that lists them."""
    files = {"model.onnx": b"graph", "model.onnx.data": os.urandom(4096) * 4}
    if (directory.parent / "data").exists():
        files["model.onnx.data"] = (directory.parent / "data").read_bytes()
    (directory.parent / "data").write_bytes(files["model.onnx.data"])
    entries = {}
    for name, content in adapters.items():
        files[f"adapters/{name}.onnx_adapter"] = content
        files[f"adapters/{name}.safetensors"] = content[::-1]
        entries[name] = BundledAdapter(
            {}, {}, "0" * 64, f"adapters/{name}.onnx_adapter", f"adapters/{name}.safetensors"
        )
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    manifest = Manifest("base", BaseFingerprint({}), "fp32", SlotTable(()), {}, entries)
    write_manifest(manifest.with_files(directory, list(files)), directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def test_a_packed_bundle_unpacks_to_the_same_bytes(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {"a": b"adapter a"})
    pack_bundle(bundle, tmp_path / "b.zip")
    unpack_bundle(tmp_path / "b.zip", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(bundle)
    pack_bundle(tmp_path / "copy", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_paths_may_be_texts(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {"a": b"one"})
    pack_bundle(str(bundle), str(tmp_path / "bundle.zip"))
    unpack_bundle(str(tmp_path / "bundle.zip"), str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(bundle)
    larger = make_bundle(tmp_path / "larger", {"a": b"one", "b": b"two"})
    pack_bundle(str(larger), str(tmp_path / "delta.zip"), without=str(bundle))
    unpack_bundle(str(tmp_path / "delta.zip"), str(tmp_path / "both"), onto=str(bundle))
    assert contents(tmp_path / "both") == contents(larger)


def test_both_ways_tell_the_same_number_of_files(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {"a": b"adapter a"})
    archive, copy = tmp_path / "b.zip", tmp_path / "copy"
    code, packed = command("bundle", "pack", bundle, "-o", archive)
    assert (code, len(contents(bundle))) == (0, 5)
    assert re.search(rf"b\.zip: 5 files, {archive.stat().st_size / 1e3:.1f} kB", packed)
    assert "copy: 5 files, adapters: a" in command("bundle", "unpack", archive, "-o", copy)[1]


def test_an_output_inside_a_bundle_that_is_read_is_refused(tmp_path):
    old = make_bundle(tmp_path / "old", {"a": b"adapter a"})
    new = make_bundle(tmp_path / "new", {"a": b"adapter a", "b": b"adapter b"})
    pack_bundle(new, tmp_path / "delta.zip", without=old)
    before = contents(tmp_path)
    for inside in (new / "x.zip", old / "x.zip", new / "model.onnx", new / "adapters" / "x.zip"):
        with pytest.raises(LoraportError, match=r"outside the bundles .* inside .*another output"):
            pack_bundle(new, inside, without=old, force=True)
    with pytest.raises(LoraportError, match=r"outside the bundles .* inside .*another output"):
        unpack_bundle(tmp_path / "delta.zip", old / "adapters", onto=old, force=True)
    assert contents(tmp_path) == before
    pack_bundle(new, tmp_path / "new.zip", without=old)


def test_files_that_the_manifest_does_not_list_stay_behind(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {})
    (bundle / "sources.json").write_text("{}")
    pack_bundle(bundle, tmp_path / "b.zip")
    assert "sources.json" not in zipfile.ZipFile(tmp_path / "b.zip").namelist()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_delta_carries_only_the_new_adapter(tmp_path, in_place):
    old = make_bundle(tmp_path / "old", {"a": b"adapter a"})
    new = make_bundle(tmp_path / "new", {"a": b"adapter a", "b": b"adapter b"})
    expected = contents(new)
    pack_bundle(new, tmp_path / "delta.zip", without=old)
    assert sorted(zipfile.ZipFile(tmp_path / "delta.zip").namelist()) == [
        "adapters/b.onnx_adapter",
        "adapters/b.safetensors",
        "manifest.json",
    ]
    target = old if in_place else tmp_path / "updated"
    unpack_bundle(tmp_path / "delta.zip", target, onto=old, force=in_place)
    assert contents(target) == expected
    # onnx refuses to read weights from a file with a second name.
    assert (target / "model.onnx.data").stat().st_nlink == 1


def test_a_delta_on_its_own_or_on_the_wrong_bundle_is_refused(tmp_path):
    old = make_bundle(tmp_path / "old", {"a": b"adapter a"})
    new = make_bundle(tmp_path / "new", {"a": b"adapter a", "b": b"adapter b"})
    (tmp_path / "data").unlink()
    other = make_bundle(tmp_path / "other", {"a": b"adapter a"})
    pack_bundle(new, tmp_path / "delta.zip", without=old)
    with pytest.raises(LoraportError, match=r"model\.onnx\.data: .*--onto BUNDLE"):
        unpack_bundle(tmp_path / "delta.zip", tmp_path / "out")
    with pytest.raises(LoraportError, match=r"not intact[\s\S]*model\.onnx\.data: expected sha256"):
        unpack_bundle(tmp_path / "delta.zip", tmp_path / "out", onto=other)
    wrong = rf"delta\.zip put onto {re.escape(str(other))}, which may not be the bundle it was made"
    with pytest.raises(LoraportError, match=wrong):
        unpack_bundle(tmp_path / "delta.zip", tmp_path / "out", onto=other)
    assert not (tmp_path / "out").exists()


def test_a_damaged_bundle_is_not_packed(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {"a": b"adapter a"})
    (bundle / "adapters" / "a.onnx_adapter").write_bytes(b"adapter A")
    with pytest.raises(LoraportError, match=r"a\.onnx_adapter: expected sha256"):
        pack_bundle(bundle, tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()


def rewrite(archive: Path, change) -> None:
    """Write an archive anew with its entries changed by ``change(name, content)``."""
    with zipfile.ZipFile(archive) as source:
        entries = [(name, source.read(name)) for name in source.namelist()]
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:
        for name, content in entries:
            for new_name, new_content in change(name, content):
                target.writestr(new_name, new_content)


def test_hostile_archives_are_refused_and_nothing_is_written(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {"a": b"adapter a"})

    def plus(extra_name, extra=b"x"):
        def change(name, content):
            yield name, content
            if name == "manifest.json":
                yield extra_name, extra

        return change

    def flipped(name, content):
        yield name, content[:-1] + b"?" if name == "model.onnx" else content

    def dropped(name, content):
        if name != "model.onnx":
            yield name, content

    def escaping_manifest(name, content):
        if name == "manifest.json":
            document = json.loads(content)
            document["files"]["../outside"] = "0" * 64
            content = sealed(document, "manifest.json").encode()
        yield name, content

    def edited_manifest(name, content):
        yield (
            name,
            content.replace(b'"tolerance"', b'"tolerancE"') if "manifest" in name else content,
        )

    cases = {
        r"manifest\.json: expected sha256": edited_manifest,
        r"\.\./evil: expected a path inside": plus("../evil"),
        r"/etc/evil: expected a path inside": plus("/etc/evil"),
        r"unlisted: expected a file the manifest lists": plus("unlisted"),
        r"model\.onnx: expected sha256": flipped,
        r"model\.onnx: expected the file": dropped,
        r"\.\./outside: expected a path inside": escaping_manifest,
    }
    for message, change in cases.items():
        pack_bundle(bundle, tmp_path / "b.zip", force=True)
        rewrite(tmp_path / "b.zip", change)
        with pytest.raises(LoraportError, match=message):
            unpack_bundle(tmp_path / "b.zip", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()


def test_a_compressed_bomb_is_refused(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {})
    manifest = read_manifest(bundle)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("manifest.json", manifest.to_json(), zipfile.ZIP_STORED)
        for path in manifest.files:
            target.writestr(path, b"0" * (1 << 20))
    with pytest.raises(LoraportError, match="expected a stored file no larger than the archive"):
        unpack_bundle(tmp_path / "bomb.zip", tmp_path / "out")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_manifest_is_refused_before_it_is_read(method, tmp_path):
    """Where damaged, each method fails in a way of its own."""
    bundle = make_bundle(tmp_path / "bundle", {"a": b"adapter a"})
    with zipfile.ZipFile(tmp_path / "b.zip", "w", method) as archive:
        archive.write(bundle / "manifest.json", "manifest.json")
    content = bytearray((tmp_path / "b.zip").read_bytes())
    content[80:90] = b"\xff" * 10
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(LoraportError, match=r"manifest\.json stored as it is, got it compressed"):
        unpack_bundle(tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 1, 30, 200, -1, -30])
def test_a_truncated_archive_is_refused(tmp_path, keep):
    bundle = make_bundle(tmp_path / "bundle", {"a": b"adapter a"})
    pack_bundle(bundle, tmp_path / "b.zip")
    content = (tmp_path / "b.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(content[:keep])
    with pytest.raises(LoraportError, match="expected an intact zip"):
        unpack_bundle(tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_flipped_byte_is_refused(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {"a": b"adapter a"})
    check_files(read_manifest(bundle), bundle)
    pack_bundle(bundle, tmp_path / "b.zip")
    content = bytearray((tmp_path / "b.zip").read_bytes())
    original = contents(bundle)
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        (tmp_path / "b.zip").write_bytes(damaged)
        try:
            unpack_bundle(tmp_path / "b.zip", tmp_path / "out", force=True)
        except LoraportError:
            continue
        # A byte of the zip's own bookkeeping, such as a date: the bundle is still the same.
        assert contents(tmp_path / "out") == original, position


def test_without_takes_out_an_adapter_with_its_files(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", {"a": b"adapter a", "b": b"adapter b"})
    manifest = read_manifest(bundle)
    left = manifest.without(["a"])
    assert list(left.adapters) == ["b"]
    assert not any("adapters/a." in path for path in (*left.files, *left.xxh3))
    assert left.xxh3 == {"adapters/b.safetensors": manifest.xxh3["adapters/b.safetensors"]}
    nothing = {"adapters": {}, "files": {}, "xxh3": {}}
    assert replace(left, **nothing) == replace(manifest, **nothing)
