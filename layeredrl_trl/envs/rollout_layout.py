"""Arrange imagined steps in TorchRL's rollout layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

from layeredrl_trl import keys


def as_rollout(
    following: Mapping[NestedKey, Tensor],
    known: Mapping[NestedKey, Tensor],
    actions: tuple[NestedKey, Tensor],
    batch: torch.Size,
    *,
    device: torch.device | None,
    set_truncated: bool,
) -> TensorDict:
    """Arrange steps as a TensorDict: state and action, and under "next" the outcome.

    Args:
        following: entries after each step, ``[N, H, ...]``.
        known: entries before the first step, ``[N, ...]``; missing ones are 0.
        actions: name and tensor ``[N, H, ...]``.
        batch: shape ``[...]`` of ``N`` elements.
        device: device of the TensorDict.
        set_truncated: set ``truncated`` and ``done`` on the last step.

    Returns:
        Batch ``[..., H]``. ``("next", key)`` and ``key`` are views of one tensor, one step apart.
    """
    action_key, action = actions
    both = {
        key: _with_first(known.get(key), x) for key, x in following.items() if key != keys.REWARD
    }
    after = dict(following) | {key: x[:, 1:] for key, x in both.items()}
    before = {key: x[:, :-1] for key, x in both.items()} | {action_key: action}
    if set_truncated:  # views of entries before steps do not contain the last one
        for key in (keys.TRUNCATED, keys.DONE):
            after[key][:, -1] = True
    options = {
        "batch_size": torch.Size([*batch, action.shape[1]]),
        "device": device,
        "names": [None] * len(batch) + ["time"],
    }
    after, before = (
        {key: x.reshape(*batch, *x.shape[1:]) for key, x in entries.items()}
        for entries in (after, before)
    )
    return TensorDict({**before, "next": TensorDict(after, **options)}, **options)


def _with_first(first: Tensor | None, following: Tensor) -> Tensor:
    """Put ``[N, ...]``, or zeros, before ``[N, H, ...]``."""
    if first is None:
        return torch.constant_pad_nd(following, [0, 0] * (following.ndim - 2) + [1, 0])
    return torch.cat([first.unsqueeze(1).to(following.dtype), following], 1)
