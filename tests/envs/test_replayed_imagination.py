"""Imagining by replays is imagining: on a CPU, by a stand-in for CUDA graphs."""

import copy
import itertools
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from layeredrl_trl.acceleration import member_groups
from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, SymmetryBreakingStart
from tests.envs.imagined import (
    ACTION_SPECS,
    BATCH_SHAPES,
    SplitEncoder,
    count_rollouts,
    make_env,
    observations,
    random_actions,
)
from tests.replaying import replays  # noqa: F401
from tests.small_predictors import small_predictor

on_a_stand_in = pytest.mark.usefixtures("replays")


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


def assert_same_imagination(own, plain, batch=(4,), n=6, horizon=5):
    for seed in range(n):
        torch.manual_seed(seed)
        state, actions = own.reset(observations(own, *batch)), random_actions(own, *batch, horizon)
        outs = []
        for env in (own, plain):
            torch.manual_seed(seed)
            outs.append(env.imagine(state, actions))
        assert outs[0].batch_size == outs[1].batch_size == (*batch, horizon)
        assert set(outs[0].keys(True, True)) == set(outs[1].keys(True, True))
        torch.testing.assert_close(outs[0].to_dict(), outs[1].to_dict(), rtol=1e-5, atol=1e-6)


def both(**options):
    """Two envs of equal parts, the first of which replays."""
    envs = []
    for cudagraphs in (True, False):
        torch.manual_seed(0)
        envs.append(make_env(cudagraphs=cudagraphs, **options))
    return envs


@on_a_stand_in
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("termination", ["soft", "sample"])
def test_it_is_imagining(num_particles, propagation, termination):
    options = {"propagation": propagation, "termination": termination}
    for uncertainty, deterministic in itertools.product([False, True], repeat=2):
        own, plain = both(
            num_particles=num_particles,
            uncertainty=uncertainty,
            deterministic=deterministic,
            **options,
        )
        calls = count_rollouts(own)
        assert_same_imagination(own, plain)
        assert len(calls) == 4  # three to warm up, one to record


@on_a_stand_in
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model"])
def test_members_in_blocks(propagation, monkeypatch):
    """What a replay sorts into blocks is what is given to it, not what was when it was recorded."""
    monkeypatch.setattr(member_groups, "_LEAST_SAVED_ROWS", -(2**30))
    monkeypatch.setattr(member_groups, "_LEAST_ROWS", 1)
    own, plain = both(num_particles=1, propagation=propagation)
    calls = count_rollouts(own)
    state, actions = own.reset(observations(own, 11)), random_actions(own, 11, 3)
    for seed in range(8):
        state["member"] = torch.randint(own.world_model.dynamics.n_models, (11, 1))
        outs = []
        for env in (own, plain):
            torch.manual_seed(seed)
            outs.append(env.imagine(state, actions, set_truncated=True))
        torch.testing.assert_close(outs[0].to_dict(), outs[1].to_dict(), rtol=1e-5, atol=1e-6)
    assert len(calls) == 4


@on_a_stand_in
@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("action", ACTION_SPECS)
def test_any_batch_and_action(batch, action):
    assert_same_imagination(*both(action_spec=ACTION_SPECS[action]), batch)


@on_a_stand_in
def test_other_sizes_are_recorded_apart():
    own, plain = both(num_particles=1)
    for _ in range(2):
        for batch, horizon in itertools.product([(4,), (7,)], [1, 3]):
            assert_same_imagination(own, plain, batch, 3, horizon)


@on_a_stand_in
def test_two_imaginations_differ_and_a_seed_repeats_them():
    own, _ = both()
    state, actions = own.reset(observations(own, 4)), random_actions(own, 4, 5)
    outs = [own.imagine(state, actions)["next", "latent"] for _ in range(8)]
    assert len({x.sum().item() for x in outs}) == 8
    again = []
    for _ in range(2):
        torch.manual_seed(1)
        again.append(own.imagine(state, actions)["next", "latent"])
    assert torch.equal(*again)


@on_a_stand_in
def test_earlier_outcomes_stay():
    own, _ = both()
    state, actions = own.reset(observations(own, 4)), random_actions(own, 4, 5)
    outs = [own.imagine(state, actions) for _ in range(6)]
    copies = [out.clone() for out in outs]
    own.imagine(state, actions + 1)
    for out, there in zip(outs, copies, strict=True):
        torch.testing.assert_close(out.to_dict(), there.to_dict(), rtol=0, atol=0)


@on_a_stand_in
def test_what_is_learned_and_what_is_changed_is_imagined():
    own, plain = both(deterministic=None)
    assert_same_imagination(own, plain)
    for env in (own, plain):
        for p in env.world_model.parameters():
            p.mul_(0.5)
    assert_same_imagination(own, plain)
    for env in (own, plain):
        env.world_model.termination = "sample"
    assert_same_imagination(own, plain)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert_same_imagination(own, plain)
    for env in (own, plain):
        env.world_model.propagation = "expectation"
        env.deterministic = True
    assert_same_imagination(own, plain)


