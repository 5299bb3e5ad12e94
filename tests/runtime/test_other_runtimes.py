"""The same bundle through other people's code: ONNX Runtime's adapters, and GenAI's."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_graphs import session
from tiny_llm import TEXTS, peft_model, tokenizer

from loraport.base.loading import load_model
from loraport.bundle.manifest import read_manifest
from loraport.runtime import Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder

ATOL = 1e-4  # float32 sums in another order


@pytest.fixture(scope="module")
def inputs(bundle):
    runtime = Runtime(bundle, threads=1)
    return first_step_inputs(runtime, read_decoder(bundle), tokenizer()(TEXTS[0])["input_ids"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_onnxruntimes_own_adapters_are_ours_and_pefts(bundle, tiny_base, adapters, inputs, name):
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(bundle / read_manifest(bundle).adapters[name].file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    plain = session(str(bundle / "model.onnx"))
    (got,) = plain.run(["logits"], inputs, options)
    runtime = Runtime(bundle, threads=1)
    ours = runtime.run(inputs, name, ["logits"])["logits"]
    assert np.array_equal(got, ours)
    with torch.no_grad():
        ids = torch.from_numpy(inputs["input_ids"])
        expected = peft_model(tiny_base, adapters[name])(input_ids=ids).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=ATOL)
    (base,) = plain.run(["logits"], inputs)
    assert np.abs(got - base).max() > 0.5


def test_ours_take_effect_under_io_binding_where_onnxruntimes_are_ignored(bundle, inputs):
    # The reason why the runtime binds the slots itself; should this begin to fail, ONNX Runtime
    # has learnt to apply active adapters under IO binding.
    plain = session(str(bundle / "model.onnx"))
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(bundle / "adapters" / "a.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    binding = plain.io_binding()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    plain.run_with_iobinding(binding, options)
    ignored = binding.copy_outputs_to_cpu()[0]
    runtime = Runtime(bundle, threads=1)
    base, ours = (runtime.run(inputs, chosen, ["logits"])["logits"] for chosen in (None, "a"))
    assert np.array_equal(ignored, base)
    assert np.abs(ours - base).max() > 0.5


@pytest.mark.parametrize("name", ["a", "b", None])
def test_the_required_graph_gives_the_same_numbers(bundle, inputs, name):
    required = session(str(bundle / "model.required.onnx"))
    manifest = read_manifest(bundle)
    runtime = Runtime(bundle, threads=1)
    slots = {}
    for slot in manifest.slots.slots:
        slots[slot.input_a] = np.zeros((slot.in_features, 1), np.float32)
        slots[slot.input_b] = np.zeros((1, slot.out_features), np.float32)
    if name:
        slots |= {key: value.numpy() for key, value in runtime.load(name).values.items()}
    (got,) = required.run(["logits"], inputs | slots)
    assert np.array_equal(got, runtime.run(inputs, name, ["logits"])["logits"])


def test_genai_adapters_give_pefts_tokens(bundle, tiny_base, adapters):
    import onnxruntime_genai as og

    model = og.Model(str(bundle))
    loaded = og.Adapters(model)
    for name in adapters:
        loaded.load(str(bundle / read_manifest(bundle).adapters[name].file), name)
    prompt, new = tokenizer()(TEXTS[1])["input_ids"], 20
    said = {}
    for name in (None, "a", "b", "a"):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + new, do_sample=False)
        generator = og.Generator(model, parameters)
        if name:
            generator.set_active_adapter(loaded, name)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        said[name] = list(generator.get_sequence(0))[len(prompt) :]
        torch_model = peft_model(tiny_base, adapters[name]) if name else load_model(str(tiny_base))
        ids = torch.tensor([prompt])
        out = torch_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=1,
        )
        assert said[name] == out[0, len(prompt) :].tolist()
    assert len({tuple(tokens) for tokens in said.values()}) == 3
