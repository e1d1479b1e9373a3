"""The interface of a dynamics model: a mixture per member, and the termination probability."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.envs.utils import ExplorationType, exploration_type

from layeredrl_trl import keys
from layeredrl_trl.acceleration import promised
from layeredrl_trl.checks import check_keys
from layeredrl_trl.functional import (
    fold_index,
    gaussian_mixture_log_prob,
    gaussian_mixture_mean,
    sample_gaussian_mixture,
    zero_where_not,
)
from layeredrl_trl.modules.member_scores import score_members
from layeredrl_trl.modules.outputs import (
    as_float32,
    check_output,
    check_prediction,
    in_dtype_of,
)
from layeredrl_trl.modules.particles import ParticlePrediction
from layeredrl_trl.modules.spaces import are_indices
from layeredrl_trl.modules.transition_weights import check_weight, multiply_weights


class DynamicsModel(TensorDictModuleBase, abc.ABC):
    """Base class: predict the next latent state and whether the episode terminates.

    A model has ``E`` members (:attr:`n_models`), each a mixture of ``M`` (:attr:`n_modes`)
    diagonal Gaussians over the next latent state and a termination probability. The model's density
    is the even mixture of its members.

    A subclass sets the attributes below and brings :meth:`predict_particles`. It may bring
    :meth:`update_statistics`, :meth:`regularization`, :meth:`transition_weights` and
    :meth:`advance`, which learning calls. All else follows from these. What they return is checked.

    A class may also define faster methods (:func:`~layeredrl_trl.acceleration.promised`):
    ``fast_rollout(compile=)`` returns a function that rolls out particles under given actions (one
    that takes no ``draw`` is not used where envs share random numbers), and ``score_members``
    scores transitions by every member; see :class:`~layeredrl_trl.modules.ProbabilisticEnsemble`.

    As a ``TensorDictModule`` it predicts one step for a plain latent state: the mean of the even
    mixture, or under ``set_exploration_type(ExplorationType.RANDOM)`` a draw from it.

    Attributes:
        n_models, n_modes: ``E`` and ``M``.
        n_particles_per_model: ``P``, particles per member in an imagined rollout.
        latent_state_dim, context_dim: ``D`` and ``C``.
        action_dim: ``A``; of discrete actions, which are one-hot or indices, their number.
        accepts_indices: whether actions may be indices ``[...]``.

    Reads:
        ``latent`` ``[..., D]``, ``context`` ``[..., C]``, ``action`` ``[..., A]``.

    Writes:
        ``("next", "latent")`` ``[..., D]`` and ``("next", "term_prob")`` ``[..., 1]``.

    Raises:
        TypeError: if ``in_keys`` or ``out_keys`` are not sequences of keys.
        ValueError: if there are not three ``in_keys`` and two ``out_keys``.

    Example:
        >>> from torch import nn
        >>> class Linear(DynamicsModel):  # one member, one Gaussian
        ...     n_models = n_modes = n_particles_per_model = 1
        ...     context_dim, accepts_indices = 0, False
        ...
        ...     def __init__(self, latent_state_dim, action_dim):
        ...         super().__init__()
        ...         self.latent_state_dim, self.action_dim = latent_state_dim, action_dim
        ...         self.net = nn.Linear(latent_state_dim + action_dim, 2 * latent_state_dim + 1)
        ...
        ...     def predict_particles(self, latent, context, action, member=None):
        ...         action = action[..., None, None, :].expand(*latent.shape[:-1], -1)
        ...         out = self.net(torch.cat([latent, action], -1))
        ...         change, log_std, term_logit = out.split([*latent.shape[-1:] * 2, 1], -1)
        ...         mean, std = (x.unsqueeze(-2) for x in (latent + change, log_std.exp()))
        ...         return ParticlePrediction(mean, std, torch.zeros_like(mean[..., 0]), term_logit)
        >>> inputs = torch.zeros(7, 3), torch.zeros(7, 0), torch.zeros(7, 1)
        >>> mean, weights, std, term_prob = Linear(3, 1).predict(*inputs)
        >>> mean.shape, term_prob.shape
        (torch.Size([7, 1, 1, 3]), torch.Size([7]))
    """

    n_models: int
    n_modes: int
    n_particles_per_model: int
    latent_state_dim: int
    context_dim: int
    action_dim: int
    accepts_indices: bool = True

    def __init__(
        self,
        *,
        in_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT, keys.ACTION),
        out_keys: Sequence[NestedKey] = (keys.NEXT_LATENT, keys.NEXT_TERM_PROB),
    ) -> None:
        super().__init__()
        check_keys(f"{type(self).__name__}: in_keys", in_keys, 3)
        check_keys(f"{type(self).__name__}: out_keys", out_keys, 2)
        self.in_keys = list(in_keys)
        self.out_keys = list(out_keys)

    @abc.abstractmethod
    def predict_particles(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        member: Tensor | None = None,
    ) -> ParticlePrediction:
        """Predict one step of every particle with its member; to be overridden.

        Args:
            latent: ``[..., E, P, D]``, row ``e`` for member ``e``; with ``member``
                ``[..., 1, P, D]``.
            context: ``[..., C]``.
            action: ``[..., A]``, or indices ``[...]`` of discrete actions;
                :func:`~layeredrl_trl.modules.action_features` makes ``[..., A]`` of either.
            member: long ``[..., 1]``, the member of all particles of an env, where envs carry fewer
                particles than there are members; else ``None``. All 0 with one member.

        Returns:
            means and standard deviations ``[..., E, P, M, D]``, log weights ``[..., E, P, M]``,
            logits of the termination ``[..., E, P, 1]``.
        """

    def particles(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        member: Tensor | None = None,
    ) -> ParticlePrediction:
        """Call :meth:`predict_particles`, check the shapes of what it returns, cast to float32.

        It gets tensors of the dtype of the model's parameters.

        Everything that imagines or scores goes through here, because tensors of another shape
        would be broadcast, to a wrong number and without an error.

        Raises:
            TypeError: if it does not return a :class:`ParticlePrediction` of tensors.
            ValueError: if the shape of one of them does not fit.
        """
        out = self.predict_particles(*in_dtype_of(self, latent, context, action), member)
        sizes = latent.shape[:-1], self.n_modes, self.latent_state_dim
        check_prediction(type(self).__name__, out, *sizes)
        return ParticlePrediction(*map(as_float32, out))

    def predict(
        self, latent: Tensor, context: Tensor, action: Tensor, std: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict one step with every member.

        Args:
            latent: ``[..., D]``.
            context: ``[..., C]``.
            action: ``[..., A]``, or indices ``[...]`` of discrete actions.
            std: replaces the learned standard deviation; broadcast to ``[..., E, M, D]``.

        Returns:
            ``mean`` of the next latent state ``[..., E, M, D]``, ``weights`` ``[..., E, M]``
            (summing to 1 over ``M``), ``std`` ``[..., E, M, D]``, and ``term_prob`` ``[...]``,
            the mean over members.

        Raises:
            ValueError: if a last dim or a leading shape does not fit.
        """
        prediction = self._predict_members(latent, context, action, std)
        term_prob = prediction.term_logit.sigmoid().mean(-2).squeeze(-1)
        return prediction.mean, prediction.log_weights.exp(), prediction.std, term_prob

    def negative_log_likelihood(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        next_latent: Tensor,
        terminated: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score real transitions by every member, and average over members.

        With weights this is ``mean_e weight_e nll_e``. To normalise, sum the results over
        transitions and divide by the sum of the weights' means over members.

        Args:
            latent: ``[..., D]``.
            context: ``[..., C]``.
            action: ``[..., A]``.
            next_latent: ``[..., D]``.
            terminated: bool ``[..., 1]``.
            weight: at least 0, of each transition ``[..., 1]`` or for each member ``[..., E]``.

        Returns:
            Negative log-likelihood of the next latent state in nats ``[..., 1]``, and binary
            cross-entropy of the termination in nats ``[..., 1]``.

        Raises:
            ValueError: if a shape does not fit.
        """
        _check_shape("next_latent", next_latent, latent.shape)
        _check_shape("terminated", terminated, (*latent.shape[:-1], 1))
        if weight is not None:
            check_weight(weight, latent.shape[:-1], self.n_models)
        score = promised(self, "score_members") or self._score_members
        nll, bce = score(latent, context, action, next_latent, terminated)
        for x in (nll, bce):
            expected = (*latent.shape[:-1], self.n_models)
            check_output(f"{type(self).__name__}.score_members", x, expected)
        if weight is not None:
            nll, bce = weight * nll, weight * bce
        if nll.shape[-1] == 1:  # one member needs no mean
            return nll, bce
        return nll.mean(-1, keepdim=True), bce.mean(-1, keepdim=True)

    def transition_weights(self, index: Tensor) -> Tensor | None:
        """Weigh stored transitions for every member; by default ``None``, which weighs all alike.

        Args:
            index: storage positions, integers ``[...]``; for a storage of several dims from
                :func:`~layeredrl_trl.functional.fold_index`.

        Returns:
            ``[..., E]``, or ``[..., 1]`` for all members, at least 0: a ``weight`` for
            :meth:`negative_log_likelihood`; or ``None``.
        """
        return None

    def regularization(self) -> Tensor:
        """Return a scalar that is added to the loss once per batch; 0 by default."""
        return torch.zeros((), dtype=torch.float32)

    def advance(self, n_total_env_steps: int, whitening: Tensor | None = None) -> None:
        """Receive the progress of training; does nothing by default.

        Args:
            n_total_env_steps: steps taken in the real env so far.
            whitening: matrix of the predictor's delta standardizer, ``[D, D]``.
        """

    def penalty(self) -> Tensor:
        """Call :meth:`regularization` and check that it is a scalar.

        Raises:
            ValueError: if it is not.
        """
        out = self.regularization()
        check_output(f"{type(self).__name__}.regularization", out, ())
        return out

    def update_statistics(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        next_latent: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Update running statistics with real transitions; by default there are none.

        The loss calls it once per step in training mode, before :meth:`negative_log_likelihood`. It
        may only change buffers, in place. Decorate it with ``torch.no_grad``, and do not branch on
        values of tensors, so that it can be compiled.

        Args:
            latent: ``[..., D]``.
            context: ``[..., C]``.
            action: ``[..., A]``.
            next_latent: ``[..., D]``.
            mask: bool ``[...]``, False on entries to ignore.
        """

    def log_prob(
        self,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        next_latent: Tensor,
        std: Tensor | None = None,
        transform: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the log density of the even mixture of the members at ``next_latent``.

        A ``transform`` ``W`` gives the density of ``W (next_latent - latent)`` under the mixture
        with means ``W (mean - latent)`` and the given ``std``.

        Args:
            latent: ``[..., D]``.
            context: ``[..., C]``.
            action: ``[..., A]``.
            next_latent: ``[..., D]``.
            std: replaces the learned standard deviation; broadcast to ``[..., E, M, D]``. Required
                with ``transform``.
            transform: matrix ``[D, D]``.

        Returns:
            ``log_prob`` ``[...]`` in nats and ``term_prob`` ``[...]``.

        Raises:
            ValueError: if a shape does not fit, or ``transform`` comes without ``std``: a
                transformed diagonal Gaussian is not diagonal.
        """
        if transform is not None and std is None:
            raise ValueError("log_prob: transform needs a fixed std in the transformed space.")
        _check_shape("next_latent", next_latent, latent.shape)
        if transform is not None:
            _check_shape("transform", transform, (latent.shape[-1], latent.shape[-1]))
        mean, std, log_weights, term_prob = self._even_mixture(latent, context, action, std)
        if transform is not None:
            transform = transform.to(mean.dtype)
            mean = (mean - latent.to(mean.dtype).unsqueeze(-2)) @ transform.mT
            next_latent = (next_latent.to(mean.dtype) - latent.to(mean.dtype)) @ transform.mT
        log_prob = gaussian_mixture_log_prob(next_latent.to(mean.dtype), mean, std, log_weights)
        return log_prob, term_prob.squeeze(-1)

    def loss(self, batch: TensorDictBase) -> Tensor:
        """Return the mean of negative log-likelihood and termination cross-entropy on ``batch``.

        With weights it is ``sum_i w_i l_i / sum_i w_i`` over transitions and members, 0 if all
        weights are 0. :meth:`regularization` is added. Transitions of weight 0 may hold anything.

        Args:
            batch: ``latent`` ``[..., D]``, ``context`` ``[..., C]``, ``action`` ``[..., A]``,
                ``("next", "latent")`` ``[..., D]``, ``("next", "terminated")`` ``[..., 1]``,
                and optionally ``("collector", "mask")`` ``[..., 1]``, False on padding,
                ``weight`` ``[..., 1]`` or ``[..., E]``, at least 0, and ``index`` ``[...]`` or
                ``[..., ndim]``, storage positions for :meth:`transition_weights`.

        Returns:
            Scalar, in nats.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a shape does not fit.
        """
        entries = [batch[name] for name in (*self.in_keys, self.out_keys[0], keys.NEXT_TERMINATED)]
        mask, weight, index = (
            batch.get(key, default=None) for key in (keys.MASK, keys.WEIGHT, keys.INDEX)
        )
        weight = self.joint_weight(batch.shape, mask=mask, weight=weight, index=index)
        if weight is None:
            nll, bce = self.negative_log_likelihood(*entries)
            return (nll + bce).mean() + self.penalty()
        # before the networks, else garbage on padding reaches the gradient (0 * NaN)
        counts = (weight > 0).any(-1)
        entries = [zero_where_not(counts, x) for x in entries]
        nll, bce = self.negative_log_likelihood(*entries, weight)
        total = weight.mean(-1).sum()
        return (nll + bce).sum() / torch.where(total > 0, total, 1.0) + self.penalty()

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the predicted next latent state and termination probability."""
        latent, context, action = (tensordict[key] for key in self.in_keys)
        mean, std, log_weights, term_prob = self._even_mixture(latent, context, action)
        if exploration_type() is ExplorationType.RANDOM:
            next_latent = sample_gaussian_mixture(mean, std, log_weights)
        else:
            next_latent = gaussian_mixture_mean(mean, log_weights.exp())
        tensordict.set(self.out_keys[0], next_latent)
        tensordict.set(self.out_keys[1], term_prob)
        return tensordict

    def joint_weight(
        self,
        batch: Sequence[int],
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor | None:
        """Multiply all weights of the transitions of a batch.

        Args:
            batch: shape ``[...]`` of the batch.
            mask: False on padding, bool ``[..., 1]`` or ``[...]``.
            weight: at least 0, ``[..., 1]`` or ``[..., E]``.
            index: storage positions ``[...]`` or ``[..., ndim]``, for :meth:`transition_weights`.

        Returns:
            ``[..., 1]`` or ``[..., E]``, a ``weight`` for :meth:`negative_log_likelihood`; ``None``
            if all transitions weigh alike.

        Raises:
            ValueError: if a shape does not fit.
        """
        factors = []
        if weight is not None:
            check_weight(weight, batch, self.n_models)
            factors.append(weight.to(torch.float32))
        if index is not None:
            index = index if index.shape == batch else fold_index(index)
            _check_shape("index", index, batch)
            own = self.transition_weights(index)
            if own is not None:
                is_one = isinstance(own, Tensor) and own.shape[-1:] == (1,)
                size = 1 if is_one else self.n_models
                check_output(f"{type(self).__name__}.transition_weights", own, (*batch, size))
                factors.append(own.to(torch.float32))
        return multiply_weights(factors, batch, mask)

    def _score_members(
        self, latent: Tensor, context: Tensor, action: Tensor, *outcome: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do what a class that defines ``score_members`` does faster."""
        return score_members(self._predict_members(latent, context, action), *outcome)

    def _even_mixture(
        self, latent: Tensor, context: Tensor, action: Tensor, std: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, std ``[..., E M, D]``, log weights ``[..., E M]``, ``term_prob`` ``[..., 1]``."""
        prediction = self._predict_members(latent, context, action, std)
        log_weights = (prediction.log_weights - math.log(self.n_models)).flatten(-2)
        mean, std = (x.flatten(-3, -2) for x in (prediction.mean, prediction.std))
        return mean, std, log_weights, prediction.term_logit.sigmoid().mean(-2)

    def _predict_members(
        self, latent: Tensor, context: Tensor, action: Tensor, std: Tensor | None = None
    ) -> ParticlePrediction:
        """Let every member predict for the same latent states, ``[..., E, M, D]``."""
        batch = latent.shape[:-1]
        _check_shape("latent", latent, (*batch, self.latent_state_dim))
        _check_shape("context", context, (*batch, self.context_dim))
        are_indices(action, batch, self.action_dim, indices=self.accepts_indices)
        particles = latent[..., None, None, :].expand(
            *batch, self.n_models, 1, self.latent_state_dim
        )
        mean, own_std, log_weights, term_logit = self.particles(particles, context, action)
        mean = mean.squeeze(-3)
        std = own_std.squeeze(-3) if std is None else torch.as_tensor(std).to(mean).expand_as(mean)
        return ParticlePrediction(mean, std, log_weights.squeeze(-2), term_logit.squeeze(-2))


def _check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if x.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {[*shape]}, got {list(x.shape)}.")