@on_a_stand_in
def test_gradients_are_not_replayed():
    own, plain = both(deterministic=True)
    state, actions = own.reset(observations(own, 4)), random_actions(own, 4, 5)
    for _ in range(5):
        own.imagine(state, actions)
    grads = []
    for env in (own, plain):
        with torch.enable_grad():
            given = actions.clone().requires_grad_()
            env.imagine(state, given)["next", "reward"].sum().backward()
            grads.append(given.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads)


@on_a_stand_in
@pytest.mark.parametrize(("cudagraphs", "n_calls"), [(True, 4), (False, 6)])
def test_it_is_replayed_if_that_is_asked_for_whosoever_the_parts_are(cudagraphs, n_calls):
    class Reward(nn.Module):
        def forward(self, latent, context, action):
            return latent[..., :1]

    parts = make_env()
    env = PredictorEnv(
        IdentityEncoder(3),
        parts.world_model.dynamics,
        Reward(),
        parts.action_spec_unbatched,
        cudagraphs=cudagraphs,
    )
    calls = count_rollouts(env)
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    for _ in range(6):
        env.imagine(state, actions)
    assert len(calls) == n_calls


@on_a_stand_in
def test_what_waits_for_a_number_raises():
    env = make_env(
        cudagraphs=True, termination_fn=lambda s, c, a, s_next: 0.5 * (s[..., :1] > s.sum().item())
    )
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    for _ in range(3):
        env.imagine(state, actions)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            env.imagine(state, actions)


@on_a_stand_in
@pytest.mark.parametrize(
    "encoder", [SplitEncoder(3), IdentityEncoder(3)], ids=["split", "identity"]
)
def test_envs_of_predictors(encoder):
    predictor = small_predictor(encoder=encoder)
    env = predictor.env(Unbounded((1,)), cudagraphs=True)
    calls = count_rollouts(env)
    obs, act = torch.randn(6, 3), torch.randn(6, 4, 1)
    for i in range(8):
        torch.manual_seed(i)
        expected, _ = predictor.rollout(obs + i, act)
        torch.manual_seed(i)
        start = env.initial_state(TensorDict(observation=obs + i, batch_size=[6]))
        found = env.imagine(start, act)
        for key in ("latent", ("next", "latent"), ("next", "reward"), ("next", "alive")):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
    assert len(calls) == 4


@on_a_stand_in
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_imagine_on_their_own(copied):
    own, plain = both()
    assert_same_imagination(own, plain)
    twin = copied(own)
    with torch.no_grad():
        for p in own.world_model.parameters():
            p.mul_(0.5)
    calls = count_rollouts(twin)
    assert_same_imagination(twin, plain)
    assert len(calls) == 4


@on_a_stand_in
def test_a_symmetry_breaking_start_goes_on():
    """How far it is changes between replays; what was recorded goes along until it is over."""
    own, plain = both()
    calls = count_rollouts(own)
    inner = own.world_model.dynamics
    for env in (own, plain):
        env.world_model.dynamics = SymmetryBreakingStart(inner, 100)
    for env_steps, n_calls in ((0, 4), (75, 4), (90, 4), (100, 8), (120, 8), (140, 8)):
        for env in (own, plain):
            env.world_model.dynamics.advance(env_steps)
        plain.world_model.dynamics.load_state_dict(own.world_model.dynamics.state_dict())
        assert_same_imagination(own, plain)
        assert len(calls) == n_calls


@pytest.mark.gpu
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
def test_cuda_graphs_imagine_the_same(num_particles, propagation):
    own, plain = both(num_particles=num_particles, propagation=propagation, deterministic=True)
    own, plain = own.to("cuda"), plain.to("cuda")
    calls = count_rollouts(own)
    state = plain.reset(observations(plain, 4).to("cuda"))
    for i in range(8):
        actions = random_actions(plain, 4, 5) * (i + 1) / 8
        torch.manual_seed(i)
        expected = plain.imagine(state, actions)["next", "reward"]
        torch.manual_seed(i)
        torch.testing.assert_close(own.imagine(state, actions)["next", "reward"], expected)
    assert len(calls) == 4


@pytest.mark.gpu
def test_cuda_graphs_do_not_freeze_random_numbers():
    own, _ = both()
    own = own.to("cuda")
    state, actions = own.reset(observations(own, 4).to("cuda")), random_actions(own, 4, 5)
    outs = [own.imagine(state, actions)["next", "latent"] for _ in range(8)]
    assert len({x.sum().item() for x in outs}) == 8
    again = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        again.append(own.imagine(state, actions)["next", "latent"])
    assert torch.equal(*again[:2]) and not torch.equal(*again[1:])
