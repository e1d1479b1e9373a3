"""Ensembles of subclasses: of one that changes nothing, and of one that predicts otherwise."""

from __future__ import annotations

import copy
from typing import TypeVar

from layeredrl_trl.modules import ParticlePrediction, ProbabilisticEnsemble

Kind = TypeVar("Kind", bound=ProbabilisticEnsemble)


class Unchanged(ProbabilisticEnsemble):
    """It changes nothing; nor does it inherit what its base promises."""


class Turned(ProbabilisticEnsemble):
    """Predicts the negative change, twice as wide, with modes in reverse, and the other end."""

    def predict_particles(self, latent, context, action, member=None):
        mean, std, log_weights, term_logit = super().predict_particles(
            latent, context, action, member
        )
        mean = 2 * latent.unsqueeze(-2) - mean
        return ParticlePrediction(mean, 2 * std, log_weights.flip(-1), -term_logit)


def as_kind(kind: type[Kind], model: ProbabilisticEnsemble) -> Kind:
    """A copy of a model, of another class."""
    other = copy.deepcopy(model)
    other.__class__ = kind
    return other
