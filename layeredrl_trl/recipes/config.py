"""The options of the recipe, one frozen dataclass; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


class RecipeError(ValueError):
    """Something the user can set right; its text says what, in one line."""


@dataclass(frozen=True)
class TrainConfig:
    """Learn a world model of an environment and act by planning in it."""

    env: str = "Pendulum-v1"
    """Id of a Gymnasium environment, or dm_control/DOMAIN-TASK; observations are vectors (several
    are joined), actions a vector or one discrete choice."""
    seed: int = 0
    """Of everything: environment, exploration, networks, planner."""
    total_frames: int = 3000
    """Environment steps in all, random exploration included."""
    action_repeat: int = 1
    """Environment steps per action. Each of them counts as a step here, in all options."""
    init_random_frames: int = 400
    """Environment steps with random actions at first."""
    planned_frames: int = 0
    """Environment steps of planning between two phases of random actions later on; 0 for no such
    phases."""
    random_frames: int = 0
    """Environment steps of such a phase of random actions."""
    device: str = "cpu"
    """Of model and planner: cpu or cuda. The environment runs on the CPU."""
    num_threads: int = 1
    """Of torch on the CPU. The tensors here are small: a second thread gains little and loses much
    where the machine is busy with other things."""
    logdir: Path = Path("runs")
    """Folder under which the run's own folder is made."""
    resume: Path | None = None
    """A checkpoint.pt to go on from, in its folder; of all options only total-frames and device
    are read then, the others are those of the checkpoint. Episodes and actions are drawn by a seed
    that is made of the run's and of the steps already taken."""
    checkpoint_interval: int = 1000
    """Environment steps between two checkpoints; one is written at the end in any case."""
    eval_episodes: int = 10
    """Episodes of the final evaluation."""
    frames_per_batch: int = 20
    """Environment steps between two phases of learning."""
    updates_per_frame: float = 2.0
    """Optimisation steps per environment step."""
    batch_size: int = 256
    """Slices (for reward and value) and transitions (for the dynamics) in a batch."""
    n_models: int = 5
    """Members of the ensemble."""
    hidden_size: int = 128
    """Width of the two hidden layers of each network."""
    learning_rate: float = 1e-3
    """Of every part."""
    clip_grad_max_norm: float = 1000.0
    """Largest global norm of the gradients. That of the dynamics reaches some hundreds once its
    standard deviations are small; a low bound would hold back reward and value with it."""
    gamma: float = 0.97
    """Discount of the value and of the planner."""
    n_steps: int = 3
    """Most rewards in a value target."""
    tau: float = 0.02
    """How far the value's target moves after each optimisation step."""
    planner: Literal["icem", "cem", "mppi"] = "icem"
    """How continuous actions are searched; discrete ones always by categorical cross-entropy."""
    return_action: Literal["best", "mean"] = "best"
    """Act by the best candidate, which commits to one way out of several, or by the mean of the
    best few, which is steadier where one candidate is as good as its luck with a member."""
    planning_horizon: int = 15
    """Steps that the planner looks ahead."""
    num_candidates: int = 128
    """Action sequences that the planner tries in its first iteration (icem: fewer later on)."""
    top_k: int = 16
    """Best candidates, to which icem and cem fit the next iteration's."""
    num_particles: int = 1
    """Particles per candidate: 1 (candidates are spread over the members), or a multiple of
    n-models."""
    optim_steps: int = 4
    """Iterations of the planner per environment step."""
    terminal_value: bool = True
    """Let the planner add the learned value of the last state of a plan."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            RecipeError: naming the option, what is expected and what came.
        """
        positive = (
            "total_frames",
            "action_repeat",
            "init_random_frames",
            "num_threads",
            "checkpoint_interval",
            "eval_episodes",
            "frames_per_batch",
            "batch_size",
            "n_models",
            "hidden_size",
            "learning_rate",
            "clip_grad_max_norm",
            "n_steps",
            "planning_horizon",
            "num_candidates",
            "top_k",
            "num_particles",
            "optim_steps",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("updates_per_frame", "planned_frames", "random_frames"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name} must not be negative, got {getattr(self, name)}.")
        if bool(self.planned_frames) != bool(self.random_frames):
            raise RecipeError(
                "planned_frames and random_frames must both be 0 or both be positive, got "
                f"{self.planned_frames} and {self.random_frames}."
            )
        if self.num_particles >= self.n_models and self.num_particles % self.n_models:
            raise RecipeError(
                f"num_particles must be below n_models={self.n_models} or a multiple of it, got "
                f"{self.num_particles}."
            )
        for name in (
            "total_frames",
            "frames_per_batch",
            "init_random_frames",
            "planned_frames",
            "random_frames",
        ):
            if getattr(self, name) % self.action_repeat:
                raise RecipeError(
                    f"{name} must be a multiple of action_repeat={self.action_repeat}, "
                    f"got {getattr(self, name)}."
                )
        check_device(self.device)
        for name in ("gamma", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.top_k > self.num_candidates:
            raise RecipeError(
                f"top_k must not exceed num_candidates={self.num_candidates}, got {self.top_k}."
            )
        if self.resume is None and self.init_random_frames > self.total_frames:
            raise RecipeError(
                f"init_random_frames must not exceed total_frames={self.total_frames}, "
                f"got {self.init_random_frames}."
            )


def check_device(device: str) -> None:
    """Check that there is such a device.

    Raises:
        RecipeError: if the name is unknown or the device is not there.
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
    """Episodes, run side by side."""
    seed: int = 10_000
    """Of environment and planner."""
    device: str = "cpu"
    """Of model and planner: cpu or cuda."""
    num_threads: int = 1
    """Of torch on the CPU."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            RecipeError: naming the option, what is expected and what came.
        """
        for name in ("episodes", "num_threads"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be positive, got {getattr(self, name)}.")
        check_device(self.device)
