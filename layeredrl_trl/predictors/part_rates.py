"""Learning rates: numbers, or functions of the total number of env steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, cast

from torch.optim import Optimizer

from layeredrl_trl.schedules import Schedule

LearningRate = float | Callable[[int], float]


class LearningRates:
    """The learning rate of each part of a predictor.

    Args:
        **rates: by name of the part, each a number or a function of the total env steps.

    Raises:
        ValueError: if one is neither a finite number of at least 0 nor a function; named
            ``<part>_lr``.
    """

    def __init__(self, **rates: LearningRate) -> None:
        self._rates = {name: _checked(name, rate) for name, rate in rates.items()}

    def at(self, n_total_env_steps: int, names: Iterable[str]) -> dict[str, float]:
        """Evaluate the rates of parts ``names`` after ``n_total_env_steps``.

        Raises:
            TypeError: if a function returns no number.
            ValueError: if a function returns a number that is negative or not finite.
        """
        out = {}
        for name in names:
            rate = self._rates[name]
            if callable(rate):
                rate = _evaluated(name, rate(n_total_env_steps), n_total_env_steps)
            out[name] = rate
        return out

    def set(self, optimizer: Optimizer, n_total_env_steps: int) -> dict[str, float]:
        """Set the rates of an optimiser whose groups are named as the parts, and return them.

        Raises:
            TypeError, ValueError: as :meth:`at`; none is set then.
        """
        groups = optimizer.param_groups
        rates = self.at(n_total_env_steps, [group["name"] for group in groups])
        for group in groups:
            group["lr"] = rates[group["name"]]
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, without rates that are functions but no ``Schedule``."""
        return {
            name: rate.state_dict() if isinstance(rate, Schedule) else rate
            for name, rate in self._rates.items()
            if isinstance(rate, Schedule | float | int)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rates from :meth:`state_dict`; the others stay unchanged."""
        self._rates |= self.read(state)

    def read(self, state: dict[str, Any]) -> dict[str, LearningRate]:
        """Return the rates that a state from :meth:`state_dict` holds.

        Raises:
            ValueError: if one is neither a finite number of at least 0 nor a schedule, or of an
                unknown part.
        """
        if not isinstance(state, dict) or (unknown := sorted(state.keys() - self._rates.keys())):
            got = unknown if isinstance(state, dict) else state
            raise ValueError(f"state_dict: expected rates of {[*self._rates]}, got {got}.")
        return {
            name: _checked(name, Schedule.from_state_dict(x) if isinstance(x, dict) else x)
            for name, x in state.items()
        }


def _checked(name: str, rate: Any) -> LearningRate:
    """Return a function as it is, and a number as a plain float."""
    if callable(rate):
        return cast("LearningRate", rate)
    is_number = isinstance(rate, Real) and not isinstance(rate, bool)
    if not (is_number and 0 <= rate < math.inf):
        raise ValueError(
            f"{name}_lr must be a finite number of at least 0 or a function of env steps, got "
            f"{rate!r}."
        )
    return float(rate)


def _evaluated(name: str, value: Any, n_total_env_steps: int) -> float:
    """Return what a function returned as a plain float."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}_lr must be a number, got {value!r} at {n_total_env_steps} steps."
        ) from None
    if not 0 <= number < math.inf:
        raise ValueError(
            f"{name}_lr must be finite and at least 0, got {number} at {n_total_env_steps} steps."
        )
    return number
