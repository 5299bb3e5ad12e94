"""The real SmolLM2-135M-Instruct: ONNX Runtime, PEFT and ONNX Runtime GenAI agree."""

import gc

import numpy as np
import pytest
import torch
from tiny_llm import peft_model

from converters.formats.registry import read_adapter
from converters.onnx.modules.graph_weights import load_graph_weights
from loraport.base.loading import load_model, load_tokenizer
from loraport.bundle.manifest import read_manifest
from loraport.parity import verify_bundle
from loraport.parity.prompts import PROMPTS
from loraport.parity.verification import default_samples
from loraport.runtime import Runtime, Sampling, generate
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.replay import replay

pytestmark = pytest.mark.real

MAX_ABS = 1e-3  # float32 on both sides; logits are of the order of 20
NEW = 16
IN_PEFT = {"a": "default", "b": "b"}  # what PEFT's model calls them


@pytest.fixture(scope="module")
def prompts(real_base):
    tokenizer = load_tokenizer(str(real_base))
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="module")
def torch_model(real_base, real_directory):
    """PEFT's model with both adapters; the base is inside it, with them switched off."""
    model = peft_model(real_base, real_directory / "a")
    model.load_adapter(str(real_directory / "b"), "b")
    return model


def test_every_linear_module_but_the_head_has_a_slot(real_fp32):
    manifest = read_manifest(real_fp32)
    assert len(manifest.slots.modules()) == 30 * 7
    assert manifest.unslotted.keys() == {"lm_head"}


def test_logits_are_pefts_over_all_prompts(real_fp32, torch_model, prompts):
    runtime = Runtime(real_fp32)
    decoder = read_decoder(real_fp32)
    assert len(prompts) >= 20
    effect = []
    for token_ids in prompts:
        inputs = first_step_inputs(runtime, decoder, token_ids)
        ids = torch.tensor([token_ids])
        expected = {}
        with torch.no_grad():
            for name, called in IN_PEFT.items():
                torch_model.set_adapter(called)
                expected[name] = torch_model(input_ids=ids).logits.numpy()
            with torch_model.disable_adapter():
                expected[None] = torch_model(input_ids=ids).logits.numpy()
        for selection, logits in expected.items():
            got = runtime.run(inputs, selection, ["logits"])["logits"]
            np.testing.assert_allclose(got, logits, atol=MAX_ABS, rtol=0)
            assert np.array_equal(got.argmax(-1), logits.argmax(-1))
        for one, other in ((None, "a"), (None, "b"), ("a", "b")):
            effect.append(np.abs(expected[one] - expected[other]).max())
    assert min(effect) > 1


def test_a_blend_is_pefts_weighted_sum(real_fp32, torch_model, prompts):
    from peft.tuners.lora import LoraLayer

    runtime = Runtime(real_fp32)
    inputs = first_step_inputs(runtime, read_decoder(real_fp32), prompts[0])
    strengths = {"a": 0.75, "b": 0.5}
    torch_model.base_model.set_adapter(["default", "b"])
    layers = [module for module in torch_model.modules() if isinstance(module, LoraLayer)]
    own = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling["default"] *= strengths["a"]
        layer.scaling["b"] *= strengths["b"]
    with torch.no_grad():
        expected = torch_model(input_ids=torch.tensor([prompts[0]])).logits.numpy()
    for layer, scaling in zip(layers, own, strict=True):
        layer.scaling.update(scaling)
    got = runtime.run(inputs, strengths, ["logits"])["logits"]
    np.testing.assert_allclose(got, expected, atol=MAX_ABS, rtol=0)
    for other in ("a", "b", {"a": 0.5, "b": 0.75}):
        assert (
            np.abs(runtime.run(inputs, other, ["logits"])["logits"] - expected).max()
            > 100 * MAX_ABS
        )


def test_genai_and_our_tokens_are_pefts(real_fp32, torch_model, prompts):
    import onnxruntime_genai as og

    model = og.Model(str(real_fp32))
    loaded = og.Adapters(model)
    loaded.load(str(real_fp32 / read_manifest(real_fp32).adapters["a"].file), "a")
    runtime = Runtime(real_fp32)
    torch_model.set_adapter("default")
    for token_ids in prompts[:3]:
        ids = torch.tensor([token_ids])
        options = {"max_new_tokens": NEW, "do_sample": False}
        expected = torch_model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **options
        )[0, len(token_ids) :].tolist()
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(token_ids) + NEW, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.set_active_adapter(loaded, "a")
        generator.append_tokens(token_ids)
        while not generator.is_done():
            generator.generate_next_token()
        assert list(generator.get_sequence(0))[len(token_ids) :] == expected
        ours = list(generate(runtime, token_ids, "a", Sampling(max_new_tokens=NEW)))
        stops = read_decoder(real_fp32).stop_ids
        assert ours == [token for token in expected if token not in stops]
        base = list(generate(runtime, token_ids, None, Sampling(max_new_tokens=NEW)))
        assert base != ours


def test_int4_computes_with_its_own_weights(real_int4, real_base, real_directory):
    gc.collect()
    model = load_model(str(real_base))
    replaced = load_graph_weights(real_int4 / "model.onnx", model)
    # The head's weights are the embedding's, and rounded as well.
    assert len(replaced) == 30 * 7 + 1
    samples = default_samples(Runtime(real_int4))[::6]
    adapters = {name: read_adapter(real_directory / name) for name in IN_PEFT}
    report = verify_bundle(real_int4, model, adapters, samples=samples)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.checks[-1].name.startswith("as deployed: base")
    # Control: the base's own weights are not what the graph computes with.
    unrounded = verify_bundle(real_int4, load_model(str(real_base)), {}, samples=samples[:1])
    failed = [check.name for check in unrounded.checks if not check.passed]
    assert failed == ["base: onnxruntime = torch"]


@pytest.mark.parametrize("threads", [1, 3])
def test_golden_cases_of_int4_do_not_depend_on_how_many_threads_there_are(real_int4, threads):
    """Sums in another order flip what the kernels round; a healthy bundle is no damaged one."""
    results = replay(Runtime(real_int4, threads=threads, check=False))
    assert {result.name for result in results} == {"base", "adapter-a", "adapter-b", "blend"}
    assert all(result.passed for result in results), results
