"""Constants and weights behind a ``Transpose`` are quantized like others, or refused."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.onnx import add_adapters
from converters.onnx.exporters.plain_weights import make_weights_plain
from converters.onnx.importing import ImportOptions, import_model
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.manifest import MODEL_FILE, read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime

IN, OUT = 64, 96
WEIGHT = np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)


def model_of(nodes, *, outputs=("y",), weights=None):
    weights = weights or {"layer.weight": WEIGHT}
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", values, results, stored)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def constant():
    value = numpy_helper.from_array(WEIGHT.T.copy())
    return [
        helper.make_node("Constant", [], ["layer.weight.T"], name="weight", value=value),
        helper.make_node("MatMul", ["x", "layer.weight.T"], ["y"], name="/layer/product"),
    ]


def turned():
    return [
        helper.make_node("Transpose", ["layer.weight"], ["t"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="product"),
    ]


def gemm(**more):
    return [helper.make_node("Gemm", ["x", "layer.weight"], ["y"], name="gemm", transB=1, **more)]


def joined():
    """Of two halves, named by nothing but the node."""
    return [
        helper.make_node("Concat", ["upper", "lower"], ["val_3"], axis=0),
        helper.make_node("Gemm", ["x", "val_3", "b"], ["y"], name="/layer/Gemm", transB=1),
    ]


def taken_apart():
    return [
        helper.make_node("Split", ["packed", "sizes"], ["other", "part"], axis=0),
        helper.make_node("Transpose", ["part"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="/layer/MatMul"),
    ]


def reshaped():
    """Only its name tells whose it is."""
    return [
        helper.make_node("Reshape", ["layer.weight", "shape"], ["val_3"]),
        helper.make_node("Gemm", ["x", "val_3", "b"], ["y"], name="node_linear_7", transB=1),
    ]


def cast():
    return [
        helper.make_node("Cast", ["layer.weight"], ["val_3"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["x", "val_3"], ["y"], name="node_linear_7", transB=1),
    ]


BIAS = {"b": np.zeros(OUT, np.float32)}
STORED = {
    constant: {"unused": np.zeros(1, np.float32)},
    joined: {"upper": WEIGHT[:7], "lower": WEIGHT[7:], **BIAS},
    taken_apart: {"packed": np.concatenate([WEIGHT[:5], WEIGHT]), "sizes": np.array([5, OUT])},
    reshaped: {"layer.weight": WEIGHT.reshape(8, -1), "shape": np.array([OUT, IN]), **BIAS},
    cast: {"layer.weight": WEIGHT.astype(np.float16)},
}


def run(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.02), ("int4", 0.15)])
@pytest.mark.parametrize("nodes", [turned, constant, gemm, joined, taken_apart, reshaped, cast])
def test_they_are_stored_as_asked_for(tmp_path, precision, error, nodes):
    onnx.save(model_of(nodes(), weights=STORED.get(nodes)), tmp_path / "m.onnx")
    said = []
    options = ImportOptions(precision=precision)
    import_model(tmp_path / "m.onnx", tmp_path / "bundle", options, progress=said.append)
    assert not [line for line in said if "not stored" in line]
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.precision == precision
    assert list(manifest.slots.modules()) == ["layer"]
    graph = onnx.load(tmp_path / "bundle" / MODEL_FILE, load_external_data=False).graph
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    assert not [w.name for w in graph.initializer
                if np.prod(w.dims) > IN * 6 and w.data_type in floats]  # fmt: skip
    x = np.random.default_rng(1).standard_normal((5, IN)).astype(np.float32)
    expected = x.astype(np.float64) @ WEIGHT.T.astype(np.float64)
    got = Runtime(tmp_path / "bundle", threads=1).run({"x": x})["y"]
    off = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-4 < off < error  # rounded, and to the weight itself: its transpose would not fit


def test_a_graph_of_which_nothing_can_be_stored_so_is_refused(tmp_path):
    onnx.save(model_of(gemm(alpha=0.5)), tmp_path / "m.onnx")
    with pytest.raises(LoraportError, match=r"m\.onnx: --precision int4: expected .*got Gemm"):
        import_model(tmp_path / "m.onnx", tmp_path / "bundle", ImportOptions(precision="int4"))
    assert not (tmp_path / "bundle").exists()


def test_every_reader_gets_the_transposed_matrix():
    """Twice transposed, read in a branch, read as it is, and an output of the graph."""
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "again"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    nodes = [
        *turned(),
        helper.make_node("Transpose", ["layer.weight"], ["again"], name="again"),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch),
        helper.make_node("Identity", ["layer.weight"], ["itself"]),
        helper.make_node("Transpose", ["layer.weight"], ["shown"], name="shown", perm=[1, 0]),
        helper.make_node("Transpose", ["other"], ["same"], name="same", perm=[0, 1]),
        helper.make_node("Identity", ["same"], ["kept"]),
    ]
    weights = {"layer.weight": WEIGHT, "yes": np.array(True), "other": WEIGHT[:3]}
    outputs = ("y", "chosen", "itself", "shown", "kept")
    model = model_of(nodes, outputs=outputs, weights=weights)
    x = np.random.default_rng(1).standard_normal((5, IN)).astype(np.float32)
    before = run(model, x)
    make_weights_plain(model)
    after = run(model, x)
    for name, expected, got in zip(outputs, before, after, strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=name)
    assert before[0].shape == (5, OUT)
    names = [weight.name for weight in model.graph.initializer]
    assert "layer.weight_transposed" in names
    assert "other" not in names  # nothing reads it any more
    assert [n.name for n in model.graph.node if n.op_type == "Transpose"] == ["shown"]


def without(model, name):
    found = onnx.ModelProto()
    found.CopyFrom(model)
    found.graph.node.remove(next(node for node in found.graph.node if node.name == name))
    return found


@pytest.mark.parametrize("turned", [0, 1])
def test_a_gemm_computes_the_same_as_product_and_sum(turned):
    numbers = np.random.default_rng(2)
    weights = {
        "w": numbers.standard_normal((OUT, IN) if turned else (IN, OUT)).astype(np.float32),
        "b": numbers.standard_normal((1, OUT)).astype(np.float32),
        "fixed": numbers.standard_normal((7, IN)).astype(np.float32),
        "y_weight": numbers.standard_normal(OUT).astype(np.float32),  # a name that is taken
        "y_product": numbers.standard_normal(OUT).astype(np.float32),
    }
    settings = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": turned}
    make = helper.make_node
    nodes = [
        make("Gemm", ["x", "w", "b"], ["y"], name="/layer/Gemm", **settings),
        make("Gemm", ["x", "w"], ["bare"], name="bare", transB=turned),
        make("Gemm", ["x", "w", "b"], ["twice"], name="twice", transB=turned, beta=2.0),
        make("Gemm", ["x", "w", "b"], ["unbiased"], name="unbiased", transB=turned, beta=0.0),
        make("Gemm", ["x", "w", "b"], ["scaled"], name="scaled", transB=turned, alpha=2.0),
        make("Gemm", ["x", "w"], ["old"], name="old", transB=turned, broadcast=1),  # of opset 6
        make("Gemm", ["fixed", "x"], ["free"], name="free", transB=1),
        make("Sum", ["y", "y_weight", "y_product"], ["all"], name="all"),
    ]
    outputs = ("y", "bare", "twice", "unbiased", "scaled", "free", "all")
    model = model_of(nodes, outputs=outputs, weights=weights)
    x = numbers.standard_normal((5, IN)).astype(np.float32)
    before = run(without(model, "old"), x)
    assert len({values.tobytes() for values in before[:5]}) == 4  # bare is what unbiased is
    make_weights_plain(model, gemms=True)
    model, whole = without(model, "old"), model
    for mine, true in zip(run(model, x), before, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-4)
        assert np.abs(true).max() > 1
    assert {node.name: node.op_type for node in whole.graph.node} == {
        "/layer/Gemm": "MatMul",
        "/layer/Gemm/bias": "Add",
        "bare": "MatMul",
        "": "Mul",
        "twice": "MatMul",
        "twice/bias": "Add",
        "unbiased": "MatMul",
        "scaled": "Gemm",
        "old": "Gemm",
        "free": "Gemm",
        "all": "Sum",
    }


def test_what_is_not_stored_so_is_told(tmp_path):
    other = np.random.default_rng(3).standard_normal((OUT, IN)).astype(np.float32)
    nodes = [*gemm(), *(helper.make_node("Gemm", ["x", f"m{n}.weight"], [f"z{n}"], name=f"m{n}",
                                         transB=1, alpha=0.5) for n in range(7))]  # fmt: skip
    again = helper.make_node("Gemm", ["x", "m0.weight"], ["z7"], name="again", transB=1, alpha=0.5)
    nodes.append(again)  # a module that is called twice is told once
    weights = {"layer.weight": WEIGHT} | {f"m{n}.weight": other + n for n in range(7)}
    outputs = ("y", *(f"z{n}" for n in range(8)))
    onnx.save(model_of(nodes, outputs=outputs, weights=weights), tmp_path / "m.onnx")
    said = []
    options = ImportOptions(precision="int4")
    import_model(tmp_path / "m.onnx", tmp_path / "bundle", options, progress=said.append)
    names = ", ".join(f"m{n} (Gemm)" for n in range(5))
    assert f"not stored as int4: {names} and 2 more" in said
    assert len(read_manifest(tmp_path / "bundle").slots.modules()) == 8
    # Where all is stored so, nothing is told.
    onnx.save(model_of(gemm()), tmp_path / "m.onnx")
    said.clear()
    import_model(tmp_path / "m.onnx", tmp_path / "all", options, progress=said.append)
    assert said
    assert not [line for line in said if "not stored" in line]


@pytest.mark.parametrize(("precision", "error"), [(None, 1e-5), ("int8", 0.02), ("int4", 0.15)])
def test_a_weight_that_several_gemms_share_is_one_module(tmp_path, precision, error):
    """As in a recurrent layer that was exported step by step; stored once, by one name."""
    numbers = np.random.default_rng(4)
    weights = {
        "cell.weight": numbers.standard_normal((IN, IN)).astype(np.float32) / 8,
        "b": numbers.standard_normal(IN).astype(np.float32),
        "head.weight": WEIGHT,
    }
    nodes = [
        helper.make_node("Gemm", ["x", "cell.weight", "b"], ["h1"], name="/a/Gemm", transB=1),
        helper.make_node("Gemm", ["h1", "cell.weight", "b"], ["h2"], name="/b/Gemm", transB=1),
        helper.make_node("Gemm", ["h2", "cell.weight"], ["h3"], name="/c/Gemm", transB=1),
        helper.make_node("Gemm", ["h3", "head.weight"], ["y"], name="/d/Gemm", transB=1),
    ]
    onnx.save(model_of(nodes, weights=weights), tmp_path / "m.onnx")
    bundle = tmp_path / "bundle"
    import_model(tmp_path / "m.onnx", bundle, ImportOptions(precision=precision))
    assert list(read_manifest(bundle).slots.modules()) == ["cell", "head"]
    a, b = (numbers.standard_normal(shape).astype(np.float32) / 8 for shape in ((3, IN), (IN, 3)))
    module = LoraModule(ModuleKind.LINEAR, torch.from_numpy(a), torch.from_numpy(b), alpha=6)
    add_adapters(bundle, {"a": Adapter({"cell": module})})
    x = numbers.standard_normal((5, IN)).astype(np.float32)
    changed = weights["cell.weight"].astype(np.float64) + 2.0 * b.astype(np.float64) @ a

    def expected(*cells):
        steps = zip(cells, (weights["b"], weights["b"], 0.0), strict=True)
        state = x.astype(np.float64)
        for cell, bias in steps:
            state = state @ cell.T + bias
        return state @ WEIGHT.T.astype(np.float64)

    runtime = Runtime(bundle, threads=1, float32_activations=True)
    got = runtime.run({"x": x}, "a")["y"]
    wanted = expected(changed, changed, changed)
    assert np.linalg.norm(got - wanted) < error * np.linalg.norm(wanted)
    once = expected(changed, weights["cell.weight"], weights["cell.weight"])
    assert np.linalg.norm(once - wanted) > 2 * error * np.linalg.norm(wanted)
    graph = onnx.load(bundle / MODEL_FILE, load_external_data=False).graph
    large = [w.name for w in graph.initializer if np.prod(w.dims) >= IN * IN // 2]
    assert len(large) == 2


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.02), ("int4", 0.15)])
def test_gemms_without_names_of_before_initializers_were_no_inputs(tmp_path, precision, error):
    """Names of nodes are optional; IR 3 lists every weight among the inputs."""
    weights = {
        "first.weight": WEIGHT,
        "first.bias": np.random.default_rng(5).standard_normal(OUT).astype(np.float32),
        "second.weight": WEIGHT.T.copy() / 8,
        "second.bias": np.random.default_rng(6).standard_normal(IN).astype(np.float32) * 30,
    }
    nodes = [
        helper.make_node("Gemm", ["x", "first.weight", "first.bias"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "second.weight", "second.bias"], ["y"], transB=1, beta=0.5),
    ]
    model = model_of(nodes, weights=weights)
    model.ir_version, model.opset_import[0].version = 3, 8
    model.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in weights.items()
    )
    onnx.save(model, tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "bundle", ImportOptions(precision=precision))
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.precision == precision
    assert list(manifest.slots.modules()) == ["first", "second"]
    x = np.random.default_rng(1).standard_normal((5, IN)).astype(np.float32)
    first, bias, second, other = (array.astype(np.float64) for array in weights.values())
    expected = (x @ first.T + bias) @ second.T + 0.5 * other
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-4, atol=1e-4)
    got = Runtime(tmp_path / "bundle", threads=1, float32_activations=True).run({"x": x})["y"]
    size = np.linalg.norm(expected)
    assert np.linalg.norm(got - expected) < error * size
    assert np.linalg.norm(np.tile(0.5 * other, (len(x), 1))) > 2 * error * size


def test_the_quantizers_process_begins_without_pytorch():
    """Which takes longer to import than a small model to quantize."""
    code = """
import sys
from converters.onnx.exporters import quantizing
import converters.onnx.exporters.plain_weights, converters.onnx.graph.source_graph
assert "torch" not in sys.modules, "torch"
from converters.onnx import export_base
assert "torch" in sys.modules
assert quantizing.PRECISIONS and export_base
"""
    subprocess.run([sys.executable, "-c", code], check=True)
