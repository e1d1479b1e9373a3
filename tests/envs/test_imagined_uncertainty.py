"""Variances of imagined steps: all members are asked at the same state, and only if asked for."""

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import TransformedEnv

from layeredrl_trl.envs import (
    DisagreementBonus,
    Imagination,
    ImaginedState,
    PessimismPenalty,
    PredictorEnv,
)
from layeredrl_trl.modules import DynamicsModel, IdentityEncoder, ParticlePrediction
from layeredrl_trl.planners import CandidateReturn, CrossEntropyPlanner
from tests.changed_ensembles import Unchanged, as_kind
from tests.envs.imagined import CONTINUOUS, make_env, observations, random_actions
from tests.oracles import random_ensemble, random_reward, variances_at

PROPAGATIONS = ["fixed_model", "random_model", "expectation"]
every_propagation = pytest.mark.parametrize("propagation", PROPAGATIONS)
every_termination = pytest.mark.parametrize("termination", ["soft", "sample"])
with_and_without_member = pytest.mark.parametrize("with_member", [False, True])


def identical_members(n_models=5, **options):
    """Members of the same weights, which are very noisy."""
    model = random_ensemble(n_models=n_models, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    return model


def make_imagination(model, **options):
    defaults = {"termination": "soft", "propagation": "fixed_model", "uncertainty": True}
    return Imagination(model, random_reward(model), **{**defaults, **options})


def some_state(model, n=4, particles=2, with_member=False, coincide=False):
    rows = 1 if with_member else model.n_models
    latent = torch.randn(n, 1 if coincide else rows, particles, model.latent_state_dim)
    latent = latent.expand(-1, rows, -1, -1).clone()
    member = torch.randint(model.n_models, (n, 1)) if with_member else None
    alive = torch.rand(n, rows, particles, 1)
    return ImaginedState(latent, torch.zeros(n, model.context_dim), alive, member)


# --- oracle


@every_propagation
@with_and_without_member
@pytest.mark.parametrize("way", ["step", "rollout", "fast"])
def test_variances_are_of_members_at_the_same_state(way, with_member, propagation):
    """Members were compared at their own particles: after one step noise counted as ignorance."""
    model, horizon = random_ensemble(n_modes=2), 3
    if way != "fast":
        model = as_kind(Unchanged, model)
    imagined = make_imagination(model, propagation=propagation)
    assert (imagined.fast_rollout() is None) is (way != "fast" or propagation != "fixed_model")
    state = some_state(model, with_member=with_member)
    actions, before = torch.randn(4, horizon, 2), [state.latent]
    if way == "step":
        outs, now = [], state
        for t in range(horizon):
            outs.append(imagined.step(now, actions[:, t], deterministic=False))
            now = now._replace(latent=outs[-1].latent, member=outs[-1].member)
        latent, epistemic, aleatoric = (
            torch.stack([getattr(out, name) for out in outs], 1)
            for name in ("latent", "epistemic_var", "aleatoric_var")
        )
    else:
        out = imagined.rollout(state, actions, deterministic=False)
        latent, epistemic, aleatoric = out.latent, out.epistemic_var, out.aleatoric_var
    assert epistemic.shape == aleatoric.shape == (4, horizon, 3)
    before += latent.unbind(1)
    for i, t in itertools.product(range(2), range(horizon)):
        particles = before[t][i].flatten(0, 1)
        expected = variances_at(model, particles, torch.zeros(0), actions[i, t])
        for found, right in zip((epistemic, aleatoric), expected, strict=True):
            torch.testing.assert_close(found[i, t].double(), right, rtol=1e-3, atol=1e-5)


# --- properties


@every_propagation
@every_termination
@with_and_without_member
@pytest.mark.parametrize("fast", [True, False])
def test_identical_members_know_the_same_at_every_step(fast, with_member, termination, propagation):
    """Five members of equal weights had an epistemic standard deviation of 1.3 after one step."""
    model = identical_members()
    model = model if fast else as_kind(Unchanged, model)
    imagined = make_imagination(model, propagation=propagation, termination=termination)
    state = some_state(model, with_member=with_member)
    out = imagined.rollout(state, torch.randn(4, 6, 2), deterministic=False)
    assert (out.epistemic_var.sqrt() < 1e-5 * out.latent.abs().max()).all()
    assert out.aleatoric_var.sqrt().mean() > 0.3


@pytest.mark.parametrize("num_particles", [None, 1])
def test_a_noisy_television_gives_no_bonus(num_particles):
    model = identical_members(n_particles_per_model=2)
    parts = IdentityEncoder(3), model, None, CONTINUOUS
    env = PredictorEnv(*parts, num_particles=num_particles, uncertainty=True)
    start = env.initial_state(observations(env, 4))
    actions = random_actions(env, 4, 5)
    assert env.imagine(start, actions)["next", "latent"].std(0).min() > 0.1  # noise on the screen
    for kind in (DisagreementBonus, PessimismPenalty):
        watching = TransformedEnv(env, kind(1.0))
        out = watching.rollout(5, tensordict=start.clone(), auto_reset=False)
        assert out["next", "disagreement"].max() < 1e-4
        assert out["next", "reward"].abs().max() < 1e-4
    returns = CandidateReturn(env, disagreement=100.0)(start, actions)
    assert returns.abs().max() < 0.05


@every_propagation
@every_termination
@with_and_without_member
def test_asking_for_uncertainty_changes_no_step(with_member, termination, propagation):
    model = as_kind(Unchanged, random_ensemble(n_modes=2))
    state, actions = some_state(model, with_member=with_member), torch.randn(4, 3, 2)
    imagined = make_imagination(model, propagation=propagation, termination=termination)
    outs = []
    for uncertainty in (True, False):
        torch.manual_seed(0)
        options = {"deterministic": False, "uncertainty": uncertainty}
        outs.append(imagined.rollout(state, actions, **options))
    assert outs[0].epistemic_var is not None and outs[1].epistemic_var is None
    for name in ("latent", "alive", "term_prob", "reward"):
        torch.testing.assert_close(*(getattr(out, name) for out in outs), rtol=1e-4, atol=1e-5)


@with_and_without_member
def test_expectation_moves_each_particle_of_a_column_by_all_members(with_member):
    """Particles of a user that differ: each by what all members say of it."""
    model = random_ensemble(n_modes=2)
    state = some_state(model, with_member=with_member, coincide=True)
    action = torch.randn(4, 2)
    out = make_imagination(model, propagation="expectation").step(
        state, action, deterministic=False
    )
    for p in range(2):
        latent = state.latent[:, 0, p]
        mean, weights, _, _ = model.predict(latent, state.context, action)
        expected = (weights.unsqueeze(-1) * mean).sum(-2).mean(-2)
        torch.testing.assert_close(
            out.latent[:, :, p], expected[:, None].expand_as(out.latent[:, :, p])
        )


# --- dead particles


@every_propagation
@pytest.mark.parametrize("way", ["step", "rollout"])
def test_the_state_of_a_dead_particle_does_not_make_variances_nan(way, propagation):
    model = random_ensemble(n_modes=2)
    state = some_state(model, n=2)
    state.latent[:, 0, 1] = math.inf
    state.alive[:, 0, 1] = 0.0
    imagined = make_imagination(as_kind(Unchanged, model), propagation=propagation)
    actions = torch.randn(2, 1, 2)
    if way == "step":
        out = imagined.step(state, actions[:, 0], deterministic=True)
        found = out.epistemic_var, out.aleatoric_var
    else:
        imagined = make_imagination(model, propagation=propagation)
        out = imagined.rollout(state, actions, deterministic=True)
        found = out.epistemic_var[:, 0], out.aleatoric_var[:, 0]
    for i in range(2):
        living = state.latent[i].flatten(0, 1)[[0, 2, 3, 4, 5]]
        expected = variances_at(model, living, torch.zeros(0), actions[i, 0])
        for x, right in zip(found, expected, strict=True):  # the dead one adds 0 to the mean
            torch.testing.assert_close(x[i].double(), right * 5 / 6, rtol=1e-3, atol=1e-5)


def test_the_state_of_a_living_particle_is_not_hidden():
    model = random_ensemble()
    state = some_state(model, n=2)
    state.latent[0, 0, 1] = math.nan
    out = make_imagination(model).step(state, torch.randn(2, 2), deterministic=True)
    assert out.epistemic_var[0].isnan().all() and out.epistemic_var[1].isfinite().all()


# --- what it costs


class Counting(DynamicsModel):
    """Counts the particles that it is asked for."""

    latent_state_dim, context_dim, action_dim = 3, 0, 2
    n_models, n_modes, n_particles_per_model = 4, 1, 2
    n_asked = 0

    def predict_particles(self, latent, context, action, member=None):
        self.n_asked += latent.shape[:-1].numel()
        mean = latent.unsqueeze(-2) + 0.1
        return ParticlePrediction(
            mean, torch.ones_like(mean), torch.zeros_like(mean[..., 0]), latent[..., :1] - 5
        )


@every_propagation
def test_variances_cost_e_times_the_evaluations_and_nothing_where_they_are_not_asked_for(
    propagation,
):
    model = Counting()
    options = {"uncertainty": True, "propagation": propagation}
    env = PredictorEnv(IdentityEncoder(3), model, None, CONTINUOUS, **options)
    start, actions = env.initial_state(observations(env, 3)), random_actions(env, 3, 5)

    def asked(function):
        model.n_asked = 0
        function()
        return model.n_asked

    plain = 3 * 5 * 8
    names = {("next", "reward"), ("next", "alive")}
    assert asked(lambda: env.imaginer(start, names)(actions)) == plain
    with_variance = names | {("next", "epistemic_var")}
    assert asked(lambda: env.imaginer(start, with_variance)(actions)) == 4 * plain
    assert asked(lambda: env.imagine(start, actions)) == 4 * plain
    assert asked(lambda: CandidateReturn(env)(start, actions)) == plain
    assert asked(lambda: CandidateReturn(env, disagreement=0.1)(start, actions)) == 4 * plain


def test_a_weight_of_disagreement_that_is_set_later_asks_for_variances():
    env = make_env(uncertainty=True, deterministic=True)
    score = CandidateReturn(env)
    start, actions = env.initial_state(observations(env, 3)), random_actions(env, 3, 5)
    plain = score(start, actions)
    score.disagreement = 0.5
    expected = CandidateReturn(env, disagreement=0.5)(start, actions)
    torch.testing.assert_close(score(start, actions), expected)
    assert (expected > plain).all()


def test_planners_of_identical_members_are_not_drawn_to_noise():
    """The bonus led to where the noise was largest."""

    class Noisy(DynamicsModel):
        latent_state_dim, context_dim, action_dim = 1, 0, 1
        n_models, n_modes, n_particles_per_model = 3, 1, 2

        def predict_particles(self, latent, context, action, member=None):
            mean = latent.unsqueeze(-2)
            std = torch.exp(5 * action)[..., None, None, None, :].expand_as(mean)
            return ParticlePrediction(
                mean, std, torch.zeros_like(mean[..., 0]), torch.full_like(latent, -50.0)
            )

    def effort(latent, context, action):
        return -action.square()

    spec = CONTINUOUS[..., :1].clone()
    env = PredictorEnv(IdentityEncoder(1), Noisy(), effort, spec, uncertainty=True)
    planner = CrossEntropyPlanner(
        env, planning_horizon=3, optim_steps=8, num_candidates=64, top_k=8, disagreement=10.0
    )
    start = env.initial_state(TensorDict(observation=torch.zeros(4, 1), batch_size=[4]))
    assert planner(start)["action"].abs().max() < 0.1
