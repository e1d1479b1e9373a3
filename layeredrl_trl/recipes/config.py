"""The options of the recipe as frozen dataclasses, from which the command line is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from layeredrl_trl.recipes.errors import RecipeError


class Range(NamedTuple):
    """The values that an option of numbers may have, ``low`` and ``high`` among them.

    The upper ends are far beyond what is of use. They are there so that a slip of the finger is
    told at once, and neither fills the memory nor runs for ever.
    """

    low: float
    high: float

    def fault(self, value: float) -> str:
        """Say what a value must be that is not in the range, nothing if it is."""
        if self.low <= value <= self.high:
            return ""
        if (self.low, self.high) == (0, 1):
            return "be in [0, 1]"
        if value < self.low:
            return "be positive" if self.low > 0 else "not be negative"
        return f"be at most {self.high:,}" if self.high < 10**12 else f"be at most {self.high:g}"


_ABOVE_0 = math.nextafter(0.0, 1.0)
_Frames = Annotated[int, Range(1, 10**9)]
_SomeFrames = Annotated[int, Range(0, 10**9)]
_Thousand = Annotated[int, Range(1, 1000)]
# dm_control takes seeds of 32 bits, and the seed of an evaluation is that of the run and 10,000.
_Seed = Annotated[int, Range(0, 2**31 - 1)]
_Workers = Annotated[int, Range(1, 256)]
_Threads = Annotated[int, Range(1, 256)]
_Fraction = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class TrainConfig:
    """Learn a world model of an environment and act by planning in it."""

    env: str = "Pendulum-v1"
    """Id of a Gymnasium environment (MODULE:ID imports a module first, which registers it), or
    dm_control/DOMAIN-TASK. Observations are vectors (several are joined); an action is a vector or
    one discrete choice."""
    dataset: str | None = None
    """A dataset to learn from instead of collecting: the folder of a Minari dataset, of TorchRL's
    or of a memory-mapped TensorDict, or an id in Minari's local storage. A step is then an
    optimisation step; env is where the agent is evaluated, by default the one that the dataset
    names, if it can be made."""
    seed: _Seed = 0
    """Seed of environment, exploration, networks and planner, below 2**31."""
    total_frames: _Frames = 3000
    """Number of environment steps in all, random exploration included, rounded up to whole
    batches of frames-per-batch. All of them are kept in memory."""
    action_repeat: _Thousand = 1
    """Environment steps per action. All options count environment steps, not actions."""
    init_random_frames: _Frames = 400
    """Environment steps with random actions at the beginning."""
    planned_frames: _SomeFrames = 0
    """Environment steps of planning between two later phases of random actions; 0 means no later
    random phases."""
    random_frames: _SomeFrames = 0
    """Environment steps in each later phase of random actions."""
    device: str = "cpu"
    """Device of model and planner: cpu or cuda. The environment runs on the CPU."""
    num_threads: _Threads = 1
    """Threads of torch on the CPU. The tensors are small: a second thread gains little, and loses
    much on a busy machine."""
    logdir: Path = Path("runs")
    """Folder in which the run's own folder is made."""
    resume: Path | None = None
    """The folder of a run to go on with, from its latest whole checkpoint. Only total-frames,
    device and num-threads are then read from the command line; all other options are those of the
    run. An env MODULE:ID has to be given again."""
    checkpoint_interval: _Frames = 1000
    """Environment steps between two checkpoints; one more is written at the end."""
    num_envs: _Thousand = 1
    """Environments that are stepped together, in each process that collects."""
    num_workers: _Workers = 1
    """Processes that collect; with 1 it is the one that learns."""
    asynchronous: bool = False
    """Whether workers collect while the model learns, instead of waiting for it."""
    eval_episodes: _Thousand = 10
    """Number of episodes in the final evaluation, run side by side, at most 1000."""
    frames_per_batch: _Frames = 20
    """Environment steps between two phases of learning, at most total-frames."""
    updates_per_frame: Annotated[float, Range(0, 1000)] = 2.0
    """Optimisation steps per environment step, at most 1000."""
    batch_size: Annotated[int, Range(1, 10**6)] = 256
    """Slices (for reward and value) and transitions (for the dynamics) in a batch."""
    n_models: _Thousand = 5
    """Number of ensemble members."""
    hidden_size: Annotated[int, Range(1, 2**16)] = 128
    """Width of the two hidden layers of each network."""
    learning_rate: Annotated[float, Range(_ABOVE_0, 1)] = 1e-3
    """Learning rate of every part, at most 1."""
    clip_grad_max_norm: Annotated[float, Range(_ABOVE_0, 1e30)] = 1000.0
    """Largest norm of the gradients of each part. Once the standard deviations of the dynamics are
    small, their gradients have a norm of some hundreds."""
    gamma: _Fraction = 0.97
    """Discount of the value and of the planner."""
    n_steps: _Thousand = 3
    """Largest number of rewards in a value target."""
    tau: _Fraction = 0.02
    """Fraction by which the target value network moves after each optimisation step."""
    planner: Literal["icem", "cem", "mppi"] = "icem"
    """Planner for continuous actions; discrete ones always use categorical cross-entropy."""
    return_action: Literal["best", "mean"] = "best"
    """Act by the best candidate or by the mean of the best candidates. The best one commits to one
    of several ways; the mean is steadier where a candidate's return depends on which member
    imagined it."""
    planning_horizon: _Thousand = 15
    """Number of steps that the planner looks ahead."""
    num_candidates: Annotated[int, Range(1, 10**6)] = 128
    """Action sequences that the planner tries in its first iteration (icem: fewer later on)."""
    top_k: Annotated[int, Range(1, 10**6)] = 16
    """Number of best candidates to which icem and cem fit the next iteration."""
    num_particles: Annotated[int, Range(1, 10**5)] = 1
    """Particles per candidate: fewer than n-models (candidates are spread over the members), or a
    multiple of n-models."""
    optim_steps: _Thousand = 4
    """Iterations of the planner per environment step."""
    pessimism: Annotated[float, Range(0, 1e6)] = 0.0
    """How much a plan's return loses by the disagreement of the ensemble's members, in units of the
    reward; of use with a dataset, which knows only a part of the world."""
    terminal_value: bool = True
    """Whether the planner adds the learned value of the last state of a plan."""

    def __post_init__(self) -> None:
        """Check kinds and ranges.

        Raises:
            RecipeError: naming the option, what is expected and what came.
        """
        _require_kinds(self)
        phases = ("planned_frames", "random_frames")
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
        for name in ("init_random_frames", "frames_per_batch"):
            fits = self.resume is not None or getattr(self, name) <= self.total_frames
            _require(self, name, fits, f"not exceed total_frames={self.total_frames}")
        columns = self.action_repeat * self.num_envs * self.num_workers
        if columns > self.action_repeat:
            expected = "be a multiple of 2 * action_repeat * num_envs * num_workers = "
            legal = self.frames_per_batch % (2 * columns) == 0
            _require(self, "frames_per_batch", legal, f"{expected}{2 * columns}")
        legal = not self.asynchronous or self.num_workers > 1
        _require(self, "asynchronous", legal, "be False with num_workers=1")
        check_device(self.device)


