"""The optimisation step of a predictor, with one optimiser group for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from layeredrl_trl.acceleration import CompiledLoss, DeviceUpdate
from layeredrl_trl.checks import check_count
from layeredrl_trl.objectives import ForeachSoftUpdate, RewardPredictorLoss, Update

_COUNTS = ("steps", "skipped", "n_learn_calls")


def make_update(
    loss: RewardPredictorLoss,
    *,
    tau: float,
    clip_grad_max_norm: float | None,
    encoder_warm_up: int,
    compile: bool,
    cudagraphs: bool,
) -> Update | DeviceUpdate:
    """Make the optimisation step of a loss; options as in :class:`RewardPredictor`."""
    parts = {
        "model": loss.dynamics,
        "value": loss.value_network if loss.has_value else None,
        "reward": loss.reward,
        "encoder": loss.encoder if loss.learn_encoder else None,
        "delta_standardizer": loss.standardizer,
    }
    params = {name: list(part.parameters()) for name, part in parts.items() if part is not None}
    groups = [{"params": own, "name": name} for name, own in params.items() if own]
    # without a reward nothing would learn in the warm-up, without the encoder it has no use
    has_warm_up = loss.learn_encoder and loss.reward is not None
    update = Update(
        loss,
        torch.optim.Adam(groups, fused=True),
        target_updater=ForeachSoftUpdate(loss, tau) if params.get("value") else None,
        clip_grad_max_norm=clip_grad_max_norm,
        warm_up=encoder_warm_up if has_warm_up else 0,
        warm_up_params=[*params.get("encoder", ()), *params.get("reward", ())],
    )
    if compile:
        update.compute = CompiledLoss(loss)
    return DeviceUpdate(update) if cudagraphs else update


def update_state(update: Update | DeviceUpdate) -> dict[str, Any]:
    """Return the state of the optimiser, and counters."""
    return {
        "optimizer": update.optimizer.state_dict(),
        "parameters": _parameter_shapes(update),
        "steps": update.steps,
        "skipped": update.skipped,
    }


def load_update_state(update: Update | DeviceUpdate, state: Mapping[str, Any]) -> None:
    """Restore the state from :func:`update_state`.

    Raises:
        TypeError, ValueError: as from :func:`check_update_state`; nothing is changed then.
    """
    check_update_state(update, state)
    # copied, because the optimiser would share the tensors of the state
    update.optimizer.load_state_dict(deepcopy(state["optimizer"]))
    update.steps, update.skipped = state["steps"], state["skipped"]


def check_update_state(update: Update | DeviceUpdate, state: Any, more: Sequence[str] = ()) -> None:
    """Check that a state from :func:`update_state`, with ``more`` entries, is of this update.

    Raises:
        TypeError: if a number of steps or calls is no integer.
        ValueError: if an entry is missing, or the state is of other parts or layers.
    """
    needed = ["optimizer", "steps", "skipped", *more]
    if not isinstance(state, Mapping) or {*needed} - state.keys():
        given = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"state_dict: expected the state of an optimiser with the entries {needed}, got "
            f"{given}."
        )
    shapes = _parameter_shapes(update)
    _check_parameters(shapes, state.get("parameters"))
    _check_optimizer(shapes, state["optimizer"])
    for name in _COUNTS:
        if name in state:
            check_count(f"state_dict: {name}", state[name], least=0)


def _parameter_shapes(update: Update | DeviceUpdate) -> dict[str, list[list[int]]]:
    """Return the shapes of the optimiser's parameters, by name of the part."""
    groups = update.optimizer.param_groups
    return {group["name"]: [list(p.shape) for p in group["params"]] for group in groups}


def _check_parameters(own: dict[str, Any], given: dict[str, Any] | None) -> None:
    if given is None or given == own:  # None: saved by an earlier version
        return
    if list(given) != list(own):
        raise ValueError(
            f"state_dict: it is of a predictor whose parts {list(given)} learn; here "
            f"{list(own)} do."
        )
    name = next(name for name, shapes in own.items() if shapes != given[name])
    raise ValueError(
        f"state_dict: expected parameters of {name!r} of the shapes {own[name]}, got "
        f"{given[name]}: it is of a predictor of another architecture."
    )


def _check_optimizer(shapes: dict[str, list[list[int]]], given: Any) -> None:
    """Check that the state of an optimiser is of parameters of these shapes, by part."""
    if not isinstance(given, Mapping) or {"state", "param_groups"} - given.keys():
        raise ValueError(
            "state_dict: expected a state of the optimiser, with the entries 'state' and "
            f"'param_groups', got {sorted(given) if isinstance(given, Mapping) else given!r}."
        )
    groups = given["param_groups"]
    counts = [len(group["params"]) for group in groups]
    expected = {name: len(own) for name, own in shapes.items()}
    if counts != [*expected.values()]:
        raise ValueError(
            f"state_dict: expected an optimiser with {expected} parameters, got one with {counts}."
        )
    ordered = [shape for own in shapes.values() for shape in own]
    numbers = [number for group in groups for number in group["params"]]
    for number, shape in zip(numbers, ordered, strict=True):
        for name, x in given["state"].get(number, {}).items():
            # a number of steps has no dims
            if isinstance(x, Tensor) and x.ndim and list(x.shape) != shape:
                raise ValueError(
                    f"state_dict: expected {name!r} of a parameter of the optimiser of shape "
                    f"{shape}, got {list(x.shape)}."
                )
