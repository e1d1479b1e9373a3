"""What is remembered of specs is what they say."""

import copy
import pickle

import pytest
import torch
from torchrl.data import Bounded, Composite, Unbounded

from layeredrl_trl.envs.spec_reader import SpecReader, entries_of
from layeredrl_trl.modules.fingerprint import fingerprint
from tests.envs.test_predictor_env import make_env, observations, random_actions


def make_specs():
    first = Composite(a=Unbounded((2,)), b=Composite(c=Bounded(0, 1, (3,), dtype=torch.int64)))
    return first.lock_(recurse=True), Composite(d=Unbounded((1,))).lock_(recurse=True)


def test_entries_are_those_of_the_spec():
    first, _ = make_specs()
    assert entries_of(first) == {
        "a": (torch.Size([2]), torch.float32),
        ("b", "c"): (torch.Size([3]), torch.int64),
    }


def test_specs_are_read_once_unless_others_come_or_they_may_have_changed():
    reader, (first, second) = SpecReader(), make_specs()
    read = reader(first, second)
    assert read == [entries_of(first), entries_of(second)]
    assert reader(first, second) is read
    assert reader(second, first) == read[::-1]
    assert reader(first) == read[:1]
    first.unlock_(recurse=True)
    first["e"] = Unbounded((4,))
    assert reader(first) == [entries_of(first)]
    first["f"] = Unbounded((5,))
    assert reader(first) == [entries_of(first)]


def test_reading_specs_is_no_change_of_the_env():
    """For which a planner on CUDA would record its plan anew, each time."""
    env = make_env()
    env.set_spec_lock_(False)  # they are read whenever they are needed
    state, actions = env.initial_state(observations(env, 3)), random_actions(env, 3, 2)
    seen = []
    for _ in range(2):
        env.imagine(state, actions)
        seen.append(fingerprint([env])[0])
    assert seen[0] == seen[1]


def test_copies_of_an_env_read_them_too():
    env = make_env()
    state, actions = env.initial_state(observations(env, 3)), random_actions(env, 3, 2)
    expected = env.imagine(state, actions).keys()
    assert env._observed is env._observed
    for other in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert other.imagine(state, actions).keys() == expected


def test_specs_of_an_env_that_were_changed_are_read_again():
    env = make_env()
    state, actions = env.initial_state(observations(env, 3)), random_actions(env, 3, 2)
    env.imagine(state, actions)
    env.set_spec_lock_(False)
    env.observation_spec["alive"] = Unbounded((7, 2, 2))
    env.set_spec_lock_(True)
    with pytest.raises(ValueError, match=r"alive: expected trailing shape \[7, 2, 2\]"):
        env.imagine(state, actions)
