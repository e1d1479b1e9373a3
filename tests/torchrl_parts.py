"""Every public part of TorchRL's replay buffers, and what learning does with it.

``RIGHT``: it learns from what the buffer holds. A text: it is refused, and the error says so. The
page docs/buffers.md has the same list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl import data as rb
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data import replay_buffers as parts
from torchrl.envs import transforms as t

RIGHT = "right"
OWN_LOOP = r"take the steps yourself.*TensorDictReplayBuffer\(storage=buffer.storage\)"
ENV_ONLY = "belong there"
NOT_HERE = "not here"
"""Needs a package, a download or a device that the test machine lacks."""

SIZE = 60


@dataclass
class Part:
    """A part, how to make a buffer with it, and what learning does with that."""

    verdict: str
    make: Callable[[], Any] | None = None


def episodes(n: int = 40, length: int = 10) -> TensorDict:
    """Steps ``[n]`` of a toy env; each next observation is the observation of the next row."""
    observation = torch.randn(n + 1, 3, generator=torch.Generator().manual_seed(0))
    done = (torch.arange(n) % length == length - 1).unsqueeze(-1)
    reached = {"observation": observation[1:], "reward": observation[1:, :1].clone()}
    flags = {"terminated": torch.zeros(n, 1).bool(), "truncated": done, "done": done.clone()}
    steps = {
        "observation": observation[:-1],
        "action": torch.linspace(-1, 1, n).unsqueeze(-1),
        "extra": torch.ones(n, 2),
        "pixels": torch.ones(n, 3, 8, 8),
        "desired_goal": torch.zeros(n, 1),
        "achieved_goal": observation[:-1, :1].clone(),
        "policy_version": torch.zeros(n, 1),
        "priority": torch.ones(n, 1),
        "next": {**reached, **flags, "success": done.clone()},
    }
    return TensorDict(steps, batch_size=[n])


def filled(make: Callable[..., Any] = TensorDictReplayBuffer, **options: Any) -> Any:
    """A buffer with the toy steps."""
    options.setdefault("storage", LazyTensorStorage(SIZE))
    buffer = make(**options)
    buffer.extend(episodes())
    return buffer


def _ensemble() -> rb.ReplayBufferEnsemble:
    buffers = [filled(batch_size=4), filled(batch_size=4)]
    return rb.ReplayBufferEnsemble(*buffers, batch_size=8)


def _bare(name: str) -> Callable[[], Any]:
    """An object of a class that needs more than is here: it is refused for its class alone."""
    kind = getattr(parts, name)
    return lambda: object.__new__(kind)


def _sampler(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: filled(sampler=make(), batch_size=8)


def _listed(make: Callable[[int], Any]) -> Callable[[], Any]:
    def buffer() -> TensorDictReplayBuffer:
        buffer = TensorDictReplayBuffer(storage=make(SIZE))
        for step in episodes():
            buffer.add(step)
        return buffer

    return buffer


def _tensor_storage() -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(storage=rb.TensorStorage(episodes()))


def _fixed() -> TensorDictReplayBuffer:
    storage = rb.TensorStorage(episodes())
    return TensorDictReplayBuffer(storage=storage, writer=rb.ImmutableDatasetWriter())


def _max_value() -> TensorDictReplayBuffer:
    writer = rb.TensorDictMaxValueWriter(rank_key="priority")
    return filled(writer=writer)


def _her() -> Any:
    return filled(rb.HERReplayBuffer, reward_fn=lambda td: td["achieved_goal"])


IN_ONE = "one buffer that holds all data"
LOCAL = "buffer of this process"
NEEDS_TENSORS = "LazyTensorStorage"

BUFFERS = {
    "ReplayBuffer": Part(RIGHT, lambda: filled(rb.ReplayBuffer)),
    "TensorDictReplayBuffer": Part(RIGHT, filled),
    "PrioritizedReplayBuffer": Part(OWN_LOOP, _bare("PrioritizedReplayBuffer")),
    "TensorDictPrioritizedReplayBuffer": Part(OWN_LOOP, _bare("TensorDictPrioritizedReplayBuffer")),
    "HERReplayBuffer": Part("HindsightGoals", _her),
    "ReplayBufferEnsemble": Part(IN_ONE, _ensemble),
    "OfflineToOnlineReplayBuffer": Part(IN_ONE, _bare("OfflineToOnlineReplayBuffer")),
    "RayReplayBuffer": Part(LOCAL, _bare("RayReplayBuffer")),
    "RemoteTensorDictReplayBuffer": Part(LOCAL, _bare("RemoteTensorDictReplayBuffer")),
}

SAMPLERS = {
    "RandomSampler": Part(RIGHT, _sampler(rb.RandomSampler)),
    "SamplerWithoutReplacement": Part(RIGHT, _sampler(rb.SamplerWithoutReplacement)),
    "SliceSampler": Part(RIGHT, _sampler(lambda: rb.SliceSampler(slice_len=4))),
    "SliceSamplerWithoutReplacement": Part(
        RIGHT, _sampler(lambda: rb.SliceSamplerWithoutReplacement(slice_len=4))
    ),
    "PrioritizedSampler": Part(OWN_LOOP, lambda: _with_sampler("PrioritizedSampler")),
    "PrioritizedSliceSampler": Part(OWN_LOOP, lambda: _with_sampler("PrioritizedSliceSampler")),
    "StreamingSliceSampler": Part(OWN_LOOP, lambda: _with_sampler("StreamingSliceSampler")),
    "ConsumingSampler": Part(OWN_LOOP, lambda: filled(consume_after_n_samples=2)),
    "StalenessAwareSampler": Part(OWN_LOOP, _sampler(lambda: parts.StalenessAwareSampler())),
    "PromptGroupSampler": Part(OWN_LOOP, lambda: _with_sampler("PromptGroupSampler")),
    "SamplerEnsemble": Part(OWN_LOOP, lambda: _with_sampler("SamplerEnsemble")),
    "Sampler": Part(OWN_LOOP, lambda: filled(sampler=First())),
}


class First(parts.Sampler):
    """A sampler of a user's own: it draws the first row only."""

    def sample(self, storage, batch_size):
        return torch.zeros(batch_size, dtype=torch.long), {}

    def _empty(self):
        pass

    def dumps(self, path):
        raise NotImplementedError

    def loads(self, path):
        raise NotImplementedError

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def _with_sampler(name: str) -> TensorDictReplayBuffer:
    """A buffer whose sampler needs more than is here: only its class matters."""
    buffer = filled()
    buffer._sampler = object.__new__(getattr(parts, name))
    return buffer


