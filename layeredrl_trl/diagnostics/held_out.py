"""Real steps to try a model on, read from a replay buffer that stays as it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.data import TransitionSliceSampler, read_transitions
from layeredrl_trl.objectives.slices import SliceKeys
from layeredrl_trl.predictors import Predictor, RewardPredictor


class HeldOut(NamedTuple):
    """Steps of real episodes.

    Both TensorDicts hold ``observation``, ``action``, ``next_observation``, and where stored
    ``reward`` (float) and ``terminated`` (bool), these two without a trailing dim of 1.

    Attributes:
        transitions: single steps, ``[N]``.
        segments: consecutive steps, ``[S, H]``; behind the end of an episode the last repeats.
        mask: bool ``[S, H]``, True on real steps; the first of every segment is.
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
    """Draw steps and starts of segments uniformly, each at most once, by the CPU's generator.

    Raises:
        ValueError: if the buffer is empty or holds nothing but padding, or the reward or the
            termination is not one number per step.
        KeyError: if the buffer lacks an observation, the action or the next observation.
    """
    storage = buffer.storage
    if len(storage) == 0:
        raise ValueError("model_report: the replay buffer is empty.")
    names = _names(predictor)
    # a renamed flag has renamed flags beside it
    ends = None if names.next_terminated == keys.NEXT_TERMINATED else names.end_keys
    sampler = TransitionSliceSampler(slice_len=1, end_keys=ends)
    order = torch.randperm(storage.shape.numel())
    _, mask = sampler.slices_from(storage, torch.unravel_index(order, storage.shape), 1)
    order = order[mask[:, 0].cpu()]  # what is stored may be padding
    if not len(order):
        raise ValueError("model_report: the replay buffer holds nothing but padding.")

    def read(n: int, steps: int) -> tuple[TensorDict, Tensor]:
        start = torch.unravel_index(order[:n], storage.shape)
        index, mask = sampler.slices_from(storage, start, steps)
        return _read(predictor, buffer, index, names), mask

    transitions, _ = read(n_transitions, 1)
    segments, mask = read(n_segments, horizon)
    return HeldOut(transitions.squeeze(1), segments, mask.to(predictor.device))


def _names(predictor: Predictor) -> SliceKeys:
    """What the entries are called in the buffer."""
    if isinstance(predictor, RewardPredictor):
        return predictor.loss_module.tensor_keys
    return SliceKeys(predictor.encoder.in_keys[0], predictor.model.in_keys[2])


def _read(
    predictor: Predictor,
    buffer: TensorDictReplayBuffer,
    index: tuple[Tensor, ...],
    names: SliceKeys,
) -> TensorDict:
    needed = {
        "observation": names.observation,
        "action": names.action,
        "next_observation": names.next_observation,
    }
    optional = {"reward": names.next_reward, "terminated": names.next_terminated}
    stored = read_transitions(buffer, index, list(needed.values()), list(optional.values()))
    batch = stored.batch_size
    out = {key: stored.get(name, None) for key, name in (needed | optional).items()}
    for key, name in optional.items():
        if out[key] is None:
            continue
        if out[key].numel() != batch.numel():
            raise ValueError(
                f"{name}: expected one number per step, {[*batch, 1]}, got {list(out[key].shape)}."
            )
        out[key] = out[key].reshape(batch)
    if out["terminated"] is not None:
        out["terminated"] = out["terminated"].bool()
    out = {key: x for key, x in out.items() if x is not None}
    return TensorDict(out, batch_size=batch).to(predictor.device)
