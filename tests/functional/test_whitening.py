"""Covariance and the whitening residual: closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layeredrl_trl.functional import covariance, whitening_residual


def correlated(n, dims):
    mix = torch.randn(dims, dims, dtype=torch.float64) + 2 * torch.eye(dims)
    return torch.randn(n, dims, dtype=torch.float64) @ mix + torch.randn(dims)


def inverse_sqrt(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.mT


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_covariance_like_torch(dims):
    x = correlated(40, dims)
    reference = torch.cov(x.mT, correction=0).reshape(dims, dims)
    torch.testing.assert_close(covariance(x), reference)


def test_one_sample_has_no_covariance():
    assert torch.equal(covariance(torch.randn(1, 3)), torch.zeros(3, 3))


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_residual_is_0_at_the_inverse_square_root_up_to_a_rotation(dims):
    x = correlated(100, dims)
    whitener = inverse_sqrt(covariance(x))
    rotation = torch.linalg.qr(torch.randn(dims, dims, dtype=torch.float64)).Q
    assert whitening_residual(whitener, x) < 1e-10
    assert whitening_residual(rotation @ whitener, x) < 1e-10
    assert whitening_residual(2 * whitener, x) == pytest.approx(3 * dims**0.5)


def test_residual_like_its_formula():
    x, matrix = correlated(30, 3), torch.randn(3, 3, dtype=torch.float64)
    whitened = torch.stack([matrix @ row for row in x])
    difference = torch.cov(whitened.mT, correction=0) - torch.eye(3)
    expected = sum(entry**2 for row in difference.tolist() for entry in row) ** 0.5
    assert whitening_residual(matrix, x).item() == pytest.approx(expected)


@given(st.integers(0, 1000))
def test_shifting_samples_changes_nothing(seed):
    torch.manual_seed(seed)
    x, matrix = correlated(20, 3), torch.randn(3, 3, dtype=torch.float64)
    shifted = x + torch.randn(3)
    torch.testing.assert_close(whitening_residual(matrix, x), whitening_residual(matrix, shifted))


def test_gradient_descends_to_the_inverse_square_root():
    x = correlated(200, 2)
    matrix = torch.eye(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([matrix], 0.02)
    start = whitening_residual(matrix, x).item()
    for _ in range(400):
        optimizer.zero_grad()
        whitening_residual(matrix, x).backward()
        optimizer.step()
    assert whitening_residual(matrix, x) < 0.05 * start


def test_gradient_is_finite_where_the_residual_is_0():
    matrix = torch.eye(1, requires_grad=True)
    residual = whitening_residual(matrix, torch.tensor([[-1.0], [1.0]]))
    residual.backward()
    assert residual == 0 and torch.isfinite(matrix.grad).all()
