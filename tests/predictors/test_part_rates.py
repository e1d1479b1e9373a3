"""Learning rates: numbers and functions of env steps, evaluated, checked, saved and restored."""

import pytest

from layeredrl_trl.predictors.part_rates import LearningRates
from layeredrl_trl.schedules import LinearSchedule


def test_numbers_and_functions_of_env_steps():
    rates = LearningRates(model=0.5, value=lambda steps: 0.1 * steps, reward=1)
    assert rates.at(3, ["model", "value"]) == {"model": 0.5, "value": pytest.approx(0.3)}
    assert rates.at(0, ["value", "reward"]) == {"value": 0.0, "reward": 1}


@pytest.mark.parametrize("rate", [-1.0, float("nan"), "x", None])
def test_what_is_neither_is_named(rate):
    with pytest.raises(ValueError, match="value_lr must be a number of at least 0"):
        LearningRates(model=0.5, value=rate)


@pytest.mark.parametrize("rate", [lambda steps: 1.0 - steps, lambda steps: float("nan")])
def test_a_function_that_turns_negative_is_named(rate):
    with pytest.raises(ValueError, match=r"model_lr must be at least 0, got .* at 2 steps"):
        LearningRates(model=rate).at(2, ["model"])


def test_what_has_a_state_is_restored_and_plain_functions_stay():
    schedule = LinearSchedule(1e-2, 1e-3, 100)
    saved = LearningRates(model=schedule, value=lambda _: 0.1, reward=0.5, encoder=0.4)
    state = saved.state_dict()
    assert state.keys() == {"model", "reward", "encoder"}
    loaded = LearningRates(model=0.3, value=0.2, reward=lambda _: 0.3, encoder=0.1)
    loaded.load_state_dict(state)
    names = ["model", "value", "reward", "encoder"]
    assert loaded.at(50, names) == saved.at(50, names) | {"value": 0.2}
