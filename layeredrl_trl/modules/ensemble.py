"""The default dynamics model: an ensemble of probabilistic networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from layeredrl_trl import keys
from layeredrl_trl.acceleration import EnsembleRollout, MemberGroups
from layeredrl_trl.checks import check_count, check_finite, check_flag
from layeredrl_trl.functional import (
    FAR,
    bootstrap_weights,
    gaussian_mixture_log_prob,
    spread_modes,
)
from layeredrl_trl.modules.dynamics import DynamicsModel
from layeredrl_trl.modules.loading import LoadsWhole
from layeredrl_trl.modules.mlp import EnsembleMLP
from layeredrl_trl.modules.normalization import RunningMoments
from layeredrl_trl.modules.particles import ParticlePrediction
from layeredrl_trl.modules.spaces import action_features, is_continuous, space_dim
from layeredrl_trl.modules.stacking import StackedNetworks

_BOUNDS_PENALTY = 0.01
"""Penalty on the distance between learned bounds of the log standard deviation, as in PETS."""

_LEAST_SCALE = 1e-6
"""Minimum scale of a change, relative to the standard deviation of the latent state."""

_TERMINATION_WIDTH = 64
"""Maximum width of a hidden layer of the default termination network."""


class ProbabilisticEnsemble(LoadsWhole, DynamicsModel):
    """``E`` networks, each a mixture of ``M`` diagonal Gaussians over the change of the latent.

    Every member also predicts the probability that the step terminates. Inputs are standardised
    and targets scaled by running moments of the transitions seen in training. Members differ by
    their initialisation and, with ``bootstrap``, by the transitions they learn from.

    Modes that start together often stay together: two share an outcome and a third covers two. So
    modes start spread over the targets of the first batch
    (:func:`~layeredrl_trl.functional.spread_modes`), and the networks learn offsets. Where outcomes
    vary with the input as much as from each other, this helps little.

    Args:
        latent_state_space: ``D``, or a space or spec of that many dims.
        context_space: ``C``, or a space or spec of that many dims; ``None`` for 0.
        action_space: ``A``, or a space or spec of that many dims; discrete ones are one-hot. With a
            continuous space or a bare 1, actions cannot be indices.
        n_models: ``E``, members.
        n_modes: ``M``, mixture modes of a member.
        n_particles_per_model: ``P``, particles per member in an imagined rollout.
        hidden_sizes: width of each hidden layer of the default network.
        activation: class of the nonlinearity of the default network.
        network: makes the network of one member from its input and output size (the last output is
            the termination logit), see :class:`~layeredrl_trl.modules.stacking.StackedNetworks`;
            ``None``: a perceptron, and a separate small one for termination.
        std_bounds: ``(low, high)`` of the standard deviation, in units of the running standard
            deviation of the target. The bound is soft: values lie between ``low`` and
            ``low + high``. Raise ``low`` (say to 0.2) if some dims change rarely but by much, like
            contact forces: else they dominate the likelihood.
        learn_std_bounds: learn the bounds of every latent dim, starting at ``std_bounds``;
            :meth:`regularization` pulls them together.
        bootstrap: train each member on its own half of the stored transitions, see
            :meth:`transition_weights`.
        predict_delta: predict the change of the latent state; else the next latent state itself.
        condition_on_context: let the networks see the context.
        statistics_rate: minimum weight of a batch in the running moments, see
            :class:`~layeredrl_trl.modules.normalization.RunningMoments`.
        in_keys: names of latent state, context and action.
        out_keys: names of next latent state and termination probability.

    Reads:
        ``latent`` ``[..., D]``, ``context`` ``[..., C]``, ``action`` ``[..., A]``.

    Writes:
        ``("next", "latent")`` ``[..., D]`` and ``("next", "term_prob")`` ``[..., 1]``.

    Raises:
        ValueError: if a number is out of its range, or not finite.
        TypeError: if a space is of an unknown kind, a count no integer, or a flag neither True nor
            False.

    Reference:
        Chua et al. 2018, arXiv:1805.12114. Deviations: mixture modes; a termination head; fixed
        bounds of the standard deviation by default; bootstrap by hashed masks.

    Example:
        >>> model = ProbabilisticEnsemble(3, 0, 1, n_models=5, n_modes=2)
        >>> latent, context, action = torch.zeros(7, 3), torch.zeros(7, 0), torch.zeros(7, 1)
        >>> mean, weights, std, term_prob = model.predict(latent, context, action)
        >>> mean.shape, weights.shape, term_prob.shape
        (torch.Size([7, 5, 2, 3]), torch.Size([7, 5, 2]), torch.Size([7]))
    """

    def __init__(
        self,
        latent_state_space: Any,
        context_space: Any,
        action_space: Any,
        n_models: int = 1,
        n_modes: int = 1,
        n_particles_per_model: int = 1,
        hidden_sizes: Sequence[int] = (128, 128),
        *,
        activation: type[nn.Module] = nn.SiLU,
        network: Callable[[int, int], nn.Module] | None = None,
        std_bounds: tuple[float, float] = (math.exp(-5.0), 2.0),
        learn_std_bounds: bool = False,
        bootstrap: bool = False,
        predict_delta: bool = True,
        condition_on_context: bool = False,
        statistics_rate: float = 1e-3,
        in_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT, keys.ACTION),
        out_keys: Sequence[NestedKey] = (keys.NEXT_LATENT, keys.NEXT_TERM_PROB),
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        counts = {
            "n_models": n_models,
            "n_modes": n_modes,
            "n_particles_per_model": n_particles_per_model,
        }
        for name, count in counts.items():
            check_count(f"ProbabilisticEnsemble: {name}", count)
        flags = {
            "learn_std_bounds": learn_std_bounds,
            "bootstrap": bootstrap,
            "predict_delta": predict_delta,
            "condition_on_context": condition_on_context,
        }
        for name, flag in flags.items():
            check_flag(f"ProbabilisticEnsemble: {name}", flag)
        _check_std_bounds("ProbabilisticEnsemble: std_bounds", std_bounds)
        self.latent_state_dim = space_dim(latent_state_space, "latent_state_space")
        self.context_dim = space_dim(context_space, "context_space")
        self.action_dim = space_dim(action_space, "action_space")
        self.accepts_indices = not is_continuous(action_space)
        if self.latent_state_dim < 1:
            raise ValueError("ProbabilisticEnsemble: latent_state_space has no dims.")
        self.n_models = n_models
        self.n_modes = n_modes
        self.n_particles_per_model = n_particles_per_model
        self.predict_delta = predict_delta
        self.condition_on_context = condition_on_context
        self.bootstrap = bootstrap
        dim = self.latent_state_dim
        n_in = dim + (self.context_dim if condition_on_context else 0) + self.action_dim
        n_out = n_modes * (2 * dim + 1) + 1
        # Termination has its own layers: where it is rare, the gradient of its cross-entropy is
        # some thousand times smaller than that of the Gaussians and would have no effect.
        self.termination_net = None
        if network is None:
            self.net = EnsembleMLP(n_models, n_in, n_out - 1, hidden_sizes, activation)
            sizes = [min(size, _TERMINATION_WIDTH) for size in hidden_sizes[:2]]
            self.termination_net = EnsembleMLP(n_models, n_in, 1, sizes, activation)
        else:
            self.net = StackedNetworks(n_models, partial(network, n_in, n_out))
        self.input_moments = RunningMoments(n_in, rate=statistics_rate)
        self.target_moments = RunningMoments(dim, rate=statistics_rate)
        # initial means and log standard deviations of the modes, in units of the target scale
        mode_start = torch.zeros(2, n_modes, dim, dtype=torch.float32)
        self.register_buffer("mode_start", mode_start)
        self._modes_have_started = False  # the host's copy, so as not to read the device
        self.register_load_state_dict_post_hook(_sync_modes_have_started)
        bounds = torch.tensor(std_bounds, dtype=torch.float32).log()
        self.learn_std_bounds = learn_std_bounds
        if learn_std_bounds:
            self.log_std_bounds = nn.Parameter(bounds[:, None].repeat(1, dim))
        else:
            self.register_buffer("log_std_bounds", bounds, persistent=False)

    def predict_particles(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        member: Tensor | None = None,
    ) -> ParticlePrediction:
        """Predict one step of every particle; see :class:`DynamicsModel` for the shapes."""
        self.check_particles(latent, context, member)
        latent, batch = latent.to(self.target_moments.mean.dtype), latent.shape[:-3]
        known = self.known_inputs(context, action, batch)[..., None, None, :]
        inputs = torch.cat([latent, known.expand(*latent.shape[:-1], -1).to(latent.dtype)], -1)
        inputs = self.input_moments.standardize(inputs)
        return self._to_latent_units(*self._by_member(inputs, member), latent)

    def score_members(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        next_latent: Tensor,
        terminated: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Score transitions ``[...]`` by every member.

        Returns the negative log-likelihood of the next latent state and the cross-entropy of the
        termination in nats, ``[..., E]``. Faster than the base class: inputs are standardised once,
        and targets are scaled instead of outputs.
        """
        batch = latent.shape[:-1]
        self._check_dims(latent, context, batch)
        moments, scale = self.target_moments, self.target_scale
        inputs = self._concatenate(latent, context, action).to(moments.mean.dtype)
        inputs = self.input_moments.standardize(inputs).reshape(-1, inputs.shape[-1])
        raw, term_logit = self._run(inputs.expand(self.n_models, -1, -1))
        target = (self._target(latent, next_latent) - moments.mean) / scale
        target = target.reshape(-1, self.latent_state_dim)
        nll = scale.log().sum() - gaussian_mixture_log_prob(target, *self._gaussians(raw))
        happened = terminated.reshape(-1, 1).to(term_logit.dtype).expand_as(term_logit)
        bce = binary_cross_entropy_with_logits(term_logit, happened, reduction="none").squeeze(-1)
        nll, bce = (x.mT.reshape(*batch, self.n_models) for x in (nll, bce))
        return nll, bce

    def fast_rollout(self, *, compile: bool = False) -> EnsembleRollout | None:
        """Return a rollout that is faster than step by step, or ``None`` with a custom network.

        It does not call forward hooks of the networks. Subclasses do not inherit it.
        """
        return None if self.termination_net is None else EnsembleRollout(self, compile=compile)

    def update_statistics(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        next_latent: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Update the running moments of inputs and targets with real transitions."""
        if next_latent.shape != latent.shape:
            raise ValueError(
                f"next_latent: expected shape {list(latent.shape)}, got {list(next_latent.shape)}."
            )
        inputs = self._concatenate(latent, context, action)
        target = self._target(latent, next_latent)
        if self.n_modes > 1 and not self._modes_have_started:
            self._modes_have_started = bool(self.target_moments.count > 0)
        self.input_moments.update(inputs, mask)
        self.target_moments.update(target, mask)
        # repeat until a batch has been kept, because the first one may have been undone
        if self.n_modes > 1 and not self._modes_have_started:
            self._spread_modes(target, mask)

    def regularization(self) -> Tensor:
        """Return ``0.01 sum_d (log high_d - log low_d)`` for learned bounds, 0 for fixed ones.

        Reference:
            Chua et al. 2018, arXiv:1805.12114, appendix A.1. Deviation: log standard deviations
            instead of log variances.
        """
        if not self.learn_std_bounds:
            return self.target_moments.count.new_zeros(())  # on the model's device
        low, high = self.log_std_bounds
        return _BOUNDS_PENALTY * (high - low).sum()

    def transition_weights(self, index: Tensor) -> Tensor | None:
        """Weigh storage positions ``[...]`` for every member by 0 or 2, ``[..., E]``.

        ``None``, which weighs all alike, without ``bootstrap`` and in evaluation mode. The running
        moments use all transitions. See :func:`~layeredrl_trl.functional.bootstrap_weights`.
        """
        if not (self.bootstrap and self.training):
            return None
        return bootstrap_weights(index, self.n_models)

    @property
    def target_scale(self) -> Tensor:
        """Running standard deviation of the networks' targets, ``[D]``, in latent units.

        It is at least a millionth of that of the latent state, or of its size where that never
        changes, so that every dim has a scale.
        """
        size = self.input_moments.mean.abs()
        size = torch.where(size > 0, size.clamp_max(1.0), 1.0)
        latent_std = self.input_moments.spread(unchanged=size)[: self.latent_state_dim]
        return self.target_moments.std(floor=_LEAST_SCALE * latent_std)

    @torch.no_grad()
    def _spread_modes(self, target: Tensor, mask: Tensor | None) -> None:
        """Start the modes of every member at clusters of ``target`` ``[..., D]``."""
        target = (target - self.target_moments.mean) / self.target_scale
        target = target.to(self.mode_start.dtype).reshape(-1, self.latent_state_dim)
        counts = (target.abs() < FAR).all(-1)  # a mode at a fault would be lost
        counts = counts if mask is None else counts & mask.reshape(-1)
        mean, std = spread_modes(target, self.n_modes, counts)
        start = torch.stack([mean, std.log().maximum(self.log_std_bounds[0])])
        # an unusable batch starts nothing
        is_usable = self.target_moments.count > 0
        self.mode_start.copy_(torch.where(is_usable, start, self.mode_start))

    def _target(self, latent: Tensor, next_latent: Tensor) -> Tensor:
        dtype = self.target_moments.mean.dtype  # a difference of half precision would be rounded
        latent, next_latent = latent.to(dtype), next_latent.to(dtype)
        return next_latent - latent if self.predict_delta else next_latent

    def _concatenate(self, latent: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """Network inputs ``[..., in]`` for latent states ``[..., D]``, not standardised."""
        return torch.cat([latent, self.known_inputs(context, action, latent.shape[:-1])], -1)

    def known_inputs(self, context: Tensor, action: Tensor, batch: torch.Size) -> Tensor:
        """Return the networks' inputs besides the latent state, ``[*batch, K]``, unscaled."""
        features = action_features(action, batch, self.action_dim, indices=self.accepts_indices)
        return torch.cat([context, features], -1) if self.condition_on_context else features

    def _run(self, inputs: Tensor, member: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``[G, N, in]`` to outputs ``[G, N, 2 M D + M]`` and termination logits ``[G, N, 1]``.

        Row ``g`` goes through member ``member[g]``, or without ``member`` through member ``g``.
        """
        out = self.net(inputs, member)
        if self.termination_net is not None:
            return out, self.termination_net(inputs, member)
        n_out = self.n_modes * (2 * self.latent_state_dim + 1)
        if out.shape[-1] != n_out + 1:
            raise ValueError(
                f"network: expected networks of {n_out + 1} outputs, got {out.shape[-1]}."
            )
        return out[..., :-1], out[..., -1:]

    def _by_member(self, inputs: Tensor, member: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the networks on ``[..., E, P, in]``, or with ``member`` on ``[..., 1, P, in]``."""
        flat = inputs.reshape(-1, *inputs.shape[-3:])
        member = None if member is None else member.reshape(-1, 1)
        groups = MemberGroups(flat.shape[0], flat.shape[2], self.n_models, member)
        outputs = self._run(groups.gather(flat), groups.group_member)
        raw, term_logit = (
            x.reshape(*inputs.shape[:-1], x.shape[-1]) for x in map(groups.scatter, outputs)
        )
        return raw, term_logit

    def _to_latent_units(
        self, raw: Tensor, term_logit: Tensor, latent: Tensor
    ) -> ParticlePrediction:
        """Convert the networks' outputs to mixtures in units of the latent state."""
        mean, std, log_weights = self._gaussians(raw)
        scale = self.target_scale
        mean = self.target_moments.mean + scale * mean
        if self.predict_delta:
            mean = latent.unsqueeze(-2) + mean
        return ParticlePrediction(mean, scale * std, log_weights, term_logit)

    def _gaussians(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convert outputs ``[..., 2 M D + M]`` to means, stds and log weights, in target units."""
        gaussians, logits = self.split_output(raw)
        if self.n_modes > 1:  # one mode starts at 0
            gaussians = gaussians + self.mode_start
        mean, log_std = gaussians.unbind(-3)
        low, high = self.log_std_bounds.exp()
        std = torch.addcmul(low, high, (log_std - self.log_std_bounds[1]).sigmoid())
        if self.n_modes == 1:
            return mean, std, raw.new_zeros(()).expand(mean.shape[:-1])
        return mean, std, torch.log_softmax(logits, -1)

    def split_output(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split outputs into means and log stds ``[..., 2, M, D]``, mode logits ``[..., M]``."""
        shape = (2, self.n_modes, self.latent_state_dim)
        return x[..., : math.prod(shape)].unflatten(-1, shape), x[..., math.prod(shape) :]

    def check_particles(
        self, latent: Tensor, context: Tensor, member: Tensor | None = None
    ) -> None:
        """Raise a ValueError if a shape for :meth:`predict_particles` does not fit."""
        n_rows = self.n_models if member is None else 1
        if latent.ndim < 3 or latent.shape[-3] != n_rows:
            raise ValueError(
                f"latent: expected [..., {n_rows}, P, {self.latent_state_dim}] (a row of particles "
                f"for each member), got {list(latent.shape)}."
            )
        self._check_dims(latent, context, latent.shape[:-3])
        if member is not None and member.shape != (*latent.shape[:-3], 1):
            raise ValueError(
                f"member: expected shape {[*latent.shape[:-3], 1]}, got {list(member.shape)}."
            )

    def _check_dims(self, latent: Tensor, context: Tensor, batch: torch.Size) -> None:
        if latent.shape[-1:] != (self.latent_state_dim,):
            raise ValueError(
                f"latent: expected {self.latent_state_dim} latent dims, got shape "
                f"{list(latent.shape)}."
            )
        if context.shape != (*batch, self.context_dim):
            raise ValueError(
                f"context: expected shape {[*batch, self.context_dim]}, got {list(context.shape)}."
            )


def _check_std_bounds(name: str, bounds: Any) -> None:
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError(f"{name} must be a pair (low, high), got {bounds!r}.")
    for number in bounds:
        check_finite(name, number)
    if not 0 < bounds[0] < bounds[1]:
        raise ValueError(f"{name} must be 0 < low < high, got {bounds}.")


def _sync_modes_have_started(model: ProbabilisticEnsemble, _: Any) -> None:
    count = model.target_moments.count
    model._modes_have_started = not count.is_meta and bool(count > 0)
