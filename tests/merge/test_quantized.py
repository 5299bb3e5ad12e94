"""Quantized bases: dequantized, merged, written as a float checkpoint."""

import json

import pytest
import torch
from call_counts import calls
from peft_cases import llama
from safetensors.torch import load_file, save_file

from converters.merge import MergeOptions, make_plan
from converters.merge.opening import open_base
from converters.merge.sources import open_files
from loraport.base.loading import fingerprint_model
from loraport.errors import LoraportError
from loraport.fingerprint import hash_weight

CODE = torch.tensor([-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, *torch.linspace(0.1, 1, 8)])


def quantize(weight, block, nested):
    """Quantize slowly, element by element, as the format's documentation says."""
    flat = weight.double().flatten().tolist()
    scales = [
        max(abs(value) for value in flat[start : start + block])
        for start in range(0, len(flat), block)
    ]
    parts = {"quant_map": CODE.clone()}
    state = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if nested:
        table = torch.linspace(-1, 1, 256)
        offset = sum(scales) / len(scales)
        widest, codes = [], []
        for start in range(0, len(scales), nested):
            part = [scale - offset for scale in scales[start : start + nested]]
            widest.append(max(map(abs, part)) or 1.0)
            codes += [int((table - scale / widest[-1]).abs().argmin()) for scale in part]
        parts["absmax"] = torch.tensor(codes, dtype=torch.uint8)
        parts["nested_absmax"] = torch.tensor(widest)
        parts["nested_quant_map"] = table
        state |= {"nested_blocksize": nested, "nested_offset": offset}
        scales = [
            float(table[code]) * widest[number // nested] + offset
            for number, code in enumerate(codes)
        ]
    else:
        parts["absmax"] = torch.tensor(scales, dtype=torch.float32)
    codes = [
        int((CODE - value / scales[number // block]).abs().argmin())
        for number, value in enumerate(flat)
    ]
    exact = [CODE[code].item() * scales[number // block] for number, code in enumerate(codes)]
    codes += [0] * (len(codes) % 2)
    packed = [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    stored = {f"fc.weight.{name}": tensor for name, tensor in parts.items()}
    stored["fc.weight"] = torch.tensor(packed, dtype=torch.uint8)[:, None]
    return stored, torch.tensor(exact, dtype=torch.float64).reshape(weight.shape)


def write(path, stored):
    path.mkdir()
    save_file({**stored, "norm.weight": torch.ones(5)}, path / "model.safetensors")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps({"quantization_config": settings}))


def write_adapter(path, rows, columns):
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(2, columns, generator=generator)
    b = torch.randn(rows, 2, generator=generator)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    prefix = "base_model.model.fc.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, path / "adapter_model.safetensors")
    return b.double() @ a.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [0, 4])
@pytest.mark.parametrize("shape", [(9, 7), (16, 24)])
def test_nf4_is_dequantized_and_merged(dtype, nested, shape, tmp_path, merge_into):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    stored, exact = quantize(weight, 8, nested)
    write(tmp_path / "base", stored)
    delta = write_adapter(tmp_path / "adapter", *shape)
    plan = merge_into(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == {"fc.weight", "norm.weight"}
    assert merged["fc.weight"].dtype == dtype
    # The scales are float32: some roundings at 2^-24; then one to the output's dtype.
    precision = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    expected = exact + delta
    bound = expected.abs() * precision + exact.abs() * 2.0**-20
    assert ((merged["fc.weight"].double() - expected).abs() <= bound).all()
    assert not torch.allclose(merged["fc.weight"].double(), weight.double() + delta, atol=1e-2)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert "dequantized" in plan.notes[0]


def test_a_base_is_opened_with_one_look_at_each_name(tmp_path):
    """A mixture has tens of thousands of weights; each looked for its parts among all names."""

    def work(weights):
        stored, _ = quantize(torch.ones(2, 4), 8, 0)
        many = {f"{n}.{k}": part.clone() for n in range(weights) for k, part in stored.items()}
        write(tmp_path / str(weights), many)
        base = open_base(str(tmp_path / str(weights)))
        assert base.sources().keys() == {f"{n}.fc.weight" for n in range(weights)} | {"norm.weight"}
        return calls(open_base, str(tmp_path / str(weights)))

    assert work(128) < 4.4 * work(32)


@pytest.mark.parametrize("nested", [0, 3])
def test_any_stretch_can_be_read(nested, tmp_path):
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    stored, exact = quantize(weight, 8, nested)
    write(tmp_path / "base", stored)
    source = open_base(str(tmp_path / "base")).sources()["fc.weight"]
    with open_files() as files:
        for start in range(0, 63, 5):
            for count in (1, 2, 8, 63 - start):
                count = min(count, 63 - start)
                got = source.read(files, start, count).double()
                wanted = exact.flatten()[start : start + count]
                assert torch.allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("missing", ["absmax", "quant_map"])
def test_missing_parts_are_named(missing, tmp_path):
    stored, _ = quantize(torch.ones(4, 4), 8, 0)
    del stored[f"fc.weight.{missing}"]
    write(tmp_path / "base", stored)
    with pytest.raises(LoraportError, match=r"fc\.weight: expected a whole 4-bit weight"):
        open_base(str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("blocksize", 0),
        ("blocksize", -8),
        ("nested_blocksize", 0),
        ("nested_blocksize", 3),
        ("nested_offset", "much"),
        ("nested_quant_map", torch.linspace(-1, 1, 100)),
        ("nested_absmax", torch.ones(1)),
        ("absmax", torch.full((8,), 200, dtype=torch.int64)),
    ],
)
def test_parts_that_do_not_fit_are_named(part, value, tmp_path):
    stored, _ = quantize(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), 8, 4)
    write(tmp_path / "whole", stored)
    assert "fc.weight" in open_base(str(tmp_path / "whole")).sources()
    if isinstance(value, torch.Tensor):
        stored[f"fc.weight.{part}"] = value
    else:
        name = "fc.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(stored[name].tolist())) | {part: value}
        stored[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    write(tmp_path / "base", stored)
    with pytest.raises(LoraportError, match=r"fc\.weight: expected a whole 4-bit weight"):
        open_base(str(tmp_path / "base"))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_other_quantizations_are_refused(method, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"fc.weight": torch.ones(2, 2)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    options = MergeOptions(base=str(base), adapters=((tmp_path / "adapter", 1.0),))
    write_adapter(tmp_path / "adapter", 2, 2)
    with pytest.raises(LoraportError, match=f"quantized by '{method}'; merge into the float"):
        make_plan(options)


@pytest.mark.parametrize("saved", [True, False])
def test_codes_that_no_config_tells_of_are_no_place_for_a_weight(saved, tmp_path):
    """The weight would be a new tensor beside the codes that it is to replace."""
    base, adapter, name = tmp_path / "base", tmp_path / "adapter", "model.layers.0.mlp.up_proj"
    other = "model.layers.0.mlp.gate_proj"
    base.mkdir()
    codes = {f"{name}.qweight": torch.zeros(1, 9, dtype=torch.int32)}
    norm = {"model.norm.weight": torch.ones(32)}
    save_file({**norm, **codes}, base / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps({**llama().config.to_dict(), **config}))
    adapter.mkdir()
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 32)}
    tensors[f"{name}.lora_B.weight"] = torch.ones(48, 2)
    if saved:
        content["modules_to_save"] = ["up_proj", "gate_proj"]
        tensors = {f"{path}.weight": torch.ones(48, 32) for path in (name, other)}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    prefixed = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(prefixed, adapter / "adapter_model.safetensors")
    options = MergeOptions(base=str(base), adapters=((adapter, 1.0),))
    with pytest.raises(LoraportError, match=r"codes of a quantization, .*qweight, of") as error:
        make_plan(options)
    assert "gate_proj" not in str(error.value)
    if saved:  # the control: without codes it is a new tensor
        save_file(norm, base / "model.safetensors")
        added = {each.name for each in make_plan(options).tensors}
        assert added == {*norm, f"{name}.weight", f"{other}.weight"}


def test_against_bitsandbytes(tmp_path):
    """Rows that are whole blocks: its CPU code dequantizes others differently."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    parts = {f"fc.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    write(tmp_path / "base", {"fc.weight": codes, **parts})
    source = open_base(str(tmp_path / "base")).sources()["fc.weight"]
    with open_files() as files:
        got = source.read(files, 0, weight.numel()).reshape(weight.shape)
    assert torch.equal(got, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_trained_on_a_quantized_base_is_of_its_dequantized_weights(bits, tmp_path):
    """What training records of the loaded layers is what a merge finds in the file."""
    modules = pytest.importorskip("bitsandbytes.nn")
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    if bits == 4:
        layer = modules.Linear4bit(128, 32, bias=False, quant_type="nf4")
        layer.weight = modules.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        layer = modules.Linear8bitLt(128, 32, bias=False, has_fp16_weights=False)
        layer.weight = modules.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    model = torch.nn.ModuleDict({"fc": layer}).to("cpu")
    stored = model.state_dict()
    assert stored["fc.weight"].dtype in (torch.uint8, torch.int8)
    write(tmp_path / "base", stored)
    source = open_base(str(tmp_path / "base")).sources()["fc.weight"]
    with open_files() as files:
        values = source.read(files, 0, weight.numel()).reshape(weight.shape)
    recorded = fingerprint_model(model, ["fc"]).modules["fc"]
    assert recorded == hash_weight(values)
    assert recorded != hash_weight(weight)
    assert (values - weight).abs().max() < 0.6
