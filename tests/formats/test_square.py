"""Square weights stored ``[in, out]``: no shape tells, so the orientation must be carried right."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from merge_bases import save_base
from peft_cases import Case, gpt2, load_with_peft, logits, make_case
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from converters.formats.registry import adapter_formats, read_adapter
from loraport.cli import cli

_SQUARE = {"target_modules": ["attn.c_proj"], "r": 3, "lora_alpha": 5, "fan_in_fan_out": True}


def run(*arguments):
    result = CliRunner().invoke(cli, [str(each) for each in arguments])
    assert result.exit_code == 0, result.exception
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter on GPT-2's square attention output, and its base with and without a config."""
    directory = tmp_path_factory.mktemp("square")
    made = make_case(Case(gpt2, _SQUARE), directory / "adapter")
    save_base(made.base, directory / "base")
    save_base(made.base, directory / "bare")
    (directory / "bare" / "config.json").unlink()
    return made


def merged_logits(made, adapter, base, out):
    run("merge", base, adapter, "-o", out)
    if not (out / "config.json").exists():
        (out / "config.json").write_bytes((made.path.parent / "base/config.json").read_bytes())
    return logits(GPT2LMHeadModel.from_pretrained(out))


@pytest.mark.parametrize("name", sorted(adapter_formats()))
@pytest.mark.parametrize("base", ["base", "bare"])
def test_converted_and_merged(name, base, made, tmp_path) -> None:
    root = made.path.parent
    run("convert", made.path, "--to", name, "-o", tmp_path / "x", "--base", root / "base")
    run("convert", tmp_path / "x", "--to", "peft", "-o", tmp_path / "peft")
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    for number, adapter in enumerate((tmp_path / "x", tmp_path / "peft")):
        got = merged_logits(made, adapter, root / base, tmp_path / f"merged-{number}")
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    peft = load_with_peft(made.fresh_base(), tmp_path / "peft").merge_and_unload()
    torch.testing.assert_close(logits(peft), expected, rtol=0, atol=2e-5)


def test_the_control_is_another_model(made, tmp_path) -> None:
    """Without a config the flag decides, and the wrong flag merges the transposed update."""
    root = made.path.parent
    run("convert", made.path, "--to", "peft", "-o", tmp_path / "x")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    (tmp_path / "x" / "adapter_config.json").write_text(
        json.dumps({**config, "fan_in_fan_out": False})
    )
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    wrong = merged_logits(made, tmp_path / "x", root / "bare", tmp_path / "wrong")
    assert (wrong - expected).abs().max() > 0.05
    right = merged_logits(
        made, tmp_path / "x", root / "base", tmp_path / "right"
    )  # its class knows
    torch.testing.assert_close(right, expected, rtol=0, atol=2e-5)


def test_a_flag_that_other_modules_contradict_decides_nothing(made, tmp_path) -> None:
    options = {**_SQUARE, "target_modules": ["attn.c_proj", "c_attn"]}
    other = make_case(Case(gpt2, options), tmp_path / "adapter", base=made.base)
    file = other.path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "fan_in_fan_out": False}))
    command = ["merge", str(made.path.parent / "bare"), str(other.path), "--dry-run"]
    refused = CliRunner().invoke(cli, command)
    assert "which way round the square weight is stored" in str(refused.exception)
    assert "h.1.attn.c_proj.weight" in str(refused.exception)
    run("merge", made.path.parent / "base", other.path, "--dry-run")


def test_composed(made, tmp_path) -> None:
    second = make_case(Case(gpt2, _SQUARE), tmp_path / "b", seed=3, base=made.base)
    run("compose", f"{made.path}=0.5", f"{second.path}=-2", "-o", tmp_path / "sum")
    run("compose", f"{made.path}=0.5", f"{second.path}=-2", "-o", tmp_path / "six", "--rank", 6)
    root = made.path.parent
    run("merge", root / "base", f"{made.path}=0.5", f"{second.path}=-2", "-o", tmp_path / "both")
    expected = logits(GPT2LMHeadModel.from_pretrained(tmp_path / "both"))
    for name in ("sum", "six"):
        assert all(m.fan_in_fan_out for m in read_adapter(tmp_path / name).modules.values())
        got = logits(load_with_peft(made.fresh_base(), tmp_path / name).merge_and_unload())
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        for base in ("base", "bare"):
            out = tmp_path / f"{name}-{base}"
            got = merged_logits(made, tmp_path / name, root / base, out)
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_extracted(made, tmp_path) -> None:
    tuned = copy.deepcopy(made.base)
    torch.manual_seed(2)
    with torch.no_grad():
        for block in tuned.transformer.h:
            weight = block.attn.c_proj.weight
            weight.add_(torch.randn(len(weight), 2) @ torch.randn(2, len(weight)) * 0.2)
    save_base(tuned, tmp_path / "tuned")
    root = made.path.parent
    run("extract", root / "base", tmp_path / "tuned", "--rank", 2, "-o", tmp_path / "x")
    expected = logits(tuned)
    got = logits(load_with_peft(made.fresh_base(), tmp_path / "x"))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (logits(made.base) - expected).abs().max() > 0.05
    for base in ("base", "bare"):
        got = merged_logits(made, tmp_path / "x", root / base, tmp_path / f"merged-{base}")
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    result = run("extract", root / "bare", tmp_path / "tuned", "--rank", 2, "-o", tmp_path / "y")
    assert "transformers does not know this model" in result.stderr
    assert load_file(tmp_path / "y" / "adapter_model.safetensors")
