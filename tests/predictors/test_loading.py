"""Loading a predictor: all of a state, or nothing of it."""

import copy

import pytest
import torch
from torch import nn

from layeredrl_trl.modules import Encoder, ProbabilisticEnsemble, SelectEncoder
from layeredrl_trl.predictors import StaticPredictor
from layeredrl_trl.schedules import LinearSchedule
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import learn, small_parts, small_predictor, snapshot


class FrozenEncoder(Encoder):
    """Has a layer that nothing trains, of a width of its own."""

    def __init__(self, width: int):
        super().__init__(3, 2, 1)
        self.net = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3))

    def embed(self, observation):
        return self.net(observation).split((2, 1), -1)


def frozen(width):
    return small_predictor(encoder=FrozenEncoder(width), learn_encoder=False)


def static(width=4):
    model, val_func, rew_func, encoder = small_parts(encoder=FrozenEncoder(width))
    return StaticPredictor(model, val_func, rew_func, encoder, 2, 1)


def frozen_loss(width):
    return frozen(width).loss_module


def everything(module) -> dict:
    """All tensors and extra states, copied; of a predictor also the optimiser's tensors."""
    return copy.deepcopy(module.state_dict())


def is_equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return one == other


@pytest.mark.parametrize("make", [frozen, static, frozen_loss])
def test_another_frozen_encoder_changed_all_other_parts(make):
    """The error came when everything else had been copied."""
    module = make(4)
    before = everything(module)
    text = r"encoder.net.0.weight \(expected shape \[4, 3\], got \[5, 3\]\)"
    with pytest.raises(RuntimeError, match=f"load_state_dict: .* nothing was changed.*{text}"):
        module.load_state_dict(make(5).state_dict())
    assert is_equal(everything(module), before)


def test_what_the_optimiser_knows_stays_and_learning_goes_on_as_if_nothing_had_happened():
    buffer, predictor = filled_buffer(), frozen(4)
    learn(predictor, buffer, n_steps=3)
    undisturbed = copy.deepcopy(predictor)
    for width, strict in ((5, True), (5, False)):
        with pytest.raises(RuntimeError, match="different"):
            predictor.load_state_dict(frozen(width).state_dict(), strict=strict)
    for one in (predictor, undisturbed):
        learn(one, buffer, n_steps=2, seed=1)
    assert is_equal(everything(predictor), everything(undisturbed))


def with_optimizer(change):
    """A change of the state of the optimiser in the state of a predictor."""

    def changed(state):
        change(state["_extra_state"]["optimizer"])

    return changed


def with_extra(**entries):
    return lambda state: state["_extra_state"].update(entries)


def first_moment(optimizer) -> dict:
    return next(iter(optimizer["state"].values()))


