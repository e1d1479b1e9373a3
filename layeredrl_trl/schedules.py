"""Schedules: numbers, such as learning rates, as functions of the total number of env steps.

A schedule is immutable and holds nothing but numbers: it can be shared, compared, pickled, sent to
another process, and written into a checkpoint as plain values (:meth:`Schedule.state_dict`).
Wherever a schedule is taken, any other function of the env steps is too.
"""

from __future__ import annotations

import abc
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any


class Schedule(abc.ABC):
    """Base class: a number as a function of the total number of env steps.

    A schedule of your own is a frozen dataclass of numbers with a ``__call__``.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class InverseSquareRoot(Schedule):
        ...     scale: float
        ...
        ...     def __call__(self, n_total_env_steps):
        ...         return self.scale * max(1, n_total_env_steps) ** -0.5
        >>> state = InverseSquareRoot(0.5).state_dict()
        >>> state
        {'type': 'InverseSquareRoot', 'scale': 0.5}
        >>> Schedule.from_state_dict(state)(100)
        0.05
    """

    @abc.abstractmethod
    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after so many env steps."""

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the class under ``type``, and its arguments, as plain values."""
        return {"type": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Schedule:
        """Make the schedule again whose :meth:`state_dict` was ``state``.

        Args:
            state: of any subclass that has been defined or imported.

        Raises:
            KeyError: if ``state`` names no type.
            ValueError: if there is no such subclass; or as the class does for its arguments.
        """
        arguments = dict(state)
        if "type" not in arguments:
            raise KeyError(f"state: there is no entry 'type', only {sorted(arguments)}.")
        name = arguments.pop("type")
        classes = {cls.__name__: cls for cls in _subclasses(Schedule)}
        if name not in classes:
            raise ValueError(f"state: there is no schedule {name!r}, only {sorted(classes)}.")
        return classes[name](**arguments)


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same value for ever.

    Args:
        value: finite.

    Example:
        >>> ConstantSchedule(3e-4)(1_000_000)
        0.0003
    """

    value: float

    def __post_init__(self) -> None:
        _set_numbers(self, "value")

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """From one value to another at constant speed; constant after.

    ``start_value + (end_value - start_value) * min(1, steps / duration)``.

    Args:
        start_value: at step 0.
        end_value: from step ``duration`` on.
        duration: env steps, above 0.

    Example:
        >>> LinearSchedule(1e-3, 1e-4, 10_000)(5_000)
        0.00055
    """

    start_value: float
    end_value: float
    duration: float

    def __post_init__(self) -> None:
        _set_numbers(self, "start_value", "end_value", "duration")
        _check_phases(self, "duration")

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after so many env steps."""
        return _ramp(n_total_env_steps / self.duration, self.start_value, self.end_value)


@dataclass(frozen=True)
class RampSchedule(Schedule):
    """One value for a while, then at constant speed to another; constant after.

    Args:
        start: value until step ``warm_up``.
        end: value from step ``warm_up + duration`` on.
        warm_up: env steps, at least 0.
        duration: of the ramp, env steps, above 0.

    Example:
        >>> schedule = RampSchedule(start=0.0, end=1e-3, warm_up=1_000, duration=1_000)
        >>> schedule(1_000), schedule(1_500), schedule(2_000)
        (0.0, 0.0005, 0.001)
    """

    start: float
    end: float
    warm_up: float
    duration: float

    def __post_init__(self) -> None:
        _set_numbers(self, "start", "end", "warm_up", "duration")
        _check_phases(self, "duration", before="warm_up")

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after so many env steps."""
        return _ramp((n_total_env_steps - self.warm_up) / self.duration, self.start, self.end)


@dataclass(frozen=True)
class ZeroThenLinearSchedule(Schedule):
    """0 for a while, then from one value to another at constant speed; constant after.

    At step ``zero_duration`` it jumps from 0 to ``start_value``.

    Args:
        zero_duration: env steps, at least 0.
        duration: of the linear part, env steps, above 0.
        start_value: at step ``zero_duration``.
        end_value: from step ``zero_duration + duration`` on.

    Example:
        >>> schedule = ZeroThenLinearSchedule(1_000, 1_000, start_value=1e-3, end_value=1e-4)
        >>> schedule(999), schedule(1_000), schedule(1_500), schedule(2_000)
        (0.0, 0.001, 0.00055, 0.0001)
    """

    zero_duration: float
    duration: float
    start_value: float
    end_value: float

    def __post_init__(self) -> None:
        _set_numbers(self, "zero_duration", "duration", "start_value", "end_value")
        _check_phases(self, "duration", before="zero_duration")

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after so many env steps."""
        since = n_total_env_steps - self.zero_duration
        if since < 0:
            return 0.0
        return _ramp(since / self.duration, self.start_value, self.end_value)


@dataclass(frozen=True)
class PiecewiseLinearSchedule(Schedule):
    """Straight lines from point to point; constant before the first and after the last.

    Two points at one step are a jump; from that step on the second one holds.

    Args:
        points: pairs ``(env steps, value)`` in order of time, at least one.

    Example:
        >>> schedule = PiecewiseLinearSchedule([(0, 0.0), (1_000, 1e-3), (3_000, 0.0)])
        >>> schedule(500), schedule(1_000), schedule(2_000)
        (0.0005, 0.001, 0.0005)
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        _set_points(self)

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after so many env steps."""
        fraction, before, after = _surrounding(self.points, n_total_env_steps)
        return _ramp(fraction, before, after)


@dataclass(frozen=True)
class PiecewiseLogLinearSchedule(Schedule):
    """Straight lines of the logarithm from point to point; constant outside.

    ``before^(1 - f) * after^f`` at fraction ``f`` of the way. Where either value is 0, so is all
    between: a way of switching something off for a while. Two points at one step are a jump.

    Args:
        points: pairs ``(env steps, value)`` in order of time, at least one; no value below 0.

    Example:
        >>> schedule = PiecewiseLogLinearSchedule([(0, 1e-2), (1_000, 1e-4)])
        >>> schedule(500)
        0.001
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        _set_points(self)
        for _, value in self.points:
            if value < 0:
                raise ValueError(
                    f"{type(self).__name__}: points must have no value below 0, got {value}."
                )

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after so many env steps."""
        fraction, before, after = _surrounding(self.points, n_total_env_steps)
        return before ** (1 - fraction) * after**fraction


def _ramp(fraction: float, start: float, end: float) -> float:
    if fraction <= 0:
        return start
    return end if fraction >= 1 else start + (end - start) * fraction


def _surrounding(points: Sequence[tuple[float, float]], time: float) -> tuple[float, float, float]:
    """Where ``time`` is between two points, in [0, 1], and the values of the two."""
    i = bisect_right(points, time, key=lambda point: point[0])
    if i in (0, len(points)):
        value = points[max(i - 1, 0)][1]
        return 0.0, value, value
    (time_before, before), (time_after, after) = points[i - 1], points[i]
    return (time - time_before) / (time_after - time_before), before, after


def _set_numbers(schedule: Schedule, *names: str) -> None:
    """Make the named arguments plain floats."""
    for name in names:
        object.__setattr__(schedule, name, _number(schedule, name, getattr(schedule, name)))


def _number(schedule: Schedule, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{type(schedule).__name__}: {name} must be a number, got {value!r}."
        ) from None
    if not isfinite(number):
        raise ValueError(f"{type(schedule).__name__}: {name} must be finite, got {number}.")
    return number


def _check_phases(schedule: Schedule, duration: str, before: str | None = None) -> None:
    if getattr(schedule, duration) <= 0:
        raise ValueError(
            f"{type(schedule).__name__}: {duration} must be above 0, "
            f"got {getattr(schedule, duration)}."
        )
    if before is not None and getattr(schedule, before) < 0:
        raise ValueError(
            f"{type(schedule).__name__}: {before} must be at least 0, "
            f"got {getattr(schedule, before)}."
        )


def _set_points(schedule: PiecewiseLinearSchedule | PiecewiseLogLinearSchedule) -> None:
    """Make ``points`` a tuple of pairs of plain floats, in order of time."""
    name = type(schedule).__name__
    try:
        pairs = [(time, value) for time, value in schedule.points]
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: points must be pairs (env steps, value), got {schedule.points!r}."
        ) from None
    points = tuple(
        (_number(schedule, "points", time), _number(schedule, "points", value))
        for time, value in pairs
    )
    times = [time for time, _ in points]
    if not points or times != sorted(times):
        raise ValueError(f"{name}: points must be at least one, in order of time, got {points}.")
    object.__setattr__(schedule, "points", points)


def _subclasses(cls: type[Schedule]) -> list[type[Schedule]]:
    return [x for sub in cls.__subclasses__() for x in (sub, *_subclasses(sub))]
