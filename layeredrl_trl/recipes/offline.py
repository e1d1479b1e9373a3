"""Learning from a dataset: no env is needed, and none is stepped before the evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl.data import TransitionSliceSampler, read_dataset, split_episodes
from layeredrl_trl.recipes.agent import Spaces
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.environments import make_env
from layeredrl_trl.recipes.errors import RecipeError, quote

NO_ENV = "no-env"
"""What stands in the options of a run that has no environment to be evaluated in."""

_HELD_OUT = 0.1


class Offline(NamedTuple):
    """A dataset to learn from.

    Attributes:
        train: the steps to learn from.
        held_out: a tenth of the episodes, for the report.
        spaces: of its env.
        env_id: of an environment to evaluate in, or ``None``.
    """

    train: TensorDictReplayBuffer
    held_out: TensorDictReplayBuffer
    spaces: Spaces
    env_id: str | None

    def feed(self, slice_len: int) -> TensorDictReplayBuffer:
        """Make the buffer that learning draws slices of this length from."""
        sampler = TransitionSliceSampler(slice_len=slice_len)
        return TensorDictReplayBuffer(storage=self.train.storage, sampler=sampler)


def open_dataset(config: TrainConfig, env_id: str | None) -> Offline:
    """Read the dataset ``config.dataset``, and find an environment to evaluate in.

    Args:
        config: options of the run.
        env_id: the environment that the user has given; ``None``: the one that the dataset names,
            if it can be made here. A dataset names no code: an id with a module is taken from the
            user only.

    Raises:
        RecipeError: if the dataset cannot be read, or the user's environment has other spaces.
    """
    shown = quote(config.dataset)
    try:
        dataset = read_dataset(config.dataset)
        generator = torch.Generator().manual_seed(config.seed)
        train, held_out = split_episodes(dataset.buffer, _HELD_OUT, generator=generator)
    except (ImportError, TypeError, ValueError) as error:
        raise RecipeError(f"dataset: {shown} cannot be used: {error}") from error
    spaces = Spaces(dataset.observation_spec.shape[-1], dataset.action_spec)
    named = dataset.env_id
    if env_id is None and (named is None or ":" in named):
        return Offline(train, held_out, spaces, None)
    try:
        env = make_env(env_id or named)
    except RecipeError:
        if env_id is not None:
            raise
        return Offline(train, held_out, spaces, None)
    sizes = [(x.obs_dim, x.action_spec.shape[-1]) for x in (spaces, Spaces.of(env))]
    env.close()
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"dataset: {shown} has observations and actions of {sizes[0]} numbers, but the "
            f"environment {quote(env_id or named)} has {sizes[1]}; give the one that it was "
            "collected in by --env."
        )
    return Offline(train, held_out, spaces, env_id or named)
