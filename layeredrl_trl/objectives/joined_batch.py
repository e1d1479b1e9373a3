"""What a loss learns from, and the same of all ranks: what statistics and means are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layeredrl_trl.ranks import gather_rows


class Steps(NamedTuple):
    """Steps of slices, from which reward and value learn.

    Attributes:
        latent: ``[B, k, D]``.
        context: ``[B, k, C]``.
        action: ``[B, k, A]``, or indices ``[B, k]``.
        reward: ``[B, k, 1]``; ``None`` if nothing is learned of it.
        valid: False on padding, bool ``[B, k, 1]``; ``None``: every step is real.
        counts: where the value learns, bool ``[B, k, 1]``; ``None``: everywhere.
    """

    latent: Tensor
    context: Tensor
    action: Tensor
    reward: Tensor | None
    valid: Tensor | None
    counts: Tensor | None


class Changes(NamedTuple):
    """Transitions, from which dynamics and standardizer learn.

    Attributes:
        latent: ``[N, D]``.
        context: ``[N, C]``.
        action: ``[N, A]``, or indices ``[N]``.
        next_latent: ``[N, D]``.
        counts: whether any member learns from it, bool ``[N]``; ``None``: from all.
        weight: ``[N, 1]`` or for each member ``[N, E]``; ``None``: all 1. Of all ranks: its mean
            over members, ``[N, 1]``.
    """

    latent: Tensor
    context: Tensor
    action: Tensor
    next_latent: Tensor
    counts: Tensor | None
    weight: Tensor | None


def with_all_ranks(
    steps: Steps, changes: Changes
) -> tuple[tuple[Steps, Changes], tuple[Steps, Changes]]:
    """Join what this rank learns from with that of all others, without gradient.

    Returns:
        What this rank learns from, with flags and weights written out that were ``None``, because
        on other ranks they may not be; and the same of all ranks.
    """
    flags = torch.ones_like(steps.latent[..., :1], dtype=torch.bool)
    valid, learned = (flags if x is None else x for x in (steps.valid, steps.counts))
    weight = changes.weight
    if weight is None:
        weight = torch.ones_like(changes.latent[..., :1], dtype=torch.float32)
    counts = (weight > 0).any(-1) if changes.counts is None else changes.counts
    steps = steps._replace(valid=valid, counts=learned)
    changes = changes._replace(counts=counts, weight=weight)
    own = *steps, *changes[:-1], weight.mean(-1, keepdim=True)
    rows = iter(gather_rows(*(x.detach() for x in own if x is not None)))
    joined = [None if x is None else next(rows) for x in own]
    n = len(steps)
    return (steps, changes), (Steps._make(joined[:n]), Changes._make(joined[n:]))
