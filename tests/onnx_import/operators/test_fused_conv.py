"""FusedConv as ONNX Runtime's optimizer writes it: the convolution is taken out."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import optimized_by_runtime

from loraport.errors import LoraportError

IN, OUT, GROUPS = 6, 4, 2
ACTIVATIONS = {
    "Relu": ({}, torch.relu),
    "Sigmoid": ({}, torch.sigmoid),
    "Tanh": ({}, torch.tanh),
    "LeakyRelu": ({"alpha": 0.3}, lambda y: torch.nn.functional.leaky_relu(y, 0.3)),
    "HardSigmoid": ({"alpha": 0.3, "beta": 0.4}, lambda y: (0.3 * y + 0.4).clamp(0, 1)),
    "Clip": ({"min": -0.5, "max": 1.5}, lambda y: y.clamp(-0.5, 1.5)),
}


def fused(folder, activation, opset):
    """Return a model with one FusedConv, its kernel and its bias."""
    random = np.random.default_rng(0)
    kernel = random.standard_normal((OUT, IN // GROUPS, 3, 3)).astype(np.float32) / 4
    bias = random.standard_normal(OUT).astype(np.float32)
    conv = helper.make_node(
        "Conv",
        ["x", "net.conv.weight", "net.conv.bias"],
        ["c"],
        name="/net/conv/Conv",
        pads=[1, 1, 1, 1],
        strides=[2, 1],
        group=GROUPS,
    )
    constants = {"net.conv.weight": kernel, "net.conv.bias": bias}
    attributes = dict(ACTIVATIONS[activation][0])
    after = ["c"]
    if activation == "Clip" and opset >= 11:
        after += list(attributes)
        constants |= {name: np.float32(value) for name, value in attributes.items()}
        attributes = {}
    graph = helper.make_graph(
        [conv, helper.make_node(activation, after, ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", IN, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUT, "height", "width"])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = optimized_by_runtime(
        helper.make_model(graph, opset_imports=opsets, ir_version=8), folder
    )
    assert [node.op_type for node in model.graph.node] == ["FusedConv"]
    return model, torch.from_numpy(kernel).double(), torch.from_numpy(bias).double()


@pytest.mark.parametrize(
    ("activation", "opset", "added"),
    [
        *((name, 17, False) for name in ACTIVATIONS),
        ("Clip", 10, False),
        ("Relu", 17, True),
        ("", 17, True),
    ],
)
def test_it_takes_an_adapter(slotted, adapter, tmp_path, activation, opset, added):
    """With what the optimizers of GPUs add to the convolution (``added``), too."""
    model, kernel, bias = fused(tmp_path, activation or "Relu", opset)
    (node,) = model.graph.node
    if added:
        shape = ["n", OUT, "height", "width"]
        model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, shape))
        node.input.append("z")
    if not activation:
        node.attribute.remove(next(each for each in node.attribute if each.name == "activation"))
    made = slotted(model, "lora", "conv", "gain", "bias")
    (slot,) = made.slots
    assert (slot.name, slot.in_features, slot.out_features) == ("net.conv", IN, OUT)
    random = np.random.default_rng(1)
    x = random.standard_normal((2, IN, 5, 6)).astype(np.float32)
    more = {"z": random.standard_normal((2, OUT, 3, 6)).astype(np.float32)} if added else {}
    z = torch.from_numpy(more.get("z", np.zeros(1))).double()
    act = ACTIVATIONS[activation][1] if activation else torch.nn.Identity()

    def expected(weight, shift):
        convolved = torch.nn.functional.conv2d(
            torch.from_numpy(x).double(), weight, shift, stride=(2, 1), padding=1, groups=GROUPS
        )
        return act(convolved + z).numpy()

    base = made.run(x=x, **more)[0]
    np.testing.assert_allclose(base, made.run_original(x=x, **more)[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(base, expected(kernel, bias), atol=1e-5)

    tensors = adapter(slot, rank=2 * GROUPS)
    a, b = (torch.from_numpy(tensors[f"{slot.name}.{n}"]).double() for n in ("lora_A", "lora_B"))
    gain, shift = (random.uniform(0.5, 1.5, OUT).astype(np.float32) for _ in range(2))
    # A is of all channels; what it adds is a kernel of all channels, too.
    whole = torch.zeros(OUT, IN, 3, 3, dtype=torch.float64)
    for group in range(GROUPS):
        rows = slice(group * OUT // GROUPS, (group + 1) * OUT // GROUPS)
        whole[rows, group * IN // GROUPS : (group + 1) * IN // GROUPS] = kernel[rows]
    update = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    weight = whole * torch.from_numpy(gain).double()[:, None, None, None] + update
    convolved = torch.nn.functional.conv2d(
        torch.from_numpy(x).double(), weight, bias + torch.from_numpy(shift), (2, 1), 1
    )
    moved = act(convolved + z).numpy()
    filled = {slot.input_gain: gain, slot.input_bias: shift, **tensors}
    got = made.run(x=x, **more, **filled)[0]
    np.testing.assert_allclose(got, moved, atol=1e-5)
    assert np.abs(got - base).max() > 0.1


def test_an_activation_of_another_kind_is_told(slotted, tmp_path):
    model = fused(tmp_path, "Relu", 17)[0]
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "activation":
            attribute.s = b"Softsign"
    with pytest.raises(LoraportError, match="FusedConv: its activation is of an unknown kind"):
        slotted(model, "lora", "conv")
