"""Real steps to measure a model on, read from a replay buffer without changing it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.data import TransitionSliceSampler, read_transitions, slice_sampler
from layeredrl_trl.objectives import SliceKeys, check_single_steps
from layeredrl_trl.predictors import Predictor, RewardPredictor


class HeldOut(NamedTuple):
    """Steps of real episodes.

    Both TensorDicts hold ``observation``, ``action`` and ``next_observation``. They also hold
    ``reward`` (float), ``terminated`` and ``ended`` (bool: terminated, truncated or done) where the
    buffer stores these, all without a trailing dim of 1.

    Attributes:
        transitions: single steps, ``[N]``.
        segments: consecutive steps, ``[S, H]``; past the end of an episode its last step repeats.
        mask: bool ``[S, H]``, True on real steps; the first step of every segment is real.
    """

    transitions: TensorDict
    segments: TensorDict
    mask: Tensor


def read_held_out(
    predictor: Predictor,
    buffer: TensorDictReplayBuffer,
    horizon: int,
    n_segments: int,
    n_transitions: int,
) -> HeldOut:
    """Draw transitions and starts of segments uniformly, each at most once, by the CPU's generator.

    Raises:
        ValueError: if the buffer is empty or holds nothing but padding, or if the reward or the
            termination is not one number per step.
        KeyError: if the buffer lacks the observation, the action or the next observation.
    """
    storage = buffer.storage
    if len(storage) == 0:
        raise ValueError("model_report: the replay buffer is empty.")
    names = _entry_names(predictor)
    # Where `terminated` has another name, `done` and `truncated` lie next to it.
    ends = None if names.next_terminated == keys.NEXT_TERMINATED else names.end_keys
    sampler = slice_sampler(buffer, TransitionSliceSampler(slice_len=1, end_keys=ends))
    order = torch.randperm(storage.shape.numel())
    _, mask = sampler.slices_from(storage, torch.unravel_index(order, storage.shape), 1)
    order = order[mask[:, 0].cpu()]  # stored steps may themselves be padding
    if not len(order):
        raise ValueError("model_report: the replay buffer holds nothing but padding.")

    def read_slices(n: int, length: int) -> tuple[TensorDict, Tensor]:
        start = torch.unravel_index(order[:n], storage.shape)
        index, mask = sampler.slices_from(storage, start, length)
        return _read_steps(predictor, buffer, index, names), mask

    transitions, _ = read_slices(n_transitions, 1)
    segments, mask = read_slices(n_segments, horizon)
    return HeldOut(transitions.squeeze(1), segments, mask.to(predictor.device))


def _entry_names(predictor: Predictor) -> SliceKeys:
    """Return the names under which the buffer stores what the predictor reads."""
    if isinstance(predictor, RewardPredictor):
        return predictor.loss_module.tensor_keys
    return SliceKeys(predictor.encoder.in_keys[0], predictor.model.in_keys[2])


def _read_steps(
    predictor: Predictor,
    buffer: TensorDictReplayBuffer,
    index: tuple[Tensor, ...],
    names: SliceKeys,
) -> TensorDict:
    """Read the entries of :class:`HeldOut` at storage positions ``[*S]``."""
    required = {
        "observation": names.observation,
        "action": names.action,
        "next_observation": names.next_observation,
    }
    optional = {"reward": names.next_reward, "terminated": names.next_terminated}
    more = [*optional.values(), *names.end_keys, keys.STEPS_TO_NEXT]
    stored = read_transitions(buffer, index, list(required.values()), more)
    if keys.STEPS_TO_NEXT in stored.keys():
        check_single_steps(stored[keys.STEPS_TO_NEXT])
    batch = stored.batch_size
    entries = {key: stored.get(name) for key, name in required.items()}
    for key, name in optional.items():
        if (x := stored.get(name, None)) is None:
            continue
        if x.numel() != batch.numel():
            expected = f"one number per step, {[*batch, 1]}"
            raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}.")
        entries[key] = x.reshape(batch).bool() if key == "terminated" else x.reshape(batch)
    flags = [stored.get(name, None) for name in names.end_keys]
    flags = [x.reshape(batch).bool() for x in flags if x is not None and x.numel() == batch.numel()]
    if flags:
        entries["ended"] = torch.stack(flags).any(0)
    return TensorDict(entries, batch_size=batch).to(predictor.device)
