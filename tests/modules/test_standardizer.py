"""DeltaStandardizer: right from the start in every unit, learns to whiten, gradients, state."""

import pytest
import torch

from layeredrl_trl.functional import whitening_residual
from layeredrl_trl.modules import DeltaStandardizer


def deltas(n, scale):
    mix = torch.eye(len(scale)) + 0.5 * torch.ones(len(scale), len(scale)).triu(1)
    return torch.randn(n, len(scale)) @ mix * torch.tensor(scale)


@pytest.mark.parametrize("dims", [1, 3])
def test_matrix_is_symmetric_and_starts_as_identity(dims):
    standardizer = DeltaStandardizer(dims)
    assert torch.equal(standardizer.matrix, torch.eye(dims))
    with torch.no_grad():
        standardizer.raw.normal_()
    standardizer.moments.update(torch.randn(9, dims))
    matrix = standardizer.matrix
    assert matrix.shape == (dims, dims)
    torch.testing.assert_close(matrix, matrix.mT)


def test_statistics_put_every_dim_to_scale():
    standardizer, delta = DeltaStandardizer(2), torch.randn(500, 2) * torch.tensor([1e-3, 1e2])
    standardizer.update_statistics(delta)
    torch.testing.assert_close(
        (delta @ standardizer.matrix.mT).var(0, correction=0), torch.ones(2), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("batch", [(20,), (4, 5)])
def test_residual_is_that_of_the_matrix(batch):
    standardizer, delta = DeltaStandardizer(3), torch.randn(*batch, 3)
    standardizer.update_statistics(delta)
    expected = whitening_residual(standardizer.matrix, delta.reshape(-1, 3))
    assert torch.equal(standardizer.residual(delta), expected)


def test_masked_garbage_changes_nothing():
    one, other, delta = DeltaStandardizer(2), DeltaStandardizer(2), torch.randn(6, 2)
    one.update_statistics(delta[:4])
    delta[4:] = float("nan")
    other.update_statistics(delta, torch.arange(6) < 4)
    torch.testing.assert_close(one.matrix, other.matrix)


@pytest.mark.parametrize("scale", [[1.0], [0.01], [1.0, 0.1], [100.0, 1e-3, 1.0]])
def test_learns_to_whiten_in_any_unit(scale):
    standardizer, delta = DeltaStandardizer(len(scale)), deltas(500, scale)
    standardizer.update_statistics(delta)
    optimizer = torch.optim.Adam(standardizer.parameters())
    for lr in torch.logspace(-1, -3, 300).tolist():
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        standardizer.residual(delta).backward()
        optimizer.step()
    assert standardizer.residual(delta) < 0.05
    covariance = torch.cov((delta @ standardizer.matrix.detach().mT).mT).reshape([len(scale)] * 2)
    torch.testing.assert_close(covariance, torch.eye(len(scale)), rtol=0, atol=0.05)


COVARIANCES = {
    "one dim": [[4.0]],
    "correlated": [[2.0, 0.9, -0.3], [0.9, 1.0, 0.2], [-0.3, 0.2, 0.5]],
    "correlated, other units": [[1e-4, 4e-3, 0.0], [4e-3, 1.0, 30.0], [0.0, 30.0, 1e4]],
}


@pytest.mark.parametrize("covariance", COVARIANCES.values(), ids=COVARIANCES.keys())
def test_converges_to_the_inverse_square_root_of_a_known_covariance(covariance):
    covariance = torch.tensor(covariance, dtype=torch.float64)
    dim = len(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    root, expected = (vectors * values**p @ vectors.T for p in (0.5, -0.5))
    standardizer, mean = DeltaStandardizer(dim), torch.arange(dim)
    optimizer = torch.optim.Adam(standardizer.parameters())
    for lr in torch.logspace(-1.5, -3.5, 1500).tolist():
        delta = (torch.randn(512, dim, dtype=torch.float64) @ root).float() + mean
        standardizer.update_statistics(delta)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        standardizer.residual(delta).backward()
        optimizer.step()
    unit = covariance.diagonal().sqrt()
    error = (standardizer.matrix.detach().double() - expected) * torch.maximum(unit[:, None], unit)
    assert error.abs().max() < 0.06


def test_only_the_matrix_gets_gradient():
    standardizer, delta = DeltaStandardizer(2), torch.randn(6, 2)
    standardizer.residual(delta).backward()
    assert [name for name, _ in standardizer.named_parameters()] == ["raw"]
    assert (standardizer.raw.grad != 0).any()


def test_a_dim_that_never_changes_stays_finite():
    standardizer, delta = DeltaStandardizer(2), torch.randn(9, 2) * torch.tensor([1.0, 0.0])
    standardizer.update_statistics(delta)
    standardizer.residual(delta).backward()
    assert torch.isfinite(standardizer.matrix).all()
    assert torch.isfinite(standardizer.raw.grad).all()


def test_state_dict_round_trip():
    standardizer, other = DeltaStandardizer(2), DeltaStandardizer(2)
    with torch.no_grad():
        standardizer.raw.normal_()
    standardizer.update_statistics(torch.randn(9, 2))
    other.load_state_dict(standardizer.state_dict())
    assert torch.equal(standardizer.matrix, other.matrix)


def test_float64_changes_are_cast():
    standardizer, delta = DeltaStandardizer(3), torch.randn(9, 3)
    assert torch.equal(standardizer.residual(delta.double()), standardizer.residual(delta))


@pytest.mark.parametrize(
    ("dim", "error"), [(True, TypeError), (3.0, TypeError), ("3", TypeError), (0, ValueError)]
)
def test_a_number_of_dims_that_is_none(dim, error):
    with pytest.raises(error, match="DeltaStandardizer: latent_state_dim must be"):
        DeltaStandardizer(dim)
