"""What an operator that carries weights and takes no slot is listed with."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

from loraport.errors import LoraportError

WHOLE = numpy_helper.from_array(np.ones((4, 3), np.uint8), "w")


@pytest.mark.parametrize(
    ("node", "weight", "given", "reason"),
    [
        (
            helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="product"),
            WHOLE,
            helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 4]),
            "product: MatMulInteger: its input is not quantized right before it",
        ),
    ],
)
def test_the_reason_says_what_to_change(slotted, node, weight, given, reason):
    made = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    graph = helper.make_graph([node], "g", [given], [made], [weight])
    model = helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)
    with pytest.raises(LoraportError, match=reason):
        slotted(model, "lora", "conv")


def graph_of(nodes, inputs, constants):
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    given = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", given, [made], tensors)
    return helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)


def test_attention_in_packing_mode_is_listed_with_what_to_do_before(slotted):
    node = helper.make_node(
        "PackedAttention",
        ["x", "w", "b", "places", "lengths"],
        ["y"],
        name="attention",
        domain="com.microsoft",
        num_heads=2,
    )
    inputs = [
        ("x", TensorProto.FLOAT, ["n", 4]),
        ("places", TensorProto.INT32, ["batch", "length"]),
        ("lengths", TensorProto.INT32, ["batches"]),
    ]
    constants = {"w": np.ones((4, 12), np.float32), "b": np.ones(12, np.float32)}
    with pytest.raises(LoraportError, match=r"PackedAttention: .* \(--use_multi_head_attention\)"):
        slotted(graph_of([node], inputs, constants))


def test_experts_that_the_run_picks_are_listed(slotted):
    """Whether their matrices are turned or not; rows that are looked up are none."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((4, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/router/MatMul"),
        helper.make_node("Gather", ["experts", "expert"], ["e"]),
        helper.make_node("Squeeze", ["e", "zero"], ["s"]),
        helper.make_node("Transpose", ["s"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["a", "t"], ["b"], name="/experts/up"),
        helper.make_node("MatMul", ["b", "s"], ["c"], name="/experts/down"),
        helper.make_node("Gather", ["table", "expert"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["c", "columns"], ["y"], name="/looked/up"),
    ]
    inputs = [("x", TensorProto.FLOAT, ["n", 4]), ("expert", TensorProto.INT64, [1])]
    experts = random.standard_normal((3, 4, 4)).astype(np.float32)
    constants = {"w": matrix, "experts": experts, "zero": np.array([0]), "table": matrix + 1}
    made = slotted(graph_of(nodes, inputs, constants), "lora")
    assert [slot.name for slot in made.slots] == ["router"]
    picked = "MatMul: its weight is one of several, picked in the run"
    found = {name: reason for name, reason in made.unslotted.items() if name.startswith("/")}
    assert found == {"/experts/up": picked, "/experts/down": picked}


def test_what_only_gives_its_shape_has_no_slot(slotted):
    """As onnxruntime's optimizer leaves a lookup of DistilBERT's that it fused elsewhere."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"], name="lookup"),
        helper.make_node("Shape", ["rows"], ["shape"]),
        helper.make_node("MatMul", ["x", "table"], ["product"], name="live"),
        helper.make_node("Expand", ["one", "shape"], ["ones"]),
        helper.make_node("ReduceMax", ["ones"], ["most"], keepdims=0),
        helper.make_node("Mul", ["product", "most"], ["y"]),
    ]
    inputs = [
        ("x", TensorProto.FLOAT, ["n", 4]),
        ("tokens", TensorProto.INT64, ["n", "length"]),
    ]
    table = np.ones((4, 3), np.float32)
    made = slotted(
        graph_of(nodes, inputs, {"table": table, "one": np.ones(1, np.float32)}),
        "lora",
        "embedding",
    )
    assert [member.module_path for slot in made.slots for member in slot.members] == ["table"]
    why = "nothing but the shape of what it computes is read"
    assert made.unslotted == {"lookup": f"Gather: {why}"}


def test_a_transposed_input_is_told(slotted):
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="/layer/Gemm", transA=1)
    weight = np.ones((4, 3), np.float32)
    model = graph_of([node], [("x", TensorProto.FLOAT, [4, "n"])], {"w": weight})
    with pytest.raises(LoraportError, match="/layer/Gemm: Gemm: its other factor is transposed"):
        slotted(model, "lora")


def test_products_with_vectors_are_listed(slotted):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/layer/MatMul"),
        helper.make_node("MatMul", ["a", "v"], ["b"], name="/right"),
        helper.make_node("MatMul", ["v", "a"], ["c"], name="/left"),
        helper.make_node("Add", ["a", "v"], ["d"], name="/bias"),
        helper.make_node("Sum", ["b", "c", "d"], ["y"], name="/all"),
    ]
    constants = {"w": np.ones((4, 4), np.float32), "v": np.ones(4, np.float32)}
    model = graph_of(nodes, [("x", TensorProto.FLOAT, [4, 4])], constants)
    found = slotted(model, "lora").unslotted
    assert found == {
        "/right": "MatMul: its constant of shape (4,) is no matrix of floats",
        "/left": "MatMul: its constant is the left factor",
    }


def test_einsums_with_vectors_are_listed(slotted):
    """Not an outer product, which the angles of a rotation are."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/layer/MatMul"),
        helper.make_node("Einsum", ["a", "v"], ["b"], name="/right", equation="ni,i->n"),
        helper.make_node("Einsum", ["v", "a"], ["c"], name="/left", equation="i,...i->..."),
        helper.make_node("Einsum", ["b", "v"], ["d"], name="/angles", equation="n,i->ni"),
        helper.make_node("Sum", ["b", "c", "d"], ["y"], name="/all"),
    ]
    constants = {"w": np.ones((4, 4), np.float32), "v": np.ones(4, np.float32)}
    model = graph_of(nodes, [("x", TensorProto.FLOAT, [4, 4])], constants)
    why = "Einsum: its constant of shape (4,) is no matrix of floats"
    assert slotted(model, "lora").unslotted == {"/right": why, "/left": why}


