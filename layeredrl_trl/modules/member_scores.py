"""How well every member of a dynamics model predicted real transitions."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from layeredrl_trl.functional import gaussian_mixture_log_prob
from layeredrl_trl.modules.particles import ParticlePrediction


def score_members(
    prediction: ParticlePrediction, next_latent: Tensor, terminated: Tensor
) -> tuple[Tensor, Tensor]:
    """Score real transitions by the prediction of every member for them.

    Args:
        prediction: ``mean`` and ``std`` ``[..., E, M, D]``, ``log_weights`` ``[..., E, M]`` and
            ``term_logit`` ``[..., E, 1]``.
        next_latent: ``[..., D]``.
        terminated: bool ``[..., 1]``.

    Returns:
        Negative log-likelihood of the next latent state and cross-entropy of the termination in
        nats, ``[..., E]``.
    """
    mean, std, log_weights, term_logit = prediction
    next_latent = next_latent.to(mean.dtype).unsqueeze(-2)
    nll = -gaussian_mixture_log_prob(next_latent, mean, std, log_weights)
    target = terminated.to(term_logit.dtype).unsqueeze(-2).expand_as(term_logit)
    bce = binary_cross_entropy_with_logits(term_logit, target, reduction="none")
    return nll, bce.squeeze(-1)
