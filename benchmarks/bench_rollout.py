"""Imagined rollouts of all particles, reward included, against the same work in bare PyTorch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bare import BareImagination
from benchmarks.workloads import ACTION_DIM, OBSERVATION_DIM, WORKLOADS, make_predictor


@pytest.mark.parametrize(("n_envs", "horizon"), [(128, 10), (1024, 15)])
@pytest.mark.parametrize("name", WORKLOADS)
def test_rollout(name, n_envs, horizon, take_turns):
    observation = torch.randn(n_envs, OBSERVATION_DIM)
    actions = torch.rand(n_envs, horizon, ACTION_DIM) * 2 - 1
    predictor, bare = make_predictor(WORKLOADS[name]), BareImagination(WORKLOADS[name])

    @torch.no_grad()
    def rollout():
        predictor.rollout(observation, actions)

    take_turns(
        f"rollout, {name}, {n_envs} x {horizon}",
        "rollout",
        rollout,
        "bare",
        lambda: bare.rollout(observation, actions),
        rounds=10,
        calls=8 if n_envs < 1000 else 1,
    )
