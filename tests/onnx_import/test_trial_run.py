"""Graphs that end the process with some inputs are exported all the same."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.onnx import trial_run
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.trial_run import TrialRuns, may_end_the_process
from loraport.bundle.golden import base_inputs, golden_reason
from loraport.bundle.manifest import read_manifest

LEFT_OUT = 12
FLOAT = TensorProto.FLOAT


def scanning():
    """``y = (mean(x) + sum of x from LEFT_OUT on) W``; nothing to scan in shorter inputs."""
    vector = [helper.make_tensor_value_info(name, FLOAT, ["batch"]) for name in "seto"]
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "e"], ["t"]), helper.make_node("Identity", ["t"], ["o"])],
        "body",
        vector[:2],
        vector[2:],
    )
    constants = {
        "start": np.array([LEFT_OUT]),
        "end": np.array([1 << 40]),
        "axes": np.array([1]),
        "W": np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["x", "start", "end", "axes"], ["part"]),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node(
            "Scan",
            ["mean", "part"],
            ["last", "all"],
            body=body,
            num_scan_inputs=1,
            scan_input_axes=[1],
        ),
        helper.make_node("Unsqueeze", ["last", "axes"], ["column"]),
        helper.make_node("MatMul", ["column", "W"], ["y"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "scanning",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", "n"])],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def not_scanning():
    """``y = mean(x) W``."""
    plain = scanning()
    del plain.graph.node[2]
    plain.graph.node[2].input[0] = "mean"
    return plain


@pytest.fixture
def file(tmp_path):
    onnx.save(scanning(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def started(monkeypatch):
    """Every process that is started for trials."""
    processes = []

    def start(command, **options):
        processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    facade = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(trial_run, "subprocess", facade)
    return processes


def x(length):
    return {"x": np.ones((2, length), np.float32)}


def test_the_graph_ends_the_process(file):
    """What all this is for; where ONNX Runtime learns to refuse it, it can go."""
    code = "import onnxruntime, numpy, sys\n"
    code += "session = onnxruntime.InferenceSession(sys.argv[1])\n"
    code += "session.run(None, {'x': numpy.ones((2, 8), numpy.float32)})\n"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True)
    assert done.returncode == -signal.SIGFPE


def test_such_inputs_are_told_from_those_that_run_or_are_refused(file, started):
    with TrialRuns() as trials:
        assert not trials.end_the_process(file, x(16))
        assert not trials.end_the_process(file, {"x": np.ones(3, np.float32)})  # refused
        assert not trials.end_the_process(file, {"another": np.ones(3, np.float32)})
        assert not trials.end_the_process(file.with_name("none.onnx"), {})
        assert len(started) == 1
        assert trials.end_the_process(file, x(8))
        assert not trials.end_the_process(file, x(16))
        assert len(started) == 2
    assert [each.returncode for each in started] == [-signal.SIGFPE, 0]


def test_a_process_that_could_not_run_anything_was_not_ended_by_the_graph(file, monkeypatch):
    monkeypatch.setattr(trial_run, "__file__", str(file))  # no Python: its interpreter gives up
    with TrialRuns() as trials:
        assert not trials.end_the_process(file, x(8))


def test_the_export_goes_on_with_other_inputs(file, tmp_path, started):
    out = tmp_path / "bundle"
    import_model(file, out)
    assert base_inputs(out, read_manifest(out))["x"].shape == (2, 16)
    assert len(started) == 2  # the first of two lengths ends one


def test_graphs_that_end_nothing_are_tried_in_none(tmp_path, started):
    onnx.save(not_scanning(), tmp_path / "model.onnx")
    import_model(tmp_path / "model.onnx", tmp_path / "bundle")
    assert not started


def test_where_none_run_there_are_no_golden_outputs(file, tmp_path):
    import_model(file, tmp_path / "bundle", ImportOptions(inputs=x(8)))
    assert "ONNX Runtime ends the process" in golden_reason(tmp_path / "bundle")
    assert not read_manifest(tmp_path / "bundle").golden


def test_which_graphs_are_tried_apart():
    assert may_end_the_process(ir.from_proto(scanning()))
    assert not may_end_the_process(ir.from_proto(not_scanning()))
