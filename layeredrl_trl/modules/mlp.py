"""Multi-layer perceptrons: a plain one, and one batched over ensemble members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook

from layeredrl_trl.checks import check_sizes

_PIECE = 2048
"""Rows that go through all layers at once on a CPU, where no gradient is asked for; measured."""


class ConcatMLP(nn.Module):
    """A perceptron over the concatenation of its inputs' last dims.

    Args:
        in_dims: last dim of each positional input; an input of 0 dims is legal.
        out_dim: last dim of the output.
        hidden_sizes: width of each hidden layer.
        activation: class of the nonlinearity between layers.

    Raises:
        TypeError: if ``hidden_sizes`` is no sequence of integers.
        ValueError: if one of them is below 1.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dim: int,
        hidden_sizes: Sequence[int] = (128, 128),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        check_sizes("hidden_sizes", hidden_sizes)
        self.in_dims = tuple(in_dims)
        sizes = [sum(self.in_dims), *hidden_sizes]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], out_dim))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map ``[..., in_dims[i]]`` for each input to ``[..., out_dim]``.

        Raises:
            ValueError: if the last dim of an input does not fit, or leading shapes differ.
        """
        dims = tuple(x.shape[-1] for x in inputs)
        if dims != self.in_dims:
            raise ValueError(f"expected inputs with last dims {self.in_dims}, got {dims}.")
        batch = inputs[0].shape[:-1]
        if any(x.shape[:-1] != batch for x in inputs[1:]):
            shapes = [list(x.shape) for x in inputs]
            raise ValueError(f"expected inputs of one leading shape, got {shapes}.")
        parts = [x.to(torch.float32) for x in inputs]
        parts = [x for x in parts if x.shape[-1] > 0] or parts[:1]  # a context is often empty
        x = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        # rows [N, in], else every layer would make them so, and undo it, backward too
        rows = x.reshape(batch.numel(), x.shape[-1])
        if not pays_in_pieces(rows):
            out = self._run(rows)
        else:
            out = torch.cat([self._run(piece) for piece in rows.split(_PIECE)])
        return out.reshape(*batch, out.shape[-1])

    def _run(self, rows: Tensor) -> Tensor:
        layers = self.layers
        if torch.compiler.is_compiling() or type(layers) is not nn.Sequential or _is_hooked(layers):
            return layers(rows)
        before = None
        for layer in layers:  # to call a module takes a third of the time of a small layer
            if type(layer) is nn.Linear:
                rows = linear(rows, layer.weight, layer.bias)
            else:  # what a linear layer gave, nobody else has
                rows = (in_place(layer) if type(before) is nn.Linear else layer)(rows)
            before = layer
        return rows


class EnsembleMLP(nn.Module):
    """``E`` perceptrons of one shape, evaluated by batched matrix products.

    Each member starts from its own draw of ``nn.Linear``'s initialisation.

    Args:
        n_members: ``E``.
        in_dim: last dim of the input.
        out_dim: last dim of the output.
        hidden_sizes: width of each hidden layer.
        activation: class of the nonlinearity between layers.

    Raises:
        TypeError: if ``hidden_sizes`` is no sequence of integers.
        ValueError: if one of them is below 1.

    Example:
        >>> EnsembleMLP(5, 3, 2, (8,))(torch.zeros(5, 7, 3)).shape
        torch.Size([5, 7, 2])
    """

    def __init__(
        self,
        n_members: int,
        in_dim: int,
        out_dim: int,
        hidden_sizes: Sequence[int] = (128, 128),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        check_sizes("hidden_sizes", hidden_sizes)
        sizes = [in_dim, *hidden_sizes, out_dim]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for size_in, size_out in pairwise(sizes):
            bound = size_in**-0.5
            self.weights.append(torch.empty(n_members, size_in, size_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(n_members, 1, size_out).uniform_(-bound, bound))
        self.activation = activation()

    def forward(self, x: Tensor, member: Tensor | None = None) -> Tensor:
        """Map ``[E, N, in_dim]`` to ``[E, N, out_dim]``, row ``e`` through member ``e``.

        With ``member`` ``[G]`` ``[G, N, in_dim]``, row ``g`` through that member.
        """
        return run_layers(x, layers_of(self.layers, member), in_place(self.activation))

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight ``[E, in, out]`` and bias ``[E, 1, out]`` of each layer."""
        # a ParameterList asks each of its entries for by name
        weights, biases = self.weights._parameters.values(), self.biases._parameters.values()
        layers: list[Any] = list(zip(weights, biases, strict=True))
        return layers


def layers_of(
    layers: Sequence[tuple[Tensor, Tensor]], member: Tensor | None
) -> Sequence[tuple[Tensor, Tensor]]:
    """Give the layers ``[E, ...]`` of each of the members ``[G]``; ``None``: as they are."""
    if member is None:
        return layers
    return [(w.index_select(0, member), b.index_select(0, member)) for w, b in layers]


def run_layers(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Send rows through the layers of their member.

    Many rows without gradient on a CPU go member by member, in pieces whose hidden layers stay in
    the cache: several times faster than batched products of all rows, which there are bound by
    memory.

    Args:
        x: ``[E, N, in]``.
        layers: weights ``[E, in, out]`` and biases ``[E, 1, out]``.
        activation: between them, see :func:`in_place`.

    Returns:
        ``[E, N, out]``.
    """
    if torch.compiler.is_compiling():
        return _run(x, layers, activation, _product)
    if not pays_in_pieces(x) or (len(x) == 1 and x.shape[1] <= _PIECE):
        return _run(x, layers, activation, _batched_product)
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


def _batched_product(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``baddbmm``; to one output per member a sum takes a CPU a fifth of its time, backward too."""
    if weight.shape[-1] > 1 or len(weight) == 1 or x.is_cuda:
        return torch.baddbmm(bias, x, weight)
    return (x * weight.mT).sum(-1, keepdim=True) + bias


def _product(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``baddbmm``, which generated code would call; this it joins with the nonlinearity."""
    return torch.bmm(x, weight) + bias


def pays_in_pieces(x: Tensor) -> bool:
    """Whether rows ``[..., N, in]`` are many, on a CPU, and no gradient is asked for."""
    if x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.shape[-2] > _PIECE // 2


def _is_hooked(layers: nn.Sequential) -> bool:
    """Whether somebody looks at what goes in or comes out of layers, or has changed one."""
    return bool(_has_any_global_hook()) or any(
        x._forward_hooks
        or x._forward_pre_hooks
        or x._backward_hooks
        or x._backward_pre_hooks
        or "forward" in vars(x)
        for x in (layers, *layers)
    )


def in_place(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """Give the same nonlinearity, but overwriting what it gets, where torch has such a one.

    Only where no gradient is asked for. It saves a CPU a third of the time of the nonlinearity.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return activation
    is_plain = type(activation).__module__.startswith("torch.nn.") and not (
        activation._forward_hooks or activation._forward_pre_hooks
    )
    if not is_plain or not hasattr(activation, "inplace"):
        return activation
    twin = activation.__new__(type(activation))
    twin.__dict__.update(activation.__dict__, inplace=True)  # a tenth of the time of copy.copy
    return twin.forward
