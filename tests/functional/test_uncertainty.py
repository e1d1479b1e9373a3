"""Epistemic and aleatoric variance: loops over members, the law of total variance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layeredrl_trl.functional import aleatoric_variance, epistemic_variance
from tests.oracles import even_mixture, mixture


def parts(*batch, members=4, modes=3, dims=2):
    mean = torch.randn(*batch, members, modes, dims)
    weights = torch.randn(*batch, members, modes).softmax(-1)
    return mean, 0.1 + torch.rand_like(mean), weights


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes(batch):
    mean, std, weights = parts(*batch)
    assert epistemic_variance(mean, weights).shape == (*batch, 2)
    assert aleatoric_variance(mean, std, weights).shape == (*batch, 2)


@pytest.mark.parametrize(("members", "modes"), [(1, 1), (1, 3), (4, 1), (5, 3)])
def test_like_a_loop_over_members(members, modes):
    mean, std, weights = parts(members=members, modes=modes)
    each = [mixture(mean[e], std[e], weights[e]) for e in range(members)]
    centre = sum(m.mean for m in each) / members
    epistemic = sum((m.mean - centre) ** 2 for m in each) / members
    aleatoric = sum(m.variance for m in each) / members
    found = epistemic_variance(mean, weights)
    torch.testing.assert_close(found.double(), epistemic, rtol=1e-5, atol=1e-6)
    found = aleatoric_variance(mean, std, weights)
    torch.testing.assert_close(found.double(), aleatoric, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4))
def test_both_add_up_to_the_variance_of_the_even_mixture(seed, members, modes):
    torch.manual_seed(seed)
    mean, std, weights = parts(3, members=members, modes=modes)
    total = epistemic_variance(mean, weights) + aleatoric_variance(mean, std, weights)
    reference = even_mixture(mean, std, weights).variance
    torch.testing.assert_close(total.double(), reference, rtol=1e-5, atol=1e-6)


def test_order_of_members_changes_nothing():
    mean, std, weights = parts(3)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        epistemic_variance(mean, weights), epistemic_variance(mean[:, order], weights[:, order])
    )
    torch.testing.assert_close(
        aleatoric_variance(mean, std, weights),
        aleatoric_variance(mean[:, order], std[:, order], weights[:, order]),
    )


def test_one_member_knows_all_it_knows():
    mean, _, weights = parts(3, members=1)
    mean.requires_grad_()
    variance = epistemic_variance(mean, weights)
    assert (variance == 0).all()
    variance.sum().backward()
    assert (mean.grad == 0).all()
