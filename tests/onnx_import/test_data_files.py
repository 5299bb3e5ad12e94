"""Data files that a graph names in unusual ways are shared once, and never written to."""

from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import session

from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots.inserting import SlotOptions
from loraport.bundle.manifest import check_files, read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime

SIZES = (8, 5, 3)


def made(folder, locations):
    """A network of two layers, each with its weight where it is told, and the weights."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape, np.float32) for shape in pairwise(SIZES)]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc1.weight"], ["hidden"], "fc1"),
            helper.make_node("MatMul", ["hidden", "fc2.weight"], ["y"], "fc2"),
        ],
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", SIZES[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", SIZES[2]])],
    )
    for number, (weight, location) in enumerate(zip(weights, locations, strict=True), 1):
        file = folder / location
        file.parent.mkdir(parents=True, exist_ok=True)
        offset = file.stat().st_size if file.exists() else 0
        with file.open("ab") as stream:
            stream.write(weight.tobytes())
        stored = TensorProto(
            name=f"fc{number}.weight",
            data_type=TensorProto.FLOAT,
            dims=weight.shape,
            data_location=TensorProto.EXTERNAL,
        )
        stored.external_data.add(key="location", value=location)
        stored.external_data.add(key="offset", value=str(offset))
        graph.initializer.append(stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "layers.onnx").write_bytes(model.SerializeToString())
    return folder / "layers.onnx", weights


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    "other", ["./data/w.bin", "data//w.bin", "data/./w.bin", "data/../data/w.bin"]
)
def test_a_file_that_is_named_in_two_ways_is_one(other, copy, tmp_path):
    file, weights = made(tmp_path, ["data/w.bin", other])
    import_model(file, tmp_path / "out", ImportOptions(copy_data=copy))
    manifest = read_manifest(tmp_path / "out")
    check_files(manifest, tmp_path / "out")
    assert [name for name in manifest.files if name.endswith(".bin")] == ["data/w.bin"]
    x = np.random.default_rng(1).standard_normal((4, SIZES[0]), np.float32)
    want = x.astype(np.float64) @ weights[0] @ weights[1]
    np.testing.assert_allclose(Runtime(tmp_path / "out").run({"x": x})["y"], want, atol=1e-5)
    assert np.abs(want - x.astype(np.float64) @ weights[0] @ weights[1][::-1]).max() > 0.1


@pytest.mark.parametrize(
    "location",
    ["model.onnx", "./model.onnx", "./golden/w.bin", "base_values.safetensors"],
)
def test_a_file_that_is_called_like_one_of_a_bundle_is_left_as_it_is(location, tmp_path):
    file, _ = made(tmp_path, [location, location])
    before = (tmp_path / location).read_bytes()
    options = ImportOptions(slots=SlotOptions(replace=("fc2",)))
    with pytest.raises(LoraportError, match="one a bundle has itself"):
        import_model(file, tmp_path / "out", options)
    assert (tmp_path / location).read_bytes() == before
    assert not (tmp_path / "out").exists()
    assert session(str(file)).get_inputs()[0].name == "x"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("a:0.bin", "a colon or backslash, which the names"),
        ("data\\w.bin", "a colon or backslash, which the names"),
        ("../w.bin", "a path that leaves it"),
        ("data/../../w.bin", "a path that leaves it"),
        ("elsewhere/../w.bin", "another one than w.bin"),
    ],
)
def test_a_file_that_no_bundle_can_have_is_refused_with_why(location, reason, tmp_path):
    (tmp_path / "model" / "data").mkdir(parents=True)
    (tmp_path / "other" / "inside").mkdir(parents=True)
    (tmp_path / "model" / "elsewhere").symlink_to(tmp_path / "other" / "inside")
    file, _ = made(tmp_path / "model", [location, location])
    with pytest.raises(LoraportError, match=reason) as refused:
        import_model(file, tmp_path / "out")
    assert "store the model's data again, under another name" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_way_back_in_a_name_is_left_out_of_weights_that_are_stored_anew(tmp_path):
    file, weights = made(tmp_path, ["data/../data/w.bin", "data/w.bin"])
    import_model(file, tmp_path / "out", ImportOptions(precision="fp16"))
    x = np.random.default_rng(1).standard_normal((4, SIZES[0]), np.float32)
    want = x.astype(np.float64) @ weights[0] @ weights[1]
    np.testing.assert_allclose(Runtime(tmp_path / "out").run({"x": x})["y"], want, atol=2e-2)


@pytest.mark.parametrize("linked", [False, True])
def test_an_output_that_holds_the_models_data_is_refused(linked, tmp_path):
    """With `force` it was replaced, and the model lost its weights."""
    make = onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((16, 8), np.float32), "fc.weight")
    ends = [make.make_tensor_value_info(n, 1, ["n", w]) for n, w in (("x", 16), ("y", 8))]
    node = make.make_node("MatMul", ["x", "fc.weight"], ["y"])
    model = make.make_model(make.make_graph([node], "g", ends[:1], ends[1:], [weight]))
    model.ir_version = 8
    (tmp_path / "data").mkdir()
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="data/w.bin",
        size_threshold=0,
    )
    data = tmp_path / "data" / "w.bin"
    if linked:
        data.rename(tmp_path / "blob")
        data.symlink_to(tmp_path / "blob")
    with pytest.raises(LoraportError, match="expected an output that is no input and holds none"):
        import_model(tmp_path / "m.onnx", tmp_path / "data", force=True)
    assert data.stat().st_size == 16 * 8 * 4
    import_model(tmp_path / "m.onnx", tmp_path / "out", force=True)
