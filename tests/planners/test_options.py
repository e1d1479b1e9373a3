"""Options of planners: an error speaks of the planner's own class and of the option."""

import pytest
from torchrl.data import Bounded

from layeredrl_trl.planners import CrossEntropyPlanner, ICEMPlanner, PathIntegralPlanner
from tests.planners.planning_envs import FreeEnv

PLANNERS = [CrossEntropyPlanner, ICEMPlanner, PathIntegralPlanner]
OPTIONS = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 16}


def make(planner, **options):
    elites = {} if planner is PathIntegralPlanner else {"top_k": 4}
    return planner(FreeEnv(Bounded(-1, 1, (1,))), **{**OPTIONS, **elites, **options})


@pytest.mark.parametrize("planner", PLANNERS)
def test_an_unknown_option_named_an_internal_class(planner):
    text = rf"{planner.__name__} has no option horizon; it has .*gamma.*planning_horizon.*warm_std"
    with pytest.raises(TypeError, match=text):
        make(planner, horizon=3)


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_missing_option_named_an_internal_class(planner):
    text = f"{planner.__name__} needs the options planning_horizon, optim_steps"
    elites = {} if planner is PathIntegralPlanner else {"top_k": 4}
    with pytest.raises(TypeError, match=text):
        planner(FreeEnv(Bounded(-1, 1, (1,))), num_candidates=16, **elites)


@pytest.mark.parametrize("name", ["planning_horizon", "optim_steps", "num_candidates", "top_k"])
@pytest.mark.parametrize("value", [2.5, 4.0, "4"])
def test_counts_that_are_no_integers(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be an integer, got {value!r}"):
        make(ICEMPlanner, **{name: value})


@pytest.mark.parametrize(
    "name", ["std", "warm_std", "min_std", "noise_beta", "population_decay", "disagreement"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_were_accepted(name, value):
    with pytest.raises(ValueError, match=r"(finite|must be at least)"):
        make(ICEMPlanner, **{name: value})
