"""Experts that a router chooses are exported by torch."""

import numpy as np
import onnxruntime
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from converters.onnx.exporters.torch_exporter import export_module

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
