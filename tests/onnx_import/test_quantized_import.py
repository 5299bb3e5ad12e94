"""``--precision`` stores the weights of somebody's graph anew; adapters stay in floating point."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from command_line import command
from peft_cases import load_with_peft

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, importing
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots.inserting import SlotOptions
from loraport.bundle.manifest import check_files, read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime
from loraport.runtime.replay import replay_golden

OPERATORS = {"int8": "MatMulInteger", "int4": "MatMulNBits", "fp16": "Cast"}
# Rounding of weights and activations, against PyTorch in float32.
BOUNDS = {"int8": 0.1, "int4": 0.35, "fp16": 0.01}


def arrays():
    ids = np.random.default_rng(1).integers(1, 61, (3, 5))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.mark.parametrize("precision", OPERATORS)
def test_adapters_move_the_outputs(bert_onnx, made_bert, precision, tmp_path):
    import_model(bert_onnx, tmp_path / "out", ImportOptions(precision=precision))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.precision == precision
    linear = {n for n, m in made_bert.base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(manifest.slots.modules()) == linear
    # The base is known by the weights that the graph had.
    assert set(manifest.fingerprint.modules) == linear
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert OPERATORS[precision] in operators
    add_adapters(tmp_path / "out", {"a": read_adapter(made_bert.path)})
    check_files(read_manifest(tmp_path / "out"), tmp_path / "out")
    assert all(result.passed for result in replay_golden(tmp_path / "out"))
    runtime = Runtime(tmp_path / "out", threads=1)
    base, adapted = (runtime.run(arrays(), name)["logits"] for name in (None, "a"))
    tensors = {name: torch.from_numpy(array) for name, array in arrays().items()}
    with torch.no_grad():
        wanted = made_bert.fresh_base().eval()(**tensors).logits.numpy()
        moved = load_with_peft(made_bert.fresh_base(), made_bert.path)(**tensors).logits.numpy()
    size = np.linalg.norm(moved - wanted)
    assert np.linalg.norm((adapted - base) - (moved - wanted)) < BOUNDS[precision] * size
    assert size > 0.05
    for name in ("model.onnx", "model.required.onnx"):
        onnx.checker.check_model(str(tmp_path / "out" / name), full_check=True)


def test_the_same_bytes_twice_and_the_source_untouched(bert_onnx, tmp_path):
    before = bert_onnx.read_bytes()
    for name in ("one", "two"):
        import_model(bert_onnx, tmp_path / name, ImportOptions(precision="int8"))
    for name in ("model.onnx", "model.required.onnx", "model.onnx.data"):
        one, two = ((tmp_path / each / name).read_bytes() for each in ("one", "two"))
        assert one == two
    assert bert_onnx.read_bytes() == before


def test_bf16_is_refused_before_anything_is_written(bert_onnx, tmp_path):
    with pytest.raises(LoraportError, match="no bfloat16"):
        import_model(bert_onnx, tmp_path / "out", ImportOptions(precision="bf16"))
    code, said = command("export", bert_onnx, "-o", tmp_path / "out", "--precision", "bf16")
    assert code == 2
    assert "no bfloat16" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
@pytest.mark.parametrize("precision", [None, *OPERATORS])
def test_weights_without_names_have_one_name_in_every_precision(operator, precision, tmp_path):
    """So that an adapter of another base is refused there, too."""
    numbers = np.random.default_rng(0)
    make = onnx.helper
    values = {f"onnx::{operator}_{n}": numbers.standard_normal((64, 64)) for n in (7, 8)}
    stored = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items()]
    inner = [("x", "t"), ("t", "y")]
    nodes = [make.make_node(operator, [x, w], [y]) for (x, y), w in zip(inner, values, strict=True)]
    ends = [make.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["rows", 64]) for n in "xy"]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opsets = [make.make_opsetid("", 18)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions(precision=precision))
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.slots.modules()) == ["linear_0", "linear_1"]
    assert list(manifest.fingerprint.modules) == ["linear_0", "linear_1"]


class Branch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 32), torch.nn.Linear(32, 48, bias=False)
        self.alike = torch.nn.Linear(32, 48, bias=False)
        self.alike.weight = self.second.weight

    def forward(self, x):
        x = self.first(x).relu()
        return self.second(x) * self.alike(-x)


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
@pytest.mark.parametrize("precision", [None, *OPERATORS])
def test_names_that_the_exporter_recorded_are_there_in_every_precision(precision, tmp_path):
    """Quantizers write operators of their own, which say nothing of where they come from."""
    torch.manual_seed(0)
    file = tmp_path / "m.onnx"
    shapes = {"x": {0: torch.export.Dim("rows")}}
    torch.onnx.export(
        Branch().eval(), (torch.randn(3, 64),), file, dynamo=True, dynamic_shapes=shapes
    )
    proto = onnx.load(file)
    names = {"first.weight": "val_5", "second.weight": "val_9", "first.bias": "val_11"}
    for tensor in proto.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    onnx.save(proto, file)
    import_model(file, tmp_path / "out", ImportOptions(precision=precision))
    names = ["first", "second", "alike"]
    assert list(read_manifest(tmp_path / "out").slots.modules()) == names
    # Both products with the shared weight are what they were, but for the rounding.
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(file).run(None, {"x": x})
    (got,) = Runtime(tmp_path / "out").run({"x": x}).values()
    allowed = {None: 1e-6, **BOUNDS}[precision]
    assert np.linalg.norm(got - expected) < allowed * np.linalg.norm(expected)
    assert np.linalg.norm(got[::-1] - expected) > np.linalg.norm(expected) / 2


def save_products(file, weights, tokens=False):
    """Write ``x W V ...``; with tokens, ``x`` are rows of the first, which is the last's turned."""
    make, kinds = onnx.helper, onnx.TensorProto
    stored = [onnx.numpy_helper.from_array(w, name) for name, w in weights.items()]
    nodes, last, first = [], "x", next(iter(weights))
    given = make.make_tensor_value_info("x", kinds.INT64 if tokens else kinds.FLOAT, ["n", 32])
    if tokens:
        nodes.append(make.make_node("Gather", [first, "x"], ["h"], name="embed/Gather"))
        nodes.append(make.make_node("Transpose", [first], ["turned"], perm=[1, 0]))
        nodes.append(make.make_node("MatMul", ["h", "turned"], ["y"], name="head"))
    else:
        for number, name in enumerate(weights):
            to = "y" if number == len(weights) - 1 else f"h{number}"
            nodes.append(make.make_node("MatMul", [last, name], [to], name=f"at{number}"))
            last = to
    made = make.make_tensor_value_info("y", kinds.FLOAT, None)
    graph = make.make_graph(nodes, "g", [given], [made], stored)
    opsets = [make.make_opsetid("", 18)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), file)


