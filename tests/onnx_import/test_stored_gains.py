"""Norms of GenAI's builder, which stores ``w + 1`` where a decoder multiplies by ``1 + w``."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import run

from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.modules.gains_plus_one import gains_plus_one
from converters.onnx.modules.holders import BaseHolders, GraphHolders
from converters.onnx.slots.inserting import SlotOptions
from converters.onnx.slots.replacing import make_replaceable
from loraport.adapter import Adapter, Replacement
from loraport.bundle.base_values import BaseValues
from loraport.errors import LoraportError
from loraport.runtime import Runtime

WIDTH = 6
FIRST, SECOND = (f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention"))
OPTIONS = ImportOptions(slots=SlotOptions(replace=("input_layernorm", "post_attention_layernorm")))
RANDOM = np.random.default_rng(0)
GAINS = {name: RANDOM.normal(0, 0.4, WIDTH).astype(np.float32) for name in (FIRST, SECOND)}
WEIGHT = RANDOM.standard_normal((WIDTH, WIDTH)).astype(np.float32)
X = RANDOM.standard_normal((3, WIDTH)).astype(np.float32)


def save(directory, kind, plus, producer="onnxruntime-genai", gains=GAINS):
    """A layer's two norms as the builder writes them, the second with its residual sum."""
    node = helper.make_node
    nodes = [
        node("SimplifiedLayerNormalization", ["x", FIRST], ["n"], name="/n", epsilon=1e-6),
        node("MatMul", ["n", "w"], ["h"], name="/model/layers.0/attn/o_proj/MatMul"),
        node(
            "SkipSimplifiedLayerNormalization",
            ["x", "h", SECOND],
            ["y"],
            name="/s",
            domain="com.microsoft",
            epsilon=1e-6,
        ),
    ]
    stored = {"w": WEIGHT, **{name: gain + plus for name, gain in gains.items()}}
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in "xy"]
    constants = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], constants),
        opset_imports=opsets,
        ir_version=10,
        producer_name=producer,
    )
    onnx.save(model, directory / "model.onnx")
    if kind is not None:
        text = json.dumps({"model": {"type": kind}})
        (directory / "genai_config.json").write_text(text)


def expected(gains, plus):
    def norm(rows, name):
        square = np.mean(rows**2, axis=-1, keepdims=True)
        return rows / np.sqrt(square + 1e-6) * (gains[name].astype(np.float64) + plus)

    x = X.astype(np.float64)
    return norm(x + norm(x, FIRST) @ WEIGHT, SECOND)


@pytest.mark.parametrize(
    ("kind", "producer", "plus"),
    [
        ("gemma", "onnxruntime-genai", 1),
        ("gemma3_text", "onnxruntime-genai", 1),
        ("qwen3_5_text", "", 1),
        ("llama", "onnxruntime-genai", 0),
        ("gemma4_text", "onnxruntime-genai", 0),
        (None, "another", 0),
    ],
)
def test_a_trained_norm_is_put_in_as_the_graph_holds_it(kind, producer, plus, tmp_path):
    save(tmp_path, kind, plus, producer)
    import_model(tmp_path / "model.onnx", tmp_path / "out", OPTIONS)
    trained = {name: gain + np.float32(0.3) for name, gain in GAINS.items()}
    new = {name: Replacement(torch.from_numpy(gain)) for name, gain in trained.items()}
    add_adapters(tmp_path / "out", {"a": Adapter({}, new)})
    runtime = Runtime(tmp_path / "out", threads=1)
    base, got = (runtime.run({"x": X}, each)["y"] for each in (None, "a"))
    np.testing.assert_allclose(base, expected(GAINS, plus), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, expected(trained, plus), rtol=1e-5, atol=1e-5)
    assert np.abs(got - expected(trained, 1 - plus)).max() > 0.5  # the control
    for name, gain in GAINS.items():
        own = BaseValues(tmp_path / "out")[f"{name}.lora_saved"]
        np.testing.assert_allclose(own, gain, rtol=0, atol=2e-7)


