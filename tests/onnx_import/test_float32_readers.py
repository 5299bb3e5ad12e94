"""Operators that float16 leaves in float32 may read one value several times."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.onnx.importing import ImportOptions, import_model
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime

IN, OUT = 8, 6
NUMBERS = np.random.default_rng(0)
WEIGHT = NUMBERS.standard_normal((IN, OUT)).astype(np.float32)
FLOOR = NUMBERS.standard_normal(OUT).astype(np.float32)


def file_of(directory, *more):
    """A product, raised twice to one floor that is added, too: in float32 and in float16."""
    nodes = [
        *more,
        helper.make_node("MatMul", ["x", "layer.weight"], ["a"], name="/layer/MatMul"),
        helper.make_node("Max", ["a", "floor"], ["b"], name="/first"),
        helper.make_node("Sub", ["b", "floor"], ["c"], name="/between"),
        helper.make_node("Max", ["c", "floor", "floor"], ["y"], name="/second"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUT])
    weights = {"layer.weight": WEIGHT, "floor": FLOOR}
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [given], [made], stored)
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), directory / "m.onnx")
    return directory / "m.onnx"


def test_each_value_is_widened_once(tmp_path):
    file, bundle = file_of(tmp_path), tmp_path / "bundle"
    import_model(file, bundle, ImportOptions(precision="fp16"))
    manifest = read_manifest(bundle)
    assert manifest.precision == "fp16"
    assert list(manifest.slots.modules()) == ["layer"]
    x = NUMBERS.standard_normal((5, IN)).astype(np.float32)
    product = x.astype(np.float64) @ WEIGHT
    wanted = np.maximum(np.maximum(product, FLOOR) - FLOOR, FLOOR)
    got = Runtime(bundle, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(got, wanted, atol=0.02)  # 11 bits, of sums up to 10
    assert np.abs(np.maximum(product, FLOOR) - wanted).max() > 0.5


def test_a_graph_that_the_converter_breaks_is_refused_by_its_own_name(tmp_path):
    """Its new value has a name that is taken."""
    file = file_of(tmp_path, helper.make_node("Identity", ["x"], ["floor_cast_to_fp32"], name="i"))
    with pytest.raises(LoraportError) as caught:
        import_model(file, tmp_path / "bundle", ImportOptions(precision="fp16"))
    said = str(caught.value)
    assert said.startswith(f"{file}: --precision fp16: ONNX Runtime's quantizer wrote something ")
    assert "Output 'floor_cast_to_fp32' is redeclared" in said
    assert said.endswith("; try another precision")
    assert "partial" not in said
    assert not (tmp_path / "bundle").exists()
