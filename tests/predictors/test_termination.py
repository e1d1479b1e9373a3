"""Rare terminations of a real environment are learned at default settings."""

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv

from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor


def cart_pole(frames: int, seed: int):
    env = GymEnv("CartPole-v1")
    env.set_seed(seed)
    torch.manual_seed(seed)
    options = {"frames_per_batch": frames, "total_frames": frames}
    (data,) = (
        batch.clone()
        for batch in Collector(env, None, auto_register_policy_transforms=False, **options)
    )
    return data, env.action_spec


def test_where_a_pole_falls_is_learned_beside_nearly_deterministic_dynamics():
    """With a trunk shared with the Gaussians, ends were ranked no better than by chance."""
    train, spec = cart_pole(3000, seed=0)
    test, _ = cart_pole(2000, seed=1)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(3000))
    buffer.extend(train)
    model = ProbabilisticEnsemble(4, 0, spec, n_models=3, hidden_sizes=(64, 64))
    predictor = RewardPredictor(
        model, ValueNet(4, 0), RewardNet(4, 0, 2), IdentityEncoder(4), 4, 0, model_lr=1e-3
    )
    predictor.learn(buffer, 1000, 32, 128, 3000)
    with torch.no_grad():
        *_, term_prob = predictor.predict(test["observation"], test["action"])
    ends = test["next", "terminated"].squeeze(-1)
    ranked_right = (term_prob[ends][:, None] > term_prob[~ends]).float().mean()
    assert 0.02 < ends.float().mean() < 0.1
    assert ranked_right > 0.97
    assert term_prob[ends].mean() > 0.3 and term_prob[~ends].mean() < 0.05
