"""A planner as the policy of a collector: which entries leave it, and where they can be stored."""

import re
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import ExcludeTransform, GymEnv, SerialEnv
from torchrl.objectives import SoftUpdate

from layeredrl_trl import keys
from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
    ValueNet,
)
from layeredrl_trl.objectives import RewardPredictorLoss
from layeredrl_trl.planners import (
    CategoricalCrossEntropyPlanner,
    CrossEntropyPlanner,
    ICEMPlanner,
    PathIntegralPlanner,
)

README = Path(__file__).parents[1] / "README.md"
PLANNERS = {
    "CEM": (CrossEntropyPlanner, {"top_k": 4}),
    "iCEM": (ICEMPlanner, {"top_k": 4}),
    "MPPI": (PathIntegralPlanner, {}),
    "categorical": (CategoricalCrossEntropyPlanner, {"top_k": 4}),
}
STATISTICS = ("plan_return", "plan_spread", "plan_std")
every_planner = pytest.mark.parametrize("name", PLANNERS)
every_context = pytest.mark.parametrize("context_dim", [0, 1])


def real_env(name):
    env_id = "CartPole-v1" if name == "categorical" else "Pendulum-v1"
    return GymEnv(env_id, max_episode_steps=7)


def make_parts(name, context_dim, **options):
    """A model of the real env, a planner in it, and the parts of a loss."""
    env = real_env(name)
    obs_dim = env.observation_spec[keys.OBSERVATION].shape[-1]
    latent_dim = obs_dim - context_dim
    dims = list(range(obs_dim))
    encoder = IdentityEncoder(obs_dim)
    if context_dim:
        encoder = SelectEncoder(obs_dim, dims[:latent_dim], dims[latent_dim:])
    dynamics = ProbabilisticEnsemble(latent_dim, context_dim, env.action_spec, n_models=3)
    reward = RewardNet(latent_dim, context_dim, env.action_spec.shape[-1])
    model = PredictorEnv(encoder, dynamics, reward, env.action_spec, **options)
    planner_class, defaults = PLANNERS[name]
    search = {"planning_horizon": 4, "optim_steps": 2, "num_candidates": 16}
    planner = planner_class(model, **search, **defaults)
    return model, planner, (encoder, dynamics, reward, ValueNet(latent_dim, context_dim))


def make_policy(model, planner):
    """As in the README."""
    return TensorDictSequential(model.initial_state, planner, selected_out_keys=planner.out_keys)


def collect(env, policy, storage, n_batches=3, n_steps=10, **options):
    """Batches, and a buffer of them."""
    n_envs = env.batch_size.numel()
    sampler = TransitionSliceSampler(slice_len=3)
    buffer = TensorDictReplayBuffer(
        storage=storage(200, ndim=1 + len(env.batch_size)), sampler=sampler, batch_size=30
    )
    collector = Collector(
        env,
        policy,
        frames_per_batch=n_steps * n_envs,
        total_frames=n_batches * n_steps * n_envs,
        auto_register_policy_transforms=True,
        **options,
    )
    batches = []
    for data in collector:
        batches.append(data.clone())
        buffer.extend(data)
    collector.shutdown()
    return torch.cat(batches, -1), buffer


# --- which entries a policy writes


@every_planner
@every_context
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 2}, {"uncertainty": True}], ids=["all", "spread", "var"]
)
@pytest.mark.parametrize("batch", [(), (4,)], ids=str)
@pytest.mark.parametrize("with_flags", [False, True])
def test_out_keys_name_everything_that_the_policy_writes(
    name, context_dim, options, batch, with_flags
):
    model, planner, (encoder, *_) = make_parts(name, context_dim, **options)
    policy = make_policy(model, planner)
    given = TensorDict(observation=torch.randn(*batch, *encoder.obs_shape), batch_size=batch)
    if with_flags:  # as after a reset
        for key in (keys.DONE, keys.TERMINATED, keys.TRUNCATED):
            given[key] = torch.zeros(*batch, 1, dtype=torch.bool)
    before = given.clone()
    out = policy(given)
    written = set(out.keys(True, True)) - set(before.keys(True, True))
    assert written == set(policy.out_keys) == set(planner.out_keys)
    assert {"action", ("next", "plan"), *STATISTICS} <= written
    for key in before.keys():
        assert torch.equal(out[key], before[key])


# --- where these entries can be stored


