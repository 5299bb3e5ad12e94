"""Norms of GenAI's builder, which stores ``w + 1`` where a decoder multiplies by ``1 + w``."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, Replacement
from loraport.bundle.base_values import BaseValues
from loraport.errors import LoraportError
from loraport.runtime import Runtime

WIDTH = 6
FIRST, SECOND = (f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention"))
OPTIONS = ImportOptions(slots=SlotOptions(replace=("input_layernorm", "post_attention_layernorm")))
RANDOM = np.random.default_rng(0)
GAINS = {name: RANDOM.normal(0, 0.4, WIDTH).astype(np.float32) for name in (FIRST, SECOND)}
WEIGHT = RANDOM.standard_normal((WIDTH, WIDTH)).astype(np.float32)
X = RANDOM.standard_normal((3, WIDTH)).astype(np.float32)


def save(directory, kind, plus, producer="onnxruntime-genai", gains=GAINS):
    """A layer's two norms as the builder writes them, the second with its residual sum."""
    node = helper.make_node
    nodes = [
        node("SimplifiedLayerNormalization", ["x", FIRST], ["n"], name="/n", epsilon=1e-6),
        node("MatMul", ["n", "w"], ["h"], name="/model/layers.0/attn/o_proj/MatMul"),
        node(
            "SkipSimplifiedLayerNormalization",
            ["x", "h", SECOND],
            ["y"],
            name="/s",
            domain="com.microsoft",
            epsilon=1e-6,
        ),
    ]
    stored = {"w": WEIGHT, **{name: gain + plus for name, gain in gains.items()}}
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in "xy"]
    constants = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], constants),
        opset_imports=opsets,
        ir_version=10,
        producer_name=producer,
    )
    onnx.save(model, directory / "model.onnx")
    if kind is not None:
        text = json.dumps({"model": {"type": kind}})
        (directory / "genai_config.json").write_text(text)


def expected(gains, plus):
    def norm(rows, name):
        square = np.mean(rows**2, axis=-1, keepdims=True)
        return rows / np.sqrt(square + 1e-6) * (gains[name].astype(np.float64) + plus)

    x = X.astype(np.float64)
    return norm(x + norm(x, FIRST) @ WEIGHT, SECOND)


@pytest.mark.parametrize(
    ("kind", "producer", "plus"),
    [
        ("gemma", "onnxruntime-genai", 1),
        ("gemma3_text", "onnxruntime-genai", 1),
        ("qwen3_5_text", "", 1),
        ("llama", "onnxruntime-genai", 0),
        ("gemma4_text", "onnxruntime-genai", 0),
        (None, "another", 0),
    ],
)
def test_a_trained_norm_is_put_in_as_the_graph_holds_it(kind, producer, plus, tmp_path):
    save(tmp_path, kind, plus, producer)
    import_model(tmp_path / "model.onnx", tmp_path / "out", OPTIONS)
    trained = {name: gain + np.float32(0.3) for name, gain in GAINS.items()}
    new = {name: Replacement(torch.from_numpy(gain)) for name, gain in trained.items()}
    add_adapters(tmp_path / "out", {"a": Adapter({}, new)})
    runtime = Runtime(tmp_path / "out", threads=1)
    base, got = (runtime.run({"x": X}, each)["y"] for each in (None, "a"))
    np.testing.assert_allclose(base, expected(GAINS, plus), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, expected(trained, plus), rtol=1e-5, atol=1e-5)
    assert np.abs(got - expected(trained, 1 - plus)).max() > 0.5  # the control
    for name, gain in GAINS.items():
        own = BaseValues(tmp_path / "out")[f"{name}.lora_saved"]
        np.testing.assert_allclose(own, gain, rtol=0, atol=2e-7)


def test_a_norm_of_a_decoder_that_nothing_names_needs_the_base(tmp_path):
    save(tmp_path, None, 1)
    with pytest.raises(LoraportError, match=r"input_layernorm.*genai_config\.json.*--base"):
        import_model(tmp_path / "model.onnx", tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_one_less_and_one_more_would_change_needs_the_base(tmp_path):
    """``1e-9 - 1 + 1`` is 0 in float32: the base would not be the base bit for bit."""
    sums = {FIRST: GAINS[FIRST] + 1, SECOND: np.full(WIDTH, 1e-9, np.float32)}
    save(tmp_path, "gemma", 0, gains=sums)
    with pytest.raises(LoraportError, match=r"post_attention.*rounded; export.*--base") as error:
        import_model(tmp_path / "model.onnx", tmp_path / "out", OPTIONS)
    assert FIRST not in str(error.value)
