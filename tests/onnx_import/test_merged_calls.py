"""Equal layers that torch's exporter computes by one operator: an adapter for one acts in both."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

from converters.onnx.importing import import_model
from loraport.bundle.manifest import read_manifest

SIZE = 8
MERGED = (
    "torch's exporter computes it and an equal layer of the same input by one operator "
    "(of {} the graph has none), so an adapter would act in both; export from torch with "
    "optimize=False"
)
LOST = (
    "the graph has no operator of its own for it: the model does not use it, or torch's exporter "
    "merged it with an equal layer ({}); export from torch with optimize=False"
)


CALL = (
    "%{} : [num_users={}] = call_function[target=torch.ops.aten.{}.default]"
    "(args = ({}), kwargs = {{}})"
)


def graph(calls, parameters):
    """Return a graph as torch records it: output, operator, inputs, its call and module."""
    nodes = []
    for output, operator, inputs, call, scope in calls:
        node = helper.make_node(operator, inputs, [output], name=f"node_{output}")
        scopes = repr(["", *([scope] if scope else []), output])
        for key, value in (("fx_node", CALL.format(*call)), ("name_scopes", scopes)):
            node.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=value)
        nodes.append(node)
    weights = np.random.default_rng(0).standard_normal((2, SIZE, SIZE)).astype(np.float32)
    names = ("a.weight", "c.weight")
    stored = [numpy_helper.from_array(w, n) for w, n in zip(weights, names, strict=True)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, SIZE]) for n in "xy"]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    listed = "".join(f"p_{p}_weight: PARAMETER target='{p}.weight'\n" for p in parameters)
    made.metadata_props.add(
        key="pkg.torch.export.ExportedProgram.graph_signature", value=f"\n# inputs\n{listed}"
    )
    return helper.make_model(made, opset_imports=DOMAINS[:1], ir_version=10)


def product(output, given, users, weight):
    call = (output, users, "linear", f"%{given}, %p_{weight}_weight")
    return (output, "MatMul", [given, f"{weight}.weight"], call, weight)


HEAD = ("y", "MatMul", ["add", "c.weight"], ("linear_2", 1, "linear", "%add, %p_c_weight"), "c")
SUM = ("add", "Add", ["tanh", "relu"], ("add", 1, "add", "%tanh, %relu"), "")


def two_readers(first, second, users=1):
    return [
        product("linear", "x", users, "a"),
        ("tanh", "Tanh", ["linear"], ("tanh", 1, "tanh", f"%{first}"), ""),
        ("relu", "Relu", ["linear"], ("relu", 1, "relu", f"%{second}"), ""),
        SUM,
        HEAD,
    ]


CASES = {
    "equal calls": (two_readers("linear", "linear_1"), "abc", ["c"]),
    "through what is left out": (two_readers("clone", "clone_1"), "abc", ["c"]),
    "a layer called twice": (two_readers("linear", "linear_1"), "ac", ["a", "c"]),
    "an unused layer": (two_readers("linear", "linear", 2), "abc", ["a", "c"]),
    "one that is left out, read twice": (two_readers("clone", "clone"), "abc", ["a", "c"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_recorded_calls_say(case, tmp_path):
    calls, parameters, slots = CASES[case]
    onnx.save(graph(calls, parameters), tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.slots.modules()) == slots
    expected = {"a": MERGED.format("b"), "b": LOST.format("a")} if "a" not in slots else {}
    assert manifest.unslotted == expected
