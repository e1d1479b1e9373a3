"""Encoders: from an observation to a latent state and a context.

The dynamics model predicts the latent state from step to step; the context is constant in an
episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count, check_keys, check_sizes
from layeredrl_trl.modules.outputs import check_output, in_dtype_of


class Encoder(TensorDictModuleBase):
    """Base class: turn an observation into a latent state and a context.

    A subclass brings :meth:`embed`. It may bring :meth:`decode`, for imagined observations, and
    :meth:`update_statistics`. Everything else calls :meth:`encode`, which checks what goes in and
    comes out; a subclass that overrides that instead checks for itself.

    The context should be constant in an episode: imagination keeps it as it is.

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
        TypeError: if a dim is no integer, ``in_keys`` or ``out_keys`` are no sequences of keys, the
            class has no :meth:`embed`, or a submodule gets the name of a method.
        ValueError: if a dim is out of its range, or there are not one key in ``in_keys`` and two in
            ``out_keys``.

    Example:
        >>> from torch import nn
        >>> class PixelEncoder(Encoder):
        ...     def __init__(self, latent_state_dim):
        ...         super().__init__((3, 16, 16), latent_state_dim, 0, in_keys=["pixels"])
        ...         conv = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        ...         head = nn.Linear(8 * 4 * 4, latent_state_dim)
        ...         self.net = nn.Sequential(conv, nn.SiLU(), nn.Flatten(), head)
        ...
        ...     def embed(self, observation):
        ...         latent = self.map_batch(self.net, observation / 255)
        ...         return latent, latent[..., :0]
        >>> pixels = torch.zeros(2, 7, 3, 16, 16, dtype=torch.uint8)
        >>> latent, context = PixelEncoder(5).encode(pixels)
        >>> latent.shape, context.shape
        (torch.Size([2, 7, 5]), torch.Size([2, 7, 0]))
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Before `embed`, subclasses brought `_encode`, also those of the library's own encoders.
        bring = [base for base in cls.__mro__ if {"embed", "_encode"} & vars(base).keys()]
        embeds = next(base for base in bring if "embed" in vars(base))
        is_own = embeds.__module__.partition(".")[0] == __name__.partition(".")[0]
        if is_own and "embed" not in vars(bring[0]):
            cls.embed = Encoder.embed

    def __init__(
        self,
        obs_shape: int | Sequence[int],
        latent_state_dim: int,
        context_dim: int,
        *,
        in_keys: Sequence[NestedKey] = (keys.OBSERVATION,),
        out_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT),
    ) -> None:
        cls, name = type(self), type(self).__name__
        is_base = cls.embed is Encoder.embed and cls.encode is Encoder.encode
        if is_base and not hasattr(cls, "_encode"):
            raise TypeError(
                f"{name} must define embed(self, observation), which returns (latent, context); "
                "see layeredrl_trl.Encoder."
            )
        super().__init__()
        check_count(f"{name}: latent_state_dim", latent_state_dim)
        check_count(f"{name}: context_dim", context_dim, least=0)
        check_keys(f"{name}: in_keys", in_keys, 1)
        check_keys(f"{name}: out_keys", out_keys, 2)
        self.obs_shape = as_shape(obs_shape)
        self.latent_state_dim = latent_state_dim
        self.context_dim = context_dim
        self.in_keys = list(in_keys)
        self.out_keys = list(out_keys)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and callable(getattr(Encoder, name, None)):
            raise TypeError(
                f"{type(self).__name__}: a submodule cannot be named {name!r}, which is a method "
                "of an encoder and would be called in its place. Choose another name."
            )
        super().__setattr__(name, value)

    # ---- what a subclass gives

    def embed(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Compute latent state and context; to be overridden.

        Args:
            observation: float32 ``[..., *obs_shape]``, checked, with any number of batch dims, also
                none. For a network that takes just one, see :meth:`map_batch`.

        Returns:
            ``latent`` ``[..., D]`` and ``context`` ``[..., C]`` of the same batch dims, without
            context ``latent[..., :0]``.

        Raises:
            NotImplementedError: if the class does not override it.
        """
        cls = type(self)
        if not hasattr(cls, "_encode"):
            raise NotImplementedError(
                f"{cls.__name__} does not define embed(self, observation), which returns (latent, "
                "context)."
            )
        return self._encode(as_vectors(observation, self.obs_shape))

    def decode(self, latent: Tensor, context: Tensor) -> Tensor:
        """Reconstruct ``[..., *obs_shape]`` from ``latent`` ``[..., D]``, ``context`` ``[..., C]``.

        Optional: with it an imagined environment also gives observations.

        Raises:
            NotImplementedError: if the encoder loses information (:attr:`can_decode` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot decode.")

    def update_statistics(
        self, observation: Tensor, next_observation: Tensor, mask: Tensor | None = None
    ) -> None:
        """Update running statistics with real transitions; by default there are none.

        Optional. In training mode the loss calls it once per step, before it encodes. It may only
        change buffers, in place, so that the effect of a batch with non-finite gradients can be
        undone, and it must not change a tensor that is saved for the backward pass. Decorate it
        with ``torch.no_grad``. To be compiled, it must not branch on the values of tensors.

        Args:
            observation: ``[..., *obs_shape]``, of the dtype that it is stored in.
            next_observation: one step later in the same episode, ``[..., *obs_shape]``.
            mask: bool ``[...]``; transitions where it is False do not count and may hold anything.
                ``None``: all count.
        """

    # ---- what it gets for it

    @property
    def can_decode(self) -> bool:
        """Whether :meth:`decode` works."""
        return type(self).decode is not Encoder.decode

    @property
    def has_statistics(self) -> bool:
        """Whether :meth:`update_statistics` does anything."""
        return type(self).update_statistics is not Encoder.update_statistics

    def encode(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ``[..., *obs_shape]`` to ``latent`` ``[..., D]`` and ``context`` ``[..., C]``.

        Both are float32, whatever :meth:`embed` returns; what it gets is of the dtype of the
        encoder's parameters, float32 without any.

        Raises:
            TypeError: if :meth:`embed` does not return a pair of tensors.
            ValueError: if the trailing shape is not ``obs_shape``, or a shape that :meth:`embed`
                returns does not fit.
        """
        observation = as_observations("observation", observation, self.obs_shape)
        batch = observation.shape[: observation.ndim - len(self.obs_shape)]
        out, name = self.embed(*in_dtype_of(self, observation)), type(self).__name__
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            method = "_encode" if type(self).embed is Encoder.embed else "embed"
            raise TypeError(f"{name}.{method} must return (latent, context), got {out!r}.")
        latent, context = out
        check_output(f"{name}: latent", latent, (*batch, self.latent_state_dim))
        check_output(f"{name}: context", context, (*batch, self.context_dim))
        return latent.to(torch.float32), context.to(torch.float32)

    def map_batch(self, net: Callable[[Tensor], Tensor], observation: Tensor) -> Tensor:
        """Apply a network that takes one batch dim to observations with any number of them.

        Args:
            net: maps ``[N, *obs_shape]`` to ``[N, ...]``, such as a convolution.
            observation: ``[..., *obs_shape]``.

        Returns:
            what ``net`` returns, with the batch dims of ``observation`` in place of ``N``.
        """
        out = net(observation.reshape(-1, *self.obs_shape))
        return out.reshape(
            *observation.shape[: observation.ndim - len(self.obs_shape)], *out.shape[1:]
        )

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``latent`` and ``context`` for the ``observation`` of ``tensordict``."""
        latent, context = self.encode(tensordict[self.in_keys[0]])
        return tensordict.set(self.out_keys[0], latent).set(self.out_keys[1], context)


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

    def embed(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the observation, flattened, and an empty context."""
        latent = as_vectors(observation, self.obs_shape)
        return latent, latent[..., :0]

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


def as_observations(name: str, observation: Tensor, obs_shape: torch.Size) -> Tensor:
    """Check the argument ``name``, ``[..., *obs_shape]``, and return it as float32.

    Raises:
        ValueError: if it has another trailing shape.
    """
    n_batch_dims = observation.ndim - len(obs_shape)
    if n_batch_dims < 0 or observation.shape[n_batch_dims:] != obs_shape:
        raise ValueError(
            f"{name}: expected shape [..., {', '.join(map(str, obs_shape))}], "
            f"got {list(observation.shape)}."
        )
    return observation.to(torch.float32)


def as_vectors(observation: Tensor, obs_shape: torch.Size) -> Tensor:
    """Flatten observations ``[..., *obs_shape]`` to ``[..., O]``."""
    batch = observation.shape[: observation.ndim - len(obs_shape)]
    return observation.reshape(*batch, obs_shape.numel())
