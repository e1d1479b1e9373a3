"""What a trainer writes down of what it collects: finished episodes, and how its plans went."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from layeredrl_trl import keys
from layeredrl_trl.planners import SamplingPlanner

_TITLE = ("env_steps", "return")


class EpisodeLog(TrainerHookBase):
    """Write every finished episode to a table, and log its return as ``train/episode_return``.

    The table only grows, so a checkpoint holds its length: a run that goes on from there cuts off
    what came later, when it begins. Rows that a full disk did not take are written with the next
    ones, and at the latest with a checkpoint.

    Args:
        path: the table, a file of comma-separated values with the columns ``env_steps`` (in all, at
            the end of the episode) and ``return``.
        return_key: entry ``[..., 1]`` of the sum of rewards in an episode, as ``RewardSum`` writes
            it.

    Reads:
        ``("next", "done")`` and ``return_key`` of batches ``[T]`` or ``[..., T]``, in which envs
        step side by side.
    """

    def __init__(
        self, path: str | Path, return_key: NestedKey = ("next", "episode_reward")
    ) -> None:
        self.path = Path(path)
        self.return_key = return_key
        self._trainer: Trainer | None = None
        self._length: int | None = None  # bytes that count, if what follows is to be cut off
        self._unwritten: list[tuple[int, float]] = []

    def episodes(self) -> list[tuple[int, float]]:
        """Return ``(env steps at its end, return)`` of every finished episode."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()[: self._length].decode()
        rows = list(csv.reader(text.splitlines()))[1:]
        return [(int(step), float(value)) for step, value in rows]

    def __call__(self, batch: TensorDictBase) -> dict[str, Any] | None:
        """Note the episodes that ended in a batch; the last return goes to the bar of progress."""
        trainer, n_envs = self._trainer, max(1, batch.numel() // batch.shape[-1])
        skip = trainer.frame_skip
        before = trainer.collected_frames - batch.numel() * skip
        done = batch.get(keys.NEXT_DONE).reshape(n_envs, -1)
        returns = batch.get(self.return_key).reshape(n_envs, -1)
        ends = [
            (before + (step + 1) * n_envs * skip, returns[env, step].item())
            for step, env in done.T.nonzero().tolist()
        ]
        if not ends:
            return None
        self._unwritten += ends
        self._write()
        for step, value in ends:
            if trainer.logger is not None:
                trainer.logger.log_scalar("train/episode_return", value, step=step)
        return {"return": ends[-1][1], "log_pbar": True}

    def register(self, trainer: Trainer, name: str = "episode_log") -> None:
        """Register at the stages ``"setup"`` and ``"pre_steps_log"``."""
        self._trainer = trainer
        trainer.register_module(name, self)
        trainer.register_op("setup", self._cut)
        trainer.register_op("pre_steps_log", self)

    def state_dict(self) -> dict[str, Any]:
        """Return the length of the table in bytes, which are on the disk then."""
        if self._unwritten:
            self._write()
        if self._length is not None or not self.path.exists():
            return {"length": self._length or 0}
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return {"length": file.tell()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the table at the length that :meth:`state_dict` returned; training cuts it there.

        Raises:
            ValueError: if it is shorter: rows are missing.
        """
        length, there = state["length"], self.path.stat().st_size if self.path.exists() else 0
        if there < length:
            raise ValueError(f"{self.path.name} has {there} bytes, fewer than {length}.")
        self._length, self._unwritten = length, []

    def _cut(self) -> None:
        if self._length is not None and self.path.exists():
            os.truncate(self.path, self._length)
        self._length = None

    def _write(self) -> None:
        """Append the rows that are not written yet: all of them, or none if the disk is full."""
        self._cut()
        before = self.path.stat().st_size if self.path.exists() else 0
        rows = self._unwritten if before else [_TITLE, *self._unwritten]
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
        except BaseException:
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)
            raise
        self._unwritten = []


class PlannerLog(TrainerHookBase):
    """Log each of a planner's statistics as ``planner/...``, its mean over the planned steps.

    Args:
        planner: writes its ``statistics_keys`` into what is collected.

    Reads:
        The statistics, and ``planned`` if it is there.
    """

    def __init__(self, planner: SamplingPlanner) -> None:
        self.planner = planner

    def __call__(self, batch: TensorDictBase) -> dict[str, float] | None:
        """Return the scalars of a batch; ``None`` if nothing was planned in it."""
        names = self.planner.statistics_keys
        planned = batch.get(keys.PLANNED, None)
        if planned is None:
            planned = torch.ones_like(batch.get(names[0]), dtype=torch.bool)
        if not planned.any():
            return None
        return {f"planner/{name}": batch.get(name)[planned].mean().item() for name in names}

    def register(self, trainer: Trainer, name: str = "planner_log") -> None:
        """Register at the stage ``"pre_steps_log"``."""
        trainer.register_op("pre_steps_log", self)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is no state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
