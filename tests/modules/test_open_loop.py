"""Rolling an ensemble out: the same as one step after the other, for the same random numbers."""

import pytest
import torch
from torch import nn

from layeredrl_trl.modules import DynamicsModel
from layeredrl_trl.modules.open_loop import MemberRows
from tests.oracles import random_ensemble

VARIANTS = {
    "default": {},
    "one-member": {"n_models": 1},
    "two-modes": {"n_modes": 2},
    "one-dim": {"latent_dim": 1},
    "all-one": {"n_models": 1, "n_modes": 1, "latent_dim": 1},
    "context-unseen": {"context_dim": 2},
    "context-seen": {"context_dim": 2, "condition_on_context": True},
    "absolute": {"predict_delta": False, "n_modes": 2},
    "no-hidden-layer": {"hidden_sizes": ()},
    "learned-bounds": {"learn_std_bounds": True, "n_modes": 2},
    "custom-network": {"network": nn.Linear},
}
N, P, H = 7, 2, 4


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return random_ensemble(**request.param)


def members(kind, model):
    """One member for each env, or None for particles of every member."""
    if kind == "all":
        return None
    if kind == "one-only":  # the others get no env at all
        return torch.full((N, 1), model.n_models - 1)
    return torch.randint(model.n_models, (N, 1))


def start(model, member):
    rows = model.n_models if member is None else 1
    latent = torch.randn(N, rows, P, model.latent_state_dim)
    return latent, torch.randn(N, model.context_dim), torch.randn(N, H, model.action_dim)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", ["all", "mixed", "one-only"])
def test_equals_one_step_after_the_other(model, kind, deterministic):
    member = members(kind, model)
    given = start(model, member)
    torch.manual_seed(3)
    expected = DynamicsModel.propagate(model, *given, member, deterministic=deterministic)
    torch.manual_seed(3)
    found = model.propagate(*given, member, deterministic=deterministic)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_terminations_that_nobody_asks_for_change_nothing(model):
    given = start(model, None)
    for propagate in (type(model).propagate, DynamicsModel.propagate):
        torch.manual_seed(3)
        expected, _ = propagate(model, *given)
        torch.manual_seed(3)
        found, nothing = propagate(model, *given, terminations=False)
        assert nothing is None
        assert torch.equal(found, expected)


def test_gradients_equal_those_of_one_step_after_the_other(model):
    given = start(model, None)
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for propagate in (type(model).propagate, DynamicsModel.propagate):
        latent = given[0].clone().requires_grad_()
        torch.manual_seed(3)
        after, term_logit = propagate(model, latent, *given[1:])
        total = after.square().mean() + term_logit.square().mean()
        gradients.append(torch.autograd.grad(total, [latent, *params], allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        else:  # the weights of a single mode move nothing
            assert all(x is None or not x.any() for x in (one, other))


def test_indices_of_discrete_actions():
    model = random_ensemble(action=3)
    model.accepts_indices = True
    latent, context, _ = start(model, None)
    actions = torch.randint(3, (N, H))
    one_hot = torch.nn.functional.one_hot(actions, 3).float()
    found = model.propagate(latent, context, actions, deterministic=True)
    expected = model.propagate(latent, context, one_hot, deterministic=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["all", "mixed", "one-only"])
def test_rows_come_back_in_their_order(kind):
    model = random_ensemble()
    member = members(kind, model)
    x = start(model, member)[0]
    rows = MemberRows(N, P, model.n_models, member)
    gathered = rows.gather(x)
    assert gathered.shape[::2] == (model.n_models, x.shape[-1])
    assert torch.equal(rows.scatter(gathered), x)


def test_envs_that_are_spread_evenly_are_not_padded():
    member = torch.arange(12)[:, None] % 3
    assert MemberRows(12, P, 3, member).gather(torch.zeros(12, 1, P, 5)).shape == (3, 4 * P, 5)


def test_latent_of_a_wrong_size():
    model = random_ensemble()
    latent, context, actions = start(model, None)
    with pytest.raises(ValueError, match="latent: expected"):
        model.propagate(latent[..., :-1], context, actions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_on_a_gpu(kind):
    model = random_ensemble()
    member = members(kind, model)
    given = start(model, member)
    expected = model.propagate(*given, member, deterministic=True)
    model.cuda()
    found = model.propagate(
        *(x.cuda() for x in given), None if member is None else member.cuda(), deterministic=True
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


def test_a_subclass_that_predicts_otherwise_is_asked():
    """Known physics on top of the ensemble were left out of rollouts."""

    class Residual(type(random_ensemble())):
        def predict_particles(self, latent, context, action, member=None):
            out = super().predict_particles(latent, context, action, member)
            return out._replace(mean=out.mean + 5.0)

    model = random_ensemble()
    model.__class__ = Residual
    given = start(model, None)
    found = model.propagate(*given, deterministic=True)
    expected = DynamicsModel.propagate(model, *given, deterministic=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_propagator_is_propagate(model, kind):
    member = members(kind, model)
    propagate = model.propagator()
    for _ in range(2):
        given = start(model, member)
        torch.manual_seed(3)
        expected = model.propagate(*given, member)
        torch.manual_seed(3)
        for one, other in zip(propagate(*given, member), expected, strict=True):
            assert torch.equal(one, other)


def test_propagator_asks_a_subclass_that_propagates_otherwise():
    class Frozen(type(random_ensemble())):
        def propagate(self, latent, *args, **kwargs):
            after, term_logit = super().propagate(latent, *args, **kwargs)
            return latent.unsqueeze(1).expand_as(after), term_logit

    model = random_ensemble()
    model.__class__ = Frozen
    latent, *rest = start(model, None)
    after, _ = model.propagator()(latent, *rest)
    assert torch.equal(after, latent.unsqueeze(1).expand_as(after))
