"""Planners of one's own: what they bring, and that what they return is not broadcast."""

import pytest
import torch
from torchrl.data import Bounded, Categorical

from layeredrl_trl.functional import elite_weights
from layeredrl_trl.planners import (
    CategoricalCrossEntropyPlanner,
    GaussianBelief,
    GaussianPlanner,
    SamplingPlanner,
)
from tests.planners.planning_envs import FreeEnv, free_state
from tests.planners.small_planners import PLANNERS, every_planner, make_planner

SIZES = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 6}
BATCH_SHAPES = [(), (3,), (2, 3)]


class Guess(SamplingPlanner):
    """Draw around the best candidate so far; brings only what has to be."""

    def register_space(self, spec):
        return torch.zeros(spec.shape)

    def start(self, carried):
        return self.initial_plan(carried)[0]

    def draw(self, belief, number):
        n = self.num_candidates - number
        return belief.unsqueeze(-3) + torch.randn(*belief.shape[:-2], n, *belief.shape[-2:])

    def weigh(self, returns):
        return elite_weights(returns, 2)

    def fit(self, belief, chosen, weights):
        found = weights.sum(-2, keepdim=True) > 0
        return torch.where(found, chosen[..., 0, :, :], belief)

    def most_likely(self, belief):
        return belief

    def width(self, belief):
        return torch.ones_like(belief[..., 0, :1])


class Alike(GaussianPlanner):
    def weigh(self, returns):
        finite = returns.isfinite()
        return None, finite / finite.sum(-2, keepdim=True).clamp_min(1)


def two_actions(reward=lambda action: -action.square().sum(-1, keepdim=True)):
    return FreeEnv(Bounded(-1, 1, (2,)), reward)


# ---- contract


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("return_action", ["mean", "best", "sample"])
@pytest.mark.parametrize("cls", [Guess, Alike])
def test_a_planner_of_your_own_brings_a_few_methods_and_gets_the_rest(cls, return_action, batch):
    planner = cls(two_actions(), return_action=return_action, **SIZES)
    for _ in range(2):
        out = planner(free_state(*batch))
        assert out["action"].shape == (*batch, 2)
        assert out["next", "plan"].shape == (*batch, 3, 2)
        for key in planner.statistics_keys:
            assert out[key].shape == (*batch, 1) and out[key].isfinite().all()
    assert set(out.keys(True, True)) == {"latent", *planner.out_keys}


def test_a_gaussian_is_fitted_to_the_weighted_candidates():
    planner = Alike(two_actions(), **SIZES)
    belief = GaussianBelief(torch.zeros(2, 3, 2), torch.ones(2, 3, 2))
    chosen, weights = torch.randn(2, 6, 3, 2), torch.rand(2, 6, 1)
    weights[0] /= weights[0].sum()
    weights[1] = 0
    fitted = planner.fit(belief, chosen, weights)
    mean = (weights[0].unsqueeze(-1) * chosen[0]).sum(0)
    variance = (weights[0].unsqueeze(-1) * (chosen[0] - mean) ** 2).sum(0)
    torch.testing.assert_close(fitted.mean[0], mean)
    torch.testing.assert_close(fitted.std[0], variance.sqrt())
    assert torch.equal(fitted.mean[1], belief.mean[1])
    assert torch.equal(fitted.std[1], belief.std[1])


def test_by_default_a_sequence_is_sampled_among_the_candidates_by_weight():
    planner = Guess(two_actions(), **SIZES)
    chosen = torch.arange(4.0).reshape(4, 1, 1).expand(1000, 4, 3, 2)
    weights = torch.tensor([0.0, 0.3, 0.7, 0.0]).unsqueeze(-1).repeat(1000, 1, 1)
    weights[900:] = 0
    belief = torch.full((1000, 3, 2), 9.0)
    drawn = planner.sample_sequence(belief, chosen, weights)
    assert (drawn[900:] == 9).all()
    values, counts = drawn[:900, 0, 0].unique(return_counts=True)
    assert values.tolist() == [1, 2]
    assert abs(counts[1] / 900 - 0.7) < 0.06


def test_entries_of_your_own_travel_with_the_plan():
    class Counting(Guess):
        def __init__(self, env, **options):
            super().__init__(env, **options)
            self.register_carried("steps", (1,))

        def start(self, carried):
            self.steps = carried["steps"].nan_to_num(0.0)
            return super().start(carried)

        def carry_on(self, belief, sequence):
            return {**super().carry_on(belief, sequence), "steps": self.steps + 1}

    planner = Counting(two_actions(), **SIZES)
    assert "steps" in planner.in_keys and ("next", "steps") in planner.out_keys
    assert "steps" in planner.make_tensordict_primer().primers.keys()
    data = free_state(4)
    for step in range(1, 4):
        data = planner(data)
        assert (data["next", "steps"] == step).all()
        data = free_state(4).update(data["next"])