FAULTS = {
    "moment of another shape": (
        with_optimizer(lambda x: first_moment(x).update(exp_avg=torch.zeros(7))),
        ValueError,
        r"'exp_avg' of a parameter of the optimiser of shape \[.*\], got \[7\]",
    ),
    "a parameter less": (
        with_optimizer(lambda x: x["param_groups"][0]["params"].pop()),
        ValueError,
        "an optimiser with .* parameters, got one with",
    ),
    "a group less": (
        with_optimizer(lambda x: x["param_groups"].pop()),
        ValueError,
        "an optimiser with .* parameters, got one with",
    ),
    "no groups": (
        with_optimizer(lambda x: x.pop("param_groups")),
        ValueError,
        "expected a state of the optimiser",
    ),
    "no optimiser": (
        lambda state: state["_extra_state"].pop("optimizer"),
        ValueError,
        "with the entries .*'optimizer'.* got",
    ),
    "moment of nan": (
        with_optimizer(lambda x: first_moment(x)["exp_avg"].fill_(torch.nan)),
        ValueError,
        "expected 'exp_avg' of a parameter of the optimiser that is finite",
    ),
    "rate of the optimiser": (
        with_optimizer(lambda x: x["param_groups"][0].update(lr="x")),
        TypeError,
        "lr of the optimiser's group 'model' must be a number, got 'x'",
    ),
    "steps": (with_extra(steps="x"), TypeError, "steps must be an integer, got 'x'"),
    "skipped": (with_extra(skipped=-1), ValueError, "skipped must be at least 0, got -1"),
    "calls": (with_extra(n_learn_calls=None), TypeError, "n_learn_calls must be an integer"),
    "no calls": (lambda s: s["_extra_state"].pop("n_learn_calls"), ValueError, "n_learn_calls"),
    "no rates": (lambda s: s["_extra_state"].pop("rates"), ValueError, "rates"),
    "rates": (
        with_extra(rates={"model": 0.7, "value": -1.0}),
        ValueError,
        "value_lr must be a finite number of at least 0",
    ),
    "nothing": (lambda s: s.update(_extra_state=None), ValueError, "the state of an optimiser"),
    "no extra state": (lambda s: s.pop("_extra_state"), RuntimeError, "missing: _extra_state"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_extra_state_changes_nothing(fault):
    change, error, text = FAULTS[fault]
    buffer, predictor, other = filled_buffer(), small_predictor(model_lr=0.1), small_predictor()
    for one in (predictor, other):
        learn(one, buffer, n_steps=2)
    before, state = everything(predictor), everything(other)
    change(state)
    with pytest.raises(error, match=text):
        predictor.load_state_dict(state)
    assert is_equal(everything(predictor), before)


def test_a_state_without_names_of_parameters_is_one_of_an_earlier_version():
    buffer, predictor, other = filled_buffer(), small_predictor(), small_predictor()
    learn(other, buffer)
    state = everything(other)
    del state["_extra_state"]["parameters"]
    predictor.load_state_dict(state)
    assert is_equal(everything(predictor), everything(other))


class Interrupted(FrozenEncoder):
    """Is interrupted while it is loaded, after the parts before it and with its own first layer."""

    def set_extra_state(self, state):
        if state == "interrupt":
            raise KeyboardInterrupt

    def get_extra_state(self):
        return "go on"


def test_an_interrupted_load_is_undone():
    buffer = filled_buffer()
    predictor, other = (
        small_predictor(encoder=Interrupted(4), model_lr=LinearSchedule(0.1, 0.01, 10))
        for _ in range(2)
    )
    for one in (predictor, other):
        learn(one, buffer, n_steps=2)
    before, state = everything(predictor), everything(other)
    with pytest.raises(KeyboardInterrupt):
        predictor.load_state_dict(state | {"encoder._extra_state": "interrupt"})
    assert is_equal(everything(predictor), before)
    predictor.load_state_dict(state)
    assert is_equal(everything(predictor), everything(other))


def test_weights_of_nan_were_loaded():
    predictor = small_predictor()
    before, state = everything(predictor), everything(small_predictor())
    state["model.net.weights.0"][0, 0] = torch.nan
    text = r"model.net.weights.0 \(expected finite numbers, got 8 that are not"
    with pytest.raises(RuntimeError, match=text):
        predictor.load_state_dict(state)
    assert is_equal(everything(predictor), before)


def test_float64_numbers_of_a_state_are_cast():
    predictor, other = small_predictor(), small_predictor()
    state = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in everything(other).items()
    }
    predictor.load_state_dict(state)
    assert is_equal(snapshot(predictor), snapshot(other))
    learn(predictor)


def test_parts_of_another_size_name_the_entry():
    one, other = (ProbabilisticEnsemble(3, 0, 1, n_models=n, hidden_sizes=(4,)) for n in (2, 3))
    before = everything(one)
    with pytest.raises(RuntimeError, match=r"net.weights.0 \(expected shape \[2, 4, 4\], got"):
        one.load_state_dict(other.state_dict())
    assert is_equal(everything(one), before)


def test_an_encoder_without_parameters_has_nothing_to_load():
    predictor = small_predictor(encoder=SelectEncoder(3, [0, 1], [2]))
    with pytest.raises(RuntimeError, match=r"unexpected: encoder.net.weight, encoder.net.bias"):
        predictor.load_state_dict(
            everything(predictor) | {"encoder.net.weight": 1, "encoder.net.bias": 2}
        )


@pytest.mark.parametrize("make", [small_predictor, static])
def test_a_state_that_was_assigned_ended_learning_without_a_word(make):
    predictor = make()
    before = everything(predictor)
    with pytest.raises(ValueError, match="assign=True would part the optimiser"):
        predictor.load_state_dict(everything(make()), assign=True)
    assert is_equal(everything(predictor), before)
