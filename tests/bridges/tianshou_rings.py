"""Buffers of tianshou, written anew: rings of rows that share one block of memory.

After tianshou 0.5 to 2.0: ``ReplayBuffer.add`` and ``ReplayBufferManager.add``.
"""

from __future__ import annotations

import numpy as np


class Rings:
    """``VectorReplayBuffer``: one ring for each environment; with one ring a ``ReplayBuffer``.

    ``episodes`` holds for each ring all that was ever added, as lists of steps.
    """

    def __init__(self, sizes, obs_dim=2, ignore_obs_next=False):
        self.sizes, self.offsets = list(sizes), np.cumsum([0, *sizes])[:-1]
        n = sum(sizes)
        # rows that are not filled yet hold what a mistake would show
        self.arrays = {
            "obs": np.full((n, obs_dim), np.nan),
            "act": np.full((n, 1), np.nan),
            "rew": np.full(n, np.nan),
            "terminated": np.zeros(n, bool),
            "truncated": np.zeros(n, bool),
            "done": np.zeros(n, bool),
        }
        if not ignore_obs_next:
            self.arrays["obs_next"] = np.full((n, obs_dim), np.nan)
        self.cursor, self.lengths = [0] * len(sizes), [0] * len(sizes)
        self.last_index = self.offsets.copy()
        self.history = [[] for _ in sizes]

    def add(self, ring, **step):
        row = int(self.offsets[ring]) + self.cursor[ring]
        step["done"] = step["terminated"] or step["truncated"]
        for name, array in self.arrays.items():
            array[row] = step[name]
        self.last_index[ring] = row
        self.cursor[ring] = (self.cursor[ring] + 1) % self.sizes[ring]
        self.lengths[ring] = min(self.lengths[ring] + 1, self.sizes[ring])
        self.history[ring].append(step)

    def numbers(self):
        """The arguments of ``from_tianshou``."""
        return {"sizes": self.sizes, "lengths": self.lengths, "last_index": self.last_index}

    def episodes(self):
        """What is still stored, as a list of episodes, ring after ring, each a list of steps."""
        found = []
        for ring, steps in enumerate(self.history):
            episode = []
            for step in steps[len(steps) - self.lengths[ring] :]:
                episode.append(step)
                if step["done"]:
                    found.append(episode)
                    episode = []
            if episode:
                found.append(episode)
        return found


def record(rings, lengths_of, seed=0):
    """Add episodes to each ring: ``lengths_of[ring]`` is a list of ``(length, end)``.

    ``end`` is "terminated", "truncated", "both" or "unfinished". Every number is unlike all others.
    """
    numbers = iter(range(1, 10**6))
    for ring, episodes in enumerate(lengths_of):
        for length, end in episodes:
            obs = [np.array([next(numbers), ring]) for _ in range(length + 1)]
            for t in range(length):
                last = t == length - 1
                rings.add(
                    ring,
                    obs=obs[t],
                    obs_next=obs[t + 1],
                    act=[next(numbers)],
                    rew=next(numbers),
                    terminated=last and end in ("terminated", "both"),
                    truncated=last and end in ("truncated", "both"),
                )
    return rings
