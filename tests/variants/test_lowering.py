"""Every variant's canonical form against what PEFT's own layers compute, module by module."""

from dataclasses import replace

import pytest
import torch
from peft_cases import CASES, make, merge_with_peft

from loraport.adapter import ModuleKind
from loraport.base.storage import stored_as_out_in
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft
from loraport.variants import lower

# PEFT merges both of a tied pair into one tensor, which changes the other one too or adds the
# update twice; its merge is no reference there.
NOT_PEFTS_MERGE = {
    *("conv_grouped", "tied_embedding", "tied_head", "tied_together"),
    "tied_tokens_and_head",  # and its merge has the trained rows in it
    "parameters_beside_modules",  # it leaves the modules inside of the wrapper as LoRA layers
}
NAMES = [name for name in CASES if name not in NOT_PEFTS_MERGE]


def canonical(update, weight):
    """``gain * (W + s B A)`` in float64."""
    merged = weight.double() + update.delta(torch.float64)
    return merged if update.gain is None else update.gain.double()[:, None] * merged


@pytest.mark.parametrize("name", NAMES)
def test_canonical_form_is_pefts_merge(name, tmp_path):
    made = make(name, tmp_path / "adapter")
    adapter = read_peft(made.path)
    merged = merge_with_peft(made)
    for path, module in adapter.modules.items():
        if module.kind is ModuleKind.EXPERTS:
            continue  # several matrices; the merge's tests cover them
        base = made.base.get_submodule(path)
        # The class decides, as PEFT's flag may be wrong for one of several.
        module = replace(module, fan_in_fan_out=type(base).__name__ == "Conv1D")
        update = lower(module, base.weight)
        weight = stored_as_out_in(base.weight, module)
        expected = stored_as_out_in(merged.get_submodule(path).weight, module)
        got = canonical(update, weight)
        # PEFT's float32: some tens of roundings at 2^-24 of values of up to about 10.
        assert torch.allclose(got, expected.double(), rtol=0, atol=2e-5), path
        assert (expected - weight).abs().max() > 1e-3, path
        if update.bias is not None:
            bias = base.bias.double() + update.bias.double()
            assert torch.allclose(bias, merged.get_submodule(path).bias.double(), atol=1e-6), path


def test_grouped_convolution_as_peft_runs_it(tmp_path):
    """PEFT cannot merge it; the canonical form on all channels is what its forward computes."""
    made = make("conv_grouped", tmp_path / "adapter")
    module = read_peft(made.path).modules["grouped"]
    assert (module.kind, module.groups, tuple(module.lora_B.shape)) == (
        ModuleKind.CONV,
        2,
        (6, 2, 1, 1),
    )
    layer = made.peft_model.get_submodule("base_model.model.grouped")
    x = torch.randn(2, 12, 5, 5, generator=torch.Generator().manual_seed(0))
    update = lower(module)
    with torch.no_grad():
        kernel = update.delta().reshape(6, 12, 3, 3)
        expected = layer(x)
        got = layer.base_layer(x) + torch.nn.functional.conv2d(x, kernel)
        wrong = layer.base_layer(x)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)
    assert (wrong - expected).abs().max() > 1e-2


def test_storage_is_judged_by_shape_where_it_can_be(tmp_path):
    """One flag rules all modules in PEFT's file, and is wrong for some of these."""
    made = make("conv1d_storage_and_head", tmp_path / "a")
    for path, module in read_peft(made.path).modules.items():
        weight = made.base.get_submodule(path).weight
        if weight.shape[0] != weight.shape[1]:
            assert stored_as_out_in(weight, module).shape[0] == module.lora_B.shape[0]
            with pytest.raises(LoraportError, match="use the base the adapter was trained on"):
                stored_as_out_in(weight[1:], module)


def test_dora_without_its_base_is_refused(tmp_path):
    module = next(iter(read_peft(make("dora", tmp_path / "a").path).modules.values()))
    with pytest.raises(LoraportError, match="expected the base weight"):
        lower(module)
