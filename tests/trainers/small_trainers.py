"""Trainers of a few steps, on real environments."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    GymEnv,
    InitTracker,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)

from layeredrl_trl import keys
from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.planners import CategoricalCrossEntropyPlanner, Explorer, ICEMPlanner
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.trainers import PredictorTrainer

STORED = (
    *(keys.OBSERVATION, keys.ACTION, keys.PLANNED, keys.TRAJ_IDS),
    *(keys.NEXT_OBSERVATION, keys.NEXT_REWARD),
    *(keys.NEXT_TERMINATED, keys.NEXT_TRUNCATED, keys.NEXT_DONE),
)


def make_env(env_id="Pendulum-v1", n_envs=1, seed=0, **options):
    def one():
        return TransformedEnv(GymEnv(env_id, **options), DoubleToFloat())

    env = one() if n_envs == 1 else SerialEnv(n_envs, one)
    trackers = Compose(InitTracker(), StepCounter(), RewardSum())
    env = TransformedEnv(env, trackers, auto_unwrap=True)
    env.set_seed(seed)
    return env


def make_predictor(env, **options):
    obs_dim = env.observation_spec_unbatched[keys.OBSERVATION].shape[-1]
    spec = env.action_spec_unbatched
    net = {"hidden_sizes": (8,)}
    options = {"n_steps": 2, "learn_encoder": False} | options
    return RewardPredictor(
        ProbabilisticEnsemble(obs_dim, 0, spec, n_models=2, **net),
        ValueNet(obs_dim, 0, **net),
        RewardNet(obs_dim, 0, spec.shape[-1], **net),
        IdentityEncoder(obs_dim),
        latent_state_dim=obs_dim,
        context_dim=0,
        **options,
    )


def make_planner(predictor, spec):
    model = predictor.env(spec, num_particles=1)
    kind = CategoricalCrossEntropyPlanner if spec.domain == "discrete" else ICEMPlanner
    search = {"planning_horizon": 3, "optim_steps": 1, "num_candidates": 8, "top_k": 2}
    planner = kind(model, terminal_value=predictor.val_func, **search)
    policy = TensorDictSequential(model.initial_state, planner, selected_out_keys=planner.out_keys)
    return policy, planner


def make_buffer(predictor, capacity=1000, ndim=1, **options):
    sampler = TransitionSliceSampler(slice_len=predictor.loss_module.slice_len)
    storage = LazyTensorStorage(capacity, ndim=ndim)
    return TensorDictReplayBuffer(storage=storage, sampler=sampler, **options)


def make_trainer(env=None, *, seed=0, total_frames=60, n_random=20, predictor=None, **options):
    """A trainer of a small predictor that plans; everything random is seeded."""
    torch.manual_seed(seed)
    env = make_env(seed=seed) if env is None else env
    predictor = make_predictor(env) if predictor is None else predictor
    policy, planner = make_planner(predictor, env.action_spec_unbatched)
    env.append_transform(planner.make_tensordict_primer())
    explorer = Explorer(policy, env.action_spec_unbatched, n_random, planner=planner)
    ndim = 1 + bool(env.batch_size)
    per_batch = options.pop("frames_per_batch", 20)
    buffer = options.pop("replay_buffer", None)
    collector = Collector(env, explorer, frames_per_batch=per_batch, total_frames=-1)
    explorer.steps = 0
    return PredictorTrainer(
        predictor=predictor,
        collector=collector,
        replay_buffer=make_buffer(predictor, ndim=ndim) if buffer is None else buffer,
        total_frames=total_frames,
        planner=explorer,
        **{
            "updates_per_frame": 0.2,
            "batch_size": 8,
            "stored_keys": STORED,
            "progress_bar": False,
        }
        | options,
    )


def tensors_of(module):
    return {k: x.clone() for k, x in module.state_dict().items() if isinstance(x, torch.Tensor)}


def rows_of(buffer):
    if not len(buffer):
        return None
    return buffer.storage._storage[: buffer.storage.shape[0]].clone()
