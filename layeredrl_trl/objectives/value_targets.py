"""What n-step value targets are made of, read from slices, and how they are put together."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from layeredrl_trl.functional import n_step_sums, n_step_window
from layeredrl_trl.objectives.slices import Reader, SliceKeys, per_step, read_reward

Bootstrap = Literal["state", "action"]
"""What is valued behind the last reward of a target: a state, or a state and its action."""

BOOTSTRAP = "bootstrap"
"""Name of the entry that holds it."""


def read_target_parts(
    read: Reader,
    mask: Tensor,
    names: SliceKeys,
    *,
    k_steps: int,
    n_steps: int,
    gamma: float,
    bootstrap: Bootstrap | None,
) -> TensorDict:
    """Read all that targets of the first ``k`` steps of slices are made of.

    Args:
        read: reads named entries at given steps of the slices.
        mask: bool ``[B, T]``, False on padding.
        names: of the entries.
        k_steps: ``k``.
        n_steps: most rewards in a target.
        gamma: discount.
        bootstrap: what to value behind the last reward; ``None`` for nothing.

    Returns:
        TensorDict ``[B, k]``, see ``RewardPredictorLoss.read_slices``.
    """
    every = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    outcome = read([names.next_reward, names.next_terminated], every)
    reward = read_reward(outcome, names, mask.shape)
    terminated = per_step(outcome, names.next_terminated, mask.shape, flag=True)
    window = n_step_window(
        terminated.squeeze(-1), mask, k_steps, n_steps, next_action=bootstrap == "action"
    )
    total, discount = n_step_sums(reward.squeeze(-1), window, gamma=gamma, n_steps=n_steps)
    first = every[:, :k_steps]
    last = (mask.sum(-1, keepdim=True) - 1).clamp_min(0)
    steps = read([names.observation, names.action, names.planned], first.minimum(last))
    planned = torch.ones_like(first, dtype=torch.bool).unsqueeze(-1)
    if names.planned in steps.keys(True):
        planned = per_step(steps, names.planned, first.shape, flag=True)
    behind = {
        **_read_behind(read, first + window.steps, last, names, bootstrap),
        "return": total.unsqueeze(-1),
        "discount": discount.unsqueeze(-1),
        "mask": window.bootstrap.unsqueeze(-1),
    }
    batch_size = [mask.shape[0], k_steps]
    return TensorDict(
        {
            names.observation: steps.get(names.observation),
            names.action: steps.get(names.action),
            names.next_reward: reward[:, :k_steps],
            names.next_terminated: terminated[:, :k_steps],
            names.mask: (mask[:, :k_steps] & window.valid).unsqueeze(-1),
            names.planned: planned,
            BOOTSTRAP: TensorDict(behind, batch_size=batch_size),
        },
        batch_size=batch_size,
    )


def bootstrapped_return(parts: TensorDictBase, value: Tensor | None, names: SliceKeys) -> Tensor:
    """Add the discounted value behind the last reward to the rewards before it.

    Args:
        parts: from :func:`read_target_parts`.
        value: of what lies behind, ``[B, k, 1]``; ``None`` for 0.
        names: of the entries.

    Returns:
        ``[B, k, 1]``, 0 where there is no target.
    """
    behind = parts.get(BOOTSTRAP)
    target = behind.get("return")
    if value is not None:
        discounted = value.double() * behind.get("discount")
        target = target + torch.where(behind.get("mask"), discounted, 0.0)
    valid = parts.get(names.mask)
    return torch.where(valid, target, 0.0).to(parts.get(names.next_reward).dtype)


def _read_behind(
    read: Reader, end: Tensor, last: Tensor, names: SliceKeys, bootstrap: Bootstrap | None
) -> dict[NestedKey, Tensor]:
    """Read what is valued behind the last reward of each target, ``[B, k, ...]``.

    Args:
        read: of the slices.
        end: long ``[B, k]``, the first step of the slice that the target does not sum.
        last: long ``[B, 1]``, the last real step.
        names: of the entries.
        bootstrap: what is valued.
    """
    if bootstrap is None:
        return {}
    if bootstrap == "action":
        pair = read([names.observation, names.action], end.minimum(last))
        return {key: pair.get(key) for key in (names.observation, names.action)}
    outcome = read([names.next_observation], (end - 1).clamp_min(0))
    return {names.observation: outcome.get(names.next_observation)}