def test_a_subclass_for_discrete_actions_weighs_otherwise():
    class Best(CategoricalCrossEntropyPlanner):
        def weigh(self, returns):
            return elite_weights(returns, 1)

    env = FreeEnv(Categorical(3), lambda action: (action == 2).float().unsqueeze(-1))
    out = Best(env, top_k=4, **SIZES | {"num_candidates": 64})(free_state(5))
    assert (out["action"] == 2).all() and out["action"].shape == (5,)


@every_planner
@pytest.mark.parametrize("gamma", [None, 0.9])
def test_the_discount_can_be_read(name, gamma):
    planner = make_planner(name, gamma=gamma)
    assert planner.gamma == planner.score.gamma == (1.0 if gamma is None else gamma)


@every_planner
def test_no_method_of_a_planner_is_one_of_torch(name):
    """`fit` and its kind must not replace what `nn.Module` or a `TensorDictModule` calls."""
    cls, _ = PLANNERS[name]
    own, stop = set(), cls.__mro__.index(SamplingPlanner) + 3
    for base in cls.__mro__[:stop]:
        own |= {key for key in vars(base) if not key.startswith("_")}
    below = {key for base in cls.__mro__[stop:] for key in vars(base)}
    assert own & below == {"forward"}


# ---- errors


def returning(method, change):
    """A planner whose ``method`` returns something else than it should."""

    def wrong(self, *args):
        return change(getattr(Guess, method)(self, *args))

    return type("Wrong", (Guess,), {method: wrong})


@pytest.mark.parametrize(
    ("method", "change", "text"),
    [
        ("register_space", lambda x: x[0], r"register_space must return a step \[W\], got shape"),
        ("draw", lambda x: x[..., :1], r"draw must have shape \[4, 6, 3, 2\], got \[4, 6, 3, 1\]"),
        ("draw", lambda x: x[:, 0], r"draw must have shape \[4, 3, 3, 2\], got \[4, 3, 2\]"),
        (
            "draw",
            lambda x: torch.cat([x, x], 1),
            r"draw must have shape \[4, 6, 3, 2\], got \[4, 1",
        ),
        (
            "weigh",
            lambda x: (None, x[1]),
            r"weigh: weights must have shape \[4, 6, 1\], got \[4, 2",
        ),
        ("weigh", lambda x: (x[0], x[1][..., 0]), r"weigh: weights must have shape \[4, 2, 1\]"),
        ("weigh", lambda x: (x[0][0], x[1]), r"weigh: index must have shape \[4, 2, 1\], got \[2"),
        (
            "most_likely",
            lambda x: x[:, 0],
            r"most_likely must have shape \[4, 3, 2\], got \[4, 2\]",
        ),
        ("width", lambda x: x[:, 0], r"width must have shape \[4, 1\], got \[4\]"),
        ("to_actions", lambda x: x[..., :1], r"to_actions must have shape \[4, 6, 3, 2\], got"),
        ("sample_sequence", lambda x: x[0], r"sample_sequence must have shape \[4, 3, 2\]"),
        ("carry_on", lambda x: {"plan": x["plan"][0]}, r"carry_on: 'plan' must have shape \[4, 3"),
    ],
)
def test_what_a_planner_of_your_own_returns_is_not_broadcast(method, change, text):
    with pytest.raises(ValueError, match=f"Wrong.{text}"):
        returning(method, change)(two_actions(), return_action="sample", **SIZES)(free_state(4))


@pytest.mark.parametrize(
    ("method", "change", "error", "text"),
    [
        ("weigh", lambda x: x[1], TypeError, r"weigh must return a tuple \(index, weights\), got"),
        (
            "weigh",
            lambda x: (x[0], 1),
            TypeError,
            r"weigh: weights must be a tensor, got 1 \(int\)",
        ),
        ("draw", lambda x: None, TypeError, r"draw must be a tensor, got None"),
        ("most_likely", lambda x: None, TypeError, r"most_likely must be a tensor, got None"),
        ("carry_on", lambda x: {}, KeyError, r"carry_on must return \['plan'\], got \[\]"),
        (
            "carry_on",
            lambda x: {**x, "radius": x["plan"]},
            KeyError,
            r"got \['plan', 'radius'\]. Further entries are registered by register_carried",
        ),
    ],
)
def test_a_planner_of_your_own_that_returns_something_else(method, change, error, text):
    with pytest.raises(error, match=text):
        returning(method, change)(two_actions(), **SIZES)(free_state(4))


@pytest.mark.parametrize("cls", [SamplingPlanner, GaussianPlanner])
def test_what_a_planner_has_to_bring_is_named(cls):
    with pytest.raises(TypeError, match=r"abstract method.* '?weigh"):
        cls(two_actions(), **SIZES)
