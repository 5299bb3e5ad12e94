"""Truncation is the best there is: Eckart and Young, against LAPACK's SVD."""

import pytest
import torch

from converters.low_rank import factor_matrix, rank_for, refactor


def matrix(rows, columns, decay=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64)).Q
    return (left * decay ** torch.arange(size)) @ right.T


def best_error(whole, rank):
    singular = torch.linalg.svdvals(whole)
    return float(singular[rank:].norm() / singular.norm())


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
@pytest.mark.parametrize("rank", [1, 5, 19])
def test_error_is_the_smallest_possible(shape, rank):
    whole = matrix(*shape)
    factors = factor_matrix(whole, rank=rank)
    assert (factors.b.shape, factors.a.shape) == ((shape[0], rank), (rank, shape[1]))
    # Factors are float32: their rounding is all that is added.
    assert factors.error == pytest.approx(best_error(whole, rank), rel=1e-5, abs=2e-7)
    actual = (whole - factors.b.double() @ factors.a.double()).norm() / whole.norm()
    assert factors.error == pytest.approx(float(actual), rel=1e-9)


def test_large_matrices_by_subspace_iteration():
    whole = matrix(1030, 1100, decay=0.9)
    factors = factor_matrix(whole, rank=8)
    assert factors.error == pytest.approx(best_error(whole, 8), rel=1e-4)


def test_energy_keeps_the_fewest_values():
    whole = matrix(12, 9)
    singular = torch.linalg.svdvals(whole)
    factors = factor_matrix(whole, energy=0.9)
    share = singular.square().cumsum(0) / singular.square().sum()
    assert factors.rank == int((share < 0.9).sum()) + 1
    assert factor_matrix(whole, energy=1.0).rank == 9
    assert rank_for(torch.zeros(4), None, 0.5) == 1


def test_rank_beyond_the_matrix_is_exact():
    whole = matrix(6, 4)
    factors = factor_matrix(whole, rank=100)
    assert factors.rank == 4
    assert factors.error < 2e-7


def test_zero_difference():
    factors = factor_matrix(torch.zeros(4, 3), rank=2)
    assert factors.error == 0
    assert not (factors.b @ factors.a).any()


def test_refactoring_needs_no_full_matrix():
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(30, 7, generator=generator)
    a = torch.randn(7, 40, generator=generator)
    whole = b.double() @ a.double()
    factors = refactor(b, a, rank=3)
    actual = (whole - factors.b.double() @ factors.a.double()).norm() / whole.norm()
    assert factors.error == pytest.approx(float(actual), rel=1e-6)
    assert factors.error == pytest.approx(best_error(whole, 3), rel=1e-5)
