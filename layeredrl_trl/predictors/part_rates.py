"""Learning rates: numbers, or functions of the total number of env steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from layeredrl_trl.schedules import Schedule

LearningRate = float | Callable[[int], float]


class LearningRates:
    """The learning rate of each part of a predictor.

    Args:
        **rates: by name of the part, each a number or a function of the total env steps.

    Raises:
        ValueError: if one is neither a number of at least 0 nor a function; named ``<part>_lr``.
    """

    def __init__(self, **rates: LearningRate) -> None:
        for name, rate in rates.items():
            if not callable(rate) and not (isinstance(rate, float | int) and rate >= 0):
                raise ValueError(
                    f"{name}_lr must be a number of at least 0 or a function of env steps, got "
                    f"{rate!r}."
                )
        self._rates = rates

    def at(self, n_total_env_steps: int, names: Iterable[str]) -> dict[str, float]:
        """Evaluate the rates of parts ``names`` after ``n_total_env_steps``.

        Raises:
            ValueError: if a function gives a negative number or NaN.
        """
        out = {}
        for name in names:
            rate = self._rates[name]
            out[name] = float(rate(n_total_env_steps)) if callable(rate) else rate
            if not out[name] >= 0:
                raise ValueError(
                    f"{name}_lr must be at least 0, got {out[name]} at {n_total_env_steps} steps."
                )
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, without rates that are functions but no ``Schedule``."""
        return {
            name: rate.state_dict() if isinstance(rate, Schedule) else rate
            for name, rate in self._rates.items()
            if isinstance(rate, Schedule | float | int)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rates from :meth:`state_dict`; the others stay unchanged."""
        for name, rate in state.items():
            self._rates[name] = Schedule.from_state_dict(rate) if isinstance(rate, dict) else rate
