"""How much memory a run needs, told before it begins."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from layeredrl_trl.recipes.agent import Spaces
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.errors import RecipeError

_FLOAT = 4  # bytes
_OTHER_ENTRIES = 16  # bytes of a stored step besides observations and action: reward, flags, ids
_GIB = 2**30
_BUFFER = "total_frames"
# Files that hold the limit of a container's memory.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def memory_needed(config: TrainConfig, obs_dim: int, action_dim: int) -> dict[str, int]:
    """Estimate the memory that the parts of a run take at their largest.

    Args:
        config: options of the run.
        obs_dim: dims of an observation.
        action_dim: dims of an action.

    Returns:
        Bytes by the options that they depend on.
    """
    width, members = config.hidden_size, config.n_models
    step = (2 * obs_dim + action_dim) * _FLOAT + _OTHER_ENTRIES
    steps = math.ceil(config.total_frames / config.action_repeat)
    # two hidden layers; members give means and standard deviations, value and reward one number
    weights = width * (width + 3 * obs_dim + action_dim) * (members + 3)
    hidden = 2 * width * members
    plan = config.planning_horizon * (obs_dim + action_dim)
    candidates = config.eval_episodes * config.num_candidates * config.num_particles
    # The factors were measured on Pendulum-v1, as the peak of runs with one large option each.
    return {
        # a checkpoint is written from a copy
        _BUFFER: 2 * steps * step,
        # weights, gradients, two moments of the optimiser, and what updates them
        "hidden_size and n_models": 5 * weights * _FLOAT,
        # slices as they are stored, and the layers that are kept for the gradients
        "batch_size, n_steps, hidden_size and n_models": config.batch_size
        * (3 * config.n_steps * step + 4 * hidden * _FLOAT),
        # the planner's candidates, those of all evaluation episodes at once
        "eval_episodes, num_candidates, num_particles, planning_horizon and hidden_size": candidates
        * (4 * width + 10 * plan + 100)
        * _FLOAT,
    }


def check_memory(config: TrainConfig, spaces: Spaces) -> None:
    """Check that a run in such an env fits into the memory of this machine and of its device.

    Raises:
        RecipeError: if it does not, naming the options to lower.
    """
    needed = memory_needed(config, spaces.obs_dim, spaces.action_spec.shape[-1])
    if config.dataset is not None:  # its large entries stay on disk
        del needed[_BUFFER]
    device = torch.device(config.device)
    if device.type == "cuda":
        buffer = needed.pop(_BUFFER, 0)  # it stays in the memory of the machine
        _check(needed, torch.cuda.mem_get_info(device)[1], config.device)
        needed = {_BUFFER: buffer}
    _check(needed, machine_memory(), "this machine")


def _check(needed: dict[str, int], there: float, place: str) -> None:
    total, options = sum(needed.values()), max(needed, key=needed.__getitem__)
    if total > there:
        raise RecipeError(
            f"{options}: the run would need about {total / _GIB:,.1f} GiB of memory, and {place} "
            f"has {there / _GIB:,.1f} GiB; lower these options."
        )


def machine_memory() -> float:
    """Return the bytes of memory that this process can have at most, infinite if unknown."""
    try:
        sizes = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    except (AttributeError, ValueError, OSError):  # not on Windows
        sizes = [math.inf]
    for path in _LIMITS:
        try:
            sizes.append(float(int(path.read_text())))
        except (OSError, ValueError):  # no container, or "max"
            continue
    return min(sizes)
