"""Layers that look back a few tokens only do so in the exported graph, from its first step on."""

import numpy as np
import pytest
import torch
import transformers
from tiny_llm import GEMMA, PHI3, SIZES, save_base

from converters.onnx import export_base, exporting
from converters.onnx.exporters.attention_windows import set_attention_windows
from loraport.base.attention_windows import attention_windows
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.parity import verification, verify_bundle
from loraport.runtime import Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder

WINDOW, PROMPT, STEPS = 8, 21, 3
LOCAL = ["sliding_attention", "full_attention"]
MODELS = {
    "Mistral": (SIZES | {"sliding_window": WINDOW}, [WINDOW, WINDOW]),
    "Phi3": (PHI3 | {"sliding_window": WINDOW}, [WINDOW, WINDOW]),
    "Gemma2": (GEMMA | {"sliding_window": WINDOW, "layer_types": LOCAL}, [WINDOW, -1]),
    "Qwen2": (
        SIZES | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LOCAL},
        [WINDOW, -1],
    ),
    "Llama": (SIZES | {"sliding_window": WINDOW}, [-1, -1]),  # which knows no such setting
}


def cached(bundle, ids):
    """Logits of a prompt and of tokens that follow it one by one, over the cache."""
    runtime = Runtime(bundle)
    decoder = read_decoder(bundle)
    found, outputs = [], {}
    for stop in range(PROMPT, PROMPT + STEPS + 1):
        part = ids[:PROMPT] if stop == PROMPT else ids[stop - 1 : stop]
        inputs = first_step_inputs(runtime, decoder, part)
        if outputs:
            inputs["attention_mask"] = np.ones((1, stop), np.int64)
            for layer in range(decoder.layers):
                for past, present in zip(decoder.past, decoder.present, strict=True):
                    inputs[past % layer] = outputs[present % layer]
        if "position_ids" in inputs:
            inputs["position_ids"] = np.arange(stop - len(part), stop)[None]
        outputs = runtime.run(inputs)
        found.append(outputs["logits"][0])
    return np.concatenate(found)


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_looks_back_as_far_as_the_model(name, tmp_path):
    settings, windows = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    assert list(attention_windows(config)) == windows[: config.num_hidden_layers]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    base = save_base(tmp_path / "base", model)
    export_base(str(base), tmp_path / "bundle")
    assert read_manifest(tmp_path / "bundle").slots.slots
    ids = np.random.default_rng(0).integers(3, 250, PROMPT + STEPS).tolist()
    expected = logits(model, ids)
    np.testing.assert_allclose(cached(tmp_path / "bundle", ids), expected, atol=2e-4)
    if max(windows) < 0:
        return
    # Without a window the same weights give other logits once it is passed, and only then.
    far = None if name in ("Mistral", "Phi3") else 4096
    wide = type(model)(type(config)(**(settings | {"sliding_window": far}))).eval()
    wide.load_state_dict(model.state_dict())
    unlike = np.abs(logits(wide, ids) - expected).max(-1)
    assert unlike[:WINDOW].max() < 1e-5
    assert unlike[WINDOW + 1 :].min() > 1e-3


def test_a_window_that_the_graph_cannot_have_is_refused(bare_bundle):
    import onnx_ir as ir

    model = ir.load(bare_bundle / "model.onnx")
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "SomeAttention"
    config = transformers.MistralConfig(**MODELS["Mistral"][0])
    with pytest.raises(LoraportError, match="expected attention that can look back 8 tokens only"):
        set_attention_windows(model, config)


@pytest.mark.parametrize("windows", [True, False])
def test_verify_reads_a_text_that_is_longer_than_the_window(windows, tmp_path, monkeypatch):
    config = transformers.MistralConfig(**(SIZES | {"sliding_window": 100}))
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    base = save_base(tmp_path / "base", model)
    if not windows:
        monkeypatch.setattr(exporting, "set_attention_windows", lambda *_: None)
    export_base(str(base), tmp_path / "bundle")
    report = verify_bundle(tmp_path / "bundle", model, {})
    assert report.passed is windows
    failed = {check.name for check in report.checks if not check.passed}
    assert windows or "base: onnxruntime = torch" in failed
    notes = []
    monkeypatch.setattr(verification, "_MOST_PRODUCTS", 1)
    shorter = verify_bundle(tmp_path / "bundle", model, {}, progress=notes.append)
    assert shorter.samples == report.samples - 1
    assert "not compared beyond the window of 100 tokens, which takes too long" in notes
    assert "base: onnxruntime = torch" not in {c.name for c in shorter.checks if not c.passed}
    # Where the context ends before the window does there is nothing beyond it.
    notes.clear()
    model.config.sliding_window = SIZES["max_position_embeddings"]
    assert verify_bundle(tmp_path / "bundle", model, {}, progress=notes.append).samples == (
        shorter.samples
    )
    assert not [note for note in notes if "window" in note]
