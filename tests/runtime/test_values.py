"""Arrays become values and arrays again, bfloat16 among them, and lanes take and give them."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from loraport.runtime import Lane
from loraport.runtime.resident import make_resident
from loraport.runtime.values import as_numpy, as_value, numpy_of

TYPES = (np.float32, np.float16, np.int64, ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 3), (), (1, 2, 0, 4)])
def test_an_array_comes_back_as_it_was(dtype, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    value, owner = as_value(array, "cpu")
    assert tuple(value.shape()) == shape
    got = as_numpy(value)
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
    del value, owner
    np.testing.assert_array_equal(got, array)  # an array of its own


def test_an_array_that_is_not_contiguous_keeps_its_order():
    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16).T
    np.testing.assert_array_equal(as_numpy(as_value(array, "cpu")[0]), array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_become_arrays_of_the_same_numbers(dtype):
    tensor = (100 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    np.testing.assert_array_equal(numpy_of(tensor.T).astype(np.float64), tensor.T.double().numpy())


@pytest.fixture
def session():
    """``y = bfloat16(float32(x) @ float32(slot))``, what the CPU's kernels can do in bfloat16."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["slot"], ["other"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["wide", "other"], ["product"]),
            helper.make_node("Cast", ["product"], ["y"], to=TensorProto.BFLOAT16),
        ],
        "bfloat16",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 2])],
        [helper.make_tensor("slot", TensorProto.BFLOAT16, [3, 2], np.zeros(6))],
    )
    slot = helper.make_tensor_value_info("slot", TensorProto.BFLOAT16, [3, 2])
    graph.input.append(slot)  # an overridable initializer, as slots are
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


def test_a_lane_takes_and_gives_bfloat16(session):
    numbers = torch.Generator().manual_seed(1)
    slot = torch.randn(3, 2, generator=numbers).bfloat16()
    x = torch.randn(4, 3, generator=numbers).bfloat16()
    lane = Lane(session, make_resident({"slot": numpy_of(slot)}, "cpu"), "cpu")
    got = lane.run({"x": numpy_of(x)})["y"]
    assert got.dtype == ml_dtypes.bfloat16
    expected = (x.float() @ slot.float()).bfloat16()
    np.testing.assert_array_equal(got.astype(np.float32), expected.float().numpy())
    # The control: the slot's own value is another.
    idle = Lane(session, None, "cpu").run({"x": numpy_of(x)})["y"]
    assert not np.array_equal(idle, got)
