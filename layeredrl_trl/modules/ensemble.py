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
from layeredrl_trl.checks import check_count
from layeredrl_trl.functional import (
    bootstrap_weights,
    can_read,
    gaussian_mixture_log_prob,
    spread_modes,
)
from layeredrl_trl.modules.dynamics import DynamicsModel, ParticlePrediction
from layeredrl_trl.modules.mlp import EnsembleMLP
from layeredrl_trl.modules.normalization import RunningMoments
from layeredrl_trl.modules.open_loop import MemberRows, OpenLoop
from layeredrl_trl.modules.spaces import action_features, is_continuous, space_dim
from layeredrl_trl.modules.stacking import StackedNetworks

_BOUNDS_PENALTY = 0.01
"""Weight of the distance between learned bounds of the log standard deviation, as in PETS."""

_PREDICTING = (
    *("predict_particles", "target_scale", "_inputs", "_by_member", "_run", "_parse"),
    "_gaussians",
)
"""What a subclass may change of a prediction; the fast paths are for those that do not."""

_TERMINATION_WIDTH = 64
"""Most width of a hidden layer of the default network that predicts termination."""


class ProbabilisticEnsemble(DynamicsModel):
    """``E`` networks, each a mixture of ``M`` diagonal Gaussians over the change of the latent.

    Every member also predicts the probability that the step terminates. Inputs are standardised
    and targets scaled by running moments of the transitions seen in training. Members differ by
    their initialisation and, with ``bootstrap``, by the transitions they learn from.

    Modes that start at one place often stay together: two share an outcome and a third one covers
    two. So the first batch of transitions tells where they start, spread over its targets by
    :func:`~layeredrl_trl.functional.spread_modes`; the networks learn what to add to that.
    Where the outcomes themselves turn with the input by as much as lies between them, that start
    says little, and modes may still stay together.

    Args:
        latent_state_space: ``D``, or a space or spec of that many dims.
        context_space: ``C``, or a space or spec of that many dims; ``None`` for 0.
        action_space: ``A``, or a space or spec of that many dims; discrete ones are one-hot. Of a
            continuous one, and of a bare 1, actions cannot be indices.
        n_models: ``E``, members.
        n_modes: ``M``, mixture modes of a member.
        n_particles_per_model: ``P``, particles per member in an imagined rollout.
        hidden_sizes: width of each hidden layer of the default network.
        activation: class of the nonlinearity of the default network.
        network: makes the network of one member from the sizes of its input and output (the last
            of which is the termination logit), see
            :class:`~layeredrl_trl.modules.stacking.StackedNetworks`; ``None``: a perceptron, and a
            small one of its own for termination.
        std_bounds: ``(low, high)`` of the standard deviation, in units of the running standard
            deviation of the target. The bound is soft: it is between ``low`` and ``low + high``.
            Raise ``low`` (to 0.2, say) where some dims rarely change, and then by much, as contact
            forces do: else their likelihood drowns that of all others.
        learn_std_bounds: learn the bounds of every latent dim, from ``std_bounds`` on;
            :meth:`regularization` draws them together.
        bootstrap: let each member learn from its own half of the stored transitions, see
            :meth:`transition_weights`.
        predict_delta: predict the change of the latent state; else the next latent state itself.
        condition_on_context: let the networks see the context.
        statistics_rate: least weight of a batch in the running moments, see
            :class:`~layeredrl_trl.modules.normalization.RunningMoments`.
        in_keys: of the latent state, the context and the action.
        out_keys: of the next latent state and the termination probability.

    Reads:
        ``latent`` ``[..., D]``, ``context`` ``[..., C]``, ``action`` ``[..., A]``.

    Writes:
        ``("next", "latent")`` ``[..., D]`` and ``("next", "term_prob")`` ``[..., 1]``.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if a space is of an unknown kind, or a count no integer.

    Reference:
        Chua et al. 2018, arXiv:1805.12114. Deviations: mixture modes, a termination head, bounds
        of the standard deviation are given unless asked for, bootstrap by hashed masks.

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
        if not 0 < std_bounds[0] < std_bounds[1]:
            raise ValueError(
                f"ProbabilisticEnsemble: std_bounds must be 0 < low < high, got {std_bounds}."
            )
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
        # Termination has layers of its own: where it is rare, the gradient of its cross-entropy is
        # some thousand times smaller than that of the Gaussians and would never be heard.
        self.termination_net = None
        if network is None:
            self.net = EnsembleMLP(n_models, n_in, n_out - 1, hidden_sizes, activation)
            sizes = [min(size, _TERMINATION_WIDTH) for size in hidden_sizes[:2]]
            self.termination_net = EnsembleMLP(n_models, n_in, 1, sizes, activation)
        else:
            self.net = StackedNetworks(n_models, partial(network, n_in, n_out))
        self.input_moments = RunningMoments(n_in, rate=statistics_rate)
        self.target_moments = RunningMoments(dim, rate=statistics_rate)
        # of the means and the log standard deviations, in units of the target scale
        self.register_buffer("mode_start", torch.zeros(2, n_modes, dim))
        self._modes_have_started = False  # as far as the host knows
        self.register_load_state_dict_post_hook(_look_whether_modes_have_started)
        bounds = torch.tensor(std_bounds).log()
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
        self._check(latent, context, member)
        latent = latent.to(self.target_moments.mean.dtype)
        inputs = self._inputs(latent, context, action)
        return self._parse(self._by_member(inputs, member), latent)

    def propagate(
        self,
        latent: Tensor,
        context: Tensor,
        actions: Tensor,
        member: Tensor | None = None,
        *,
        deterministic: bool = False,
        terminations: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Roll particles out under given actions; see :class:`DynamicsModel` for the shapes."""
        propagate = self._folded() or super().propagate
        return propagate(
            latent,
            context,
            actions,
            member,
            deterministic=deterministic,
            terminations=terminations,
        )

    def propagator(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Give :meth:`propagate` with layers that are folded once."""
        propagates_as_here = type(self).propagate is ProbabilisticEnsemble.propagate
        return (propagates_as_here and self._folded()) or super().propagator()

    def _folded(self) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
        """The fast path with its layers, where it predicts what this model does, unwatched."""
        is_watched = bool(self.net._forward_hooks or self.net._forward_pre_hooks)
        if self.termination_net is None or not self._predicts_as_here or is_watched:
            return None
        return partial(self._propagate, self._open_loop(), self.termination_net)

    def _propagate(
        self,
        open_loop: OpenLoop,
        termination_net: EnsembleMLP,
        latent: Tensor,
        context: Tensor,
        actions: Tensor,
        member: Tensor | None = None,
        *,
        deterministic: bool = False,
        terminations: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(latent, context, member)
        n_envs, _, n_particles, dim = latent.shape
        horizon = actions.shape[1]
        centre, width = open_loop.centre, open_loop.width
        rows = MemberRows(n_envs, n_particles, self.n_models, member)
        start = rows.gather((latent.to(centre.dtype) - centre[:dim]) / width[:dim])
        others = self._features(actions, actions.shape[:2])
        if self.condition_on_context:
            others = torch.cat([context.unsqueeze(1).expand(-1, horizon, -1), others], -1)
        others = ((others - centre[dim:]) / width[dim:]).transpose(0, 1)[:, :, None, None]
        others = rows.gather(others.expand(-1, -1, latent.shape[1], n_particles, -1))
        inputs, after = open_loop.run(start, others, rows, deterministic=deterministic)
        after = torch.addcmul(centre[:dim], width[:dim], after)

        def by_env(x: Tensor) -> Tensor:
            return rows.scatter(x.flatten(2)).unflatten(-1, (horizon, -1)).movedim(-2, 1)

        if not terminations:
            return by_env(after), None
        term_logit = (
            termination_net(inputs, rows.group_member).unflatten(1, (horizon, -1)).transpose(1, 2)
        )
        return by_env(after), by_env(term_logit)

    def _score_members(
        self, latent: Tensor, context: Tensor, action: Tensor, *outcome: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same in units of the networks' outputs, of inputs standardised once for all."""
        if self.termination_net is None or not self._predicts_as_here:
            return super()._score_members(latent, context, action, *outcome)
        next_latent, terminated = outcome
        batch = latent.shape[:-1]
        self._check_dims(latent, context, batch)
        target_moments = self.target_moments
        dtype = target_moments.mean.dtype
        inputs = self._concatenate(latent, context, action).to(dtype)
        inputs = self.input_moments.standardize(inputs).reshape(-1, inputs.shape[-1])
        inputs = inputs.expand(self.n_models, -1, -1)
        scale = self.target_scale
        target = self._target(latent, next_latent).to(dtype)
        target = ((target - target_moments.mean) / scale).reshape(-1, self.latent_state_dim)
        parts = self._gaussians(self.net(inputs))
        nll = scale.log().sum() - gaussian_mixture_log_prob(target, *parts)
        term_logit = self.termination_net(inputs).squeeze(-1)
        happened = terminated.to(dtype).reshape(-1).expand_as(term_logit)
        bce = binary_cross_entropy_with_logits(term_logit, happened, reduction="none")
        nll, bce = nll.mT, bce.mT
        if len(batch) != 1:
            nll, bce = nll.reshape(*batch, -1), bce.reshape(*batch, -1)
        return nll, bce

    @property
    def _predicts_as_here(self) -> bool:
        """Whether no subclass changes what is predicted."""
        return type(self) is ProbabilisticEnsemble or all(
            getattr(type(self), name) is getattr(ProbabilisticEnsemble, name)
            for name in _PREDICTING
        )

    def _by_mode(self, x: Tensor) -> list[Tensor]:
        """Outputs ``[..., 2 M D + M]`` as means, log stds ``[..., M, D]``, logits ``[..., M, 1]``.

        A single mode has no logit.
        """
        gaussians, logits = self._split(x)
        parts = gaussians.unbind(-3)
        return [*parts, logits.unsqueeze(-1)] if self.n_modes > 1 else [*parts]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[..., 2 M D + M]`` as Gaussians ``[..., 2, M, D]`` and logits ``[..., M]``."""
        shape = (2, self.n_modes, self.latent_state_dim)
        return x[..., : math.prod(shape)].unflatten(-1, shape), x[..., math.prod(shape) :]

    def _open_loop(self) -> OpenLoop:
        """Fold standardisation and the scale of targets into the last layer of the network."""
        dim = self.latent_state_dim
        centre, width = self.input_moments.mean, self.input_moments.divisor()
        low, high = self.log_std_bounds.exp()
        shift = self.target_moments.mean
        if not self.predict_delta:
            shift = shift - centre[:dim]
        shift, scale = shift / width[:dim], self.target_scale / width[:dim]
        *hidden, last = self.net.layers
        (mean, log_std, *logit), (bias, log_std_bias, *logit_bias) = map(self._by_mode, last)
        bias = scale * (bias + self.mode_start[0]) + shift
        log_std_bias = log_std_bias + self.mode_start[1] - self.log_std_bounds[1]
        weight = torch.cat([scale * mean, log_std, *logit], -1).flatten(-2)
        bias = torch.cat([bias, log_std_bias, *logit_bias], -1).flatten(-2)
        return OpenLoop(
            [*hidden, (weight, bias)],
            self.net.activation,
            centre,
            width,
            scale * low,
            scale * high,
            n_modes=self.n_modes,
            is_change=self.predict_delta,
        )

    def update_statistics(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        next_latent: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Take a batch of real transitions into the running moments of inputs and targets."""
        if next_latent.shape != latent.shape:
            raise ValueError(
                f"next_latent: expected shape {list(latent.shape)}, got {list(next_latent.shape)}."
            )
        inputs = self._concatenate(latent, context, action)
        target = self._target(latent, next_latent)
        is_first = self.target_moments.count == 0 if self.n_modes > 1 else None
        self.input_moments.update(inputs, mask)
        self.target_moments.update(target, mask)
        if is_first is None or (self._modes_have_started and not can_read(is_first)):
            return
        # The host waits for a GPU until it knows that there has been a batch; a graph cannot.
        if torch.compiler.is_compiling() or is_first:
            self._spread_modes(target, mask, is_first & (self.target_moments.count > 0))
        else:  # only now, as the first batch may have been taken back
            self._modes_have_started = True

    def regularization(self) -> Tensor:
        """Return ``0.01 sum_d (log high_d - log low_d)`` of learned bounds; 0 of given ones.

        Reference:
            Chua et al. 2018, arXiv:1805.12114, appendix A.1, on log standard deviations instead of
            log variances.
        """
        if not self.learn_std_bounds:
            return self.target_moments.count.new_zeros(())  # where the model is
        low, high = self.log_std_bounds
        return _BOUNDS_PENALTY * (high - low).sum()

    def transition_weights(self, index: Tensor) -> Tensor | None:
        """Weigh stored transitions for every member: with ``bootstrap`` by 2 or 0.

        ``None``, all alike, without ``bootstrap`` and in evaluation mode. The running moments are
        those of all transitions, for every member.

        Args:
            index: storage positions, integers ``[...]``, see
                :func:`~layeredrl_trl.functional.bootstrap_weights`.

        Returns:
            ``[..., E]`` or ``None``.
        """
        if not (self.bootstrap and self.training):
            return None
        return bootstrap_weights(index, self.n_models)

    @property
    def target_scale(self) -> Tensor:
        """Running standard deviation of what is predicted, ``[D]``, in units of the latent."""
        return self.target_moments.std(floor=1e-4)

    @torch.no_grad()
    def _spread_modes(self, target: Tensor, mask: Tensor | None, now: Tensor) -> None:
        """Start the modes of every member at clusters of ``target`` ``[..., D]``, where ``now``."""
        target = (target - self.target_moments.mean) / self.target_scale
        target = target.to(self.mode_start.dtype).reshape(-1, self.latent_state_dim)
        mask = None if mask is None else mask.reshape(-1)
        mean, std = spread_modes(target, self.n_modes, mask)
        start = torch.stack([mean, std.log().maximum(self.log_std_bounds[0])])
        self.mode_start.copy_(torch.where(now, start, self.mode_start))

    def _target(self, latent: Tensor, next_latent: Tensor) -> Tensor:
        return next_latent - latent if self.predict_delta else next_latent

    def _concatenate(self, latent: Tensor, context: Tensor, action: Tensor) -> Tensor:
        seen = [latent, context] if self.condition_on_context else [latent]
        return torch.cat([*seen, self._features(action, latent.shape[:-1])], -1)

    def _features(self, action: Tensor, batch: torch.Size) -> Tensor:
        return action_features(action, batch, self.action_dim, indices=self.accepts_indices)

    def _inputs(self, latent: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """Standardised network inputs ``[..., E, P, in]``."""
        batch, per_env = latent.shape[:-3], (*latent.shape[-3:-1], -1)
        action = self._features(action, batch)
        seen = [latent, context] if self.condition_on_context else [latent]
        seen[1:] = [x[..., None, None, :].expand(*batch, *per_env) for x in seen[1:]]
        action = action[..., None, None, :].expand(*batch, *per_env)
        inputs = torch.cat([*seen, action], -1).to(latent.dtype)
        return self.input_moments.standardize(inputs)

    def _run(self, inputs: Tensor, *member: Tensor) -> Tensor:
        """All outputs ``[E, N, out]`` for ``[E, N, in]``; the last is the termination logit.

        With ``member`` ``[G]`` ``[G, N, in]``, row ``g`` through that member.
        """
        out = self.net(inputs, *member)
        if self.termination_net is None:
            return out
        return torch.cat([out, self.termination_net(inputs, *member)], -1)

    def _by_member(self, inputs: Tensor, member: Tensor | None) -> Tensor:
        """Send ``[..., E, P, in]`` through the networks, row ``e`` through member ``e``.

        With ``member`` ``[..., 1]`` ``[..., 1, P, in]`` through the network of each env's.
        """
        flat = inputs.reshape(-1, *inputs.shape[-3:])
        member = None if member is None else member.reshape(-1, 1)
        runs_here = type(self)._run is ProbabilisticEnsemble._run
        rows = MemberRows(len(flat), flat.shape[2], self.n_models, member, in_blocks=runs_here)
        group = () if rows.group_member is None else (rows.group_member,)
        out = rows.scatter(self._run(rows.gather(flat), *group))
        return out.reshape(*inputs.shape[:-1], out.shape[-1])

    def _parse(self, raw: Tensor, latent: Tensor) -> ParticlePrediction:
        parts = (2 * self.n_modes * self.latent_state_dim, self.n_modes, 1)
        if raw.shape[-1] != sum(parts):
            raise ValueError(
                f"network: expected networks of {sum(parts)} outputs, got {raw.shape[-1]}."
            )
        mean, std, log_weights = self._gaussians(raw[..., :-1])
        scale = self.target_scale
        mean = self.target_moments.mean + scale * mean
        if self.predict_delta:
            mean = latent.unsqueeze(-2) + mean
        return ParticlePrediction(mean, scale * std, log_weights, raw[..., -1:])

    def _gaussians(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read a mixture out of what a network returns, in units of the target scale.

        Args:
            raw: all outputs but the termination logit, ``[..., 2 M D + M]``.

        Returns:
            means and standard deviations ``[..., M, D]``, log weights ``[..., M]``.
        """
        gaussians, logits = self._split(raw)
        if self.n_modes > 1:  # one mode starts at 0
            gaussians = gaussians + self.mode_start
        mean, log_std = gaussians.unbind(-3)
        low, high = self.log_std_bounds.exp()
        std = torch.addcmul(low, high, (log_std - self.log_std_bounds[1]).sigmoid())
        if self.n_modes == 1:
            return mean, std, raw.new_zeros(()).expand(mean.shape[:-1])
        return mean, std, torch.log_softmax(logits, -1)

    def _check(self, latent: Tensor, context: Tensor, member: Tensor | None = None) -> None:
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


def _look_whether_modes_have_started(model: ProbabilisticEnsemble, _: Any) -> None:
    count = model.target_moments.count
    model._modes_have_started = not count.is_meta and bool(count > 0)
