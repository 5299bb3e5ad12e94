"""ONNX Runtime's quantizers, static and dynamic, over plain and fused graphs: all take adapters."""

import collections
import logging
import warnings

import numpy as np
import onnx
import pytest

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from converters.onnx.importing import import_model
from loraport.bundle.manifest import read_manifest
from loraport.runtime import Runtime
from loraport.runtime.replay import replay_golden

KINDS = ("qdq", "qdq pairs", "qoperator", "fused dynamic")
OPERATORS = {
    "qdq": "DequantizeLinear",
    "qdq pairs": "QuantizeLinear",
    "qoperator": "QLinearMatMul",
    "fused dynamic": "QAttention",
}


def arrays(seed=1):
    ids = np.random.default_rng(seed).integers(1, 61, (3, 5))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


class Calibration:
    """Ten batches of tokens."""

    def __init__(self):
        self.left = iter([arrays(seed) for seed in range(10)])

    def get_next(self):
        return next(self.left, None)

    def __iter__(self):
        return self.left


def quantize(kind, source, out):
    from onnxruntime import quantization as q
    from onnxruntime.transformers.optimizer import optimize_model

    if kind.startswith("fused"):
        optimized = optimize_model(str(source), "bert", num_heads=4, hidden_size=32, opt_level=0)
        source = out.with_name("fused.onnx")
        optimized.save_model_to_file(str(source))
    # Shapes are not known behind ONNX Runtime's own operators.
    extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    if kind.endswith("dynamic"):
        q.quantize_dynamic(source, out, weight_type=q.QuantType.QInt8, extra_options=extra)
        return
    extra["AddQDQPairToWeight"] = kind.endswith("pairs")  # the weights stay floats, and are rounded
    form = q.QuantFormat.QOperator if kind == "qoperator" else q.QuantFormat.QDQ
    q.quantize_static(
        str(source),
        str(out),
        Calibration(),
        quant_format=form,
        weight_type=q.QuantType.QInt8,
        per_channel=kind != "qoperator",
        extra_options=extra,
    )


@pytest.fixture(scope="module")
def quantized(bert_onnx, tmp_path_factory):
    out = tmp_path_factory.mktemp("static")
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in KINDS:
            (out / kind).mkdir()
            quantize(kind, bert_onnx, out / kind / "model.onnx")
    logging.disable(logging.NOTSET)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_module_has_a_slot_and_the_base_is_what_it_was(quantized, kind, tmp_path):
    from onnx_graphs import session

    file = quantized / kind / "model.onnx"
    operators = collections.Counter(node.op_type for node in onnx.load(file).graph.node)
    assert operators[OPERATORS[kind]] >= 2
    import_model(file, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    # 2 layers of query, key, value (one slot where they are fused) and 3 more; pooler, head.
    count = 2 * (4 if "fused" in kind else 6) + 2
    assert len(manifest.slots.slots) == count
    assert manifest.precision == "int8"
    assert manifest.fingerprint.modules == {}
    before = session(str(file)).run(None, arrays())[0]
    got = Runtime(tmp_path / "out").run(arrays())["logits"]
    np.testing.assert_allclose(got, before, atol=2e-6)
    assert all(result.passed for result in replay_golden(tmp_path / "out"))
    for name in ("model.onnx", "model.required.onnx"):
        onnx.checker.check_model(str(tmp_path / "out" / name), full_check=True)


@pytest.mark.parametrize("kind", ["qdq", "qdq pairs", "qoperator"])
def test_an_adapter_moves_the_outputs_as_in_floating_point(
    quantized, bert_onnx, made_bert, kind, tmp_path
):
    adapter = read_adapter(made_bert.path)
    moved = {}
    for name, file in (("float", bert_onnx), ("int8", quantized / kind / "model.onnx")):
        import_model(file, tmp_path / name)
        add_adapters(tmp_path / name, {"a": adapter})
        runtime = Runtime(tmp_path / name)
        moved[name] = runtime.run(arrays(), "a")["logits"] - runtime.run(arrays())["logits"]
    size = np.linalg.norm(moved["float"])
    # Weights and activations are rounded to 8 bits in every layer, the adapter is not.
    assert np.linalg.norm(moved["int8"] - moved["float"]) < 0.25 * size
    assert size > 0.05
