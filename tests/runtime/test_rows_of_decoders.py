"""Decoders with an adapter of its own in every row, prefill and a step after it, against PEFT."""

import numpy as np
import pytest
import torch
from peft_cases import load_with_peft
from tiny_llm import TEXTS, tokenizer

from converters.formats.registry import read_adapter
from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.modules.graph_weights import load_graph_weights
from converters.onnx.slots.inserting import SlotOptions
from loraport.base.loading import load_model
from loraport.runtime import Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder

PICKED = ["b", None, "a", "b"]


def of_peft(base, adapters, bundle, precision, prompts):
    """Return PEFT's logits [prompts, s, vocabulary] with each adapter, and the base's."""
    model = load_model(str(base))
    if precision == "int4":
        load_graph_weights(bundle / "model.onnx", model)
    first, *others = adapters
    model = load_with_peft(model, adapters[first])
    for name in others:
        model.load_adapter(str(adapters[name]), name)
    model.eval()
    found, ids = {}, torch.tensor(prompts)
    with torch.no_grad():
        for name in adapters:
            model.set_adapter("default" if name == first else name)
            found[name] = model(input_ids=ids).logits.numpy()
        with model.disable_adapter():
            found[None] = model(input_ids=ids).logits.numpy()
    return found


def check_rows(base, adapters, out, precision, prompts, bound, effect):
    """Compare prompts of one length, each row with the adapter picked for it.

    The bundle ``out`` has the adapters, and slots for each row.
    """
    runtime = Runtime(out, check=False, float32_activations=True)
    decoder = read_decoder(out)
    each = [first_step_inputs(runtime, decoder, prompt[:-1]) for prompt in prompts]
    inputs = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    rows = runtime.rows(list(adapters))
    first = rows.run(inputs, PICKED)
    length = len(prompts[0])
    step = {
        "input_ids": np.array([prompt[-1:] for prompt in prompts], np.int64),
        "attention_mask": np.ones((len(prompts), length), np.int64),
        "position_ids": np.full((len(prompts), 1), length - 1, np.int64),
    }
    for layer in range(decoder.layers):
        for past, present in zip(decoder.past, decoder.present, strict=True):
            step[past % layer] = first[present % layer]
    after = rows.run({name: step[name] for name in inputs}, PICKED, ["logits"])["logits"]
    got = np.concatenate([first["logits"], after], axis=1)
    expected = of_peft(base, adapters, out, precision, prompts)
    for number, name in enumerate(PICKED):
        np.testing.assert_allclose(got[number], expected[name][number], rtol=0, atol=bound)
        other = "a" if name != "a" else "b"
        assert np.abs(got[number] - expected[other][number]).max() > effect


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_rows_of_a_tiny_llama(precision, tiny_base, adapters, tmp_path):
    encoded = [tokenizer()(text)["input_ids"] for text in TEXTS[: len(PICKED)]]
    length = min(len(ids) for ids in encoded)
    prompts = [ids[:length] for ids in encoded]
    out = tmp_path / "bundle"
    options = ExportOptions(precision=precision, slots=SlotOptions(per_row=True))
    export_base(str(tiny_base), out, options)
    add_adapters(out, {name: read_adapter(path) for name, path in adapters.items()})
    check_rows(tiny_base, adapters, out, precision, prompts, 2e-4, 0.05)


@pytest.mark.real
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_rows_of_the_real_smollm2(precision, real_directory):
    from loraport.base.finding import SMOLLM2, resolve_base

    adapters = {name: real_directory / name for name in ("a", "b")}
    prompts = np.random.default_rng(0).integers(100, 40_000, (len(PICKED), 9)).tolist()
    out = real_directory / f"{precision}-rows"
    check_rows(resolve_base(SMOLLM2), adapters, out, precision, prompts, 1e-3, 1)
