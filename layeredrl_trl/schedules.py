"""Schedules: numbers, such as learning rates, as functions of the total number of env steps.

A schedule is immutable and holds nothing but numbers: it can be shared, compared, pickled, sent to
another process, and written into a checkpoint as plain values (:meth:`Schedule.state_dict`).
An argument that takes a schedule takes any other function of the env steps, too.
"""

from __future__ import annotations

import abc
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any


class Schedule(abc.ABC):
    """Base class: a number as a function of the total number of env steps.

    To write a schedule of your own, make a frozen dataclass of numbers with a ``__call__``.

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
        """Return the value after ``n_total_env_steps`` env steps."""

    def state_dict(self) -> dict[str, Any]:
        """Return the class name under ``type`` and the arguments, all as plain values."""
        return {"type": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Schedule:
        """Make the schedule, of any subclass, whose :meth:`state_dict` returned ``state``.

        Raises:
            KeyError: if ``state`` has no entry ``type``.
            ValueError: if there is no such subclass; also what the subclass raises for its
                arguments.
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
    """The same value at every step.

    Args:
        value: a finite number.

    Example:
        >>> ConstantSchedule(3e-4)(1_000_000)
        0.0003
    """

    value: float

    def __post_init__(self) -> None:
        _set_numbers(self)

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after ``n_total_env_steps`` env steps."""
        return self.value


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """Move from one value to another at constant speed, then stay constant.

    ``start_value + (end_value - start_value) * min(1, steps / duration)``.

    Args:
        start_value: value at step 0.
        end_value: value from step ``duration`` on.
        duration: env steps of the linear part, above 0.

    Example:
        >>> LinearSchedule(1e-3, 1e-4, 10_000)(5_000)
        0.00055
    """

    start_value: float
    end_value: float
    duration: float

    def __post_init__(self) -> None:
        _set_numbers(self)

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after ``n_total_env_steps`` env steps."""
        return _interpolate(n_total_env_steps / self.duration, self.start_value, self.end_value)


@dataclass(frozen=True)
class RampSchedule(Schedule):
    """Keep one value for a while, move to another at constant speed, then stay constant.

    Args:
        start: value until step ``warm_up``.
        end: value from step ``warm_up + duration`` on.
        warm_up: env steps of the first value, at least 0.
        duration: env steps of the linear part, above 0.

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
        _set_numbers(self)

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after ``n_total_env_steps`` env steps."""
        fraction = (n_total_env_steps - self.warm_up) / self.duration
        return _interpolate(fraction, self.start, self.end)


@dataclass(frozen=True)
class ZeroThenLinearSchedule(Schedule):
    """Stay at 0 for a while, then move from one value to another at constant speed.

    At step ``zero_duration`` the value jumps from 0 to ``start_value``; after the linear part it is
    constant.

    Args:
        zero_duration: env steps at 0, at least 0.
        duration: env steps of the linear part, above 0.
        start_value: value at step ``zero_duration``.
        end_value: value from step ``zero_duration + duration`` on.

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
        _set_numbers(self)

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after ``n_total_env_steps`` env steps."""
        fraction = (n_total_env_steps - self.zero_duration) / self.duration
        return 0.0 if fraction < 0 else _interpolate(fraction, self.start_value, self.end_value)


@dataclass(frozen=True)
class PiecewiseLinearSchedule(Schedule):
    """Interpolate linearly between points; constant before the first and after the last.

    Two points at the same step make a jump: the value at that step is that of the second point.

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
        """Return the value after ``n_total_env_steps`` env steps."""
        return _interpolate(*_surrounding_points(self.points, n_total_env_steps))


@dataclass(frozen=True)
class PiecewiseLogLinearSchedule(Schedule):
    """Interpolate logarithms linearly between points; constant before the first and after the last.

    ``before^(1 - f) * after^f`` at fraction ``f`` of the way between two points. If one of the two
    values is 0, so are all values between them, which can switch something off for a while. Two
    points at the same step make a jump: the value at that step is that of the second point.

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
        least = min(value for _, value in self.points)
        _require(self, least >= 0, f"points must have no value below 0, got {least}")

    def __call__(self, n_total_env_steps: int) -> float:
        """Return the value after ``n_total_env_steps`` env steps."""
        fraction, before, after = _surrounding_points(self.points, n_total_env_steps)
        return before ** (1 - fraction) * after**fraction


def _interpolate(fraction: float, start: float, end: float) -> float:
    """Interpolate linearly from ``start`` at fraction 0 to ``end`` at 1; constant outside."""
    if fraction <= 0:
        return start
    return end if fraction >= 1 else start + (end - start) * fraction


def _surrounding_points(
    points: Sequence[tuple[float, float]], time: float
) -> tuple[float, float, float]:
    """Return how far ``time`` is between two points, in [0, 1], and the values of the two."""
    i = bisect_right(points, time, key=lambda point: point[0])
    if i in (0, len(points)):
        value = points[max(i - 1, 0)][1]
        return 0.0, value, value
    (time_before, before), (time_after, after) = points[i - 1], points[i]
    return (time - time_before) / (time_after - time_before), before, after


def _require(schedule: Schedule, legal: bool, text: str) -> None:
    if not legal:
        raise ValueError(f"{type(schedule).__name__}: {text}.")


def _set_numbers(schedule: Any) -> None:
    """Turn all arguments of a frozen schedule into plain floats and check the lengths of phases."""
    for name in (field.name for field in fields(schedule)):
        number = _as_number(schedule, name, getattr(schedule, name))
        object.__setattr__(schedule, name, number)
        if name == "duration":
            _require(schedule, number > 0, f"duration must be above 0, got {number}")
        elif name in ("warm_up", "zero_duration"):
            _require(schedule, number >= 0, f"{name} must be at least 0, got {number}")


def _as_number(schedule: Schedule, name: str, value: Any) -> float:
    """Return the argument ``name`` as a finite float."""
    text = f"{type(schedule).__name__}: {name} must be a number, got {value!r}."
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(text)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(text) from None
    _require(schedule, isfinite(number), f"{name} must be finite, got {number}")
    return number


def _set_points(schedule: PiecewiseLinearSchedule | PiecewiseLogLinearSchedule) -> None:
    """Turn ``points`` into a tuple of pairs of plain floats and check their order."""
    try:
        pairs = [(time, value) for time, value in schedule.points]
    except (TypeError, ValueError):
        raise TypeError(
            f"{type(schedule).__name__}: points must be pairs (env steps, value), "
            f"got {schedule.points!r}."
        ) from None
    points = tuple(tuple(_as_number(schedule, "points", x) for x in pair) for pair in pairs)
    in_order = len(points) > 0 and list(points) == sorted(points, key=lambda point: point[0])
    _require(schedule, in_order, f"points must be at least one, in order of time, got {points}")
    object.__setattr__(schedule, "points", points)


def _subclasses(cls: type[Schedule]) -> list[type[Schedule]]:
    """List all subclasses, direct and indirect."""
    return [x for sub in cls.__subclasses__() for x in (sub, *_subclasses(sub))]
