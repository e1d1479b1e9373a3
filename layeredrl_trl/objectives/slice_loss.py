"""Base class of losses on slices: reads and encodes batches, and computes value targets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn
from torchrl.objectives import LossModule

from layeredrl_trl import keys
from layeredrl_trl.checks import check_counts, check_flag, check_fraction
from layeredrl_trl.modules import (
    DynamicsModel,
    Encoder,
    HeadMLP,
    LatentFunction,
    RunningMoments,
    evaluate,
    head_entries,
    reads_action,
)
from layeredrl_trl.modules.loading import LoadsWhole
from layeredrl_trl.objectives.batch import SliceKeys, Slices, all_of, as_slices
from layeredrl_trl.objectives.targets import n_step_returns, value_target
from layeredrl_trl.ranks import gather_rows, n_ranks

HAS_TARGET = "has_target"
"""Name, within a loss, of the flag of steps that have a value target; all have if it is missing."""


class SliceLoss(LoadsWhole, LossModule):
    """Base class of losses on slices: encode them, and compute value targets by a target network.

    Args:
        encoder: encoder of observations.
        dynamics: the model; names the action.
        value: a state value or Q-function, or ``None``.
        gamma: discount, in [0, 1].
        k_steps: steps of a slice that get a target, at least 1.
        n_steps: maximum number of rewards in a value target, at least 1.
        learn_encoder: let latent states carry gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError: if a count is no integer, or a flag no bool.
        ValueError: if an option is out of range.
    """

    class _AcceptedKeys(SliceKeys):
        """Names of the entries that the loss reads; see ``set_keys``."""

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    value_network: TensorDictModuleBase
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams
    _target_network: TensorDictModuleBase

    def __init__(
        self,
        encoder: Encoder,
        dynamics: DynamicsModel,
        value: TensorDictModuleBase | None,
        *,
        gamma: float,
        k_steps: int,
        n_steps: int,
        learn_encoder: bool,
        reduction: str,
    ) -> None:
        super().__init__()
        _check_options(gamma, k_steps, n_steps, reduction)
        check_flag("learn_encoder", learn_encoder)
        self.encoder = encoder
        self.dynamics = dynamics
        self.has_value = value is not None
        self.value_moments = _moments_of(value)
        if value is not None:
            with _without_moments(value):
                self.convert_to_functional(value, "value_network", create_target_params=True)
                # A network of its own, not the value's with other tensors for a while: other
                # threads may evaluate the value meanwhile. Not registered: its tensors are.
                self.__dict__["_target_network"] = deepcopy(value)
            self._bind_target_network()
            if not any(True for _ in value.parameters()):  # no targets: prevents a warning
                self._has_update_associated["value_network"] = True
        self.gamma = gamma
        self.k_steps = k_steps
        self.n_steps = n_steps
        self.learn_encoder = learn_encoder
        self.reduction = reduction
        self.set_keys(observation=encoder.in_keys[0], action=dynamics.in_keys[2])

    @property
    def bootstraps_action(self) -> bool:
        """Whether the value is a Q-function."""
        return self.has_value and reads_action(self.value_network, self.tensor_keys.action)

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

    def train(self, mode: bool = True) -> SliceLoss:
        """Set training or evaluation mode, also of the value, which is not registered as a part."""
        super().train(mode)
        if self.has_value:
            self.value_network.train(mode)
            self._target_network.train(mode)
        return self

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> None:
        """Refuse to make an estimator of TorchRL: the targets are n-step returns.

        Raises:
            NotImplementedError: always; the text names the options of the targets.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: value targets are n-step returns, set by gamma, n_steps and "
            "k_steps at construction; there is no value estimator to make."
        )

    def compute_targets(
        self,
        tensordict: TensorDictBase | Slices,
        *,
        k_steps: int | None = None,
        n_steps: int | None = None,
        gamma: float | None = None,
    ) -> TensorDict:
        r"""Encode the first ``k`` steps of slices and compute their n-step value targets.

        ``G_j = sum_{i<l} gamma^i r_{j+i} + gamma^l (1 - terminated) V_target`` with ``l`` the
        smallest of ``n``, the steps left in the episode, and the steps before the first one after
        ``j`` that was not ``planned``.

        Args:
            tensordict: slices, as for :meth:`forward`, of ``k + n - 1`` steps or more (one more for
                a Q-function).
            k_steps: ``k``; ``None``: the loss's own.
            n_steps: ``n``; ``None``: the loss's own.
            gamma: discount; ``None``: the loss's own.

        Returns:
            TensorDict ``[B, k]``: ``latent``, ``context`` (with gradient if ``learn_encoder``),
            ``action``, ``("next", "reward")``, ``("next", "terminated")``, ``value_target``,
            ``bootstrap_value`` (before its discount; 0 if there is none), ``("collector",
            "mask")``, ``planned`` and, if known, ``index``. For a Q-function ``value_target`` is
            NaN on the last step of an unterminated episode: there is no action to bootstrap with,
            and the value does not learn from that step.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a number is out of its range or a shape does not fit.
        """
        slices = self._read_slices(tensordict)
        slices = self.with_returns(slices, k_steps=k_steps, n_steps=n_steps, gamma=gamma)
        targets, mask = self._targets(slices), slices.mask
        targets.setdefault(self.tensor_keys.planned, torch.ones_like(mask))
        has_target = targets.pop(HAS_TARGET, None)
        if has_target is not None:
            known = targets[keys.VALUE_TARGET]
            targets[keys.VALUE_TARGET] = torch.where(has_target, known, torch.nan)
        if slices.index is not None:
            targets[keys.INDEX] = slices.index
        return TensorDict(targets, batch_size=mask.shape[:2], device=mask.device)

    def with_returns(
        self,
        slices: Slices,
        *,
        k_steps: int | None = None,
        n_steps: int | None = None,
        gamma: float | None = None,
    ) -> Slices:
        """Compute the part of value targets that needs no network; see :meth:`compute_targets`.

        The slices may be those of many optimisation steps at once.
        """
        k_steps = self.k_steps if k_steps is None else k_steps
        n_steps = self.n_steps if n_steps is None else n_steps
        gamma = self.gamma if gamma is None else gamma
        _check_options(gamma, k_steps, n_steps, self.reduction)
        return n_step_returns(
            slices,
            k_steps=k_steps,
            n_steps=n_steps,
            gamma=gamma,
            needs_action=self.bootstraps_action,
        )

    def encode_transitions(self, transitions: TensorDictBase | Slices) -> TensorDict:
        """Encode single transitions for the dynamics, without gradient.

        Args:
            transitions: ``[N]``: ``observation``, ``action``, ``("next", "observation")``,
                ``("next", "terminated")``, and optionally ``weight`` ``[N, 1]`` and ``index``.

        Returns:
            TensorDict ``[N]``: ``latent`` and ``context``, also under ``"next"``, ``action``,
            ``("next", "terminated")``, ``("collector", "mask")``, ``weight`` and ``index`` if
            given, and both observations for an encoder with running statistics.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a shape does not fit.
        """
        entries = self._encode(self._read_transitions(transitions))
        terminated = entries[self.tensor_keys.next_terminated]
        entries.setdefault(keys.MASK, torch.ones_like(terminated))
        return TensorDict(entries, batch_size=terminated.shape[:1], device=terminated.device)

    def _read_slices(self, tensordict: TensorDictBase | Slices) -> Slices:
        if isinstance(tensordict, Slices):
            return tensordict
        names = self.tensor_keys
        return Slices.read(as_slices(tensordict, self.slice_len, self.in_keys, names), names)

    def _read_transitions(self, transitions: TensorDictBase | Slices) -> Slices:
        if isinstance(transitions, Slices):
            return transitions
        return Slices.read(transitions, self.tensor_keys, with_reward=False, with_mask=False)

    def _targets(self, slices: Slices, *, learns: bool = False) -> dict[NestedKey, Tensor]:
        """Training data ``[B, k]`` of reward and value, from slices with returns.

        A value that ``learns`` and has no unit yet gets one first.
        """
        names, (latent_key, context_key) = self.tensor_keys, self.encoder.out_keys
        with torch.set_grad_enabled(self.learn_encoder and torch.is_grad_enabled()):
            latent, context = self.encoder.encode(slices.observation)
        context = context[:, :1].expand_as(context)
        returns = slices.returns
        if learns and self.has_value and self._learns(self.value_network):
            self._start_value(latent, context, slices)
        if self.has_value:
            value = self._target_value(returns.observation, context.detach(), returns.action)
            value = torch.where(returns.bootstraps, value, 0.0)
        else:
            value = torch.zeros_like(slices.reward)
        targets: dict[NestedKey, Tensor | None] = {
            latent_key: latent,
            context_key: context,
            names.action: slices.action,
            names.next_reward: slices.reward,
            names.next_terminated: slices.terminated,
            keys.VALUE_TARGET: value_target(slices, value),
            keys.BOOTSTRAP_VALUE: value,
            names.mask: slices.mask,
            names.planned: slices.planned,
            HAS_TARGET: returns.exists,
        }
        return {key: x for key, x in targets.items() if x is not None}

    def _start_value(self, latent: Tensor, context: Tensor, slices: Slices) -> None:
        """Give a value without statistics a unit, that of the rewards, before it makes targets.

        An untrained network predicts numbers near 1, however small the rewards are.
        """
        moments = self.value_moments
        if moments is not None and not moments.has_started:
            is_first = (moments.count == 0).expand_as(slices.reward)
            rows = latent, context, slices.action, slices.reward, all_of(is_first, slices.mask)
            if self._n_joined > 1:
                rows = gather_rows(*(x.detach() for x in rows))
            *inputs, reward, counts = rows
            entries = self._head_entries(*inputs)
            self.value_network.update_statistics(entries, self._sum_unit * reward, counts)

    @property
    def _sum_unit(self) -> float:
        """Size of a discounted sum of independent rewards of size 1; without end, of a thousand."""
        return max(1 - self.gamma**2, 1e-3) ** -0.5

    def _learns(self, part: nn.Module) -> bool:
        # Parts are shared, so their mode may be set without setting that of the loss.
        return self.training or part.training

    @property
    def _n_joined(self) -> int:
        """Number of ranks whose batches count as one; 1 if nothing learns, as in evaluation."""
        n = n_ranks()
        if n == 1:
            return 1
        parts = [*self.modules(), *([self.value_network] if self.has_value else [])]
        return n if any(map(self._learns, parts)) else 1

    @torch.no_grad()
    def _target_value(self, observation: Tensor, context: Tensor, action: Tensor | None) -> Tensor:
        """Value ``[B, k, 1]`` of observations by the target network."""
        latent, _ = self.encoder.encode(observation)
        entries = self._head_entries(latent, context, action)
        self.target_value_network_params  # noqa: B018 - TorchRL warns here of a missing updater
        return evaluate(self._target_network, entries)

    @torch.no_grad()
    def _encode(self, transitions: Slices) -> dict[NestedKey, Tensor]:
        """Training data ``[N]`` of the dynamics."""
        names, (latent_key, context_key) = self.tensor_keys, self.encoder.out_keys
        entries: dict[NestedKey, Tensor | None] = {}
        if self.encoder.has_statistics:
            entries[names.observation] = transitions.observation
            entries[names.next_observation] = transitions.next_observation
        # after the observations, because the latent state may have the same name
        entries[latent_key], entries[context_key] = self.encoder.encode(transitions.observation)
        following = self.encoder.encode(transitions.next_observation)
        entries[next_key(latent_key)], entries[next_key(context_key)] = following
        entries |= {
            names.action: transitions.action,
            names.next_terminated: transitions.terminated,
            keys.MASK: transitions.mask,
            keys.WEIGHT: transitions.weight,
            keys.INDEX: transitions.index,
        }
        return {key: x for key, x in entries.items() if x is not None}

    def _head_entries(self, latent: Tensor, context: Tensor, action: Tensor | None) -> dict:
        dynamics, names = self.dynamics, (*self.encoder.out_keys, self.tensor_keys.action)
        return head_entries(
            names,
            latent,
            context,
            action,
            dynamics.action_dim,
            indices=dynamics.accepts_indices,
        )

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Tell ``_reduce_loss`` the new name of the mask; ``set_keys`` calls this."""
        self.loss_mask_key = self.tensor_keys.mask

    def _bind_target_network(self) -> None:
        """Let the target network hold the target parameters, and the value's running moments.

        Moving and loading them changes the tensors in place.
        """
        network = self._target_network
        # not by name, which warns of a missing updater before one can be made
        for key, x in self._modules["target_value_network_params"].items(True, True):
            *path, name = (key,) if isinstance(key, str) else key
            module = network.get_submodule(".".join(path))
            tensors = module._parameters if name in module._parameters else module._buffers
            tensors[name] = x
        if self.value_moments is not None:
            network.module.moments = self.value_moments

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.has_value:  # deepcopy makes a second TensorDictParams besides the module's
            value = self.value_network
            with _without_moments(value):
                self.value_network_params = TensorDict.from_module(value, as_module=True)
            self._bind_target_network()


def next_key(key: NestedKey) -> NestedKey:
    """Name an entry under ``"next"``."""
    return unravel_key(("next", key))


def _moments_of(value: TensorDictModuleBase | None) -> RunningMoments | None:
    """Return the running moments of a value that standardises, else ``None``."""
    net = value.module if isinstance(value, LatentFunction) else None
    return net.moments if isinstance(net, HeadMLP) else None


@contextmanager
def _without_moments(value: TensorDictModuleBase) -> Iterator[None]:
    """Keep the running moments of a value out of its parameters.

    The target network then uses those of the value: networks of different units could not be
    averaged.
    """
    moments = _moments_of(value)
    if moments is None:
        yield
        return
    del value.module.moments
    try:
        yield
    finally:
        value.module.moments = moments


def _check_options(gamma: float, k_steps: int, n_steps: int, reduction: str) -> None:
    check_fraction("gamma", gamma)
    if k_steps < 1 or n_steps < 1:
        raise ValueError(f"k_steps and n_steps must be at least 1, got {k_steps} and {n_steps}.")
    check_counts(k_steps=k_steps, n_steps=n_steps)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
