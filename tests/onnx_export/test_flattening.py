"""Regions on rows: the same numbers, and only where it saves nodes."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import session
from torch import nn

from converters.onnx.modules.slottable import linear_modules
from converters.onnx.slots.inserting import SlotOptions, insert_slots

WIDTH, WIDE, BATCH, LENGTH = 6, 10, 2, 3


class Block(nn.Module):
    """A gated block with a residual, between two powers, which no rule calls row-wise."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, WIDE, bias=False) for _ in range(2))
        self.down = nn.Linear(WIDE, WIDTH, bias=False)

    def forward(self, x):
        x = x.pow(3)
        gated = torch.sigmoid(self.gate(x)) * self.up(x)
        return (x + self.down(gated)).pow(3)


def graph_of(block, *, shapes=True, opset=17, last="Pow"):
    constants = {
        **{n: getattr(block, n).weight.detach().T.numpy() for n in ("gate", "up", "down")},
        "three": np.array(3, np.float32),
    }
    steps = [
        ("Pow", ["x", "three"], "h"),
        *(("MatMul", ["h", name], f"{name}_out") for name in ("gate", "up")),
        ("Sigmoid", ["gate_out"], "opened"),
        ("Mul", ["opened", "up_out"], "gated"),
        ("MatMul", ["gated", "down"], "down_out"),
        ("Add", ["h", "down_out"], "sum"),
        (last, ["sum", "three"] if last == "Pow" else ["sum"], "y"),
    ]
    nodes = [helper.make_node(op, given, [made], name=f"/{made}") for op, given, made in steps]
    for node in nodes:
        if node.op_type == "MatMul":
            node.name = f"/{node.input[1]}/MatMul"
    leading = ["batch", "sequence"]
    widths = {made: WIDE if made in ("gate_out", "up_out", "opened", "gated") else WIDTH
              for _, _, made in steps}  # fmt: skip

    def value(name, width):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [*leading, width])

    graph = helper.make_graph(
        nodes,
        "block",
        [value("x", WIDTH)],
        [value("y", WIDTH)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
        value_info=[value(n, w) for n, w in widths.items() if shapes and n != "y"],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def slotted(proto, block, **options):
    made = insert_slots(ir.from_proto(proto), linear_modules(block), SlotOptions(**options))
    result = ir.to_proto(made.model)
    onnx.checker.check_model(result, full_check=True)
    onnx.shape_inference.infer_shapes(result, check_type=True, strict_mode=True)
    return result


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def filled(rank=3, seed=2):
    numbers = np.random.default_rng(seed)
    sizes = {"gate": (WIDTH, WIDE), "up": (WIDTH, WIDE), "down": (WIDE, WIDTH)}
    made = {}
    for name, (wide, narrow) in sizes.items():
        made[f"{name}.lora_A"] = numbers.standard_normal((wide, rank)).astype(np.float32)
        made[f"{name}.lora_B"] = numbers.standard_normal((rank, narrow)).astype(np.float32)
    return made


def merged(block, tensors):
    result = Block().double()
    for name in ("gate", "up", "down"):
        change = tensors[f"{name}.lora_A"].astype(np.float64) @ tensors[f"{name}.lora_B"]
        weight = getattr(block, name).weight.detach().double() + torch.from_numpy(change.T)
        getattr(result, name).weight = nn.Parameter(weight, requires_grad=False)
    return result


@pytest.mark.parametrize("opset", [10, 17])
@pytest.mark.parametrize(
    ("options", "controls"),
    [
        ({}, {}),
        ({"strength": True}, {"lora_strength": np.ones(1, np.float32)}),
        ({"variants": ("lora", "gain", "bias")}, {}),
        ({"variants": ("lora", "gain", "bias"), "strength": True}, {}),
    ],
)
def test_a_flat_region_computes_the_same(block, x, options, controls, opset):
    plain = graph_of(block, opset=opset)
    made = slotted(plain, block, **options)
    assert operators(made)["Reshape"] >= 2
    whole = options.get("strength") and "gain" in options.get("variants", ())
    assert operators(made)["Gemm"] == (0 if whole else 3)
    base = session(plain).run(None, {"x": x.numpy()})[0]
    np.testing.assert_array_equal(session(made).run(None, {"x": x.numpy()})[0], base)
    tensors = filled()
    (got,) = session(made).run(None, {"x": x.numpy(), **tensors, **controls})
    expected = merged(block, tensors)(x.double())
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert np.abs(got - base).max() > 0.1


def test_a_region_stays_where_flattening_saves_nothing(block):
    """Two slots, but three values that cross: as many nodes for nothing."""
    plain = graph_of(block)
    modules = linear_modules(block)
    only = insert_slots(ir.from_proto(plain), {"gate": modules["gate"], "up": modules["up"]})
    assert operators(ir.to_proto(only.model))["Reshape"] == 0


def test_where_rows_have_adapters_of_their_own_they_stay_apart(block):
    assert operators(slotted(graph_of(block), block, per_row=True))["Gemm"] == 0


def test_unknown_shapes_are_left_alone(block, x):
    made = slotted(graph_of(block, shapes=False), block)
    assert operators(made)["Gemm"] == 0
    tensors = filled()
    (got,) = session(made).run(None, {"x": x.numpy(), **tensors})
    np.testing.assert_allclose(
        got, merged(block, tensors)(x.double()).numpy(), rtol=1e-5, atol=1e-5
    )


def test_a_row_wise_output_of_the_graph_keeps_its_shape(block, x):
    """Its operator is left out of the region: a reshaped output would be copied."""
    plain = graph_of(block, last="Tanh")
    made = slotted(plain, block)
    (output,) = made.graph.output
    assert [dim.dim_param for dim in output.type.tensor_type.shape.dim][:2] == ["batch", "sequence"]
    got, base = (session(each).run(None, {"x": x.numpy()})[0] for each in (made, plain))
    np.testing.assert_array_equal(got, base)
    assert got.shape == x.shape


def test_the_same_graph_twice_is_the_same_bytes(block):
    one, other = (slotted(graph_of(block), block).SerializeToString(deterministic=True)
                  for _ in range(2))  # fmt: skip
    assert one == other
