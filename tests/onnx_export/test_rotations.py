"""Gemma 3: layers of two kinds, each of which rotates by a base of its own."""

import copy

import onnx_ir as ir
import pytest
import torch
import transformers
from tiny_llm import GEMMA, SOME_RANKS, save_adapter, save_base

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_base
from converters.onnx.exporters.flat_rotations import flatten
from converters.onnx.exporters.rotations import require_rotations
from loraport.base.loading import load_model
from loraport.errors import LoraportError
from loraport.parity import verify_bundle

KINDS = ["sliding_attention", "full_attention"]
FULL = {"rope_type": "default", "rope_theta": 1e6}
OWN = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": FULL}


def gemma3(**rotations):
    settings = {"sliding_window": 8, "layer_types": KINDS, "query_pre_attn_scalar": 16}
    config = transformers.Gemma3TextConfig(
        **GEMMA | settings, rope_parameters=copy.deepcopy(OWN | rotations)
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma3")
    base = save_base(directory / "base", gemma3())
    export_base(str(base), directory / "bundle")
    return base, directory / "bundle"


def test_slots_and_parity(exported, tmp_path):
    base, bundle = exported
    adapter = read_adapter(save_adapter(base, SOME_RANKS, tmp_path / "adapter"))
    add_adapters(bundle, {"a": adapter})
    report = verify_bundle(bundle, load_model(str(base)), {"a": adapter})
    assert report.passed, [check for check in report.checks if not check.passed]
    # The control: the same weights with other rotations give other logits.
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        own, other = (each(ids).logits for each in (gemma3(), gemma3(sliding_attention=FULL)))
    assert (own - other).abs().max() > 0.05


@pytest.mark.parametrize(
    ("rotations", "layers"),
    [
        ({}, None),
        ({"sliding_attention": FULL}, "[0]"),
        ({"full_attention": OWN["sliding_attention"]}, "[1]"),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}, "[1]"),
    ],
)
def test_a_graph_that_rotates_otherwise_is_refused(exported, rotations, layers):
    graph = ir.load(exported[1] / "model.onnx")
    model = gemma3(**rotations)
    if layers is None:
        require_rotations(graph, model)
        for node in graph.graph:
            if node.op_type == "GroupQueryAttention":
                node.op_type = "SomeAttention"  # of which nothing is known
        layers = "[0, 1]"
    with pytest.raises(LoraportError) as raised:
        require_rotations(graph, model)
    assert f"expected layers {layers} to rotate as the model's own do" in str(raised.value)


def test_the_builder_is_given_what_it_reads():
    config = flatten(gemma3().config)
    assert config.rope_parameters == FULL
    assert config.rope_local_base_freq == 1e4
    plain = transformers.LlamaConfig()
    before = plain.to_dict()
    assert flatten(plain).to_dict() == before
