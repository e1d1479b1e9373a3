"""A start in which actions matter: a fixed random model that gives way to the learned one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layeredrl_trl.acceleration import promised
from layeredrl_trl.modules.dynamics import DynamicsModel
from layeredrl_trl.modules.particles import ParticlePrediction
from layeredrl_trl.modules.spaces import action_features


class SymmetryBreakingStart(DynamicsModel):
    """Predict by a fixed random linear map of the action, until the model has learned something.

    A model that knows nothing predicts the same for every action, so a skill learner that is
    rewarded for predictable effects has nothing to begin with. While
    ``n_total_env_steps < sb_start_duration`` predictions are ``latent + W^{-1} factor R action``
    with ``R`` random, fixed, with orthonormal columns (rows, if there are more actions than latent
    dims), ``W^{-1}`` the inverse of the predictor's delta standardizer, no termination, and even
    modes. From half of the duration on they are blended linearly into those of ``model``.

    The loss is always that of ``model``, so it learns from the first step. The progress of the
    start is held in a buffer, where a recorded CUDA graph reads it.

    Args:
        model: learns meanwhile, and predicts afterwards.
        sb_start_duration: env steps; 0 for no start. If it is changed later, that counts from the
            next :meth:`advance` on.
        factor: length of ``W`` times the change that an action of length 1 makes.
        std: standard deviation of ``W`` times the change.

    Reads:
        What ``model`` reads.

    Writes:
        What ``model`` writes.

    Raises:
        ValueError: if ``sb_start_duration`` is negative, or ``factor`` or ``std`` not positive.

    Example:
        >>> from layeredrl_trl.modules import ProbabilisticEnsemble
        >>> model = SymmetryBreakingStart(ProbabilisticEnsemble(2, 0, 3), sb_start_duration=100)
        >>> latent, context = torch.zeros(1, 2), torch.zeros(1, 0)
        >>> mean, *_ = model.predict(latent, context, torch.tensor([[1.0, 0.0, 0.0]]))
        >>> model.advance(100)
        >>> model.learned_share
        1.0
    """

    fingerprint_ignores = frozenset({"_n_total_env_steps"})

    def __init__(
        self,
        model: DynamicsModel,
        sb_start_duration: int,
        *,
        factor: float = 1.5,
        std: float = 0.3,
    ) -> None:
        super().__init__(in_keys=model.in_keys, out_keys=model.out_keys)
        if sb_start_duration < 0 or factor <= 0 or std <= 0:
            raise ValueError(
                "SymmetryBreakingStart: sb_start_duration must not be negative, factor and std "
                f"must be positive, got {sb_start_duration}, {factor} and {std}."
            )
        self.model = model
        self.sb_start_duration = sb_start_duration
        self.std = std
        self.n_models = model.n_models
        self.n_modes = model.n_modes
        self.n_particles_per_model = model.n_particles_per_model
        self.latent_state_dim = model.latent_state_dim
        self.context_dim = model.context_dim
        self.action_dim = model.action_dim
        self.accepts_indices = model.accepts_indices
        direction = torch.empty(model.latent_state_dim, model.action_dim)
        torch.nn.init.orthogonal_(direction, gain=factor)
        self.register_buffer("direction", direction)
        self.register_buffer("unwhiten", torch.eye(model.latent_state_dim))
        self.register_buffer("_share", torch.zeros(()), persistent=False)
        self.n_total_env_steps = 0

    @property
    def n_total_env_steps(self) -> int:
        """Steps taken in the real env so far, as far as is known."""
        return self._n_total_env_steps

    @n_total_env_steps.setter
    def n_total_env_steps(self, number: int) -> None:
        self._n_total_env_steps = number
        self._is_over = self.learned_share == 1.0
        self._share.fill_(self.learned_share)

    @property
    def learned_share(self) -> float:
        """How much of a prediction is the learned model's, in [0, 1]."""
        if self.n_total_env_steps >= self.sb_start_duration:
            return 1.0
        return max(0.0, 2 * self.n_total_env_steps / self.sb_start_duration - 1)

    @property
    def target_scale(self) -> Tensor:
        """That of the learned model, ``[D]``; 1 if it has none."""
        return getattr(self.model, "target_scale", torch.ones_like(self.unwhiten[0]))

    def advance(self, n_total_env_steps: int, whitening: Tensor | None = None) -> None:
        """Set how far the start is.

        Args:
            n_total_env_steps: steps taken in the real env so far.
            whitening: matrix ``W`` of the delta standardizer, ``[D, D]``; ``None`` leaves it.
        """
        self.model.advance(n_total_env_steps, whitening)
        self.n_total_env_steps = n_total_env_steps
        if whitening is not None and self.learned_share < 1:
            self.unwhiten.copy_(torch.linalg.pinv(whitening.detach()))

    def predict_particles(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        member: Tensor | None = None,
    ) -> ParticlePrediction:
        """Predict one step of every particle; see :class:`DynamicsModel` for the shapes."""
        learned = self.model.predict_particles(latent, context, action, member)
        if self._is_over:
            return learned
        share = self._share.to(learned.mean.dtype)
        features = action_features(
            action, latent.shape[:-3], self.action_dim, indices=self.accepts_indices
        )
        change = features @ (self.unwhiten @ self.direction).mT
        mean = latent.unsqueeze(-2) + change[..., None, None, None, :]
        std = self.std * self.unwhiten.square().sum(-1).sqrt()
        weights = share * learned.log_weights.exp() + (1 - share) / self.n_modes
        term_prob = share * learned.term_logit.sigmoid()
        return ParticlePrediction(
            mean=torch.lerp(mean.expand_as(learned.mean), learned.mean, share),
            std=torch.lerp(std.expand_as(learned.std), learned.std, share),
            log_weights=weights.log(),
            term_logit=torch.logit(term_prob, eps=1e-6),
        )

    def fast_rollout(self, *, compile: bool = False) -> Callable[..., Any] | None:
        """Promise that of the learned model, once the start is over."""
        promise = promised(self.model, "fast_rollout") if self._is_over else None
        return None if promise is None else promise(compile=compile)

    def negative_log_likelihood(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score real transitions by the learned model; see :class:`DynamicsModel`."""
        return self.model.negative_log_likelihood(*args, **kwargs)

    def transition_weights(self, index: Tensor) -> Tensor | None:
        """Return the learned model's, for storage positions ``[...]``."""
        return self.model.transition_weights(index)

    def regularization(self) -> Tensor:
        """Return the learned model's."""
        return self.model.regularization()

    def update_statistics(self, *args: Any, **kwargs: Any) -> None:
        """Pass a batch on to the learned model; see :class:`DynamicsModel`."""
        self.model.update_statistics(*args, **kwargs)

    def get_extra_state(self) -> dict[str, int]:
        """How far the start is."""
        return {"n_total_env_steps": self.n_total_env_steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.n_total_env_steps = state["n_total_env_steps"]
