"""The canonical form's algebra, in float64."""

import pytest
import torch

from loraport.errors import LoraportError
from loraport.update import LowRankUpdate, fold_scaling, weighted_sum


def update(seed, rank, **extra):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 7, generator=generator)
    b = torch.randn(5, rank, generator=generator)
    return LowRankUpdate(a=a, b=b, scaling=0.3 + seed, **extra)


def test_delta_is_scaled_product():
    one = update(1, 3)
    expected = torch.einsum("or,ri->oi", one.b.double(), one.a.double()) * one.scaling
    assert torch.allclose(one.delta(torch.float64), expected, rtol=1e-14, atol=0)
    # float32: a sum of 3 products and the scaling, each rounded at 2^-24.
    bound = (one.b.abs() @ one.a.abs()) * one.scaling * 5 * 2**-24
    assert ((one.delta().double() - expected).abs() <= bound).all()


def test_weighted_sum_has_no_cross_terms():
    first, second = update(1, 3), update(2, 4)
    total = weighted_sum([(first, 0.5), (second, -2.0)])
    expected = 0.5 * first.delta(torch.float64) - 2.0 * second.delta(torch.float64)
    assert total.rank == 7
    assert torch.allclose(total.delta(torch.float64), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(total.delta(torch.float64), first.delta(torch.float64), atol=1e-2)


def test_weighted_sum_adds_biases():
    first = update(1, 3, bias=torch.ones(5))
    total = weighted_sum([(first, 0.5), (update(2, 4), 1.0)])
    assert torch.equal(total.bias, torch.full((5,), 0.5))


def test_one_update_at_strength_one_is_itself():
    one = update(1, 3, gain=torch.ones(5))
    assert weighted_sum([(one, 1.0)]) is one


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5,)])
def test_gains_do_not_add_up(strengths):
    gained = update(1, 3, gain=torch.ones(5))
    with pytest.raises(LoraportError, match="DoRA"):
        weighted_sum([(gained, strength) for strength in strengths])


def test_fold_scaling_keeps_the_delta():
    one = update(3, 3)
    folded = fold_scaling(one)
    assert folded.scaling == 1.0
    assert torch.allclose(folded.delta(torch.float64), one.delta(torch.float64), rtol=0, atol=1e-5)
