"""A nonlinear encoder."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey
from torch import nn

from layeredrl_trl import keys
from layeredrl_trl.modules.learned_encoder import LearnedEncoder
from layeredrl_trl.modules.mlp import ConcatMLP


class MLPEncoder(LearnedEncoder):
    """Perceptrons: of the changing dims to the latent state, of the others to the context.

    ``latent = f(x_changing)`` and ``context = g(x_constant)`` with ``x`` the standardised
    observation; where no dim is known to be constant, the context is ``g(0)``, the same for all.
    See :class:`~layeredrl_trl.modules.LearnedEncoder` for which dim is which, also before any data
    and with ``context_dim=0``.

    Args:
        obs_shape: shape of one observation; an int means ``(int,)``.
        latent_state_dim: ``D``, at least 1.
        context_dim: ``C``, at least 0.
        hidden_sizes: width of each hidden layer, of both perceptrons.
        activation: class of the nonlinearity.
        standardize: shift and scale the inputs by running moments of the observations.
        freeze_after: number of statistics updates after which the moments do not move any more;
            ``None``: never.
        in_keys: of the observation.
        out_keys: of the latent state and the context.

    Reads:
        ``observation`` ``[..., *obs_shape]``; cast to float32.

    Writes:
        ``latent`` ``[..., D]`` and ``context`` ``[..., C]``.

    Raises:
        ValueError: if a dim or ``freeze_after`` is out of its range.

    Example:
        >>> import torch
        >>> latent, context = MLPEncoder(5, 2, 1, hidden_sizes=(32,)).encode(torch.zeros(4, 5))
        >>> latent.shape, context.shape
        (torch.Size([4, 2]), torch.Size([4, 1]))
    """

    def __init__(
        self,
        obs_shape: int | Sequence[int],
        latent_state_dim: int,
        context_dim: int,
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        activation: type[nn.Module] = nn.SiLU,
        standardize: bool = True,
        freeze_after: int | None = None,
        in_keys: Sequence[NestedKey] = (keys.OBSERVATION,),
        out_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT),
    ) -> None:
        super().__init__(
            obs_shape,
            latent_state_dim,
            context_dim,
            lambda in_dim, out_dim: ConcatMLP((in_dim,), out_dim, hidden_sizes, activation),
            standardize=standardize,
            freeze_after=freeze_after,
            in_keys=in_keys,
            out_keys=out_keys,
        )
