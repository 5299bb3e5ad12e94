"""A weight that layers share through ``Identity`` has one slot in every precision."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, session
from onnxruntime import quantization

from converters.onnx import add_adapters
from converters.onnx.exporters.storing import sites_of
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.modules import graph_names
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, Replacement
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime

SIZE = 64


@pytest.mark.parametrize("precision", [None, "int8", "int4", "fp16"])
def test_layers_that_share_a_weight(tmp_path, precision):
    random = np.random.default_rng(0)
    weight = (random.standard_normal((SIZE, SIZE)) / 8).astype(np.float32)
    nodes = [
        helper.make_node("Identity", ["onnx::MatMul_1"], ["onnx::MatMul_2"]),
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"], name="/layer/up/MatMul"),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "onnx::MatMul_2"], ["y"], name="/layer/up_1/MatMul"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", SIZE]) for n in "xy"]
    stored = [numpy_helper.from_array(weight, "onnx::MatMul_1")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    import_model(tmp_path / "model.onnx", tmp_path / "out", ImportOptions(precision=precision))
    (slot,) = read_manifest(tmp_path / "out").slots.slots
    assert slot.name == "layer.up"
    x = random.standard_normal((3, SIZE)).astype(np.float32)
    dtype = np.float16 if precision == "fp16" else np.float32
    a, b = (random.standard_normal(s).astype(dtype) / 4 for s in ((SIZE, 2), (2, SIZE)))
    merged = weight + a.astype(np.float64) @ b
    expected = np.tanh(x.astype(np.float64) @ merged) @ merged
    running = session(str(tmp_path / "out" / "model.onnx"))
    got = running.run(None, {"x": x, slot.input_a: a, slot.input_b: b})[0]
    apart = {None: 1e-5, "fp16": 5e-3, "int8": 0.03, "int4": 0.2}[precision]
    assert np.linalg.norm(got - expected) < apart * np.linalg.norm(expected)
    base = running.run(None, {"x": x})[0]
    assert np.linalg.norm(base - expected) > 0.5 * np.linalg.norm(expected)


def chain(weights, inputs, nodes):
    """Return ``tanh`` of products one after the other: node name, input of its weight."""
    value, made = "x", []
    for number, (name, weight) in enumerate(nodes):
        last = "y" if number == len(nodes) - 1 else f"t{number}"
        made.append(helper.make_node("MatMul", [value, weight], [f"p{number}"], name=name))
        made.append(helper.make_node("Tanh", [f"p{number}"], [last]))
        value = last
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", SIZE]) for n in "xy"]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    more = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [SIZE, SIZE]) for n in inputs]
    graph = helper.make_graph(made, "g", [ends[0], *more], ends[1:], stored)
    return helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)


@pytest.mark.parametrize(
    ("names", "stored", "calls"),
    [
        # Weights among the inputs are not shared through Identity: each call has a copy.
        (["/seq/seq.0/MatMul", "/seq/seq.0_1/MatMul"], ["onnx::MatMul_1", "onnx::MatMul_2"], 1),
        (["/net/up/MatMul", "/net_1/up/MatMul"], ["onnx::MatMul_1", "onnx::MatMul_2"], 1),
        (["/f/MatMul", "/f_1/MatMul"], ["f.weight", "f.weight"], 1),
        # Two modules with one weight: PEFT adapts the one that it is told to.
        (["/f/MatMul", "/g/MatMul"], ["onnx::MatMul_1", "onnx::MatMul_1"], 2),
        (["/f/MatMul", "/g/MatMul"], ["f.weight", "f.weight"], 2),
        (["/up/MatMul", "/up_1/MatMul"], ["onnx::MatMul_1", "onnx::MatMul_3"], 2),
    ],
)
def test_calls_are_told_from_modules_by_the_paths_of_nodes(tmp_path, names, stored, calls):
    """``onnx::MatMul_3`` is another weight, the others are one."""
    random = np.random.default_rng(0)
    one, other = ((random.standard_normal((SIZE, SIZE)) / 8).astype(np.float32) for _ in range(2))
    weights = {name: other if name.endswith("_3") else one for name in stored}
    inputs = [name for name in weights if name.startswith("onnx")]
    onnx.save(chain(weights, inputs, list(zip(names, stored, strict=True))), tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out")
    slots = read_manifest(tmp_path / "out").slots.slots
    expected_names = [name.removesuffix("/MatMul").strip("/").replace("/", ".") for name in names]
    expected_names = [name.replace("seq.seq", "seq") for name in expected_names]
    assert [slot.name for slot in slots] == expected_names[:calls]
    x = random.standard_normal((3, SIZE)).astype(np.float32)
    a, b = (random.standard_normal(s).astype(np.float32) / 4 for s in ((SIZE, 2), (2, SIZE)))
    running = session(str(tmp_path / "out" / "model.onnx"))
    base = running.run(None, {"x": x})[0]
    for adapted, slot in enumerate(slots):
        expected = x.astype(np.float64)
        for number, name in enumerate(stored):
            whole = weights[name].astype(np.float64)
            if calls == 1 or number == adapted:
                whole = whole + a.astype(np.float64) @ b
            expected = np.tanh(expected @ whole)
        got = running.run(None, {"x": x, slot.input_a: a, slot.input_b: b})[0]
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert np.abs(base - expected).max() > 0.1


def tied_model(stored, table, inner, copied=False):
    """Return an embedding, a layer, and a head that shares the embedding's weight, or a copy."""
    nodes = [
        helper.make_node("Gather", [stored, "tokens"], ["h"], name="/wte/Gather"),
        helper.make_node("MatMul", ["h", "fc.weight"], ["g"], name="/fc/MatMul"),
        helper.make_node("Transpose", [stored], ["turned"], name="/head/Transpose"),
        helper.make_node("MatMul", ["g", "turned"], ["logits"]),
    ]
    arrays = {stored: table, "fc.weight": inner}
    if copied:  # as torch.onnx.export folds the transpose
        nodes = [node for node in nodes if node.op_type != "Transpose"]
        nodes[-1].name = "/lm_head/MatMul"
        arrays["turned"] = np.ascontiguousarray(table.T)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", None])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)


