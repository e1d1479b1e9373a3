"""Flattened observations: which dims are whose, in Gymnasium and in TorchRL."""

from functools import partial

import gymnasium
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import FilterObservation, FlattenObservation, FrameStackObservation
from gymnasium.wrappers.vector import FlattenObservation as FlattenVectorObservation
from tensordict import TensorDict
from torchrl.data import Composite, Unbounded
from torchrl.envs import (
    CatTensors,
    Compose,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    GymWrapper,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)

from layeredrl_trl.envs import flatten_observation, observation_layout
from tests.toy_envs import SORTED, UNSORTED, GoalEnv

SIZES = {"achieved_goal": 2, "desired_goal": 2, "observation": 4}


def expected_layout(order):
    layout, start = {}, 0
    for key in order:
        layout[key] = range(start, start + SIZES[key])
        start += SIZES[key]
    return layout


def flat_goal_env(order=UNSORTED):
    return FlattenObservation(GoalEnv(order))


def gym_wrapper(order=UNSORTED, **options):
    return GymWrapper(GoalEnv(order, **options))


def flattened_torchrl(order):
    env = gym_wrapper(order)
    return TransformedEnv(env, Compose(StepCounter(), flatten_observation(env)))


KINDS = {
    "gymnasium": GoalEnv,
    "gymnasium-flattened": flat_goal_env,
    "gymnasium-wrapped-twice": lambda o: gymnasium.wrappers.TimeLimit(flat_goal_env(o), 3),
    "vector": lambda o: SyncVectorEnv([lambda: GoalEnv(o)] * 2),
    "vector-flattened-outside": lambda o: FlattenVectorObservation(
        SyncVectorEnv([lambda: GoalEnv(o)] * 2)
    ),
    "vector-flattened-inside": lambda o: SyncVectorEnv([lambda: flat_goal_env(o)] * 2),
    "torchrl": gym_wrapper,
    "torchrl-of-a-flattened-env": lambda o: GymWrapper(flat_goal_env(o)),
    "torchrl-transformed": lambda o: TransformedEnv(gym_wrapper(o), DoubleToFloat()),
    "torchrl-flattened": flattened_torchrl,
    "torchrl-serial": lambda o: SerialEnv(2, lambda: gym_wrapper(o)),
    "torchrl-serial-of-flattened": lambda o: SerialEnv(2, lambda: flattened_torchrl(o)),
}


# --- the layout


