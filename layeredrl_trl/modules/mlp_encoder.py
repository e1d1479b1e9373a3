"""A nonlinear encoder."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey
from torch import nn

from layeredrl_trl import keys
from layeredrl_trl.modules.learned_encoder import LearnedEncoder
from layeredrl_trl.modules.mlp import ConcatMLP


class MLPEncoder(LearnedEncoder):
    """MLPs: from the changing dims to the latent state, from the others to the context.

    ``latent = f(x_changing)`` and ``context = g(x_constant)`` with ``x`` the standardised
    observation; while no dim is known to be constant, the context is ``g(0)`` for all observations.
    :class:`~layeredrl_trl.modules.LearnedEncoder` says which dims are which, also before any data
    and with ``context_dim=0``; it also describes what is read, written and raised.

    Args:
        obs_shape: shape of one observation; an int means ``(int,)``.
        latent_state_dim, context_dim: ``D``, at least 1, and ``C``, at least 0.
        hidden_sizes, activation: width of each hidden layer of both MLPs, and the class of the
            nonlinearity.
        standardize, freeze_after, in_keys, out_keys: of the base class.

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
        def make_net(in_dim: int, out_dim: int) -> ConcatMLP:
            return ConcatMLP((in_dim,), out_dim, hidden_sizes, activation)

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
