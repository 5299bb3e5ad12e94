"""``verify`` tells a static graph's own calibrated ranges from a slot that is wrong."""

import json
import logging
import warnings

import numpy as np
import onnx
import pytest
import torch
from command_line import command
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, session
from safetensors.torch import load_file, save_file

from converters.onnx.modules.graph_weights import load_graph_weights
from converters.onnx.packing.adding import write_onnx_adapter
from loraport.bundle.manifest import read_manifest, write_manifest
from loraport.parity.calibration import without_calibrated_ranges

OWN = "parity fails by the graph's own calibrated quantization alone"
PARITY = "adapter a: onnxruntime = torch"


class Calibration:
    """One batch: the ranges hold the base on it, and no adapter."""

    def __init__(self):
        ids = np.random.default_rng(0).integers(1, 61, (2, 7))
        self.left = iter([{"input_ids": ids, "attention_mask": np.ones_like(ids)}])

    def get_next(self):
        return next(self.left, None)


@pytest.fixture(scope="module")
def calibrated(made_bert, bert_onnx, tmp_path_factory):
    """The base on disk, its static int8 graphs, and an adapter that changes it a lot."""
    from onnxruntime import quantization as q

    out = tmp_path_factory.mktemp("calibrated")
    made_bert.fresh_base().save_pretrained(out / "base")
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in (q.QuantFormat.QDQ, q.QuantFormat.QOperator):
            q.quantize_static(
                str(bert_onnx),
                str(out / f"{form}.onnx"),
                Calibration(),
                quant_format=form,
                weight_type=q.QuantType.QInt8,
            )
    logging.disable(logging.NOTSET)
    (out / "strong").mkdir()
    for file in made_bert.path.iterdir():
        (out / "strong" / file.name).write_bytes(file.read_bytes())
    weights = out / "strong" / "adapter_model.safetensors"
    tensors = load_file(weights)
    stronger = {key: 4 * value if "lora_B" in key else value for key, value in tensors.items()}
    save_file(stronger, weights)
    return out


def exported(calibrated, form, out):
    graph, base, adapter = (calibrated / name for name in (f"{form}.onnx", "base", "strong"))
    code, said = command("export", graph, "-o", out, "--base", base, "--adapter", f"a={adapter}")
    assert code == 0, said
    return out


def verified(bundle):
    """Return the exit message, and the checks that failed by name."""
    code, said = command("verify", bundle, "--json")
    report, end = json.JSONDecoder().raw_decode(said, said.index("{"))
    failed = {check["name"]: check for check in report["checks"] if not check["passed"]}
    assert code == (1 if failed else 0)
    return said[end:], failed


def test_what_calibrated_ranges_cut_off_is_said_to_be_that(calibrated, tmp_path):
    bundle = exported(calibrated, "QDQ", tmp_path / "out")
    message, failed = verified(bundle)
    assert OWN in message
    assert PARITY in failed
    assert all(check["calibrated"] for check in failed.values())
    assert "the graph's calibrated ranges are the cause: without them" in failed[PARITY]["detail"]


def test_a_slot_that_is_wrong_is_not_laid_on_calibrated_ranges(calibrated, tmp_path):
    bundle = exported(calibrated, "QDQ", tmp_path / "out")
    manifest = read_manifest(bundle)
    entry = manifest.adapters["a"]
    tensors = load_file(bundle / entry.tensors)
    tensors = {key: 2 * value if "lora_B" in key else value for key, value in tensors.items()}
    save_file(tensors, bundle / entry.tensors)
    write_onnx_adapter(tensors, bundle / entry.file)
    write_manifest(manifest.with_files(bundle, list(manifest.files)), bundle)
    message, failed = verified(bundle)
    assert "parity fails" in message
    assert OWN not in message
    assert not failed["adapter a: packed = source"]["calibrated"]
    assert not failed[PARITY]["calibrated"]
    assert "the graph's calibrated ranges are not the only cause" in failed[PARITY]["detail"]


