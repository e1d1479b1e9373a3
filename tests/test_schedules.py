"""Schedules: known values, the ends, what is equal to what, errors, state as plain values."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrl.checkpoint import Checkpoint

from layeredrl_trl.schedules import (
    ConstantSchedule,
    LinearSchedule,
    PiecewiseLinearSchedule,
    PiecewiseLogLinearSchedule,
    RampSchedule,
    Schedule,
    ZeroThenLinearSchedule,
)

ALL = [
    ConstantSchedule(3e-4),
    LinearSchedule(1e-3, 1e-4, 1000),
    RampSchedule(1e-4, 1e-3, 100, 1000),
    ZeroThenLinearSchedule(100, 1000, 1e-4, 1e-3),
    PiecewiseLinearSchedule([(0, 0.0), (10, 1e-3), (1000, 1e-4)]),
    PiecewiseLogLinearSchedule([(0, 1e-5), (10, 1e-3), (1000, 1e-4)]),
]
NAN, INF = float("nan"), float("inf")
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=lambda x: type(x).__name__)

# --- contract


@every_schedule
@pytest.mark.parametrize("steps", [-5, 0, 1, 500, 10**9, np.int64(7), torch.tensor(7)])
def test_a_plain_float_at_any_step(schedule, steps):
    assert type(schedule(int(steps))) is float
    assert schedule(steps) == pytest.approx(schedule(int(steps)))


@every_schedule
def test_values_do_not_leave_the_range_of_the_arguments(schedule):
    values = [schedule(t) for t in range(-10, 1200)]
    assert min(values) >= 0 and max(values) <= 1e-3


# --- oracle: values worked out by hand


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ConstantSchedule(2), {0: 2, 10**9: 2}),
        (LinearSchedule(4, 2, 10), {-1: 4, 0: 4, 1: 3.8, 5: 3, 9: 2.2, 10: 2, 11: 2, 10**9: 2}),
        (RampSchedule(4, 2, 10, 10), {0: 4, 10: 4, 11: 3.8, 15: 3, 20: 2, 21: 2}),
        (RampSchedule(4, 2, 0, 10), {0: 4, 5: 3, 10: 2}),
        (ZeroThenLinearSchedule(10, 10, 4, 2), {0: 0, 9: 0, 10: 4, 15: 3, 20: 2, 21: 2}),
        (ZeroThenLinearSchedule(0, 10, 4, 2), {-1: 0, 0: 4, 5: 3}),
        (PiecewiseLinearSchedule([(10, 5)]), {0: 5, 10: 5, 11: 5}),
        (
            PiecewiseLinearSchedule([(10, 1), (20, 3), (40, 0)]),
            {0: 1, 10: 1, 15: 2, 20: 3, 30: 1.5, 40: 0, 41: 0},
        ),
        (PiecewiseLinearSchedule([(0, 1), (10, 2), (10, 5), (20, 6)]), {5: 1.5, 10: 5, 15: 5.5}),
        (PiecewiseLogLinearSchedule([(10, 5)]), {0: 5, 10: 5, 11: 5}),
        (
            PiecewiseLogLinearSchedule([(10, 1), (20, 100), (40, 1e-2)]),
            {0: 1, 10: 1, 15: 10, 20: 100, 30: 1, 35: 0.1, 40: 1e-2, 41: 1e-2},
        ),
        (
            PiecewiseLogLinearSchedule([(0, 0), (10, 0), (10, 1), (20, 100), (30, 0)]),
            {0: 0, 9: 0, 10: 1, 15: 10, 20: 100, 21: 0, 30: 0},
        ),
    ],
)
def test_values(schedule, expected):
    assert {t: schedule(t) for t in expected} == pytest.approx(expected, rel=1e-12)


def test_before_the_first_point_the_first_value_holds():
    """LayeredRL gave the last one."""
    points = [(10, 1.0), (20, 3.0)]
    assert PiecewiseLinearSchedule(points)(0) == PiecewiseLogLinearSchedule(points)(0) == 1.0


# --- property

values = st.floats(1e-8, 1e8)
times = st.lists(st.integers(0, 10**7), min_size=1, max_size=6, unique=True).map(sorted)


@given(times=times, data=st.data(), t=st.integers(-10, 2 * 10**7))
def test_piecewise_is_what_numpy_interpolates(times, data, t):
    ys = data.draw(st.lists(values, min_size=len(times), max_size=len(times)))
    points = list(zip(times, ys, strict=True))
    assert PiecewiseLinearSchedule(points)(t) == pytest.approx(np.interp(t, times, ys), rel=1e-6)
    log = np.exp(np.interp(t, times, np.log(ys)))
    assert PiecewiseLogLinearSchedule(points)(t) == pytest.approx(log, rel=1e-6)


@given(a=values, b=values, wait=st.integers(0, 100), n=st.integers(1, 100), t=st.integers(-9, 300))
def test_special_cases_agree(a, b, wait, n, t):
    ramp = RampSchedule(a, b, wait, n)(t)
    assert ramp == pytest.approx(PiecewiseLinearSchedule([(wait, a), (wait + n, b)])(t))
    assert ramp == LinearSchedule(a, b, n)(t - wait)
    assert ZeroThenLinearSchedule(wait, n, a, b)(t) == (ramp if t >= wait else 0)


# --- errors


@pytest.mark.parametrize("duration", [0, -1])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: LinearSchedule(1, 0, n),
        lambda n: RampSchedule(1, 0, 5, n),
        lambda n: ZeroThenLinearSchedule(5, n, 1, 0),
    ],
)
def test_duration_out_of_range(make, duration):
    with pytest.raises(ValueError, match=rf"Schedule: duration must be above 0, got {duration}"):
        make(duration)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RampSchedule(1, 0, -1, 5), ValueError, "warm_up must be at least 0, got -1"),
        (
            lambda: ZeroThenLinearSchedule(-1, 5, 1, 0),
            ValueError,
            "zero_duration must be at least 0, got -1",
        ),
        (
            lambda: ConstantSchedule("a"),
            TypeError,
            "ConstantSchedule: value must be a number, .*'a'",
        ),
        (lambda: ConstantSchedule(None), TypeError, "value must be a number, got None"),
        (lambda: ConstantSchedule("1e-3"), TypeError, "value must be a number, got '1e-3'"),
        (lambda: ConstantSchedule(True), TypeError, "value must be a number, got True"),
        (lambda: PiecewiseLinearSchedule([(0, INF)]), ValueError, "points must be finite, got inf"),
        (lambda: PiecewiseLinearSchedule([(NAN, 0)]), ValueError, "points must be finite, got nan"),
        (lambda: RampSchedule(1, 0, NAN, 5), ValueError, "warm_up must be finite, got nan"),
        (lambda: LinearSchedule(1, 0, INF), ValueError, "duration must be finite, got inf"),
        (lambda: ConstantSchedule(NAN), ValueError, "value must be finite, got nan"),
        (lambda: LinearSchedule(0, float("inf"), 1), ValueError, "end_value must be finite"),
        (lambda: PiecewiseLinearSchedule([]), ValueError, "points must be at least one"),
        (
            lambda: PiecewiseLinearSchedule([(2, 0), (1, 0)]),
            ValueError,
            "PiecewiseLinearSchedule: points must .* in order of time",
        ),
        (lambda: PiecewiseLinearSchedule([1, 2]), TypeError, r"points must be pairs .*\[1, 2\]"),
        (lambda: PiecewiseLinearSchedule(3), TypeError, "points must be pairs .* got 3"),
        (lambda: PiecewiseLinearSchedule([(0, None)]), TypeError, "points must be a number"),
        (
            lambda: PiecewiseLogLinearSchedule([(0, 1), (5, -1)]),
            ValueError,
            "PiecewiseLogLinearSchedule: points must have no value below 0, got -1",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Schedule()


def test_state_of_an_unknown_type():
    with pytest.raises(ValueError, match=r"state: there is no schedule 'Sinus', only .*'Linear"):
        Schedule.from_state_dict({"type": "Sinus", "value": 1.0})
    with pytest.raises(KeyError, match=r"no entry 'type', only \['value'\]"):
        Schedule.from_state_dict({"value": 1.0})


# --- state


@every_schedule
def test_immutable_hashable_and_equal_by_value(schedule):
    with pytest.raises(FrozenInstanceError):
        schedule.value = 1.0
    twin = copy.deepcopy(schedule)
    assert twin == schedule and hash(twin) == hash(schedule)
    assert all(other != schedule for other in ALL if other is not schedule)


def test_a_list_of_points_changed_later_changes_nothing():
    points = [(0, 1.0), (10, 2.0)]
    schedule = PiecewiseLinearSchedule(points)
    points[1] = (10, 9.0)
    assert schedule(10) == 2.0


@every_schedule
def test_state_dict_round_trip(schedule):
    state = schedule.state_dict()
    assert Schedule.from_state_dict(state) == schedule
    assert Schedule.from_state_dict(json.loads(json.dumps(state))) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert state["type"] == type(schedule).__name__  # and was not changed by reading it


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_state_is_plain_whatever_the_arguments(number):
    assert type(ConstantSchedule(number).state_dict()["value"]) is float
    points = PiecewiseLinearSchedule([(number, number)]).state_dict()["points"]
    assert points == ((0.5, 0.5),) and {type(x) for x in points[0]} == {float}


class Holder:
    """What has schedules in its state, as a predictor does."""

    def __init__(self, schedules):
        self.schedules = schedules

    def state_dict(self):
        return {"schedules": [x.state_dict() for x in self.schedules]}

    def load_state_dict(self, state):
        self.schedules = [Schedule.from_state_dict(x) for x in state["schedules"]]


def test_round_trip_through_a_checkpoint_of_torchrl(tmp_path):
    Checkpoint(holder=Holder(ALL)).save(tmp_path / "checkpoint")
    holder = Holder([])
    Checkpoint(holder=holder).load(tmp_path / "checkpoint")
    assert holder.schedules == ALL


def test_round_trip_through_a_file_of_plain_values(tmp_path):
    torch.save([x.state_dict() for x in ALL], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    assert [Schedule.from_state_dict(x) for x in states] == ALL


@dataclass(frozen=True)
class Halving(Schedule):
    every: int

    def __call__(self, n_total_env_steps):
        return 0.5 ** (n_total_env_steps // self.every)


@dataclass(frozen=True)
class DelayedHalving(Halving):
    delay: int

    def __call__(self, n_total_env_steps):
        return super().__call__(max(0, n_total_env_steps - self.delay))


@pytest.mark.parametrize("schedule", [Halving(10), DelayedHalving(10, 5)])
def test_a_schedule_of_your_own(schedule):
    twin = Schedule.from_state_dict(schedule.state_dict())
    assert twin == schedule and twin(25) == 0.25
