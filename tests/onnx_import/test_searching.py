"""Graphs that search for a continuation have their decoder inside, and take adapters there."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime
from loraport.runtime.replay import replay_golden

TOKENS = 32
WRITTEN = 6
KINDS = ("BeamSearch", "GreedySearch", "Sampling")
# After each token one other: zeros and sevens, which four bits hold exactly.
BASE = 7 * np.eye(TOKENS)[np.random.default_rng(0).permutation(TOKENS)]
CHANGE = 20 * np.eye(TOKENS)[np.random.default_rng(1).permutation(TOKENS)]


def search(file, kind):
    """Write a search over a decoder whose logits are ``W`` in the row of the last token."""
    int32, number = TensorProto.INT32, TensorProto.FLOAT
    stored = {
        "table": np.eye(TOKENS, dtype=np.float32),
        "head.weight": BASE.astype(np.float32),
        "keys": np.zeros((TOKENS, 2), np.float32),
        "axes": np.array([0, 2]),
    }
    value = helper.make_tensor_value_info
    inner = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("MatMul", ["rows", "head.weight"], ["logits"], name="/head/MatMul"),
            helper.make_node("Gather", ["keys", "input_ids"], ["key"]),
            helper.make_node("Unsqueeze", ["key", "axes"], ["one"]),
            helper.make_node("Concat", ["one", "one"], ["both"], axis=0),
            helper.make_node("Concat", ["past_0", "both"], ["present_0"], axis=3),
        ],
        "decoder",
        [
            *(value(name, int32, ["b", "s"]) for name in ("input_ids", "position_ids")),
            value("attention_mask", int32, ["b", "t"]),
            value("past_0", number, [2, "b", 1, "p", 2]),
        ],
        [
            value("logits", number, ["b", "s", TOKENS]),
            value("present_0", number, [2, "b", 1, "t", 2]),
        ],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    beams = ["num_beams", "num_return_sequences"] if kind == "BeamSearch" else []
    penalties = ["length_penalty"] if beams else []
    counts = [value(name, int32, [1]) for name in ("max_length", "min_length", *beams)]
    rates = [value(name, number, [1]) for name in (*penalties, "repetition_penalty")]
    given = [value("input_ids", int32, ["batch", "sequence"]), *counts, *rates]
    settings = {"eos_token_id": TOKENS, "pad_token_id": TOKENS, "model_type": 0, "decoder": inner}
    if kind == "Sampling":
        settings |= {"top_p": 0.5, "temperature": 1.0}
    names = [entry.name for entry in given]
    node = helper.make_node(kind, names, ["y"], domain="com.microsoft", name="search", **settings)
    made = value("y", int32, ["batch", *(["beams"] if beams else []), "length"])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "search", given, [made])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), file)


def continued(tokens, weight):
    """Write what is most likely, in numpy."""
    rows = tokens.tolist()
    for row in rows:
        for _ in range(WRITTEN):
            row.append(int(weight[row[-1]].argmax()))
    return rows


@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, None) for kind in KINDS), ("BeamSearch", "int4")]
)
def test_an_adapter_changes_what_is_written(kind, precision, tmp_path):
    """In int4 the quantizer lost whose operator it is; golden inputs left nothing to write."""
    search(tmp_path / "m.onnx", kind)
    out = tmp_path / "out"
    import_model(tmp_path / "m.onnx", out, ImportOptions(precision=precision))
    manifest = read_manifest(out)
    assert manifest.precision == (precision or "fp32")
    assert list(manifest.slots.modules()) == ["head"]
    b = torch.from_numpy(CHANGE.T).float().contiguous()
    module = LoraModule(ModuleKind.LINEAR, torch.eye(TOKENS), b, alpha=TOKENS)
    add_adapters(out, {"a": Adapter({"head": module})})
    assert list(read_manifest(out).golden) == ["base", "adapter-a"]
    assert all(result.passed for result in replay_golden(out))
    tokens = np.array([[3, 1, 4], [5, 9, 2]], np.int32)
    runtime = Runtime(out, threads=1)
    length = tokens.shape[1] + WRITTEN
    given = {"input_ids": tokens, "max_length": np.array([length], np.int32)}
    given["min_length"] = np.array([1], np.int32)
    given["repetition_penalty"] = np.ones(1, np.float32)
    if kind == "BeamSearch":
        given |= {name: np.ones(1, np.int32) for name in ("num_beams", "num_return_sequences")}
        given["length_penalty"] = np.ones(1, np.float32)
    base = runtime.run(given)["y"].reshape(2, -1)
    adapted = runtime.run(given, adapter="a")["y"].reshape(2, -1)
    assert base.tolist() == continued(tokens, BASE)
    assert adapted.tolist() == continued(tokens, BASE + CHANGE)
    assert not np.array_equal(base, adapted)


def test_halves_are_refused_by_the_operators_name(tmp_path):
    search(tmp_path / "m.onnx", "GreedySearch")
    with pytest.raises(LoraportError, match="in halves, got GreedySearch, which it has for float"):
        import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions(precision="fp16"))
    assert not (tmp_path / "out").exists()