def test_a_norm_of_a_decoder_that_nothing_names_needs_the_base(tmp_path):
    save(tmp_path, None, 1)
    with pytest.raises(LoraportError, match=r"input_layernorm.*genai_config\.json.*--base"):
        import_model(tmp_path / "model.onnx", tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_one_less_and_one_more_would_change_needs_the_base(tmp_path):
    """``1e-9 - 1 + 1`` is 0 in float32: the base would not be the base bit for bit."""
    sums = {FIRST: GAINS[FIRST] + 1, SECOND: np.full(WIDTH, 1e-9, np.float32)}
    save(tmp_path, "gemma", 0, gains=sums)
    with pytest.raises(LoraportError, match=r"post_attention.*rounded; export.*--base") as error:
        import_model(tmp_path / "model.onnx", tmp_path / "out", OPTIONS)
    assert FIRST not in str(error.value)


@pytest.mark.parametrize("added_in", [torch.float32, torch.bfloat16])
def test_with_the_base_a_sum_is_found_whatever_it_was_added_in(added_in, tmp_path):
    """The builder adds in bfloat16 to what is published so; the base stays itself bit for bit."""
    own = torch.from_numpy(GAINS[FIRST]).to(added_in)
    sums = (own + 1).float().numpy()
    assert np.array_equal(sums, own.float().numpy() + 1) == (added_in is torch.float32)
    save(tmp_path, "gemma", 0, gains={FIRST: sums, SECOND: GAINS[SECOND]})
    model = ir.load(tmp_path / "model.onnx")
    before = run(ir.to_proto(model), x=X)
    second = GAINS[SECOND] - 1
    parameters = {FIRST: own.float(), SECOND: torch.from_numpy(second)}
    holders = BaseHolders(model.graph, parameters, (), plus_one=parameters)
    (slot,) = make_replaceable(model.graph, ["input_layernorm"], holders).slots
    assert slot.parameter == FIRST
    proto = ir.to_proto(model)
    np.testing.assert_array_equal(run(proto, x=X), before)
    trained = own.float().numpy() + np.float32(0.3)
    got = run(proto, x=X, **{slot.input: trained})
    np.testing.assert_allclose(
        got, expected({FIRST: trained, SECOND: second}, 1), rtol=1e-5, atol=1e-5
    )
    assert np.abs(got - before).max() > 0.1  # the control


def test_with_the_base_a_sum_in_halves_is_found(tmp_path):
    """The half of the sum is not the sum of the halves, here in the first number."""
    own = torch.tensor([0.22410131990909576, *GAINS[FIRST][1:]])
    sums = (own + 1).half()
    assert (sums != own.half() + 1).any()
    save(tmp_path, "gemma", 0, gains={FIRST: sums.numpy(), SECOND: GAINS[SECOND]})
    model = ir.load(tmp_path / "model.onnx")
    holder = BaseHolders(model.graph, {FIRST: own}, (), plus_one=[FIRST]).find(FIRST)
    assert torch.equal(holder.less_one + 1, sums)
    assert holder.value.name == FIRST


def test_gains_of_queries_and_keys_inside_attention_hold_one_more_too():
    """Graphs for GPUs have no operator for these norms. Control: attention sinks."""
    names = [f"model.layers.0.attn.{leaf}" for leaf in ("sinks", "q_norm.weight", "k_norm.weight")]
    inputs = ["q", *[""] * 10, names[0], "", "", *names[1:]]
    node = helper.make_node("GroupQueryAttention", inputs, ["y"], domain="com.microsoft")
    constants = [numpy_helper.from_array(GAINS[FIRST] + 1, name) for name in names]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in "qy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
    holders = GraphHolders(ir.from_proto(helper.make_model(graph)).graph, [], added_to_gains=1)
    assert holders.find(names[0]).less_one is None
    for name in names[1:]:
        own = holders.find(name).less_one
        np.testing.assert_allclose(own, GAINS[FIRST], rtol=0, atol=2e-7)


def test_norms_that_add_one_are_told_whatever_their_kind():
    """Control: norms that do not, whose bias or weight is all that they give."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    norms = torch.nn.ModuleDict(
        {
            "gemma": GemmaRMSNorm(WIDTH),
            "nemotron": NemotronLayerNorm1P(WIDTH),
            "layer": torch.nn.LayerNorm(WIDTH),
            "rms": torch.nn.RMSNorm(WIDTH),
            "relu": torch.nn.PReLU(WIDTH),
        }
    )
    torch.nn.init.ones_(norms["layer"].bias)
    torch.nn.init.ones_(norms["nemotron"].bias)
    assert list(gains_plus_one(norms)) == ["gemma.weight", "nemotron.weight"]
