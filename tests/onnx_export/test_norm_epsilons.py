"""Norms of a graph add to the variance what the model's own add."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, run
from tiny_llm import SIZES

from converters.onnx.exporters.norm_epsilons import set_norm_epsilons

WIDTH, OWN, BUILDERS = 32, 1e-3, 1e-6
X = np.random.default_rng(0).normal(0, 0.02, (3, WIDTH)).astype(np.float32)  # as embeddings are


def graph():
    """Both kinds of norm that the builder writes, with what it takes for an unknown epsilon."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "w"], ["a"], epsilon=BUILDERS),
        helper.make_node(
            "SkipLayerNormalization",
            ["x", "a", "w"],
            ["y"],
            domain="com.microsoft",
            epsilon=BUILDERS,
        ),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in "xy"]
    ones = numpy_helper.from_array(np.ones(WIDTH, np.float32), "w")
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [ones])
    return ir.from_proto(helper.make_model(made, opset_imports=DOMAINS, ir_version=10))


def expected(epsilon):
    def norm(x):
        return torch.nn.functional.layer_norm(x, (WIDTH,), eps=epsilon)

    x = torch.from_numpy(X).double()
    return norm(x + norm(x)).numpy()


def tiny(name, **settings):
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = getattr(transformers, f"{name}Config")(**sizes, **settings)
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("name", "key"),
    [("Phi", "layer_norm_eps"), ("Nemotron", "norm_eps"), ("Llama", "rms_norm_eps")],
)
def test_a_graph_has_the_epsilon_of_its_model(name, key):
    made = graph()
    np.testing.assert_allclose(run(ir.to_proto(made), x=X), expected(BUILDERS), atol=1e-5)
    set_norm_epsilons(made, tiny(name, **{key: OWN}))
    got = run(ir.to_proto(made), x=X)
    np.testing.assert_allclose(got, expected(OWN), atol=1e-5)
    assert np.abs(got - expected(BUILDERS)).max() > 1e-3  # the control


def test_norms_of_queries_and_keys_inside_attention_have_it_too():
    node = helper.make_node("GroupQueryAttention", ["q"], ["y"], qk_norm_epsilon=BUILDERS)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in "qy"]
    made = ir.from_proto(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:])))
    set_norm_epsilons(made, tiny("Llama", rms_norm_eps=OWN))
    assert made.graph[0].attributes["qk_norm_epsilon"].value == pytest.approx(OWN)


@pytest.mark.parametrize("epsilons", [(OWN, 1e-4), ()])
def test_a_model_without_one_epsilon_for_all_changes_nothing(epsilons):
    made = graph()
    norms = [torch.nn.LayerNorm(WIDTH, eps=epsilon) for epsilon in epsilons]
    set_norm_epsilons(made, torch.nn.ModuleList(norms))
    np.testing.assert_allclose(run(ir.to_proto(made), x=X), expected(BUILDERS), atol=1e-5)