def check_device(device: str) -> None:
    """Check that torch can use a device.

    Raises:
        RecipeError: if the name is unknown or torch sees no such device.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    kind, index = (parsed.type, parsed.index) if parsed is not None else (None, None)
    if kind not in ("cpu", "cuda") or (kind == "cpu" and index is not None):
        raise RecipeError(f"device must be cpu, cuda or cuda:N, got {device!r}.")
    if kind == "cuda" and (index or 0) >= (count := torch.cuda.device_count()):
        seen = f"only {count} CUDA devices, counted from 0" if count else "no CUDA device"
        raise RecipeError(f"device is {device!r}, but torch {torch.__version__} sees {seen}.")


@dataclass(frozen=True)
class EvaluateConfig:
    """Let a trained agent act, without exploring or learning."""

    run: Path
    """The folder of a run that training has made."""
    env: str | None = None
    """Needed only if the run is of an environment MODULE:ID, whose module is imported: that id."""
    episodes: _Thousand = 10
    """Number of episodes, run side by side, at most 1000."""
    seed: _Seed = 10_000
    """Seed of environment and planner, below 2**31."""
    device: str = "cpu"
    """Device of model and planner: cpu or cuda."""
    num_threads: _Threads = 1
    """Threads of torch on the CPU."""

    def __post_init__(self) -> None:
        """Check kinds and ranges, as in :class:`TrainConfig`."""
        _require_kinds(self)
        check_device(self.device)


def _require_kinds(config: TrainConfig | EvaluateConfig) -> None:
    """Check that options are of the kind and within the range that is declared for them."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        kind, *ranges = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        value = getattr(config, name)
        if kind is bool:
            _require(config, name, isinstance(value, bool), "be True or False")
        elif kind is int:
            _require(config, name, _is_number(value, Integral), "be an integer")
        elif kind is float:
            legal = _is_number(value, Real) and abs(value) < math.inf
            _require(config, name, legal, "be a finite number")
        elif kind is str:
            _require(config, name, isinstance(value, str), "be a string")
        elif choices := [x for x in get_args(kind) if isinstance(x, str)]:
            _require(config, name, value in choices, f"be one of {choices}")
        else:
            kinds = get_args(kind) or (kind,)
            _require(config, name, isinstance(value, kinds), "be a pathlib.Path")
        for values in ranges:
            _require(config, name, not (fault := values.fault(value)), fault)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _require(config: TrainConfig | EvaluateConfig, name: str, legal: bool, expected: str) -> None:
    if not legal:
        value = getattr(config, name)
        # Python refuses to write an integer of many thousand digits.
        vast = isinstance(value, int) and value.bit_length() > 128
        got = f"an integer of {value.bit_length()} bits" if vast else value
        raise RecipeError(f"{name} must {expected}, got {got}.")
