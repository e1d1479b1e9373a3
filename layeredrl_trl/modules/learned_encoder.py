"""Learned encoders: the latent state is made from dims that change, the context from the others.

Which dims change in an episode is observed on transitions rather than learned, so no gradient can
make state leak into the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count, check_flag
from layeredrl_trl.modules.encoders import Encoder, as_observations, as_vectors
from layeredrl_trl.modules.normalization import RunningMoments
from layeredrl_trl.modules.outputs import in_dtype_of


class LearnedEncoder(Encoder):
    """Two networks: from the changing dims to the latent state, from the others to the context.

    Both networks read all observation dims, standardised, with 0 in place of the dims that belong
    to the other network. A dim belongs to the latent state from the first time that it differs
    between an observation and the next one of the same episode. So the context is constant in an
    episode, unless a dim changes that has never changed before.

    Before any transition has been seen, every dim feeds the latent state and none the context: no
    information is lost, and the context is constant. With ``context_dim=0`` every dim feeds the
    latent state at all times.

    Args:
        obs_shape: shape of one observation; an int means ``(int,)``.
        latent_state_dim, context_dim: ``D``, at least 1, and ``C``, at least 0.
        make_net: ``make_net(O, out_dim)`` makes a network from ``[..., O]`` to ``[..., out_dim]``;
            it is called for the latent state and, unless ``C`` is 0, for the context.
        standardize: whether to shift and scale the inputs by running moments of the observations.
        freeze_after: number of statistics updates after which the moments stay as they are;
            ``None`` means never. Changing dims are looked for in any case.
        in_keys, out_keys: keys of the observation, and of the latent state and the context.

    Attributes:
        changes: bool ``[O]``, True for the dims that have been seen to change.
        seen: bool scalar, whether any transition has been seen.
        moments: the :class:`~layeredrl_trl.modules.RunningMoments` of the inputs, or ``None``.

    Reads:
        ``observation`` ``[..., *obs_shape]``; cast to float32.

    Writes:
        ``latent`` ``[..., D]`` and ``context`` ``[..., C]``.

    Raises:
        TypeError: if a number is no integer, ``standardize`` is neither True nor False, or
            ``make_net`` returns no module.
        ValueError: if a dim is out of its range; if ``freeze_after`` is below 1, or given with
            ``standardize=False``; when encoding, if a network's output is of another size.

    Example:
        >>> encoder = LearnedEncoder(3, latent_state_dim=2, context_dim=1, make_net=nn.Linear)
        >>> encoder.update_statistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 3.0]))
        >>> encoder.changes
        tensor([ True, False, False])
    """

    changes: Tensor
    seen: Tensor

    def __init__(
        self,
        obs_shape: int | Sequence[int],
        latent_state_dim: int,
        context_dim: int,
        make_net: Callable[[int, int], nn.Module],
        *,
        standardize: bool = True,
        freeze_after: int | None = None,
        in_keys: Sequence[NestedKey] = (keys.OBSERVATION,),
        out_keys: Sequence[NestedKey] = (keys.LATENT, keys.CONTEXT),
    ) -> None:
        dims = latent_state_dim, context_dim
        super().__init__(obs_shape, *dims, in_keys=in_keys, out_keys=out_keys)
        name = type(self).__name__
        check_flag(f"{name}: standardize", standardize)
        if freeze_after is not None:
            check_count(f"{name}: freeze_after", freeze_after)
        if freeze_after is not None and not standardize:
            raise ValueError(
                f"{name}: freeze_after needs standardize=True, got {freeze_after} and False."
            )
        size = self.obs_shape.numel()
        self.latent_net = _as_module(name, make_net(size, latent_state_dim))
        self.context_net = _as_module(name, make_net(size, context_dim)) if context_dim else None
        self.freeze_after = freeze_after
        self.moments = RunningMoments(size) if standardize else None
        self.register_buffer("changes", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def update_statistics(
        self, observation: Tensor, next_observation: Tensor, mask: Tensor | None = None
    ) -> None:
        """Find out which dims change, and update the moments with ``observation``.

        The arguments are those of the base class. A batch with a non-finite number in a transition
        that counts changes nothing.

        Raises:
            ValueError: if a shape does not fit.
        """
        now = self._as_vectors("observation", observation)
        later = self._as_vectors("next_observation", next_observation)
        if now.shape != later.shape:
            raise ValueError(
                f"next_observation: expected shape {list(observation.shape)}, "
                f"got {list(next_observation.shape)}."
            )
        batch = now.shape[:-1]
        if mask is None:
            mask = torch.ones(batch, dtype=torch.bool, device=now.device)
        elif mask.shape != batch:
            raise ValueError(f"mask: expected shape {list(batch)}, got {list(mask.shape)}.")
        mask = mask.bool()
        finite = (now.isfinite() & later.isfinite()).all(-1)
        mask = mask & (finite | ~mask).all()
        differs = (now != later) & mask.unsqueeze(-1)
        self.changes.logical_or_(differs.unsqueeze(0).flatten(0, -2).any(0))
        self.seen.logical_or_(mask.any())
        if self.moments is not None:
            if self.freeze_after is not None:
                mask = mask & (self.moments.count < self.freeze_after)
            self.moments.update(now, mask)

    def embed(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Apply both networks to ``[..., *obs_shape]``, each to its dims."""
        observation = as_vectors(observation, self.obs_shape)
        if self.moments is not None:
            observation = self.moments.standardize(observation)
        (observation,) = in_dtype_of(self.latent_net, observation)
        if self.context_net is None:
            return self.latent_net(observation), observation[..., :0]
        changes = self.changes | ~self.seen
        return (
            self.latent_net(torch.where(changes, observation, 0.0)),
            self.context_net(torch.where(changes, 0.0, observation)),
        )

    def _as_vectors(self, name: str, observation: Tensor) -> Tensor:
        """Check the argument ``name``, and return it as float32 ``[..., O]``."""
        observation = as_observations(name, observation, self.obs_shape)
        return as_vectors(observation, self.obs_shape)


def _as_module(name: str, net: nn.Module) -> nn.Module:
    """Check what ``make_net`` made; a plain function would be called, but never learned."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"{name}: make_net must return an nn.Module, got {type(net).__name__}.")
    return net
