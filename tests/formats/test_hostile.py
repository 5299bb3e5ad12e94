"""Damaged and hostile files of every format: one clear error, never another exception."""

import contextlib
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converters.formats.gguf_file import read_gguf, write_gguf
from converters.formats.registry import adapter_formats, read_adapter, write_adapter
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import LoraportError

_PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj")


def _adapter() -> Adapter:
    torch.manual_seed(0)
    return Adapter(
        {
            path: LoraModule(ModuleKind.LINEAR, torch.randn(2, 32), torch.randn(rows, 2), alpha=3)
            for path, rows in zip(_PATHS, (32, 16), strict=True)
        }
    )


@pytest.fixture(scope="module")
def written(case_of, tmp_path_factory):
    """Every format's output, and its weights file: what bytes are flipped in."""
    base = case_of("plain").base
    directory = tmp_path_factory.mktemp("written")
    outputs = {}
    for name in adapter_formats():
        out = directory / name / "adapter"
        write_adapter(_adapter(), out, name, base=base)
        files = sorted(file for file in out.parent.rglob("*") if file.is_file())
        outputs[name] = (out, files)
    return outputs


@pytest.mark.parametrize("name", sorted(adapter_formats()))
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_bytes(name, data, written, tmp_path_factory) -> None:
    """Flip, cut or insert bytes anywhere in any file of the output."""
    original, files = written[name]
    victim = data.draw(st.sampled_from(files))
    content = bytearray(victim.read_bytes())
    # Headers are where lengths, offsets and names stand: half of the damage goes there.
    last = len(content) - 1
    place = st.one_of(st.integers(0, min(400, last)), st.integers(0, last))
    for position in data.draw(st.lists(place, min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(content)))
        content[cut : cut + data.draw(st.integers(1, 64))] = data.draw(st.binary(max_size=16))
    copy = tmp_path_factory.getbasetemp() / f"fuzzed-{name}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original.parent, copy)
    (copy / victim.relative_to(original.parent)).write_bytes(content)
    if data.draw(st.booleans()):
        # Without it, its checksum hides the format's own checks.
        (copy / f"{original.name}.json").unlink(missing_ok=True)
    with contextlib.suppress(LoraportError):
        read_adapter(copy / original.name)


@pytest.mark.parametrize("name", sorted(adapter_formats()))
def test_truncated_anywhere(name, written, tmp_path) -> None:
    original, files = written[name]
    weights = next(file for file in files if not file.name.endswith(".json"))
    content = weights.read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(original.parent, copy)
    target = copy / weights.relative_to(original.parent)
    for length in {0, 1, 7, 8, 9, 24, len(content) // 2, len(content) - 1}:
        target.write_bytes(content[:length])
        with pytest.raises(LoraportError):
            read_adapter(copy / original.name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", sorted(adapter_formats()))
def test_not_finite(name, value, case_of, tmp_path) -> None:
    adapter = _adapter()
    adapter.modules[_PATHS[0]].lora_A[1, 3] = value
    write_adapter(adapter, tmp_path / "x", name, base=case_of("plain").base)
    with pytest.raises(LoraportError, match="expected finite values, got NaN or infinity"):
        read_adapter(tmp_path / "x")


# Format → its safetensors file inside the output.
_SAFETENSORS = {
    "peft": "adapter_model.safetensors",
    "mlx": "adapters.safetensors",
    "kohya": "",
}


@pytest.mark.parametrize("name", sorted(_SAFETENSORS))
@pytest.mark.parametrize(
    "damage", ["partner", "rank", "dimensions", "integer", "unknown", "outside", "empty"]
)
def test_tensors_that_do_not_fit(name, damage, written, tmp_path) -> None:
    original, _ = written[name]
    copy = tmp_path / "copy"
    shutil.copytree(original.parent, copy)
    file = copy / original.name / _SAFETENSORS[name] if _SAFETENSORS[name] else copy / original.name
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    first = next(key for key in sorted(tensors) if "lora_down" in key or "lora_a" in key.lower())
    if damage == "partner":
        del tensors[first]
    elif damage == "rank":
        tensors[first] = torch.zeros(7, 5)
    elif damage == "dimensions":
        tensors[first] = torch.zeros(3)
    elif damage == "integer":
        tensors[first] = torch.ones(2, 32, dtype=torch.int32)
    elif damage == "unknown":
        tensors["something.else"] = torch.zeros(2)
    elif damage == "outside":
        tensors[first.replace("model", "..", 1)] = tensors.pop(first)
    else:
        tensors = {}
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(LoraportError):
        read_adapter(copy / original.name)


@pytest.mark.parametrize(
    ("offset", "meaning"), [(8, "tensor count"), (16, "field count"), (24, "key length")]
)
@pytest.mark.parametrize("value", [2**63, 2**64 - 1, 2**40])
def test_gguf_counts_beyond_the_file(offset, meaning, value, written, tmp_path) -> None:
    del meaning
    content = bytearray(written["gguf"][0].read_bytes())
    content[offset : offset + 8] = value.to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(LoraportError, match="expected a GGUF file, got damage"):
        read_adapter(tmp_path / "x.gguf")


def test_gguf_array_that_never_ends(tmp_path) -> None:
    """An array of 2^63 elements at the end of the file must not be counted out."""
    key = b"some.array"
    content = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little")
    content += (1).to_bytes(8, "little") + len(key).to_bytes(8, "little") + key
    content += (9).to_bytes(4, "little") + (0).to_bytes(4, "little")
    content += (2**63).to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(LoraportError, match="its header asks for"):
        read_adapter(tmp_path / "x.gguf")


def test_gguf_that_is_a_model(written, case_of, tmp_path) -> None:
    _, tensors = read_gguf(written["gguf"][0])
    write_gguf(tmp_path / "model.gguf", "llama", {"general.type": "model"}, tensors)
    with pytest.raises(LoraportError, match="is it a whole model") as refused:
        read_adapter(tmp_path / "model.gguf", base=case_of("plain").base)
    assert "adapter.type" in str(refused.value)
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 2.0}
    tensors["../../etc.weight.lora_a"] = torch.zeros(2, 2)
    write_gguf(tmp_path / "names.gguf", "llama", fields, tensors)
    with pytest.raises(LoraportError, match=r"\.\./\.\./etc"):
        read_adapter(tmp_path / "names.gguf", base=case_of("plain").base)


@pytest.mark.parametrize(("name", "key"), [("mlx", "fine_tune_type"), ("peft", "r")])
def test_duplicate_keys(name: str, key: str, written, tmp_path) -> None:
    original, _ = written[name]
    shutil.copytree(original, tmp_path / name)
    config = tmp_path / name / "adapter_config.json"
    read_adapter(tmp_path / name)
    value = json.dumps(json.loads(config.read_text())[key])
    config.write_text(config.read_text().replace("{", f'{{"{key}": {value},', 1))
    with pytest.raises(LoraportError, match=f"keys that occur twice: {key}"):
        read_adapter(tmp_path / name)
