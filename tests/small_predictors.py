"""Predictors small enough to learn in a test, and one call that lets them learn."""

from __future__ import annotations

import torch
from torch import nn

from layeredrl_trl.modules import Encoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor
from tests.oracles_predictors import ToyBuffer, filled_buffer


class LearnedEncoder(Encoder):
    """One linear layer; ``latent_state_dim`` latent and one context dim."""

    def __init__(self, obs_dim: int = 3, latent_state_dim: int = 2, **keys):
        super().__init__(obs_dim, latent_state_dim, 1, **keys)
        self.net = nn.Linear(obs_dim, latent_state_dim + 1)

    def embed(self, observation):
        return self.net(observation).split((self.latent_state_dim, 1), -1)


def small_parts(value: str | None = "state", encoder: Encoder | None = None, n_models: int = 2):
    """``(dynamics, value, reward, encoder)`` for observations of 3 and actions of 1 dim."""
    hidden = {"hidden_sizes": (8,)}
    encoder = LearnedEncoder() if encoder is None else encoder
    dims = encoder.latent_state_dim, encoder.context_dim
    values = {
        None: lambda: None,
        "state": lambda: ValueNet(*dims, **hidden),
        "q": lambda: ValueNet(*dims, action_dim=1, **hidden),
    }
    dynamics = ProbabilisticEnsemble(*dims, 1, n_models=n_models, **hidden)
    return dynamics, values[value](), RewardNet(*dims, 1, **hidden), encoder


def small_predictor(value="state", encoder=None, n_models=2, **options) -> RewardPredictor:
    model, val_func, rew_func, encoder = small_parts(value, encoder, n_models)
    dims = encoder.latent_state_dim, encoder.context_dim
    return RewardPredictor(model, val_func, rew_func, encoder, *dims, **options)


def learn(predictor, toy=None, n_steps=1, env_steps=100, seed=None, batch_size=8):
    toy = filled_buffer() if toy is None else toy
    buffer = toy.buffer if isinstance(toy, ToyBuffer) else toy
    if seed is not None:
        torch.manual_seed(seed)
    return predictor.learn(buffer, n_steps, batch_size, batch_size, env_steps)


def snapshot(predictor) -> dict[str, torch.Tensor]:
    state = {k: x for k, x in predictor.state_dict().items() if isinstance(x, torch.Tensor)}
    return {key: x.detach().clone() for key, x in state.items()}
