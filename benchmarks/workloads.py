"""What is measured: three sizes of a predictor, and a replay buffer that it learns from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor

OBSERVATION_DIM = 17
ACTION_DIM = 6
BUFFER_SIZE = 100_000
EPISODE_STEPS = 200
BATCH_SIZE = 256
"""Slices in a batch, and transitions for the dynamics."""
N_STEPS = 3
GAMMA = 0.99


@dataclass(frozen=True)
class Workload:
    """Sizes of a predictor.

    Attributes:
        name: what tables call it.
        n_models: ``E``.
        n_modes: ``M``.
        n_particles: ``P``, per member.
        k_steps: steps of a slice that reward and value learn on.
        model_hidden: hidden layers of a member of the dynamics.
        hidden: hidden layers of reward and value.
    """

    name: str
    n_models: int
    n_modes: int
    n_particles: int
    k_steps: int
    model_hidden: tuple[int, ...] = (128, 128)
    hidden: tuple[int, ...] = (128, 128)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mix4", n_models=1, n_modes=4, n_particles=1, k_steps=1),
        Workload("ens5", n_models=5, n_modes=1, n_particles=4, k_steps=1),
        Workload("pets", n_models=5, n_modes=1, n_particles=4, k_steps=5, model_hidden=(200,) * 4),
    )
}


def make_predictor(
    workload: Workload, device: torch.device | str = "cpu", **options
) -> RewardPredictor:
    """A predictor with an identity encoder and a state value, from seed 0."""
    torch.manual_seed(0)
    model = ProbabilisticEnsemble(
        OBSERVATION_DIM,
        0,
        ACTION_DIM,
        n_models=workload.n_models,
        n_modes=workload.n_modes,
        n_particles_per_model=workload.n_particles,
        hidden_sizes=workload.model_hidden,
    )
    return RewardPredictor(
        model,
        ValueNet(OBSERVATION_DIM, 0, hidden_sizes=workload.hidden),
        RewardNet(OBSERVATION_DIM, 0, ACTION_DIM, hidden_sizes=workload.hidden),
        IdentityEncoder(OBSERVATION_DIM),
        latent_state_dim=OBSERVATION_DIM,
        context_dim=0,
        gamma=GAMMA,
        k_steps=workload.k_steps,
        n_steps=N_STEPS,
        encoder_warm_up=0,
        device=torch.device(device),
        **options,
    )


def make_transitions(n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Columns of ``n`` transitions in episodes of :data:`EPISODE_STEPS`, every third terminated."""
    generator = torch.Generator().manual_seed(0)
    observation = torch.randn(n, OBSERVATION_DIM, generator=generator)
    action = torch.rand(n, ACTION_DIM, generator=generator) * 2 - 1
    noise = torch.randn(n, OBSERVATION_DIM, generator=generator)
    step = torch.arange(n)
    done = step % EPISODE_STEPS == EPISODE_STEPS - 1
    terminated = done & (step // EPISODE_STEPS % 3 == 0)
    columns = {
        "observation": observation,
        "action": action,
        "next_observation": observation + 0.1 * observation.roll(1, 1) + 0.1 * noise,
        "reward": torch.randn(n, 1, generator=generator),
        "terminated": terminated[:, None],
        "done": done[:, None],
    }
    return {name: column.to(device) for name, column in columns.items()}


def make_buffer(
    columns: dict[str, Tensor], device: torch.device | str = "cpu"
) -> TensorDictReplayBuffer:
    """A replay buffer that holds exactly the given transitions."""
    n = len(columns["done"])
    after = {
        "observation": columns["next_observation"],
        "reward": columns["reward"],
        "terminated": columns["terminated"],
        "truncated": columns["done"] & ~columns["terminated"],
        "done": columns["done"],
    }
    data = TensorDict(
        {"observation": columns["observation"], "action": columns["action"], "next": after}, [n]
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n, device=device))
    buffer.extend(data.to(device))
    return buffer


def action_spec(device: torch.device | str = "cpu") -> Bounded:
    return Bounded(-1.0, 1.0, (ACTION_DIM,), device=device)
