"""An encoder without parameters that picks dims of the observation."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from tensordict import NestedKey
from torch import Tensor

from layeredrl_trl import keys
from layeredrl_trl.modules.encoders import Encoder, as_shape, as_vectors


class SelectEncoder(Encoder):
    """Pick some dims of the observation as the latent state and some as the context.

    Observations of more than one dim are flattened first. A dim may be picked for both. It is then
    decoded from the latent state, because imagination predicts the latent state but keeps the
    context as it is.

    Args:
        obs_shape: shape of one observation; an int means ``(int,)``.
        latent_state_dims: indices into the flattened observation, at least one, in the order of the
            latent state.
        context_dims: indices in the order of the context, possibly none; these dims should be
            constant in an episode.
        in_keys, out_keys: keys of the observation, and of the latent state and the context.

    Attributes:
        latent_state_dims, context_dims: the indices, as tuples.
        can_decode: whether every dim of the observation is picked.

    Reads:
        ``observation`` ``[..., *obs_shape]``.

    Writes:
        ``latent`` ``[..., D]`` with ``D = len(latent_state_dims)`` and ``context`` ``[..., C]``
        with ``C = len(context_dims)``.

    Raises:
        ValueError: if an index is out of range (negative ones are), appears twice in the same
            argument, or if there is no latent dim.
        TypeError: if an index is not an integer.

    Example:
        >>> encoder = SelectEncoder(4, latent_state_dims=[3, 0], context_dims=[1, 2])
        >>> latent, context = encoder.encode(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
        >>> latent.tolist(), context.tolist()
        ([[3.0, 0.0]], [[1.0, 2.0]])
        >>> encoder.decode(latent, context).tolist()
        [[0.0, 1.0, 2.0, 3.0]]
    """

    def __init__(
        self,
        obs_shape: int | Sequence[int],
        latent_state_dims: Iterable[int],
        context_dims: Iterable[int],
        *,
        in_keys: Sequence[NestedKey] = (keys.OBSERVATION,),
        out_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT),
    ) -> None:
        shape = as_shape(obs_shape)
        latent_state_dims = _as_indices("latent_state_dims", latent_state_dims, shape)
        context_dims = _as_indices("context_dims", context_dims, shape)
        dims = len(latent_state_dims), len(context_dims)
        super().__init__(shape, *dims, in_keys=in_keys, out_keys=out_keys)
        self.latent_state_dims = latent_state_dims
        self.context_dims = context_dims
        # `index` finds the first occurrence: a dim picked for both comes from the latent state.
        picked = (*latent_state_dims, *context_dims)
        all_dims = range(shape.numel())
        self._missing_dims = tuple(dim for dim in all_dims if dim not in picked)
        source = [] if self._missing_dims else [picked.index(dim) for dim in all_dims]
        for name, index in (
            ("_latent_index", latent_state_dims),
            ("_context_index", context_dims),
            ("_decode_index", source),
        ):
            self.register_buffer(name, torch.tensor(index, dtype=torch.long), persistent=False)

    @property
    def can_decode(self) -> bool:
        """Whether every dim of the observation is picked, so that :meth:`decode` works."""
        return not self._missing_dims

    def decode(self, latent: Tensor, context: Tensor) -> Tensor:
        """Put the picked dims back to their places in the observation ``[..., *obs_shape]``.

        Raises:
            NotImplementedError: if some dim of the observation is not picked.
            ValueError: if a shape does not fit.
        """
        if self._missing_dims:
            raise NotImplementedError(
                f"SelectEncoder cannot decode: the dims {list(self._missing_dims)} of the "
                "observation are neither in latent_state_dims nor in context_dims."
            )
        batch = latent.shape[:-1]
        for name, x, dim in (
            ("latent", latent, self.latent_state_dim),
            ("context", context, self.context_dim),
        ):
            if x.shape != (*batch, dim):
                raise ValueError(f"{name}: expected shape {[*batch, dim]}, got {list(x.shape)}.")
        flat = torch.cat([latent, context], -1).index_select(-1, self._decode_index)
        return flat.reshape(batch + self.obs_shape)

    def embed(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Pick the dims from ``[..., *obs_shape]``, flattened."""
        observation = as_vectors(observation, self.obs_shape)
        latent = observation.index_select(-1, self._latent_index)
        return latent, observation.index_select(-1, self._context_index)


def _as_indices(name: str, dims: Iterable[int], shape: torch.Size) -> tuple[int, ...]:
    """Check the argument ``name`` and return it as indices of an observation of ``shape``."""
    try:
        given = tuple(dims)
        indices = tuple(operator.index(dim) for dim in given)
    except TypeError as error:
        raise TypeError(f"SelectEncoder: {name} must be integers, got {dims!r}.") from error
    # a mask of two dims would be taken for the indices 1 and 0
    if any(isinstance(x, bool) or getattr(x, "dtype", None) is torch.bool for x in given):
        raise TypeError(f"SelectEncoder: {name} must be integers, got the mask {[*indices]}.")
    if outside := [dim for dim in indices if not 0 <= dim < shape.numel()]:
        raise ValueError(
            f"SelectEncoder: {name} must be in [0, {shape.numel()}), the dims of an observation of "
            f"shape {list(shape)}, got {outside}."
        )
    if twice := sorted({dim for dim in indices if indices.count(dim) > 1}):
        raise ValueError(f"SelectEncoder: {name} must not have duplicates, got {twice} twice.")
    return indices
