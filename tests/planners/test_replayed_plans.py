"""Planning by replays is planning: on a CPU, by a stand-in for CUDA graphs."""

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import RewardScaling, TransformedEnv

from layeredrl_trl.modules import ValueNet
from layeredrl_trl.planners.base import SamplingPlanner
from tests.planners.small_planners import (
    BATCH_SHAPES,
    every_planner,
    every_return_action,
    make_planner,
    predictor_env,
)
from tests.replaying import replays  # noqa: F401

on_a_stand_in = pytest.mark.usefixtures("replays")


@pytest.fixture(autouse=True)
def searches(monkeypatch):
    """The planners that searched in Python, in order."""
    search, seen = SamplingPlanner._search, []

    def noted(planner, *args):
        seen.append(planner)
        return search(planner, *args)

    monkeypatch.setattr(SamplingPlanner, "_search", noted)
    return seen


def both(name, env=None, **options):
    env = predictor_env(name) if env is None else env
    return [make_planner(name, env, cudagraphs=x, **options) for x in (True, False)]


def assert_same_plans(own, plain, batch=(4,), n=6, seed=0):
    """Plan ``n`` times, each from the plan before."""
    env = plain.env
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


def count(searches, planner):
    """How often a planner searched since it was last asked."""
    n = sum(one is planner for one in searches)
    searches.clear()
    return n


@on_a_stand_in
@every_planner
@every_return_action
@pytest.mark.parametrize("num_particles", [None, 1])
def test_it_is_planning(name, return_action, num_particles, searches):
    env = predictor_env(name, num_particles=num_particles, uncertainty=True)
    own, plain = both(
        name,
        env,
        return_action=return_action,
        disagreement=0.5,
        terminal_penalty=1.0,
        terminal_value=ValueNet(3, 0),
        gamma=0.9,
    )
    assert_same_plans(own, plain)
    assert count(searches, own) == 4  # three to warm up, one to record


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
def test_sampled_terminations(name, searches):
    own, plain = both(name, predictor_env(name, termination="sample"))
    assert_same_plans(own, plain)
    assert count(searches, own) == 4


@on_a_stand_in
@every_planner
def test_in_an_env_with_transforms(name):
    """Its steps go through TorchRL, which waits for the device."""
    own, plain = both(name, TransformedEnv(predictor_env(name), RewardScaling(0.0, 2.0)))
    start = TensorDict(observation=torch.randn(4, 3), batch_size=[4])
    start = own.env.base_env.initial_state(start)
    plain(start.clone())
    for _ in range(3):
        own(start.clone())
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        own(start.clone())


@on_a_stand_in
def test_what_is_learned_and_what_is_changed_is_planned_with(searches):
    own, plain = both("iCEM", predictor_env("iCEM", deterministic=None))
    assert_same_plans(own, plain)
    assert count(searches, own) == 4
    with torch.no_grad():
        for p in own.env.world_model.parameters():
            p.mul_(0.5)
    assert_same_plans(own, plain)
    assert count(searches, own) == 0
    for planner in (own, plain):
        planner.momentum = 0.9
    assert_same_plans(own, plain)
    assert count(searches, own) == 4
    own.env.deterministic = True
    assert_same_plans(own, plain)
    assert count(searches, own) == 4


@on_a_stand_in
def test_a_callback_sees_every_round(searches):
    seen = []
    own, _ = both("CEM", callback=lambda td: seen.append(td["round"]))
    env = own.env
    start = env.initial_state(TensorDict(observation=torch.randn(4, 3), batch_size=[4]))
    for _ in range(6):
        own(start.clone())
    assert seen == [0, 1, 2] * 6
    assert count(searches, own) == 6
    own.callback = None
    for _ in range(6):
        own(start.clone())
    assert count(searches, own) == 4


@on_a_stand_in
def test_copies_plan_on_their_own(searches):
    own, plain = both("iCEM")
    assert_same_plans(own, plain)
    twin = copy.deepcopy(own)
    with torch.no_grad():
        for p in own.env.world_model.parameters():
            p.mul_(0.5)
    other = copy.deepcopy(own)
    assert twin.env is not own.env
    assert_same_plans(other, plain)
    assert count(searches, other) == 4


@every_planner
@pytest.mark.gpu
def test_cuda_graphs_plan(name, searches):
    """Anew in every call, the same for the same seed, and no worse than without."""
    env = predictor_env(name, deterministic=True).to("cuda")
    own, plain = (p.to("cuda") for p in both(name, env, num_candidates=256))
    start = TensorDict(observation=torch.randn(4, 3), batch_size=[4]).to("cuda")
    start = env.initial_state(start)
    returns = [own(start.clone())["plan_return"] for _ in range(8)]
    assert count(searches, own) == 4
    assert len({x.sum().item() for x in returns}) == 8
    again = []
    for _ in range(2):
        torch.manual_seed(1)
        again.append(own(start.clone())["next", "plan"])
    assert torch.equal(*again)
    expected = torch.stack([plain(start.clone())["plan_return"] for _ in range(8)]).mean(0)
    torch.testing.assert_close(torch.stack(returns).mean(0), expected, rtol=0.05, atol=0.05)
