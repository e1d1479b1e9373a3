"""Which replay buffers can be learned from, and by which sampler their slices are drawn.

Learning draws slices of its own, uniformly over stored transitions. A buffer that is meant to be
read in another way (by priority, with hindsight goals, from another process) is refused: read past
its sampler it would give wrong data without a word. See ``docs/buffers.md`` for the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tensordict import NestedKey
from torchrl.data import (
    RandomSampler,
    ReplayBuffer,
    SamplerWithoutReplacement,
    SliceSampler,
    SliceSamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers import Transition
from torchrl.envs import Compose, Transform

from layeredrl_trl.data.slice_sampler import TransitionSliceSampler
from layeredrl_trl.keys import NEXT_DONE

_OWN_LOOP = (
    "To learn from such batches, take the steps yourself: loss(slices) and Update, see "
    "docs/buffers.md. To learn uniformly from the same data, pass "
    "TensorDictReplayBuffer(storage=buffer.storage)."
)
_LOCAL = "Give a buffer of this process: extend a TensorDictReplayBuffer with its data."
_ONE_BUFFER = "Learn from one buffer that holds all data, or from one of its buffers at a time."
_BUFFERS = {
    "HERReplayBuffer": (
        "It gives every row a goal of its own, slices need one each: append HindsightGoals to a "
        "TensorDictReplayBuffer with a TransitionSliceSampler."
    ),
    "ReplayBufferEnsemble": _ONE_BUFFER,
    "OfflineToOnlineReplayBuffer": _ONE_BUFFER,
    "RayReplayBuffer": _LOCAL,
    "RemoteTensorDictReplayBuffer": _LOCAL,
}
"""What to do instead, for buffers of TorchRL."""

_DATASET = "BaseDatasetExperienceReplay"

_UNIFORM = (RandomSampler, SamplerWithoutReplacement)
_SLICES = (SliceSampler, SliceSamplerWithoutReplacement)

_STORE_SINGLE_STEPS = "store single steps, and pass n_steps to the predictor for n-step targets"
_TRANSFORMS = {
    "ActionChunkTransform": "windows of actions do not end with the slice; append it elsewhere",
    "BurnInTransform": "it cuts steps off a batch that is not flat; recurrent parts are not known",
    "CatFrames": "it joins slices of unrelated episodes; append it to the environment",
    "FrameSkipTransform": "it acts in an environment; append it there",
    "MultiStepTransform": f"it makes one transition of several; {_STORE_SINGLE_STEPS}",
    "NextStateReconstructor": (
        "the observation after a slice is unknown to it; store next observations "
        "(compact_obs=False), or use NextObservationDelta"
    ),
    "PolicyAgeFilter": "it drops steps from the middle of slices; empty the buffer instead",
    "RandomCropTensorDict": "it cuts pieces out of slices; the sampler does that already",
    "Reward2GoTransform": "it stores sums of rewards; store the rewards of single steps",
    "RewardSum": "it needs a dim named time; append it to the environment",
    "TimeMaxPool": "it joins slices of unrelated episodes; append it to the environment",
}
"""Transforms of TorchRL that look along time or change the number of steps, and the way out."""


def check_buffer(buffer: object) -> None:
    """Check that the argument ``buffer`` is a replay buffer that can be learned from.

    Raises:
        TypeError: if it is no replay buffer of TorchRL, or one of TorchRL's dataset classes, for
            which :func:`~layeredrl_trl.data.read_dataset` is; if its class, its sampler or its
            ``sample_unit`` give other batches than uniform ones of single steps; or if one of its
            transforms looks along time. What storages and writers do is checked when slices are
            drawn, by :class:`~layeredrl_trl.data.TransitionSliceSampler`.
    """
    name = type(buffer).__name__
    if not isinstance(buffer, ReplayBuffer):
        way_out = f" {_BUFFERS[name]}" if name in _BUFFERS else ""
        raise TypeError(
            f"buffer: expected a TorchRL replay buffer, got {type(buffer).__module__}.{name}."
            f"{way_out}"
        )
    for method in ("sample", "_sample"):
        own = getattr(type(buffer), method)
        if own not in (getattr(ReplayBuffer, method), getattr(TensorDictReplayBuffer, method)):
            raise TypeError(
                f"buffer: {name} draws or changes its batches in a way of its own, which learning "
                f"would pass by. {_way_out(type(buffer))}"
            )
    for known in type(buffer).__mro__:
        if known.__name__ == _DATASET and known.__module__.startswith("torchrl."):
            raise TypeError(
                f"buffer: {name} is a dataset of TorchRL, in which observations may be nested, "
                "lie in padded rows, or be filled up with zeros at the ends of episodes. Pass "
                "read_dataset(buffer).buffer, which brings it to one form and checks it."
            )
    sampler = buffer.sampler
    is_known = type(sampler) in (*_UNIFORM, *_SLICES)
    if not is_known and not isinstance(sampler, TransitionSliceSampler):
        raise TypeError(
            f"buffer: its {type(sampler).__name__} does not draw uniformly, as learning does. "
            f"{_OWN_LOOP}"
        )
    if is_known is False and type(sampler).sample is not TransitionSliceSampler.sample:
        raise TypeError(
            f"buffer: its {type(sampler).__name__} overrides sample, which learning does not call: "
            "override sample_slices instead, which sample calls too."
        )
    unit = getattr(buffer, "_sample_unit", None)
    if unit is not None and type(unit) is not Transition:
        raise TypeError(
            f"buffer: its sample_unit is {type(unit).__name__}, but learning draws its slices "
            "itself: leave sample_unit out."
        )
    for transform in _flat(buffer.transform):
        for known in type(transform).__mro__:
            if known.__name__ in _TRANSFORMS and known.__module__.startswith("torchrl."):
                raise TypeError(
                    f"buffer: its transform {type(transform).__name__} cannot be right in slices: "
                    f"{_TRANSFORMS[known.__name__]}."
                )


def check_slice_len(buffer: ReplayBuffer, slice_len: int) -> None:
    """Check that transforms made for slices of some length, by their ``slice_len``, get such.

    Raises:
        ValueError: if one is made for another length.
    """
    for transform in _flat(buffer.transform):
        expected = getattr(transform, "slice_len", None)
        if isinstance(expected, int) and expected != slice_len:
            raise ValueError(
                f"buffer: its transform {type(transform).__name__} is made for slices of slice_len="
                f"{expected} steps, but slices of {slice_len} are read. Pass that, or None."
            )


def slice_sampler(buffer: ReplayBuffer, default: TransitionSliceSampler) -> TransitionSliceSampler:
    """Choose the sampler by which slices are drawn from a buffer that :func:`check_buffer` passed.

    A ``TransitionSliceSampler`` of the buffer is used as it is. From a ``SliceSampler`` the keys
    that tell where episodes end are taken, from any sampler its generator.

    Args:
        buffer: the replay buffer.
        default: names the ends of episodes where the buffer's sampler does not.
    """
    own = buffer.sampler
    if isinstance(own, TransitionSliceSampler):
        if type(own) is not TransitionSliceSampler or own.end_keys or not default.end_keys:
            return own
        return _sampler(own, default.end_keys, own.traj_key)
    if type(own) in _SLICES:
        named = own.end_keys or ([own.end_key] if own.end_key != NEXT_DONE else default.end_keys)
        return _sampler(own, named, None if own._traj_key_auto else own.traj_key)
    if own._rng is None:
        return default
    sampler = _sampler(default, default.end_keys, default.traj_key)
    sampler._rng = own._rng
    return sampler


def _sampler(
    like: SliceSampler, end_keys: Sequence[NestedKey] | None, traj_key: NestedKey | None
) -> TransitionSliceSampler:
    sampler = TransitionSliceSampler(
        slice_len=1, end_keys=end_keys, traj_key=traj_key, init_key=like.init_key
    )
    sampler._rng = like._rng
    return sampler


def _way_out(kind: type) -> str:
    names = [known.__name__ for known in kind.__mro__ if known.__name__ in _BUFFERS]
    return _BUFFERS[names[0]] if names else _OWN_LOOP


def _flat(transform: torch.nn.Module | None) -> Iterator[Transform]:
    """Yield a transform and all that it is composed of."""
    if isinstance(transform, Transform):
        yield transform
    if isinstance(transform, Compose):
        for inner in transform.transforms:
            yield from _flat(inner)
