"""What TorchRL does with an imagined env: planners, buffers, value estimators, losses.

What an imagined env is by itself is in ``test_predictor_env.py``.
"""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, RewardScaling, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import (
    MLP,
    CEMPlanner,
    MPPIPlanner,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import A2CLoss, ClipPPOLoss, DDPGLoss, SACLoss, SoftUpdate, TD3Loss
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator

from layeredrl_trl import IdentityEncoder, PredictorEnv, TransitionSliceSampler
from tests.oracles import random_ensemble, random_reward

ACTION_SPEC = Bounded(-1.0, 1.0, (2,))
GAMMA, LAMBDA = 0.9, 0.7
TERMINATIONS = ["soft", "sample"]
PROPAGATIONS = ["fixed_model", "random_model", "expectation"]


def make_env(**options):
    model = random_ensemble(3, n_models=3, n_particles_per_model=2, n_modes=2)
    with torch.no_grad():  # most particles live on for some steps
        model.termination_net.biases[-1] -= 2.0
    options = {"start": torch.randn(20, 3), **options}
    return PredictorEnv(IdentityEncoder(3), model, random_reward(model), ACTION_SPEC, **options)


def one_of_many(**options):
    """An env that looks to a policy like a real one."""
    return make_env(num_particles=1, propagation="random_model", **options)


def rollout(env, steps=6, n=8, policy=None):
    start = env.reset(TensorDict(batch_size=[n]))
    with torch.no_grad():
        return env.rollout(
            steps, policy, tensordict=start, auto_reset=False, break_when_any_done=False
        )


def make_actor():
    net = nn.Sequential(MLP(3, 4, num_cells=[8]), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
        spec=ACTION_SPEC,
    )


def make_deterministic_actor():
    net = nn.Sequential(MLP(3, 2, num_cells=[8]), nn.Tanh())
    return TensorDictModule(net, ["observation"], ["action"])


def state_value():
    return ValueOperator(MLP(3, 1, num_cells=[8]), ["observation"])


def action_value():
    return ValueOperator(MLP(5, 1, num_cells=[8]), ["observation", "action"])


# --- specs of every combination


@pytest.mark.parametrize("uncertainty", [False, True], ids=["", "uncertainty"])
@pytest.mark.parametrize("deterministic", [False, True, None])
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("termination", TERMINATIONS)
def test_specs(termination, propagation, num_particles, deterministic, uncertainty):
    env = make_env(
        termination=termination,
        propagation=propagation,
        num_particles=num_particles,
        deterministic=deterministic,
        uncertainty=uncertainty,
    )
    check_env_specs(env)
    check_env_specs(TransformedEnv(env, Compose(RewardScaling(0.0, 2.0), StepCounter(3))))
    assert rollout(env).batch_size == (8, 6)


# --- planners


@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("termination", TERMINATIONS)
@pytest.mark.parametrize("kind", [CEMPlanner, MPPIPlanner])
def test_planners_on_a_transformed_env(kind, termination, propagation, num_particles):
    env = make_env(termination=termination, propagation=propagation, num_particles=num_particles)
    model = TransformedEnv(env, RewardScaling(0.0, 2.0))
    options = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 6, "top_k": 2}
    if kind is MPPIPlanner:
        options["temperature"] = 1.0
        options["advantage_module"] = TDLambdaEstimator(
            gamma=GAMMA, lmbda=LAMBDA, value_network=state_value()
        )
    policy = TensorDictSequential(env.initial_state, kind(model, **options))
    out = policy(TensorDict(observation=torch.randn(4, 3), batch_size=[4]))
    assert out["action"].shape == (4, 2) and env.action_spec.is_in(out["action"])


# --- collectors and buffers


@pytest.mark.parametrize("frames", [40, 64])
def test_a_collector_restarts_imagined_episodes_at_real_observations(frames):
    start = torch.randn(20, 3)
    env = TransformedEnv(one_of_many(start=start), StepCounter(5))
    collector = Collector(
        env,
        make_actor(),
        frames_per_batch=frames,
        total_frames=2 * frames,
        auto_register_policy_transforms=False,
    )
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    out = torch.cat(batches).reshape(-1)
    assert out.shape == (2 * frames,)
    first = out["step_count"].squeeze(-1) == 0
    assert first.sum() == -(-2 * frames // 5)
    assert (out["observation"][first][:, None] == start).all(-1).any(-1).all()
    assert (out["alive"][first] == 1).all()
    assert out["next", "truncated"].sum() == 2 * frames // 5


@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("ndim", [1, 2])
def test_rollouts_go_through_a_replay_buffer(ndim, num_particles):
    env = make_env(num_particles=num_particles, termination="sample", uncertainty=True)
    out = rollout(env)
    if ndim == 1:  # laid end to end, nothing else tells where one ends
        out["next", "truncated"][:, -1] = out["next", "done"][:, -1] = True
    sampler = TransitionSliceSampler(slice_len=3)
    storage = LazyTensorStorage(48 if ndim == 1 else 12, ndim=ndim)
    buffer = TensorDictReplayBuffer(
        storage=storage, sampler=sampler, batch_size=60, dim_extend=0 if ndim == 1 else 1
    )
    buffer.extend(out.reshape(-1) if ndim == 1 else out)
    sample = buffer.sample().reshape(20, 3)
    assert {*out.keys(True, True)} <= {*sample.keys(True, True)}
    mask = sample["collector", "mask"].squeeze(-1)
    for entry in ("latent", "observation", "alive"):
        consecutive = sample[entry][:, 1:], sample["next", entry][:, :-1]
        assert torch.equal(*(x[mask[:, 1:]] for x in consecutive))
    assert not mask.all() and mask[:, 0].all()
    assert torch.equal(sample["observation"], sample["latent"][:, :, 0, 0])


def test_imagined_rollouts_laid_end_to_end_were_joined():
    env = make_env(termination="soft")
    start = env.reset(TensorDict(batch_size=[8]))
    out = env.imagine(start, env.action_spec.expand(8, 6, 2).rand(), set_truncated=True)
    sampler = TransitionSliceSampler(slice_len=3)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(48), sampler=sampler, batch_size=600)
    buffer.extend(out.reshape(-1))
    sample = buffer.sample().reshape(200, 3)
    mask = sample["collector", "mask"].squeeze(-1)
    consecutive = sample["latent"][:, 1:], sample["next", "latent"][:, :-1]
    assert torch.equal(*(x[mask[:, 1:]] for x in consecutive))
    assert not mask.all()