def test_tables_that_are_not_looked_up_by_rows_are_listed(slotted):
    """What no run changes is no table of weights."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/layer/MatMul"),
        helper.make_node("Gather", ["turned", "ids"], ["b"], name="/columns", axis=1),
        helper.make_node("Gather", ["positions", "ids"], ["p"], name="/positions", axis=1),
        helper.make_node("Unsqueeze", ["ids", "last"], ["places"]),
        helper.make_node("GatherND", ["table", "places"], ["c"], name="/nd"),
        helper.make_node("GatherElements", ["table", "places"], ["f"], name="/elements"),
        helper.make_node("Gather", ["turned", "fixed"], ["d"], name="/fixed", axis=1),
        helper.make_node("Squeeze", ["p", "first"], ["e"]),
        helper.make_node("Sum", ["a", "b", "c", "d", "e", "f"], ["y"], name="/all"),
    ]
    shapes = {"w": (4, 4), "turned": (4, 9), "table": (9, 4), "positions": (1, 9, 4)}
    constants = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    constants |= {"last": np.array([-1]), "first": np.array([0]), "fixed": np.arange(4)}
    inputs = [("x", TensorProto.FLOAT, [4, 4]), ("ids", TensorProto.INT64, [4])]
    found = slotted(graph_of(nodes, inputs, constants), "lora", "embedding").unslotted
    assert found == {
        name: f"{operator}: it reads its constant of shape {shape} {how}; "
        "a Gather of a matrix along axis 0 takes a slot"
        for name, operator, shape, how in (
            ("/columns", "Gather", (4, 9), "along axis 1"),
            ("/positions", "Gather", (1, 9, 4), "along axis 1"),
            ("/nd", "GatherND", (9, 4), "by coordinates"),
            ("/elements", "GatherElements", (9, 4), "by coordinates"),
        )
    }


def test_tables_of_more_dimensions_are_listed(slotted):
    """Of codebooks, or of heads; not where all that is read of them are factors of products."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/layer/MatMul"),
        helper.make_node("Gather", ["books", "ids"], ["b"], name="/books"),
        helper.make_node("ReduceSum", ["b", "first"], ["c"], name="/sum", keepdims=0),
        helper.make_node("Gather", ["heads", "ids"], ["all"], name="/heads", axis=1),
        helper.make_node("ReduceSum", ["all", "first"], ["d"], name="/heads/sum", keepdims=0),
        helper.make_node("GatherND", ["books", "places"], ["e"], name="/nd"),
        helper.make_node("Gather", ["both", "expert"], ["f"], name="/both"),
        helper.make_node("MatMul", ["a", "f"], ["g"], name="/picked"),
        helper.make_node("Gather", ["experts", "expert"], ["h"], name="/expert"),
        helper.make_node("Transpose", ["h"], ["i"], perm=[1, 0]),
        helper.make_node("MatMul", ["g", "i"], ["j"], name="/turned"),
        helper.make_node("Sum", ["c", "d", "e", "f", "j"], ["y"], name="/all"),
    ]
    shapes = {"w": (4, 4), "books": (9, 4, 4), "heads": (4, 9, 4)}
    shapes |= {"both": (3, 4, 4), "experts": (3, 4, 4)}
    constants = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    constants |= {"first": np.array([1])}
    inputs = [("x", TensorProto.FLOAT, [4, 4]), ("ids", TensorProto.INT64, [4])]
    inputs += [("expert", TensorProto.INT64, []), ("places", TensorProto.INT64, [4, 2])]
    found = slotted(graph_of(nodes, inputs, constants), "lora", "embedding").unslotted
    told = {
        name: f"{operator}: it reads its constant of shape {shape} {how}; "
        "a Gather of a matrix along axis 0 takes a slot"
        for name, operator, shape, how in (
            ("/books", "Gather", (9, 4, 4), "along axis 0"),
            ("/heads", "Gather", (4, 9, 4), "along axis 1"),
            ("/nd", "GatherND", (9, 4, 4), "by coordinates"),
            ("/both", "Gather", (3, 4, 4), "along axis 0"),
        )
    }
    picked = "MatMul: its weight is one of several, picked in the run"
    assert found == told | {"/picked": picked, "/turned": picked}