@pytest.mark.parametrize("order", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_layout_in_the_order_of_the_env(kind, order):
    env = KINDS[kind](order)
    layout = observation_layout(env)
    assert layout == expected_layout(order) and tuple(layout) == order


def test_layout_of_an_env_in_other_processes():
    env = AsyncVectorEnv([flat_goal_env] * 2, context="fork")
    assert observation_layout(env) == expected_layout(UNSORTED)
    env.close()


def test_layout_is_where_gymnasium_puts_the_entries():
    env = GoalEnv()
    observation, _ = env.reset(seed=0)
    flat = gymnasium.spaces.flatten(env.observation_space, observation)
    for key, dims in observation_layout(env).items():
        assert flat[dims].tolist() == observation[key].tolist()


def test_layout_after_entries_were_filtered():
    filtered = FilterObservation(GoalEnv(SORTED), ["desired_goal", "observation"])
    expected = {"desired_goal": range(2), "observation": range(2, 6)}
    assert observation_layout(FlattenObservation(filtered)) == expected


def test_layout_of_the_users_own_concatenation():
    """``CatTensors`` sorts its keys by default, whatever the order of the env."""
    cat = CatTensors(["desired_goal", "achieved_goal"], "observation")
    env = TransformedEnv(gym_wrapper(UNSORTED), cat)
    assert observation_layout(env) == {"achieved_goal": range(2), "desired_goal": range(2, 4)}
    cat = CatTensors(["desired_goal", "achieved_goal"], "observation", sort=False)
    env = TransformedEnv(gym_wrapper(UNSORTED), cat)
    assert observation_layout(env) == {"desired_goal": range(2), "achieved_goal": range(2, 4)}


def test_layout_of_a_plain_observation():
    assert observation_layout(gymnasium.make("Pendulum-v1")) == {"observation": range(3)}
    assert observation_layout(GymEnv("Pendulum-v1")) == {"observation": range(3)}
    assert observation_layout(gymnasium.make_vec("CartPole-v1", 2)) == {"observation": range(4)}


def test_layout_of_a_torchrl_env_of_ones_own():
    class Own(EnvBase):
        def __init__(self):
            super().__init__()
            self.observation_spec = Composite(b=Unbounded((3,)), a=Unbounded((2, 2)))

        def _reset(self, tensordict): ...
        def _step(self, tensordict): ...
        def _set_seed(self, seed): ...

    assert observation_layout(Own()) == {"b": range(3), "a": range(3, 7)}


def test_layout_of_what_is_not_the_flattened_entries():
    env = FrameStackObservation(flat_goal_env(), 2)
    with pytest.raises(ValueError, match=r"entries.*flattened, of shape \[8\], got Box"):
        observation_layout(env)


@pytest.mark.parametrize("env", [None, "Pendulum-v1", Dict(a=Box(0, 1))])
def test_layout_of_no_env(env):
    with pytest.raises(TypeError, match="env: expected a gymnasium Env or VectorEnv or a torchrl"):
        observation_layout(env)


# --- the transform


@pytest.mark.parametrize("order", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
def test_transform_gives_what_gymnasium_gives(order):
    env = gym_wrapper(order)
    env = TransformedEnv(env, Compose(flatten_observation(env), DoubleToFloat()))
    check_env_specs(env)
    env.set_seed(0)
    out = env.rollout(12, break_when_any_done=False)
    reference = TransformedEnv(GymWrapper(flat_goal_env(order)), DoubleToFloat())
    reference.set_seed(0)
    actions = iter(out["action"])
    expected = reference.rollout(
        12,
        policy=lambda td: td.set("action", next(actions)),
        break_when_any_done=False,
    )
    for key in ("observation", ("next", "observation")):
        assert out[key].shape == (12, 8) and out[key].dtype == torch.float32
        torch.testing.assert_close(out[key], expected[key])


@pytest.mark.parametrize("del_keys", [True, False])
def test_transform_keeps_the_entries_on_request(del_keys):
    env = gym_wrapper()
    env = TransformedEnv(env, flatten_observation(env, del_keys=del_keys))
    td = env.rollout(3)
    assert ("desired_goal" in td.keys()) != del_keys
    assert td["observation"].shape == (3, 8)
    if not del_keys:
        flat = td["next", "observation"]
        assert torch.equal(flat[:, 4:6], td["next", "desired_goal"])
        assert torch.equal(flat[:, 6:], td["next", "achieved_goal"])


@pytest.mark.parametrize("del_keys", [True, False])
def test_transform_after_envs_are_reset_one_by_one(del_keys):
    """``observation`` is an entry and the result: it must not be joined to itself at a reset."""
    env = SerialEnv(2, [partial(gym_wrapper, episode_length=n) for n in (2, 3)])
    env = TransformedEnv(env, flatten_observation(env, del_keys=del_keys))
    td = env.rollout(8, break_when_any_done=False)
    assert td["observation"].shape == (2, 8, 8)
    assert td["next", "done"][:, :6, 0].sum(-1).tolist() == [3, 2]
    goal = td["observation"][..., 4:6]
    same_episode = ~td["next", "done"][:, :-1, 0]
    assert (goal[:, 1:] == goal[:, :-1]).all(-1).equal(same_episode)
    assert (td["next", "observation"][..., 4:6] == goal).all()


def test_transform_of_entries_that_are_no_vectors():
    with pytest.raises(ValueError, match=r"4 dims as observation entry 'observation', got .*2, 2"):
        flatten_observation(gym_wrapper(obs_shape=(2, 2)))


def test_transform_twice():
    env = gym_wrapper()
    env = TransformedEnv(env, flatten_observation(env))
    with pytest.raises(ValueError, match=r"4 dims as observation entry 'observation', got .*8"):
        flatten_observation(env)


def test_transform_for_a_gymnasium_env():
    with pytest.raises(TypeError, match="flatten Gymnasium envs by"):
        flatten_observation(GoalEnv())


def test_transform_applied_to_data():
    data = TensorDict({key: torch.rand(3, size) for key, size in SIZES.items()}, batch_size=[3])
    parts = [data[key] for key in UNSORTED]
    assert torch.equal(
        flatten_observation(gym_wrapper())(data)["observation"], torch.cat(parts, -1)
    )
