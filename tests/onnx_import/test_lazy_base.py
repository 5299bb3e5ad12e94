"""``--base`` looks at a checkpoint tensor by tensor; nothing of it is loaded as a whole."""

import json
import logging
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from peft_cases import gpt2, llama

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.modules.base_modules import modules_of, open_base_modules
from loraport.base.checkpoint import Checkpoint
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime


def save(model, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path, **options)
    return str(path)


@pytest.fixture
def reads(monkeypatch):
    """The tensors that are read, in order; loading a model is a fault."""
    names = []
    original = Checkpoint.load_part

    def load_part(self, name, *part):
        names.append(name)
        return original(self, name, *part)

    def refuse(*_args, **_kwargs):
        raise AssertionError("the whole model is loaded")

    monkeypatch.setattr(Checkpoint, "load_part", load_part)
    monkeypatch.setattr("loraport.base.loading.load_model", refuse)
    return names


@pytest.mark.parametrize("make", [llama, lambda: llama(tie=True), gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_are_those_of_the_loaded_model(make, dtype, tmp_path, reads):
    torch.manual_seed(0)
    model = make().to(dtype)
    base = save(model, tmp_path / "base", max_shard_size="20KB")
    found = open_base_modules(base)
    assert reads == []
    expected = modules_of(model)
    assert list(found.modules) == list(expected.modules)
    for path, module in found.modules.items():
        own = expected.modules[path]
        assert module.kind is own.kind
        assert (module.out_features, module.in_features) == (own.out_features, own.in_features)
        assert torch.equal(module.weight, own.weight)
        assert torch.equal(module.rows(1, 3), own.weight[1:3])
    stored = [module.stored for module in found.modules.values()]
    tied = [module.stored for module in expected.modules.values()]
    assert len(set(stored)) == len(set(tied))
    paths = list(found.modules)
    assert found.fingerprint(paths).modules == expected.fingerprint(paths).modules


def test_only_what_may_fit_is_read(bert_onnx, made_bert, tmp_path, reads):
    base = save(made_bert.fresh_base(), tmp_path / "base")
    import_model(bert_onnx, tmp_path / "out", ImportOptions(base=base))
    linear = {name for name, m in made_bert.base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(read_manifest(tmp_path / "out").slots.modules()) == linear
    # Embeddings and norms are not asked for.
    assert {name.removesuffix(".weight") for name in reads} == linear


def test_a_base_that_only_transformers_can_read_is_loaded(bert_onnx, made_bert, tmp_path):
    base = tmp_path / "base"
    save(made_bert.fresh_base(), base)
    torch.save(made_bert.fresh_base().state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    import_model(bert_onnx, tmp_path / "out", ImportOptions(base=str(base)))
    assert len(read_manifest(tmp_path / "out").slots.modules()) == 14


def test_a_damaged_base_is_refused(bert_onnx, made_bert, tmp_path):
    base = tmp_path / "base"
    save(made_bert.fresh_base(), base)
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(LoraportError, match="cannot be read"):
        import_model(bert_onnx, tmp_path / "out", ImportOptions(base=str(base)))


@pytest.mark.parametrize("kind", ["int8", "fused int8", "static"])
def test_names_lost_and_weights_rounded(bert_onnx, made_bert, kind, tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    source = bert_onnx
    logging.disable(logging.WARNING)
    if kind == "fused int8":
        fused = optimize_model(str(source), "bert", num_heads=4, hidden_size=32, opt_level=0)
        source = tmp_path / "fused.onnx"
        fused.save_model_to_file(str(source))
    file = tmp_path / "int8.onnx"
    quantize_dynamic(
        source,
        file,
        weight_type=QuantType.QInt8,
        per_channel=kind == "static",
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    logging.disable(logging.NOTSET)
    nameless = onnx.load(file)
    renamed = {}
    for number, tensor in enumerate(nameless.graph.initializer):
        renamed[tensor.name] = tensor.name = f"w{number}" if tensor.dims else tensor.name
    names = [tensor.name for tensor in onnx.load(file).graph.initializer]
    changed = dict(zip(names, (t.name for t in nameless.graph.initializer), strict=True))
    for number, node in enumerate(nameless.graph.node):
        node.name = f"n{number}"
        node.input[:] = [changed.get(name, name) for name in node.input]
    onnx.save(nameless, file)
    base = save(made_bert.fresh_base(), tmp_path / "base")
    import_model(file, tmp_path / "out", ImportOptions(base=base))
    linear = {name for name, m in made_bert.base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(read_manifest(tmp_path / "out").slots.modules()) == linear
    add_adapters(tmp_path / "out", {"a": read_adapter(made_bert.path)})
    ids = np.random.default_rng(1).integers(1, 61, (3, 5))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    runtime = Runtime(tmp_path / "out")
    moved = runtime.run(inputs, "a")["logits"] - runtime.run(inputs)["logits"]
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        expected = made_bert.peft_model(**tensors).logits - made_bert.base.eval()(**tensors).logits
    size = np.linalg.norm(expected)
    assert np.linalg.norm(moved - expected.numpy()) < 0.3 * size
    assert size > 0.05


SCRIPT = """
import re, sys
from pathlib import Path
from converters.onnx.modules.base_modules import open_base_modules
from converters.onnx.importing import ImportOptions, slot_graph
from converters.onnx.graph.source_graph import read_graph
model = read_graph(Path(sys.argv[1]))
from transformers import LlamaForCausalLM  # what the measured part needs is there already
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
base = open_base_modules(sys.argv[2])
made = slot_graph(model, ImportOptions(), base)
print(len(made.slotted.slots.slots), peak() - before)
"""
HIDDEN, LAYERS = 1024, 12


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_base_takes_little_memory(tmp_path):
    """200 MB of weights, each projection found by its values, in a fraction of that."""
    from onnx import TensorProto, helper
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)
    head = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(head | sizes | heads))
    tensors, nodes, weights, x = {}, [], [], "x"
    with (tmp_path / "w.bin").open("wb") as data:
        for layer in range(LAYERS):
            for leaf in ("q", "k", "v", "o"):
                weight = torch.randn(HIDDEN, HIDDEN, generator=random)
                tensors[f"model.layers.{layer}.self_attn.{leaf}_proj.weight"] = weight
                tensor = TensorProto(name=f"w{len(nodes)}", dims=[HIDDEN, HIDDEN], data_type=1)
                tensor.data_location = TensorProto.EXTERNAL
                length = 4 * HIDDEN * HIDDEN
                place = {"location": "w.bin", "offset": data.tell(), "length": length}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                data.write(weight.T.contiguous().numpy().tobytes())
                weights.append(tensor)
                nodes.append(helper.make_node("MatMul", [x, tensor.name], [f"y{len(nodes)}"]))
                x = nodes[-1].output[0]
    save_file(tensors, base / "model.safetensors")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", HIDDEN])
        for name in ("x", x)
    ]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "m.onnx")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "m.onnx"), str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    slots, grown = map(int, done.stdout.split())
    assert slots == 4 * LAYERS
    assert grown < 120
