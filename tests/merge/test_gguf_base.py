"""Bases in GGUF files: dequantized as transformers does, a stretch at a time."""

import json
import os
import sys
import warnings

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from llama_gguf import add_vocabulary, tiny_decoder, write_gguf_base
from merge_bases import load_merged, run_merge, write_adapter
from peft_cases import Case, load_with_peft, logits, make_case
from safetensors.torch import load_file

from converters.merge import MergeOptions, make_plan
from loraport.base.checkpoint import Checkpoint
from loraport.base.finding import resolve_base
from loraport.base.gguf import model as gguf_model
from loraport.cli import cli
from loraport.errors import LoraportError

_TARGETS = {
    "llama": ["q_proj", "k_proj", "down_proj", "embed_tokens"],
    "qwen2": ["q_proj", "v_proj", "up_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path / "cache"))


def with_transformers(file):
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()


@pytest.mark.parametrize("small", [0, 1 << 16], ids=["rows", "whole"])
@pytest.mark.parametrize("quantized", [None, "Q8_0", "F16"])
@pytest.mark.parametrize("model_type", sorted(_TARGETS))
def test_merged_is_what_peft_computes(
    model_type, quantized, small, tmp_path, merge_into, monkeypatch
):
    """Both ways of reading: row by row, and whole where rows are not what moves."""
    monkeypatch.setattr(gguf_model, "_SMALL", small)
    file = write_gguf_base(tiny_decoder(model_type), tmp_path / "base.gguf", quantized)
    base = with_transformers(file)
    options = {"target_modules": _TARGETS[model_type], "r": 4, "lora_alpha": 6}
    made = make_case(Case(lambda: base, options), tmp_path / "adapter", base=base)
    plan = merge_into(file, tmp_path / "merged", made.path)
    assert plan.notes[0].startswith("the base was quantized (GGUF)")
    before = base.state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        changed = any(tensor.name == name and tensor.changes for tensor in plan.tensors)
        assert changed or torch.equal(tensor, before[name]), name
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    got = logits(load_merged(made, tmp_path / "merged"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert (got - logits(base)).abs().max() > 0.01


def write_moe(path, inner=768):
    """A tiny Qwen3-MoE: experts stacked, gate and up apart, which transformers holds as one.

    Its own reader takes the experts for 768 wide, whatever the file says.
    """
    hidden, experts, heads = 32, 4, 4
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    add_vocabulary(writer, 300)
    shapes = {"token_embd": (300, hidden), "output": (300, hidden), "output_norm": (hidden,)}
    for layer in range(2):
        block = {
            "attn_q": (32, hidden),
            "attn_k": (16, hidden),
            "attn_v": (16, hidden),
            "attn_output": (hidden, 32),
            "attn_q_norm": (8,),
            "attn_k_norm": (8,),
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, inner, hidden),
            "ffn_up_exps": (experts, inner, hidden),
            "ffn_down_exps": (experts, hidden, inner),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32) * 0.3
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("small", [0, 1 << 16], ids=["rows", "whole"])
def test_mixture_of_experts(small, tmp_path, merge_into, monkeypatch):
    monkeypatch.setattr(gguf_model, "_SMALL", small)
    file = write_moe(tmp_path / "base.gguf")
    base = with_transformers(file)
    options = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "r": 3,
    }
    made = make_case(Case(lambda: base, options), tmp_path / "adapter", base=base)
    merge_into(file, tmp_path / "merged", made.path)
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    got = logits(load_merged(made, tmp_path / "merged"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert (got - logits(base)).abs().max() > 0.01


def test_experts_are_as_wide_as_the_file_says(tmp_path):
    file = write_moe(tmp_path / "base.gguf", inner=40)
    found = load_file(resolve_base(str(file)) / "model.safetensors")
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    halves = [stored[f"blk.1.ffn_{half}_exps.weight"] for half in ("gate", "up")]
    joined = torch.from_numpy(np.concatenate(halves, axis=1))
    assert torch.equal(found["model.layers.1.mlp.experts.gate_up_proj"], joined)


def test_any_stretch_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model, "_SMALL", 0)
    model = gguf_model.GgufModel(write_moe(tmp_path / "base.gguf"))
    for weight in model.weights.values():
        total = int(np.prod(weight.shape))
        whole = model.read(weight, 0, total)
        for start, count in ((0, 1), (5, 40), (total - 7, 7), (total // 2, total // 3)):
            assert np.array_equal(model.read(weight, start, count), whole[start : start + count])


def test_as_a_directory_for_other_commands(tmp_path):
    file = write_gguf_base(tiny_decoder("llama"), tmp_path / "base.gguf", "Q8_0")
    directory = resolve_base(str(file))
    expected = with_transformers(file).state_dict()
    found = load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (directory / "tokenizer.json").is_file()
    assert resolve_base(str(file)) == directory


def test_inspect_tells_a_model_from_an_adapter(tmp_path):
    file = write_gguf_base(tiny_decoder("llama"), tmp_path / "base.gguf", "Q8_0")
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(file), "--json"]).stdout)
    assert shown["kind"] == "GGUF model"
    matrices, vectors = 2 * 7 + 2, 2 * 2 + 1
    assert shown["facts"] == {
        "tensors": matrices + vectors,
        "size": shown["facts"]["size"],
        "types": f"Q8_0 ×{matrices}, F32 ×{vectors}",
        "architecture": "llama",
        "layers": 2,
    }
    rows = {row["tensor"]: row for row in shown["rows"]}
    row = rows["blk.1.ffn_down.weight"]
    assert (row["type"], row["shape"], row["size"]) == ("Q8_0", "[64, 96]", "6.5 kB")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoraportError, match=r"base\.gguf: expected a GGUF file, got damage"):
        CliRunner().invoke(cli, ["inspect", str(file)], catch_exceptions=False)


def test_files_of_one_name_size_and_time_are_two_bases(tmp_path):
    """As layers of container images have them."""
    found = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        model = tiny_decoder("llama")
        torch.nn.init.constant_(model.model.norm.weight, 1.0 + number)
        file = write_gguf_base(model, tmp_path / str(number) / "model.gguf")
        os.utime(file, ns=(1, 1))
        found.append(load_file(resolve_base(str(file)) / "model.safetensors"))
    assert (found[0]["model.norm.weight"] == 1).all()
    assert (found[1]["model.norm.weight"] == 2).all()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """0.9 GB of float32 out of a sparse file; the largest weight is 134 MB of it."""
    hidden, inner, layers = 2048, 16384, 2
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(16)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // 16)
    writer.add_vocab_size(300)
    add_vocabulary(writer, 300)
    shapes = {"token_embd": (300, hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        block = {
            **dict.fromkeys(("attn_q", "attn_output"), (hidden, hidden)),
            **dict.fromkeys(("attn_k", "attn_v"), (hidden // 4, hidden)),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (inner, hidden)),
            "ffn_down": (hidden, inner),
            **dict.fromkeys(("attn_norm", "ffn_norm"), (hidden,)),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    kinds = gguf.GGMLQuantizationType
    stored = 0
    for name, shape in shapes.items():
        kind = kinds.Q8_0 if len(shape) > 1 else kinds.F32
        packed = (*shape[:-1], shape[-1] // 32 * 34) if kind is kinds.Q8_0 else shape
        nbytes = int(np.prod(packed)) * (1 if kind is kinds.Q8_0 else 4)
        dtype = np.uint8 if kind is kinds.Q8_0 else np.float32
        writer.add_tensor_info(f"{name}.weight", packed, np.dtype(dtype), nbytes, raw_dtype=kind)
        stored += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (tmp_path / "base.gguf").open("r+b") as stream:
        begin = stream.seek(0, 2)
        stream.truncate(-(-begin // 32) * 32 + stored)
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    a, b = torch.ones(2, inner), torch.ones(hidden, 2)
    write_adapter(tmp_path / "adapter", {key.format("A"): a, key.format("B"): b})
    code, messages, peak = run_merge(tmp_path, base="base.gguf")
    assert code == 0, messages
    largest = hidden * inner * 4
    assert sum(int(np.prod(shape)) for shape in shapes.values()) * 4 > 6 * largest
    assert peak < 2 * largest + 600 * 10**6
    merged = Checkpoint(tmp_path / "out")
    assert torch.equal(
        merged.load("model.layers.1.mlp.down_proj.weight"), torch.full((hidden, inner), 4.0)
    )
    assert not merged.load("model.layers.0.mlp.down_proj.weight").any()


def test_dry_run_tells_merged_weights_from_those_only_dequantized(tmp_path):
    file = write_gguf_base(tiny_decoder("llama"), tmp_path / "base.gguf", "Q8_0")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    a, b = torch.ones(2, 96), torch.ones(64, 2)
    write_adapter(tmp_path / "adapter", {key.format("A"): a, key.format("B"): b})
    command = ["merge", str(file), str(tmp_path / "adapter"), "--dry-run", "--json"]
    document = json.loads(CliRunner().invoke(cli, command).stdout)
    assert [each["tensor"] for each in document["changed"]] == [
        "model.layers.0.mlp.down_proj.weight"
    ]
    others = len(plan(file, tmp_path / "adapter").tensors) - 1
    assert (document["copied"], document["dequantized"]) == (0, others)


def damaged_number(sound, key, gap, value, size=4):
    """Replace the number of ``size`` bytes that lies ``gap`` bytes behind a key."""
    begin = sound.index(key) + len(key) + gap
    return sound[:begin] + value.to_bytes(size, "little") + sound[begin + size :]


def test_the_header_is_read_once(tmp_path, monkeypatch):
    """Of a real model, with its hundred thousand words, each reading takes many seconds."""
    file = write_gguf_base(tiny_decoder("llama"), tmp_path / "base.gguf")
    made = []
    for kind in (gguf.GGUFReader, gguf.TensorNameMap):

        def counted(self, *rest, _kind=kind, _init=kind.__init__):
            made.append(_kind)
            _init(self, *rest)

        monkeypatch.setattr(kind, "__init__", counted)
    reader = gguf.GGUFReader
    gguf_model.GgufModel(file)
    assert made == [gguf.GGUFReader, gguf.TensorNameMap]
    assert gguf.GGUFReader is reader


def test_a_part_of_a_split_file_says_so(tmp_path):
    """As llama.cpp's gguf-split writes large models."""
    split = {"split.count": 3, "split.no": 0}
    file = write_gguf_base(tiny_decoder("llama"), tmp_path / "base.gguf")
    writer = gguf.GGUFWriter(tmp_path / "base-00001-of-00003.gguf", "llama")
    for key, value in split.items():
        writer.add_uint16(key, value)
    for tensor in gguf.GGUFReader(file).tensors[:3]:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoraportError, match=r"one of 3 parts .*llama-gguf-split --merge"):
        resolve_base(str(tmp_path / "base-00001-of-00003.gguf"))


def test_mixtral_is_told_by_what_it_is(tmp_path):
    """Its architecture in a file is Llama's, and only the counts of experts tell it."""
    counts = {"expert_count": 8, "expert_used_count": 2}
    file = write_gguf_base(tiny_decoder("llama"), tmp_path / "base.gguf", fields=counts)
    with pytest.raises(LoraportError, match=r"with 8 experts \(Mixtral\).* the file was made of"):
        resolve_base(str(file))


def test_types_that_are_not_dequantized_are_told_with_their_tensors(tmp_path):
    file = write_gguf_base(tiny_decoder("llama"), tmp_path / "base.gguf", "F16")
    sound = file.read_bytes()
    behind = 4 + 2 * 8  # the number of dimensions, and both
    for name in (b"blk.0.ffn_up.weight", b"blk.1.ffn_down.weight"):
        sound = damaged_number(sound, name, behind, int(gguf.GGMLQuantizationType.I16))
    file.write_bytes(sound)
    with pytest.raises(LoraportError, match="dequantizes, got I16") as refused:
        resolve_base(str(file))
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_down.weight"):
        assert f"{name}: expected a type that the gguf package dequantizes" in str(refused.value)
    file.write_bytes(damaged_number(sound, b"blk.1.ffn_up.weight", behind, 999))
    with pytest.raises(LoraportError, match=r"blk\.1\.ffn_up\.weight: expected .*number 999"):
        resolve_base(str(file))


def plan(file, adapter):
    return make_plan(MergeOptions(base=str(file), adapters=((adapter, 1.0),)))


def test_damaged_files_are_one_error(tmp_path):
    file = write_gguf_base(tiny_decoder("llama"), tmp_path / "base.gguf")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    a, b = torch.ones(2, 96), torch.ones(64, 2)
    write_adapter(tmp_path / "adapter", {key.format("A"): a, key.format("B"): b})
    assert plan(file, tmp_path / "adapter").tensors
    sound = file.read_bytes()
    for damaged in (
        sound[:-100],
        sound[:5000],
        sound[:16] + (1 << 63).to_bytes(8, "little") + sound[24:],
        sound.replace(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight"),
        sound.replace(b"general.architecture", b"general.architectura"),
        damaged_number(sound, b"llama.block_count", 4, 1 << 30),  # each layer takes its time
        damaged_number(sound, b"blk.1.ffn_up.weight", 4 + 2 * 8 + 4, 0, size=8),  # onto the first
    ):
        file.write_bytes(damaged)
        with pytest.raises(LoraportError, match=r"base .*base\.gguf"):
            plan(file, tmp_path / "adapter")
    file.write_bytes(sound.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ap.weight"))
    with pytest.raises(LoraportError, match=r"ffn_ap.weight .* none of the model's weights"):
        plan(file, tmp_path / "adapter")
