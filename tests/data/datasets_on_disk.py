"""Small datasets as Minari and TorchRL lay them out, and a slow reader to compare with."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor

if find_spec("h5py") is not None:  # an extra
    import h5py


class Episode(NamedTuple):
    """One episode: ``T + 1`` observations, ``T`` of everything else."""

    observations: list[Any]
    actions: list[Any]
    rewards: list[float]
    terminations: list[bool]
    truncations: list[bool]


def box(*shape: int, dtype=np.float64, bound: float = np.inf) -> spaces.Box:
    return spaces.Box(-bound, bound, shape, dtype)


def sample(space: spaces.Space, rng: np.random.Generator) -> Any:
    """An element of a space; numbers are far from 0, so that a lost one is seen."""
    if isinstance(space, spaces.Dict):
        return {key: sample(inner, rng) for key, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(sample(inner, rng) for inner in space.spaces)
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        return rng.uniform(0.2, 1.0, space.shape).astype(space.dtype)
    space.seed(int(rng.integers(2**31)))
    return space.sample()


def episodes_of(
    observation_space: spaces.Space,
    action_space: spaces.Space,
    ends: tuple[str, ...] = ("terminated", "truncated", "", "terminated"),
    seed: int = 0,
) -> list[Episode]:
    """Episodes of 3, 4, 5, ... steps with the given ends; an end '' sets no flag."""
    rng = np.random.default_rng(seed)
    made = []
    for i, end in enumerate(ends):
        n = 3 + i
        last = [False] * (n - 1)
        made.append(
            Episode(
                [sample(observation_space, rng) for _ in range(n + 1)],
                [sample(action_space, rng) for _ in range(n)],
                rng.uniform(0.5, 1.5, n).tolist(),
                [*last, end == "terminated"],
                [*last, end == "truncated"],
            )
        )
    return made


def read_slowly(
    episodes: list[Episode], observation_space: spaces.Space, action_space: spaces.Space
) -> dict[str, Tensor]:
    """The rows that a reader must give, step by step, by Gymnasium's own flattening."""
    rows: list[dict[str, Any]] = []
    for number, episode in enumerate(episodes):
        n = len(episode.rewards)
        for t in range(n):
            terminated = episode.terminations[t]
            rows.append(
                {
                    "observation": spaces.flatten(observation_space, episode.observations[t]),
                    "next": spaces.flatten(observation_space, episode.observations[t + 1]),
                    "action": spaces.flatten(action_space, episode.actions[t]),
                    "reward": [episode.rewards[t]],
                    "terminated": [terminated],
                    "truncated": [episode.truncations[t] or (t == n - 1 and not terminated)],
                    "episode": number,
                }
            )
    return {
        key: torch.as_tensor(np.array([row[key] for row in rows])).to(
            torch.float32 if key in ("observation", "next", "action", "reward") else None
        )
        for key in rows[0]
    }


def to_json(space: spaces.Space) -> dict[str, Any]:
    """A space as Minari writes it."""
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "subspaces": {k: to_json(s) for k, s in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "subspaces": [to_json(s) for s in space.spaces]}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "dtype": "int64", "start": int(space.start), "n": int(space.n)}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n}
    if isinstance(space, spaces.MultiDiscrete):
        nvec, start = space.nvec.tolist(), space.start.tolist()
        return {"type": "MultiDiscrete", "dtype": str(space.dtype), "nvec": nvec, "start": start}
    if isinstance(space, spaces.Text):
        return {"type": "Text", "max_length": 9, "min_length": 0, "charset": "a"}
    assert isinstance(space, spaces.Box)
    bounds = {"low": space.low.tolist(), "high": space.high.tolist()}
    return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), **bounds}


def write_minari(
    folder: Path,
    episodes: list[Episode],
    observation_space: spaces.Space,
    action_space: spaces.Space,
    **metadata: Any,
) -> Path:
    """Write a dataset by hand; returns the folder with the files."""
    data = folder / "data"
    data.mkdir(parents=True)
    content = {
        "total_episodes": len(episodes),
        "total_steps": sum(len(episode.rewards) for episode in episodes),
        "data_format": "hdf5",
        "observation_space": json.dumps(to_json(observation_space)),
        "action_space": json.dumps(to_json(action_space)),
        "env_spec": json.dumps({"id": "Hand-v0", "entry_point": "no.such.module:Env"}),
    }
    (data / "metadata.json").write_text(json.dumps(content | metadata))
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            _put(group, "observations", episode.observations)
            _put(group, "actions", episode.actions)
            group["rewards"] = np.array(episode.rewards)
            group["terminations"] = np.array(episode.terminations)
            group["truncations"] = np.array(episode.truncations)
            group["infos/useless"] = np.zeros(len(episode.rewards) + 1)
    return data


def _put(group: Any, name: str, values: list[Any]) -> None:
    first = values[0]
    if isinstance(first, dict | tuple):
        inner = group.create_group(name)
        keys = first if isinstance(first, dict) else range(len(first))
        for key in keys:
            stored = key if isinstance(first, dict) else f"_index_{key}"
            _put(inner, stored, [value[key] for value in values])
    else:
        group[name] = np.array(values)


def steps(
    lengths: tuple[int, ...] = (3, 5, 4, 6), ends: tuple[str, ...] = ("terminated", "truncated")
) -> TensorDict:
    """Rows ``[N]`` of episodes as TorchRL stores them, each ended in the given ways in turn."""
    rng = np.random.default_rng(3)
    parts = []
    for number, n in enumerate(lengths):
        state = torch.from_numpy(rng.uniform(0.2, 1, (n + 1, 3))).cumsum(0)
        last = torch.arange(n).eq(n - 1).unsqueeze(-1)
        end = ends[number % len(ends)]
        flags = {
            "terminated": last & (end == "terminated"),
            "truncated": last & (end != "terminated"),
        }
        parts.append(
            TensorDict(
                {
                    "observation": state[:-1],
                    "action": torch.from_numpy(rng.uniform(-1, 1, (n, 2))),
                    "episode": torch.full((n,), number),
                    "next": {
                        "observation": state[1:],
                        "reward": torch.from_numpy(rng.uniform(0.5, 1, (n, 1))),
                        "done": last,
                        **flags,
                    },
                },
                batch_size=[n],
            )
        )
    return torch.cat(parts)