def modules_in(file, out, precision, *variants):
    options = ImportOptions(None, SlotOptions(variants), lm_head=True, precision=precision)
    import_model(file, out, options)
    return list(read_manifest(out).slots.modules())


@pytest.mark.parametrize("precision", OPERATORS)
def test_an_output_head_is_called_so_in_every_precision(precision, tmp_path):
    """Its weight is the embedding's, until a quantizer stores it for itself."""
    table = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    save_products(tmp_path / "m.onnx", {"words.weight": table}, tokens=True)
    file, variants = tmp_path / "m.onnx", ("lora", "embedding")
    expected = modules_in(file, tmp_path / "one", None, *variants)
    assert expected == ["words", "lm_head"]
    assert modules_in(file, tmp_path / "two", precision, *variants) == expected


@pytest.mark.parametrize("precision", OPERATORS)
def test_weights_that_would_come_to_one_name_keep_theirs(precision, tmp_path):
    numbers = np.random.default_rng(0).standard_normal((2, 32, 32)).astype(np.float32)
    save_products(tmp_path / "m.onnx", dict(zip(["w", "w_transposed"], numbers, strict=True)))
    expected = modules_in(tmp_path / "m.onnx", tmp_path / "one", None, "lora")
    assert expected == ["w.at0", "w.at1"]
    assert modules_in(tmp_path / "m.onnx", tmp_path / "two", precision, "lora") == expected


