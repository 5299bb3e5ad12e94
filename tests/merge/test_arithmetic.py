"""Rounded once: element by element against exact rational arithmetic and against PEFT."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.merge.arithmetic import Change, merged_rows, prepare
from converters.merge.rounding import round_once

DTYPES = [torch.bfloat16, torch.float16]


def nearest_even(value: float, dtype: torch.dtype) -> float:
    """Round by searching the neighbours, with fractions; no floating arithmetic is trusted."""
    start = torch.tensor(value, dtype=torch.float64).float().to(dtype)
    around = {start.item()}
    for towards in (torch.inf, -torch.inf):
        around.add(torch.nextafter(start, torch.tensor(towards, dtype=dtype)).item())
    finite = [each for each in around if abs(each) != torch.inf]
    exact = Fraction(value)

    def rank(each: float) -> tuple[Fraction, int]:
        bits = torch.tensor(each, dtype=dtype).view(torch.int16).item()
        return abs(Fraction(each) - exact), bits & 1

    return min(finite, key=rank)


# Values that sit next to a tie of the small dtype, where rounding twice goes wrong.
NEAR_TIES = st.builds(
    lambda mantissa, exponent, bits, nudge: (
        (1 + (mantissa + 0.5) / 2**bits + nudge * 2.0**-45) * 2.0**exponent
    ),
    st.integers(0, 2**7 - 1),
    st.integers(-20, 14),
    st.sampled_from([7, 10]),
    st.sampled_from([-1, 0, 1]),
)
VALUES = st.one_of(st.floats(-6e4, 6e4), NEAR_TIES, NEAR_TIES.map(lambda value: -value))


@given(st.lists(VALUES, min_size=1, max_size=20), st.sampled_from(DTYPES))
def test_rounding_is_to_nearest_even(values, dtype):
    got = round_once(torch.tensor(values, dtype=torch.float64), dtype)
    assert got.tolist() == [nearest_even(value, dtype) for value in values]


def test_torch_alone_rounds_twice():
    """The control: what this function is for."""
    value = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1.0
    assert round_once(value, torch.bfloat16).item() == 1.0078125


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-149, 2.0**-25])
    assert torch.equal(
        round_once(values.double(), dtype).view(torch.int16), values.to(dtype).view(torch.int16)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_merged_elements_are_the_rounded_exact_values(dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(300, 500, generator=generator) * 0.02).to(dtype)
    a = torch.randn(16, 500, generator=generator) * 0.04
    b = torch.randn(300, 16, generator=generator) * 0.02
    if transposed:
        weight, left, right = weight.T.contiguous(), a.T, b.T
    else:
        left, right = b, a
    change = Change(1.0, left=left, right=right, scaling=1.7)
    exact = merged_rows(weight.double(), 0, weight.shape[0], [prepare(change)])
    got = round_once(exact, dtype)
    # numpy's longdouble: 64 bits of mantissa, summed apart from torch's code.
    wide = np.longdouble
    product = left.numpy().astype(wide) @ right.numpy().astype(wide)
    reference = weight.double().numpy().astype(wide) + wide(1.7) * product
    expected = round_once(torch.from_numpy(reference.astype(np.float64)), dtype)
    assert (got != expected).sum() <= 1e-6 * got.numel()
    peft = weight + (left @ right * 1.7).to(dtype)
    assert (peft != expected).float().mean() > 0.01  # the delta rounded on its own


def test_changes_add_up_exactly():
    """Plain, DoRA, replaced: ``W + sum of strength (W' - W)``, in blocks or at once."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, plain = rand(11, 7), Change(0.5, rand(11, 2), rand(2, 7), scaling=2.0)
    dora = Change(0.25, rand(11, 3), rand(3, 7), magnitude=rand(11))
    whole = Change(-1.5, replacement=rand(11, 7))
    rows = Change(2.0, replacement=rand(2, 7), token_rows=(1, 10))
    expected = weight + 0.5 * 2.0 * plain.left @ plain.right
    directed = weight + dora.left @ dora.right
    directed = directed * (dora.magnitude / directed.norm(dim=1))[:, None]
    expected += 0.25 * (directed - weight) - 1.5 * (whole.replacement - weight)
    for number, row in enumerate(rows.token_rows):
        expected[row] += 2.0 * (rows.replacement[number] - weight[row])
    changes = [prepare(each) for each in (plain, dora, whole, rows)]
    for step in (1, 4, 11):
        blocks = [
            merged_rows(weight[first : first + step], first, 11, changes)
            for first in range(0, 11, step)
        ]
        assert torch.allclose(torch.cat(blocks), expected, rtol=0, atol=1e-13)
    # What the other order, all of the base's rows untouched, must not be.
    assert not torch.allclose(expected, weight, atol=0.1)
