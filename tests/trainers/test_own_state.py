"""What a module holds beside the tensors of its owner."""

import pytest
import torch
from torch import nn

from layeredrl_trl.trainers import OwnState
from tests.small_predictors import small_predictor
from tests.trainers.small_trainers import make_env, make_planner, make_predictor


class Policy(nn.Module):
    """Shares a layer and a module with extra state with its owner, and has some of its own."""

    def __init__(self, owner):
        super().__init__()
        self.shared, self.own = owner.layer, nn.Linear(2, 1)
        self.steps = 0

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_saves_its_own_and_nothing_else():
    owner = Owner()
    policy = Policy(owner)
    state = OwnState(policy, owner).state_dict()
    assert set(state) == {"own.weight", "own.bias", "_extra_state"}


def test_restores_its_own_and_nothing_else():
    owner, other = Owner(), Owner()
    policy, twin = Policy(owner), Policy(other)
    policy.steps = 7
    before = other.layer.weight.clone()
    OwnState(twin, other).load_state_dict(OwnState(policy, owner).state_dict())
    assert twin.steps == 7 and torch.equal(twin.own.weight, policy.own.weight)
    assert torch.equal(other.layer.weight, before)


def test_a_planner_has_nothing_that_its_predictor_does_not_save():
    env = make_env()
    predictor = make_predictor(env)
    policy, planner = make_planner(predictor, env.action_spec)
    for module in (policy, planner):
        assert OwnState(module, predictor).state_dict() == {}


def test_parts_with_extra_state_are_their_owners():
    predictor = small_predictor()
    assert OwnState(predictor.model, predictor).state_dict() == {}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("own.bias"), "expected the entries"),
        (lambda s: s.update(more=1), "expected the entries"),
        (lambda s: s.update({"own.bias": torch.zeros(3)}), r"'own.bias' of shape \[1\], got \[3\]"),
        (lambda s: s.update({"own.bias": 3}), "'own.bias' of shape"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, text):
    owner = Owner()
    policy = Policy(owner)
    state = dict(OwnState(policy, owner).state_dict())
    before = policy.own.weight.clone()
    state["own.weight"] = state["own.weight"] + 1
    change(state)
    with pytest.raises(ValueError, match=text):
        OwnState(policy, owner).load_state_dict(state)
    assert torch.equal(policy.own.weight, before)