def test_fp16_is_in_order_where_an_input_is_read_late(tmp_path):
    """The quantizer puts an input's cast behind what reads it."""
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    stored = [onnx.numpy_helper.from_array(w, n) for w, n in zip(weights, "vw", strict=True)]
    nodes = [
        make.make_node("MatMul", ["x", "v"], ["t"], name="one"),
        make.make_node("Add", ["t", "late"], ["u"], name="sum"),
        make.make_node("MatMul", ["u", "w"], ["y"], name="two"),
        make.make_node("Sub", ["y", "late"], ["z"], name="rest"),
    ]
    given = [make.make_tensor_value_info(n, kind, ["rows", 8]) for n in ("x", "late", "z")]
    graph = make.make_graph(nodes, "g", given[:2], given[2:], stored)
    opsets = [make.make_opsetid("", 18)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions(precision="fp16"))
    for name in ("model.onnx", "model.required.onnx"):
        onnx.checker.check_model(str(tmp_path / "out" / name), full_check=True)


@pytest.mark.parametrize("name", ["stack", ""])
@pytest.mark.parametrize("precision", OPERATORS)
def test_stacks_of_matrices_run_in_every_precision(precision, name, tmp_path):
    """The quantizer for int8 gives them scales that ONNX Runtime refuses in the run."""
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    numbers = np.random.default_rng(0)
    weights = {"w": (32, 32), "stacked": (4, 32, 48)}
    stored = [
        onnx.numpy_helper.from_array(numbers.standard_normal(shape).astype(np.float32) / 6, key)
        for key, shape in weights.items()
    ]
    nodes = [
        make.make_node("MatMul", ["x", "w"], ["h"], name="one"),
        make.make_node("MatMul", ["h", "stacked"], ["y"], name=name),
    ]
    given = make.make_tensor_value_info("x", kind, ["rows", 32])
    made = make.make_tensor_value_info("y", kind, [4, "rows", 48])
    graph = make.make_graph(nodes, "g", [given], [made], stored)
    opsets = [make.make_opsetid("", 18)]
    file = tmp_path / "m.onnx"
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), file)
    import_model(file, tmp_path / "out", ImportOptions(precision=precision))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.precision == precision
    assert list(manifest.slots.modules()) == ["w"]
    assert list(manifest.golden) == ["base"]
    (reason,) = manifest.unslotted.values()
    assert "MatMul: its constant of shape (4, 32, 48) is no matrix" in reason
    x = numbers.standard_normal((5, 32)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(file).run(None, {"x": x})
    (got,) = Runtime(tmp_path / "out").run({"x": x}).values()
    assert np.linalg.norm(got - expected) < BOUNDS[precision] * np.linalg.norm(expected)
    assert np.linalg.norm(got[::-1] - expected) > np.linalg.norm(expected) / 2


def save_typed(file, first, second):
    """Write ``x W V`` with W in one type and V in another, and return them."""
    make, numbers = onnx.helper, np.random.default_rng(0)
    weights = {"w": numbers.standard_normal((32, 32)).astype(first) / 6}
    weights["v"] = numbers.standard_normal((32, 48)).astype(second) / 6
    kinds = {each: make.np_dtype_to_tensor_dtype(np.dtype(each)) for each in (first, second)}
    nodes = [
        make.make_node("MatMul", ["x", "w"], ["t"]),
        make.make_node("Cast", ["t"], ["u"], to=kinds[second]),
        make.make_node("MatMul", ["u", "v"], ["y"]),
    ]
    given = make.make_tensor_value_info("x", kinds[first], ["rows", 32])
    made = make.make_tensor_value_info("y", kinds[second], ["rows", 48])
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = make.make_graph(nodes, "g", [given], [made], stored)
    opsets = [make.make_opsetid("", 18)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), file)
    return weights


