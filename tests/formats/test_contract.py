"""What every format promises, over every variant that PEFT makes."""

from pathlib import Path

import pytest
import torch
from peft_cases import load_with_peft, logits

from converters.formats.features import module_features, replacement_feature
from converters.formats.registry import adapter_formats, detect_format, read_adapter, write_adapter
from loraport.adapter import Adapter
from loraport.errors import LoraportError

# As far as float32 logits of a deep sum agree when B was rounded once more.
_TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def _features(adapter: Adapter) -> set:
    of_modules = {found for module in adapter.modules.values() for found in module_features(module)}
    of_replacements = {
        replacement_feature(name, found) for name, found in adapter.replacements.items()
    }
    return of_modules | of_replacements


@pytest.fixture(params=sorted(adapter_formats()))
def target(request):
    return adapter_formats()[request.param]


def test_held_exactly_or_refused_with_all_reasons(case, target, tmp_path) -> None:
    adapter = read_adapter(case.made.path)
    there = tmp_path / "there"
    refusal = None
    copies: list[str] = []
    try:
        copies = write_adapter(adapter, there, target.name, base=case.base)
    except LoraportError as error:
        refusal = str(error)
    if refusal is not None:
        assert "cannot hold" in refusal
        assert not list(tmp_path.iterdir())
        for path, module in adapter.modules.items():
            for feature in set(module_features(module)) - target.holds:
                assert f"{path}: " in refusal
                assert feature.value in refusal
        return
    assert _features(adapter) <= target.holds or copies
    assert detect_format(there) is target
    back = read_adapter(there)
    assert back.modules.keys() == adapter.modules.keys()
    assert back.replacements.keys() == adapter.replacements.keys() - set(copies)
    for path, module in adapter.modules.items():
        _assert_same_module(module, back.modules[path], target.name == "onnx")
    write_adapter(back, tmp_path / "peft", "peft")
    returned = load_with_peft(case.made.fresh_base(), tmp_path / "peft")
    # Not made.peft_model: PEFT sorts the patterns it saves, so the file may mean another adapter.
    expected = logits(load_with_peft(case.made.fresh_base(), case.made.path))
    torch.testing.assert_close(logits(returned), expected, **_TOLERANCE)
    assert not torch.allclose(logits(case.made.fresh_base()), expected, atol=1e-2)


def _assert_same_module(module, back, folds_gains) -> None:
    """A comes back as it was, B too unless the scale was folded in, then rounded once."""
    gain_folded = folds_gains and module.magnitude is not None
    assert back.kind is module.kind
    assert back.fan_in_fan_out is module.fan_in_fan_out
    assert torch.equal(back.lora_A, module.lora_A)
    assert back.lora_A.dtype is module.lora_A.dtype
    if module.magnitude is not None:
        assert torch.equal(back.magnitude.flatten(), module.magnitude.flatten())
    factor = module.scaling / back.scaling
    if abs(factor - 1) < 1e-6 and not gain_folded:
        assert torch.equal(back.lora_B, module.lora_B)
        return
    expected = (module.lora_B.double() * factor).to(module.lora_B.dtype)
    # A gain is folded into B and taken out again: two roundings more.
    rtol = 3.6e-7 if gain_folded else 1.2e-7
    torch.testing.assert_close(back.lora_B, expected, rtol=rtol, atol=0)


# What each format must hold, whatever the reasons that a test above would accept.
_HELD = {
    "peft": {"plain", "rslora_patterns", "dora", "conv_dora", "modules_to_save", "tokens"},
    "mlx": {"plain", "rslora", "patterns", "dora", "bert_dora", "conv1d_storage", "embedding"},
    "gguf": {"rank_one", "plain", "rslora", "patterns", "rslora_patterns", "embedding_and_head"},
    "kohya": {"plain", "rslora_patterns", "dora", "conv", "conv_dora", "conv1d_storage"},
    "diffusers": {"plain", "rslora_patterns", "dora", "conv", "conv_bias"},
    "onnx": {
        *("plain", "rslora_patterns", "conv1d_storage", "embedding", "conv", "conv_bias"),
        *("dora", "bert_dora", "conv1d_storage_dora", "lora_bias", "bias_lora_only", "bias_all"),
    },
}


@pytest.mark.parametrize(
    ("format_name", "name"), [(f, name) for f, names in _HELD.items() for name in sorted(names)]
)
def test_is_held(format_name, name, case_of, tmp_path) -> None:
    case = case_of(name)
    write_adapter(read_adapter(case.made.path), tmp_path / "out", format_name, base=case.base)


def test_every_format_has_a_list_of_what_it_holds() -> None:
    assert _HELD.keys() == adapter_formats().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_survive(target, dtype, case_of, tmp_path) -> None:
    from dataclasses import replace

    case = case_of("patterns")
    adapter = read_adapter(case.made.path)
    modules = {
        path: replace(module, lora_A=module.lora_A.to(dtype), lora_B=module.lora_B.to(dtype))
        for path, module in adapter.modules.items()
    }
    write_adapter(replace(adapter, modules=modules), tmp_path / "x", target.name, base=case.base)
    back = read_adapter(tmp_path / "x")
    for path, module in modules.items():
        folded = back.modules[path]
        assert torch.equal(folded.lora_A, module.lora_A)
        factor = module.scaling / folded.scaling
        expected = (module.lora_B.double() * factor).to(dtype)
        # A scale that a format keeps as float32 moves the reference by less than its rounding.
        if abs(factor - 1) < 1e-6:
            expected = module.lora_B
        torch.testing.assert_close(folded.lora_B, expected, rtol=1.2e-7, atol=0)


def test_existing_outputs_stay_without_force(target, case_of, tmp_path) -> None:
    case = case_of("plain")
    adapter = read_adapter(case.made.path)
    write_adapter(adapter, tmp_path / "x", target.name, base=case.base)
    before = _contents(tmp_path)
    with pytest.raises(LoraportError, match="already exists"):
        write_adapter(adapter, tmp_path / "x", target.name, base=case.base)
    assert _contents(tmp_path) == before
    write_adapter(adapter, tmp_path / "x", target.name, base=case.base, force=True)
    assert _contents(tmp_path) == before  # the same bytes from the same adapter


def test_an_adapter_of_nothing_is_refused(target, tmp_path) -> None:
    if target.name == "peft":
        pytest.skip("PEFT's layout may hold replacements alone")
    with pytest.raises(LoraportError, match="expected LoRA modules, got none"):
        write_adapter(Adapter(modules={}), tmp_path / "x", target.name)


def test_everything_that_does_not_fit_is_one_error(case_of, tmp_path) -> None:
    case = case_of("modules_to_save")
    with pytest.raises(LoraportError) as refused:
        write_adapter(read_adapter(case.made.path), tmp_path / "x", "mlx", base=case.base)
    lines = str(refused.value).splitlines()
    assert lines[0] == "MLX cannot hold this adapter"
    # Four norms inside the layers, one after them, and the head.
    assert len(lines) == 1 + 6
    assert {"  - lm_head.weight", "  - model.norm.weight"} < {line.split(":")[0] for line in lines}


def _contents(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}
