"""How good predictions are: explained variance, correlation, and scores of a predicted event.

A score that the data cannot tell is NaN, for example if the reward never varies or the event never
happens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A standard deviation below this fraction of the root mean square is float32's rounding error.
_ROUNDING = 1e-6


class EventScores(NamedTuple):
    """Scores of the predicted probability of an event.

    Attributes:
        precision: of the events predicted, the fraction that happened; NaN if none was predicted.
        recall: of the events that happened, the fraction that was predicted; NaN if none did.
        auc: area under the receiver operating characteristic: how probable it is that an event got
            a higher predicted probability than a non-event; NaN unless there are both.
    """

    precision: Tensor
    recall: Tensor
    auc: Tensor


def varies(x: Tensor) -> Tensor:
    """Tell whether values vary by more than float32's rounding of a constant.

    Returns:
        bool ``[...]`` for ``x`` ``[N, ...]``; False if ``N`` is 0.
    """
    return exceeds_rounding(x, x.double().square().mean(0).sqrt())


def exceeds_rounding(x: Tensor, size: Tensor) -> Tensor:
    """Tell whether ``x`` varies by more than float32's rounding of numbers of a given size.

    Args:
        x: ``[N, ...]``.
        size: magnitude of the numbers from which ``x`` was computed, ``[...]``; so is the result.
    """
    return _variance(x.double()).sqrt() > _ROUNDING * size


def explained_variance(target: Tensor, prediction: Tensor) -> Tensor:
    """Compute ``1 - Var(target - prediction) / Var(target)`` of values ``[N]``.

    1 is perfect, 0 is no better than a constant; a constant offset makes no difference.

    Returns:
        float64 scalar; NaN where the target does not vary.

    Example:
        >>> explained_variance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
        tensor(1., dtype=torch.float64)
    """
    target, prediction = target.double(), prediction.double()
    unexplained = _variance(target - prediction) / _variance(target)
    return torch.where(varies(target), 1 - unexplained, torch.nan)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Compute Pearson's correlation of ``x`` and ``y``, both ``[N]``.

    Returns:
        float64 scalar; NaN where ``x`` or ``y`` does not vary.
    """
    x, y = x.double(), y.double()
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    value = covariance / (_variance(x) * _variance(y)).sqrt()
    return torch.where(varies(x) & varies(y), value, torch.nan)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Compute Spearman's correlation of ``x`` and ``y``, both ``[N]``: that of their ranks.

    Returns:
        float64 scalar; NaN where ``x`` or ``y`` does not vary.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 11.0]))
        tensor(1., dtype=torch.float64)
    """
    value = correlation(average_rank(x), average_rank(y))
    return torch.where(varies(x) & varies(y), value, torch.nan)


def average_rank(x: Tensor) -> Tensor:
    """Rank values ``[N]`` from 0 on; equal values share the mean of their ranks.

    Returns:
        float64 ``[N]``.

    Example:
        >>> average_rank(torch.tensor([5.0, 1.0, 5.0]))
        tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    x = x.contiguous()
    ordered = x.sort().values
    first = torch.searchsorted(ordered, x)
    last = torch.searchsorted(ordered, x, right=True) - 1
    return (first + last).double() / 2


def event_scores(prob: Tensor, happened: Tensor, threshold: float = 0.5) -> EventScores:
    """Score the predicted probability ``[N]`` of an event that ``happened`` or not, bool ``[N]``.

    The event is predicted where ``prob`` is above the threshold.

    Returns:
        :class:`EventScores` of float64 scalars, all NaN if any ``prob`` is NaN.

    Example:
        >>> prob, happened = torch.tensor([0.9, 0.6, 0.2]), torch.tensor([True, False, False])
        >>> [x.item() for x in event_scores(prob, happened)]
        [0.5, 1.0, 1.0]
    """
    predicted = prob > threshold
    hits = (predicted & happened).sum().double()
    n_events = happened.sum()
    n_pairs = n_events * (~happened).sum()
    # Mann-Whitney: the rank sum counts the pairs in which the event has the higher probability.
    ordered_pairs = (average_rank(prob) * happened).sum() - n_events * (n_events - 1) / 2
    scores = (hits / predicted.sum(), hits / n_events, ordered_pairs / n_pairs)
    return EventScores(*(torch.where(prob.isnan().any(), torch.nan, x) for x in scores))


def _variance(x: Tensor) -> Tensor:
    """Compute the variance over ``N`` without Bessel's correction; NaN if ``N`` is 0."""
    return (x - x.mean(0)).square().mean(0)
