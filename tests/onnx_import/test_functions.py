"""Models whose operators are inside functions of their own."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.onnx import add_adapters
from converters.onnx.importing import import_model
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.manifest import MODEL_FILE, read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
SIZES = {"first": (6, 10), "second": (10, 4)}


def function(name, inputs, outputs, nodes, opset=18, attributes=()):
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, inputs, outputs, nodes, opsets, attributes)


def linear(opset=18):
    """``x W^T + b``, the way older exporters write a layer."""
    node = helper.make_node
    nodes = [
        node("Transpose", ["weight"], ["turned"], name="turn", perm=[1, 0]),
        node("MatMul", ["x", "turned"], ["product"], name="product"),
        node("Add", ["product", "bias"], ["y"], name="sum"),
    ]
    return function("Linear", ["x", "weight", "bias"], ["y"], nodes, opset)


def network(functions, calls):
    """``second(tanh(first(x)))`` by functions."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for module, (inputs, outputs) in SIZES.items()
        for name, shape in [
            (f"{module}.weight", (outputs, inputs)),
            (f"{module}.bias", (outputs,)),
        ]
    ]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 6]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4]),
    ]
    graph = helper.make_graph(calls, "network", values[:1], values[1:], weights)
    return helper.make_model(graph, functions=functions, opset_imports=OPSETS, ir_version=9)


def nested():
    """Layers in functions, and those in a function of the whole network."""
    node = helper.make_node
    names = [f"{module}_{part}" for module in SIZES for part in ("weight", "bias")]
    body = [
        node("Linear", ["x", *names[:2]], ["hidden"], name="first", domain="own"),
        node("Tanh", ["hidden"], ["bent"]),
        node("Linear", ["bent", *names[2:]], ["y"], name="second", domain="own"),
    ]
    whole = function("Whole", ["x", *names], ["y"], body)
    parameters = [name.replace("_", ".") for name in names]
    call = node("Whole", ["x", *parameters], ["y"], name="whole", domain="own")
    return network([linear(), whole], [call])


def values_of(model):
    return {
        entry.name: numpy_helper.to_array(entry).astype(np.float64)
        for entry in model.graph.initializer
    }


def test_layers_inside_functions_take_adapters(tmp_path):
    model = nested()
    onnx.save(model, tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    assert set(manifest.slots.modules()) == set(SIZES)
    assert not manifest.unslotted
    onnx.checker.check_model(str(tmp_path / "bundle" / MODEL_FILE), full_check=True)
    generator = torch.Generator().manual_seed(0)
    matrices = {
        path: (torch.randn(3, i, generator=generator), torch.randn(o, 3, generator=generator))
        for path, (i, o) in SIZES.items()
    }
    adapter = Adapter(
        {path: LoraModule(ModuleKind.LINEAR, a, b, alpha=6.0) for path, (a, b) in matrices.items()}
    )
    add_adapters(tmp_path / "bundle", {"a": adapter})
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    runtime = Runtime(tmp_path / "bundle", threads=1)
    (source,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x})
    np.testing.assert_array_equal(runtime.run({"x": x})["y"], source)
    stored = values_of(model)

    def layer(name, rows):
        a, b = (matrix.double().numpy() for matrix in matrices[name])
        weight = stored[f"{name}.weight"] + 2.0 * b @ a
        return rows @ weight.T + stored[f"{name}.bias"]

    expected = layer("second", np.tanh(layer("first", x.astype(np.float64))))
    got = runtime.run({"x": x}, "a")["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(got - source).max() > 1


def test_a_function_in_another_opset_is_refused_with_the_reason(tmp_path):
    node = helper.make_node
    calls = [
        node("Linear", ["x", "first.weight", "first.bias"], ["hidden"], domain="own"),
        node("Linear", ["hidden", "second.weight", "second.bias"], ["y"], domain="own"),
    ]
    onnx.save(network([linear(opset=13)], calls), tmp_path / "m.onnx")
    with pytest.raises(LoraportError, match=r"m\.onnx: .*Linear in opset 13, .* 18"):
        import_model(tmp_path / "m.onnx", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def turned_product(opset):
    """``x W^T``: ``Transpose`` and ``MatMul`` did not change from opset 13 to 20."""
    turn = helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0])
    product = helper.make_node("MatMul", ["x", "turned"], ["y"])
    made = function("Linear", ["x", "weight"], ["y"], [turn, product], opset)
    made.opset_import.append(helper.make_opsetid("ai.onnx.ml", opset))  # that nothing uses
    return made


