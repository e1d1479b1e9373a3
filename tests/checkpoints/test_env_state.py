"""The state of an environment: a restored one cannot be told from one that was never stopped."""

import random
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.checkpoint import Checkpoint
from torchrl.envs import (
    GymWrapper,
    RewardSum,
    StepCounter,
    TransformedEnv,
)

from layeredrl_trl.checkpoints.env_state import EnvState
from layeredrl_trl.checkpoints.simulation_state import read_simulation
from tests.checkpoints.resumed_envs import (
    GYMNASIUM,
    MUJOCO,
    OTHERS,
    assert_same_bits,
    frozen,
    go_on,
    make_env,
    random_actions,
    run,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _folder_for_the_log_of_mujoco(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def gymnasium_env(env):
    """The Gymnasium environment without wrappers in a GymEnv."""
    return env._env.unwrapped


def assert_goes_on_as(env, other, tensordict, n_steps=30):
    """Check that two environments give the same from here on."""
    actions = random_actions(other, tensordict, n_steps)
    torch.manual_seed(0)
    expected = go_on(other, tensordict, actions)
    torch.manual_seed(0)
    assert_same_bits(go_on(env, tensordict, actions), expected)
    return expected


# --- contract ---------------------------------------------------------------------------------


def test_later_steps_do_not_change_the_state():
    env = make_env("Ant-v5")
    run(env, 5, seed=0)
    state = EnvState(env).state_dict()
    before = frozen(state)
    env.rollout(5)
    assert frozen(state) == before


def test_simulation_holds_what_is_read_before_a_step():
    env = make_env("Ant-v5")
    run(env, 5, seed=0)
    data = gymnasium_env(env).data
    layout = read_simulation(data)["layout"]
    assert layout["xpos"] == data.xpos.shape
    assert {"qpos", "qacc_warmstart", "cfrc_ext", "cvel", "energy"} <= layout.keys()
    # in the arena, where an array may have a shape but no memory
    assert not {"efc_force", "efm_c", "iacc"} & layout.keys()


# --- exactness --------------------------------------------------------------------------------


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5", "Taxi-v4")
]


@pytest.mark.parametrize("name", [*GYMNASIUM, *MUJOCO, *OTHERS, *SLOW])
def test_new_env_goes_on_bit_for_bit(tmp_path, name):
    env, other = make_env(name), make_env(name)
    assert EnvState(env).can_be_saved
    tensordict = run(env, 17, seed=0)
    Checkpoint(env=EnvState(env)).save(tmp_path / "checkpoint")
    Checkpoint(env=EnvState(other)).load(tmp_path / "checkpoint")
    steps = assert_goes_on_as(other, env, tensordict, n_steps=60)
    assert steps["next", "done"].any()


@pytest.mark.parametrize("name", ["CartPole-v1", "Ant-v5", "Pusher-v5", *OTHERS])
def test_used_env_of_another_seed_goes_on_bit_for_bit(name):
    env, other = make_env(name), make_env(name)
    tensordict = run(env, 17, seed=0)
    run(other, 5, seed=1)
    EnvState(other).load_state_dict(EnvState(env).state_dict())
    assert_goes_on_as(other, env, tensordict)


def test_restored_env_goes_on_in_a_process_of_its_own(tmp_path):
    names = ["Pendulum-v1", "Hopper-v5", "transforms", "serial", "torchrl pendulum", "own"]
    expected, arguments = {}, []
    for name in names:
        folder = tmp_path / name
        env = make_env(name)
        tensordict = run(env, 17, seed=0)
        Checkpoint(env=EnvState(env)).save(folder / "checkpoint")
        tensordict.memmap(folder / "carried")
        actions = random_actions(env, tensordict, 60)
        torch.save(actions, folder / "actions.pt")
        torch.manual_seed(0)
        expected[name] = go_on(env, tensordict, actions)
        arguments += [folder, name]
    program = "import sys; from tests.checkpoints.resumed_envs import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300)
    for name in names:
        got = type(expected[name]).load_memmap(tmp_path / name / "steps")
        assert_same_bits(got, expected[name])


@pytest.mark.parametrize("name", ["Pendulum-v1", "Ant-v5", "transforms", "serial", "own"])
def test_env_that_was_never_reset(name):
    env, other = make_env(name), make_env(name)
    EnvState(other).load_state_dict(EnvState(env).state_dict())
    first, second = run(env, 20, seed=3), run(other, 20, seed=3)
    assert_same_bits(second, first)


def test_reset_of_some_envs_right_after_the_restoration():
    env, other = make_env("serial"), make_env("serial")
    tensordict = run(env, 5, seed=0)
    EnvState(other).load_state_dict(EnvState(env).state_dict())
    tensordict["_reset"] = torch.tensor([[True], [False], [True]])
    assert_same_bits(other.reset(tensordict.clone()), env.reset(tensordict.clone()))


def test_random_numbers_of_a_space_go_on():
    env, other = make_env("Pendulum-v1"), make_env("Pendulum-v1")
    space = gymnasium_env(env).action_space
    space.seed(4)
    space.sample()
    EnvState(other).load_state_dict(EnvState(env).state_dict())
    np.testing.assert_array_equal(gymnasium_env(other).action_space.sample(), space.sample())


def test_loading_draws_no_random_numbers():
    used = make_env("own")
    run(used, 3, seed=0)
    state = EnvState(used).state_dict()
    env = make_env("own")
    torch.manual_seed(0)
    before = frozen((torch.get_rng_state(), random.getstate(), np.random.get_state()))
    EnvState(env).load_state_dict(state)
    after = frozen((torch.get_rng_state(), random.getstate(), np.random.get_state()))
    assert after == before


def test_restored_arrays_are_the_envs_own_objects():
    env, other = make_env("HalfCheetah-v5"), make_env("HalfCheetah-v5")
    run(env, 3, seed=0)
    held = gymnasium_env(other).init_qpos
    EnvState(other).load_state_dict(EnvState(env).state_dict())
    assert gymnasium_env(other).init_qpos is held


@pytest.mark.parametrize("name", ["Pendulum-v1", "Ant-v5", "transforms", "serial", "own"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_asking_changes_nothing(name, used):
    env, twin = make_env(name), make_env(name)
    if used:
        run(twin, 4, seed=2)
        tensordict = run(env, 4, seed=2)
    before = frozen(EnvState(env).state_dict())
    assert EnvState(env).can_be_saved
    assert frozen(EnvState(env).state_dict()) == before
    if used:
        assert_goes_on_as(env, twin, tensordict, n_steps=8)


def test_something_else_than_an_env():
    with pytest.raises(TypeError, match="env must be a TorchRL environment, got Pendulum"):
        EnvState(gym.make("Pendulum-v1").unwrapped)


# --- damaged states ---------------------------------------------------------------------------


def replace(path, name, content, kind="plain"):
    def damage(state):
        assert name in state["values"][path]
        state["values"][path][name] = (kind, content)

    return damage


def rename(path, name, other):
    def damage(state):
        state["values"][path][other] = state["values"][path].pop(name)

    return damage


def change(path, name, key, changed):
    """Damage an entry of the content of an attribute."""

    def damage(state):
        content = state["values"][path][name][1]
        content[key] = changed(content[key])

    return damage


def with_nan(array):
    array = array.copy()
    array[-1] = np.nan
    return array


LIMIT, PENDULUM = "env._env", "env._env.env.env"
ANT = PENDULUM

DAMAGES = [
    ("Pendulum-v1", lambda state: state.clear(), "expected classes and values"),
    ("Pendulum-v1", lambda state: state.pop("classes"), "expected classes and values"),
    ("Pendulum-v1", lambda state: state["values"].pop(LIMIT), "expected values for"),
    (
        "Pendulum-v1",
        lambda state: state["classes"].update({PENDULUM: "os.system"}),
        "another environment",
    ),
    ("Pendulum-v1", lambda state: state["values"].update({LIMIT: 3}), "has no attributes"),
    ("Pendulum-v1", rename(PENDULUM, "state", "stat"), r"lacks \['state'\]"),
    ("Pendulum-v1", rename(PENDULUM, "last_u", "step"), r"lacks \['last_u'\]"),
    ("Pendulum-v1", lambda s: s["values"][PENDULUM].update(step=("plain", 1)), "no place for"),
    ("Pendulum-v1", lambda s: s["values"][LIMIT].update(extra=3), "not a saved attribute"),
    ("Pendulum-v1", replace(PENDULUM, "state", np.zeros(3)), r"state: .*shape \(2,\), got \(3,"),
    ("Pendulum-v1", replace(PENDULUM, "state", np.zeros(2, "f4")), "array of float64"),
    ("Pendulum-v1", replace(PENDULUM, "state", np.array([0.0, np.nan])), "state: is not finite"),
    ("Pendulum-v1", replace(PENDULUM, "state", None), "state"),
    ("Pendulum-v1", replace(PENDULUM, "g", float("inf")), "g: is not finite"),
    ("Pendulum-v1", replace(PENDULUM, "g", "10"), "expected a number, got str"),
    ("Pendulum-v1", replace(PENDULUM, "g", object()), "object is not a plain value"),
    ("Pendulum-v1", replace(PENDULUM, "g", 10.0, "code"), "'code' is not a kind"),
    ("Pendulum-v1", replace(PENDULUM, "g", 10.0, "tensor"), "expected a plain, got tensor"),
    ("Pendulum-v1", replace(LIMIT, "_elapsed_steps", np.zeros(1)), "_elapsed_steps"),
    ("Pendulum-v1", replace(PENDULUM, "_np_random", 3), "expected a numpy_generator, got plain"),
    (
        "Pendulum-v1",
        change(PENDULUM, "_np_random", "bit_generator", lambda name: "MT19937"),
        "not the state of a PCG64",
    ),
    (
        "Pendulum-v1",
        change(PENDULUM, "_np_random", "state", lambda state: {"state": 2**200, "inc": 1}),
        "not the state of a PCG64",
    ),
    ("Pendulum-v1", replace(PENDULUM, "action_space", {}, "space"), "generators of a space"),
    ("Ant-v5", change(ANT, "data", "numbers", with_nan), "data: numbers is not finite"),
    ("Ant-v5", change(ANT, "data", "numbers", lambda array: array[1:]), "data: numbers .* shape"),
    ("Ant-v5", change(ANT, "data", "state", with_nan), "data: state is not finite"),
    ("Ant-v5", change(ANT, "data", "layout", lambda layout: {}), "other arrays"),
    ("Ant-v5", replace(ANT, "_healthy_z_range", (0.2,)), "expected 2 elements, got 1"),
    ("Ant-v5", replace(ANT, "_healthy_z_range", (0.2, float("nan"))), "is not finite"),
    ("Ant-v5", replace(ANT, "init_qpos", np.zeros(14)), "init_qpos: .*shape"),
    (
        "normalised",
        change("env.transform", "_loc", "leaves", lambda leaves: {}),
        "expected the entries",
    ),
    (
        "normalised",
        replace("env.transform.buffers", "initialized", torch.zeros(2), "tensor"),
        "expected torch.bool",
    ),
    ("torchrl pendulum", replace("env.base_env", "rng", torch.zeros(7), "torch_generator"), "rng"),
    (
        "serial",
        lambda state: state["values"].update({"env[7]": state["values"].pop("env[2]")}),
        "expected values for",
    ),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_state_changes_nothing(name, damage, message):
    saved, env = make_env(name), make_env(name)
    run(saved, 17, seed=0)
    state = EnvState(saved).state_dict()
    damage(state)
    before = frozen(EnvState(env).state_dict())
    with pytest.raises(ValueError, match=message):
        EnvState(env).load_state_dict(state)
    assert frozen(EnvState(env).state_dict()) == before


@pytest.mark.parametrize("name", ["Pendulum-v1", "Ant-v5", "transforms", "serial", "own"])
def test_used_env_that_refused_a_state_goes_on(name):
    saved, env, twin = make_env(name), make_env(name), make_env(name)
    run(saved, 17, seed=0)
    state = EnvState(saved).state_dict()
    path = next(path for path in reversed(state["values"]) if state["values"][path])
    state["values"][path]["unknown"] = ("plain", float("nan"))
    run(twin, 4, seed=2)
    tensordict = run(env, 4, seed=2)
    with pytest.raises(ValueError, match="unknown: is NaN"):
        EnvState(env).load_state_dict(state)
    assert_goes_on_as(env, twin, tensordict, n_steps=8)


def test_state_of_another_env():
    state = EnvState(make_env("CartPole-v1")).state_dict()
    with pytest.raises(ValueError, match=r"another environment: .*PendulumEnv.*CartPoleEnv"):
        EnvState(make_env("Pendulum-v1")).load_state_dict(state)


def test_state_of_other_transforms():
    one = TransformedEnv(make_env("Pendulum-v1"), StepCounter())
    other = TransformedEnv(make_env("Pendulum-v1"), RewardSum())
    with pytest.raises(ValueError, match=r"another environment: .*RewardSum.*StepCounter"):
        EnvState(other).load_state_dict(EnvState(one).state_dict())


def test_a_new_env_under_gymnasiums_checker_takes_the_state_of_one_that_has_run():
    """The checker forgets its data after two steps, and no new environment had forgotten them."""

    def checked(seed):
        env = GymWrapper(gym.make("Pendulum-v1", max_episode_steps=5))
        env.set_seed(seed)
        return env

    env, other = checked(0), checked(1)
    state = EnvState(env)
    assert state.can_be_saved
    env.rollout(5)
    saved = state.state_dict()
    other.reset()
    EnvState(other).load_state_dict(saved)
    assert (other.reset()["observation"] == env.reset()["observation"]).all()
