"""PredictorFactory and the default for goal-based envs, on toys and on gymnasium-robotics."""

import pickle
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import FlattenObservation
from gymnasium.wrappers.vector import FlattenObservation as FlattenVectorObservation
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, GymWrapper, TransformedEnv

from layeredrl_trl.envs import flatten_observation
from layeredrl_trl.modules import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
    SymmetryBreakingStart,
    ValueNet,
)
from layeredrl_trl.predictors import (
    PredictorFactory,
    RewardPredictor,
    StaticPredictor,
    get_default_predictor_factory,
)
from tests.toy_envs import SORTED, UNSORTED, GoalEnv

ACTION = Box(-1.0, 1.0, (2,))
REAL_ENVS = {  # id: dims of the entry `observation`
    "PointMaze_UMaze-v3": 4,
    "PointMaze_Medium-v3": 4,
    "AntMaze_UMaze-v5": 105,
}


def make_factory(**changes) -> PredictorFactory:
    parts = {
        "partial_model": partial(ProbabilisticEnsemble, n_models=2, hidden_sizes=(8,)),
        "partial_val_func": partial(ValueNet, hidden_sizes=(8,)),
        "partial_rew_func": partial(RewardNet, hidden_sizes=(8,)),
        "partial_encoder": partial(SelectEncoder, latent_state_dims=[0, 2], context_dims=[1]),
        "partial_predictor": partial(StaticPredictor, log_interval=7),
    }
    return PredictorFactory(**parts | changes)


class Recorder:
    """Write down what it is called with, then make what it stands for."""

    def __init__(self, made):
        self.made = made

    def __call__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return self.made(*args, **kwargs)


# --- PredictorFactory


def test_every_part_gets_what_it_needs():
    plain = make_factory()
    names = [f"partial_{name}" for name in ("model", "val_func", "rew_func", "encoder")]
    seen = {name: Recorder(getattr(plain, name)) for name in [*names, "partial_predictor"]}
    writer = type("Writer", (), {"add_scalar": lambda *_: None})()
    predictor = PredictorFactory(**seen)((3,), ACTION, torch.device("cpu"), writer)
    assert seen["partial_encoder"].args == ((3,),)
    latent_space, context_space, action_space = seen["partial_model"].args
    assert isinstance(latent_space, Box) and latent_space.shape == (2,)
    assert isinstance(context_space, Box) and context_space.shape == (1,)
    assert not latent_space.is_bounded("below") and not latent_space.is_bounded("above")
    assert action_space is ACTION
    assert seen["partial_val_func"].args == (2, 1)
    assert seen["partial_rew_func"].args == (2, 1, 2)
    assert not any(seen[name].kwargs for name in names)
    assert seen["partial_predictor"].args == ()
    assert set(seen["partial_predictor"].kwargs) == {
        *("model", "val_func", "rew_func", "encoder"),
        *("latent_state_dim", "context_dim", "device", "writer"),
    }
    assert isinstance(predictor, StaticPredictor) and predictor.writer is writer
    assert (predictor.latent_state_dim, predictor.context_dim) == (2, 1)
    assert predictor.log_interval == 7 and predictor.model.n_models == 2


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_predictor_predicts(batch):
    predictor = make_factory()((3,), ACTION, "cpu", None)
    mean, *_, reward, term_prob = predictor.predict(torch.randn(*batch, 3), torch.randn(*batch, 2))
    assert mean.shape == (*batch, 2, 1, 2) and reward.shape == term_prob.shape == batch


@pytest.mark.parametrize(
    ("space", "action_dim"), [(Bounded(-1, 1, (2,)), 2), (Discrete(5), 5), (3, 3)]
)
def test_any_kind_of_action_space(space, action_dim):
    predictor = make_factory()((3,), space, "cpu", None)
    assert predictor.model.action_dim == action_dim
    assert predictor.predict(torch.randn(4, 3), torch.randn(4, action_dim))[3].shape == (4,)


def test_no_context():
    """A Gymnasium box of no dims."""
    predictor = make_factory(partial_encoder=IdentityEncoder)((3,), ACTION, "cpu", None)
    assert (predictor.latent_state_dim, predictor.context_dim) == (3, 0)
    assert predictor.value(torch.randn(4, 3)).shape == (4,)


def test_no_value_and_no_reward_function():
    factory = make_factory(partial_val_func=None, partial_rew_func=None)
    predictor = factory((3,), ACTION, "cpu", None)
    assert predictor.val_func is None and predictor.rew_func is None


def test_every_call_makes_new_parts():
    factory = make_factory()
    one, other = (factory((3,), ACTION, "cpu", None) for _ in range(2))
    assert not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}


