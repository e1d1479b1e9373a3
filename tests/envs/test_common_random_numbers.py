"""Envs that share random numbers: equal actions have equal outcomes, whatever the way they go."""

import pytest
import torch
from torch import nn
from torchrl.envs import TransformedEnv

from layeredrl_trl.envs import DisagreementBonus, PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble
from tests.changed_ensembles import Unchanged, as_kind
from tests.envs.imagined import CONTINUOUS, make_env, observations, random_actions

N_GROUPS, N, H = 3, 8, 5
OPTIONS = [
    {},
    {"termination": "sample"},
    {"propagation": "random_model"},
    {"propagation": "random_model", "termination": "sample"},
    {"propagation": "expectation", "termination": "sample"},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def slow(env):
    """Without a fast rollout."""
    env.world_model.dynamics = as_kind(Unchanged, env.world_model.dynamics)
    return env


def equal_envs(env, *, batch=(N_GROUPS, N)):
    """The same state and the same actions for all envs of all groups."""
    state = env.initial_state(observations(env, 1)).expand(*batch).clone()
    if "member" in state.keys():
        state["member"] = torch.ones_like(state["member"])
    return state, random_actions(env, 1, H).expand(*batch, H, 2)


def imagined(env, state, actions, way):
    if way == "imagine":
        return env.imagine(state, actions)["next"]
    if way == "imaginer":
        names = [("next", "latent"), ("next", "alive"), ("next", "reward")]
        return {key[1]: x for key, x in env.imaginer(state, names)(actions).items()}
    outs = []
    for action in actions.unbind(-2):
        state = env.step(state.set("action", action))
        outs.append(state["next"])
        state = env.step_mdp(state)
    return torch.stack(outs, -1)


@every_option
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("way", ["imagine", "imaginer", "step", "slow"])
def test_a_group_shares_and_groups_and_particles_do_not(way, num_particles, options):
    env = make_env(num_particles=num_particles, **options)
    if way == "slow":
        env, way = slow(env), "imagine"
    state, actions = equal_envs(env)
    with env.common_random_numbers(N):
        out = imagined(env, state, actions, way)
    for key in ("latent", "alive", "reward"):
        first = out[key][:, :1].expand_as(out[key])
        torch.testing.assert_close(out[key], first, rtol=1e-5, atol=1e-6)
    if options.get("propagation") != "expectation":
        latent = out["latent"][:, 0]  # [N_GROUPS, H, E, P, D]
        assert (latent[0] != latent[1]).any(-1).all()
        particles = latent.flatten(2, 3)
        assert num_particles or (particles[:, :, 0] != particles[:, :, 1]).any(-1).all()
        assert (latent[:, 1:] - latent[:, :-1]).std(1).min() > 1e-3  # other noise in each step


@every_option
@pytest.mark.parametrize("num_particles", [None, 1])
def test_fast_and_step_by_step_draw_the_same(num_particles, options):
    fast = make_env(num_particles=num_particles, **options)
    state = fast.initial_state(observations(fast, N_GROUPS, N))
    actions, outs = random_actions(fast, N_GROUPS, N, H), []
    for env, way in ((fast, "imagine"), (fast, "step"), (slow(fast), "imagine")):
        torch.manual_seed(0)
        with env.common_random_numbers(N):
            outs.append(imagined(env, state, actions, way))
    for out in outs[1:]:
        for key in ("latent", "alive", "reward"):
            torch.testing.assert_close(out[key], outs[0][key], rtol=1e-4, atol=1e-5)


@every_option
@pytest.mark.parametrize("num_particles", [None, 1])
def test_outside_nothing_changes(num_particles, options):
    env = make_env(num_particles=num_particles, **options)
    state = env.initial_state(observations(env, 4))
    actions, outs = random_actions(env, 4, H), []
    for _ in range(2):
        torch.manual_seed(0)
        outs.append(env.imagine(state, actions)["next", "latent"])
        with pytest.raises(ZeroDivisionError), env.common_random_numbers(2):
            env.imagine(state, actions)
            raise ZeroDivisionError
    assert torch.equal(*outs)
    torch.manual_seed(0)
    with env.common_random_numbers(1):
        assert torch.equal(env.imagine(state, actions)["next", "latent"], outs[0])


def test_members_stay_spread_over_a_group():
    """All envs of a group were of one member after a step, which costs as much as all members."""
    env = make_env(num_particles=1, propagation="random_model")
    state = env.repeat_state(env.initial_state(observations(env, 40)), 9)
    with env.common_random_numbers(9):
        member = env.imagine(state, random_actions(env, 40, 9, H))["next", "member"].squeeze(-1)
    counts = torch.stack([(member == e).sum(1) for e in range(3)])
    assert (counts == 3).all()
    moved_by = (member[:, :, 1:] - member[:, :, :-1]) % 3
    assert (moved_by == moved_by[:, :1]).all()  # chance is shared
    shares = moved_by[:, 0].flatten().bincount(minlength=3) / moved_by[:, 0].numel()
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.12)


