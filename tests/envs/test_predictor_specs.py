"""What an env remembers of its specs is what they say."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded

from layeredrl_trl.acceleration import fingerprint
from layeredrl_trl.envs.imagined_specs import entries_of
from layeredrl_trl.modules import IdentityEncoder
from tests.envs.imagined import make_env, observations, random_actions

COPIES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


def start(env):
    return env.initial_state(observations(env, 3)), random_actions(env, 3, 2)


def test_entries_are_those_of_the_spec():
    spec = Composite(a=Unbounded((2,)), b=Composite(c=Bounded(0, 1, (3,), dtype=torch.int64)))
    assert entries_of(spec) == {
        "a": (torch.Size([2]), torch.float32),
        ("b", "c"): (torch.Size([3]), torch.int64),
    }


def test_specs_that_were_changed_and_locked_again_count():
    env = make_env()
    state, actions = start(env)
    env.imagine(state, actions)
    env.set_spec_lock_(False)
    env.observation_spec["alive"] = Unbounded((7, 2, 2))
    env.set_spec_lock_(True)
    with pytest.raises(ValueError, match=r"alive: expected trailing shape \[7, 2, 2\]"):
        env.imagine(state, actions)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_an_env_know_their_own_specs(copied):
    env = make_env()
    state, actions = start(env)
    expected = set(env.imagine(state, actions).keys(True, True))
    other = copied(env)
    assert set(other.imagine(state, actions).keys(True, True)) == expected
    other.set_spec_lock_(False)
    other.observation_spec["alive"] = Unbounded((7, 2, 2))
    other.set_spec_lock_(True)
    with pytest.raises(ValueError, match="alive: expected trailing shape"):
        other.imagine(state, actions)
    env.imagine(state, actions)


@pytest.mark.parametrize("locked", [True, False])
def test_to_use_an_env_is_no_change_of_it(locked):
    """For which a planner on CUDA would record its plan anew, each time."""
    env = make_env()
    env.set_spec_lock_(locked)
    state, actions = start(env)
    seen = []
    for _ in range(2):
        env.imagine(state, actions)
        env.imaginer(state, [("next", "reward")])(actions)
        env.rollout(2, tensordict=state, auto_reset=False)
        seen.append(fingerprint([env]))
    assert seen[0][0] == seen[1][0]


# --- arguments and outputs of another kind


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("uncertainty", 1),
        ("compile_imagine", "auto"),
        ("cudagraphs", "cuda"),
        ("deterministic", "yes"),
        ("deterministic", 0),
        ("gamma", "0.9"),
    ],
)
def test_a_flag_of_another_kind_is_named(name, value):
    with pytest.raises(TypeError, match=rf"PredictorEnv: {name} must be .*, got {value!r}"):
        make_env(**{name: value})


def test_a_mark_of_another_kind_is_named():
    env = make_env()
    start, actions = env.initial_state(observations(env, 3)), random_actions(env, 3, 2)
    with pytest.raises(TypeError, match="set_truncated must be True or False, got 1"):
        env.imagine(start, actions, set_truncated=1)


@pytest.mark.parametrize("way", ["imagine", "step", "reset"])
def test_an_observation_that_is_decoded_to_another_shape_is_named(way):
    """It went into the rollout as it was."""

    class Flat(IdentityEncoder):
        def decode(self, latent, context):
            return latent[..., :1]

    env = make_env(encoder=Flat(3))
    start, actions = env.initial_state(observations(env, 4)), random_actions(env, 4, 2)
    ways = {
        "imagine": lambda: env.imagine(start, actions),
        "step": lambda: env.step(start.set("action", actions[:, 0])),
        "reset": lambda: env.reset(TensorDict(batch_size=[4])),
    }
    with pytest.raises(ValueError, match=r"Flat.decode: expected observations \[4, .*3\], got"):
        ways[way]()
