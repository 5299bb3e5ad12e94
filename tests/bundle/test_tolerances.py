"""The manifest carries a golden tolerance for each runtime that needs its own."""

import json
from dataclasses import replace

from loraport.bundle.manifest import Manifest, read_manifest
from loraport.bundle.seal import sealed
from loraport.parity.tolerances import golden_tolerance, golden_tolerances


def test_only_the_browsers_4_bit_kernels_need_their_own():
    assert golden_tolerances("fp32") == {}
    own = golden_tolerances("int4")
    assert own.keys() == {"wasm", "webgpu"}
    assert all(bound > golden_tolerance("int4") for bound in own.values())


def test_tolerances_survive_writing_and_reading(bundle):
    manifest = replace(read_manifest(bundle), tolerances={"wasm": 3.0})
    assert Manifest.from_json(manifest.to_json()).tolerances == {"wasm": 3.0}


def test_an_older_manifest_has_none(bundle):
    document = json.loads((bundle / "manifest.json").read_text())
    del document["tolerances"]
    assert Manifest.from_json(sealed(document, "manifest.json")).tolerances == {}
