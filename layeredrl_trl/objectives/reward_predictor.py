"""The loss of a predictor: reward, value, dynamics and standardizer from slices of transitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from layeredrl_trl import keys
from layeredrl_trl.checks import check_finite
from layeredrl_trl.functional import zero_where_not
from layeredrl_trl.modules import (
    DeltaStandardizer,
    DynamicsModel,
    Encoder,
    LatentFunction,
    as_reward_module,
    as_value_module,
    check_heads,
    check_kinds,
    check_parts,
    evaluate,
)
from layeredrl_trl.objectives.batch import Slices, all_of, check_keys, flag, per_step
from layeredrl_trl.objectives.joined_batch import Changes, Steps, with_all_ranks
from layeredrl_trl.objectives.slice_loss import HAS_TARGET, SliceLoss, next_key
from layeredrl_trl.ranks import gather_rows

Entries = Mapping[NestedKey, Tensor] | TensorDictBase
"""Tensors of one batch by name."""


class RewardPredictorLoss(SliceLoss):
    """Train encoder, reward, value and dynamics together from slices of transitions.

    A slice is ``T = k_steps + n_steps - 1`` consecutive steps (one more for a Q-function), as
    ``TransitionSliceSampler`` draws them. Its first ``k_steps`` steps train reward and value; its
    first step is a uniform transition and trains the dynamics, unless separate transitions are
    given. All steps of a slice get the context of its first step, so no state leaks into it.

    Loss terms, each already weighted: ``loss_reward`` (squared error; its gradient reaches the
    encoder if ``learn_encoder``), ``loss_value`` (squared error to the n-step target, detached from
    the encoder, only where ``planned``), ``loss_consistency`` (negative log-likelihood of the next
    latent state plus cross-entropy of termination, latents detached) and ``loss_standardizer``
    (``||cov(W delta) - I||_F``). Errors of a reward or value that has a ``target_scale``, like the
    library's own, are in that unit: its square times the loss is the error in units of the reward.

    A terminated step adds no bootstrap value; a truncated or unfinished end adds the value of the
    state after it. A target ends before the first later step that was not ``planned``, with the
    value of the state there. Padded steps are ignored.

    In a process group of several ranks (:mod:`layeredrl_trl.ranks`), running statistics are made of
    the batches of all of them, unless nothing learns. The mean over ranks of each loss term, and of
    its gradients, is that of the joined batch; with ``reduction="none"`` errors are those of the
    rank's own steps. So ``DistributedDataParallel(loss)`` learns what one process would.

    Args:
        encoder: encoder of observations.
        dynamics: the model.
        reward: reads ``latent``, ``context``, ``action``; ``None`` for no reward loss.
        value: a state value (reads ``latent``, ``context``) or a Q-function (reads ``action`` too);
            ``None`` for no value loss. Targets come from a target network, which needs a
            ``torchrl.objectives.SoftUpdate``.
        standardizer: whitens changes of the latent state; ``None`` for no standardizer loss.
        gamma: discount, in [0, 1].
        k_steps: steps of a slice that train reward and value, at least 1.
        n_steps: maximum number of rewards in a value target, at least 1.
        learn_encoder: let the reward loss train the encoder.
        consistency_loss_weight, value_loss_weight, rew_loss_weight: factors of
            ``loss_consistency``, ``loss_value`` and ``loss_reward``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Reads:
        A rectangular ``[B, T]`` or flat ``[B * T]`` sample of slices (a flat one must be drawn with
        ``slice_len=loss.slice_len``, which is not always checked): ``observation``, ``action``,
        ``("next", "observation")``, ``("next", "reward")``, ``("next", "terminated")``,
        ``("collector", "mask")`` and optionally ``planned``, ``weight`` ``[..., 1]`` (of the
        transition in ``loss_consistency``) and ``index`` (for bootstrap masks).

    Writes:
        ``loss_reward``, ``loss_value``, ``loss_consistency``, ``loss_standardizer`` (those that
        apply) and, detached, ``nll`` (nats), ``term_bce`` (nats) and ``value_target_mean`` (units
        of the reward), means over what counts whatever the reduction, 0 if nothing does.

    Raises:
        TypeError: at construction, if a part is of an unknown kind, a count no integer or a flag no
            bool.
        ValueError: at construction, if an option is out of range or sizes of the parts differ.
        KeyError: if an entry is missing; the text names it and the existing ones.

    Example:
        >>> from layeredrl_trl import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
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
        weights = {
            "consistency_loss_weight": consistency_loss_weight,
            "value_loss_weight": value_loss_weight,
            "rew_loss_weight": rew_loss_weight,
        }
        for name, weight in weights.items():
            check_finite(name, weight)
            if weight < 0:
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
        names = (*encoder.out_keys, dynamics.in_keys[2])
        reward = as_reward_module(reward, names)
        value = as_value_module(value, names, argument="value")
        check_heads(owner, encoder, dynamics, reward=reward, value=value)
        super().__init__(
            encoder,
            dynamics,
            value,
            gamma=gamma,
            k_steps=k_steps,
            n_steps=n_steps,
            learn_encoder=learn_encoder,
            reduction=reduction,
        )
        self.reward = reward
        self.standardizer = standardizer
        self.consistency_loss_weight = consistency_loss_weight
        self.value_loss_weight = value_loss_weight
        self.rew_loss_weight = rew_loss_weight

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
        tensordict: TensorDictBase | Slices,
        transitions: TensorDictBase | Slices | None = None,
    ) -> TensorDict:
        """Compute every loss term.

        The batch first updates the running statistics of all parts, unless both the loss and the
        part are in evaluation mode.

        Args:
            tensordict: slices with the entries under ``Reads``, flat or ``[B, T]``.
            transitions: separate transitions ``[N]`` for the dynamics, as
                :meth:`encode_transitions` takes them. ``None``: the first steps of the slices.

        Returns:
            TensorDict without batch dims; with ``reduction="none"`` each term keeps its shape.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a shape does not fit.
        """
        slices = self._read_slices(tensordict)
        single = slices.first if transitions is None else self._read_transitions(transitions)
        self._update_encoder_statistics(
            single.observation, single.next_observation, single.mask, single.weight
        )
        if slices.returns is None:
            slices = self.with_returns(slices)
        return self._terms(self._targets(slices, learns=True), self._encode(single))

    def terms(self, targets: TensorDictBase, transitions: TensorDictBase) -> TensorDict:
        """Compute every loss term, like :meth:`forward`, of encoded batches.

        Args:
            targets: ``[B, k]`` from :meth:`compute_targets`; masked steps may hold anything.
            transitions: ``[N]`` from :meth:`encode_transitions`.

        Returns:
            TensorDict without batch dims, as from :meth:`forward`.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a per-step entry has another shape.
        """
        names, (latent, context) = self.tensor_keys, self.encoder.out_keys
        check_keys(targets, (latent, context, names.action))
        check_keys(transitions, (latent, context, names.action, next_key(latent)))
        valid = flag(targets, names.mask)
        real = {key: targets.get(key) for key in (latent, context, names.action)}
        real = {key: zero_where_not(valid.squeeze(-1), x) for key, x in real.items()}
        real[names.mask] = valid
        if self.reward is not None or self.has_value:
            real[names.next_reward] = per_step(targets, names.next_reward)
        if self.has_value:
            real[keys.VALUE_TARGET] = per_step(targets, keys.VALUE_TARGET)
            if names.planned in targets.keys(True):
                real[names.planned] = flag(targets, names.planned)
            if self.bootstraps_action:  # a target that is NaN although it bootstraps is a fault
                is_known = ~real[keys.VALUE_TARGET].isnan()
                real[HAS_TARGET] = is_known | (targets[keys.BOOTSTRAP_VALUE] != 0)
        encoded = dict(transitions.items(True, True))
        encoded[names.next_terminated] = flag(transitions, names.next_terminated)
        if names.observation != latent:  # else it holds the latent state
            observations = (encoded.get(k) for k in (names.observation, names.next_observation))
            flags = (encoded.get(k) for k in (keys.MASK, keys.WEIGHT))
            self._update_encoder_statistics(*observations, *flags)
        return self._terms(real, encoded)

    def _terms(self, targets: Entries, transitions: Entries) -> TensorDict:
        """Update the running statistics of all parts, then compute every loss term."""
        steps, changes = all_steps, all_changes = self._steps(targets), self._changes(transitions)
        if self._n_joined > 1:
            (steps, changes), (all_steps, all_changes) = with_all_ranks(steps, changes)
        self._update_head_statistics(all_steps)
        self._update_dynamics_statistics(all_changes)
        target = targets.get(keys.VALUE_TARGET, None)
        terms = self._reward_and_value_terms(steps, all_steps, target)
        terminated = transitions[self.tensor_keys.next_terminated]
        terms |= self._dynamics_terms(changes, all_changes, terminated)
        return TensorDict(terms, batch_size=[])

    def _steps(self, targets: Entries) -> Steps:
        """What reward and value learn from."""
        names, (latent, context) = self.tensor_keys, self.encoder.out_keys
        valid = targets.get(names.mask, None)  # None: all are
        flags = (targets.get(key, None) for key in (names.planned, HAS_TARGET))
        return Steps(
            latent=targets[latent],
            context=targets[context],
            action=targets[names.action],
            reward=targets.get(names.next_reward, None),
            valid=valid,
            counts=all_of(valid, *flags),
        )

    def _changes(self, transitions: Entries) -> Changes:
        """What dynamics and standardizer learn from, without gradient."""
        names, (latent_key, context_key) = self.tensor_keys, self.encoder.out_keys
        entries = latent_key, context_key, names.action, next_key(latent_key)
        tensors = [transitions[key].detach() for key in entries]
        mask, weight, index = (
            transitions.get(key, None) for key in (keys.MASK, keys.WEIGHT, keys.INDEX)
        )
        batch = tensors[0].shape[:-1]
        weight = self.dynamics.joint_weight(batch, mask=mask, weight=weight, index=index)
        counts = None if weight is None else (weight > 0).any(-1)
        if counts is not None:  # before the networks: a gradient of 0 times NaN is NaN
            tensors = [zero_where_not(counts, x) for x in tensors]
        return Changes(*tensors, counts=counts, weight=weight)

    def _reward_and_value_terms(
        self, steps: Steps, all_steps: Steps, target: Tensor | None
    ) -> dict[str, Tensor]:
        """Loss terms of reward and value; means are over the number of ``all_steps``."""
        latent, context, action, reward, valid, counts = steps
        terms = {}
        if self.reward is not None:
            if not self.learn_encoder:
                latent, context = latent.detach(), context.detach()
            entries = self._head_entries(latent, context, action)
            error = self._error(self.reward, entries, reward, valid, all_steps.valid)
            terms["loss_reward"] = self.rew_loss_weight * error
        if self.has_value:
            entries = self._head_entries(latent.detach(), context.detach(), action)
            error = self._error(self.value_network, entries, target, counts, all_steps.counts)
            terms["loss_value"] = self.value_loss_weight * error
            mean = self._reduce_where(target.detach(), counts, all_steps.counts, "mean")
            terms["value_target_mean"] = mean
        return terms

    def _dynamics_terms(
        self, changes: Changes, all_changes: Changes, terminated: Tensor
    ) -> dict[str, Tensor]:
        """Loss terms of dynamics and standardizer; means are over the sum of all weights."""
        *entries, _, weight = changes
        dynamics = self.dynamics
        nll, bce = dynamics.negative_log_likelihood(*entries, terminated, weight)
        share = None if weight is None else weight.mean()
        if self._n_joined > 1:  # mean of the sums of weights of all ranks, per own transition
            share = all_changes.weight.sum() / (self._n_joined * len(weight))
        if share is not None:
            share = torch.where(share > 0, share, 1.0)
        means = [x.mean() if share is None else x.mean() / share for x in (nll, bce)]
        consistency = means[0] + means[1]
        if self.reduction != "mean":
            consistency = self._times_ranks(self._reduce_loss(nll + bce))
        terms = {
            "loss_consistency": self.consistency_loss_weight * (consistency + dynamics.penalty()),
            "nll": means[0].detach(),
            "term_bce": means[1].detach(),
        }
        if self.standardizer is not None:
            delta = all_changes.next_latent - all_changes.latent
            terms["loss_standardizer"] = self.standardizer.residual(delta, all_changes.counts)
        return terms

    def _update_encoder_statistics(
        self,
        observation: Tensor | None,
        following: Tensor | None,
        mask: Tensor | None,
        weight: Tensor | None,
    ) -> None:
        """Update the encoder's running statistics, before it encodes, with what counts."""
        encoder = self.encoder
        if observation is None or not (encoder.has_statistics and self._learns(encoder)):
            return
        counts = all_of(mask, None if weight is None else (weight > 0).any(-1, keepdim=True))
        counts = None if counts is None else counts.squeeze(-1)
        if self._n_joined > 1:
            if counts is None:
                counts = observation.new_ones(len(observation), dtype=torch.bool)
            observation, following, counts = gather_rows(observation, following, counts)
        encoder.update_statistics(observation, following, counts)

    def _update_head_statistics(self, steps: Steps) -> None:
        """Update the running statistics of reward and value, if they have any and learn."""
        heads = (self.reward, self.value_network if self.has_value else None)
        for head in heads:
            if isinstance(head, LatentFunction) and head.has_statistics and self._learns(head):
                entries = self._head_entries(steps.latent, steps.context, steps.action)
                reward = steps.reward if head is self.reward else self._sum_unit * steps.reward
                head.update_statistics(entries, reward, steps.valid)

    def _update_dynamics_statistics(self, changes: Changes) -> None:
        """Update the running statistics of dynamics and standardizer, if they learn."""
        latent, context, action, next_latent, counts, _ = changes
        if self._learns(self.dynamics):
            self.dynamics.update_statistics(latent, context, action, next_latent, counts)
        if self.standardizer is not None and self._learns(self.standardizer):
            self.standardizer.update_statistics(next_latent - latent, counts)

    def _error(
        self,
        head: TensorDictModuleBase,
        entries: dict[NestedKey, Tensor],
        target: Tensor,
        counts: Tensor | None,
        all_counts: Tensor | None,
    ) -> Tensor:
        """Reduce the squared errors ``[B, k, 1]`` as :meth:`_reduce_where` does."""
        if counts is not None:  # before the square, too: a gradient of 0 times NaN is NaN
            target = torch.where(counts, target, 0.0)
        predicted = evaluate(head, entries)
        # squares of half precision would overflow
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        predicted, target = predicted.to(dtype), target.to(dtype)
        scale = head.target_scale if isinstance(head, LatentFunction) else None
        if scale is not None:
            predicted, target = predicted / scale, target / scale
        if counts is None:
            return mse_loss(predicted, target, reduction=self.reduction)
        error = mse_loss(predicted, target, reduction="none")
        return self._reduce_where(error, counts, all_counts, self.reduction)

    def _reduce_where(
        self, x: Tensor, counts: Tensor | None, all_counts: Tensor | None, reduction: str
    ) -> Tensor:
        """Reduce ``x`` ``[B, k, 1]`` where ``counts`` is True; with "none", set the rest to 0.

        The mean over nothing is 0: an entire batch may be unplanned. ``all_counts`` are the flags
        of all ranks, whose number a mean is over.
        """
        if counts is None:
            return self._reduce_loss(x, reduction=reduction)
        if reduction == "none":
            # _reduce_loss would drop masked entries and so lose the shape
            return torch.where(counts, x, 0.0)
        total = self._times_ranks(self._reduce_loss(x, mask=counts, reduction="sum"))
        return total / all_counts.sum().clamp_min(1) if reduction == "mean" else total

    def _times_ranks(self, x: Tensor) -> Tensor:
        """Multiply the sum over a rank's batch so that the mean over ranks is the sum over all."""
        return x if self._n_joined == 1 or x.ndim else self._n_joined * x
