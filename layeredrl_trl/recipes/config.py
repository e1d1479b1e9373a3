"""The options of the recipe as frozen dataclasses, from which the command line is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch


class RecipeError(ValueError):
    """An error that the user can correct; its text says how, in one line."""


@dataclass(frozen=True)
class TrainConfig:
    """Learn a world model of an environment and act by planning in it."""

    env: str = "Pendulum-v1"
    """Id of a Gymnasium environment, or dm_control/DOMAIN-TASK. Observations are vectors (several
    are joined); an action is a vector or one discrete choice."""
    seed: int = 0
    """Seed of environment, exploration, networks and planner."""
    total_frames: int = 3000
    """Number of environment steps in all, random exploration included."""
    action_repeat: int = 1
    """Environment steps per action. All options count environment steps, not actions."""
    init_random_frames: int = 400
    """Environment steps with random actions at the beginning."""
    planned_frames: int = 0
    """Environment steps of planning between two later phases of random actions; 0 means no later
    random phases."""
    random_frames: int = 0
    """Environment steps in each later phase of random actions."""
    device: str = "cpu"
    """Device of model and planner: cpu or cuda. The environment runs on the CPU."""
    num_threads: int = 1
    """Threads of torch on the CPU. The tensors are small: a second thread gains little, and loses
    much on a busy machine."""
    logdir: Path = Path("runs")
    """Folder in which the run's own folder is made."""
    resume: Path | None = None
    """A checkpoint.pt to go on from, in its folder. Only total-frames and device are then read from
    the command line; all other options are those of the checkpoint. Episodes and actions are drawn
    with a seed made from the run's seed and the steps already taken."""
    checkpoint_interval: int = 1000
    """Environment steps between two checkpoints; one more is written at the end."""
    eval_episodes: int = 10
    """Number of episodes in the final evaluation."""
    frames_per_batch: int = 20
    """Environment steps between two phases of learning."""
    updates_per_frame: float = 2.0
    """Optimisation steps per environment step."""
    batch_size: int = 256
    """Slices (for reward and value) and transitions (for the dynamics) in a batch."""
    n_models: int = 5
    """Number of ensemble members."""
    hidden_size: int = 128
    """Width of the two hidden layers of each network."""
    learning_rate: float = 1e-3
    """Learning rate of every part."""
    clip_grad_max_norm: float = 1000.0
    """Largest norm of the gradients of each part. Once the standard deviations of the dynamics are
    small, their gradients have a norm of some hundreds."""
    gamma: float = 0.97
    """Discount of the value and of the planner."""
    n_steps: int = 3
    """Largest number of rewards in a value target."""
    tau: float = 0.02
    """Fraction by which the target value network moves after each optimisation step."""
    planner: Literal["icem", "cem", "mppi"] = "icem"
    """Planner for continuous actions; discrete ones always use categorical cross-entropy."""
    return_action: Literal["best", "mean"] = "best"
    """Act by the best candidate or by the mean of the best candidates. The best one commits to one
    of several ways; the mean is steadier where a candidate's return depends on which member
    imagined it."""
    planning_horizon: int = 15
    """Number of steps that the planner looks ahead."""
    num_candidates: int = 128
    """Action sequences that the planner tries in its first iteration (icem: fewer later on)."""
    top_k: int = 16
    """Number of best candidates to which icem and cem fit the next iteration."""
    num_particles: int = 1
    """Particles per candidate: fewer than n-models (candidates are spread over the members), or a
    multiple of n-models."""
    optim_steps: int = 4
    """Iterations of the planner per environment step."""
    terminal_value: bool = True
    """Whether the planner adds the learned value of the last state of a plan."""

    def __post_init__(self) -> None:
        """Check kinds and ranges.

        Raises:
            RecipeError: naming the option, what is expected and what came.
        """
        _require_kinds(self)
        fractions, phases = ("gamma", "tau"), ("planned_frames", "random_frames")
        _require_positive(self, but=("seed", "updates_per_frame", *fractions, *phases))
        for name in fractions:
            _require(self, name, 0 <= getattr(self, name) <= 1, "be in [0, 1]")
        for name in ("updates_per_frame", *phases):
            _require(self, name, getattr(self, name) >= 0, "not be negative")
        if bool(self.planned_frames) != bool(self.random_frames):
            raise RecipeError(
                "planned_frames and random_frames must both be 0 or both be positive, got "
                f"{self.planned_frames} and {self.random_frames}."
            )
        multiple = f"be a multiple of action_repeat={self.action_repeat}"
        for name in ("total_frames", "frames_per_batch", "init_random_frames", *phases):
            _require(self, name, getattr(self, name) % self.action_repeat == 0, multiple)
        even = self.num_particles < self.n_models or self.num_particles % self.n_models == 0
        expected = f"be below n_models={self.n_models} or a multiple of it"
        _require(self, "num_particles", even, expected)
        expected = f"not exceed num_candidates={self.num_candidates}"
        _require(self, "top_k", self.top_k <= self.num_candidates, expected)
        fits = self.resume is not None or self.init_random_frames <= self.total_frames
        expected = f"not exceed total_frames={self.total_frames}"
        _require(self, "init_random_frames", fits, expected)
        check_device(self.device)


def check_device(device: str) -> None:
    """Check that torch can use a device.

    Raises:
        RecipeError: if the name is unknown or torch sees no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise RecipeError(f"device must be cpu, cuda or cuda:N, got {device!r}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            f"device is {device!r}, but torch {torch.__version__} sees no CUDA device."
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """Let a trained agent act, without exploring or learning."""

    checkpoint: Path
    """A checkpoint.pt that training has written."""
    episodes: int = 10
    """Number of episodes, run side by side."""
    seed: int = 10_000
    """Seed of environment and planner."""
    device: str = "cpu"
    """Device of model and planner: cpu or cuda."""
    num_threads: int = 1
    """Threads of torch on the CPU."""

    def __post_init__(self) -> None:
        """Check kinds and ranges, as in :class:`TrainConfig`."""
        _require_kinds(self)
        _require_positive(self, but=("seed",))
        check_device(self.device)


def _require_kinds(config: TrainConfig | EvaluateConfig) -> None:
    """Check that options are of the kind that is declared for them, and numbers finite."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if kind is bool:
            _require(config, name, isinstance(value, bool), "be True or False")
        elif kind is int:
            _require(config, name, _is_number(value, Integral), "be an integer")
        elif kind is float:
            legal = _is_number(value, Real) and math.isfinite(value)
            _require(config, name, legal, "be a finite number")
        elif choices := [x for x in get_args(kind) if isinstance(x, str)]:
            _require(config, name, value in choices, f"be one of {choices}")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _require_positive(config: TrainConfig | EvaluateConfig, but: tuple[str, ...]) -> None:
    """Check that every option that is a number is positive, but for those named."""
    for field in fields(config):
        if field.type in ("int", "float") and field.name not in but:
            _require(config, field.name, getattr(config, field.name) > 0, "be positive")


def _require(config: TrainConfig | EvaluateConfig, name: str, legal: bool, expected: str) -> None:
    if not legal:
        raise RecipeError(f"{name} must {expected}, got {getattr(config, name)}.")
