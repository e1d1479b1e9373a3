"""A system whose every step is known, its episodes in buffers, and models that are right or not."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.modules import DynamicsModel, IdentityEncoder, ParticlePrediction
from layeredrl_trl.predictors import StaticPredictor
from tests.problems import LinearGaussian

SYSTEM = LinearGaussian()
Episode = tuple[Tensor, Tensor]


class KnownDynamics(DynamicsModel):
    """The dynamics of ``LinearGaussian``.

    Args:
        n_models (int): members, all alike but for ``offset``.
        std_factor (float): of the predicted standard deviation; 1 is right.
        offset (float): the member means lie between -offset and offset of the right one.
        hazard (float | None): a constant probability of termination instead of the right one.
    """

    n_modes = n_particles_per_model = 1
    latent_state_dim, context_dim, action_dim = 2, 0, 1

    def __init__(self, n_models=1, std_factor=1.0, offset=0.0, hazard=None):
        super().__init__()
        self.n_models, self.std_factor, self.hazard = n_models, std_factor, hazard
        self.offset = offset * torch.linspace(-1, 1, n_models) if n_models > 1 else torch.zeros(1)

    def predict_particles(self, latent, context, action, member=None):
        mean = latent @ SYSTEM.A.T + (action @ SYSTEM.B.T)[..., None, None, :]
        mean = (mean + self.offset[:, None, None]).unsqueeze(-2)
        std = (self.std_factor * SYSTEM.noise).expand_as(mean)
        hazard = SYSTEM.hazard(latent)
        if self.hazard is not None:
            hazard = torch.full_like(hazard, self.hazard)
        return ParticlePrediction(mean, std, torch.zeros_like(mean[..., 0]), hazard.logit())


class KnownReward(nn.Module):
    """``s_0 + 2 a``, as :func:`buffer_of` stores it."""

    def forward(self, latent, context, action):
        return latent[..., :1] + 2 * action


def known_predictor(rew_func: nn.Module | None = None, **options) -> StaticPredictor:
    return StaticPredictor(KnownDynamics(**options), None, rew_func, IdentityEncoder(2), 2, 0)


def episodes_of(lengths: list[int], start_scale: float = 1.0) -> list[Episode]:
    """Observations ``[T + 1, 2]`` and actions ``[T, 1]``."""
    out = []
    for length in lengths:
        obs, act = [start_scale * torch.randn(2)], torch.randn(length, 1)
        for a in act:
            noise = SYSTEM.noise * torch.randn(2)
            obs.append(SYSTEM.A @ obs[-1] + SYSTEM.B @ a + noise)
        out.append((torch.stack(obs), act))
    return out


def steps_of(episode: Episode, terminated: bool = False) -> TensorDict:
    """``[T]`` transitions; the last one is truncated, or else terminated."""
    obs, act = episode
    last = (torch.arange(len(act)) == len(act) - 1).unsqueeze(-1)
    following = {
        "observation": obs[1:],
        "reward": obs[:-1, :1] + 2 * act,
        "terminated": last & terminated,
        "truncated": last & (not terminated),
        "done": last,
    }
    return TensorDict(
        {"observation": obs[:-1], "action": act, "next": following}, batch_size=[len(act)]
    )


def buffer_of(
    episodes: list[Episode], *, terminated: bool = False, capacity: int | None = None
) -> TensorDictReplayBuffer:
    """The episodes one after the other, in a ring of ``capacity`` rows."""
    steps = torch.cat([steps_of(episode, terminated) for episode in episodes])
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity or len(steps) + 7))
    for part in steps.split(5):
        buffer.extend(part)
    return buffer


def transitions_buffer(n: int) -> TensorDictReplayBuffer:
    """``n`` transitions of the known system, terminations as it has them, each an episode."""
    drawn = SYSTEM.transitions(n)
    drawn = TensorDict(
        {
            "observation": drawn["latent"],
            "action": drawn["action"],
            "next": {
                "observation": drawn["next", "latent"],
                "reward": drawn["latent"][:, :1] + 2 * drawn["action"],
                "terminated": drawn["next", "terminated"],
                "done": torch.ones(n, 1).bool(),
            },
        },
        batch_size=[n],
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(drawn)
    return buffer