@pytest.mark.parametrize("variants", [("lora",), ("lora", "embedding")])
@pytest.mark.parametrize("stored", ["wte.weight", "lm_head.weight"])
def test_a_head_that_reads_the_embedding_turned_is_the_head(tmp_path, variants, stored):
    """Whether the embedding gets a slot or not, and whichever of both the weight is called by."""
    random = np.random.default_rng(0)
    table, inner = (random.standard_normal(shape).astype(np.float32) for shape in ((11, 8), (8, 8)))
    model = tied_model(stored, table, inner)
    onnx.save(model, tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions(slots=SlotOptions(variants)))
    made = read_manifest(tmp_path / "out")
    embedding = ["wte"] if "embedding" in variants else []
    assert [slot.name for slot in made.slots.slots] == [*embedding, "fc"]
    assert made.unslotted["lm_head"] == "left out, as the output head; export again with --lm-head"
    assert ("wte" in made.unslotted) == (not embedding)
    wanted = ImportOptions(slots=SlotOptions(variants), lm_head=True)
    import_model(tmp_path / "m.onnx", tmp_path / "all", wanted)
    slots = {slot.name: slot for slot in read_manifest(tmp_path / "all").slots.slots}
    assert list(slots) == [*embedding, "fc", "lm_head"]
    tokens = np.array([[1, 4, 10]])
    a, b = (random.standard_normal(s).astype(np.float32) for s in ((8, 2), (2, 11)))
    head = slots["lm_head"]
    running = session(str(tmp_path / "all" / "model.onnx"))
    got = running.run(None, {"tokens": tokens, head.input_a: a, head.input_b: b})[0]
    base = table[tokens] @ inner @ table.T
    np.testing.assert_allclose(got, base + table[tokens] @ inner @ a @ b, atol=1e-3)
    assert np.abs(got - base).max() > 1


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_trained_tokens_act_in_a_head_that_shares_their_weight(tmp_path, precision, copied):
    """The quantizer gives the head a rounding of its own; the base is not known."""
    random = np.random.default_rng(0)
    table, inner = (random.standard_normal(s).astype(np.float32) / 8 for s in ((96, 64), (64, 64)))
    onnx.save(tied_model("wte.weight", table, inner, copied), tmp_path / "m.onnx")
    tokens, rows = (1, 4, 90), torch.from_numpy(random.standard_normal((3, 64)).astype(np.float32))
    trained = {"t": Adapter({}, {"wte.weight": Replacement(rows, rows=tokens)})}
    slots = SlotOptions(("lora", "embedding"))
    import_model(
        tmp_path / "m.onnx", tmp_path / "no", ImportOptions(None, slots, False, {}, precision)
    )
    with pytest.raises(LoraportError, match="lm_head: expected a slot, as it shares the weight"):
        add_adapters(tmp_path / "no", trained)
    out = tmp_path / "out"
    import_model(tmp_path / "m.onnx", out, ImportOptions(None, slots, True, {}, precision))
    assert read_manifest(out).slots.tied == (("wte", "lm_head"),)
    add_adapters(out, trained)
    ids = np.array([[4, 2, 90, 1]])
    whole = table.astype(np.float64)
    whole[list(tokens)] = rows
    running = Runtime(out, threads=1, float32_activations=True)
    got, base = (running.run({"tokens": ids}, name)["logits"] for name in ("t", None))
    idle = table[ids].astype(np.float64) @ inner @ table.T
    # What int8 and int4 round is small; the rows that were trained are far from the base's.
    apart = {None: 1e-6, "int8": 0.02, "int4": 0.2}[precision]
    assert np.linalg.norm(base - idle) < apart * np.linalg.norm(idle)
    for columns in (list(tokens), slice(None)):
        expected = (whole[ids] @ inner @ whole.T)[..., columns]
        off = np.linalg.norm(got[..., columns] - expected) / np.linalg.norm(expected)
        assert off < apart
    untied = (whole[ids] @ inner @ table.T)[
        ..., list(tokens)
    ]  # the control: in the embedding alone
    expected = (whole[ids] @ inner @ whole.T)[..., list(tokens)]
    assert np.linalg.norm(untied - expected) > 0.5 * np.linalg.norm(expected)


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_what_is_called_like_the_head_is_replaced_in_the_head_alone(tmp_path, precision):
    """``torch.onnx.export`` calls the embedding's copy of a shared weight ``lm_head.weight``."""
    random = np.random.default_rng(0)
    table, inner = (random.standard_normal(s).astype(np.float32) / 8 for s in ((96, 64), (64, 64)))
    onnx.save(tied_model("lm_head.weight", table, inner, copied=True), tmp_path / "m.onnx")
    new = random.standard_normal(table.shape).astype(np.float32) / 8
    ids = np.array([[4, 2, 90, 1]])

    def replaced(name):
        slots = SlotOptions(replace=(name,))
        out = tmp_path / name
        import_model(tmp_path / "m.onnx", out, ImportOptions(slots=slots, precision=precision))
        whole = Replacement(torch.from_numpy(new))
        add_adapters(out, {"new": Adapter({}, {f"{name}.weight": whole})})
        running = Runtime(out, threads=1, float32_activations=True)
        got, base = (running.run({"tokens": ids}, each)["logits"] for each in ("new", None))
        assert np.linalg.norm(got - base) > np.linalg.norm(base)  # the control
        return got

    apart = {None: 1e-6, "int8": 0.02, "int4": 0.2}[precision]
    expected = new[ids].astype(np.float64) @ inner @ table.T
    assert np.linalg.norm(replaced("wte") - expected) < apart * np.linalg.norm(expected)
    if precision is not None:  # the head's own copy is rounded
        with pytest.raises(LoraportError, match=r"lm_head.*hold it as it is.*; merge"):
            replaced("lm_head")
        return
    expected = table[ids].astype(np.float64) @ inner @ new.T
    assert np.linalg.norm(replaced("lm_head") - expected) < apart * np.linalg.norm(expected)


