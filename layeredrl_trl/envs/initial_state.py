"""The start of an imagined rollout: the encoded real observation, for every particle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Composite

from layeredrl_trl import keys
from layeredrl_trl.envs.imagined_specs import Entry, entries_of
from layeredrl_trl.modules import Encoder


class InitialState(TensorDictModuleBase):
    """Turn a real observation into the state of an imagined env.

    Every particle starts at the encoded observation, alive.

    Args:
        encoder: the predictor's encoder.
        state_spec: entries of an imagined state.
        n_models: members to spread envs over, if an env's particles are all of one member.

    Reads:
        ``observation`` ``[..., O]``.

    Writes:
        ``latent`` ``[..., E, P, D]``, ``context`` ``[..., C]``, ``alive`` ``[..., E, P, 1]``, and
        the other entries of ``state_spec``: ``member`` ``[..., 1]``, and zeros for entries that
        only a step computes (``particle_reward``, ``term_prob``, variances). Where they are
        missing, also the flags ``done``, ``terminated`` and ``truncated`` ``[..., 1]``, all False,
        as a reset does: a rollout has the entries that its first step has.
    """

    def __init__(self, encoder: Encoder, state_spec: Composite, n_models: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.n_models = n_models
        self.in_keys = list(encoder.in_keys)
        entries = entries_of(state_spec)
        written = {key: x for key, x in entries.items() if key not in encoder.in_keys}
        self.out_keys = list(written)
        self._particles = written[encoder.out_keys[0]].shape[:-1]
        self._others = {key: x for key, x in written.items() if key not in encoder.out_keys}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the imagined state."""
        missing = [key for key in self.in_keys if key not in tensordict.keys(True)]
        if missing:
            raise KeyError(
                f"initial_state reads {missing}, but the TensorDict has only "
                f"{sorted(map(str, tensordict.keys(True, True)))}."
            )
        observation, batch = tensordict.get(self.in_keys[0]), tensordict.batch_size
        latent, context = self.encoder.encode(observation)
        if latent.shape[:-1] != batch:
            raise ValueError(
                f"observation: expected the batch size {list(batch)} of the TensorDict, got "
                f"observations of shape {list(observation.shape)}."
            )
        state = blank_state(self._others, batch, self.n_models, latent.device)
        latent_key, context_key = self.encoder.out_keys
        particles = latent[..., None, None, :].expand(*batch, *self._particles, -1)
        state[latent_key] = particles.clone()  # users may write to single particles
        state[context_key] = context
        for key in (keys.DONE, keys.TERMINATED, keys.TRUNCATED):
            if key not in tensordict.keys():
                state[key] = torch.zeros(*batch, 1, dtype=torch.bool, device=latent.device)
        return tensordict.update(state)


def blank_state(
    entries: Mapping[NestedKey, Entry],
    batch: torch.Size,
    n_models: int,
    device: torch.device,
) -> dict[NestedKey, Tensor]:
    """Make an imagined state of zeros in which every particle is alive; spread any members."""
    state = {
        key: torch.full((*batch, *shape), float(key == keys.ALIVE), dtype=dtype, device=device)
        for key, (shape, dtype) in entries.items()
    }
    if keys.MEMBER in state:
        state[keys.MEMBER] = spread_members(batch, n_models, device)
    return state


def spread_members(batch: torch.Size, n_models: int, device: torch.device) -> Tensor:
    """Spread members evenly over envs, from a random first one on; long ``[*batch, 1]``."""
    first = torch.randint(n_models, (), device=device)
    return ((torch.arange(batch.numel(), device=device) + first) % n_models).reshape(*batch, 1)


def draw_start(
    start: Tensor | Callable[[torch.Size], Tensor], batch: torch.Size, obs_shape: torch.Size
) -> Tensor:
    """Draw initial observations ``[*batch, *obs_shape]``.

    ``start`` holds observations ``[N, *obs_shape]`` to draw from, or is a function of ``batch``.

    Raises:
        ValueError: if the function returns something else.
    """
    if isinstance(start, Tensor):
        return start[torch.randint(start.shape[0], batch, device=start.device)]
    drawn = start(batch)
    expected = (*batch, *obs_shape)
    if not isinstance(drawn, Tensor) or drawn.shape != expected:
        got = list(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise ValueError(
            f"PredictorEnv: start must return observations {list(expected)} for the batch shape "
            f"{list(batch)}, got {got}."
        )
    return drawn


def warn_of_blind_start() -> None:
    """Warn that an automatic reset of a ``PredictorEnv`` drew latent states of no observation."""
    warnings.warn(
        "PredictorEnv: after the end of an episode an env was reset to a latent state drawn from a "
        "standard normal, where the real env may never be. Pass start: observations to begin at.",
        UserWarning,
        stacklevel=3,
    )
