"""The manifest's JSON Schema describes what is really written, and refuses what is not."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest

import loraport.bundle

SCHEMA = json.loads(
    (Path(loraport.bundle.__file__).parent / "manifest.schema.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def document(bundle):
    return json.loads((bundle / "manifest.json").read_text())


def test_a_real_manifest_is_valid(document):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)


def test_every_key_that_is_written_is_described(document):
    not_here = {"replacements", "controls", "tied", "long_rotations_after"}
    assert document.keys() == SCHEMA["properties"].keys() - not_here
    definitions = SCHEMA["$defs"]
    for key, definition in (("adapters", "adapter"), ("golden", "golden")):
        for entry in document[key].values():
            assert entry.keys() == definitions[definition]["properties"].keys()
    for slot in document["slots"]:
        assert slot.keys() == definitions["slot"]["properties"].keys() - {"kernel"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(schema_version=2),
        lambda d: d.pop("tolerance"),
        lambda d: d.update(tolerances={"wasm": -1}),
        lambda d: d.update(tolerances={"toaster": 1}),
        lambda d: d.update(long_rotations_after=0),
        lambda d: d["files"].update({"../outside": "0" * 64}),
        lambda d: d["files"].update({"/etc/passwd": "0" * 64}),
        lambda d: d["files"].update({"model.onnx": "not a hash"}),
        lambda d: d["adapters"]["a"].update(file="..\\evil"),
        lambda d: d["slots"][0].pop("modules"),
        lambda d: d["golden"]["base"].update(adapters={"a": "much"}),
    ],
)
def test_a_wrong_manifest_is_not(document, damage):
    wrong = copy.deepcopy(document)
    damage(wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)
