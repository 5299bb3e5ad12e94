"""A graph of 7 billion weights gets its slots in little memory: its data is a file of holes."""

import subprocess
import sys

import onnx
import pytest
from onnx import TensorProto, helper

HIDDEN, WIDE, LAYERS = 4096, 11008, 32
LIMIT_MB = 500
SCRIPT = """
import re, sys
from pathlib import Path
from converters.onnx.importing import ImportOptions, slot_graph
from converters.onnx.graph.source_graph import read_graph
import onnx_ir as ir
model = read_graph(Path(sys.argv[1]))
made = slot_graph(model, ImportOptions())
ir.save(model, sys.argv[2])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(len(made.slotted.slots.slots), int(peak[1]) // 1024)
"""


def large_graph(directory):
    nodes, weights, offset, x = [], [], 0, "x"
    for layer in range(LAYERS):
        # As many weights of as many shapes as a Llama's 7 billion.
        for name, rows, columns in (
            ("q", HIDDEN, HIDDEN),
            ("k", HIDDEN, HIDDEN),
            ("v", HIDDEN, HIDDEN),
            ("o", HIDDEN, HIDDEN),
            ("gate", HIDDEN, WIDE),
            ("down", WIDE, HIDDEN),
            ("up", HIDDEN, WIDE),
            ("back", WIDE, HIDDEN),
        ):
            tensor = TensorProto(name=f"w_{layer}_{name}", dims=[rows, columns], data_type=1)
            tensor.data_location = TensorProto.EXTERNAL
            length = rows * columns * 4
            for key, value in (("location", "w.bin"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            offset += length
            weights.append(tensor)
            y = f"y_{layer}_{name}"
            node = helper.make_node("MatMul", [x, tensor.name], [y])
            node.name = f"/layers.{layer}/{name}/MatMul"
            nodes.append(node)
            x = y
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", HIDDEN])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["rows", HIDDEN])],
        weights,
    )
    with (directory / "w.bin").open("wb") as stream:
        stream.truncate(offset)
    onnx.save(helper.make_model(graph, ir_version=10), directory / "m.onnx")
    return offset


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_slots_of_a_large_graph_take_little_memory(tmp_path):
    assert large_graph(tmp_path) > 28e9
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    slots, peak = map(int, done.stdout.split())
    assert slots == LAYERS * 8
    assert peak < LIMIT_MB
