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


@pytest.mark.parametrize("who", ["bare iCEM", "iCEM", "CEM", "TorchRL's CEM"])
@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize("name", WORKLOADS)
def test_plan(name, n_envs, who, benchmark):
    plan = make_plan(WORKLOADS[name], who, n_envs)
    benchmark.group, benchmark.name = f"plan, {name}, {n_envs} envs", who
    benchmark.pedantic(plan, rounds=8, iterations=3, warmup_rounds=1)


@pytest.mark.parametrize("n_models", [1, 7])
def test_members_dealt_out_to_candidates(n_models, benchmark):
    """A plan with one particle a candidate does not cost more with a larger ensemble."""
    workload = dataclasses.replace(WORKLOADS["ens5"], n_models=n_models)
    plan = make_plan(workload, "iCEM", 8)
    benchmark.group, benchmark.name = "plan, ens5 with E members, 8 envs", f"E = {n_models}"
    benchmark.pedantic(plan, rounds=8, iterations=3, warmup_rounds=1)