STORAGES = {
    "TensorStorage": Part(RIGHT, _tensor_storage),
    "LazyTensorStorage": Part(RIGHT, filled),
    "LazyMemmapStorage": Part(RIGHT, lambda: filled(storage=rb.LazyMemmapStorage(SIZE))),
    "ListStorage": Part(NEEDS_TENSORS, _listed(rb.ListStorage)),
    "LazyStackStorage": Part(NEEDS_TENSORS, _listed(parts.LazyStackStorage)),
    "CompressedListStorage": Part(
        NEEDS_TENSORS, _listed(lambda n: parts.CompressedListStorage(n, compression_level=1))
    ),
    "StorageEnsemble": Part(IN_ONE, _ensemble),
    "StoreStorage": Part(NOT_HERE),
    "Storage": Part(NOT_HERE),
}

WRITERS = {
    "RoundRobinWriter": Part(RIGHT, lambda: filled(writer=rb.RoundRobinWriter())),
    "TensorDictRoundRobinWriter": Part(
        RIGHT, lambda: filled(writer=rb.TensorDictRoundRobinWriter())
    ),
    "ImmutableDatasetWriter": Part(RIGHT, _fixed),
    "TensorDictMaxValueWriter": Part("Leave the writer out", _max_value),
    "WriterEnsemble": Part(IN_ONE, _ensemble),
    "Writer": Part(NOT_HERE),
}

UNITS = {
    "Transition": Part(RIGHT, lambda: filled(sample_unit=parts.Transition())),
    "Sequence": Part("leave sample_unit out", lambda: filled(sample_unit=parts.Sequence(length=2))),
    "SampleUnit": Part(NOT_HERE),
}


def _net() -> TensorDictModule:
    return TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["feature"])


BOTH = ["observation", ("next", "observation")]
ROW = {"in_keys": ["extra"]}
IMAGE = {"in_keys": ["pixels"], "out_keys": ["small"]}
SLICES = "cannot be right in slices"

