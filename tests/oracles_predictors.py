"""Slow obvious references for the predictors, and the toys they are tried on.

An oracle walks the storage step by step in Python floats; it knows the order in which the steps
were written because it is told, not from what the sampler finds out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from layeredrl_trl.modules import Encoder

# --- parts


class SplitEncoder(Encoder):
    """No parameters: the first dims are the latent state, the last one is the context.

    In the toy data the context changes from step to step, so it is seen whose step's it is.
    """

    def __init__(self, **keys):
        super().__init__(3, 2, 1, **keys)

    def embed(self, observation):
        return observation[..., :2], observation[..., 2:]


class ToyValue(nn.Module):
    """A plain state value: ``tanh(latent w) + 0.5 context``."""

    def __init__(self, w: float = 0.7):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w, -0.4]))

    def forward(self, latent, context):
        return (latent * self.w).sum(-1, keepdim=True).tanh() + 0.5 * context

    @staticmethod
    def oracle(w: list[float], latent, context, action) -> float:
        return math.tanh(sum(a * b for a, b in zip(latent, w, strict=True))) + 0.5 * context[0]


class ToyQ(ToyValue):
    """A plain Q-function: ``tanh(latent w) + 0.5 context + 2 action``."""

    def forward(self, latent, context, action):
        return super().forward(latent, context) + 2 * action

    @staticmethod
    def oracle(w: list[float], latent, context, action) -> float:
        return ToyValue.oracle(w, latent, context, action) + 2 * action[0]


# --- data


@dataclass
class ToyBuffer:
    """A replay buffer, what it stores as Python lists, and the row last written."""

    buffer: ReplayBuffer
    last_row: int
    ndim: int

    def __post_init__(self):
        self.data = self.buffer.storage[:]
        if self.ndim == 1:
            self.data = self.data.unsqueeze(1)
        self.rows = self.data.shape[0]
        end = self.data["next", "terminated"] | self.data["next", "truncated"]
        entries = {
            "obs": self.data["observation"],
            "act": self.data["action"],
            "next_obs": self.data["next", "observation"],
            "reward": self.data["next", "reward"].squeeze(-1),
            "terminated": self.data["next", "terminated"].squeeze(-1),
            "end": end.squeeze(-1),
        }
        self.lists = {key: x.tolist() for key, x in entries.items()}

    def at(self, key: str, row: int, lane: int):
        return self.lists[key][row][lane]

    def is_planned(self, row: int, lane: int) -> bool:
        return bool(self.data["planned"][row, lane]) if "planned" in self.data.keys() else True

    def walk(self, row: int, lane: int) -> list[int]:
        """Rows of the rest of the episode, from one on."""
        rows = [row]
        while not self.at("end", row, lane) and row != self.last_row:
            row = (row + 1) % self.rows
            rows.append(row)
        return rows


def episodes(n: int, ends: list[tuple[int, bool]], *, planned: bool = False) -> TensorDict:
    """``n`` steps of one env. ``ends``: (length, terminated) of its episodes, over and over.

    The first state of an episode is drawn anew, so the state after an episode's last step is in
    ``("next", "observation")`` only.
    """
    observation = torch.randn(n, 3)
    next_observation = observation.roll(-1, 0)
    terminated, truncated = torch.zeros(2, n, 1, dtype=torch.bool)
    step, i = -1, 0
    while ends:
        length, is_terminated = ends[i % len(ends)]
        step, i = step + length, i + 1
        if step >= n:
            break
        (terminated if is_terminated else truncated)[step] = True
    last = (terminated | truncated).squeeze(-1)
    last[-1] = True
    next_observation[last] = torch.randn(int(last.sum()), 3)
    data = {
        "observation": observation,
        "action": torch.randn(n, 1),
        "next": {
            "observation": next_observation,
            "reward": torch.randn(n, 1),
            "terminated": terminated,
            "truncated": truncated,
            "done": terminated | truncated,
        },
    }
    if planned:
        data["planned"] = torch.rand(n, 1) < 0.5
    return TensorDict(data, batch_size=[n])


def filled_buffer(
    n: int = 60,
    ends: list[tuple[int, bool]] | None = None,
    *,
    capacity: int | None = None,
    ndim: int = 1,
    planned: bool = False,
    **kwargs,
) -> ToyBuffer:
    """A buffer to which ``n`` steps of one env (``ndim=2``: of each of two) were written."""
    ends = [(7, True), (5, False)] if ends is None else ends
    capacity = n if capacity is None else capacity
    streams = [episodes(n, ends[lane:] + ends[:lane], planned=planned) for lane in range(ndim)]
    data = torch.stack(streams) if ndim == 2 else streams[0]
    # TensorDictReplayBuffer 0.14.1 cannot extend a storage of two dims by a single time step
    buffer_class = ReplayBuffer if ndim == 2 else TensorDictReplayBuffer
    storage = LazyTensorStorage(capacity * ndim, ndim=ndim)
    buffer = buffer_class(storage=storage, **kwargs)
    for first in range(0, n, capacity):
        chunk = slice(first, min(first + capacity, n))
        buffer.extend(data[:, chunk] if ndim == 2 else data[chunk])
    return ToyBuffer(buffer, (n - 1) % capacity, ndim)


# --- oracle


def target_oracle(
    toy: ToyBuffer, start: tuple[int, int], k: int, n: int, gamma: float, value=None, q=False
) -> list[dict]:
    """What ``compute_targets`` has to say of each of the first ``k`` steps of a slice.

    Args:
        toy: the data.
        start: row and env of the first step.
        k: steps that get a target.
        n: most rewards of a target.
        gamma: discount.
        value: ``f(latent, context, action) -> float``; None: no bootstrap.
        q: whether ``value`` needs an action.

    Returns:
        For each step ``row``, ``mask``, ``has_target`` and, where that is True, ``target``,
        ``bootstrap`` (the value that it ends with, before its discount; 0 behind a termination) and
        ``size`` (the sum of the magnitudes that went into it).
    """
    lane = start[1]
    path = toy.walk(*start)
    context = toy.at("obs", path[0], lane)[2:]
    ends_terminated = toy.at("terminated", path[-1], lane)

    def bootstrap(obs, act):
        return 0.0 if value is None else value(obs[:2], context, act)

    out = []
    for j in range(k):
        if j >= len(path):
            out.append({"row": path[-1], "mask": False, "has_target": False})
            continue
        target, discount, size, has_target = 0.0, 1.0, 0.0, True
        i = j
        while True:
            row = path[i]
            last = i == len(path) - 1
            if q and last and not ends_terminated:  # no action to bootstrap with behind it
                has_target = i > j
                tail = bootstrap(toy.at("obs", row, lane), toy.at("act", row, lane))
                break
            target += discount * toy.at("reward", row, lane)
            size += abs(discount * toy.at("reward", row, lane))
            discount *= gamma
            if last and ends_terminated:
                tail = 0.0
                break
            is_next_random = not last and not toy.is_planned(path[i + 1], lane)
            if last or i + 1 == j + n or is_next_random:
                if q:
                    tail = bootstrap(
                        toy.at("obs", path[i + 1], lane), toy.at("act", path[i + 1], lane)
                    )
                else:
                    tail = bootstrap(toy.at("next_obs", row, lane), None)
                break
            i += 1
        out.append(
            {
                "row": path[j],
                "mask": True,
                "has_target": has_target,
                "target": target + discount * tail,
                "bootstrap": tail,
                "size": size + abs(discount * tail),
            }
        )
    return out


def adam_oracle(grads: list[Tensor], lr: float) -> Tensor:
    """The change that Adam makes to a parameter by a sequence of gradients."""
    m = v = total = torch.zeros_like(grads[0], dtype=torch.float64)
    for t, grad in enumerate(grads, 1):
        grad = grad.double()
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad.square()
        total = total - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return total


# --- what was logged


def read_tensorboard(path: Path) -> dict[str, list[tuple[int, float]]]:
    """``(step, value)`` of every scalar that a TensorBoard writer left in a folder."""
    events = EventAccumulator(str(path)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def read_csv(path: Path) -> dict[str, list[tuple[int, float]]]:
    """``(step, value)`` of every scalar that a ``CSVLogger`` left in a folder."""
    out = {}
    for file in path.rglob("*.csv"):
        name = file.with_suffix("").as_posix().split("/scalars/")[1]
        rows = [line.split(",") for line in file.read_text().splitlines()]
        out[name] = [(int(step), float(value)) for step, value in rows]
    return out
