"""Slots in graphs: valid, deterministic, the base bit for bit when empty, right when filled."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from call_counts import calls
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, run, session
from torch import nn

from converters.onnx.modules.slottable import linear_modules
from converters.onnx.slots.inserting import insert_slots, require_slot_inputs
from loraport.errors import LoraportError
from loraport.naming import slot_a, slot_b


class Net(nn.Module):
    """Non-square layers; ``fc`` is called twice, its second output is the graph's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6, bias=False)
        self.wide = nn.Linear(6, 9, bias=False)
        self.narrow = nn.Linear(9, 6, bias=False)

    def forward(self, x):
        return self.fc(self.narrow(torch.relu(self.wide(self.fc(x)))))


def graph_of(net, *, dtype=np.float32, names=True):
    """The net as a plain ONNX graph that knows nothing of torch."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {
        name: getattr(net, name).weight.detach().T.numpy().astype(dtype)
        for name in ("fc", "wide", "narrow")
    }
    steps = [("x", "fc", "h1"), ("h1", "wide", "h2"), ("r", "narrow", "h3"), ("h3", "fc", "y")]
    nodes = [
        helper.make_node("MatMul", [a, w], [b], name=f"/{w}/MatMul_{b}" if names else "")
        for a, w, b in steps
    ]
    nodes.insert(2, helper.make_node("Relu", ["h2"], ["r"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", element, ["rows", 6])],
        [helper.make_tensor_value_info("y", element, ["rows", 6])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def slotted(net, **options):
    return insert_slots(ir.from_proto(graph_of(net, **options)), linear_modules(net))


def x(rows=3):
    return np.random.default_rng(0).standard_normal((rows, 6)).astype(np.float32)


def fill(slots, seed=0):
    """Random A and B of another rank in each slot."""
    random = np.random.default_rng(seed)
    tensors = {}
    for rank, slot in enumerate(slots.slots, start=2):
        tensors[slot.input_a] = random.standard_normal((slot.in_features, rank), np.float32)
        tensors[slot.input_b] = random.standard_normal((rank, slot.out_features), np.float32)
    return tensors


def float64_reference(net, tensors, x):
    def linear(name, x):
        w = getattr(net, name).weight.detach().double().numpy().T
        a, b = tensors[slot_a(name)].astype(np.float64), tensors[slot_b(name)].astype(np.float64)
        return x @ (w + a @ b)

    hidden = np.maximum(linear("wide", linear("fc", x.astype(np.float64))), 0)
    return linear("fc", linear("narrow", hidden))


@pytest.mark.parametrize("names", [True, False])
def test_filled_slots_give_the_adapted_model(net, names):
    made = slotted(net, names=names)
    tensors = fill(made.slots)
    got = run(ir.to_proto(made.model), x=x(), **tensors)
    expected = float64_reference(net, tensors, x())
    # Outputs are in the thousands; float32 sums of four layers.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(got - run(graph_of(net), x=x())).max() > 1


def test_a_module_called_twice_has_one_slot_and_both_places_right(net):
    made = slotted(net)
    assert [slot.name for slot in made.slots.slots] == ["fc", "wide", "narrow"]
    tensors = {name: value for name, value in fill(made.slots).items() if name.startswith("fc.")}
    got = run(ir.to_proto(made.model), x=x(), **tensors)
    zeros = {name: np.zeros_like(value) for name, value in fill(made.slots).items()}
    expected = float64_reference(net, zeros | tensors, x())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("required", [False, True])
def test_the_graph_is_valid(net, required):
    made = slotted(net)
    if required:
        require_slot_inputs(made.model, made.slots)
    proto = ir.to_proto(made.model)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.input, *inferred.graph.output)
    }
    assert shapes["wide.lora_A"] == [6, "wide.rank"]
    assert shapes["wide.lora_B"] == ["wide.rank", 9]
    assert shapes["y"] == ["rows", 6]


def test_the_output_keeps_its_name_and_carries_the_slot(net):
    made = slotted(net)
    assert [output.name for output in made.model.graph.outputs] == ["y"]
    assert made.model.graph.outputs[0].producer().op_type == "Add"


def test_an_output_that_is_read_inside_the_graph_too_is_adapted_in_both_places():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "w2"], ["y"]),
        ],
        "two outputs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [2, 5]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3]),
        ],
        [
            numpy_helper.from_array(first.weight.detach().T.numpy(), "w1"),
            numpy_helper.from_array(second.weight.detach().T.numpy(), "w2"),
        ],
    )
    model = helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)
    modules = linear_modules(nn.ModuleDict({"first": first, "second": second}))
    made = insert_slots(ir.from_proto(model), modules)
    tensors = {
        "first.lora_A": np.ones((4, 1), np.float32),
        "first.lora_B": np.ones((1, 5), np.float32),
    }
    data = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    hidden, y = session(ir.to_proto(made.model)).run(["hidden", "y"], {"x": data, **tensors})
    expected = data @ (first.weight.detach().numpy().T + 1)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    np.testing.assert_allclose(y, expected @ second.weight.detach().numpy().T, atol=1e-5)


def test_without_an_adapter_it_is_the_base_bit_for_bit(net):
    assert np.array_equal(run(ir.to_proto(slotted(net).model), x=x()), run(graph_of(net), x=x()))


def test_the_required_graph_has_plain_inputs_and_gives_the_same_numbers(net):
    made = slotted(net)
    overridable = ir.to_proto(made.model)
    require_slot_inputs(made.model, made.slots)
    required = ir.to_proto(made.model)
    assert session(required).get_overridable_initializers() == []
    assert {entry.name for entry in session(required).get_inputs()} == {"x", *made.slots.inputs()}
    tensors = fill(made.slots)
    assert np.array_equal(run(required, x=x(), **tensors), run(overridable, x=x(), **tensors))
    rank_one = {
        name: np.zeros([size if isinstance(size, int) else 1 for size in shape], np.float32)
        for name, shape in ((e.name, e.shape) for e in session(required).get_inputs())
        if name != "x"
    }
    assert np.array_equal(run(required, x=x(), **rank_one), run(graph_of(net), x=x()))


def test_half_precision_slots(net):
    made = slotted(net, dtype=np.float16)
    assert {slot.dtype for slot in made.slots.slots} == {"FLOAT16"}
    tensors = {name: (value / 8).astype(np.float16) for name, value in fill(made.slots).items()}
    got = run(ir.to_proto(made.model), x=x().astype(np.float16), **tensors)
    expected = float64_reference(net, tensors, x())
    # 11-bit mantissas through four layers.
    np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max())


def test_the_bytes_are_always_the_same(net):
    first, second = (ir.to_proto(slotted(net).model) for _ in range(2))
    assert first.SerializeToString() == second.SerializeToString()


def test_weights_are_not_rewritten(net):
    before = {tensor.name: tensor.raw_data for tensor in graph_of(net).graph.initializer}
    after = {
        tensor.name: tensor.raw_data for tensor in ir.to_proto(slotted(net).model).graph.initializer
    }
    assert {name: after[name] for name in before} == before
    added = {name for slot in slotted(net).slots.slots for name in (slot.input_a, slot.input_b)}
    assert after.keys() - before.keys() == added


def test_an_excluded_module_has_its_reason(net):
    made = insert_slots(
        ir.from_proto(graph_of(net)),
        linear_modules(net),
        exclude=lambda path: "not wanted" if path == "wide" else None,
    )
    assert [slot.name for slot in made.slots.slots] == ["fc", "narrow"]
    assert made.unslotted == {"wide": "not wanted"}


def test_a_module_the_graph_does_not_compute_has_its_reason(net):
    modules = linear_modules(nn.ModuleDict({**dict(net.named_children()), "gone": nn.Linear(2, 2)}))
    made = insert_slots(ir.from_proto(graph_of(net)), modules)
    assert made.unslotted == {"gone": "no operator of the graph computes it by itself"}


def test_a_graph_of_another_model_is_refused_with_the_reasons(net):
    torch.manual_seed(1)
    with pytest.raises(LoraportError) as refused:
        insert_slots(ir.from_proto(graph_of(net)), linear_modules(Net()))
    text = str(refused.value)
    assert "expected operators that can have one, got none" in text
    assert "/wide/MatMul_h2: the node's name says wide, but the node's weight is not wide's" in text


def test_an_old_ir_version_is_raised_to_where_initializers_can_be_overridden(net):
    model = graph_of(net)
    model.ir_version = 3
    assert insert_slots(ir.from_proto(model), linear_modules(net)).model.ir_version >= 4


def deep(layers):
    """Return a graph of many layers, and its modules."""
    net = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(layers)])
    weights = {f"{n}.weight": layer.weight.detach().numpy().T for n, layer in enumerate(net)}
    nodes = [
        helper.make_node("MatMul", [f"x{n}", name], [f"x{n + 1}"]) for n, name in enumerate(weights)
    ]
    ends = [
        [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, ["rows", 2])]
        for n in (0, layers)
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "deep", *ends, constants)
    model = helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)
    return ir.from_proto(model), linear_modules(net)


def test_putting_in_slots_grows_with_the_slots():
    made = {}
    for layers in (40, 160):
        model, modules = deep(layers)
        made[layers] = calls(insert_slots, model, modules)
        names = {value.name for value in model.graph.inputs}
        assert names == {"x0"} | {each(path) for path in modules for each in (slot_a, slot_b)}
    assert made[160] < 5 * made[40]
