"""Encoders: from an observation to a latent state and a context.

The dynamics model predicts the latent state from step to step; the context is constant in an
episode.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from numbers import Integral

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count, check_keys, check_sizes
from layeredrl_trl.modules.outputs import check_output


class Encoder(TensorDictModuleBase, abc.ABC):
    """Base class: turn an observation into a latent state and a context.

    Args:
        obs_shape: shape of one observation; an int means ``(int,)``.
        latent_state_dim: ``D``, at least 1.
        context_dim: ``C``, at least 0.
        in_keys, out_keys: keys of the observation, and of the latent state and the context.

    Reads:
        ``observation`` ``[..., *obs_shape]``; cast to float32.

    Writes:
        ``latent`` ``[..., D]`` and ``context`` ``[..., C]``.

    Raises:
        TypeError: if a dim is no integer, or ``in_keys`` or ``out_keys`` are no sequences of keys.
        ValueError: if a dim is out of its range, or there are not one key in ``in_keys`` and two in
            ``out_keys``.
    """

    def __init__(
        self,
        obs_shape: int | Sequence[int],
        latent_state_dim: int,
        context_dim: int,
        *,
        in_keys: Sequence[NestedKey] = (keys.OBSERVATION,),
        out_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT),
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_count(f"{name}: latent_state_dim", latent_state_dim)
        check_count(f"{name}: context_dim", context_dim, least=0)
        check_keys(f"{name}: in_keys", in_keys, 1)
        check_keys(f"{name}: out_keys", out_keys, 2)
        self.obs_shape = as_shape(obs_shape)
        self.latent_state_dim = latent_state_dim
        self.context_dim = context_dim
        self.in_keys = list(in_keys)
        self.out_keys = list(out_keys)

    @property
    def can_decode(self) -> bool:
        """Whether :meth:`decode` works."""
        return type(self).decode is not Encoder.decode

    def encode(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ``[..., *obs_shape]`` to ``latent`` ``[..., D]`` and ``context`` ``[..., C]``.

        Both are float32, whatever :meth:`_encode` returns.

        Raises:
            TypeError: if :meth:`_encode` does not return a pair of tensors.
            ValueError: if the trailing shape is not ``obs_shape``, or a shape that :meth:`_encode`
                returns does not fit.
        """
        flat = self._flatten(observation, "observation")
        out, name = self._encode(flat), type(self).__name__
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise TypeError(f"{name}._encode must return (latent, context), got {out!r}.")
        latent, context = out
        check_output(f"{name}: latent", latent, (*flat.shape[:-1], self.latent_state_dim))
        check_output(f"{name}: context", context, (*flat.shape[:-1], self.context_dim))
        return latent.to(torch.float32), context.to(torch.float32)

    @property
    def has_statistics(self) -> bool:
        """Whether :meth:`update_statistics` does anything."""
        return type(self).update_statistics is not Encoder.update_statistics

    def update_statistics(
        self, observation: Tensor, next_observation: Tensor, mask: Tensor | None = None
    ) -> None:
        """Update the running statistics with real transitions; by default there are none.

        The loss calls it once per step in training mode. It may only change buffers, so that the
        effect of a batch with non-finite gradients can be undone, and it must not change a tensor
        that is saved for the backward pass.

        Args:
            observation: ``[..., *obs_shape]``.
            next_observation: one step later in the same episode, ``[..., *obs_shape]``.
            mask: bool ``[...]``; transitions where it is False do not count.
        """

    def decode(self, latent: Tensor, context: Tensor) -> Tensor:
        """Reconstruct ``[..., *obs_shape]`` from ``latent`` ``[..., D]``, ``context`` ``[..., C]``.

        Raises:
            NotImplementedError: if the encoder loses information (:attr:`can_decode` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot decode.")

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``latent`` and ``context`` for the ``observation`` of ``tensordict``."""
        latent, context = self.encode(tensordict[self.in_keys[0]])
        return tensordict.set(self.out_keys[0], latent).set(self.out_keys[1], context)

    @abc.abstractmethod
    def _encode(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Encode flattened float32 observations ``[..., O]`` to a latent state and a context."""

    def _flatten(self, observation: Tensor, name: str) -> Tensor:
        """Check ``[..., *obs_shape]`` and return it as float32 ``[..., O]``."""
        n_batch_dims = observation.ndim - len(self.obs_shape)
        if n_batch_dims < 0 or observation.shape[n_batch_dims:] != self.obs_shape:
            raise ValueError(
                f"{name}: expected shape [..., {', '.join(map(str, self.obs_shape))}], "
                f"got {list(observation.shape)}."
            )
        batch = observation.shape[:n_batch_dims]
        return observation.to(torch.float32).reshape(*batch, self.obs_shape.numel())


class IdentityEncoder(Encoder):
    """Use the observation as the latent state; the context is empty.

    Observations of more than one dim are flattened.

    Args:
        obs_shape: shape of one observation; an int means ``(int,)``.
        in_keys, out_keys: keys of the observation, and of the latent state and the context.

    Reads:
        ``observation`` ``[..., *obs_shape]``.

    Writes:
        ``latent`` ``[..., D]`` with ``D = prod(obs_shape)`` and ``context`` ``[..., 0]``.

    Example:
        >>> encoder = IdentityEncoder((3,))
        >>> latent, context = encoder.encode(torch.zeros(2, 3))
        >>> latent.shape, context.shape
        (torch.Size([2, 3]), torch.Size([2, 0]))
    """

    def __init__(
        self,
        obs_shape: int | Sequence[int],
        *,
        in_keys: Sequence[NestedKey] = (keys.OBSERVATION,),
        out_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT),
    ) -> None:
        size = as_shape(obs_shape).numel()
        super().__init__(obs_shape, size, 0, in_keys=in_keys, out_keys=out_keys)

    def _encode(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return observation, observation[..., :0]

    def decode(self, latent: Tensor, context: Tensor) -> Tensor:
        """Return the latent state in the observation's shape."""
        return latent.reshape(latent.shape[:-1] + self.obs_shape)


def as_shape(obs_shape: int | Sequence[int]) -> torch.Size:
    """Return the shape of one observation as a ``torch.Size``; an int means ``(int,)``.

    Raises:
        TypeError: if it is neither an integer nor a sequence of integers.
        ValueError: if a size is below 1.
    """
    sizes = (obs_shape,) if isinstance(obs_shape, Integral) else obs_shape
    check_sizes("obs_shape", sizes)
    return torch.Size(map(int, sizes))
