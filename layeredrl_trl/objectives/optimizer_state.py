"""Check the state of an optimiser before it is loaded: torch's own load takes almost anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from layeredrl_trl.checks import check_finite, check_flag
from layeredrl_trl.modules.loading import is_castable

_NEVER_NEGATIVE = ("step", "exp_avg_sq", "max_exp_avg_sq")


def group_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Name the groups of an optimiser: by their ``name``, else by their number."""
    return [str(group.get("name", i)) for i, group in enumerate(optimizer.param_groups)]


def parameter_shapes(optimizer: torch.optim.Optimizer) -> dict[str, list[list[int]]]:
    """Return the shapes of the optimiser's parameters, by name of the group."""
    groups = zip(group_names(optimizer), optimizer.param_groups, strict=True)
    return {name: [list(p.shape) for p in group["params"]] for name, group in groups}


def check_optimizer_state(optimizer: torch.optim.Optimizer, given: Any) -> None:
    """Check that a state from ``state_dict()`` of an optimiser can be loaded into another one.

    Raises:
        TypeError: if a number is none.
        ValueError: if it is of other groups or parameters, an entry is missing, of another shape or
            dtype or not finite, or an option is missing or out of its range.
    """
    if not isinstance(given, Mapping) or {"state", "param_groups"} - given.keys():
        raise ValueError(
            "state_dict: expected a state of the optimiser, with the entries 'state' and "
            f"'param_groups', got {sorted(given) if isinstance(given, Mapping) else given!r}."
        )
    names, groups = group_names(optimizer), given["param_groups"]
    if not all(isinstance(group, Mapping) and _has_numbers(group) for group in groups):
        raise ValueError(
            "state_dict: expected numbers of parameters in each group of the optimiser."
        )
    counts = [len(group["params"]) for group in groups]
    expected = {
        name: len(group["params"])
        for name, group in zip(names, optimizer.param_groups, strict=True)
    }
    if counts != [*expected.values()]:
        raise ValueError(
            f"state_dict: expected an optimiser with {expected} parameters, got one with {counts}."
        )
    for name, own, group in zip(names, optimizer.param_groups, groups, strict=True):
        _check_options(name, own, group)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    if len({*numbers}) < len(numbers):
        raise ValueError(f"state_dict: expected distinct numbers of parameters, got {numbers}.")
    _check_moments(dict(zip(numbers, params, strict=True)), given["state"])


def _has_numbers(group: Mapping[str, Any]) -> bool:
    """Whether a group lists its parameters by numbers."""
    numbers = group.get("params")
    return isinstance(numbers, (list, tuple)) and all(type(number) is int for number in numbers)


def _check_options(name: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check the options of a group; torch fills in flags that are missing."""
    for key, default in own.items():
        what = f"state_dict: {key} of the optimiser's group {name!r}"
        if key == "params":
            continue
        if isinstance(default, bool) or default is None:
            check_flag(what, given.get(key), optional=True)
            continue
        if key not in given:
            raise ValueError(f"{what} is missing.")
        value = given[key]
        if isinstance(default, str):
            if value != default:
                raise ValueError(f"{what} must be {default!r}, got {value!r}.")
        elif isinstance(default, (tuple, list)):
            _check_sequence(what, default, value)
        elif isinstance(default, (Real, Tensor)):
            is_scalar = isinstance(value, Tensor) and value.numel() == 1
            check_finite(what, value.item() if is_scalar else value)
            if key == "lr" and value < 0:
                raise ValueError(f"{what} must be at least 0, got {value}.")


def _check_sequence(what: str, own: Sequence[Any], given: Any) -> None:
    """Check an option of several numbers, such as ``betas``."""
    if not isinstance(given, (tuple, list)) or len(given) != len(own):
        raise ValueError(f"{what} must be {len(own)} numbers, got {given!r}.")
    for number in given:
        check_finite(what, number)
        if not 0 <= number < 1:
            raise ValueError(f"{what} must be in [0, 1), got {given}.")


def _check_moments(params: Mapping[Any, Tensor], state: Any) -> None:
    """Check what an optimiser knows of each parameter, by the parameter's number."""
    if not isinstance(state, Mapping) or state.keys() - params.keys():
        got = sorted(map(str, state)) if isinstance(state, Mapping) else state
        raise ValueError(
            f"state_dict: expected a state of the parameters 0 to {len(params) - 1} of the "
            f"optimiser, got {got!r}."
        )
    if not all(isinstance(entries, Mapping) for entries in state.values()):
        raise ValueError(
            "state_dict: expected entries by name for each parameter of the optimiser."
        )
    needed = {name for entries in state.values() for name in entries}
    for number, entries in state.items():
        if missing := needed - entries.keys():
            raise ValueError(
                f"state_dict: parameter {number} of the optimiser has no {sorted(missing)}."
            )
        for name, x in entries.items():
            what = f"{name!r} of a parameter of the optimiser"
            if not isinstance(x, Tensor) and x is not None:
                check_finite(f"state_dict: {what}", x)
            elif x is not None:
                _check_moment(what, params[number], x, name)


def _check_moment(what: str, param: Tensor, x: Tensor, name: str) -> None:
    # a number of steps has no dims, and is a float on a parameter of any dtype
    if x.ndim and x.shape != param.shape:
        raise ValueError(
            f"state_dict: expected {what} of shape {list(param.shape)}, got {list(x.shape)}."
        )
    if x.ndim and not is_castable(x.dtype, param.dtype):
        raise ValueError(f"state_dict: expected {what} of {param.dtype}, got {x.dtype}.")
    if not x.isfinite().all() or (name in _NEVER_NEGATIVE and (x < 0).any()):
        bound = " and at least 0" if name in _NEVER_NEGATIVE else ""
        raise ValueError(f"state_dict: expected {what} that is finite{bound}.")