def test_operators_on_integers_are_named(calibrated, tmp_path):
    message, failed = verified(exported(calibrated, "QOperator", tmp_path / "out"))
    assert OWN not in message
    assert "calibrated ranges may be the cause: QGemm, QLinear" in failed[PARITY]["detail"]


def quantized_product(weight, zero, out):
    """Save ``x W`` with all three quantized, the product by a zero point of its own; if any."""
    constants = {"W": weight, "scale": np.float32(0.05), "zero": np.int8(0)}
    constants |= {} if zero is None else {"own": zero}
    triples = [("x", "x_dq", "zero"), ("W", "W_dq", "zero"), ("xW", "y", "own")]
    nodes = [
        helper.make_node(operator, [value, "scale", *({point} & constants.keys())], [made])
        for source, name, point in triples
        for operator, value, made in (
            ("QuantizeLinear", source, f"{name}_q"),
            ("DequantizeLinear", f"{name}_q", name),
        )
    ]
    nodes.insert(4, helper.make_node("MatMul", ["x_dq", "W_dq"], ["xW"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("x", 7), ("y", 5))
    ]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)
    onnx.save(model, out)


# A range from zero on is all that is left of a Relu which the quantizer took out.
@pytest.mark.parametrize(
    ("zero", "cut"),
    [(np.int8(0), False), (np.int8(-128), True), (np.uint8(0), True), (None, True)],
)
def test_activations_stay_what_they_are_and_weights_rounded(tmp_path, zero, cut):
    random = np.random.default_rng(0)
    weight = random.standard_normal((7, 5)).astype(np.float32)
    quantized_product(weight, zero, tmp_path / "model.onnx")
    x = 9 * random.standard_normal((4, 7)).astype(np.float32)
    rounded = 0.05 * np.rint(weight.astype(np.float64) / 0.05)
    free = without_calibrated_ranges(tmp_path / "model.onnx")
    got = session(free).run(None, {"x": x})[0]
    expected = np.maximum(x @ rounded, 0) if cut else x @ rounded
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert bool(np.abs(got - x @ rounded).max() > 1) is cut
    assert np.abs(x @ rounded - x @ weight).max() > 0.1
    ranged = session(str(tmp_path / "model.onnx")).run(None, {"x": x})[0]
    assert np.abs(ranged).max() < (13 if cut else 6.5) < np.abs(expected).max()


@pytest.mark.parametrize(("zero", "left"), [(np.int8(0), "Identity"), (np.int8(-128), "Relu")])
def test_zero_points_are_read_from_data_that_has_two_names(tmp_path, zero, left):
    """As a bundle's data file has, which it shares with the model that it was made from."""
    quantized_product(np.ones((7, 5), np.float32), zero, tmp_path / "plain.onnx")
    plain = onnx.load(tmp_path / "plain.onnx")
    where = {"save_as_external_data": True, "location": "data", "size_threshold": 0}
    onnx.save(plain, tmp_path / "model.onnx", **where)
    (tmp_path / "again").hardlink_to(tmp_path / "data")
    free = onnx.load_from_string(without_calibrated_ranges(tmp_path / "model.onnx"))
    assert [node.op_type for node in free.graph.node if node.output[0] == "y"] == [left]


def test_the_reference_has_the_rounded_embeddings_too(calibrated, made_bert, tmp_path):
    bundle = exported(calibrated, "QDQ", tmp_path / "out")
    model = made_bert.fresh_base().eval()
    own = model.get_input_embeddings().weight.detach().clone()
    replaced = load_graph_weights(bundle / "model.onnx", model)
    assert "bert.embeddings.word_embeddings" in replaced
    assert 0 < (model.get_input_embeddings().weight - own).abs().max() < 0.02
    inputs = next(Calibration().left)
    running = session(without_calibrated_ranges(calibrated / "QDQ.onnx"))
    with torch.no_grad():
        arguments = {name: torch.from_numpy(array) for name, array in inputs.items()}
        expected = model(**arguments).logits.numpy()
        exact = made_bert.fresh_base().eval()(**arguments).logits.numpy()
    got = running.run(None, inputs)[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(got - exact).max() > 5e-3