@pytest.mark.gpu
def test_device():
    predictor = make_factory()((3,), ACTION, torch.device("cuda"), None)
    assert {x.device.type for x in predictor.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize(
    "name", ["partial_model", "partial_val_func", "partial_encoder", "partial_predictor"]
)
def test_what_cannot_be_called(name):
    with pytest.raises(TypeError, match=f"PredictorFactory: {name} must be callable, got dict"):
        make_factory(**{name: {}})


@pytest.mark.parametrize("name", ["partial_model", "partial_encoder", "partial_predictor"])
def test_what_has_to_be_there(name):
    with pytest.raises(TypeError, match=f"PredictorFactory: {name} must be callable, got NoneType"):
        make_factory(**{name: None})


@pytest.mark.parametrize(
    ("name", "returned", "expected"),
    [
        ("partial_encoder", nn.Linear(3, 3), "Encoder"),
        ("partial_encoder", IdentityEncoder, "Encoder"),
        ("partial_model", RewardNet(2, 1, 2), "DynamicsModel"),
        ("partial_val_func", ValueNet, "module or function"),
        ("partial_val_func", 3, "module or function"),
        ("partial_rew_func", RewardNet, "module or function"),
        ("partial_rew_func", {}, "module or function"),
        ("partial_predictor", nn.Linear(3, 3), "Predictor"),
        ("partial_predictor", None, "Predictor"),
    ],
)
def test_a_part_that_returns_the_wrong_kind_is_named(name, returned, expected):
    factory = make_factory(**{name: lambda *args, **kwargs: returned})
    text = f"PredictorFactory: {name} must return a {expected}, got"
    with pytest.raises(TypeError, match=text.replace("a Encoder", "an Encoder")):
        factory((3,), ACTION, "cpu", None)


def test_a_head_that_a_part_leaves_out():
    factory = make_factory(partial_val_func=lambda *dims: None)
    assert factory((3,), ACTION, "cpu", None).val_func is None


def test_spaces_that_do_not_fit():
    with pytest.raises(TypeError, match="action_space: expected"):
        make_factory()((3,), gymnasium.spaces.Dict(), "cpu", None)
    with pytest.raises(ValueError, match=r"latent_state_dims must be in \[0, 2\)"):
        make_factory()((2,), ACTION, "cpu", None)


# --- get_default_predictor_factory


def flat_torchrl(env):
    env = GymWrapper(env)
    return TransformedEnv(env, flatten_observation(env))


KINDS = {
    "gymnasium": lambda make: make(),
    "gymnasium-flattened": lambda make: FlattenObservation(make()),
    "vector": lambda make: SyncVectorEnv([make] * 2),
    "vector-flattened": lambda make: FlattenVectorObservation(SyncVectorEnv([make] * 2)),
    "torchrl": lambda make: GymWrapper(make()),
    "torchrl-flattened": lambda make: flat_torchrl(make()),
}


def goals_of(predictor, observation):
    """What the predictor picks from the flattened observation."""
    return (x.numpy() for x in predictor.encode(observation))


@pytest.mark.parametrize("order", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_goals_are_picked(kind, order):
    env = GoalEnv(order)
    factory = get_default_predictor_factory(KINDS[kind](lambda: GoalEnv(order)), 0)
    predictor = factory((8,), env.action_space, "cpu", None)
    observation, _ = env.reset(seed=0)
    flat = gymnasium.spaces.flatten(env.observation_space, observation)
    latent, context = goals_of(predictor, flat)
    np.testing.assert_allclose(latent, observation["achieved_goal"], rtol=1e-6)
    np.testing.assert_allclose(context, observation["desired_goal"], rtol=1e-6)


def test_defaults():
    predictor = get_default_predictor_factory(GoalEnv(), 100)((8,), ACTION, "cpu", None)
    assert type(predictor) is RewardPredictor and type(predictor.encoder) is SelectEncoder
    assert (predictor.model.n_models, predictor.model.n_modes) == (1, 4)
    assert predictor.model.n_particles_per_model == 1
    assert not predictor.loss_module.learn_encoder and not list(predictor.encoder.parameters())
    assert isinstance(predictor.val_func, ValueNet) and isinstance(predictor.rew_func, RewardNet)


def test_symmetry_breaking_start_only_if_it_lasts():
    start = get_default_predictor_factory(GoalEnv(), 100)((8,), ACTION, "cpu", None).model
    assert type(start) is SymmetryBreakingStart and start.sb_start_duration == 100
    assert type(start.model) is ProbabilisticEnsemble
    none = get_default_predictor_factory(GoalEnv(), 0)((8,), ACTION, "cpu", None).model
    assert type(none) is ProbabilisticEnsemble


def test_learns_from_steps_of_a_torchrl_env():
    env = flat_torchrl(GoalEnv())
    factory = get_default_predictor_factory(env, sb_start_duration=100)
    predictor = factory(env.observation_spec["observation"].shape, env.action_spec, "cpu", None)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50))
    buffer.extend(env.rollout(50, break_when_any_done=False))
    _, info = predictor.learn(buffer, 3, 16, 16, n_total_env_steps=80)
    assert info["skipped"] == 0 and np.isfinite(info["loss_consistency"])
    assert predictor.model.learned_share == pytest.approx(0.6)


def test_factory_can_be_sent_to_another_process():
    factory = pickle.loads(pickle.dumps(get_default_predictor_factory(GoalEnv(), 10)))
    assert factory((8,), ACTION, "cpu", None).context_dim == 2


