"""Real environments by id: entries, types, action repeat, and what bad ids get."""

import gymnasium
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, OneHot
from torchrl.envs import check_env_specs

from layeredrl_trl.recipes import RecipeError, environments, make_env
from layeredrl_trl.recipes.environments import max_episode_steps
from tests.extras import needs_dm_control, needs_gymnasium_robotics
from tests.recipes.odd_envs import ACTIONS, NO_VECTORS, VECTORS, odd

SWINGUP = "dm_control/cartpole-swingup"
MAZE = "gymnasium_robotics:PointMaze_UMaze-v3"
ENVS = {
    "Pendulum-v1": (3, 1),
    "CartPole-v1": (4, 2),
    "InvertedPendulum-v5": (4, 1),
    "Reacher-v5": (10, 2),
    SWINGUP: (5, 1),
    MAZE: (8, 2),
}
NEEDS = {SWINGUP: needs_dm_control, MAZE: needs_gymnasium_robotics}


def ids_of(*env_ids):
    return [pytest.param(env_id, marks=NEEDS.get(env_id, ())) for env_id in env_ids]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("env_id", ids_of(*ENVS))
def test_one_float32_vector_and_one_action(env_id, num_envs):
    env = make_env(env_id, num_envs=num_envs)
    batch = () if num_envs == 1 else (num_envs,)
    rollout = env.rollout(2, break_when_any_done=False)
    obs_dim, action_dim = ENVS[env_id]
    assert rollout["observation"].shape == (*batch, 2, obs_dim)
    assert rollout["action"].shape == (*batch, 2, action_dim)
    for key in ("observation", ("next", "observation"), ("next", "reward")):
        assert rollout[key].dtype == torch.float32
    assert {"is_init", "step_count"} <= set(rollout.keys())
    spec = env.action_spec_unbatched
    assert isinstance(spec, OneHot if env_id == "CartPole-v1" else Bounded)
    env.close()


def test_episodes_of_unlike_length_in_float64_simulators():
    """SerialEnv could not write the rest of a batch once one of its envs was done."""
    env = make_env("InvertedPendulum-v5", num_envs=3)
    rollout = env.rollout(50, break_when_all_done=True, break_when_any_done=False)
    lengths = (rollout["next", "done"].cumsum(1) == 0).sum(1)
    assert len(lengths.unique()) > 1
    env.close()


def test_the_same_seed_starts_the_same_episodes():
    starts = [make_env("Pendulum-v1", num_envs=2, seed=s).reset()["observation"] for s in (3, 3, 4)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("env_id", ids_of("Pendulum-v1", SWINGUP))
def test_action_repeat_adds_rewards_up(env_id):
    once, twice = (make_env(env_id, seed=1, action_repeat=n) for n in (1, 2))
    action = once.action_spec.rand()
    first, second = once.reset().set("action", action), None
    first = once.step(first)
    second = once.step(first["next"].exclude("reward").set("action", action))
    both = twice.step(twice.reset().set("action", action))
    torch.testing.assert_close(
        both["next", "reward"], first["next", "reward"] + second["next", "reward"]
    )
    torch.testing.assert_close(both["next", "observation"], second["next", "observation"])


@needs_dm_control
def test_a_time_limit_truncates():
    env = make_env(SWINGUP, action_repeat=500)
    last = env.rollout(10)[-1]["next"]
    assert last["truncated"].item() and not last["terminated"].item()


def test_max_episode_steps():
    assert max_episode_steps("Pendulum-v1") == 200
    assert max_episode_steps(SWINGUP) == 1000


@pytest.mark.parametrize("name", ACTIONS)
def test_action_spaces(name):
    """Several choices, bits and integers were refused in the middle of a run, or never."""
    text = "unbounded" if "ound" in name else "supports one discrete choice .* or a vector of float"
    if name in ("Choice", "Doubles"):
        assert make_env(odd(f"{name}Action")).rollout(3)["action"].shape[0] == 3
    else:
        with pytest.raises(RecipeError, match=text):
            make_env(odd(f"{name}Action"))


@pytest.mark.parametrize("name", NO_VECTORS)
def test_observation_spaces_that_are_no_vectors(name):
    text = {
        "Empty": "an observation without any number",
        "RewardInDict": "cannot be made .*reward",
    }.get(name, "no observation made of vectors")
    with pytest.raises(RecipeError, match=text):
        make_env(odd(f"{name}Observation"))


@pytest.mark.parametrize("name", VECTORS)
def test_observation_spaces_that_are_vectors(name):
    """Integers and floats in one dictionary were joined to a vector that no collector could write.

    The vector is that of Gymnasium's own FlattenObservation, and within its spec.
    """
    env = make_env(odd(f"{name}Observation"), seed=3)
    space = VECTORS[name]
    check_env_specs(env, seed=None)
    rollout = TensorDict(env.rollout(5).to_dict(), batch_size=[5])
    stacked = torch.stack([env.fake_tensordict() for _ in range(5)])
    stacked.update_(rollout.select(*stacked.keys(True, True)))  # as a collector writes it
    assert stacked["observation"].shape == (5, gymnasium.spaces.flatdim(space))
    assert env.observation_spec["observation"].is_in(stacked["observation"][0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NanReward", "not finite .* as .'next', 'reward'."),
        ("HugeReward", "not finite .in float32. as .'next', 'reward'."),
        ("VectorReward", "fails in its first steps"),
        ("TextReward", "fails in its first steps"),
        ("BadReset", "fails in its first steps .RuntimeError at odd_envs.py:.*two lines"),
        ("BadStep", "fails in its first steps .RuntimeError at odd_envs.py:.*two lines"),
    ],
)
def test_an_env_that_fails_at_once(name, text):
    with pytest.raises(RecipeError, match=text):
        make_env(odd(name))


def test_trying_an_env_takes_no_random_numbers():
    before = torch.random.get_rng_state()
    environments._try_steps("Pendulum-v1", 1, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("env_id", [SWINGUP, "dm_control/cart"])
def test_a_missing_dm_control_is_said_to_be_missing(env_id, monkeypatch):
    """Without it no task is known to TorchRL, and the error named an unknown task."""
    for flag in ("_has_dmc", "_has_dm_control"):
        monkeypatch.setattr(f"torchrl.envs.libs.dm_control.{flag}", False)
    with pytest.raises(RecipeError, match=r"needs a package that is not installed.*dm-control"):
        make_env(env_id)
