"""OwnSignature: what `inspect.signature` shows of classes that pass options on."""

import inspect

import pytest
from torchrl.data import Bounded

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
from layeredrl_trl.planners import GaussianPlanner
from layeredrl_trl.signatures import OwnSignature
from tests.planners.small_planners import PLANNERS, every_planner, make_env


class Meta(type):
    def __call__(cls, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Elsewhere:
    def __init__(self, colour="red", *, shape):
        pass


class Base(metaclass=Meta):
    __signature__ = OwnSignature(Elsewhere)

    def __init__(self, first, second=2, *, third, fourth: int = 4, **options):
        pass

    def __call__(self, number):
        return number


class Further(Base):
    def __init__(self, first, *, fifth=5, fourth: int = 40, **options):
        super().__init__(first, fourth=fourth, **options)


class Everything(Base):
    def __init__(self, *args, sixth=6, **kwargs):
        super().__init__(*args, **kwargs)


class Closed(Further):
    def __init__(self, only):
        super().__init__(only, third=3, shape=4)


class Silent(Further):
    pass


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Base, "(first, second=2, *, third, fourth: int = 4, colour='red', shape)"),
        (
            Further,
            "(first, *, fifth=5, fourth: int = 40, second=2, third, colour='red', shape)",
        ),
        (
            Everything,
            "(first, second=2, *, sixth=6, third, fourth: int = 4, colour='red', shape)",
        ),
        (Closed, "(only)"),
        (Silent, str(inspect.signature(Further))),
    ],
)
def test_options_passed_on_are_shown(cls, expected):
    assert str(inspect.signature(cls)) == expected


def test_an_instance_shows_what_it_is_called_with():
    assert str(inspect.signature(Base(1, third=3))) == "(number)"


@every_planner
def test_a_planner_takes_what_it_shows_and_shows_what_it_takes(name):
    cls, needed = PLANNERS[name]
    shown = inspect.signature(cls).parameters
    sizes = {"planning_horizon": 2, "optim_steps": 1, "num_candidates": 8, **needed}
    options = {key: x.default for key, x in shown.items() if x.default is not x.empty}
    planner = cls(make_env(name), **options, **sizes)
    assert {key for key, x in shown.items() if x.default is x.empty} == {"env", *sizes}
    assert {"gamma", "terminal_value", "plan_key", "state_keys"} <= options.keys()
    assert list(inspect.signature(planner).parameters) == ["args", "kwargs"]  # of nn.Module's call
    with pytest.raises(TypeError, match="unknown"):
        cls(make_env(name), unknown=1, **sizes)


def test_a_subclass_showed_the_signature_of_its_base():
    class Own(PredictorEnv):
        def __init__(self, n_models, *, horizon=5):
            parts = IdentityEncoder(3), ProbabilisticEnsemble(3, 0, 1), RewardNet(3, 0, 1)
            super().__init__(*parts, Bounded(-1, 1, (1,)))

    class Wide(GaussianPlanner):
        def __init__(self, env, *, breadth=2.0, **options):
            super().__init__(env, std=breadth, **options)

    assert str(inspect.signature(Own)) == "(n_models, *, horizon=5)"
    assert list(inspect.signature(Wide).parameters)[:4] == ["env", "breadth", "std", "warm_std"]
