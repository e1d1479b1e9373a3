"""Every planner on problems whose best return is known."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, OneHot

from layeredrl_trl.planners import (
    CategoricalCrossEntropyPlanner,
    CrossEntropyPlanner,
    ICEMPlanner,
    PathIntegralPlanner,
)
from tests.planners.planning_envs import FastLQREnv, quadratic_value
from tests.problems import DOUBLE_INTEGRATOR, TWO_MOTORS, TwoStepBanditEnv, riccati

# Each with bounds that the best actions stay within.
SYSTEMS = {
    "double integrator": {**DOUBLE_INTEGRATOR, "bound": 5.0},
    "two motors": {**TWO_MOTORS, "bound": 2.0},
}
# Coloured noise hardly tries plans that jump, and smaller rounds take more of them to converge:
# iCEM gets near the optimum with less of both.
PLANNERS = {
    "CEM": (CrossEntropyPlanner, {"top_k": 40}),
    "iCEM": (ICEMPlanner, {"top_k": 40, "noise_beta": 0.25, "population_decay": 1.0}),
    "MPPI": (PathIntegralPlanner, {"temperature": 0.05, "std_decay": 0.9}),
}
THOROUGH = {"optim_steps": 60, "num_candidates": 400}

every_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
every_planner = pytest.mark.parametrize("name", PLANNERS)


def make_planner(name, env, **options):
    cls, defaults = PLANNERS[name]
    return cls(env, **{**THOROUGH, **defaults, **options})


def states(system, *batch_size):
    latent = torch.rand(*batch_size, len(system["A"])) * 2 - 1
    return TensorDict({"latent": latent}, batch_size=batch_size)


def best_return(system, tensordict, **options):
    matrices = {key: system[key] for key in "ABQR"}
    P, x = riccati(**matrices, **options)[0][0], tensordict["latent"]
    return -((x @ P) * x).sum(-1)


@every_system
@every_planner
@pytest.mark.parametrize("return_action", ["mean", "best"])
def test_open_loop_cost_is_within_two_percent_of_the_riccati_optimum(name, system, return_action):
    planner = make_planner(
        name, FastLQREnv(**system), planning_horizon=20, return_action=return_action
    )
    tensordict = states(system, 8)
    optimum = best_return(system, tensordict, horizon=20)
    plan = planner(tensordict)["next", "plan"]
    achieved = planner.candidate_return(tensordict, plan.unsqueeze(1)).flatten()
    assert (achieved <= 0.9999 * optimum).all()
    assert achieved.sum() >= 1.02 * optimum.sum()


@every_planner
@pytest.mark.parametrize("return_action", ["mean", "best"])
def test_continuous_planners_choose_the_patient_arm(name, return_action):
    env = TwoStepBanditEnv()
    options = {} if name == "MPPI" else {"top_k": 8}
    planner = make_planner(
        name,
        env,
        planning_horizon=4,
        optim_steps=5,
        num_candidates=128,
        return_action=return_action,
        **options,
    )
    tensordict = env.reset(TensorDict(batch_size=[20]))
    out = planner(tensordict)
    assert (out["action"] > 0.5).all()
    if return_action == "best":
        torch.testing.assert_close(out["plan_return"], torch.full((20, 1), env.best_return))


@pytest.mark.parametrize("spec", [OneHot(3), Categorical(3), Categorical(3, (1,))])
@pytest.mark.parametrize("return_action", ["mean", "best"])
def test_the_categorical_planner_chooses_the_patient_arm(spec, return_action):
    env = TwoStepBanditEnv(spec)
    planner = CategoricalCrossEntropyPlanner(
        env,
        planning_horizon=4,
        optim_steps=3,
        num_candidates=64,
        top_k=8,
        return_action=return_action,
    )
    out = planner(env.reset(TensorDict(batch_size=[20])))
    expected = spec.encode(2) if isinstance(spec, OneHot) else torch.full(spec.shape, 2)
    assert (out["action"] == expected.expand(20, *spec.shape)).all()
    if return_action == "best":
        torch.testing.assert_close(out["plan_return"], torch.full((20, 1), env.best_return))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@every_planner
def test_three_steps_and_the_exact_value_are_as_good_as_thirty(name, gamma):
    P, K = riccati(**DOUBLE_INTEGRATOR, horizon=30, gamma=gamma)
    short = make_planner(
        name,
        FastLQREnv(**DOUBLE_INTEGRATOR),
        planning_horizon=3,
        terminal_value=quadratic_value(P[3]),
        gamma=gamma,
        return_action="best",
    )
    tensordict = states(DOUBLE_INTEGRATOR, 4)
    optimum = best_return(DOUBLE_INTEGRATOR, tensordict, horizon=30, gamma=gamma)
    out = short(tensordict)
    torch.testing.assert_close(out["plan_return"].squeeze(-1), optimum, rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(out["action"], -tensordict["latent"] @ K[0].T, rtol=0.05, atol=0.05)
    short.score.terminal_value = None
    blind = short(tensordict.select("latent"))["action"] + tensordict["latent"] @ K[0].T
    assert blind.abs().max() > 0.4