def test_equal_parameters_that_torchscript_copies_are_replaced_apart(tmp_path):
    """A fresh batch norm: its weight and variance are ones, its bias and mean zeros."""
    random = np.random.default_rng(0)
    weight = (random.standard_normal((SIZE, SIZE)) / 8).astype(np.float32)
    names = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    nodes = [
        helper.make_node("Identity", ["norm.weight"], ["norm.running_var"]),
        helper.make_node("Identity", ["norm.bias"], ["norm.running_mean"]),
        helper.make_node("Gemm", ["x", "up.weight"], ["a"], name="/up/Gemm", transB=1),
        helper.make_node(
            "BatchNormalization", ["a", *names], ["y"], name="/norm/Norm", epsilon=0.1
        ),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", SIZE]) for n in "xy"]
    fresh = {"norm.weight": np.ones(SIZE, np.float32), "norm.bias": np.zeros(SIZE, np.float32)}
    stored = {"up.weight": weight, **fresh}
    arrays = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], arrays)
    onnx.save(
        helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10), tmp_path / "m.onnx"
    )
    options = ImportOptions(slots=SlotOptions(replace=("norm",)))
    import_model(tmp_path / "m.onnx", tmp_path / "out", options)
    places = {
        place.parameter: place for place in read_manifest(tmp_path / "out").slots.replacements
    }
    assert sorted(places) == sorted(names)
    running = session(str(tmp_path / "out" / "model.onnx"))
    x = random.standard_normal((3, SIZE)).astype(np.float32)
    product = x.astype(np.float64) @ weight.T
    values = dict(zip(names, (1.0, 0.0, 0.0, 1.0), strict=True))
    for changed in (None, *names):  # each alone: the one beside it keeps its own
        fed, now = {"x": x}, dict(values)
        if changed is not None:
            now[changed] = random.uniform(0.5, 1.5, SIZE).astype(np.float32)
            fed[places[changed].input] = now[changed]
        scale, bias, mean, variance = now.values()
        expected = (product - mean) / np.sqrt(variance + 0.1) * scale + bias
        got = running.run(None, fed)[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        base = product / np.sqrt(1.1)
        assert (np.abs(expected - base).max() > 0.1) == (changed is not None)


def test_a_weight_is_compared_with_embeddings_of_its_shape_alone(monkeypatch):
    """With every other operator it took minutes where there are thousands."""
    random = np.random.default_rng(0)
    head, other = (random.standard_normal((7, SIZE)).astype(np.float32) for _ in range(2))
    weights = {f"w{i}": random.standard_normal((SIZE, SIZE)).astype(np.float32) for i in range(6)}
    names = [*weights, "head"]
    chained = chain(weights | {"head": head.T.copy()}, [], [(n, n) for n in names])
    tables = {"table": head, "small": other[:5]}
    for name, table in tables.items():
        chained.graph.initializer.append(numpy_helper.from_array(table, name))
        chained.graph.node.append(helper.make_node("Gather", [name, "ids"], [f"{name}_rows"]))
    chained.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"]))
    compared = []

    def count(table, site):
        compared.append((table.in_features, site.out_features))
        return is_table_of(table, site)

    is_table_of = graph_names._is_table_of
    monkeypatch.setattr(graph_names, "_is_table_of", count)
    named = graph_names.name_sites(sites_of(ir.from_proto(chained)))
    tied = graph_names.tied_sites(named)
    assert [set(group) for group in tied] == [{"table", "head"}]
    assert compared == [(7, 7)]


def test_what_is_called_like_a_head_of_integers_is_not_replaced_for_it(tmp_path):
    """``QLinearMatMul`` holds the head's own rounded copy. Control: the layer is replaced."""
    random = np.random.default_rng(0)
    table, inner = (random.standard_normal(s).astype(np.float32) / 8 for s in ((96, 64), (64, 64)))
    onnx.save(tied_model("lm_head.weight", table, inner, copied=True), tmp_path / "m.onnx")

    class Calibration(quantization.CalibrationDataReader):
        batches = iter([{"tokens": np.arange(96)[None]}])

        def get_next(self):
            return next(self.batches, None)

    quantization.quantize_static(
        tmp_path / "m.onnx",
        tmp_path / "q.onnx",
        Calibration(),
        quant_format=quantization.QuantFormat.QOperator,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_exclude=["/wte/Gather", "/fc/MatMul"],
    )

    def replaceable(name):
        slots = SlotOptions(replace=(name,))
        import_model(tmp_path / "q.onnx", tmp_path / name, ImportOptions(slots=slots))
        return [each.parameter for each in read_manifest(tmp_path / name).slots.replacements]

    assert replaceable("fc") == ["fc.weight"]
    with pytest.raises(LoraportError, match=r"lm_head.*hold it as it is.*; merge"):
        replaceable("lm_head")
