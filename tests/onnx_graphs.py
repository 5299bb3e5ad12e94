"""Small ONNX graphs and sessions for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

DOMAINS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def single_node(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], in_features: int
) -> onnx.ModelProto:
    """Return a model ``y = node(x, ...)`` with ``x`` and ``y`` matrices of any height."""
    dtype = next(iter(constants.values())).dtype
    element = {np.dtype(np.float16): TensorProto.FLOAT16}.get(dtype, TensorProto.FLOAT)
    graph = helper.make_graph(
        [node],
        "single",
        [helper.make_tensor_value_info("x", element, ["rows", in_features])],
        [helper.make_tensor_value_info("y", element, ["rows", None])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)


def session(model: onnx.ModelProto | bytes | str) -> Any:
    """Open a session that keeps quiet about overridable initializers, on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    """Return the first output of a model."""
    result: np.ndarray = session(model).run(None, inputs)[0]
    return result


def only_node(model: onnx.ModelProto) -> ir.Node:
    """Return the node of a single-node model as onnx-ir sees it."""
    return ir.from_proto(model).graph[0]


def optimized_by_runtime(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Return the model as ONNX Runtime saves it at its extended level, operators fused."""
    plain, file = folder / "plain.onnx", folder / "fused.onnx"
    onnx.save(model, plain)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    return onnx.load(file)
