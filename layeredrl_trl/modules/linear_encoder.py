"""A linear encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from tensordict import NestedKey
from torch import nn

from layeredrl_trl import keys
from layeredrl_trl.modules.learned_encoder import LearnedEncoder


class LinearEncoder(LearnedEncoder):
    """Linear maps: from the changing dims to the latent state, from the others to the context.

    ``latent = A x_changing`` and ``context = B x_constant`` with ``x`` the standardised
    observation. :class:`~layeredrl_trl.modules.LearnedEncoder` says which dims are which, also
    before any data and with ``context_dim=0``; it also describes what is read, written and raised.

    Args:
        obs_shape: shape of one observation; an int means ``(int,)``.
        latent_state_dim, context_dim: ``D``, at least 1, and ``C``, at least 0.
        standardize, freeze_after, in_keys, out_keys: of the base class.

    Reference:
        LayeredRL's ``EncoderNet``. Deviations: this encoder standardises by default, and before any
        data all dims feed the latent state instead of the context.

    Example:
        >>> import torch
        >>> latent, context = LinearEncoder(5, 2, 1).encode(torch.zeros(4, 5))
        >>> latent.shape, context.shape
        (torch.Size([4, 2]), torch.Size([4, 1]))
    """

    def __init__(
        self,
        obs_shape: int | Sequence[int],
        latent_state_dim: int,
        context_dim: int,
        *,
        standardize: bool = True,
        freeze_after: int | None = None,
        in_keys: Sequence[NestedKey] = (keys.OBSERVATION,),
        out_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT),
    ) -> None:
        make_net = partial(nn.Linear, bias=False, dtype=torch.float32)
        super().__init__(
            obs_shape,
            latent_state_dim,
            context_dim,
            make_net,
            standardize=standardize,
            freeze_after=freeze_after,
            in_keys=in_keys,
            out_keys=out_keys,
        )
