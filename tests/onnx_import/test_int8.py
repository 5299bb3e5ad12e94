"""ONNX Runtime's own 8-bit models take adapters in floating point."""

import logging

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from onnx_graphs import only_node, run, single_node

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from converters.onnx.importing import import_model
from converters.onnx.operators import find_site
from loraport.bundle.manifest import read_manifest
from loraport.runtime import Runtime

IN, OUT = 7, 5


def arrays():
    ids = np.random.default_rng(1).integers(1, 61, (3, 5))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def int8_onnx(bert_onnx, tmp_path_factory):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = tmp_path_factory.mktemp("int8") / "int8.onnx"
    logging.disable(logging.WARNING)
    quantize_dynamic(bert_onnx, out, weight_type=QuantType.QInt8, per_channel=False)
    logging.disable(logging.NOTSET)
    return out


def test_an_adapter_moves_the_outputs_as_in_floating_point(
    bert_onnx, int8_onnx, made_bert, tmp_path
):
    adapter = read_adapter(made_bert.path)
    moved = {}
    for name, file in (("float", bert_onnx), ("int8", int8_onnx)):
        import_model(file, tmp_path / name)
        add_adapters(tmp_path / name, {"a": adapter})
        runtime = Runtime(tmp_path / name)
        moved[name] = runtime.run(arrays(), "a")["logits"] - runtime.run(arrays())["logits"]
    assert set(read_manifest(tmp_path / "int8").slots.modules()) == set(
        read_manifest(tmp_path / "float").slots.modules()
    )
    assert read_manifest(tmp_path / "int8").precision == "int8"
    assert read_manifest(tmp_path / "int8").fingerprint.modules == {}
    size = np.linalg.norm(moved["float"])
    # Weights and activations are rounded to 8 bits in every layer, the adapter is not.
    assert np.linalg.norm(moved["int8"] - moved["float"]) < 0.25 * size
    assert size > 0.05


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dynamic_quantize_matmul(per_column, with_bias):
    random = np.random.default_rng(0)
    scale = random.uniform(0.01, 0.05, OUT if per_column else 1).astype(np.float32)
    constants = {
        "s": scale,
        "w": random.integers(0, 256, (IN, OUT), np.uint8),
        "z": np.full(scale.shape, 128, np.uint8),
    }
    inputs = ["x", "w", "s", "z"]
    if with_bias:
        constants["c"] = random.standard_normal(OUT).astype(np.float32)
        inputs.append("c")
    node = helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain="com.microsoft")
    model = single_node(node, constants, IN)
    site = find_site(only_node(model))
    assert (site.in_features, site.out_features, site.quantized) == (IN, OUT, True)
    assert site.bias_input == (4 if with_bias else None)
    x = random.standard_normal((3, IN)).astype(np.float32)
    weight = site.weight().astype(np.float64)
    got = x @ weight + (constants["c"] if with_bias else 0)
    # The activation is rounded to 8 bits: half a step of its range in each of 7 products.
    step = (x.max() - min(x.min(), 0)) / 255
    bound = step * np.abs(weight).sum(0).max()
    np.testing.assert_allclose(run(model, x=x), got, atol=bound)
    control = x @ np.roll(weight, 1, axis=0) + (constants["c"] if with_bias else 0)
    assert np.abs(control - run(model, x=x)).max() > 2 * bound


@pytest.mark.parametrize("operator", ["Transpose", "Identity", "Cast", "DequantizeLinear"])
def test_a_weight_is_seen_through_what_rearranges_it(operator):
    stored = np.arange(OUT * IN, dtype=np.float32).reshape(OUT, IN) - 9
    value = ir.Value(name="w", const_value=ir.tensor(stored))
    expected = stored.T
    if operator == "DequantizeLinear":
        value.const_value = ir.tensor(stored.T.astype(np.int8))
        scale = ir.Value(name="s", const_value=ir.tensor(np.array(0.5, np.float32)))
        before = ir.node(operator, [value, scale])
        expected = expected * 0.5
    elif operator == "Transpose":
        before = ir.node(operator, [value], {"perm": [1, 0]})
    else:
        value.const_value = ir.tensor(np.ascontiguousarray(stored.T))
        to = {"to": int(ir.DataType.FLOAT)} if operator == "Cast" else {}
        before = ir.node(operator, [value], to)
    site = find_site(ir.node("MatMul", [ir.Value(name="x"), before.outputs[0]]))
    assert (site.in_features, site.out_features) == (IN, OUT)
    assert site.quantized == (operator == "DequantizeLinear")
    assert np.array_equal(site.weight(), expected)
