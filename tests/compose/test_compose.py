"""A weighted sum of adapters is one adapter that computes the sum of the updates."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from peft_cases import Case, ConvNet, llama, load_with_peft, logits, make, make_case

from converters.compose import compose
from loraport.cli import cli
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft
from loraport.variants import lower


def deltas(adapter):
    return {
        path: (module.lora_B.double().flatten(1) @ module.lora_A.double().flatten(1))
        * module.scaling
        for path, module in adapter.modules.items()
    }


@pytest.fixture
def pair(tmp_path):
    options = {"target_modules": ["q_proj", "embed_tokens"], "r": 4, "lora_alpha": 7}
    first = make_case(Case(llama, options), tmp_path / "a")
    other = {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_rslora": True}
    second = make_case(Case(llama, other), tmp_path / "b", seed=1, base=first.base)
    return first, second


def plain(path):
    """Read an adapter without the copy of its base's embedding that PEFT saves along."""
    from dataclasses import replace

    return replace(read_peft(path), replacements={})


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0), (0.0, 1.0)])
def test_sum_is_exact(pair, weights):
    adapters = [plain(made.path) for made in pair]
    total = compose(
        [(str(n), a, w) for n, (a, w) in enumerate(zip(adapters, weights, strict=True))]
    )
    found = deltas(total.adapter)
    single = [deltas(adapter) for adapter in adapters]
    assert found.keys() == single[0].keys() | single[1].keys()
    for path, delta in found.items():
        parts = [w * d[path] for d, w in zip(single, weights, strict=True) if path in d]
        expected = sum(parts)
        # B is rounded to float32 once.
        bound = sum(part.abs().max() for part in parts) * 2.0**-20
        assert (delta - expected).abs().max() <= bound
    assert total.errors == {}


def test_reduced_rank_reports_its_error(pair):
    adapters = [plain(made.path) for made in pair]
    whole = deltas(compose([("a", adapters[0], 1.0), ("b", adapters[1], 0.5)]).adapter)
    small = compose([("a", adapters[0], 1.0), ("b", adapters[1], 0.5)], rank=2)
    for path, delta in deltas(small.adapter).items():
        actual = float((delta - whole[path]).norm() / whole[path].norm())
        assert small.errors[path] == pytest.approx(actual, rel=1e-4, abs=1e-6)
        singular = torch.linalg.svdvals(whole[path])
        assert actual == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-4)


def test_command_and_peft_agree(tmp_path):
    options = {"target_modules": ["q_proj", "down_proj"], "r": 4}
    first = make_case(Case(llama, options), tmp_path / "a")
    make_case(Case(llama, options), tmp_path / "b", seed=1, base=first.base)
    out = tmp_path / "sum"
    command = ["compose", f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b'}=2", "-o", str(out), "--json"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.exception
    assert {each["rank"] for each in json.loads(result.stdout)["modules"].values()} == {8}
    model = load_with_peft(first.fresh_base(), first.path)
    model.load_adapter(tmp_path / "b", "b")
    model.add_weighted_adapter(["default", "b"], [0.5, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    got, expected = logits(load_with_peft(first.fresh_base(), out)), logits(model)
    assert torch.allclose(got, expected, rtol=0, atol=2e-5 * expected.abs().max())
    assert isinstance(CliRunner().invoke(cli, command).exception, LoraportError)


def test_convolutions_are_laid_side_by_side(tmp_path):
    options = {"target_modules": ["conv1d", "conv2d"], "r": 2}
    first = make_case(Case(ConvNet, options), tmp_path / "a")
    second = make_case(Case(ConvNet, options), tmp_path / "b", seed=1, base=first.base)
    adapters = [read_peft(made.path) for made in (first, second)]
    total = compose([("a", adapters[0], 1.0), ("b", adapters[1], -1.0)])
    single = [deltas(adapter) for adapter in adapters]
    for path, delta in deltas(total.adapter).items():
        assert torch.allclose(delta, single[0][path] - single[1][path], rtol=0, atol=1e-5)


def test_groups_keep_their_own_ranks(tmp_path):
    """Three of other ranks, summed as their convolutions compute them in PEFT."""
    expected, weighted = 0.0, []
    x = torch.randn(2, 12, 5, 5, generator=torch.Generator().manual_seed(0))
    base = None
    for number, (rank, weight) in enumerate([(2, 1.0), (6, -0.5), (4, 2.0)]):
        options = {"target_modules": ["grouped"], "r": rank}
        made = make_case(Case(ConvNet, options), tmp_path / str(number), seed=number, base=base)
        base = made.base
        layer = made.peft_model.get_submodule("base_model.model.grouped")
        with torch.no_grad():
            expected = expected + weight * (layer(x) - layer.base_layer(x))
        weighted.append((str(number), read_peft(made.path), weight))
    total = compose(weighted).adapter.modules["grouped"]
    assert (total.rank, total.groups) == (12, 2)
    got = torch.nn.functional.conv2d(x, lower(total).delta().reshape(6, 12, 3, 3).float())
    assert torch.allclose(got, expected, rtol=0, atol=2e-5 * expected.abs().max())
    alone = lower(weighted[0][1].modules["grouped"]).delta().reshape(6, 12, 3, 3).float()
    assert (torch.nn.functional.conv2d(x, alone) - expected).abs().max() > 1e-2
    with pytest.raises(LoraportError, match="reduced; leave out --rank"):
        compose(weighted, rank=4)


@pytest.mark.parametrize("weights", [(1.0, -1.0, 0.0), (0.1, 0.2, -0.3)])
@pytest.mark.parametrize("limit", [{"rank": 2}, {"energy": 0.9}])
def test_a_sum_that_cancels_out_is_zero_and_has_no_error(pair, weights, limit):
    adapter = plain(pair[0].path)
    total = compose([("a", adapter, weight) for weight in weights], **limit)
    assert set(total.errors.values()) == {0.0}
    assert not any(delta.any() for delta in deltas(total.adapter).values())
    # A small rest is none of rounding.
    rest = compose([("a", adapter, weight) for weight in (1.0, -0.999)], **limit)
    for path, delta in deltas(compose([("a", adapter, 0.001)], **limit).adapter).items():
        assert torch.allclose(deltas(rest.adapter)[path], delta, rtol=0, atol=1e-3 * delta.norm())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "DoRA, which has a gain"),
        ("modules_to_save", "a replaced parameter"),
        ("experts", "fused experts"),
        ("tokens", "trained token rows"),
    ],
)
def test_what_does_not_add_up_is_refused_by_name(name, message, tmp_path):
    adapter = read_peft(make(name, tmp_path / "a").path)
    with pytest.raises(LoraportError, match=message):
        compose([("a", adapter, 1.0), ("b", adapter, 1.0)])


def test_shares_and_weights_that_mean_nothing_are_refused(pair):
    adapters = [plain(made.path) for made in pair]
    weighted = [("a", adapters[0], 1.0), ("b", adapters[1], 1.0)]
    for energy in (math.nan, 0.0, 1.5):
        with pytest.raises(LoraportError, match=f"--energy: expected a share .* got {energy}"):
            compose(weighted, energy=energy)
    with pytest.raises(LoraportError, match=r"q_proj: .* got numbers beyond what float32 holds"):
        compose([("a", adapters[0], 1e300)])