@every_planner
@every_context
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_a_planner_collects_into_every_storage(name, context_dim, storage):
    """An empty context could not be memory-mapped."""
    model, planner, parts = make_parts(name, context_dim)
    data, buffer = collect(real_env(name), make_policy(model, planner), storage)
    stored = set(buffer.storage[:].keys(True, True))
    assert {"action", "plan", ("next", "plan"), *STATISTICS} <= stored
    state = set(model.initial_state.out_keys) - {keys.DONE, keys.TERMINATED, keys.TRUNCATED}
    assert {keys.LATENT, keys.CONTEXT, keys.ALIVE} <= state and not state & stored
    loss = RewardPredictorLoss(*parts, n_steps=3)
    SoftUpdate(loss, tau=0.1)
    terms = loss(buffer.sample())
    assert sum(x for key, x in terms.items() if key.startswith("loss_")).isfinite()
    for key in ("plan", ("next", "plan"), "plan_return"):
        pair = buffer.storage[:][key].as_subclass(torch.Tensor), data[key]
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


@every_planner
@every_context
@pytest.mark.parametrize("n_envs", [1, 2])
def test_plans_are_carried_by_a_policy_that_keeps_its_state_to_itself(name, context_dim, n_envs):
    outs = []
    for is_whole in (True, False):
        torch.manual_seed(0)
        model, planner, _ = make_parts(name, context_dim)
        policy = TensorDictSequential(model.initial_state, planner)
        if not is_whole:
            policy = make_policy(model, planner)
        env = real_env(name) if n_envs == 1 else SerialEnv(n_envs, lambda: real_env(name))
        env.set_seed(0)
        torch.manual_seed(1)
        outs.append(collect(env, policy, LazyTensorStorage)[0])
    whole, data = outs
    for key in ("action", "plan", "plan_std", keys.NEXT_OBSERVATION):
        torch.testing.assert_close(data[key], whole[key], rtol=0, atol=0, equal_nan=True)
    goes_on = ~data[keys.NEXT_DONE].squeeze(-1)[..., :-1]
    assert goes_on.any() and not goes_on.all()
    found, left = data["plan"][..., 1:, :, :], data["next", "plan"][..., :-1, :, :]
    assert torch.equal(found[goes_on], left[goes_on]) and left.isfinite().all()
    assert found[~goes_on].isnan().all() and data["plan"][..., 0, :, :].isnan().all()
    assert data["next", "plan"].isfinite().all()


@every_planner
def test_plans_that_are_not_stored_are_carried_all_the_same(name):
    outs = []
    for left_out in ([], ["plan", ("next", "plan"), "elites", ("next", "elites")]):
        torch.manual_seed(0)
        model, planner, _ = make_parts(name, 0)
        env, postproc = real_env(name), ExcludeTransform(*left_out) if left_out else None
        env.set_seed(0)
        policy = make_policy(model, planner)
        outs.append(collect(env, policy, LazyMemmapStorage, postproc=postproc)[0])
    whole, data = outs
    assert not {"plan", "elites"} & {*data.keys(), *data["next"].keys()}
    assert torch.equal(data["action"], whole["action"])
    assert torch.equal(data["plan_std"], whole["plan_std"])


def test_the_readme_collects_into_a_memory_map():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block.count("LazyTensorStorage") == 2
    scope: dict = {}
    code = block.replace("LazyTensorStorage", "LazyMemmapStorage")
    exec(compile(code, str(README), "exec"), scope)
    buffer = scope["buffer"]
    assert isinstance(buffer.storage, LazyMemmapStorage) and len(buffer) == 100
    assert scope["terms"]["loss_reward"].isfinite()
    stored = buffer.storage[:]
    assert keys.LATENT not in stored.keys() and keys.CONTEXT not in stored.keys()
    assert torch.equal(stored["plan"][1:], stored["next", "plan"][:-1])
    assert stored["plan"][0].isnan().all() and stored["plan"][1:].isfinite().all()


# --- a random phase before the planner's


@every_planner
@pytest.mark.parametrize("n_envs", [1, 2])
def test_rows_of_a_random_phase_hold_no_plan(name, n_envs):
    """They are NaN, and the first plan after them starts cold."""
    model, planner, parts = make_parts(name, 0)
    env = real_env(name) if n_envs == 1 else SerialEnv(n_envs, lambda: real_env(name))
    warm = []
    planner.register_forward_pre_hook(
        lambda module, args: warm.append(bool(args[0]["plan"].isfinite().all()))
    )
    policy, n = make_policy(model, planner), 20 * n_envs
    data, buffer = collect(env, policy, LazyMemmapStorage, n_batches=4, init_random_frames=n)
    random, planned = data[..., :20], data[..., 20:]
    assert random["plan"].isnan().all() and random["next", "plan"].isnan().all()
    assert all((random[key] == 0).all() for key in STATISTICS)
    assert planned["plan"][..., 0, :, :].isnan().all()
    assert planned["next", "plan"].isfinite().all()
    assert all((planned[key] != 0).any() for key in STATISTICS[2:])
    assert not warm[0] and any(warm)
    loss = RewardPredictorLoss(*parts, n_steps=3)
    SoftUpdate(loss, tau=0.1)
    terms = loss(buffer.sample())  # NaN in entries that nobody reads harms nobody
    assert sum(x for key, x in terms.items() if key.startswith("loss_")).isfinite()
