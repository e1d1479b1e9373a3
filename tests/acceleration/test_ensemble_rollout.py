"""Rolling an ensemble out: the same as one step after the other, for the same random numbers."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Unbounded

from layeredrl_trl.acceleration import EnsembleRollout, MemberGroups, member_groups
from layeredrl_trl.acceleration.host_reads import without_reading
from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble
from tests.oracles import random_ensemble, roll_out

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
    expected = roll_out(model, *given, member, deterministic=deterministic)
    torch.manual_seed(3)
    found = EnsembleRollout(model)(*given, member, deterministic=deterministic)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_terminations_that_nobody_asks_for_change_nothing(model):
    given, roll = start(model, None), EnsembleRollout(model)
    torch.manual_seed(3)
    expected, _ = roll(*given)
    torch.manual_seed(3)
    found, nothing = roll(*given, terminations=False)
    assert nothing is None
    assert torch.equal(found, expected)


def test_gradients_equal_those_of_one_step_after_the_other(model):
    given = start(model, None)
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for roll in (EnsembleRollout(model), partial(roll_out, model)):
        latent = given[0].clone().requires_grad_()
        torch.manual_seed(3)
        after, term_logit = roll(latent, *given[1:])
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
    rollout = EnsembleRollout(model)
    found = rollout(latent, context, actions, deterministic=True)
    expected = rollout(latent, context, one_hot, deterministic=True)
    torch.testing.assert_close(found, expected)


# --- blocks, where the host must not wait for what members there are


@pytest.fixture
def without_waiting(monkeypatch):
    """As on a GPU, for any number of envs."""
    monkeypatch.setattr(member_groups, "_LEAST_SAVED_ROWS", -(2**30))
    monkeypatch.setattr(member_groups, "_LEAST_ROWS", 1)
    with without_reading():
        yield


def outcomes(model, given, member):
    """What a rollout, a single step and the gradient of both give."""
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    after, term_logit = EnsembleRollout(model)(*given, member)
    step = model.predict_particles(given[0], given[1], given[2][:, 0], member)
    total = after.square().mean() + term_logit.square().mean() + step.mean.square().mean()
    return [after, term_logit, *step, *torch.autograd.grad(total, params, allow_unused=True)]


@pytest.mark.parametrize("kind", ["mixed", "one-only"])
def test_blocks_change_no_number(model, kind, request):
    member = members(kind, model)
    given = start(model, member)
    expected = outcomes(model, given, member)
    request.getfixturevalue("without_waiting")
    rows = MemberGroups(N, P, model.n_models, member)
    assert rows.group_member is not None
    for one, other in zip(outcomes(model, given, member), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- hooks and errors


def test_hooks_of_the_networks_are_not_called_and_change_nothing():
    model = random_ensemble(n_modes=2)
    given, seen = start(model, None), []
    expected = EnsembleRollout(model)(*given, deterministic=True)
    model.net.register_forward_hook(lambda _, x, out: seen.append(1) or 0.5 * out)
    found = EnsembleRollout(model)(*given, deterministic=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not seen
    roll_out(model, *given, deterministic=True)
    assert len(seen) == H


def test_latent_of_a_wrong_size():
    model = random_ensemble()
    latent, context, actions = start(model, None)
    with pytest.raises(ValueError, match="latent: expected"):
        EnsembleRollout(model)(latent[..., :-1], context, actions)


# --- who promises it


@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_the_ensemble_promises_it_for_several_calls(model, kind):
    member = members(kind, model)
    rollout = model.fast_rollout()
    assert isinstance(rollout, EnsembleRollout)
    for _ in range(2):
        given = start(model, member)
        torch.manual_seed(3)
        expected = EnsembleRollout(model)(*given, member)
        torch.manual_seed(3)
        for one, other in zip(rollout(*given, member), expected, strict=True):
            assert torch.equal(one, other)


def test_networks_of_ones_own_have_no_layers_to_fold():
    assert random_ensemble(network=nn.Linear).fast_rollout() is None


def imagined(model, given):
    """Latent states and probabilities of termination, as an env imagines them."""
    latent, context, actions = given
    spec = Unbounded((model.action_dim,))
    env = PredictorEnv(IdentityEncoder(latent.shape[-1]), model, None, spec, deterministic=True)
    state = {"latent": latent, "context": context, "alive": torch.ones_like(latent[..., :1])}
    out = env.imagine(TensorDict(state, batch_size=[N]), actions)["next"]
    return out["latent"], out["term_prob"]


def assert_imagines_step_by_step(model, given):
    latent, term_prob = imagined(model, given)
    after, term_logit = roll_out(model, *given, deterministic=True)
    torch.testing.assert_close(latent, after)
    torch.testing.assert_close(term_prob, term_logit.sigmoid())


def test_a_subclass_that_predicts_otherwise_is_asked():
    """Known physics on top of the ensemble were left out of rollouts."""

    class Residual(ProbabilisticEnsemble):
        def predict_particles(self, latent, context, action, member=None):
            out = super().predict_particles(latent, context, action, member)
            return out._replace(mean=out.mean + 5.0)

    model = random_ensemble(n_particles_per_model=P)
    given = start(model, None)
    without, _ = imagined(model, given)
    model.__class__ = Residual
    assert_imagines_step_by_step(model, given)
    found, _ = imagined(model, given)
    torch.testing.assert_close(found[:, 0], without[:, 0] + 5.0)


def test_a_subclass_that_runs_its_networks_itself_is_asked():
    class Halved(ProbabilisticEnsemble):
        def _run(self, inputs, member=None):
            return tuple(0.5 * x for x in super()._run(inputs, member))

    model = random_ensemble(n_particles_per_model=P)
    given = start(model, None)
    whole, _ = imagined(model, given)
    model.__class__ = Halved
    assert_imagines_step_by_step(model, given)
    assert not torch.allclose(imagined(model, given)[0], whole)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_on_a_gpu(kind):
    model = random_ensemble()
    member = members(kind, model)
    given = start(model, member)
    expected = EnsembleRollout(model)(*given, member, deterministic=True)
    model.cuda()
    found = EnsembleRollout(model)(
        *(x.cuda() for x in given), None if member is None else member.cuda(), deterministic=True
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_blocks_on_a_gpu_wait_for_nothing(monkeypatch):
    model = random_ensemble(n_modes=2)
    member = torch.randint(model.n_models, (N, 1))
    given = start(model, member)
    expected = EnsembleRollout(model)(*given, member, deterministic=True)
    monkeypatch.setattr(member_groups, "_LEAST_SAVED_ROWS", -(2**30))
    model.cuda()
    given, member = [x.cuda() for x in given], member.cuda()
    EnsembleRollout(model)(*given, member)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = EnsembleRollout(model)(*given, member, deterministic=True)
        assert MemberGroups(N, P, model.n_models, member).group_member is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)
