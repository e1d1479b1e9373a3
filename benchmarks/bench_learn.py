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


@pytest.mark.parametrize("who", ["bare", "ours", "ours, compiled"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_learn(name, who, columns, buffer, benchmark):
    if who == "bare":
        learner = BareLearner(WORKLOADS[name], columns)

        def learn():
            for _ in range(STEPS):
                learner.step()
    else:
        predictor = make_predictor(WORKLOADS[name], compile=who != "ours")

        def learn():
            predictor.learn(buffer, STEPS, BATCH_SIZE, BATCH_SIZE, 1000)

    benchmark.group, benchmark.name = f"learn, {name}, one step", who
    benchmark.extra_info["divide"] = STEPS
    benchmark.pedantic(learn, rounds=20, warmup_rounds=2)
