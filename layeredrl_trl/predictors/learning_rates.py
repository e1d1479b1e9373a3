"""Learning rates that are numbers or functions of the env steps so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from layeredrl_trl.schedules import Schedule

LearningRate = float | Callable[[int], float]


def check_rate(name: str, rate: LearningRate) -> None:
    """Raise a ValueError that calls ``rate`` by its ``name`` if it can be none."""
    if not callable(rate) and not (isinstance(rate, float | int) and rate >= 0):
        raise ValueError(
            f"{name} must be a number of at least 0 or a function of env steps, got {rate!r}."
        )


def rates_at(
    n_total_env_steps: int, rates: Mapping[str, LearningRate], names: Iterable[str]
) -> dict[str, float]:
    """Evaluate the learning rates called ``names`` after so many env steps.

    Raises:
        ValueError: if a function gives a negative number or NaN.
    """
    out = {}
    for name in names:
        rate = rates[name]
        out[name] = float(rate(n_total_env_steps)) if callable(rate) else rate
        if not out[name] >= 0:
            raise ValueError(
                f"{name}_lr must be at least 0, got {out[name]} at {n_total_env_steps} steps."
            )
    return out


def rates_to_state(rates: Mapping[str, LearningRate]) -> dict[str, Any]:
    """Plain values of learning rates; those that are functions but no ``Schedule`` have none."""
    return {
        name: rate.state_dict() if isinstance(rate, Schedule) else rate
        for name, rate in rates.items()
        if isinstance(rate, Schedule | float | int)
    }


def rates_from_state(state: Mapping[str, Any]) -> dict[str, LearningRate]:
    """Undo :func:`rates_to_state`."""
    return {
        name: Schedule.from_state_dict(rate) if isinstance(rate, dict) else rate
        for name, rate in state.items()
    }
