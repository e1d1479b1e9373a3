"""Every planner by its name, made small, and envs that it can plan in."""

import pytest
import torch
from torchrl.data import Bounded, Categorical, OneHot

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder
from layeredrl_trl.planners import (
    CategoricalCrossEntropyPlanner,
    CrossEntropyPlanner,
    ICEMPlanner,
    PathIntegralPlanner,
)
from tests.oracles import random_ensemble, random_reward
from tests.planners.planning_envs import FreeEnv

BATCH_SHAPES = [(), (3,), (2, 3)]
CONTINUOUS = {
    "CEM": (CrossEntropyPlanner, {"top_k": 4}),
    "iCEM": (ICEMPlanner, {"top_k": 4}),
    "MPPI": (PathIntegralPlanner, {}),
}
PLANNERS = {**CONTINUOUS, "categorical": (CategoricalCrossEntropyPlanner, {"top_k": 4})}
RETURN_ACTIONS = ["mean", "best", "sample"]

every_planner = pytest.mark.parametrize("name", PLANNERS)
every_return_action = pytest.mark.parametrize("return_action", RETURN_ACTIONS)


def make_env(name, reward=None):
    if name == "categorical":
        return FreeEnv(OneHot(3), reward or (lambda action: action[..., 1:2].float()))
    spec = Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 3.0]), (2,))
    return FreeEnv(spec, *([reward] if reward else []))


def make_planner(name, env=None, **options):
    cls, defaults = PLANNERS[name]
    sizes = {"planning_horizon": 4, "optim_steps": 3, "num_candidates": 16}
    return cls(env or make_env(name), **{**sizes, **defaults, **options})


def predictor_env(name, **options):
    spec = Categorical(3) if name == "categorical" else Bounded(-1, 1, (2,), dtype=torch.float32)
    model = random_ensemble(3, 0, spec, n_models=3, n_modes=2)
    return PredictorEnv(IdentityEncoder(3), model, random_reward(model), spec, **options)