@every_option
def test_a_tape_repeats_the_numbers_for_fewer_envs(options):
    env = make_env(**options)
    state, actions = equal_envs(env)
    tape, outs = [], []
    for n in (N, 3):
        with env.common_random_numbers(n, tape):
            outs.append(env.imagine(state[:, :n], actions[:, :n])["next", "latent"])
    torch.testing.assert_close(outs[1], outs[0][:, :3], rtol=1e-5, atol=1e-6)


def test_under_transforms():
    env = make_env(uncertainty=True)
    state, actions = equal_envs(env)
    outside = TransformedEnv(env, DisagreementBonus(0.5))
    with env.common_random_numbers(N):
        reward = imagined(outside, state, actions, "step")["reward"]
    torch.testing.assert_close(reward, reward[:, :1].expand_as(reward), rtol=1e-5, atol=1e-6)
    assert (reward[0] != reward[1])[:, 1:].all()


# --- a fast rollout of one's own


class OwnRollout(ProbabilisticEnsemble):
    """Promises a rollout that knows nothing of shared numbers."""

    n_calls = 0

    def fast_rollout(self, *, compile=False):
        rollout = ProbabilisticEnsemble.fast_rollout(self)

        def own(latent, context, actions, member=None, *, deterministic, terminations):
            self.n_calls += 1
            options = {"deterministic": deterministic, "terminations": terminations}
            return rollout(latent, context, actions, member, **options)

        return own


def test_a_fast_rollout_that_cannot_share_is_not_asked_to():
    env = make_env()
    model = env.world_model.dynamics = as_kind(OwnRollout, env.world_model.dynamics)
    state, actions = equal_envs(env)
    env.imagine(state, actions)
    assert model.n_calls == 1
    with env.common_random_numbers(N):
        latent = env.imagine(state, actions)["next", "latent"]
    assert model.n_calls == 1
    torch.testing.assert_close(latent, latent[:, :1].expand_as(latent))
    env.deterministic = True
    with env.common_random_numbers(N):
        env.imagine(state, actions)
    assert model.n_calls == 2


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, r"expected latent states \[4, 5, 3, 2, 3\], got \[4, 5, 6, 1, 3\]"),
        (1, r"expected termination logits \[4, 5, 3, 2, 1\], got \[4, 5, 6, 1, 1\]"),
    ],
)
def test_a_fast_rollout_of_a_wrong_shape_is_named(which, message):
    class Wrong(ProbabilisticEnsemble):
        def fast_rollout(self, *, compile=False):
            rollout = ProbabilisticEnsemble.fast_rollout(self)

            def own(*given, **options):
                out = list(rollout(*given, **options))
                out[which] = out[which].flatten(2, 3).unsqueeze(3)
                return out

            return own

    env = make_env()
    env.world_model.dynamics = as_kind(Wrong, env.world_model.dynamics)
    start, actions = env.initial_state(observations(env, 4)), random_actions(env, 4, H)
    with pytest.raises(ValueError, match=f"fast_rollout: {message}"):
        env.imagine(start, actions)


# --- errors


def test_groups_that_do_not_fit():
    env = make_env()
    state, actions = env.initial_state(observations(env, 5)), random_actions(env, 5, H)
    message = "5 rows cannot be divided into groups of 2"
    with env.common_random_numbers(2), pytest.raises(ValueError, match=message):
        env.imagine(state, actions)
    with env.common_random_numbers(2), pytest.raises(ValueError, match=message):
        env.step(state.set("action", actions[:, 0]))


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_number_that_is_none(n, error):
    with pytest.raises(error, match="n must be"), make_env().common_random_numbers(n):
        pass


def test_a_network_of_ones_own_shares_too():
    model = ProbabilisticEnsemble(3, 0, 2, n_models=3, network=nn.Linear)
    env = PredictorEnv(IdentityEncoder(3), model, None, CONTINUOUS)
    state, actions = equal_envs(env)
    with env.common_random_numbers(N):
        latent = env.imagine(state, actions)["next", "latent"]
    torch.testing.assert_close(latent, latent[:, :1].expand_as(latent))
