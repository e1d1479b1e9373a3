"""Planning by replays is planning: on a CPU, by a stand-in for CUDA graphs."""

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical
from torchrl.envs import RewardScaling, TransformedEnv

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, ValueNet
from tests.oracles import random_ensemble, random_reward
from tests.planners.test_base import BATCH_SHAPES, every_planner, every_return_action, make_planner
from tests.replaying import replays  # noqa: F401

on_a_stand_in = pytest.mark.usefixtures("replays")


def predictor_env(name, **options):
    spec = Categorical(3) if name == "categorical" else Bounded(-1, 1, (2,), dtype=torch.float32)
    model = random_ensemble(3, 0, spec, n_models=3, n_modes=2)
    return PredictorEnv(IdentityEncoder(3), model, random_reward(model), spec, **options)


def both(name, env=None, **options):
    env = predictor_env(name) if env is None else env
    return [make_planner(name, env, cudagraphs=x, **options) for x in (True, False)]


def assert_same_plans(own, plain, batch=(4,), n=6, seed=0):
    """Plan ``n`` times, each from the plan before; returns how often Python did."""
    env, calls = plain.env, []
    search = type(own)._search
    own._recorded.function = lambda *args: calls.append(1) or search(own, *args)
    start = TensorDict(observation=torch.randn(*batch, 3), batch_size=batch)
    start = getattr(env, "base_env", env).initial_state(start)
    carried = [start, start]
    for i in range(n):
        for j, planner in enumerate((own, plain)):
            torch.manual_seed(seed + i)
            out = planner(carried[j].clone())
            carried[j] = start.clone().update(out["next"]).update(out.exclude("next"))
        torch.testing.assert_close(
            carried[0].to_dict(), carried[1].to_dict(), rtol=1e-5, atol=1e-5, equal_nan=True
        )
    return len(calls)


@on_a_stand_in
@every_planner
@every_return_action
@pytest.mark.parametrize("num_particles", [None, 1])
def test_it_is_planning(name, return_action, num_particles):
    env = predictor_env(name, num_particles=num_particles, uncertainty=True)
    own, plain = both(
        name,
        env,
        return_action=return_action,
        disagreement=0.5,
        terminal_penalty=1.0,
        terminal_value=ValueNet(3, 0),
    )
    assert assert_same_plans(own, plain) == 4  # three to warm up, one to record


@on_a_stand_in
@every_planner
@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_any_batch_cold_or_warm(name, batch):
    for warm_start in (True, False):
        assert_same_plans(*both(name, warm_start=warm_start), batch)


@on_a_stand_in
@every_planner
def test_episodes_that_begin_start_cold(name):
    own, plain = both(name)
    env = own.env
    start = env.initial_state(TensorDict(observation=torch.randn(4, 3), batch_size=[4]))
    plan = plain(start.clone())["next"]
    for i in range(8):
        given = start.clone().update(plan).set("is_init", torch.rand(4, 1) < 0.5)
        outs = []
        for planner in (own, plain):
            torch.manual_seed(i)
            outs.append(planner(given.clone())["action"])
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@on_a_stand_in
@every_planner
def test_sampled_terminations(name):
    env = predictor_env(name, termination="sample")
    assert assert_same_plans(*both(name, env)) == 4


@on_a_stand_in
@every_planner
def test_in_an_env_with_transforms(name):
    """Its steps go through TorchRL, which waits for the device: the plan is made without."""
    env = TransformedEnv(predictor_env(name), RewardScaling(0.0, 2.0))
    own, plain = make_planner(name, env), make_planner(name, env, cudagraphs=False)
    assert assert_same_plans(own, plain, n=6) == 6


@on_a_stand_in
def test_what_is_learned_and_what_is_changed_is_planned_with():
    own, plain = both("iCEM", predictor_env("iCEM", deterministic=None))
    assert assert_same_plans(own, plain) == 4
    with torch.no_grad():
        for p in own.env.world_model.parameters():
            p.mul_(0.5)
    assert assert_same_plans(own, plain) == 0
    for planner in (own, plain):
        planner.momentum = 0.9
    assert assert_same_plans(own, plain) == 4
    own.env.deterministic = True
    assert assert_same_plans(own, plain) == 4


@on_a_stand_in
def test_a_callback_sees_every_round():
    seen = []
    (own, _) = both("CEM", callback=lambda td: seen.append(td["round"]))
    env = own.env
    start = env.initial_state(TensorDict(observation=torch.randn(4, 3), batch_size=[4]))
    for _ in range(6):
        own(start.clone())
    assert seen == [0, 1, 2] * 6
    own.callback = None
    for _ in range(6):
        own(start.clone())
    assert own._recorded._recordings


@on_a_stand_in
def test_copies_plan_on_their_own():
    own, plain = both("iCEM")
    assert_same_plans(own, plain)
    twin = copy.deepcopy(own)
    with torch.no_grad():
        for p in own.env.world_model.parameters():
            p.mul_(0.5)
    other = copy.deepcopy(own)
    assert twin.env is not own.env and not twin._recorded._recordings
    assert_same_plans(other, plain)


@every_planner
@pytest.mark.gpu
def test_cuda_graphs_plan(name):
    """Anew in every call, the same for the same seed, and no worse than without."""
    env = predictor_env(name, deterministic=True).to("cuda")
    own, plain = (p.to("cuda") for p in both(name, env, num_candidates=256))
    start = TensorDict(observation=torch.randn(4, 3), batch_size=[4]).to("cuda")
    start = env.initial_state(start)
    returns = [own(start.clone())["plan_return"] for _ in range(8)]
    assert own._recorded._recordings
    assert len({x.sum().item() for x in returns}) == 8
    again = []
    for _ in range(2):
        torch.manual_seed(1)
        again.append(own(start.clone())["next", "plan"])
    assert torch.equal(*again)
    expected = torch.stack([plain(start.clone())["plan_return"] for _ in range(8)]).mean(0)
    torch.testing.assert_close(torch.stack(returns).mean(0), expected, rtol=0.05, atol=0.05)
