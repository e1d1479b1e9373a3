"""Multi-layer perceptrons: a plain one, and one batched over ensemble members."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from layeredrl_trl.checks import check_sizes


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
        if any(x.shape[:-1] != inputs[0].shape[:-1] for x in inputs):
            shapes = [list(x.shape) for x in inputs]
            raise ValueError(f"expected inputs of one leading shape, got {shapes}.")
        return self.layers(torch.cat([x.to(torch.float32) for x in inputs], -1))


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

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[E, N, in_dim]`` to ``[E, N, out_dim]``, row ``e`` through member ``e``."""
        # a ParameterList asks each of its entries for by name
        weights, biases = self.weights._parameters.values(), self.biases._parameters.values()
        activation = self.activation if torch.is_grad_enabled() else in_place(self.activation)
        last = len(weights) - 1
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i < last:
                x = activation(x)
        return x


def in_place(activation: nn.Module) -> nn.Module:
    """Give the same nonlinearity, but overwriting what it gets, where there is such a one.

    Only where no gradient is asked for. It saves a CPU a third of the time of the nonlinearity.
    """
    if not hasattr(activation, "inplace"):
        return activation
    activation = copy.copy(activation)
    activation.inplace = True
    return activation