@pytest.mark.parametrize("opset", [13, 20])
def test_a_function_in_another_opset_whose_operators_are_the_same_is_put_in(opset, tmp_path):
    node = helper.make_node
    calls = [
        node("Linear", ["x", "first.weight"], ["hidden"], name="first", domain="own"),
        node("Linear", ["hidden", "second.weight"], ["y"], name="second", domain="own"),
    ]
    model = network([turned_product(opset)], calls)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "bundle")
    assert set(read_manifest(tmp_path / "bundle").slots.modules()) == set(SIZES)
    written = onnx.load(str(tmp_path / "bundle" / MODEL_FILE), load_external_data=False)
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == 18
    a, b = np.ones((2, 6), np.float32), np.full((10, 2), 0.25, np.float32)
    lora = LoraModule(ModuleKind.LINEAR, torch.from_numpy(a), torch.from_numpy(b), alpha=2.0)
    add_adapters(tmp_path / "bundle", {"a": Adapter({"first": lora})})
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    stored, runtime = values_of(model), Runtime(tmp_path / "bundle", threads=1)
    for adapter, change in ((None, 0.0), ("a", b.astype(np.float64) @ a)):
        hidden = x.astype(np.float64) @ (stored["first.weight"] + change).T
        got = runtime.run({"x": x}, adapter)["y"]
        np.testing.assert_allclose(got, hidden @ stored["second.weight"].T, rtol=1e-4, atol=1e-4)
    assert np.abs(got - runtime.run({"x": x})["y"]).max() > 1


def test_a_function_in_another_opset_whose_operator_changed_since_names_it(tmp_path):
    """``Softmax`` of opset 12 flattens what is after its axis."""
    node = helper.make_node
    whole = function("Whole", ["x"], ["y"], [node("Softmax", ["x"], ["y"], axis=1)], 12)
    onnx.save(network([whole], [node("Whole", ["x"], ["y"], domain="own")]), tmp_path / "m.onnx")
    with pytest.raises(LoraportError, match=r"Whole in opset 12, .* 18, where Softmax is another"):
        import_model(tmp_path / "m.onnx", tmp_path / "bundle")


def test_functions_that_call_one_another_in_a_circle_are_refused(tmp_path):
    node = helper.make_node
    there = function("There", ["x"], ["y"], [node("Back", ["x"], ["y"], domain="own")])
    back = function("Back", ["x"], ["y"], [node("There", ["x"], ["y"], domain="own")])
    onnx.save(
        network([there, back], [node("There", ["x"], ["y"], domain="own")]), tmp_path / "m.onnx"
    )
    with pytest.raises(LoraportError, match=r"m\.onnx: .*a circle of calls through There"):
        import_model(tmp_path / "m.onnx", tmp_path / "bundle")


def test_what_a_few_functions_stand_for_is_counted_before_it_is_made(tmp_path):
    """Each calls the one before twice: thirty of them are a thousand million operators."""
    node = helper.make_node
    ladder = [function("F0", ["x"], ["y"], [node("Tanh", ["x"], ["y"])])]
    for number in range(1, 31):
        below = f"F{number - 1}"
        calls = [node(below, ["x"], ["a"], domain="own"), node(below, ["a"], ["y"], domain="own")]
        ladder.append(function(f"F{number}", ["x"], ["y"], calls))
    onnx.save(network(ladder, [node("F30", ["x"], ["y"], domain="own")]), tmp_path / "m.onnx")
    with pytest.raises(LoraportError, match=r"expected functions .*more than 1000000 operators"):
        import_model(tmp_path / "m.onnx", tmp_path / "bundle")


def test_a_function_that_reads_what_is_nowhere_is_refused(tmp_path):
    node = helper.make_node
    broken = function("Broken", ["x"], ["y"], [node("Add", ["x", "nowhere"], ["y"])])
    call = node("Broken", ["x"], ["y"], domain="own")
    onnx.save(network([broken], [call]), tmp_path / "m.onnx")
    with pytest.raises(LoraportError, match="operators that can have one, got only Add"):
        import_model(tmp_path / "m.onnx", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
