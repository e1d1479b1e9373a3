"""A fixed random model in which actions matter, gradually replaced by the learned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from layeredrl_trl.acceleration import promised
from layeredrl_trl.checks import check_count, check_finite
from layeredrl_trl.modules.dynamics import DynamicsModel
from layeredrl_trl.modules.loading import LoadsWhole
from layeredrl_trl.modules.particles import ParticlePrediction
from layeredrl_trl.modules.spaces import action_features


class SymmetryBreakingStart(LoadsWhole, DynamicsModel):
    """Predict by a fixed random linear map of the action, until the model has learned something.

    An untrained model predicts the same for every action, so a skill learner that is rewarded for
    predictable effects gets no signal. While ``n_total_env_steps < sb_start_duration``, predictions
    are ``latent + W^{-1} factor R action``, without termination and with even modes. ``R`` is
    random, fixed, with orthonormal columns (rows, if there are more actions than latent dims);
    ``W`` is the matrix of the predictor's delta standardizer. From half of the duration on,
    predictions are blended linearly into those of ``model``.

    The loss is always that of ``model``, so it learns from the first step. A buffer holds the
    progress, so that recorded CUDA graphs see it.

    Args:
        model: the learned model.
        sb_start_duration: number of env steps; 0 for no start. A later change takes effect at the
            next :meth:`advance`.
        factor: length of the whitened change for an action of length 1.
        std: standard deviation of the whitened change.

    Reads:
        The entries that ``model`` reads.

    Writes:
        The entries that ``model`` writes.

    Raises:
        TypeError: if ``model`` is no :class:`DynamicsModel`, ``sb_start_duration`` no integer, or
            ``factor`` or ``std`` no number.
        ValueError: if ``sb_start_duration`` is negative, or ``factor`` or ``std`` not positive or
            not finite.

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
        if not isinstance(model, DynamicsModel):
            raise TypeError(
                f"SymmetryBreakingStart: model must be a DynamicsModel, got {type(model).__name__}."
            )
        super().__init__(in_keys=model.in_keys, out_keys=model.out_keys)
        check_count("SymmetryBreakingStart: sb_start_duration", sb_start_duration, least=0)
        check_finite("SymmetryBreakingStart: factor", factor, above=0)
        check_finite("SymmetryBreakingStart: std", std, above=0)
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
        direction = torch.empty(model.latent_state_dim, model.action_dim, dtype=torch.float32)
        torch.nn.init.orthogonal_(direction, gain=factor)
        self.register_buffer("direction", direction)
        eye = torch.eye(model.latent_state_dim, dtype=torch.float32)
        self.register_buffer("unwhiten", eye)
        self.register_buffer("_share", torch.zeros((), dtype=torch.float32), persistent=False)
        self.n_total_env_steps = 0

    @property
    def n_total_env_steps(self) -> int:
        """Last known number of steps taken in the real env."""
        return self._n_total_env_steps

    @n_total_env_steps.setter
    def n_total_env_steps(self, number: int) -> None:
        self._n_total_env_steps = number
        self._is_over = self.learned_share == 1.0
        self._share.fill_(self.learned_share)

    @property
    def learned_share(self) -> float:
        """Weight of the learned model in a prediction, in [0, 1]."""
        if self.n_total_env_steps >= self.sb_start_duration:
            return 1.0
        return max(0.0, 2 * self.n_total_env_steps / self.sb_start_duration - 1)

    @property
    def target_scale(self) -> Tensor:
        """Target scale of the learned model, ``[D]``; 1 if it has none."""
        return getattr(self.model, "target_scale", torch.ones_like(self.unwhiten[0]))

    def advance(self, n_total_env_steps: int, whitening: Tensor | None = None) -> None:
        """Set the progress of the start.

        Args:
            n_total_env_steps: steps taken in the real env so far.
            whitening: matrix ``W`` of the delta standardizer, ``[D, D]``; ``None`` leaves it.
        """
        self.model.advance(n_total_env_steps, whitening)
        self.n_total_env_steps = n_total_env_steps
        if whitening is not None and self.learned_share < 1:
            self.unwhiten.copy_(_inverse(whitening.detach()))

    def predict_particles(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        member: Tensor | None = None,
    ) -> ParticlePrediction:
        """Predict one step of every particle; see :class:`DynamicsModel` for the shapes."""
        learned = self.model.particles(latent, context, action, member)
        if self._is_over:
            return learned
        like = learned.mean
        share, unwhiten, latent = self._share.to(like), self.unwhiten.to(like), latent.to(like)
        features = action_features(
            action, latent.shape[:-3], self.action_dim, indices=self.accepts_indices
        )
        change = features.to(like) @ (unwhiten @ self.direction.to(like)).mT
        mean = latent.unsqueeze(-2) + change[..., None, None, None, :]
        std = self.std * unwhiten.square().sum(-1).sqrt()
        weights = share * learned.log_weights.exp() + (1 - share) / self.n_modes
        term_prob = share * learned.term_logit.sigmoid()
        return ParticlePrediction(
            mean=torch.lerp(mean.expand_as(learned.mean), learned.mean, share),
            std=torch.lerp(std.expand_as(learned.std), learned.std, share),
            log_weights=weights.log(),
            term_logit=torch.logit(term_prob, eps=1e-6),
        )

    def fast_rollout(self, *, compile: bool = False) -> Callable[..., Any] | None:
        """Return the fast rollout of the learned model, if any, once the start is over."""
        promise = promised(self.model, "fast_rollout") if self._is_over else None
        return None if promise is None else promise(compile=compile)

    def negative_log_likelihood(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score real transitions by the learned model; see :class:`DynamicsModel`."""
        return self.model.negative_log_likelihood(*args, **kwargs)

    def transition_weights(self, index: Tensor) -> Tensor | None:
        """Return the weights of the learned model for storage positions ``[...]``."""
        return self.model.transition_weights(index)

    def regularization(self) -> Tensor:
        """Return the regularization of the learned model."""
        return self.model.regularization()

    def update_statistics(self, *args: Any, **kwargs: Any) -> None:
        """Update the statistics of the learned model; see :class:`DynamicsModel`."""
        self.model.update_statistics(*args, **kwargs)

    def get_extra_state(self) -> dict[str, int]:
        """Return the progress of the start."""
        return {"n_total_env_steps": self.n_total_env_steps}

    def check_extra_state(self, state: Any) -> None:
        """Check that :meth:`set_extra_state` can restore a state.

        Raises:
            TypeError, ValueError: if it does not hold a number of steps.
        """
        if not isinstance(state, Mapping) or "n_total_env_steps" not in state:
            raise ValueError(
                f"state_dict: expected n_total_env_steps of a SymmetryBreakingStart, got {state!r}."
            )
        check_count("state_dict: n_total_env_steps", state["n_total_env_steps"], least=0)

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the progress from :meth:`get_extra_state`."""
        self.check_extra_state(state)
        self.n_total_env_steps = state["n_total_env_steps"]


def _inverse(whitening: Tensor) -> Tensor:
    """Compute the pseudo-inverse of a matrix ``[D, D]`` of dims that may be of different units.

    The pseudo-inverse drops directions whose singular value is small next to the largest one. So
    rows and columns are brought to similar lengths before, in float64: a dim does not count for
    less because of its unit.
    """
    whitening = whitening.double()
    rows, columns = (torch.linalg.vector_norm(whitening, dim=dim).sqrt() for dim in (1, 0))
    rows, columns = (torch.where(x > 0, x, 1.0) for x in (rows, columns))
    inverse = torch.linalg.pinv(whitening / torch.outer(rows, columns))
    return inverse / torch.outer(columns, rows)
