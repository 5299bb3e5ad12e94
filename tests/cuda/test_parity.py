"""PyTorch on CUDA against ONNX Runtime's CUDA provider, nothing on the CPU unnoticed."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llm import TEXTS, tokenizer

from converters.formats.registry import read_adapter
from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.exporters.genai_builder import PRECISIONS
from converters.onnx.modules.graph_weights import load_graph_weights
from converters.onnx.slots.inserting import SlotOptions
from loraport.base.loading import load_model
from loraport.bundle.manifest import MODEL_FILE, read_manifest, write_manifest
from loraport.errors import LoraportError
from loraport.parity import verify_bundle
from loraport.parity.tolerances import tolerance_for
from loraport.runtime import Runtime, generate
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.steps import CapturedSteps, GrowingSteps


@pytest.fixture(scope="module", params=PRECISIONS["cuda"])
def gpu_bundle(request, tiny_base, adapters, tmp_path_factory):
    """A language model's bundle for CUDA, and PyTorch's model with the same weights."""
    out = tmp_path_factory.mktemp("cuda") / request.param
    options = ExportOptions(provider="cuda", precision=request.param)
    export_base(str(tiny_base), out, options)
    add_adapters(out, {name: read_adapter(path) for name, path in adapters.items()})
    model = load_model(str(tiny_base))
    original = {name: value.detach().clone() for name, value in model.named_parameters()}
    if request.param in ("int4", "int8"):
        load_graph_weights(out / MODEL_FILE, model)
    return out, model.cuda(), original


@pytest.fixture(scope="module")
def sources(adapters):
    return {name: read_adapter(path) for name, path in adapters.items()}


def failed(bundle, model, original, sources):
    report = verify_bundle(
        bundle, model, sources, provider="cuda", original=lambda name: original[name]
    )
    names = [check.name for check in report.checks]
    assert "every node on cuda" in names
    return {check.name: check.detail for check in report.checks if not check.passed}


def test_the_protocol_holds_on_cuda(gpu_bundle, sources):
    """Base, both adapters, their blend, swaps, greedy tokens, and each node's provider."""
    assert failed(*gpu_bundle, sources) == {}


def test_the_protocol_fails_with_another_adapter_in_the_file(gpu_bundle, sources, tmp_path):
    bundle, model, original = gpu_bundle
    own = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = read_manifest(own)
    file = own / manifest.adapters["a"].tensors
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    write_manifest(manifest.with_files(own, list(manifest.files)), own)
    wrong = failed(own, model, original, sources)
    assert "adapter a: packed = source" in wrong


def test_a_float32_graph_with_tf32_off(tmp_path):
    """GenAI's CUDA graphs have no float32: a plain encoder, exported by torch.onnx."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=320, num_hidden_layers=2, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    export_base(str(tmp_path / "base"), tmp_path / "bundle", ExportOptions(precision="fp32"))
    report = verify_bundle(tmp_path / "bundle", model.cuda(), {}, provider="cuda")
    assert report.passed, [check for check in report.checks if not check.passed]
    # The control: TF32's 10-bit mantissas would not do.
    torch.set_float32_matmul_precision("high")
    try:
        rounded = verify_bundle(tmp_path / "bundle", model, {}, provider="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    exact, loose = (
        next(c.comparison for c in r.checks if c.name.startswith("base")) for r in (report, rounded)
    )
    assert loose.max_abs > 5 * exact.max_abs


def test_adapters_stay_on_the_device_and_swaps_take_effect(gpu_bundle):
    bundle, _, _ = gpu_bundle
    runtime = Runtime(bundle, provider="cuda")
    ids = tokenizer()(TEXTS[0])["input_ids"]
    inputs = first_step_inputs(runtime, read_decoder(bundle), ids)
    lanes = {name: runtime.lane(name) for name in (None, "a", "b")}
    values = runtime.load("a").values.values()
    assert {value.device_name() for value in values} == {"cuda"}
    first = {name: lane.run_on_device(inputs, ["logits"])["logits"] for name, lane in lanes.items()}
    assert {value.device_name() for value in first.values()} == {"cuda"}
    logits = {name: value.numpy().astype(np.float32) for name, value in first.items()}
    bound = tolerance_for(runtime.manifest.precision, "cuda").max_abs
    for name, other in ((None, "a"), ("a", "b"), ("b", None)):
        assert np.abs(logits[name] - logits[other]).max() > bound
        again = lanes[name].run(inputs, ["logits"])["logits"]
        np.testing.assert_array_equal(again.astype(np.float32), logits[name])


def test_captured_steps_give_what_growing_caches_give(gpu_bundle):
    """Three texts in turn, and runs of lanes between them, which use the same memory."""
    bundle, _, _ = gpu_bundle
    plain, captured = (Runtime(bundle, provider="cuda", cuda_graphs=each) for each in (False, True))
    decoder = read_decoder(bundle)
    ids, new = tokenizer()(TEXTS[0])["input_ids"], [7, 130, 12, 9, 301, 44, 8, 15]
    inputs = first_step_inputs(plain, decoder, ids)

    def logits(runtime, kind, *more):
        texts = {name: kind(runtime, decoder, name, *more) for name in (None, "a", "b")}
        found = {name: [text.run(ids)] for name, text in texts.items()}
        for token in new:
            for name, text in texts.items():
                found[name].append(text.run([token]))
                runtime.run(inputs, "b", "logits")
        return {name: np.stack(rows) for name, rows in found.items()}

    expected = logits(plain, GrowingSteps)
    bound = tolerance_for(plain.manifest.precision, "cuda").max_abs
    for _ in range(2):
        got = logits(captured, CapturedSteps, len(ids) + len(new) + 8)
        for name, rows in expected.items():
            np.testing.assert_allclose(got[name], rows, rtol=0, atol=bound)
    for one, other in ((None, "a"), ("a", "b"), ("b", None)):
        assert np.abs(expected[one] - expected[other]).max() > bound
    with pytest.raises(LoraportError, match="outputs on the device"):
        captured.lane("a").run_on_device(inputs)
    texts = [list(generate(each, ids, "a")) for each in (plain, captured, captured)]
    assert texts[1] == texts[2]


def test_rows_with_adapters_of_their_own_equal_one_by_one(tiny_base, adapters, tmp_path):
    options = ExportOptions(provider="cuda", precision="fp16", slots=SlotOptions(per_row=True))
    export_base(str(tiny_base), tmp_path / "bundle", options)
    add_adapters(tmp_path / "bundle", {n: read_adapter(path) for n, path in adapters.items()})
    runtime = Runtime(tmp_path / "bundle", provider="cuda")
    decoder = read_decoder(runtime.directory)
    ids = tokenizer()(TEXTS[0])["input_ids"]
    one = first_step_inputs(runtime, decoder, ids)
    three = {name: np.repeat(np.asarray(value), 3, axis=0) for name, value in one.items()}
    got = runtime.rows(["a", "b"]).run(three, ["b", None, "a"], ["logits"])["logits"]
    bound = tolerance_for("fp16", "cuda").max_abs
    for row, name in zip(got, ("b", None, "a"), strict=True):
        expected = runtime.rows(["a", "b"]).run(one, [name], ["logits"])["logits"][0]
        np.testing.assert_allclose(
            row.astype(np.float32), expected.astype(np.float32), rtol=0, atol=bound
        )
    assert np.abs(got[0].astype(np.float32) - got[2].astype(np.float32)).max() > bound
