"""What n-step value targets are made of, read from slices, and how they are put together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from layeredrl_trl.functional import n_step_sums, n_step_window
from layeredrl_trl.objectives.columns import SliceParts
from layeredrl_trl.objectives.slices import Reader, SliceKeys, per_step, read_reward

Bootstrap = Literal["state", "action"]
"""What is valued behind the last reward of a target: a state, or a state and its action."""


def read_target_parts(
    read: Reader,
    mask: Tensor,
    names: SliceKeys,
    *,
    k_steps: int,
    n_steps: int,
    gamma: float,
    bootstrap: Bootstrap | None,
) -> SliceParts:
    """Read all that targets of the first ``k`` steps of slices are made of.

    Args:
        read: reads named entries at given steps of the slices.
        mask: bool ``[B, T]``, False on padding.
        names: of the entries.
        k_steps: ``k``.
        n_steps: most rewards in a target.
        gamma: discount.
        bootstrap: what to value behind the last reward; ``None`` for nothing.

    Raises:
        ValueError: if a shape does not fit.
    """
    every = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    outcome = read([names.next_reward, names.next_terminated], every)
    reward = read_reward(outcome, names, mask.shape)
    terminated = per_step(outcome, names.next_terminated, mask.shape, flag=True)
    window = n_step_window(
        terminated.squeeze(-1), mask, k_steps, n_steps, next_action=bootstrap == "action"
    )
    total, discount = n_step_sums(reward.squeeze(-1), window, gamma=gamma, n_steps=n_steps)
    valid = mask[:, :k_steps] & window.valid
    first = every[:, :k_steps]
    last = (mask.sum(-1, keepdim=True) - 1).clamp_min(0)
    steps = read([names.observation, names.action, names.planned], first.minimum(last))
    planned = None
    if names.planned in steps.keys(True):
        planned = per_step(steps, names.planned, first.shape, flag=True)
    observation, action = _read_behind(read, first + window.steps, last, names, bootstrap)
    return SliceParts(
        observation=steps.get(names.observation),
        action=steps.get(names.action),
        reward=reward[:, :k_steps],
        terminated=terminated[:, :k_steps],
        valid=valid.unsqueeze(-1),
        planned=planned,
        partial_return=torch.where(valid, total, 0.0).unsqueeze(-1),
        discount=discount.unsqueeze(-1),
        bootstraps=(window.bootstrap & valid).unsqueeze(-1),
        observation_behind=observation,
        action_behind=action,
    )


def bootstrapped_return(parts: SliceParts, value: Tensor | None) -> Tensor:
    """Add the discounted value behind the last reward to the rewards before it.

    Args:
        parts: of the slices.
        value: of what lies behind, ``[B, k, 1]``; ``None`` for 0.

    Returns:
        ``[B, k, 1]``, of the reward's dtype; 0 where there is no target.
    """
    target = parts.partial_return
    if value is not None:
        counted = torch.where(parts.bootstraps, value, 0.0)
        target = torch.addcmul(target, counted, parts.discount)
    return target.to(parts.reward.dtype)


def _read_behind(
    read: Reader, end: Tensor, last: Tensor, names: SliceKeys, bootstrap: Bootstrap | None
) -> tuple[Tensor | None, Tensor | None]:
    """Read the observation (and action) behind the last reward of each target, ``[B, k, ...]``.

    Args:
        read: of the slices.
        end: long ``[B, k]``, the first step of the slice that the target does not sum.
        last: long ``[B, 1]``, the last real step.
        names: of the entries.
        bootstrap: what is valued.
    """
    if bootstrap is None:
        return None, None
    if bootstrap == "action":
        pair = read([names.observation, names.action], end.minimum(last))
        return pair.get(names.observation), pair.get(names.action)
    outcome = read([names.next_observation], (end - 1).clamp_min(0))
    return outcome.get(names.next_observation), None
