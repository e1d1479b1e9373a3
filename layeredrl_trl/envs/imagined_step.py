"""What an imagined step starts from, how it is drawn, and what comes out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layeredrl_trl.functional import MixtureNoise


class ImaginedState(NamedTuple):
    """State of ``N`` imagined envs before a step.

    Attributes:
        latent: ``[N, E, P, D]``; with ``member`` ``[N, 1, P, D]``.
        context: ``[N, C]``.
        alive: probability that the particle has not terminated yet, ``[N, E, P, 1]``.
        member: of all particles of an env, long ``[N, 1]``; ``None`` if row ``e`` of the particles
            belongs to member ``e``.
    """

    latent: Tensor
    context: Tensor
    alive: Tensor
    member: Tensor | None = None

    def first(self, n: int, batch: torch.Size) -> ImaginedState:
        """Keep the first ``n`` along the last dim of ``batch``, a shape of ``N`` elements."""
        dim = len(batch) - 1
        kept = (
            None if x is None else x.unflatten(0, batch).narrow(dim, 0, n).flatten(0, dim)
            for x in self
        )
        return ImaginedState(*kept)


class Chances(NamedTuple):
    """The random numbers of a step; ``None`` for those that it does not need.

    Attributes:
        noise: of the draw from the mixtures, ``[N, E, P, ...]``.
        order: permutation of the particles over rows of members, long ``[N, E * P]``.
        ends: uniform, a particle terminates if it is below ``term_prob``, ``[N, E, P, 1]``.
        member: of the next step, long ``[N, 1]``.
    """

    noise: MixtureNoise | None = None
    order: Tensor | None = None
    ends: Tensor | None = None
    member: Tensor | None = None


class ImaginedStep(NamedTuple):
    """The outcome of one imagined step.

    Attributes:
        latent: next latent states, ``[..., E, P, D]``.
        alive: probability that the particle has not terminated yet, ``[..., E, P, 1]``.
        term_prob: probability that this step terminates, ``[..., E, P, 1]``.
        terminated: bool ``[..., 1]``.
        member: of the next step, long ``[..., 1]``; ``None`` if each member has its own particles.
        epistemic_var, aleatoric_var: ``[..., D]``; ``None`` if not computed.
        particle_reward: ``[..., E, P, 1]``.
        reward: mean over particles of the prior ``alive`` times ``particle_reward``, ``[..., 1]``;
            that of a dead particle counts as 0, finite or not.
    """

    latent: Tensor
    alive: Tensor
    term_prob: Tensor
    terminated: Tensor
    member: Tensor | None = None
    epistemic_var: Tensor | None = None
    aleatoric_var: Tensor | None = None
    particle_reward: Tensor | None = None
    reward: Tensor | None = None
