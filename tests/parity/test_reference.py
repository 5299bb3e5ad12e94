"""The PyTorch reference equals PEFT's own forward pass for every variant."""

import copy

import numpy as np
import pytest
import torch
from peft_cases import CASES, inputs, load_with_peft, logits, make

from loraport.errors import LoraportError
from loraport.parity.changes import changes_of
from loraport.parity.reference import adapted, merged, torch_outputs
from loraport.peft_layout.read import read_peft

EXPERTS = (
    *("experts", "experts_rslora", "parameter_of_conv1d", "parameters_by_name_alone"),
    "parameters_beside_modules",
)
TWO_INPUTS = ("tokens_of_both_stacks",)  # an encoder and a decoder
NAMES = [name for name in CASES if name not in (*EXPERTS, *TWO_INPUTS)]
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32 sums of some dozen terms through two layers


def outputs(model):
    return torch_outputs(model.eval(), {"input_ids": inputs().numpy()})[0]


@pytest.fixture(params=NAMES)
def made(request, tmp_path):
    return make(request.param, tmp_path / "adapter")


def test_beside_and_merged_equal_peft(made):
    model = made.fresh_base()
    base = outputs(model)
    expected = logits(load_with_peft(made.fresh_base(), made.path)).numpy()
    changes = changes_of([(read_peft(made.path), 1.0)], model)
    with adapted(model, changes):
        beside = outputs(model)
    with merged(model, changes):
        into = outputs(model)
    np.testing.assert_allclose(beside, expected, **TOLERANCE)
    np.testing.assert_allclose(into, expected, **TOLERANCE)
    # The control: the base is far off, and it is whole again afterwards.
    assert np.abs(base - expected).max() > 50 * TOLERANCE["atol"]
    assert np.array_equal(outputs(model), base)


@pytest.mark.parametrize("strength", [0.0, 0.3, -1.5])
@pytest.mark.parametrize("name", ["dora", "conv_dora", "embedding_dora", "conv1d_storage_dora"])
def test_a_strength_moves_between_base_and_adapted_output(name, strength, tmp_path):
    """One DoRA module, so that the model's inner output can be interpolated by hand."""
    made = make(name, tmp_path / "adapter")
    adapter = read_peft(made.path)
    path = next(iter(adapter.modules))
    one = type(adapter)({path: adapter.modules[path]})
    model = made.fresh_base().double()
    seen = {}

    def watch(run):
        handle = run.register_forward_hook(lambda *args: seen.update(y=args[2].detach().clone()))
        outputs(model)
        handle.remove()
        return seen["y"]

    y = watch(model.get_submodule(path))
    found = {}
    for at in (1.0, strength):
        changes = changes_of([(one, at)], model)
        for run in (adapted, merged):
            with run(model, changes):
                found[at, run] = watch(model.get_submodule(path))
    u = found[1.0, adapted]
    for run in (adapted, merged):
        expected = y + strength * (u - y)
        torch.testing.assert_close(found[strength, run], expected, rtol=1e-9, atol=1e-9)
        if strength != 1:
            assert (found[strength, run] - u).abs().max() > 1e-3


def test_a_blend_of_variants_is_the_sum_of_their_changes(tmp_path):
    made = [make(name, tmp_path / name) for name in ("dora", "plain", "rslora")]
    adapters = [read_peft(each.path) for each in made]
    path = "model.layers.0.self_attn.q_proj"
    ones = [type(adapter)({path: adapter.modules[path]}) for adapter in adapters]
    model = made[0].fresh_base().double()
    module = model.get_submodule(path)
    x = torch.randn(3, 4, module.in_features, dtype=torch.float64)
    y = module(x)
    strengths = (0.7, -0.4, 1.3)
    expected = y.clone()
    for adapter, strength in zip(ones, strengths, strict=True):
        with adapted(model, changes_of([(adapter, 1.0)], model)):
            expected += strength * (module(x) - y)
    changes = changes_of(list(zip(ones, strengths, strict=True)), model)
    for run in (adapted, merged):
        with run(model, changes):
            torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    assert (expected - y).abs().max() > 1e-2


def test_trained_tokens_act_on_a_tied_head_only_where_it_is_tied(tmp_path):
    tied = make("tied_tokens", tmp_path / "tied")
    model = tied.fresh_base()
    changes = changes_of([(read_peft(tied.path), 1.0)], model)
    assert changes.replaced.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    untied = make("tokens", tmp_path / "untied")
    changes = changes_of([(read_peft(untied.path), 1.0)], untied.fresh_base())
    assert changes.replaced.keys() == {"model.embed_tokens.weight"}


def test_a_copy_of_the_base_is_no_change_and_a_change_of_the_copy_is_one(tmp_path):
    made = make("embedding_and_head", tmp_path / "adapter")
    adapter, model = read_peft(made.path), made.fresh_base()
    assert "lm_head.weight" in adapter.replacements
    assert not changes_of([(adapter, 1.0)], model).replaced
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[3, 2] += 1
    assert changes_of([(adapter, 1.0)], other).replaced.keys() == {"lm_head.weight"}


def test_a_gain_needs_the_original_weight_where_the_model_has_a_rounded_one(tmp_path):
    made = make("dora", tmp_path / "adapter")
    adapter, model = read_peft(made.path), made.fresh_base()
    path = next(iter(adapter.modules))
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_((parameter * 4).round() / 4)
    exact = changes_of([(adapter, 1.0)], model).terms[path][0].update
    kept = changes_of([(adapter, 1.0)], rounded, model.get_parameter).terms[path][0].update
    assert torch.equal(exact.gain, kept.gain)
    assert not torch.equal(
        exact.gain, changes_of([(adapter, 1.0)], rounded).terms[path][0].update.gain
    )


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    from dataclasses import replace

    made = make("modules_to_save", tmp_path / "adapter")
    adapter = read_peft(made.path)
    path, module = next(iter(adapter.modules.items()))
    modules = {path: replace(module, lora_B=module.lora_B[:-1]), "gone": module}
    name, replacement = next(iter(adapter.replacements.items()))
    values = {
        name: replace(replacement, tensor=replacement.tensor[:-1]),
        "gone.weight": replacement,
    }
    with pytest.raises(LoraportError) as refused:
        changes_of(
            [(replace(adapter, modules=modules, replacements=values), 1.0)], made.fresh_base()
        )
    text = str(refused.value)
    assert text.count("\n  - ") == 4
    for named in (f"- {path}:", "- gone:", f"- {name}:", "- gone.weight:"):
        assert named in text


def test_dora_on_a_replaced_weight_is_refused_in_a_blend(tmp_path):
    from dataclasses import replace

    from loraport.adapter import Replacement

    made = make("dora", tmp_path / "adapter")
    adapter, model = read_peft(made.path), made.fresh_base()
    path = next(iter(adapter.modules))
    weight = model.get_parameter(f"{path}.weight").detach() * 1.1
    both = replace(adapter, replacements={f"{path}.weight": Replacement(weight)})
    changes_of([(both, 1.0)], model)
    with pytest.raises(LoraportError, match="expected DoRA or a replaced weight, got both"):
        changes_of([(both, 0.5)], model)


@pytest.mark.parametrize("name", EXPERTS[:2])
def test_experts_are_refused(name, tmp_path):
    made = make(name, tmp_path / "adapter")
    with pytest.raises(LoraportError, match="experts"):
        changes_of([(read_peft(made.path), 1.0)], made.fresh_base())