def test_weights_in_attributes_are_listed(slotted):
    """What only scales an input is no weight that an adapter could change."""
    settings = {"domain": "ai.onnx.ml", "offset": [0.0], "scale": [2.0]}
    learned = {"domain": "ai.onnx.ml", "coefficients": [0.5] * 12, "intercepts": [0.0] * 3}
    nodes = [
        helper.make_node("Scaler", ["x"], ["s"], name="scaler", **settings),
        helper.make_node("MatMul", ["s", "w"], ["a"], name="/layer/MatMul"),
        helper.make_node("LinearRegressor", ["a"], ["y"], name="regressor", targets=3, **learned),
    ]
    constants = {"w": np.ones((4, 4), np.float32)}
    model = graph_of(nodes, [("x", TensorProto.FLOAT, ["n", 4])], constants)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    why = "ai.onnx.ml.LinearRegressor: its weights are attributes, not constants of the graph"
    assert slotted(model, "lora").unslotted == {"regressor": why}


def test_recurrent_layers_and_transposed_convolutions_whose_weights_are_computed(slotted):
    """PyTorch puts the gates of an ``LSTM`` together from slices; weight norm scales kernels."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/linear/MatMul"),
        helper.make_node("Unsqueeze", ["a", "zero"], ["sequence"]),
        helper.make_node("Concat", ["gates", "gates"], ["W"], axis=1),
        helper.make_node("Concat", ["again", "again"], ["R"], axis=1),
        helper.make_node(
            "LSTM", ["sequence", "W", "R"], ["", "h"], name="/rnn/LSTM", hidden_size=4
        ),
        helper.make_node("Mul", ["kernel", "scale"], ["normed"]),
        helper.make_node("Transpose", ["h"], ["channels"], perm=[1, 2, 0]),
        helper.make_node("ConvTranspose", ["channels", "normed"], ["up"], name="/up/ConvTranspose"),
        helper.make_node("Squeeze", ["up", "two"], ["y"]),
    ]
    shapes = {"w": (4, 4), "gates": (1, 8, 4), "again": (1, 8, 4), "kernel": (4, 3, 1)}
    constants = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    constants |= {"zero": np.array([0]), "two": np.array([2]), "scale": np.float32([[[2.0]]])}
    inputs = [("x", TensorProto.FLOAT, ["n", 4])]
    made = slotted(graph_of(nodes, inputs, constants), "lora")
    assert made.unslotted == {
        "/rnn/LSTM": "LSTM: a recurrent layer's projections are inside the operator",
        "/up/ConvTranspose": "ConvTranspose: transposed convolutions have no slots",
    }
    assert [slot.name for slot in made.slots] == ["linear"]


def test_kernels_in_blocks_are_told(slotted):
    """As ONNX Runtime saves a model that it optimized for a processor with AVX."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="/layer/MatMul"),
        helper.make_node("Conv", ["image", "k"], ["z"], name="b", domain="com.microsoft.nchwc"),
    ]
    inputs = [("x", TensorProto.FLOAT, [4, 4]), ("image", TensorProto.FLOAT, [1, 16, 3, 3])]
    constants = {"w": np.ones((4, 4), np.float32), "k": np.ones((16, 16, 1, 1), np.float32)}
    model = graph_of(nodes, inputs, constants)
    model.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    found = slotted(model, "lora").unslotted
    assert list(found) == ["b"]
    assert found["b"].startswith("com.microsoft.nchwc.Conv: its kernel lies in blocks made for")


