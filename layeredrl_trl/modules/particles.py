"""Predictions of a dynamics model for particles, from which next latent states are drawn."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from layeredrl_trl.functional import (
    MixtureNoise,
    gaussian_mixture_mean,
    sample_gaussian_mixture,
)


class ParticlePrediction(NamedTuple):
    """Prediction for each particle by its member.

    Attributes:
        mean: of the next latent state, per mode, ``[..., E, P, M, D]``.
        std: per mode, ``[..., E, P, M, D]``.
        log_weights: of the modes, ``[..., E, P, M]``; ``logsumexp`` over ``M`` is 0.
        term_logit: logit of the probability that the step terminates, ``[..., E, P, 1]``.
    """

    mean: Tensor
    std: Tensor
    log_weights: Tensor
    term_logit: Tensor

    def next_latent(self, deterministic: bool, noise: MixtureNoise | None = None) -> Tensor:
        """Draw the next latent states, or take the means of the mixtures; ``[..., E, P, D]``.

        The noise ``[..., E, P, M]`` and ``[..., E, P, D]`` is drawn here if it is not given.
        """
        if deterministic:
            return gaussian_mixture_mean(self.mean, self.log_weights.exp())
        return sample_gaussian_mixture(self.mean, self.std, self.log_weights, noise)
