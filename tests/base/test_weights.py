"""Single weights of bases that are quantized or cannot be loaded."""

import json

import pytest
import torch
from command_line import command
from peft_cases import bert
from safetensors.torch import load_file, save_file
from tiny_llm import save_base

from converters.onnx import export_base
from converters.onnx.exporters.loading import load_exported
from loraport.base.loading import load_causal_lm, load_model
from loraport.base.weights import StoredWeights
from loraport.errors import LoraportError

BLOCK = 16
NAME = "model.layers.1.mlp.down_proj.weight"  # [32, 48]: two blocks by three


def quantize(base, settings, change):
    """Replace the linear weights of a base by what ``change`` makes of them."""
    file = base / "model.safetensors"
    stored = {}
    for name, tensor in load_file(file).items():
        stored |= change(name, tensor) if name.endswith("_proj.weight") else {name: tensor}
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def in_blocks(name, weight):
    """DeepSeek's: float8 and a scale a block, slowly."""
    codes, scales = torch.zeros_like(weight), torch.zeros([-(-n // BLOCK) for n in weight.shape])
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            of = (
                slice(row * BLOCK, (row + 1) * BLOCK),
                slice(column * BLOCK, (column + 1) * BLOCK),
            )
            scales[row, column] = weight[of].abs().max() / 448 * (1 + row + column)
            codes[of] = weight[of] / scales[row, column]
    return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def test_float8_in_blocks_is_read_with_its_scales(tmp_path):
    base = save_base(tmp_path / "base")
    weight = load_file(base / "model.safetensors")[NAME]
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    quantize(base, settings | {"activation_scheme": "dynamic"}, in_blocks)
    parts = in_blocks(NAME, weight)
    codes, scales = parts[NAME].double(), parts[f"{NAME}_scale_inv"].double()
    wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    read = StoredWeights(str(base)).parameter(NAME).double()
    torch.testing.assert_close(read, codes * wide, rtol=2**-23, atol=0)  # one product in float32
    assert ((codes - read).abs() > read.abs()).float().mean() > 0.9  # the codes alone are others


def test_codes_are_no_weights(tmp_path):
    """A DoRA magnitude over the norm of int8 codes would be a thousandth of what it is."""
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base")

    def rows(name, weight):
        scale = weight.abs().amax(1)
        codes = (weight / scale[:, None] * 127).round().to(torch.int8)
        return {name: codes, name.replace(".weight", ".SCB"): scale}

    quantize(base, {"quant_method": "bitsandbytes", "load_in_8bit": True}, rows)
    weights = StoredWeights(str(base))
    with pytest.raises(LoraportError, match=rf"{NAME}: expected its numbers .*torch.int8.*--base"):
        weights.parameter(NAME)
    assert weights.parameter("model.norm.weight").shape == (32,)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "torchao"])
def test_a_quantization_whose_package_is_not_here_is_one_sentence(method, tmp_path):
    base = save_base(tmp_path / "base")
    quantize(base, {"quant_method": method, "bits": 4}, lambda name, tensor: {name: tensor})
    with pytest.raises(LoraportError, match=f"base {base}: cannot be loaded: "):
        load_model(str(base))


def test_a_torn_file_is_one_sentence(tmp_path):
    base, rows = save_base(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Ships swap their cargo."}')
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, said = command("eval", base, rows)
    assert code == 2
    assert f"base {base}: cannot be loaded: " in said


def test_a_base_that_lacks_weights_is_refused(tmp_path):
    """transformers draws them at random, and an adapter would be trained on that."""
    base = save_base(tmp_path / "base")
    file = base / "model.safetensors"
    weights = load_file(file)
    codes = {f"{name}_packed" if name == NAME else name: each for name, each in weights.items()}
    save_file(codes, file, metadata={"format": "pt"})
    with pytest.raises(LoraportError, match=f"got none for 1, {NAME} among them; fetch all files"):
        load_causal_lm(str(base))
    with pytest.raises(LoraportError, match=f"{NAME}: expected this parameter in the base"):
        StoredWeights(str(base)).parameter(NAME)
    save_file(weights, file, metadata={"format": "pt"})
    assert torch.equal(load_causal_lm(str(base)).get_parameter(NAME), weights[NAME])
    assert torch.equal(StoredWeights(str(base)).parameter(NAME), weights[NAME])


@pytest.mark.parametrize("decoder", [True, False])
def test_an_export_says_what_a_base_lacks(decoder, tmp_path):
    """A decoder's logits would be random; an encoder's pooler may be of no use. Control: all."""
    base, said = save_base(tmp_path / "base", None if decoder else bert()), []
    file, name = base / "model.safetensors", NAME if decoder else "classifier.bias"
    load_exported(base, said.append)
    assert said == []
    weights = load_file(file)
    save_file({key: weights[key] for key in weights if key != name}, file, {"format": "pt"})
    if decoder:
        with pytest.raises(LoraportError, match=f"got none for 1, {NAME} among them"):
            load_exported(base, said.append)
        return
    load_exported(base, said.append)
    assert said[0].startswith("the base's files lack classifier.bias: drawn at random")


def test_an_export_says_which_class_it_takes_where_none_is_named(tmp_path):
    base, said = save_base(tmp_path / "base"), []
    config = json.loads((base / "config.json").read_text())
    load_exported(base, said.append)
    assert said == []
    del config["architectures"]
    (base / "config.json").write_text(json.dumps(config))
    load_exported(base, said.append)
    assert said[0].endswith(
        "names no class (architectures): exported as LlamaModel, without a head"
    )


def test_what_a_base_lacks_is_the_same_each_time(tmp_path):
    """Else a bundle made with it belongs to another base as soon as it is verified."""
    base, name = save_base(tmp_path / "base", bert()), "classifier.weight"
    file = base / "model.safetensors"
    weights = load_file(file)
    whole = weights.pop(name)
    save_file(weights, file, {"format": "pt"})
    torch.manual_seed(1)
    first = load_model(str(base)).get_parameter(name)
    drawn = torch.rand(4)
    assert torch.equal(load_model(str(base)).get_parameter(name), first)
    assert first.std() > 0
    assert not torch.equal(first, whole)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(4), drawn)


def test_a_decoder_without_a_kind_is_refused_before_its_graph_is_built(tmp_path):
    """It was told after the build began, in transformers' words. Control: loading needs none."""
    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["model_type"]
    told = []
    for found, remedy in (
        ("LlamaForCausalLM", 'write "model_type": "llama" into it'),
        ("InternLM2ForCausalLM", "fetch it again"),
    ):
        (base / "config.json").write_text(json.dumps(config | {"architectures": [found]}))
        with pytest.raises(LoraportError) as raised:
            export_base(base, tmp_path / "bundle", progress=told.append)
        assert "config.json: model_type: expected the kind of model" in str(raised.value)
        assert remedy in str(raised.value)
        if found == "LlamaForCausalLM":
            load_causal_lm(str(base))
    assert told == []
    assert not (tmp_path / "bundle").exists()
