"""Learning rates: numbers and functions of env steps, evaluated, checked, saved and restored."""

import numpy as np
import pytest
import torch

from layeredrl_trl.predictors.part_rates import LearningRates
from layeredrl_trl.schedules import LinearSchedule


def test_numbers_and_functions_of_env_steps():
    rates = LearningRates(model=0.5, value=lambda steps: 0.1 * steps, reward=1)
    assert rates.at(3, ["model", "value"]) == {"model": 0.5, "value": pytest.approx(0.3)}
    assert rates.at(0, ["value", "reward"]) == {"value": 0.0, "reward": 1}


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), "x", None, True])
def test_what_is_neither_is_named(rate):
    with pytest.raises(ValueError, match="value_lr must be a finite number of at least 0"):
        LearningRates(model=0.5, value=rate)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), torch.tensor(float("inf"))])
def test_a_function_that_turns_negative_or_infinite_is_named(value):
    rates = LearningRates(model=lambda steps: value if steps == 2 else 0.1)
    assert rates.at(1, ["model"]) == {"model": 0.1}
    text = r"model_lr must be finite and at least 0, got .* at 2 steps"
    with pytest.raises(ValueError, match=text):
        rates.at(2, ["model"])


def test_a_function_that_returns_no_number_is_named():
    with pytest.raises(TypeError, match="model_lr must be a number, got None at 2 steps"):
        LearningRates(model=lambda steps: None).at(2, ["model"])


def test_a_number_of_numpy_is_used_and_saved_like_any_other():
    rates = LearningRates(model=np.float32(0.5))
    assert rates.at(0, ["model"]) == rates.state_dict() == {"model": 0.5}
    assert type(rates.state_dict()["model"]) is float


def test_an_infinite_rate_is_not_restored():
    with pytest.raises(ValueError, match="model_lr must be a finite number"):
        LearningRates(model=0.5).load_state_dict({"model": float("inf")})


def test_what_has_a_state_is_restored_and_plain_functions_stay():
    schedule = LinearSchedule(1e-2, 1e-3, 100)
    saved = LearningRates(model=schedule, value=lambda _: 0.1, reward=0.5, encoder=0.4)
    state = saved.state_dict()
    assert state.keys() == {"model", "reward", "encoder"}
    loaded = LearningRates(model=0.3, value=0.2, reward=lambda _: 0.3, encoder=0.1)
    loaded.load_state_dict(state)
    names = ["model", "value", "reward", "encoder"]
    assert loaded.at(50, names) == saved.at(50, names) | {"value": 0.2}
