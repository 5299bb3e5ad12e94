"""Texts that grow until other factors rotate all of them (longrope), against transformers."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from bundle_faults import resealed
from tiny_llm import LONG_PHI3, peft_model

from converters.formats.registry import read_adapter
from converters.onnx.importing import ImportOptions, import_model
from loraport.base.loading import load_model
from loraport.base.rotation_border import rotation_border
from loraport.bundle.manifest import Manifest, read_manifest
from loraport.errors import LoraportError
from loraport.parity import verification, verify_bundle
from loraport.parity.reference import next_token_logits
from loraport.runtime import Runtime, Sampling, generate
from loraport.runtime.capturing import CapturingSession
from loraport.runtime.decoder import read_decoder
from loraport.runtime.steps import CapturedSteps, GrowingSteps, InPlaceSteps

BORDER = LONG_PHI3["original_max_position_embeddings"]
NEW = 24
GREEDY = "adapter a: greedy tokens"


@pytest.fixture(scope="module")
def models(long_phi3):
    base = long_phi3 / "base"
    return {None: load_model(str(base)), "a": peft_model(base, long_phi3 / "a")}


@pytest.fixture
def runtime(long_phi3):
    return Runtime(long_phi3 / "bundle")


def prompt(length):
    return np.random.default_rng(length).integers(3, 300, length).tolist()


def forgetful(runtime):
    """A runtime of a bundle that does not say where the rotations change."""
    runtime.manifest = replace(runtime.manifest, long_rotations_after=None)
    return runtime


@pytest.mark.parametrize("name", [None, "a"])
@pytest.mark.parametrize("length", [1, BORDER - 1, BORDER, BORDER + 1])
def test_tokens_are_those_of_transformers(models, runtime, name, length):
    """Control: over the cache of the short rotations the tokens are others."""
    ids = torch.tensor([prompt(length)])
    made = models[name].generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
    )
    expected = made[0, length:].tolist()
    assert len(expected) == NEW

    def tokens():
        return list(generate(runtime, prompt(length), name, Sampling(max_new_tokens=NEW)))

    assert tokens() == expected
    forgetful(runtime)
    assert (tokens() == expected) == (length > BORDER)


@pytest.mark.parametrize("kind", [GrowingSteps, InPlaceSteps, CapturedSteps])
def test_steps_begin_anew(runtime, kind):
    if kind is CapturedSteps:
        runtime.session = CapturingSession(runtime.session)
    rest = () if kind is GrowingSteps else (NEW,)
    steps = kind(runtime, read_decoder(runtime.directory), "a", *rest)
    first = [steps.run(prompt(3)), *(steps.run([token]) for token in (7, 130, 12))]
    going_on = steps.run(prompt(3))
    steps.forget()
    again = [steps.run(prompt(3)), *(steps.run([token]) for token in (7, 130, 12))]
    np.testing.assert_array_equal(again, first)
    assert np.abs(going_on - first[0]).max() > 1e-3


def test_the_bundle_says_where_as_the_model_does(long_phi3, models, bundle):
    manifest = read_manifest(long_phi3 / "bundle")
    assert manifest.long_rotations_after == rotation_border(models[None].config) == BORDER
    assert '"long_rotations_after": 20' in manifest.to_json()
    none = replace(manifest, long_rotations_after=None)
    assert Manifest.from_json(none.to_json()) == none
    assert "long_rotations_after" not in (bundle / "manifest.json").read_text()
    said = '"long_rotations_after": '
    wrong = resealed(manifest.to_json().replace(f"{said}20", f'{said}"20"'))
    with pytest.raises(LoraportError, match="expected a manifest"):
        Manifest.from_json(wrong)


CHOOSING = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
chosen (float[n, 16] x, int64[batch, sequence] mask, int64[1, sequence] position_ids)
    => (float[1, sequence, 16] y)
<float[16, 16] weight, int64 index = {1}, int64 border = {9}>
{
    sizes = Shape (mask)
    length = Gather (sizes, index)
    longer = COMPARED (length, border)
    cos, sin = If (longer) <
        then_branch = long () => (float[64, 8] c, float[64, 8] s) {
            zero = Constant <value_float = 0.0> ()
            shape = Constant <value_ints = [64, 8]> ()
            c = Expand (zero, shape)
            s = Expand (zero, shape)
        },
        else_branch = short () => (float[9, 8] c, float[9, 8] s) {
            zero = Constant <value_float = 0.5> ()
            shape = Constant <value_ints = [9, 8]> ()
            c = Expand (zero, shape)
            s = Expand (zero, shape)
        }
    >
    mixed = MatMul (x, weight)
    axes = Constant <value_ints = [0]> ()
    whole = Unsqueeze (mixed, axes)
    y = com.microsoft.RotaryEmbedding (whole, position_ids, cos, sin) <num_heads = 1>
}"""


@pytest.mark.parametrize(("compared", "border"), [("Greater", 9), ("Less", None)])
def test_a_graph_that_others_made_says_so_too(tmp_path, compared, border):
    model = onnx.parser.parse_model(CHOOSING.replace("COMPARED", compared))
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
    onnx.save(model, tmp_path / "chosen.onnx")
    ones = np.ones((1, 4), np.int64)
    inputs = {"x": weight[:4], "mask": ones, "position_ids": np.arange(4)[None]}
    import_model(tmp_path / "chosen.onnx", tmp_path / "bundle", ImportOptions(inputs=inputs))
    assert read_manifest(tmp_path / "bundle").long_rotations_after == border


def test_a_verification_computes_anew_as_transformers_does(long_phi3, models, monkeypatch):
    adapters = {"a": read_adapter(long_phi3 / "a")}
    bundle = long_phi3 / "bundle"

    def failures():
        report = verify_bundle(bundle, models[None], adapters, progress=notes.append)
        samples.append(report.samples)
        return [check.name for check in report.checks if not check.passed]

    notes, samples = [], []
    assert failures() == []
    monkeypatch.setattr(verification, "_MOST_PRODUCTS", 1)
    monkeypatch.setattr("loraport.runtime.model.read_manifest", lambda _: none)
    none = replace(read_manifest(bundle), long_rotations_after=None)
    assert failures() == [GREEDY]
    assert samples[0] == samples[1] + 1
    told = f"not compared beyond the short rotations of {BORDER} tokens, which takes too long"
    assert notes.count(told) == 1


@pytest.mark.parametrize("length", [3, BORDER - 2, BORDER, BORDER + 1])
def test_logits_before_tokens_are_those_of_a_run_up_to_each(models, length):
    """Control: in a run over all of them, those before the border are others."""
    model, text = models[None], prompt(BORDER + 4)
    got = next_token_logits(model, text[:length], text[length:])

    def logits(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0].numpy()

    expected = [logits(text[:end])[-1] for end in range(length, len(text))]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    whole = logits(text)[length - 1 : -1]
    assert (np.abs(whole - expected).max() > 1e-2) == (length <= BORDER)
