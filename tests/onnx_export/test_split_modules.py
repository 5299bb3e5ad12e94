"""A module that a graph computes with several operators has one slot, which acts in all of them."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_graphs import session
from peft_cases import Case, make_case
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx.modules.graph_weights import load_graph_weights
from converters.onnx.modules.holders import BaseHolders
from converters.onnx.modules.slottable import slottable_modules
from converters.onnx.packing.pack import pack
from converters.onnx.slots.inserting import SlotOptions, insert_slots, require_slot_inputs
from loraport.runtime.rows import stack_packed

IN, WIDTHS, OUT = 6, (5, 3, 4), 7
A, B, C = "abc"


class Net(nn.Module):
    """``fc`` is what attention does with packed q/k/v: its parts go different ways."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.widths = widths
        self.fc = nn.Linear(IN, sum(WIDTHS))
        self.down = nn.Linear(sum(WIDTHS), OUT, bias=False)

    def forward(self, x):
        a, b, c = self.fc(x).split(self.widths, -1)
        return self.down(torch.cat([torch.tanh(b), c, torch.relu(a)], -1))


def graph_of(net, *, opset=21, dtype=np.float32, gemm=False, left_out="", turned=False, x="x"):
    """The net with an operator for each part, the last one first; ``c``'s input may be another."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = {"down": net.down.weight.detach().T.numpy().astype(dtype)}
    weights, biases = net.fc.weight.detach(), net.fc.bias.detach()
    nodes = [helper.make_node("Identity", ["x"], ["same"])]
    parts = zip("abc", weights.split(net.widths), biases.split(net.widths), strict=True)
    for name, weight, bias in reversed(list(parts)):
        stored = weight.numpy() if turned and gemm else weight.T.numpy()
        constants |= {f"w_{name}": stored.astype(dtype), f"b_{name}": bias.numpy().astype(dtype)}
        if name == left_out:
            constants[f"w_{name}"] = constants[f"w_{name}"] + 1
        given = x if name == C else "x"
        if gemm:
            inputs = [given, f"w_{name}", f"b_{name}"]
            nodes.append(helper.make_node("Gemm", inputs, [name], f"{name}0", transB=int(turned)))
        else:
            nodes.append(
                helper.make_node("MatMul", [given, f"w_{name}"], [f"y_{name}"], f"{name}0")
            )
            nodes.append(helper.make_node("Add", [f"y_{name}", f"b_{name}"], [name]))
    nodes += [
        helper.make_node("Tanh", [B], ["tanh"]),
        helper.make_node("Relu", [A], ["relu"]),
        helper.make_node("Concat", ["tanh", C, "relu"], ["joined"], axis=-1),
        helper.make_node("MatMul", ["joined", "down"], ["y"], "d0"),
    ]
    shape = ["batch", IN] if gemm else ["batch", "sequence", IN]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, [*shape[:-1], OUT])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def slotted(net, variants=("lora",), **graph):
    options = {name: graph.pop(name) for name in ("strength", "per_row") if name in graph}
    model = ir.from_proto(graph_of(net, **graph))
    return insert_slots(model, slottable_modules(net), SlotOptions(variants, **options))


def base_of(net):
    def weight(path, in_out):
        assert not in_out
        return net.get_submodule(path).weight.detach()

    return SimpleNamespace(weight=weight)


def adapted(net, made, folder, seed=0, **options):
    """PEFT's model, and what fills the slots."""
    case = Case(Net, {"target_modules": ["fc", "down"], "r": 3, "lora_alpha": 5, **options})
    peft = make_case(case, folder / f"a{seed}", seed, base=net)
    packed = pack(read_adapter(peft.path), made.slots, made.unslotted, base_of(net))
    return peft.peft_model, {name: tensor.numpy() for name, tensor in packed.tensors.items()}


def rows_of_x(gemm=False, rows=2):
    shape = (rows, IN) if gemm else (rows, 4, IN)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def torch_of(model, x):
    with torch.no_grad():
        return model.double()(torch.from_numpy(x).double()).numpy()


