"""N-step value targets of the first steps of slices.

Sums of rewards need no network and can be computed for many optimisation steps at once
(:func:`n_step_returns`); each step then adds the bootstrap value (:func:`value_target`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_trl.functional import add_bootstrap, n_step_sums, n_step_window
from layeredrl_trl.objectives.batch import NStepReturns, Slices


def n_step_returns(
    slices: Slices, *, k_steps: int, n_steps: int, gamma: float, needs_action: bool
) -> Slices:
    r"""Cut slices to their first ``k`` steps, and sum the next ``n`` rewards of each step.

    This is the sum in ``G_j = sum_{i<l} gamma^i r_{j+i} + gamma^l (1 - terminated) V``, with ``l``
    the smaller of ``n`` and the steps left in the episode. A terminated end adds no value; a
    truncated or unfinished end adds the value of the observation after the last step. No action is
    stored for that observation, so with a Q-function the sum ends one step earlier, at the last
    stored pair, and the last step itself has no target. A sum also ends before the first step after
    its own that was not planned, and adds the value of the observation there (for a Q-function: of
    the pair stored there).

    Args:
        slices: ``[B, T]`` with ``T`` at least ``k + n - 1``, or one more with ``needs_action``.
        k_steps: ``k``.
        n_steps: ``n``, maximum number of rewards in a target.
        gamma: discount.
        needs_action: whether the value is a Q-function.

    Returns:
        slices ``[B, k]`` with ``returns``.

    Raises:
        ValueError: if the slices are too short.
    """
    mask = torch.ones_like(slices.terminated) if slices.mask is None else slices.mask
    mask = mask.squeeze(-1)
    window = n_step_window(
        slices.terminated.squeeze(-1),
        mask,
        k_steps,
        n_steps,
        next_action=needs_action,
        planned=None if slices.planned is None else slices.planned.squeeze(-1),
    )
    valid = mask[:, :k_steps] & window.valid
    total, discount = n_step_sums(slices.reward.squeeze(-1), window, gamma=gamma, n_steps=n_steps)
    end = torch.arange(k_steps, device=mask.device) + window.steps  # the first step not summed
    if needs_action:
        observation, action = _at(slices.observation, end), _at(slices.action, end)
    else:
        observation, action = _at(slices.next_observation, (end - 1).clamp_min(0)), None
    returns = NStepReturns(
        total=torch.where(valid, total, 0.0).unsqueeze(-1),
        discount=discount.unsqueeze(-1),
        bootstraps=(window.bootstrap & valid).unsqueeze(-1),
        observation=observation,
        action=action,
        exists=valid.unsqueeze(-1) if needs_action else None,
    )
    first = Slices(*(None if x is None else x[:, :k_steps] for x in slices[:-1]))
    return first._replace(mask=mask[:, :k_steps].unsqueeze(-1), returns=returns)


def value_target(slices: Slices, value: Tensor) -> Tensor:
    """Add ``V`` of ``returns.observation``, 0 where it does not count, to the sums of rewards.

    Takes slices from :func:`n_step_returns` and ``value`` ``[B, k, 1]``. Returns ``[B, k, 1]`` of
    the reward's dtype, 0 where there is no target.
    """
    returns = slices.returns
    return add_bootstrap(returns.total, returns.discount, value).to(slices.reward.dtype)


def _at(x: Tensor, step: Tensor) -> Tensor:
    """Take ``[B, T, ...]`` at steps ``[B, k]``; ``[B, k, ...]``."""
    return x[torch.arange(len(x), device=x.device)[:, None], step]