@pytest.mark.parametrize(
    "make",
    [gymnasium.make, partial(gymnasium.make_vec, num_envs=2, vectorization_mode="sync"), GymEnv],
)
def test_env_without_goals(make):
    text = r"goal-based.*'achieved_goal' and 'desired_goal', got one with \['observation'\]"
    with pytest.raises(ValueError, match=text):
        get_default_predictor_factory(make("Pendulum-v1"), 0)


def test_env_with_one_goal_only():
    env = gymnasium.wrappers.FilterObservation(GoalEnv(), ["observation", "achieved_goal"])
    with pytest.raises(ValueError, match=r"got one with \['achieved_goal', 'observation'\]"):
        get_default_predictor_factory(env, 0)


def test_start_of_negative_duration():
    with pytest.raises(ValueError, match="sb_start_duration must be at least 0, got -1"):
        get_default_predictor_factory(GoalEnv(), -1)
    with pytest.raises(TypeError, match="sb_start_duration must be an integer, got nan"):
        get_default_predictor_factory(GoalEnv(), float("nan"))


# --- real envs


@pytest.fixture(scope="module")
def robotics():
    module = pytest.importorskip("gymnasium_robotics")
    gymnasium.register_envs(module)


def check_goals(predictor, entries, flat):
    assert flat.shape[-1] == sum(x.shape[-1] for x in entries.values())
    latent, context = goals_of(predictor, flat)
    np.testing.assert_array_equal(latent, np.float32(entries["achieved_goal"]))
    np.testing.assert_array_equal(context, np.float32(entries["desired_goal"]))


@pytest.mark.usefixtures("robotics")
@pytest.mark.parametrize("env_id", REAL_ENVS)
def test_goals_of_real_gymnasium_envs(env_id):
    env = gymnasium.make(env_id)
    flattened = FlattenObservation(env)
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    shape = flattened.observation_space.shape
    assert shape == (4 + REAL_ENVS[env_id],)
    predictors = [
        get_default_predictor_factory(e, 0)(shape, env.action_space, "cpu", None)
        for e in (env, flattened)
    ]
    for _ in range(3):
        flat = flattened.observation(observation)
        for predictor in predictors:
            check_goals(predictor, observation, flat)
        observation, *_ = env.step(env.action_space.sample())
    env.close()


@pytest.mark.usefixtures("robotics")
@pytest.mark.parametrize("env_id", REAL_ENVS)
def test_goals_of_real_vector_envs(env_id):
    env = gymnasium.make_vec(env_id, 2, vectorization_mode="sync")
    flattened = FlattenVectorObservation(env)
    observation, _ = env.reset(seed=0)
    shape = flattened.single_observation_space.shape
    for e in (env, flattened):
        factory = get_default_predictor_factory(e, 0)
        predictor = factory(shape, env.single_action_space, "cpu", None)
        check_goals(predictor, observation, flattened.observations(observation))
    env.close()


@pytest.mark.usefixtures("robotics")
@pytest.mark.parametrize("env_id", REAL_ENVS)
def test_goals_of_real_torchrl_envs(env_id):
    base = GymEnv(env_id)
    env = TransformedEnv(base, flatten_observation(base, del_keys=False))
    env.set_seed(0)
    data = env.rollout(4)
    for e in (base, env):
        factory = get_default_predictor_factory(e, 0)
        predictor = factory(data["observation"].shape[1:], env.action_spec, "cpu", None)
        # `observation` is the flattened one now, so its own dims are what the goals leave
        entries = {key: data["next", key].numpy() for key in ("achieved_goal", "desired_goal")}
        entries["observation"] = data["next", "observation"].numpy()[..., 4:]
        check_goals(predictor, entries, data["next", "observation"])
    env.close()


@pytest.mark.usefixtures("robotics")
def test_goals_of_a_real_torchrl_env_of_several():
    options = {"vector_kwargs": {"autoreset_mode": "Disabled"}, "vectorization_mode": "sync"}
    env = GymWrapper(gymnasium.make_vec("PointMaze_UMaze-v3", 2, **options))
    env = TransformedEnv(env, flatten_observation(env, del_keys=False))
    factory = get_default_predictor_factory(env, 0)
    predictor = factory((8,), env.action_spec_unbatched, "cpu", None)
    assert env.batch_size == (2,)
    data = env.rollout(3)["next"]
    entries = {key: data[key].numpy() for key in ("achieved_goal", "desired_goal")}
    entries["observation"] = data["observation"].numpy()[..., 4:]
    check_goals(predictor, entries, data["observation"])
    env.close()


@pytest.mark.slow
@pytest.mark.usefixtures("robotics")
def test_learned_model_beats_the_zero_change_guess():
    """Random actions, each held for 10 steps, else the default's latent state tells too little."""
    goal_envs = pytest.importorskip("benchmarks.goal_envs")
    setting = {"seed": 0, "total_frames": 2000, "updates": 400, "hold": 10}
    default = goal_envs.measure("PointMaze_UMaze-v3", **setting)
    assert 0.1 < default.zero_change < 0.5
    assert default.ratio < 0.98
    seeing = goal_envs.measure("PointMaze_UMaze-v3", **setting, latent="all")
    assert seeing.ratio < 0.6
