"""Imagined rollouts of all particles, reward included, against the same work in bare PyTorch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bare import BareImagination
from benchmarks.workloads import ACTION_DIM, OBSERVATION_DIM, WORKLOADS, make_predictor


@pytest.mark.parametrize("who", ["bare", "ours"])
@pytest.mark.parametrize(("n_envs", "horizon"), [(128, 10), (1024, 15)])
@pytest.mark.parametrize("name", WORKLOADS)
def test_rollout(name, n_envs, horizon, who, benchmark):
    observation = torch.randn(n_envs, OBSERVATION_DIM)
    actions = torch.rand(n_envs, horizon, ACTION_DIM) * 2 - 1
    make = make_predictor if who == "ours" else BareImagination
    imagination = make(WORKLOADS[name])
    benchmark.group, benchmark.name = f"rollout, {name}, {n_envs} x {horizon}", who
    benchmark.pedantic(
        torch.no_grad()(imagination.rollout),
        (observation, actions),
        rounds=8,
        iterations=3,
        warmup_rounds=1,
    )