def close(got, expected, atol=2e-6):
    np.testing.assert_allclose(got, expected, atol=atol * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "graph"),
    [
        ({}, {}),
        ({}, {"opset": 12, "gemm": True}),
        ({"use_dora": True, "use_rslora": True}, {"strength": True}),
        ({"use_dora": True}, {"gemm": True, "turned": True, "opset": 11}),
        ({"lora_bias": True, "rank_pattern": {"down": 2}}, {"gemm": True}),
        ({"target_modules": ["fc"], "use_dora": True}, {}),
    ],
)
def test_the_outputs_are_pefts_element_by_element(net, tmp_path, options, graph):
    made = slotted(net, ("lora", "gain", "bias"), **graph)
    assert made.unslotted == {}
    assert {slot.name: slot.out_features for slot in made.slots.slots} == {"fc": 12, "down": 7}
    peft, tensors = adapted(net, made, tmp_path, **options)
    x = rows_of_x(graph.get("gemm", False))
    proto = ir.to_proto(made.model)
    onnx.checker.check_model(proto, full_check=True)
    opened = session(proto)
    base = opened.run(None, {"x": x})[0]
    plain = {name: graph[name] for name in ("opset", "gemm", "turned") if name in graph}
    assert np.array_equal(base, session(graph_of(net, **plain)).run(None, {"x": x})[0])
    expected = torch_of(peft, x)
    close(opened.run(None, {"x": x, **tensors})[0], expected)
    assert np.abs(expected - base).max() > 0.1
    # The control: another part's columns.
    moved = tensors | {"fc.lora_B": np.roll(tensors["fc.lora_B"], 3, axis=1)}
    assert np.abs(opened.run(None, {"x": x, **moved})[0] - expected).max() > 0.05
    require_slot_inputs(made.model, made.slots)
    neutral = {
        entry.name: np.full(entry.neutral_shape, entry.neutral, np.float32)
        for slot in made.slots.slots
        for entry in slot.inputs.values()
    }
    controls = {control.input: control.default() for control in made.slots.controls}
    required = session(ir.to_proto(made.model))
    close(required.run(None, {"x": x, **neutral, **tensors, **controls})[0], expected)


def test_a_rank_of_none_is_the_base(net):
    """What loraport's runtime gives idle slots."""
    made = slotted(net)
    opened, x = session(ir.to_proto(made.model)), rows_of_x()
    empty = {
        entry.name: np.zeros([0 if isinstance(n, str) else n for n in entry.shape], np.float32)
        for slot in made.slots.slots
        for entry in slot.inputs.values()
    }
    assert np.array_equal(opened.run(None, {"x": x, **empty})[0], opened.run(None, {"x": x})[0])


def test_a_split_weight_is_not_replaced_as_a_whole(net):
    """Control: one that a single operator has."""
    model = ir.from_proto(graph_of(net))
    holders = BaseHolders.of_module(model.graph, net)
    assert "split over several operators" in holders.find("fc.weight")
    assert holders.find("down.weight").value.name == "down"


def test_half_precision(net, tmp_path):
    made = slotted(net, ("lora", "gain"), dtype=np.float16)
    peft, tensors = adapted(net, made, tmp_path, use_dora=True)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
    x = rows_of_x()
    opened = session(ir.to_proto(made.model))
    expected = torch_of(peft, x)
    close(opened.run(None, {"x": x.astype(np.float16), **tensors})[0], expected, atol=5e-3)
    base = opened.run(None, {"x": x.astype(np.float16)})[0]
    assert np.abs(base - expected).max() > 0.1


@pytest.mark.parametrize("strength", [False, True])
def test_every_row_has_its_own_adapter(net, tmp_path, strength):
    made = slotted(net, per_row=True, strength=strength)
    (one, first), (two, second) = (adapted(net, made, tmp_path, seed, r=seed) for seed in (2, 5))
    x, opened = rows_of_x(rows=3), session(ir.to_proto(made.model))
    feeds = {
        "x": x,
        "adapter_ids": np.array([1, -1, 0]),
        **stack_packed([first, second], made.slots),
    }
    expected = np.stack([torch_of(two, x)[0], torch_of(net, x)[1], torch_of(one, x)[2]])
    net.float()
    close(opened.run(None, feeds)[0], expected)
    assert np.abs(torch_of(one, x) - torch_of(two, x)).max() > 0.1
    if strength:
        close(
            opened.run(None, feeds | {"lora_strength": np.zeros(1, np.float32)})[0],
            session(graph_of(net)).run(None, {"x": x})[0],
        )


@pytest.mark.parametrize("wrong", [{"left_out": B}, {"left_out": A}, {"x": "same"}])
def test_a_module_that_is_not_there_as_a_whole_has_no_slot(net, wrong):
    """A part of it is another weight, or is computed from another value."""
    made = slotted(net, **wrong)
    assert [slot.name for slot in made.slots.slots] == ["down"]
    assert made.unslotted == {"fc": "no operator of the graph computes it by itself"}


def test_parts_that_are_alike_are_not_guessed_at():
    """Which of two equal parts an operator is decides what an adapter does."""
    net = Net((4, 4, 4)).eval()
    assert [slot.name for slot in slotted(net).slots.slots] == ["down", "fc"]
    with torch.no_grad():
        net.fc.weight[4:8] = net.fc.weight[:4]
    assert [slot.name for slot in slotted(net).slots.slots] == ["down"]


def test_the_graphs_weights_are_put_together(net, tmp_path):
    made = slotted(net)
    ir.save(made.model, tmp_path / "model.onnx")
    fresh = Net()
    fresh.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    assert set(load_graph_weights(tmp_path / "model.onnx", fresh)) == {"fc", "down"}
    assert torch.equal(fresh.fc.weight, net.fc.weight)