@pytest.mark.parametrize(("precision", "dtype"), [("int4", "float64"), ("int8", "float16")])
def test_weights_that_no_quantizer_takes_are_refused_by_their_type(precision, dtype, tmp_path):
    """The one for four bits took float64, the one for eight took halves; neither graph opens."""
    save_typed(tmp_path / "m.onnx", dtype, dtype)
    code, said = command(
        "export", tmp_path / "m.onnx", "-o", tmp_path / "out", "--precision", precision
    )
    assert code == 2
    assert f"got MatMul of {dtype}, which it leaves as they are; export the model in" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("precision", "dtype"), [("int4", "float64"), ("int8", "float16")])
def test_weights_that_no_quantizer_takes_stay_beside_others(precision, dtype, tmp_path):
    weights = save_typed(tmp_path / "m.onnx", "float32", dtype)
    said = []
    options = ImportOptions(precision=precision)
    import_model(tmp_path / "m.onnx", tmp_path / "out", options, progress=said.append)
    assert f"not stored as {precision}: v (MatMul of {dtype})" in said
    manifest = read_manifest(tmp_path / "out")
    assert manifest.precision == precision
    assert list(manifest.slots.modules()) == ["w", "v"]
    x = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)
    expected = x.astype(np.float64) @ weights["w"] @ weights["v"]
    (got,) = Runtime(tmp_path / "out").run({"x": x}).values()
    assert np.linalg.norm(got - expected) < BOUNDS[precision] * np.linalg.norm(expected)
    assert np.linalg.norm(got[::-1] - expected) > np.linalg.norm(expected) / 2


def test_what_runs_and_would_not_in_a_precision_is_refused(tmp_path, monkeypatch):
    numbers = np.random.default_rng(0)
    weights = {name: numbers.standard_normal((32, 32)).astype(np.float32) for name in ("v", "w")}
    save_products(tmp_path / "m.onnx", weights)
    store = importing.store_as

    def broken(file, out, precision, progress):
        model = store(file, out, precision, progress)
        sizes = ir.Value(name="sizes", const_value=ir.tensor(np.array([-1, 13]), name="sizes"))
        model.graph.register_initializer(sizes)
        y = model.graph.outputs[0]
        node = ir.Node("", "Reshape", [y, sizes], num_outputs=1)
        node.outputs[0].name = "z"
        node.outputs[0].type = y.type
        model.graph.append(node)
        model.graph.outputs[0] = node.outputs[0]
        return model

    monkeypatch.setattr(importing, "store_as", broken)
    with pytest.raises(LoraportError, match="ONNX Runtime runs it, but not with these slots and"):
        import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions(precision="int8"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_dequantized_are_of_the_bits_that_are_stored(bits, rounds, tmp_path):
    """Four bits were called int8; beside rounded activations they still are."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    inside, outside = 64, 48
    most = 2 ** (bits - 1) - 1
    weight = random.integers(-most, most + 1, (inside, outside))
    scale = random.uniform(0.01, 0.03, outside).astype(np.float32)
    kind = {4: TensorProto.INT4, 8: TensorProto.INT8}[bits]
    constants = {"s": scale, "step": np.float32(0.01), "zero": np.uint8(128)}
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    stored.append(helper.make_tensor("fc.weight", kind, weight.shape, weight.ravel().tolist()))
    nodes = [
        helper.make_node("DequantizeLinear", ["fc.weight", "s"], ["wide"], axis=1),
        helper.make_node("MatMul", ["given" if rounds else "x", "wide"], ["y"]),
    ]
    if rounds:
        nodes[:0] = [
            helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["given"]),
        ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", inside), ("y", outside))
    )
    graph = helper.make_graph(nodes, "product", [x], [y], stored)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.precision == ("int4" if bits == 4 and not rounds else "int8")
    if not rounds:
        array = random.standard_normal((5, inside)).astype(np.float32)
        exact = Runtime(tmp_path / "out", threads=1, float32_activations=True)
        wanted = array.astype(np.float64) @ (weight * scale.astype(np.float64))
        np.testing.assert_allclose(exact.run({"x": array})["y"], wanted, atol=1e-4)
        told = f"weights of floats, got some that are stored as int{bits} already; leave --prec"
        for other in {"int4", "int8", "fp16"} - {f"int{bits}"}:
            with pytest.raises(LoraportError, match=told):
                import_model(tmp_path / "m.onnx", tmp_path / "no", ImportOptions(precision=other))
