"""Experts that a router chooses are exported by torch."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, PhimoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock

from converters.onnx import export_torch_module
from converters.onnx.exporters.storing import rounded_modules, sites_of, store_as
from converters.onnx.exporters.torch_exporter import export_module
from converters.onnx.graph.source_graph import read_graph
from converters.onnx.modules.graph_weights import load_graph_weights
from converters.onnx.modules.slottable import other_matrices
from loraport.bundle.manifest import read_manifest
from loraport.runtime.full_precision import ask_for_float32

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_local_experts": 4}


def test_experts_are_those_of_the_model(tmp_path):
    """It was refused: grouped products have no operator. Control: the experts in another order."""
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, experts_implementation="grouped_mm")
    block = MixtralSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    dynamic = {"hidden_states": {0: "batch", 1: "sequence"}}
    export_module(block, {"hidden_states": torch.randn(2, 5, 8)}, tmp_path, dynamic=dynamic)
    assert config._experts_implementation == "grouped_mm"

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    states = torch.randn(3, 7, 8)
    config._experts_implementation = "eager"
    block = block.double()
    with torch.no_grad():
        expected = block(states.double()).numpy()
        block.gate.weight.copy_(block.gate.weight.flip(0))
        other = block(states.double()).numpy()
    (got,) = session.run(None, {"hidden_states": states.numpy()})
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)
    assert np.abs(other - expected).max() > 0.1 * scale


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """A block of experts, its inputs and its int4 graph."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rounded")
    block = MixtralSparseMoeBlock(
        MixtralConfig(**SIZES, experts_implementation="grouped_mm")
    ).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(2, 5, 8)
    export_module(block, {"hidden_states": states}, folder, dynamic={})
    (folder / "int4").mkdir()
    store_as(folder / "model.onnx", folder / "int4", "int4", lambda _: None)
    return block, states, folder / "int4" / "model.onnx"


def test_rounded_routers_are_those_that_verify_compares_with(rounded):
    """Other routers choose other experts, so ``verify`` failed. Control: the router as it was."""
    block, states, graph = rounded
    block = copy.deepcopy(block)
    model = onnx.load(graph)
    assert ask_for_float32(model)  # as verify does
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (got,) = session.run(None, {"hidden_states": states.numpy()})
    with torch.no_grad():
        before = block(states).numpy()
        assert load_graph_weights(graph, block) == ["gate"]
        expected = block(states).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(before - expected).max() > 1e-2 * np.abs(expected).max()


def test_rounded_routers_are_told(rounded):
    """Control: the experts, and modules that the graph has in floats."""
    block, _, graph = rounded
    sites = sites_of(read_graph(graph))
    assert list(other_matrices(block)) == ["gate"]
    assert rounded_modules(sites, ["gate", "experts"]) == ["gate"]
    exact = sites_of(read_graph(graph.parents[1] / "model.onnx"))
    assert rounded_modules(exact, ["gate"]) == []


def test_the_rounded_router_of_another_model_is_not_taken(rounded):
    """``verify`` would call the graph of another model right."""
    block = copy.deepcopy(rounded[0])
    torch.nn.init.normal_(block.gate.weight)
    assert load_graph_weights(rounded[2], block) == []


class Routed(nn.Module):
    """Phi-MoE's experts, whose router is a linear layer by name alone, and a linear layer."""

    def __init__(self):
        super().__init__()
        config = PhimoeConfig(**SIZES, experts_implementation="grouped_mm")
        self.block = PhimoeSparseMoeBlock(config)
        self.wide = nn.Linear(SIZES["hidden_size"], 5)

    def forward(self, states):
        return self.wide(self.block(states))


def test_routers_that_are_linear_layers_by_name_alone_have_no_slot(tmp_path):
    """It had one, and ``verify`` of an adapter with it ended in TypeError: it gives a tuple."""
    torch.manual_seed(0)
    model = Routed().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    export_torch_module(model, {"states": torch.randn(2, 5, 8)}, tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    assert set(manifest.slots.modules()) == {"wide"}
    assert list(manifest.unslotted) == ["block.router"]
    assert "a PhimoeTopKRouter, which does not give" in manifest.unslotted["block.router"]
    assert "block.router" in other_matrices(model)  # quantizers round it all the same
