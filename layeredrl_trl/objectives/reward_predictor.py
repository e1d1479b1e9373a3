"""The loss of a predictor: reward, value, dynamics and standardizer from slices of transitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchrl.objectives import LossModule

from layeredrl_trl import keys
from layeredrl_trl.checks import check_counts
from layeredrl_trl.functional import known_to_hold, zero_where_not
from layeredrl_trl.modules import (
    DeltaStandardizer,
    DynamicsModel,
    Encoder,
    as_reward_module,
    as_value_module,
    check_heads,
    check_kinds,
    check_parts,
    evaluate,
    head_entries,
    reads_action,
)
from layeredrl_trl.objectives.columns import (
    SliceParts,
    Targets,
    TransitionParts,
    Transitions,
)
from layeredrl_trl.objectives.slices import (
    Reader,
    SliceKeys,
    as_slices,
    per_step,
    read_steps,
    rows_with_data,
)
from layeredrl_trl.objectives.target_network import with_parameters
from layeredrl_trl.objectives.value_targets import (
    Bootstrap,
    bootstrapped_return,
    read_target_parts,
)


class RewardPredictorLoss(LossModule):
    """Train encoder, reward, value and dynamics together from slices of transitions.

    A slice is ``T = k_steps + n_steps - 1`` consecutive steps (one more for a Q-function), as
    ``TransitionSliceSampler`` draws them. Its first ``k_steps`` steps train reward and value; its
    first step is a uniform transition and trains the dynamics, unless separate transitions are
    given. The context of a slice is that of its first step, so that state cannot leak into it.

    Terms, each already weighted: ``loss_reward`` (squared error; its gradient reaches the encoder
    if ``learn_encoder``), ``loss_value`` (squared error to the n-step target, detached from the
    encoder, only where ``planned``), ``loss_consistency`` (negative log-likelihood of the next
    latent state plus cross-entropy of termination, latents detached) and ``loss_standardizer``
    (``||cov(W delta) - I||_F``).

    A terminated step is bootstrapped by nothing; a truncated or unfinished end by the value of
    the state after it; padded steps count for nothing.

    Args:
        encoder: of the observations.
        dynamics: the model.
        reward: reads ``latent``, ``context``, ``action``; ``None`` for no reward loss.
        value: a state value (reads ``latent``, ``context``) or a Q-function (reads ``action`` too);
            ``None`` for no value loss. Its targets come from a target network: associate a
            ``torchrl.objectives.SoftUpdate``.
        standardizer: of changes of the latent state; ``None`` for no standardizer loss.
        gamma: discount, in [0, 1].
        k_steps: steps of a slice that train reward and value, at least 1.
        n_steps: most rewards in a value target, at least 1.
        learn_encoder: let the reward loss train the encoder.
        consistency_loss_weight: factor of ``loss_consistency``.
        value_loss_weight: factor of ``loss_value``.
        rew_loss_weight: factor of ``loss_reward``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Reads:
        A flat ``[B * T]`` or rectangular ``[B, T]`` sample of slices (of a flat one it cannot
        always be told how long its slices are: give the sampler ``slice_len=loss.slice_len``):
        ``observation``, ``action``,
        ``("next", "observation")``, ``("next", "reward")``, ``("next", "terminated")``,
        ``("collector", "mask")`` and optionally ``planned``, ``weight`` ``[..., 1]`` (of the
        transition in ``loss_consistency``) and ``index`` (for bootstrap masks).

    Writes:
        ``loss_reward``, ``loss_value``, ``loss_consistency``, ``loss_standardizer`` (those that
        apply) and, detached, ``nll`` (nats), ``term_bce`` (nats) and ``value_target_mean``.

    Raises:
        TypeError: at construction, if a part is of an unknown kind, or a count no integer.
        ValueError: at construction, if an option is out of range or sizes of the parts differ.
        KeyError: if an entry is missing; the text names it and those that are there.

    Example:
        >>> from layeredrl_trl.modules import (
        ...     IdentityEncoder,
        ...     ProbabilisticEnsemble,
        ...     RewardNet,
        ...     ValueNet,
        ... )
        >>> from torchrl.objectives import SoftUpdate
        >>> loss = RewardPredictorLoss(
        ...     IdentityEncoder(3),
        ...     ProbabilisticEnsemble(3, 0, 1, n_models=5),
        ...     RewardNet(3, 0, 1),
        ...     ValueNet(3, 0),
        ...     n_steps=3,
        ... )
        >>> updater, shape = SoftUpdate(loss, tau=0.005), (8, loss.slice_len)
        >>> slices = TensorDict(
        ...     {
        ...         "observation": torch.randn(*shape, 3),
        ...         "action": torch.randn(*shape, 1),
        ...         "next": {
        ...             "observation": torch.randn(*shape, 3),
        ...             "reward": torch.randn(*shape, 1),
        ...             "terminated": torch.zeros(*shape, 1).bool(),
        ...         },
        ...         "collector": {"mask": torch.ones(*shape, 1).bool()},
        ...     },
        ...     batch_size=shape,
        ... )
        >>> sorted(loss(slices).keys())[:3]
        ['loss_consistency', 'loss_reward', 'loss_value']
    """

    class _AcceptedKeys(SliceKeys):
        """Names of the entries that the loss reads; see ``set_keys``."""

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    value_network: TensorDictModuleBase
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        encoder: Encoder,
        dynamics: DynamicsModel,
        reward: nn.Module | Callable[..., Tensor] | None,
        value: nn.Module | Callable[..., Tensor] | None,
        *,
        standardizer: DeltaStandardizer | None = None,
        gamma: float = 0.99,
        k_steps: int = 1,
        n_steps: int = 1,
        learn_encoder: bool = True,
        consistency_loss_weight: float = 1.0,
        value_loss_weight: float = 1.0,
        rew_loss_weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_options(gamma, k_steps, n_steps, reduction)
        for name, weight in (
            ("consistency_loss_weight", consistency_loss_weight),
            ("value_loss_weight", value_loss_weight),
            ("rew_loss_weight", rew_loss_weight),
        ):
            if not weight >= 0:
                raise ValueError(f"{name} must be at least 0, got {weight}.")
        owner = type(self).__name__
        check_parts(owner, encoder, dynamics)
        if standardizer is not None:
            check_kinds(owner, standardizer=(standardizer, DeltaStandardizer))
            dim = standardizer.raw.shape[0]
            if dim != dynamics.latent_state_dim:
                raise ValueError(
                    f"{owner}: standardizer has {dim} latent dims, the dynamics have "
                    f"{dynamics.latent_state_dim}."
                )
        self.encoder = encoder
        self.dynamics = dynamics
        names = (*encoder.out_keys, dynamics.in_keys[2])
        self.reward = as_reward_module(reward, names)
        self.standardizer = standardizer
        value = as_value_module(value, names, argument="value")
        check_heads(owner, encoder, dynamics, reward=self.reward, value=value)
        self.has_value = value is not None
        if value is not None:
            self.convert_to_functional(value, "value_network", create_target_params=True)
            if not any(True for _ in value.parameters()):  # no target to be warned of
                self._has_update_associated["value_network"] = True
        self.gamma = gamma
        self.k_steps = k_steps
        self.n_steps = n_steps
        self.learn_encoder = learn_encoder
        self.consistency_loss_weight = consistency_loss_weight
        self.value_loss_weight = value_loss_weight
        self.rew_loss_weight = rew_loss_weight
        self.reduction = reduction

    @property
    def bootstraps_action(self) -> bool:
        """Whether the value is a Q-function."""
        return self.has_value and reads_action(self.value_network, self.tensor_keys.action)

    @property
    def _bootstrap(self) -> Bootstrap | None:
        if not self.has_value:
            return None
        return "action" if self.bootstraps_action else "state"

    @property
    def slice_len(self) -> int:
        """``T``, the steps of a slice that the loss reads."""
        return self.k_steps + self.n_steps - (0 if self.bootstraps_action else 1)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that :meth:`forward` reads from slices; ``planned`` is optional."""
        names = self.tensor_keys
        return [
            names.observation,
            names.action,
            names.next_observation,
            names.next_reward,
            names.next_terminated,
            names.mask,
        ]

    @property
    def out_keys(self) -> list[str]:
        """Entries that :meth:`forward` returns."""
        terms = {
            "loss_reward": self.reward is not None,
            "loss_value": self.has_value,
            "value_target_mean": self.has_value,
            "loss_consistency": True,
            "nll": True,
            "term_bce": True,
            "loss_standardizer": self.standardizer is not None,
        }
        return [name for name, applies in terms.items() if applies]

    def forward(
        self,
        tensordict: TensorDictBase | Targets,
        transitions: TensorDictBase | Transitions | None = None,
    ) -> TensorDict:
        """Compute every term.

        The running statistics of dynamics, standardizer and encoder take the transitions in first,
        unless both the loss and the part are in evaluation mode.

        Args:
            tensordict: slices as ``Reads`` says, flat or ``[B, T]``; or targets ``[B, k]`` from
                :meth:`compute_targets`, or as plain tensors from :meth:`encode_slices`, which then
                need ``transitions``.
            transitions: separate transitions ``[N]`` for the dynamics, from
                :meth:`encode_transitions` or, as plain tensors, :meth:`encode_parts`. ``None``: the
                first steps of the slices.

        Returns:
            A TensorDict without batch dims (with ``reduction="none"`` each term keeps its shape).
        """
        targets = tensordict
        if not isinstance(targets, Targets):
            targets, own_transitions = self._read(targets, transitions is None)
            transitions = own_transitions if transitions is None else transitions
        if transitions is None:
            raise ValueError(
                "RewardPredictorLoss: targets hold no next observations, so the dynamics need "
                "transitions as second argument; or pass slices alone."
            )
        if not isinstance(transitions, Transitions):
            names = self.tensor_keys
            transitions = Transitions.read(transitions, self.encoder.out_keys, names)
        terms = {**self._head_terms(targets), **self._dynamics_terms(transitions)}
        return TensorDict(terms, batch_size=[])

    def compute_targets(
        self,
        read: Reader,
        mask: Tensor,
        *,
        k_steps: int | None = None,
        n_steps: int | None = None,
        gamma: float | None = None,
    ) -> TensorDict:
        r"""Encode the first ``k`` steps of slices and compute their n-step value targets.

        ``G_j = sum_{i<l} gamma^i r_{j+i} + gamma^l (1 - terminated) V_target`` with ``l`` the
        smaller of ``n`` and the steps left in the episode.

        Args:
            read: reads named entries at given steps of the slices; only what is needed is read.
            mask: bool ``[B, T]``, False on padding.
            k_steps: instead of the loss's own.
            n_steps: instead of the loss's own.
            gamma: instead of the loss's own.

        Returns:
            TensorDict ``[B, k]``: ``latent``, ``context`` (with gradient if ``learn_encoder``),
            ``action``, ``("next", "reward")``, ``("next", "terminated")``, ``value_target``,
            ``("collector", "mask")`` and ``planned``. For a Q-function the mask is also False on
            the last step of an episode that has no action to bootstrap with.

        Raises:
            ValueError: if a number is out of its range or a shape does not fit.
        """
        targets = self.encode_slices(
            self.read_slices(read, mask, k_steps=k_steps, n_steps=n_steps, gamma=gamma)
        )
        return targets.to_tensordict(self.encoder.out_keys, self.tensor_keys)

    def read_slices(
        self,
        read: Reader,
        mask: Tensor,
        *,
        k_steps: int | None = None,
        n_steps: int | None = None,
        gamma: float | None = None,
    ) -> SliceParts:
        """Read all that :meth:`encode_slices` makes targets of; no network is asked yet.

        So the slices of many optimisation steps can be read at once. The arguments are those of
        :meth:`compute_targets`.
        """
        k_steps = self.k_steps if k_steps is None else k_steps
        n_steps = self.n_steps if n_steps is None else n_steps
        gamma = self.gamma if gamma is None else gamma
        _check_options(gamma, k_steps, n_steps, self.reduction)
        return read_target_parts(
            read,
            mask,
            self.tensor_keys,
            k_steps=k_steps,
            n_steps=n_steps,
            gamma=gamma,
            bootstrap=self._bootstrap,
        )

    def encode_slices(self, parts: SliceParts) -> Targets:
        """Make targets of what :meth:`read_slices` has read: encode, and value what lies behind."""
        with torch.set_grad_enabled(self.learn_encoder and torch.is_grad_enabled()):
            latent, context = self.encoder.encode(parts.observation)
        context = context[:, :1].expand_as(context)
        value = self._bootstrap_value(parts, context.detach()) if self.has_value else None
        return Targets(
            latent=latent,
            context=context,
            action=parts.action,
            reward=parts.reward,
            terminated=parts.terminated,
            value_target=bootstrapped_return(parts, value),
            valid=parts.valid,
            planned=parts.planned,
            index=parts.index,
        )

    def encode_transitions(self, transitions: TensorDictBase) -> TensorDict:
        """Encode single transitions for the dynamics, without gradient.

        Args:
            transitions: ``[N]``: ``observation``, ``action``, ``("next", "observation")``,
                ``("next", "terminated")``, and optionally ``weight`` ``[N, 1]`` and ``index``.

        Returns:
            TensorDict ``[N]``: ``latent``, ``context``, ``action``, ``("next", "latent")``,
            ``("next", "terminated")``, and those of ``weight``, ``index`` that were there. For an
            encoder with running statistics also both observations.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a shape does not fit.
        """
        names = self.tensor_keys
        encoded = self.encode_parts(TransitionParts.read(transitions, names))
        return encoded.to_tensordict(self.encoder.out_keys, names)

    @torch.no_grad()
    def encode_parts(self, parts: TransitionParts) -> Transitions:
        """Do the same with plain tensors."""
        encoder = self.encoder
        latent, context = encoder.encode(parts.observation)
        next_latent, _ = encoder.encode(parts.next_observation)
        observations = {}
        if encoder.has_statistics:
            observations = {
                "observation": parts.observation,
                "next_observation": parts.next_observation,
            }
        return Transitions(
            latent=latent,
            context=context,
            action=parts.action,
            next_latent=next_latent,
            terminated=parts.terminated,
            weight=parts.weight,
            index=parts.index,
            **observations,
        )

    @torch.no_grad()
    def _bootstrap_value(self, parts: SliceParts, context: Tensor) -> Tensor:
        """Target value ``[B, k, 1]`` of what lies behind each target's last reward."""
        latent, _ = self.encoder.encode(parts.observation_behind)
        entries = self._entries(latent, context, parts.action_behind)
        network, params = self.value_network, self.target_value_network_params
        return with_parameters(network, params, lambda: evaluate(network, entries))

    def _read(
        self, tensordict: TensorDictBase, with_transitions: bool
    ) -> tuple[Targets, Transitions | None]:
        """Take targets from a TensorDict, or make them of slices; these hold transitions too."""
        names, encoded = self.tensor_keys, self.encoder.out_keys
        there = tensordict.keys(True)
        if keys.VALUE_TARGET in there and encoded[0] in there:
            learned = {"has_reward": self.reward is not None, "has_value": self.has_value}
            return Targets.read(tensordict, encoded, names, **learned), None
        slices = as_slices(tensordict, self.slice_len, self.in_keys, names.mask)
        mask = per_step(slices, names.mask, slices.batch_size, flag=True).squeeze(-1)
        row = rows_with_data(mask)
        targets = self.encode_slices(
            self.read_slices(lambda names, steps: read_steps(slices, row, names, steps), mask)
        )
        if not with_transitions:
            return targets, None
        parts = TransitionParts.read(slices[row, 0], names)
        return targets, self.encode_parts(parts)._replace(mask=mask[:, :1])

    def _head_terms(self, targets: Targets) -> dict[str, Tensor]:
        latent, context, action = targets.latent, targets.context, targets.action
        if not self.learn_encoder:
            latent, context = latent.detach(), context.detach()
        valid = targets.valid
        all_valid = known_to_hold(valid)
        if not all_valid:
            latent, context, action = (
                zero_where_not(valid.squeeze(-1), x) for x in (latent, context, action)
            )
        terms = {}
        reward = self.reward
        if reward is not None:
            predicted = evaluate(reward, self._entries(latent, context, action))
            error = self._mean_square(predicted, targets.reward, None if all_valid else valid)
            terms["loss_reward"] = _times(self.rew_loss_weight, error)
        if self.has_value:
            counts = None if all_valid else valid
            if targets.planned is not None:
                counts = valid & targets.planned
                counts = None if known_to_hold(counts) else counts
            entries = self._entries(latent.detach(), context.detach(), action)
            predicted = evaluate(self.value_network, entries)
            error = self._mean_square(predicted, targets.value_target, counts)
            terms["loss_value"] = _times(self.value_loss_weight, error)
            mean = self._reduce_where(targets.value_target.detach(), counts, "mean")
            terms["value_target_mean"] = mean
        return terms

    def _dynamics_terms(self, transitions: Transitions) -> dict[str, Tensor]:
        dynamics, standardizer = self.dynamics, self.standardizer
        weight = dynamics.batch_weight(transitions.weights())
        latent, context, action, next_latent = (x.detach() for x in transitions[:4])
        counts = None if weight is None else (weight > 0).any(-1)
        if counts is not None:
            latent, context, action, next_latent = (
                zero_where_not(counts, x) for x in (latent, context, action, next_latent)
            )
        delta = None if standardizer is None else next_latent - latent
        self._update_statistics(transitions, latent, context, action, next_latent, delta, counts)
        nll, bce = dynamics.negative_log_likelihood(
            latent, context, action, next_latent, transitions.terminated, weight
        )
        if weight is not None and self.reduction == "mean":
            total = weight.mean()
            nll, bce = (x / torch.where(total > 0, total, 1.0) for x in (nll, bce))
        consistency = self._reduce_loss(nll + bce) + dynamics.regularization()
        terms = {
            "loss_consistency": _times(self.consistency_loss_weight, consistency),
            "nll": nll.detach().mean(),
            "term_bce": bce.detach().mean(),
        }
        if standardizer is not None and delta is not None:
            terms["loss_standardizer"] = standardizer.residual(delta, counts)
        return terms

    def _update_statistics(
        self,
        transitions: Transitions,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        next_latent: Tensor,
        delta: Tensor | None,
        counts: Tensor | None,
    ) -> None:
        def learns(part: nn.Module) -> bool:
            # Parts are shared, and the loss may be hidden from whoever puts them into a mode.
            return self.training or part.training

        # a module finds its parts only after an ordinary look-up has failed
        dynamics, standardizer, encoder = self.dynamics, self.standardizer, self.encoder
        if learns(dynamics):
            dynamics.update_statistics(latent, context, action, next_latent, counts)
        if delta is not None and standardizer is not None and learns(standardizer):
            standardizer.update_statistics(delta, counts)
        observation, next_observation = transitions.observation, transitions.next_observation
        if encoder.has_statistics and learns(encoder) and observation is not None:
            encoder.update_statistics(observation, next_observation, counts)

    def _entries(self, latent: Tensor, context: Tensor, action: Tensor | None) -> dict:
        dynamics, names = self.dynamics, (*self.encoder.out_keys, self.tensor_keys.action)
        return head_entries(
            names,
            latent,
            context,
            action,
            dynamics.action_dim,
            indices=dynamics.accepts_indices,
        )

    def _mean_square(self, x: Tensor, target: Tensor, counts: Tensor | None) -> Tensor:
        """Reduce squares of errors ``[B, k, 1]`` where they count; ``None``: everywhere."""
        if counts is None and x.dtype is target.dtype:  # one operation, backward too
            return mse_loss(x, target, reduction=self.reduction)
        error = x - target
        if counts is not None:
            error = zero_where_not(counts, error)
        return self._reduce_where(error.square(), counts)

    def _reduce_where(
        self, x: Tensor, counts: Tensor | None, reduction: str | None = None
    ) -> Tensor:
        """Reduce ``x``, finite also where it does not count; with "none" it is 0 there."""
        if counts is None:
            return self._reduce_loss(x, reduction=reduction)
        if (reduction or self.reduction) == "none":
            # _reduce_loss would drop the masked entries, and with them the shape.
            return torch.where(counts, x, 0.0)
        return self._reduce_loss(x, mask=counts, reduction=reduction)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Called by ``set_keys``: let ``_reduce_loss`` find the mask under its new name."""
        self.loss_mask_key = self.tensor_keys.mask

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.has_value:  # deepcopy makes TensorDictParams of its own beside the module's
            self.value_network_params = TensorDict.from_module(self.value_network, as_module=True)


def _times(weight: float, x: Tensor) -> Tensor:
    """Weigh a term; most weigh 1, which is left out."""
    return x if weight == 1 else weight * x


def _check_options(gamma: float, k_steps: int, n_steps: int, reduction: str) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}.")
    if k_steps < 1 or n_steps < 1:
        raise ValueError(f"k_steps and n_steps must be at least 1, got {k_steps} and {n_steps}.")
    check_counts(k_steps=k_steps, n_steps=n_steps)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