def test_a_sampled_state_is_one_to_imagine_from():
    env = one_of_many(deterministic=True)
    out = rollout(env)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(48), batch_size=48)
    buffer.extend(out.reshape(-1))
    sample = buffer.sample()
    again = env.step(sample.exclude("next"))
    torch.testing.assert_close(again["next", "latent"], sample["next", "latent"])
    torch.testing.assert_close(again["next", "reward"], sample["next", "reward"])


# --- value estimators


def returns_by_hand(out, value, next_value, kind):
    """Value targets of one rollout ``[T]``, step by step from behind."""
    reward, alive = out["next", "reward"].flatten(), 1 - out["next", "terminated"].float().flatten()
    over, steps = out["next", "done"].flatten(), range(len(reward))
    target = torch.zeros_like(reward)
    mix = {"TD0": 0.0, "TD1": 1.0, "TDLambda": LAMBDA, "GAE": LAMBDA}[kind]
    for t in reversed(steps):
        following = next_value[t]
        if t + 1 < len(reward) and not over[t]:
            following = (1 - mix) * next_value[t] + mix * target[t + 1]
        target[t] = reward[t] + GAMMA * alive[t] * following
    return target


ESTIMATORS = {
    "TD0": lambda value: TD0Estimator(gamma=GAMMA, value_network=value),
    "TD1": lambda value: TD1Estimator(gamma=GAMMA, value_network=value),
    "TDLambda": lambda value: TDLambdaEstimator(gamma=GAMMA, lmbda=LAMBDA, value_network=value),
    "GAE": lambda value: GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=value),
}


@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("termination", TERMINATIONS)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_value_estimators(kind, termination, num_particles):
    env = TransformedEnv(
        make_env(num_particles=num_particles, termination=termination), StepCounter(4)
    )
    out, value = rollout(env, steps=10), state_value()
    terminated, done = out["next", "terminated"], out["next", "done"]
    assert torch.equal(terminated, (out["next", "alive"] == 0).all(-2).all(-2))
    assert terminated.any() or termination == "soft" or num_particles is None
    assert done.any() and not done.all()
    estimated = ESTIMATORS[kind](value)(out.clone())["value_target"]
    with torch.no_grad():
        now, following = (value(x.select("observation"))["state_value"] for x in (out, out["next"]))
    for b in range(8):
        expected = returns_by_hand(out[b], now[b].flatten(), following[b].flatten(), kind)
        torch.testing.assert_close(estimated[b].flatten(), expected, rtol=1e-4, atol=1e-4)


# --- losses

LOSSES = {
    "SAC": lambda: SACLoss(make_actor(), action_value(), action_spec=ACTION_SPEC),
    "TD3": lambda: TD3Loss(make_deterministic_actor(), action_value(), action_spec=ACTION_SPEC),
    "DDPG": lambda: DDPGLoss(make_deterministic_actor(), action_value()),
    "A2C": lambda: A2CLoss(make_actor(), state_value()),
    "PPO": lambda: ClipPPOLoss(make_actor(), state_value()),
}


@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("kind", LOSSES)
def test_actor_critic_losses(kind, num_particles):
    env = make_env(num_particles=num_particles, termination="sample")
    out = rollout(env, policy=make_actor())
    loss = LOSSES[kind]()
    if kind not in ("A2C", "PPO"):
        SoftUpdate(loss, tau=0.01)  # without one they warn
    if kind in ("A2C", "PPO"):
        out = GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=state_value())(out)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(48), batch_size=32)
    buffer.extend(out.reshape(-1))
    terms = loss(buffer.sample())
    sum(x for name, x in terms.items() if name.startswith("loss_")).backward()
    for name, parameter in loss.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name
    trained = [p for p in loss.parameters() if p.grad is not None and (p.grad != 0).any()]
    assert len(trained) >= 8  # two layers of an actor and of a critic
