"""OLMo's norms in a graph take the mean away, as the model's own do."""

import numpy as np
import onnx_ir as ir
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, run
from tiny_llm import SIZES

from converters.onnx.exporters.olmo_norms import set_olmo_norms

WIDTH = SIZES["hidden_size"]
# Small, as embeddings are, and with a mean: both what is taken away and what is added shows.
X = np.random.default_rng(0).normal(0.01, 0.01, (3, WIDTH)).astype(np.float32)


def graph():
    """Both kinds of norm that the builder writes for OLMo."""
    skip = "SkipSimplifiedLayerNormalization"
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", ["x", "w"], ["a"], axis=-1, epsilon=1e-6),
        helper.make_node(
            skip, ["x", "a", "w"], ["y", "", "", "sum"], domain="com.microsoft", epsilon=1e-6
        ),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH])
        for name in ("x", "y", "sum")
    ]
    ones = numpy_helper.from_array(np.ones(WIDTH, np.float32), "w")
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [ones])
    return ir.from_proto(helper.make_model(made, opset_imports=DOMAINS, ir_version=10))


def tiny(name):
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def test_a_graph_of_olmo_has_its_norms():
    """The model's own norm is the reference; controls: as built, and a Llama's graph stays so."""
    model, made = tiny("Olmo"), graph()
    with torch.no_grad():
        x = torch.from_numpy(X)
        first = model.model.norm(x)
        expected = [model.model.norm(x + first).numpy(), (x + first).numpy()]
    built = run(ir.to_proto(made), x=X)
    set_olmo_norms(made, tiny("Llama"))
    np.testing.assert_array_equal(run(ir.to_proto(made), x=X), built)
    set_olmo_norms(made, model)
    got = run(ir.to_proto(made), x=X)
    np.testing.assert_allclose(got, expected[0], rtol=0, atol=1e-5)
    assert np.abs(got - built).max() > 0.1
    # And what only the epsilon changes: it is in the square root beside a variance of 1e-4.
    exact = torch.nn.functional.layer_norm(x.double(), (WIDTH,), eps=1e-6)
    assert (exact - first).abs().max() > 0.05
