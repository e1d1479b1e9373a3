"""Perceptrons over many rows: in pieces whose hidden layers stay in the cache of a CPU.

Products of all rows at once are bound by memory there. Pieces make large rollouts more than twice
as fast and change numbers by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_PIECE = 2048
"""Rows of a piece; measured for layers of 128 and 200."""


def pays_in_pieces(rows: Tensor) -> bool:
    """Return whether rows ``[..., N, in]`` are many, on a CPU, and no gradient is asked for."""
    if rows.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return rows.shape[-2] > _PIECE // 2


def in_pieces(network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Map ``[N, in]`` to ``[N, out]`` by a network that treats each row on its own."""
    if not pays_in_pieces(rows):
        return network(rows)
    return torch.cat([network(piece) for piece in rows.split(_PIECE)])


def run_layers(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Map ``[E, N, in]`` to ``[E, N, out]``, the rows of each member through its own layers.

    Each layer computes ``x @ weight + bias``, with the activation between layers. Many rows go
    member by member, in pieces.

    Args:
        x: ``[E, N, in]``.
        layers: weights ``[E, in, out]`` and biases ``[E, 1, out]``.
        activation: of the hidden layers.
    """
    if not pays_in_pieces(x) or (len(x) == 1 and x.shape[1] <= _PIECE):
        return _run(x, layers, activation, torch.baddbmm)
    pieces = []
    for e, rows in enumerate(x.unbind(0)):
        own = [(weight[e], bias[e]) for weight, bias in layers]
        pieces += [_run(piece, own, activation, torch.addmm) for piece in rows.split(_PIECE)]
    return torch.cat(pieces).reshape(*x.shape[:2], -1)


def _run(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    activation: Callable[[Tensor], Tensor],
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    *hidden, (weight, bias) = layers
    for hidden_weight, hidden_bias in hidden:
        x = activation(product(hidden_bias, x, hidden_weight))
    return product(bias, x, weight)
