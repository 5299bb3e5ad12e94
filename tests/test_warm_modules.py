"""What is run with its imports done does what it does as a program of its own."""

import json
import subprocess

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_graphs import single_node

from converters.onnx.exporters import genai_builder, quantizing
from loraport.errors import LoraportError


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def both_ways(work, tmp_path, monkeypatch):
    """Return what ``work(directory)`` writes or raises, as tests run it and as users do."""
    found = []
    for name in ("warm", "own"):
        out = tmp_path / name
        out.mkdir()
        try:
            work(out)
            found.append(files(out))
        except LoraportError as error:
            found.append(str(error).replace(str(out), ""))
        for module in (genai_builder, quantizing):
            monkeypatch.setattr(module, "subprocess", subprocess)
    return found


@pytest.mark.parametrize("there", [True, False])
def test_the_builder(tiny_base, tmp_path, monkeypatch, there):
    base = tiny_base if there else tmp_path / "unknown"
    if not there:
        base.mkdir()
        config = json.loads((tiny_base / "config.json").read_text())
        config["architectures"] = ["UnknownForCausalLM"]
        (base / "config.json").write_text(json.dumps(config))

    def build(out):
        genai_builder.build_with_genai(base, out, precision="int4", provider="cpu")

    warm, own = both_ways(build, tmp_path, monkeypatch)
    assert warm == own
    assert ("model.onnx" in warm) == there
    assert there or "could not export" in warm


@pytest.mark.parametrize("there", [True, False])
def test_the_quantizers(tmp_path, monkeypatch, there):
    weight = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    model = single_node(helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": weight}, 32)
    if there:
        onnx.save(model, tmp_path / "m.onnx")

    def quantize(out):
        quantizing.quantize_graph(tmp_path / "m.onnx", out, "int8")

    warm, own = both_ways(quantize, tmp_path, monkeypatch)
    assert warm == own
    assert ("model.onnx" in warm) == there
    assert there or "could not store m.onnx as int8" in warm
