"""manifest.json: round trip, and one clear error for each way it can be wrong."""

import hashlib
import json

import pytest

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from loraport.bundle.manifest import MANIFEST_FILE, Manifest, check_files, read_manifest
from loraport.bundle.seal import require_seal, sealed
from loraport.errors import LoraportError


@pytest.fixture
def document(bundle):
    return json.loads((bundle / MANIFEST_FILE).read_text())


def refused(document):
    with pytest.raises(LoraportError) as error:
        Manifest.from_json(sealed(document, MANIFEST_FILE))
    return str(error.value)


def test_round_trip(bundle):
    manifest = read_manifest(bundle)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.to_json() == (bundle / MANIFEST_FILE).read_text()


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_another_schema_version(document, version):
    document["schema_version"] = version
    text = refused(document)
    assert f"expected schema version 1, got {version!r}" in text
    assert "use the loraport that wrote the bundle" in text


OUTSIDE = ["../secret", "/etc/passwd", "a/../../b", "C:/x", "a\\b"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("place", ["files", "file", "tensors", "golden"])
def test_a_path_that_leaves_the_bundle(document, path, place):
    if place == "files":
        document["files"][path] = "0" * 64
    elif place == "golden":
        document["golden"]["base"]["file"] = path
    else:
        document["adapters"]["a"][place] = path
    text = refused(document)
    assert "names files outside the bundle" in text
    assert f"  - {path}: expected a path inside the bundle" in text


def test_all_paths_that_leave_the_bundle_are_named_at_once(document):
    document["files"] |= dict.fromkeys(OUTSIDE, "0" * 64)
    text = refused(document)
    assert all(f"  - {path}: " in text for path in OUTSIDE)


DAMAGED = ["{", "[]", "3", "null", "{}", '{"schema_version": 1}', "\ud800", "[" * 100_000]


@pytest.mark.parametrize("text", ["", *DAMAGED])
def test_a_manifest_without_its_sha256(own_bundle, text):
    (own_bundle / MANIFEST_FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(LoraportError, match=r"manifest\.json: expected its own sha256 at its end"):
        read_manifest(own_bundle)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_manifest_that_was_written_wrong(own_bundle, text):
    head = text.encode("utf-8", "surrogatepass") + b'"manifest_sha256": "'
    digest = hashlib.sha256(head).hexdigest().encode()
    (own_bundle / MANIFEST_FILE).write_bytes(head + digest + b'"\n}\n')
    with pytest.raises(LoraportError, match=r"manifest\.json: expected a manifest, got: "):
        read_manifest(own_bundle)


def test_every_flipped_bit_of_a_manifest_is_found():
    content = sealed({"schema_version": 1, "tolerance": 0.001}, MANIFEST_FILE).encode()
    require_seal(content, MANIFEST_FILE)
    assert json.loads(content)["tolerance"] == 0.001
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            with pytest.raises(LoraportError, match=MANIFEST_FILE):
                require_seal(bytes(flipped), MANIFEST_FILE)
    for length in range(len(content)):
        with pytest.raises(LoraportError, match="own sha256"):
            require_seal(content[:length], MANIFEST_FILE)


def test_flipped_bytes_of_a_real_manifest_are_found(own_bundle):
    content = (own_bundle / MANIFEST_FILE).read_bytes()
    for position in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[position] ^= 1
        (own_bundle / MANIFEST_FILE).write_bytes(flipped)
        with pytest.raises(LoraportError, match=r"manifest\.json: expected"):
            read_manifest(own_bundle)


KEYS = ("base", "precision", "slots", "unslotted", "adapters", "golden", "files", "made_by")


@pytest.mark.parametrize("key", [*KEYS, "tolerance"])
def test_a_missing_entry(document, key):
    del document[key]
    assert key in refused(document)


@pytest.mark.parametrize("key", ["base", "slots", "unslotted", "adapters", "golden", "files"])
@pytest.mark.parametrize("value", [3, "text", ["text"], None, {"a": 3}, {"a": {"b": 3}}])
def test_an_entry_of_another_kind(document, key, value):
    document[key] = value
    assert "manifest" in refused(document)


@pytest.mark.parametrize("field", ["in_features", "out_features"])
@pytest.mark.parametrize("value", [0, -1, 2**64, 4.5, True, "8", None, []])
def test_a_dimension_that_no_tensor_has(document, field, value):
    document["slots"][0][field] = value
    assert f"a dimension that is {value!r}" in refused(document)


def test_a_column_that_is_infinite(document):
    document["slots"][0]["modules"][0]["stop"] = float("inf")
    assert "infinity" in refused(document)


@pytest.mark.parametrize("field", ["file", "tensors"])
def test_a_path_that_is_no_text(document, field):
    document["adapters"]["a"][field] = 5
    assert "manifest" in refused(document)


def test_no_such_bundle(tmp_path):
    with pytest.raises(LoraportError, match=r"expected a directory with manifest\.json, got: No "):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "packed.zip").touch()
    with pytest.raises(LoraportError, match=r"got: Not a directory; 'loraport bundle unpack' mak"):
        read_manifest(tmp_path / "packed.zip")


def test_every_file_is_listed_with_its_hash(bundle):
    listed = read_manifest(bundle).files
    there = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    # The manifest cannot hold its own hash; where things came from is this machine's affair.
    assert there - listed.keys() == {MANIFEST_FILE, "sources.json"}
    assert listed.keys() <= there


def test_all_files_that_are_not_intact_are_named_at_once(own_bundle):
    (own_bundle / "tokenizer.json").write_text("{}")
    (own_bundle / "model.onnx.data").unlink()
    with pytest.raises(LoraportError) as error:
        check_files(read_manifest(own_bundle), own_bundle)
    assert "  - tokenizer.json: expected sha256" in str(error.value)
    assert "  - model.onnx.data: expected the file the manifest lists" in str(error.value)


def test_an_adapter_for_a_bundle_without_golden_inputs_is_refused(own_bundle, document, adapter_b):
    document["golden"] = {}
    (own_bundle / MANIFEST_FILE).write_text(sealed(document, MANIFEST_FILE))
    with pytest.raises(LoraportError, match="golden case 'base': expected"):
        add_adapters(own_bundle, {"c": read_adapter(adapter_b)})
    assert not list((own_bundle / "adapters").glob("c.*"))


def test_no_path_of_this_machine_is_in_the_manifest(bundle, tiny_base):
    text = (bundle / MANIFEST_FILE).read_text()
    assert str(tiny_base.parent) not in text
    assert read_manifest(bundle).base_name == tiny_base.name
