"""Optimisation steps of ``RewardPredictor.learn``, against the same work in bare PyTorch."""

from __future__ import annotations

import pytest

from benchmarks.bare import BareLearner
from benchmarks.workloads import (
    BATCH_SIZE,
    BUFFER_SIZE,
    WORKLOADS,
    make_buffer,
    make_predictor,
    make_transitions,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself

STEPS = 20
"""Of one timed call."""


@pytest.fixture(scope="module")
def columns():
    return make_transitions(BUFFER_SIZE)


@pytest.fixture(scope="module")
def buffer(columns):
    return make_buffer(columns)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", WORKLOADS)
def test_learn(name, compile, columns, buffer, take_turns):
    bare = BareLearner(WORKLOADS[name], columns)
    predictor = make_predictor(WORKLOADS[name], compile=compile)

    def learn_bare():
        for _ in range(STEPS):
            bare.step()

    def learn():
        predictor.learn(buffer, STEPS, BATCH_SIZE, BATCH_SIZE, 1000)

    who = "learn, compiled" if compile else "learn"
    take_turns(f"learn, {name}, one step", who, learn, "bare", learn_bare, rounds=40, divide=STEPS)
