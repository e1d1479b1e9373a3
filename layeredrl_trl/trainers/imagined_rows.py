"""Short imagined rollouts as rows of a replay buffer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, TransformedEnv

from layeredrl_trl import keys
from layeredrl_trl.data.positions import leaf_keys
from layeredrl_trl.envs import PredictorEnv

Policy = TensorDictModuleBase | Callable[[TensorDictBase], TensorDictBase]


def imagine_branches(
    env: EnvBase,
    policy: Policy | None,
    start: TensorDictBase,
    length: int,
    like: TensorDictBase,
    needed: Collection[NestedKey],
) -> tuple[TensorDict, int]:
    """Imagine from each state until its episode ends, for at most ``length`` steps.

    What follows the end of an episode is no row, nor is a step with numbers that are not finite or
    what follows it. A branch that did not end by itself is ``truncated`` and ``done`` at its last
    row, not ``terminated``, so that a value function bootstraps there.

    Args:
        env: imagined env, after a reset to the states.
        policy: acts in it; ``None`` for random actions.
        start: the states ``[N]``.
        length: ``H``.
        like: a real row ``[1]``: of what is imagined, the entries that it has are kept, in its
            dtypes.
        needed: entries to keep even where ``like`` lacks them, and that must be finite.

    Returns:
        The rows ``[R]``, branch after branch, and the number of branches that were cut because of
        numbers that are not finite.

    Raises:
        ValueError: if a needed entry has another shape or kind than in ``like``.
        KeyError: if an imagined step lacks a needed entry.
    """
    state, steps, layout = start, [], {}
    for _ in range(length):
        state = env.rand_action(state) if policy is None else state.update(policy(state))
        state = env.step(state)
        if not steps:
            layout = _layout(like, state, needed)
        steps.append(state.select(*layout))
        state = env.step_mdp(state)
    branches: Any = torch.stack(steps, 1)  # [N, H]

    ended = branches.get(keys.NEXT_DONE)[..., 0]
    sound = torch.stack([_is_finite(branches.get(key)) for key in needed]).all(0)
    before = torch.ones_like(ended[:, :1])
    taken = (torch.cat([before, ~ended[:, :-1]], 1) & sound).cumprod(1).bool()
    last = taken & ~torch.cat([taken[:, 1:], ~before], 1)
    cut = (last & ~ended).unsqueeze(-1)
    for key in (keys.NEXT_TRUNCATED, keys.NEXT_DONE):
        if key in layout:
            branches.set(key, branches.get(key) | cut)
    running = torch.cat([before, taken[:, :-1] & ~ended[:, :-1]], 1)
    unsound = int((running & ~sound).any(1).sum())
    rows = branches[taken]
    for key, dtype in layout.items():
        rows.set(key, rows.get(key).to(dtype))
    return rows, unsound


def model_of_rows(env: EnvBase) -> PredictorEnv:
    """Return the ``PredictorEnv`` inside of ``env``, whose steps must be single transitions.

    Raises:
        TypeError: if there is none.
        ValueError: if its encoder cannot decode, or its options give no single transitions.
    """
    model = env
    while isinstance(model, TransformedEnv):
        model = model.base_env
    if not isinstance(model, PredictorEnv):
        raise TypeError(
            "ImaginedBuffer: env: expected a PredictorEnv or a TransformedEnv of one, got "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    encoder = model.initial_state.encoder
    if not encoder.can_decode:
        raise ValueError(
            f"ImaginedBuffer: env: its {type(encoder).__name__} cannot decode, so that an imagined "
            "step has no observation."
        )
    if model.world_model.termination != "sample":
        raise ValueError(
            'ImaginedBuffer: env: expected termination="sample", got '
            f'"{model.world_model.termination}": a row does not tell how much of it is alive.'
        )
    if model.one_particle_keys:
        raise ValueError(
            "ImaginedBuffer: env: expected num_particles=1; the reward of several particles is a "
            "mean, while the observation is that of the first."
        )
    return model


def _layout(
    like: TensorDictBase, step: TensorDictBase, needed: Collection[NestedKey]
) -> dict[NestedKey, torch.dtype]:
    """Choose the entries to keep of an imagined step ``[N]``, and their dtypes."""
    layout = {}
    for key in step.keys(True, True):
        imagined, real = step.get(key), like.get(key, None)
        if not isinstance(imagined, Tensor) or (real is None and key not in needed):
            continue
        if real is None:
            layout[key] = imagined.dtype
        elif isinstance(real, Tensor) and _fits(imagined, real):
            layout[key] = real.dtype
        elif key in needed:
            raise ValueError(
                f"{key}: an imagined step has it as {_describe(imagined)}, a row of real_buffer as "
                f"{_describe(real)}. Both must be of one shape and kind."
            )
    missing = sorted({*needed} - {*layout}, key=str)
    if missing:
        raise KeyError(f"env: an imagined step has no {missing}, only {leaf_keys(step)}.")
    return layout


def _fits(imagined: Tensor, real: Tensor) -> bool:
    """Whether imagined entries ``[N, ...]`` can be put into the dtype of real ones ``[1, ...]``."""
    keeps = real.is_floating_point() or not imagined.is_floating_point()
    return imagined.shape[1:] == real.shape[1:] and keeps


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape[1:])}" if isinstance(x, Tensor) else type(x).__name__


def _is_finite(x: Tensor) -> Tensor:
    """Whether all numbers of each step are finite; bool ``[N, H]`` of ``x`` ``[N, H, ...]``."""
    return x.isfinite().flatten(2).all(-1) if x.ndim > 2 else x.isfinite()
