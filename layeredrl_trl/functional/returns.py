"""N-step returns on rectangular, masked slices.

A slice is a window of consecutive steps of one episode. Its mask is True on real steps and False on
the padding after the episode's end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NStepWindow(NamedTuple):
    """The end of the n-step target of each of the first ``k`` steps of a slice.

    Attributes:
        steps: number of summed rewards, in ``0..n``, ``[..., k]``.
        bootstrap: whether a bootstrap value follows the last reward, bool ``[..., k]``.
        valid: whether the step has a target, bool ``[..., k]``.
        summable: whether a reward of the slice may be summed, bool ``[..., T]``.
        continues: bool ``[..., T]``: a sum that starts earlier stops before a step where it is
            False.
    """

    steps: Tensor
    bootstrap: Tensor
    valid: Tensor
    summable: Tensor
    continues: Tensor


def n_step_window(
    terminated: Tensor,
    mask: Tensor,
    k_steps: int,
    n_steps: int,
    *,
    next_action: bool = False,
    planned: Tensor | None = None,
) -> NStepWindow:
    """Find the end of each n-step target: ``n`` steps later, or earlier where something ends it.

    A target ends in the first termination, and does not bootstrap there. One that ends at a
    truncation or in an unfinished episode bootstraps with the value of the state after the last
    step. No action is stored for that state, so a Q-function (``next_action``) bootstraps one step
    earlier, at the last stored pair, and the last step itself has no target.

    A target also ends before the first step after its own that was not planned, and bootstraps
    there, so that no target holds rewards of random exploration.

    Args:
        terminated: bool ``[..., T]``; within a slice, too: there a relabelled goal was reached.
        mask: bool ``[..., T]``, True on real steps, which come first.
        k_steps: number of first steps that get a target.
        n_steps: maximum number of rewards in a target. ``T`` must be at least
            ``k_steps + n_steps - 1``, with ``next_action`` at least ``k_steps + n_steps``.
        next_action: bootstrap from the next stored (state, action) pair.
        planned: bool ``[..., T]``, False where the action was random; ``None``: all True.

    Returns:
        An :class:`NStepWindow`. The bootstrap value of step ``j`` is that of the state after step
        ``j + steps - 1``; with ``next_action`` it is that of the pair at step ``j + steps``.

    Raises:
        ValueError: if ``k_steps`` or ``n_steps`` is below 1, or the slice is too short.
    """
    needed = k_steps + n_steps - (0 if next_action else 1)
    if k_steps < 1 or n_steps < 1:
        raise ValueError(f"k_steps and n_steps must be at least 1, got {k_steps} and {n_steps}.")
    if mask.shape[-1] < needed:
        raise ValueError(
            f"k_steps={k_steps} and n_steps={n_steps} need slices of {needed} steps, "
            f"got {mask.shape[-1]}."
        )
    length = mask.sum(-1, keepdim=True)
    terminated = terminated & mask
    summable = mask
    n_rewards = length
    if next_action:
        last_terminated = terminated.gather(-1, (length - 1).clamp_min(0))
        n_rewards = torch.where(last_terminated, length, (length - 1).clamp_min(0))
        step = torch.arange(mask.shape[-1], device=mask.device)
        summable = mask & (step < n_rewards)
    continues = torch.nn.functional.pad(~terminated[..., :-1], (1, 0), value=True)
    if planned is not None:
        continues = continues & planned
    step = torch.arange(k_steps, device=mask.device)
    steps = (n_rewards - step).clamp(0, n_steps).minimum(_steps_before_stop(continues, k_steps))
    last = (step + steps - 1).clamp_min(0)
    return NStepWindow(
        steps=steps,
        bootstrap=~terminated.gather(-1, last),
        valid=step < n_rewards,
        summable=summable,
        continues=continues,
    )


def discounted_window_sum(
    reward: Tensor, gamma: float, n_steps: int, continues: Tensor | None = None
) -> Tensor:
    r"""Sum the next ``n_steps`` rewards of every step: ``G_t = sum_{i<n} gamma^i r_{t+i}``.

    A sum stops before the first step after its own that does not continue it.

    Combines sums over 1, 2, 4, ... rewards by the binary digits of ``n_steps``, in ``O(T log n)``.
    Differences of a cumulative sum would cost ``O(T)``, but divide by ``gamma^t``, which loses all
    precision for small ``gamma``.

    Args:
        reward: ``[..., T]``; rewards after the last step count as 0.
        gamma: discount, in [0, 1].
        n_steps: number of rewards in a sum, at least 1.
        continues: bool ``[..., T]``; ``None``: all True.

    Returns:
        ``[..., T]``, of the reward's dtype.

    Example:
        >>> discounted_window_sum(torch.tensor([1.0, 2.0, 4.0]), 0.5, 2)
        tensor([2., 4., 4.])
    """
    continues = torch.ones_like(reward, dtype=torch.bool) if continues is None else continues
    total, window, size, summed = torch.zeros_like(reward), reward, 1, 0
    # whether a sum reaches the step after its window, and after what is summed
    goes_on, reaches = _ahead(continues, 1), torch.ones_like(continues)
    while size <= n_steps:
        if n_steps & size:
            total = total + gamma**summed * torch.where(reaches, _ahead(window, summed), 0.0)
            reaches = reaches & _ahead(goes_on, summed)
            summed += size
        if 2 * size <= n_steps:
            window = window + gamma**size * torch.where(goes_on, _ahead(window, size), 0.0)
            goes_on = goes_on & _ahead(goes_on, size)
        size *= 2
    return total


def n_step_sums(
    reward: Tensor, window: NStepWindow, *, gamma: float, n_steps: int
) -> tuple[Tensor, Tensor]:
    r"""Compute the sum of rewards of each n-step target, and the discount of its bootstrap value.

    Args:
        reward: ``[..., T]``; may be NaN where it is not summable.
        window: from :func:`n_step_window`, for the same ``n_steps``.
        gamma: discount, in [0, 1].
        n_steps: maximum number of rewards in a target.

    Returns:
        ``sum_{i<l} gamma^i r_{j+i}`` and ``gamma^l`` with ``l = window.steps``, float64
        ``[..., k]``.
    """
    summable = torch.where(window.summable, reward, 0.0).double()
    total = discounted_window_sum(summable, gamma, n_steps, window.continues)
    total = total[..., : window.steps.shape[-1]]
    base = torch.tensor(gamma, dtype=total.dtype, device=reward.device)
    return total, torch.pow(base, window.steps)


def add_bootstrap(total: Tensor, discount: Tensor, value: Tensor) -> Tensor:
    """Compute ``total + discount * value`` from sums of :func:`n_step_sums`; float64 ``[...]``.

    Args:
        total: discounted sum of rewards, float64 ``[...]``.
        discount: factor of the value, float64 ``[...]``.
        value: bootstrap value, 0 where there is none, ``[...]``.
    """
    return torch.addcmul(total, discount, value.double())


def _steps_before_stop(continues: Tensor, k_steps: int) -> Tensor:
    """Count the steps, the own one included, until one after it does not continue; ``[..., k]``.

    Where none follows, the number reaches beyond the slice.
    """
    length = continues.shape[-1]
    step = torch.arange(length, device=continues.device)
    stops = torch.where(continues, length, step).expand_as(continues)
    following = stops.flip(-1).cummin(-1).values.flip(-1)  # the first at or after each step
    following = torch.nn.functional.pad(following[..., 1:], (0, 1), value=length)[..., :k_steps]
    return torch.where(following < length, following - step[:k_steps], length)


def _ahead(x: Tensor, steps: int) -> Tensor:
    """Shift ``x`` in time so that entry ``t`` holds ``x[t + steps]``, with 0 at the end."""
    if steps == 0:
        return x
    return torch.nn.functional.pad(x[..., steps:], (0, min(steps, x.shape[-1])))
