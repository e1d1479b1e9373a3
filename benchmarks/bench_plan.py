"""One plan: 128 candidates of one particle each, horizon 15, 6 rounds, from a cold start.

iCEM against the same algorithm in bare PyTorch, and the plain cross-entropy method against
TorchRL's, on one environment.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import CEMPlanner

from benchmarks.bare import BareImagination, BarePlanner
from benchmarks.workloads import (
    GAMMA,
    OBSERVATION_DIM,
    WORKLOADS,
    action_spec,
    make_predictor,
)
from layeredrl_trl.functional import colouring_matrix
from layeredrl_trl.planners import CrossEntropyPlanner, ICEMPlanner

SEARCH = {"planning_horizon": 15, "optim_steps": 6, "num_candidates": 128, "top_k": 12}


def make_plan(workload, who, n_envs):
    """What makes one plan."""
    observation = torch.randn(n_envs, OBSERVATION_DIM)
    if who == "bare iCEM":
        imagination = BareImagination(workload, n_particles=1)
        colouring = colouring_matrix(2.0, SEARCH["planning_horizon"])
        bare = BarePlanner(imagination, colouring=colouring, **SEARCH)
        return lambda: bare.plan(observation)
    env = make_predictor(workload).env(action_spec(), num_particles=1)
    if who == "TorchRL's CEM":
        planner = CEMPlanner(env, **SEARCH)
    else:
        planner = (ICEMPlanner if who == "iCEM" else CrossEntropyPlanner)(
            env, gamma=GAMMA, **SEARCH
        )
    state = env.initial_state(TensorDict(observation=observation, batch_size=[n_envs]))
    return lambda: planner(state.copy())


@pytest.mark.parametrize(("who", "other"), [("iCEM", "bare iCEM"), ("CEM", "TorchRL's CEM")])
@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize("name", WORKLOADS)
def test_plan(name, n_envs, who, other, take_turns):
    plan, other_plan = (make_plan(WORKLOADS[name], one, n_envs) for one in (who, other))
    take_turns(f"plan, {name}, {n_envs} envs", who, plan, other, other_plan, rounds=15)


def test_members_dealt_out_to_candidates(take_turns):
    """A plan with one particle a candidate does not cost more with a larger ensemble."""
    plans = [
        make_plan(dataclasses.replace(WORKLOADS["ens5"], n_models=n), "iCEM", 8) for n in (7, 1)
    ]
    take_turns("plan, ens5 with E members, 8 envs", "E = 7", plans[0], "E = 1", plans[1], rounds=20)
