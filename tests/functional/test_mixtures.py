"""Gaussian mixtures: torch.distributions, values far from every mean, moments of draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layeredrl_trl.functional import (
    gaussian_mixture_log_prob,
    gaussian_mixture_mean,
    gaussian_mixture_variance,
    mixture_noise,
    mixture_noise_of_steps,
    sample_gaussian_mixture,
)
from tests.oracles import mixture


def parts(*batch, modes=3, dims=2, dtype=torch.float32):
    mean = torch.randn(*batch, modes, dims, dtype=dtype)
    std = 0.1 + torch.rand(*batch, modes, dims, dtype=dtype)
    return mean, std, torch.randn(*batch, modes, dtype=dtype).log_softmax(-1)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("modes", [1, 3])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes(batch, modes, dims):
    mean, std, log_weights = parts(*batch, modes=modes, dims=dims)
    weights = log_weights.exp()
    value = torch.randn(*batch, dims)
    assert gaussian_mixture_log_prob(value, mean, std, log_weights).shape == batch
    assert gaussian_mixture_mean(mean, weights).shape == (*batch, dims)
    assert gaussian_mixture_variance(mean, std, weights).shape == (*batch, dims)
    assert sample_gaussian_mixture(mean, std, log_weights).shape == (*batch, dims)


@pytest.mark.parametrize("modes", [1, 4])
def test_like_torch_distributions(modes):
    mean, std, log_weights = parts(50, modes=modes)
    value = 2 * torch.randn(50, 2)
    reference = mixture(mean, std, log_weights.exp())
    found = gaussian_mixture_log_prob(value, mean, std, log_weights)
    torch.testing.assert_close(
        found.double(), reference.log_prob(value.double()), rtol=1e-5, atol=1e-5
    )
    found = gaussian_mixture_mean(mean, log_weights.exp())
    torch.testing.assert_close(found.double(), reference.mean, rtol=1e-5, atol=1e-6)
    found = gaussian_mixture_variance(mean, std, log_weights.exp())
    torch.testing.assert_close(found.double(), reference.variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigmas", [0.5, 5.0, 50.0, 500.0, 1e4])
def test_finite_far_from_every_mean_forward_and_backward(sigmas):
    def run(dtype, log_prob):
        torch.manual_seed(3)
        mean, std, log_weights = (x.to(dtype).requires_grad_() for x in parts(6))
        value = (mean + sigmas * std).detach().amax(-2).requires_grad_()
        out = log_prob(value, mean, std, log_weights)
        inputs = (value, mean, std, log_weights)
        return out.detach().double(), [g.double() for g in torch.autograd.grad(out.sum(), inputs)]

    def naive(value, mean, std, log_weights):  # a sum of components, scaled by the largest
        reference = torch.distributions.Normal(mean, std).log_prob(value.unsqueeze(-2))
        component = reference.sum(-1) + log_weights
        largest = component.amax(-1, keepdim=True).detach()
        return (component - largest).exp().sum(-1).log() + largest.squeeze(-1)

    found, gradients = run(torch.float32, gaussian_mixture_log_prob)
    expected, reference = run(torch.float64, naive)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, reference, strict=True):
        assert torch.isfinite(gradient).all()
        # responsibilities of components that are 1e8 nats away from 0 have few digits in float32
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_a_naive_density_underflows_where_log_space_does_not():
    value, zero, one = torch.tensor([50.0]), torch.zeros(2, 1), torch.ones(2, 1)
    assert torch.distributions.Normal(zero, one).log_prob(value).exp().mean() == 0
    assert torch.isfinite(gaussian_mixture_log_prob(value, zero, one, torch.full((2,), 0.5).log()))


@pytest.mark.parametrize("modes", [1, 3])
def test_moments_of_draws(modes):
    n = 40_000
    mean, std, log_weights = parts(modes=modes)
    draws = sample_gaussian_mixture(
        *(x.expand(n, *x.shape) for x in (mean, std, log_weights))
    ).double()
    reference = mixture(mean, std, log_weights.exp())
    error = (reference.variance / n).sqrt()
    assert ((draws.mean(0) - reference.mean).abs() < 4 * error).all()
    torch.testing.assert_close(draws.var(0), reference.variance, rtol=0.05, atol=0)


def test_components_are_drawn_by_weight():
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3])
    mean = torch.arange(4.0).view(4, 1).expand(10_000, 4, 1)
    draws = sample_gaussian_mixture(mean, torch.zeros_like(mean), weights.log().expand(10_000, 4))
    share = torch.bincount(draws.flatten().long(), minlength=4) / 10_000
    torch.testing.assert_close(share, weights, rtol=0, atol=0.02)
    assert share[1] == 0


def test_draws_follow_the_generator():
    args = parts(5)
    torch.manual_seed(1)
    first = sample_gaussian_mixture(*args)
    assert not torch.equal(first, sample_gaussian_mixture(*args))
    torch.manual_seed(1)
    assert torch.equal(first, sample_gaussian_mixture(*args))


@given(seed=st.integers(0, 1000), modes=st.integers(1, 5))
def test_order_of_components_changes_nothing(seed, modes):
    torch.manual_seed(seed)
    mean, std, log_weights = parts(4, modes=modes)
    value, order = torch.randn(4, 2), torch.randperm(modes)
    torch.testing.assert_close(
        gaussian_mixture_log_prob(value, mean, std, log_weights),
        gaussian_mixture_log_prob(value, mean[:, order], std[:, order], log_weights[:, order]),
    )


def test_flattening_the_batch_changes_nothing():
    mean, std, log_weights = parts(2, 3)
    value = torch.randn(2, 3, 2)
    flat = (x.flatten(0, 1) for x in (value, mean, std, log_weights))
    together = gaussian_mixture_log_prob(value, mean, std, log_weights)
    assert torch.equal(together.flatten(), gaussian_mixture_log_prob(*flat))


def test_a_draw_has_the_gradient_of_its_component():
    mean, std, log_weights = (x.requires_grad_() for x in parts(5))
    sample_gaussian_mixture(mean, std, log_weights).sum().backward()
    assert (mean.grad.sum(-2) == 1).all() and ((mean.grad == 0) | (mean.grad == 1)).all()
    assert torch.equal(std.grad != 0, mean.grad != 0)
    assert log_weights.grad is None


def test_a_mean_for_all_dims_counts_for_each():
    value, std, weight = torch.randn(5, 3), torch.ones(1, 1), torch.zeros(1)
    expected = gaussian_mixture_log_prob(value, torch.zeros(1, 3), std, weight)
    torch.testing.assert_close(
        gaussian_mixture_log_prob(value, torch.zeros(1, 1), std, weight), expected
    )


@pytest.mark.parametrize("modes", [1, 3])
def test_noise_of_steps_is_that_of_as_many_calls(modes):
    like = {"dtype": torch.float32, "device": torch.device("cpu")}
    torch.manual_seed(0)
    calls = [mixture_noise((5, modes), 2, **like) for _ in range(4)]
    torch.manual_seed(0)
    gumbel, normal = mixture_noise_of_steps(4, (5, modes), 2, **like)
    assert torch.equal(normal, torch.stack([call.normal for call in calls]))
    if modes == 1:
        assert gumbel is None and calls[0].gumbel is None
    else:
        assert torch.equal(gumbel, torch.stack([call.gumbel for call in calls]))


def test_noise_is_gumbel_and_normal_and_independent():
    torch.manual_seed(0)
    n = 100_000
    like = {"dtype": torch.float32, "device": torch.device("cpu")}
    gumbel, normal = mixture_noise((n, 3), 2, **like)
    assert gumbel.shape == (n, 3) and normal.shape == (n, 2) and gumbel.isfinite().all()
    at = torch.linspace(-4.0, 8.0, 49)
    of_gumbel = torch.exp(-torch.exp(-at))
    of_normal = torch.distributions.Normal(0.0, 1.0).cdf(at)
    for noise, expected in ((gumbel, of_gumbel), (normal, of_normal)):
        below = (noise.unsqueeze(-1) < at).float().mean(0)
        assert (below - expected).abs().max() < 5 * 0.5 / n**0.5
    columns = torch.cat([gumbel, normal, normal.square()], -1)
    correlation = columns.T.corrcoef() - torch.eye(7)
    assert correlation.abs().max() < 5 / n**0.5
