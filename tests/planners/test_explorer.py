"""Random actions at first and in phases, around those of a planner."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from layeredrl_trl.planners import Explorer, ICEMPlanner
from tests.problems import PendulumModel


def explorer(*phases):
    policy = TensorDictModule(lambda x: torch.full_like(x, 7.0), ["observation"], ["action"])
    return Explorer(policy, Bounded(-1.0, 1.0, (1,)), *phases)


def flags(module, n):
    tensordicts = [module(TensorDict({"observation": torch.zeros(1)})) for _ in range(n)]
    for tensordict in tensordicts:
        assert (tensordict["action"] == 7).all() == tensordict["planned"].item()
    return "".join("p" if tensordict["planned"].item() else "r" for tensordict in tensordicts)


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ((3,), "rrrppppppp"),
        ((3, 2, 1), "rrrpprpprp"),
        ((1, 3, 2), "rppprrpppr"),
        ((2, 0, 4), "rrpppppppp"),
        ((2, 4, 0), "rrpppppppp"),
    ],
)
def test_phases(phases, expected):
    assert flags(explorer(*phases), 10) == expected


def test_marks_every_env_of_a_batch():
    out = explorer(1)(TensorDict({"observation": torch.zeros(4, 1)}, batch_size=[4]))
    assert out["planned"].shape == (4, 1) and out["planned"].dtype == torch.bool


def test_a_random_phase_forgets_the_plan():
    """A plan that is some random steps old was moved on by one step and used."""
    env = PendulumModel()
    planner = ICEMPlanner(env, planning_horizon=3, optim_steps=1, num_candidates=8, top_k=2)
    module = Explorer(planner, env.action_spec, 1, 2, 2, planner)
    module.steps = 3
    out = module(planner(TensorDict({"x": torch.tensor([1.0, 0.0, 0.0])})))
    assert not out["planned"].item()
    assert out["next", "plan"].isnan().all() and out["next", "elites"].isnan().all()
    assert out["plan_return"].isnan().all() and out["plan_return"].shape == (1,)


def test_its_state_is_the_number_of_actions():
    one, other = explorer(3, 2, 1), explorer(3, 2, 1)
    flags(one, 5)
    other.load_state_dict(one.state_dict())
    assert flags(other, 5) == "rpprp"


@pytest.mark.parametrize(
    ("phases", "error", "text"),
    [
        ((0,), ValueError, "init_random_steps must be at least 1"),
        ((2.5,), TypeError, "init_random_steps must be an integer"),
        ((1, -1), ValueError, "planned_steps must be at least 0"),
        ((1, 1, -1), ValueError, "random_steps must be at least 0"),
    ],
)
def test_numbers_out_of_range(phases, error, text):
    with pytest.raises(error, match=text):
        explorer(*phases)
