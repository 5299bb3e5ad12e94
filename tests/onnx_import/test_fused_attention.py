"""ONNX Runtime's own fused graphs take adapters of the projections that fusion swallowed."""

import logging
import warnings

import numpy as np
import onnx
import pytest
import torch
from peft_cases import load_with_peft

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from loraport.bundle.manifest import read_manifest
from loraport.runtime import Runtime
from loraport.runtime.replay import replay_golden


def arrays():
    ids = np.random.default_rng(1).integers(1, 61, (3, 5))
    mask = np.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def fused(bert_onnx, tmp_path_factory):
    from onnxruntime.transformers.optimizer import optimize_model

    out = tmp_path_factory.mktemp("fused") / "fused.onnx"
    logging.disable(logging.WARNING)
    optimized = optimize_model(str(bert_onnx), "bert", num_heads=4, hidden_size=32, opt_level=0)
    optimized.save_model_to_file(str(out))
    logging.disable(logging.NOTSET)
    assert optimized.get_fused_operator_statistics()["Attention"] == 2
    return out


@pytest.fixture(scope="module")
def base(made_bert, tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made_bert.fresh_base().save_pretrained(out)
    return str(out)


@pytest.fixture(scope="module")
def imported(fused, base, made_bert, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "bundle"
    import_model(fused, out, ImportOptions(base=base))
    add_adapters(out, {"a": read_adapter(made_bert.path)})
    return out


def reference(made_bert):
    peft_model = load_with_peft(made_bert.fresh_base(), made_bert.path).eval()
    tensors = {name: torch.from_numpy(array) for name, array in arrays().items()}
    with torch.no_grad():
        base, adapted = made_bert.fresh_base().eval()(**tensors), peft_model(**tensors)
    return base.logits.numpy(), adapted.logits.numpy()


def test_adapters_of_query_and_value_compute_what_peft_computes(imported, made_bert):
    base, adapted = reference(made_bert)
    runtime = Runtime(imported)
    np.testing.assert_allclose(runtime.run(arrays())["logits"], base, atol=1e-4)
    np.testing.assert_allclose(runtime.run(arrays(), "a")["logits"], adapted, atol=1e-4)
    assert np.abs(adapted - base).max() > 0.05
    packed = [slot for slot in read_manifest(imported).slots.slots if len(slot.members) == 3]
    assert [member.module_path.rpartition(".")[2] for member in packed[0].members] == [
        "query",
        "key",
        "value",
    ]
    assert len(packed) == 2
    operators = [node.op_type for node in onnx.load(imported / "model.onnx").graph.node]
    assert operators.count("MultiHeadAttention") == 2
    assert "Attention" not in operators


def test_nothing_is_left_out_and_the_base_is_bit_for_bit(imported, fused):
    from onnx_graphs import session

    manifest = read_manifest(imported)
    reasons = [reason for reason in manifest.unslotted.values() if "not asked for" not in reason]
    assert [reason.partition(":")[0] for reason in reasons] == [
        "com.microsoft.EmbedLayerNormalization"
    ]
    before = session(str(fused)).run(None, arrays())[0]
    assert np.array_equal(Runtime(imported).run(arrays())["logits"], before)
    assert all(result.passed for result in replay_golden(imported))


def test_without_a_base_the_packed_projection_is_one_module(fused, tmp_path):
    import_model(fused, tmp_path / "out")
    modules = read_manifest(tmp_path / "out").slots.modules()
    assert sum("qkv_weight" in path for path in modules) == 2
    assert all(result.passed for result in replay_golden(tmp_path / "out"))
