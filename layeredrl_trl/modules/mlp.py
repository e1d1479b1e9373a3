"""Multi-layer perceptrons: a single one, and one batched over ensemble members."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_trl.acceleration import in_pieces, run_layers
from layeredrl_trl.checks import check_count, check_counts, check_sizes
from layeredrl_trl.modules.outputs import dtype_of


class ConcatMLP(nn.Module):
    """A perceptron over the concatenation of its inputs' last dims.

    Args:
        in_dims: last dim of each positional input; an input of 0 dims is legal.
        out_dim: last dim of the output.
        hidden_sizes: width of each hidden layer.
        activation: class of the nonlinearity between layers.

    Raises:
        TypeError: if a size is no integer, ``in_dims`` or ``hidden_sizes`` no sequence, or
            ``activation`` makes no module.
        ValueError: if a size is below 1 (of ``in_dims``: below 0).
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dim: int,
        hidden_sizes: Sequence[int] = (128, 128),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.in_dims = tuple(in_dims)
        for i, dim in enumerate(self.in_dims):
            check_count(f"in_dims[{i}]", dim, least=0)
        check_count("out_dim", out_dim)
        check_sizes("hidden_sizes", hidden_sizes)
        sizes = [sum(self.in_dims), *hidden_sizes]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [_linear(size_in, size_out), make_activation("activation", activation)]
        self.layers = nn.Sequential(*layers, _linear(sizes[-1], out_dim))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map ``[..., in_dims[i]]`` for each input to ``[..., out_dim]``.

        Raises:
            ValueError: if the last dim of an input does not fit, or leading shapes differ.
        """
        x = self._join(*inputs)
        batch = x.shape[:-1]
        # as rows [N, in], because otherwise every layer flattens and restores them
        out = in_pieces(self._run, x.reshape(math.prod(batch), x.shape[-1]))
        return out.reshape(*batch, out.shape[-1])

    def _join(self, *inputs: Tensor) -> Tensor:
        """Check the inputs and concatenate them, ``[..., in]`` of the dtype of the layers."""
        dims = tuple(x.shape[-1] for x in inputs)
        if dims != self.in_dims:
            raise ValueError(f"expected inputs with last dims {self.in_dims}, got {dims}.")
        batch = inputs[0].shape[:-1]
        if any(x.shape[:-1] != batch for x in inputs[1:]):
            shapes = [list(x.shape) for x in inputs]
            raise ValueError(f"expected inputs of one leading shape, got {shapes}.")
        dtype = dtype_of(self)
        parts = [x.to(dtype) for x in inputs]
        parts = [x for x in parts if x.shape[-1] > 0] or parts[:1]  # a context is often empty
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def _run(self, rows: Tensor) -> Tensor:
        """Map rows ``[N, in]`` to ``[N, out_dim]``."""
        return self.layers(rows)


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
        TypeError: if a size is no integer, ``hidden_sizes`` no sequence, or ``activation`` makes no
            module.
        ValueError: if a size is below 1.

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
        check_counts(n_members=n_members, in_dim=in_dim, out_dim=out_dim)
        check_sizes("hidden_sizes", hidden_sizes)
        sizes = [in_dim, *hidden_sizes, out_dim]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for size_in, size_out in pairwise(sizes):
            bound = size_in**-0.5
            for tensors, rows in ((self.weights, size_in), (self.biases, 1)):
                own = torch.empty(n_members, rows, size_out, dtype=torch.float32)
                tensors.append(own.uniform_(-bound, bound))
        self.activation = make_activation("activation", activation)

    def forward(self, x: Tensor, member: Tensor | None = None) -> Tensor:
        """Map ``[E, N, in_dim]`` to ``[E, N, out_dim]``, row ``e`` through member ``e``.

        With ``member`` ``[G]``, map ``[G, N, in_dim]``, row ``g`` through member ``member[g]``.
        """
        layers = self.layers
        if member is not None:
            layers = [(w.index_select(0, member), b.index_select(0, member)) for w, b in layers]
        return run_layers(x, layers, self.activation)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight ``[E, in, out]`` and bias ``[E, 1, out]`` of each layer."""
        return list(zip(self.weights, self.biases, strict=True))


def make_activation(name: str, activation: Any) -> nn.Module:
    """Make a nonlinearity in float32 from its class, the argument ``name``.

    Raises:
        TypeError: if it is no class or function that makes a module without arguments.
    """
    expected = f"{name} must be a class of modules, such as torch.nn.SiLU"
    kind = type(activation).__name__
    if isinstance(activation, nn.Module):
        raise TypeError(f"{expected}, got the module {activation}.")
    if not callable(activation):
        raise TypeError(f"{expected}, got {activation!r} ({kind}).")
    try:
        made = activation()
    except TypeError as error:
        raise TypeError(f"{expected}, got {activation!r} ({kind}): {error}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"{expected}, but {activation!r} makes {made!r}.")
    return made.to(torch.float32)


def _linear(size_in: int, size_out: int) -> nn.Linear:
    return nn.Linear(size_in, size_out, dtype=torch.float32)
