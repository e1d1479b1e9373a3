"""Whether the observations after the last steps of episodes were stored, or something in place."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

_FEWEST = 3
"""Number of ends below which nothing is suspected."""

_MOST = 0.9
"""Share of the ends that must look lost."""


def suspect_lost_observations(transitions: TensorDict) -> str | None:
    """Say why the observations after the ends of episodes seem to be lost; None if they do not.

    They seem lost where all of their entries are exactly 0, or NaN, which no observation after
    another step is. It must be so at nine of ten ends, three at least; at truncated ends three are
    enough, because a time limit may pass at any observation, and some of these ends may be those of
    collected batches (``set_truncated=True``), after which nothing is lost.

    Args:
        transitions: ``[N]`` with ``next_observation`` ``[N, *O]``, bool ``ended`` ``[N]`` and, if
            known, bool ``terminated`` ``[N]``; without ``ended`` nothing is suspected.

    Reference:
        TorchRL 0.14's ``GymEnv(num_envs=N)`` on Gymnasium 1.x, whose vector envs reset in the step
        after an end by default.
    """
    ended = transitions.get("ended", None)
    if ended is None or ended.all():
        return None
    following = transitions["next_observation"].flatten(1)
    terminated = transitions.get("terminated", None)
    truncated = ended if terminated is None else ended & ~terminated
    for lost, what in (((following == 0).all(1), "0"), (following.isnan().all(1), "NaN")):
        n, n_truncated = _count(lost & ended), _count(lost & truncated)
        n_ends = _count(ended)
        enough = n_truncated >= _FEWEST or (n >= _FEWEST and n >= _MOST * n_ends)
        if not enough or _count(lost & ~ended):
            continue
        text = (
            f"After {n} of {n_ends} ends of episodes all of the next observation is {what}, as it "
            "is after no other step: it was probably lost, and then values bootstrap from a state "
            "that never was, and the model learns to predict it. TorchRL's GymEnv(num_envs=...) "
            "stores such steps on Gymnasium 1.x: use SerialEnv or ParallelEnv of GymEnv."
        )
        if what == "0":
            text += " If episodes of this environment do end in the zero state, all is well."
        return text
    return None


def _count(flag: Tensor) -> int:
    return int(flag.sum())