_TRANSFORMS: dict[str, tuple[str, Callable[[], Any] | None]] = {
    "ActionChunkTransform": (SLICES, lambda: t.ActionChunkTransform(2)),
    "ActionDiscretizer": (NOT_HERE, None),  # cannot be appended to a buffer
    "ActionMask": (ENV_ONLY, lambda: t.ActionMask()),
    "ActionScaling": (RIGHT, lambda: t.ActionScaling(in_keys=["action"], loc=0.0, scale=2.0)),
    "ActionTokenizerTransform": (NOT_HERE, None),
    "AutoResetTransform": (ENV_ONLY, lambda: t.AutoResetTransform()),
    "BatchSizeTransform": (
        RIGHT,
        lambda: t.BatchSizeTransform(reshape_fn=lambda td: td.reshape(-1, 2)),
    ),
    "BinarizeReward": (RIGHT, lambda: t.BinarizeReward(in_keys=[("next", "reward")])),
    "BurnInTransform": (SLICES, lambda: t.BurnInTransform([_net()], 1)),
    "CatFrames": (SLICES, lambda: t.CatFrames(2, -1, in_keys=["extra"])),
    "CatTensors": (RIGHT, lambda: t.CatTensors(["extra", "action"], "more", del_keys=False)),
    "CenterCrop": (NOT_HERE, None),
    "ClipTransform": (RIGHT, lambda: t.ClipTransform(in_keys=BOTH, low=-1.0, high=1.0)),
    "Compose": (RIGHT, lambda: t.Compose(t.RewardScaling(1.0, 2.0, [("next", "reward")]))),
    "ConditionalPolicySwitch": (
        ENV_ONLY,
        lambda: t.ConditionalPolicySwitch(lambda td: td, lambda td: True),
    ),
    "ConditionalSkip": (NOT_HERE, None),  # its inverse writes a flag without a batch size
    "Crop": (NOT_HERE, None),
    "DTypeCastTransform": (
        RIGHT,
        lambda: t.DTypeCastTransform(torch.float32, torch.float64, in_keys=BOTH),
    ),
    "DecodeVideoTransform": (NOT_HERE, None),
    "DeviceCastTransform": (RIGHT, lambda: t.DeviceCastTransform("cpu")),
    "DiscreteActionProjection": (NOT_HERE, None),
    "DoubleToFloat": (RIGHT, lambda: t.DoubleToFloat()),
    "EndOfLifeTransform": (ENV_ONLY, lambda: t.EndOfLifeTransform()),
    "ExcludeTransform": (RIGHT, lambda: t.ExcludeTransform("extra")),
    "ExpandAs": (RIGHT, lambda: t.ExpandAs("priority", "extra", "more")),
    "FiniteTensorDictCheck": (RIGHT, lambda: t.FiniteTensorDictCheck()),
    "FlattenAction": (NOT_HERE, None),
    "FlattenObservation": (RIGHT, lambda: t.FlattenObservation(-2, -1, **IMAGE)),
    "FrameSkipTransform": (SLICES, lambda: t.FrameSkipTransform(2)),
    "GrayScale": (RIGHT, lambda: t.GrayScale(**IMAGE)),
    "Hash": (NOT_HERE, None),
    "InitTracker": (ENV_ONLY, lambda: t.InitTracker()),
    "LineariseRewards": (RIGHT, lambda: t.LineariseRewards([("next", "reward")], weights=[2.0])),
    "MacroPrimitiveTransform": ("action: expected shape", lambda: t.MacroPrimitiveTransform()),
    "SatelliteAttitudeTransform": (NOT_HERE, None),
    "MeanActionSelector": (NOT_HERE, None),
    "ModuleTransform": (RIGHT, lambda: t.ModuleTransform(module=_net(), no_grad=True)),
    "MultiAction": (NOT_HERE, None),
    "MultiStepTransform": (SLICES, lambda: t.MultiStepTransform(2, 0.9)),
    "NextObservationDelta": (RIGHT, lambda: t.NextObservationDelta(["observation"])),
    "NextStateReconstructor": (SLICES, lambda: t.NextStateReconstructor()),
    "PolicyAgeFilter": (SLICES, lambda: t.PolicyAgeFilter(0, 1)),
    "NoopResetEnv": (RIGHT, lambda: t.NoopResetEnv()),  # does nothing outside of an env
    "ObservationNorm": (RIGHT, lambda: t.ObservationNorm(1.0, 2.0, in_keys=BOTH)),
    "ObservationTransform": (NOT_HERE, None),
    "PermuteTransform": (RIGHT, lambda: t.PermuteTransform((-1, -3, -2), **IMAGE)),
    "PinMemoryTransform": (NOT_HERE, None),
    "R3MTransform": (NOT_HERE, None),
    "RandomCropTensorDict": (SLICES, lambda: t.RandomCropTensorDict(2)),
    "RandomTruncationTransform": (ENV_ONLY, lambda: t.RandomTruncationTransform(1, 2)),
    "RayTransform": (NOT_HERE, None),
    "RemoveEmptySpecs": (RIGHT, lambda: t.RemoveEmptySpecs()),
    "RenameTransform": (RIGHT, lambda: t.RenameTransform(["extra"], ["more"])),
    "Resize": (NOT_HERE, None),
    "RNDTransform": (ENV_ONLY, lambda: t.RNDTransform(nn.Linear(3, 2), nn.Linear(3, 2))),
    "Reward2GoTransform": (SLICES, lambda: t.Reward2GoTransform()),
    "RewardClipping": (RIGHT, lambda: t.RewardClipping(-0.5, 0.5, [("next", "reward")])),
    "RewardScaling": (RIGHT, lambda: t.RewardScaling(1.0, 2.0, [("next", "reward")])),
    "RewardSum": (SLICES, lambda: t.RewardSum()),
    "SelectTransform": (
        RIGHT,
        lambda: t.SelectTransform(
            "action", *BOTH, ("next", "reward"), ("next", "terminated"), ("next", "done")
        ),
    ),
    "SignTransform": (RIGHT, lambda: t.SignTransform(in_keys=[("next", "reward")])),
    "SqueezeTransform": (RIGHT, lambda: t.SqueezeTransform(-1, in_keys=["priority"])),
    "Stack": (RIGHT, lambda: t.Stack(["extra"], "more")),
    "StepCounter": (ENV_ONLY, lambda: t.StepCounter()),
    "SuccessReward": (
        RIGHT,
        lambda: t.SuccessReward(success_key=("next", "success"), reward_key=("next", "reward")),
    ),
    "TargetReturn": (ENV_ONLY, lambda: t.TargetReturn(1.0)),
    "TensorDictPrimer": (ENV_ONLY, lambda: t.TensorDictPrimer({"hidden": rb.Unbounded((2,))})),
    "TerminateTransform": (ENV_ONLY, lambda: t.TerminateTransform(lambda td: td["extra"] > 0)),
    "TimeMaxPool": (SLICES, lambda: t.TimeMaxPool(["extra"])),
    "Timer": (ENV_ONLY, lambda: t.Timer()),
    "ToTensorImage": (RIGHT, lambda: t.ToTensorImage(from_int=False, **IMAGE)),
    "Tokenizer": (NOT_HERE, None),
    "TrajCounter": (ENV_ONLY, lambda: t.TrajCounter()),
    "Transform": (RIGHT, lambda: Doubled()),
    "URScriptPrimitiveTransform": (NOT_HERE, None),
    "UnaryTransform": (RIGHT, lambda: t.UnaryTransform(["extra"], ["more"], fn=lambda x: 2 * x)),
    "UnsqueezeTransform": (RIGHT, lambda: t.UnsqueezeTransform(-1, in_keys=["extra"])),
    "VC1Transform": (NOT_HERE, None),
    "VIPRewardTransform": (NOT_HERE, None),
    "VIPTransform": (NOT_HERE, None),
    "VecGymEnvTransform": (ENV_ONLY, lambda: t.VecGymEnvTransform()),
    "VecNorm": (RIGHT, lambda: t.VecNorm(in_keys=["extra"], new_api=False)),
    "VecNormV2": (ENV_ONLY, lambda: t.VecNormV2(in_keys=["extra"])),
    "gSDENoise": (ENV_ONLY, lambda: t.gSDENoise(2, 1)),
}


class Doubled(t.Transform):
    """A transform of a user's own: rewards are doubled."""

    def forward(self, tensordict):
        return tensordict.set(("next", "reward"), 2 * tensordict["next", "reward"])


def _transformed(make: Callable[[], Any]) -> Callable[[], Any]:
    def buffer() -> TensorDictReplayBuffer:
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(SIZE))
        buffer.append_transform(make())
        buffer.extend(episodes())
        return buffer

    return buffer


TRANSFORMS = {
    name: Part(verdict, None if make is None else _transformed(make))
    for name, (verdict, make) in _TRANSFORMS.items()
}
