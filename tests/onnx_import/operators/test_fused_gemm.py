"""FusedGemm as ONNX Runtime's optimizer writes it: the product is taken out."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, optimized_by_runtime

from loraport.errors import LoraportError

IN, OUT = 6, 4
ALPHA, BETA = 0.5, 2.0  # of the Gemm itself
ACTIVATIONS = {
    "Relu": ({}, torch.relu),
    "Sigmoid": ({}, torch.sigmoid),
    "Tanh": ({}, torch.tanh),
    "Softplus": ({}, torch.nn.functional.softplus),
    "Softsign": ({}, torch.nn.functional.softsign),
    "Elu": ({"alpha": 0.3}, lambda y: torch.nn.functional.elu(y, 0.3)),
    "LeakyRelu": ({"alpha": 0.3}, lambda y: torch.nn.functional.leaky_relu(y, 0.3)),
    "HardSigmoid": ({"alpha": 0.3, "beta": 0.4}, lambda y: (0.3 * y + 0.4).clamp(0, 1)),
    "Selu": (
        {"alpha": 1.5, "gamma": 0.8},
        lambda y: 0.8 * torch.where(y > 0, y, 1.5 * (y.exp() - 1)),
    ),
    "ThresholdedRelu": ({"alpha": 0.3}, lambda y: torch.where(y > 0.3, y, 0.0)),
}


def fused(folder, activation, stored="fc.weight"):
    """Return a model with one FusedGemm, its weight ``[out, in]`` and its bias."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((OUT, IN)).astype(np.float32)
    bias = random.standard_normal(OUT).astype(np.float32)
    names = ["x", stored, "fc.bias"]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", names, ["p"], "/fc/Gemm", transB=1, alpha=ALPHA, beta=BETA),
            helper.make_node(activation, ["p"], ["y"], **ACTIVATIONS[activation][0]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUT])],
        [numpy_helper.from_array(a, n) for a, n in zip((weight, bias), names[1:], strict=True)],
    )
    model = optimized_by_runtime(
        helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10), folder
    )
    assert [node.op_type for node in model.graph.node] == ["FusedGemm"]
    return model, torch.from_numpy(weight).double(), torch.from_numpy(bias).double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variants", [("lora",), ("lora", "gain", "bias")])
def test_it_takes_an_adapter(slotted, adapter, tmp_path, activation, variants):
    model, weight, bias = fused(tmp_path, activation)
    made = slotted(model, *variants)
    (slot,) = made.slots
    assert (slot.name, slot.in_features, slot.out_features) == ("fc", IN, OUT)
    random = np.random.default_rng(1)
    x = random.standard_normal((5, IN)).astype(np.float32)
    act = ACTIVATIONS[activation][1]

    def expected(weight, added):
        return act(ALPHA * torch.from_numpy(x).double() @ weight.T + added).numpy()

    base = made.run(x=x)[0]
    np.testing.assert_allclose(base, made.run_original(x=x)[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(base, expected(weight, BETA * bias), atol=1e-5)
    tensors = adapter(slot, size=1)
    a, b = (torch.from_numpy(tensors[n]).double() for n in (slot.input_a, slot.input_b))
    added = BETA * bias
    if "gain" in variants:
        gain, shift = (random.uniform(0.5, 1.5, OUT).astype(np.float32) for _ in range(2))
        tensors |= {slot.input_gain: gain, slot.input_bias: shift}
        weight, added = weight * torch.from_numpy(gain)[:, None], added + torch.from_numpy(shift)
    got = made.run(x=x, **tensors)[0]
    np.testing.assert_allclose(got, expected(weight + (a @ b).T, added), atol=1e-5)
    assert np.abs(got - base).max() > 0.05


def test_its_name_is_the_products_where_the_weight_has_none(slotted, tmp_path):
    model = fused(tmp_path, "Relu", "onnx::Gemm_7")[0]
    assert model.graph.node[0].name == "fused /fc/Gemm"
    assert [slot.name for slot in slotted(model, "lora").slots] == ["fc"]


@pytest.mark.parametrize("without", ["lora_weight", "known_activation"])
def test_what_takes_no_slot_is_told(slotted, tmp_path, without):
    model = fused(tmp_path, "Relu")[0]
    (node,) = model.graph.node
    for attribute in node.attribute:
        if without == "known_activation" and attribute.name == "activation":
            attribute.s = b"Swish"
        if without == "lora_weight" and attribute.name == "transB":
            node.attribute.append(helper.make_attribute("transA", 1))
    reason = "FusedGemm: its activation is of an unknown kind, or its other factor is transposed"
    with pytest.raises(LoraportError, match=reason):
        slotted(model, "lora")
