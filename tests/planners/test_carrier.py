"""The plan as an entry of the TensorDict."""

import copy

import pytest
from torchrl.data import Bounded

from layeredrl_trl.planners import CrossEntropyPlanner
from tests.planners.planning_envs import FreeEnv


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_primer_of_a_planner_without_weights_was_on_the_meta_device(device):
    """TorchRL's multi-process collectors make the envs while the policy is on "meta"."""
    env = FreeEnv(Bounded(-1, 1, (1,)))
    options = {"planning_horizon": 3, "optim_steps": 1, "num_candidates": 8, "top_k": 2}
    planner = copy.deepcopy(CrossEntropyPlanner(env, **options))
    planner._cold_step = planner._cold_step.to(device)
    primer = planner.make_tensordict_primer()
    spec = primer.primers["plan"]
    assert spec.shape == (3, 1)
    assert spec.device is None or spec.device.type == "cpu"
    assert spec.zero().device.type == "cpu"
