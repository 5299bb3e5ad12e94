"""Comparisons: right numbers, and a verdict that nothing slips through."""

import numpy as np
import pytest
import torch

from loraport.errors import LoraportError
from loraport.parity import Tolerance, compare, tolerance_for
from loraport.parity.metrics import worst

LOOSE = Tolerance(1e9, 1e9, 0.0, "anything")


def outputs(seed=0, shape=(2, 5, 7)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_numbers_are_those_of_torch():
    reference, other = outputs(0), outputs(1)
    found = compare(reference, other)
    p, q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (reference, other))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).max()
    assert found.kl == pytest.approx(float(kl), rel=1e-9)
    difference = other.astype(np.float64) - reference
    assert found.max_abs == np.abs(difference).max()
    expected = np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64))
    assert found.relative == pytest.approx(expected, rel=1e-12)
    assert found.top1 == (reference.argmax(-1) == other.argmax(-1)).mean()
    assert found.positions == 10


def test_equal_outputs_are_equal():
    found = compare(outputs(), outputs())
    assert (found.max_abs, found.relative, found.kl, found.top1) == (0, 0, 0, 1)
    assert found.within(Tolerance(0, 0, 1, "the same bits"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["reference", "output", "both"])
def test_what_is_no_number_is_never_tolerated(value, where):
    reference, output = outputs(), outputs()
    if where != "output":
        reference[0, 0, 0] = value
    if where != "reference":
        output[0, 0, 0] = value
    assert not compare(reference, output).within(LOOSE)
    assert not worst([compare(outputs(), outputs()), compare(reference, output)]).within(
        Tolerance(1e9, 1e9, 1.0, "")
    )


@pytest.mark.parametrize("other", [outputs(shape=(2, 5, 8)), outputs(shape=(10, 7)), outputs()[:1]])
def test_another_shape_is_never_tolerated(other):
    assert not compare(outputs(), other).within(LOOSE)


def test_nothing_compared_is_never_tolerated():
    assert not compare(np.zeros((0, 3)), np.zeros((0, 3))).within(LOOSE)
    assert not worst([]).within(LOOSE)


def test_the_worst_of_several():
    near, far = compare(outputs(0), outputs(0) + 1e-6), compare(outputs(0), outputs(1))
    found = worst([near, far, near])
    assert (found.max_abs, found.kl) == (far.max_abs, far.kl)
    assert found.top1 == pytest.approx((20 + 10 * far.top1) / 30)
    assert found.positions == 30


@pytest.mark.parametrize(
    "tolerance",
    [Tolerance(0.5, 9, 0, ""), Tolerance(9, 0.1, 0, ""), Tolerance(9, 9, 0.99, "")],
)
def test_each_bound_counts(tolerance):
    assert not compare(outputs(0), outputs(1)).within(tolerance)


def test_a_reference_of_zeros():
    zeros = np.zeros((1, 4))
    assert not compare(zeros, zeros + 0.5).within(Tolerance(9, 0.1, 0, ""))


def test_every_tolerance_has_its_reason_and_an_unknown_one_is_refused():
    for precision in ("fp32", "fp16", "int4"):
        for provider in ("cpu", "cuda"):
            assert tolerance_for(precision, provider).reason
    with pytest.raises(LoraportError, match=r"got \('fp8', 'cpu'\)"):
        tolerance_for("fp8", "cpu")