def matrix_info(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def test_layers_in_one_constant_that_a_scan_goes_through_are_listed(slotted):
    """As ``jax.lax.scan`` over layers is exported; what the body only carries is no weight."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "own"], ["b"], name="/layers/MatMul"),
            helper.make_node("MatMul", ["b", "h"], ["scores"], name="/scores"),
            helper.make_node("MatMul", ["scores", "b"], ["next"], name="/values"),
        ],
        "layer",
        [matrix_info("h", 4, 4), matrix_info("own", 4, 4)],
        [matrix_info("next", 4, 4)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/first/MatMul"),
        helper.make_node("Scan", ["a", "layers"], ["y"], body=body, num_scan_inputs=1),
    ]
    random = np.random.default_rng(0)
    shapes = {"w": (4, 4), "layers": (3, 4, 4)}
    constants = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    made = slotted(graph_of(nodes, [("x", TensorProto.FLOAT, [4, 4])], constants), "lora")
    assert [slot.name for slot in made.slots] == ["first"]
    picked = "MatMul: its weight is one of several, picked in the run"
    assert made.unslotted == {"/layers/MatMul": picked}


def test_a_weight_in_each_branch_is_listed(slotted):
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Identity", [name], [f"{name}_out"])],
            name,
            [],
            [matrix_info(f"{name}_out", 4, 4)],
        )
        for name in ("then", "else")
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/first/MatMul"),
        helper.make_node("If", ["wide"], ["own"], **branches),
        helper.make_node("MatMul", ["a", "own"], ["y"], name="/second/MatMul"),
    ]
    random = np.random.default_rng(0)
    constants = {
        name: random.standard_normal((4, 4)).astype(np.float32) for name in ("w", "then", "else")
    }
    inputs = [("x", TensorProto.FLOAT, [4, 4]), ("wide", TensorProto.BOOL, [])]
    made = slotted(graph_of(nodes, inputs, constants), "lora")
    assert [slot.name for slot in made.slots] == ["first"]
    picked = "MatMul: its weight is one of several, picked in the run"
    assert made.unslotted == {"/second/MatMul": picked}


@pytest.mark.parametrize("operator", ["Gemm", "MatMul", "Conv"])
def test_weights_that_are_asked_for_in_every_run_are_listed(slotted, operator):
    """What attention multiplies may be an input, too, and is no weight."""
    image = operator == "Conv"
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/first/MatMul"),
        helper.make_node("MatMul", ["x", "keys"], ["b"], name="/scores"),
        helper.make_node(operator, ["image" if image else "a", "given"], ["c"], name="/own"),
        helper.make_node("Identity", ["a"], ["y"]),
    ]
    square, kernel = [4, 4], [4, 4, 1, 1]
    inputs = [
        ("x", TensorProto.FLOAT, square),
        ("keys", TensorProto.FLOAT, ["batch", 4, 4]),
        ("image", TensorProto.FLOAT, [1, 4, 5, 5]),
        ("given", TensorProto.FLOAT, kernel if image else square),
    ]
    made = slotted(graph_of(nodes, inputs, {"w": np.ones((4, 4), np.float32)}), "lora", "conv")
    assert [slot.name for slot in made.slots] == ["first"]
    why = f"{operator}: its weight is an input of the graph, which stores none"
    assert made.unslotted == {"/own": why}
