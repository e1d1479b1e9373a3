"""CategoricalCrossEntropyPlanner: forms of actions, a plain loop, probabilities, errors."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder
from layeredrl_trl.planners import CategoricalCrossEntropyPlanner
from tests.oracles import random_ensemble, random_reward
from tests.planners.planning_envs import FreeEnv, free_state
from tests.problems import TwoStepBanditEnv

BATCH_SHAPES = [(), (3,), (2, 3)]
SIZES = {"planning_horizon": 4, "optim_steps": 3, "num_candidates": 16, "top_k": 4}
SPECS = {
    "one-hot": OneHot(3),
    "one-hot int": OneHot(3, dtype=torch.int64),
    "one-hot float": OneHot(3, dtype=torch.float32),
    "index": Categorical(3),
    "index of shape (1,)": Categorical(3, (1,)),
    "index int32": Categorical(3, dtype=torch.int32),
}
PRIZES = torch.tensor([0.0, 1.0, 0.3])

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def prize(spec):
    """The prize of an action of the form of ``spec``, ``[..., 1]``."""
    if isinstance(spec, OneHot):
        return lambda action: (action.float() * PRIZES).sum(-1, keepdim=True)
    if spec.shape:
        return lambda action: PRIZES[action.long()]
    return lambda action: PRIZES[action.long()].unsqueeze(-1)


def make_planner(env=None, **options):
    env = FreeEnv(OneHot(3), prize(OneHot(3))) if env is None else env
    return CategoricalCrossEntropyPlanner(env, **{**SIZES, **options})


# ---- contract


@pytest.mark.parametrize("return_action", ["mean", "best", "sample"])
@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@every_spec
def test_writes_the_action_in_the_form_of_the_spec(spec, batch_size, return_action):
    env = FreeEnv(spec, prize(spec))
    planner = make_planner(env, return_action=return_action)
    out = planner(free_state(*batch_size))
    assert out["action"].shape == (*batch_size, *spec.shape)
    assert out["action"].dtype == spec.dtype
    for action in out["action"].reshape(-1, *spec.shape):
        assert spec.is_in(action)
    plan = out["next", "plan"]
    assert plan.shape == (*batch_size, 4, 3)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.sum(-1), torch.ones(*batch_size, 4))
    env.step(out)  # the environment takes it


@every_spec
def test_all_forms_plan_alike(spec):
    outs = []
    for form in (OneHot(3), spec):
        torch.manual_seed(0)
        outs.append(make_planner(FreeEnv(form, prize(form)))(free_state(2, 3)))
    for key in (("next", "plan"), "plan_return", "plan_spread", "plan_std"):
        torch.testing.assert_close(outs[0][key], outs[1][key], rtol=0, atol=0)


@every_spec
def test_candidate_return_takes_actions_of_the_form_of_the_spec(spec):
    planner = make_planner(FreeEnv(spec, prize(spec)))
    actions = spec.rand((3, 5, 7))
    returns = planner.candidate_return(free_state(3), actions)
    torch.testing.assert_close(returns, prize(spec)(actions).sum(-2))
    with pytest.raises(ValueError, match=r"actions must have shape \[\*\[3\], N, H"):
        planner.candidate_return(free_state(3), torch.zeros(3, 5, 7, 2))


# ---- oracle


def plain_categorical(plan, exponentials, *, momentum, smoothing, warm_smoothing):
    """One env, one candidate and one step at a time; the action counts by its prize."""
    probs = [[1 / 3] * 3 for _ in range(4)]
    if plan is not None:
        moved = [*plan.tolist()[1:], [1 / 3] * 3]
        probs = [[(1 - warm_smoothing) * p + warm_smoothing / 3 for p in row] for row in moved]
    record = (-math.inf, None)
    for round_exponentials in exponentials:
        scored = []
        for number, waiting in enumerate(round_exponentials.tolist()):
            actions = []
            for row, times in zip(probs, waiting, strict=True):
                chances = [p / time for p, time in zip(row, times, strict=True)]
                chances = row if number == 0 else chances
                actions.append(chances.index(max(chances)))
            total = sum(0.9**t * PRIZES[a].item() for t, a in enumerate(actions))
            scored.append((total, actions))
        scored.sort(key=lambda pair: -pair[0])
        record = max(record, scored[0], key=lambda pair: pair[0])
        for t in range(4):
            for a in range(3):
                share = sum(actions[t] == a for _, actions in scored[:4]) / 4
                new = momentum * probs[t][a] + (1 - momentum) * share
                probs[t][a] = (1 - smoothing) * new + smoothing / 3
    return torch.tensor(probs), sum(value for value, _ in scored[:4]) / 4, record


@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("return_action", ["mean", "best"])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.4}, {"smoothing": 0.3, "warm_smoothing": 0.1}]
)
def test_agrees_with_a_plain_loop(options, return_action, warm, batch_size):
    options = {"momentum": 0.0, "smoothing": 0.02, "warm_smoothing": 0.5, **options}
    spec = Categorical(3)
    planner = make_planner(
        FreeEnv(spec, prize(spec)), gamma=0.9, return_action=return_action, **options
    )
    tensordict = free_state(*batch_size)
    if warm:
        tensordict["plan"] = torch.rand(*batch_size, 4, 3).softmax(-1)
    torch.manual_seed(1)
    exponentials = [torch.empty(*batch_size, 16, 4, 3).exponential_() for _ in range(3)]
    torch.manual_seed(1)
    out = planner(tensordict)
    exponentials = torch.stack(exponentials).reshape(3, -1, 16, 4, 3)
    for i, td in enumerate(out.reshape(-1)):
        probs, plan_return, record = plain_categorical(
            td["plan"] if warm else None, exponentials[:, i], **options
        )
        torch.testing.assert_close(td["next", "plan"], probs, rtol=1e-4, atol=1e-5)
        if return_action == "best":
            assert td["action"].item() == record[1][0]
            assert td["plan_return"].item() == pytest.approx(record[0], rel=1e-4)
        else:
            assert td["action"].item() == probs[0].argmax().item()
            assert td["plan_return"].item() == pytest.approx(plan_return, rel=1e-4)


# ---- probabilities


def test_candidates_are_drawn_by_their_probabilities():
    seen = []
    planner = make_planner(
        num_candidates=20000, optim_steps=1, warm_smoothing=0.0, callback=seen.append
    )
    plan = torch.tensor([[0.1, 0.1, 0.8], [0.6, 0.3, 0.1], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]])
    planner(free_state().set("plan", plan))
    share = seen[0]["action"].float().mean(0)
    expected = torch.cat([plan[1:], torch.full((1, 3), 1 / 3)])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.02)


def test_no_action_gets_less_than_its_part_of_the_smoothing():
    plan = make_planner(optim_steps=20, smoothing=0.3)(free_state(4))["next", "plan"]
    assert plan.min().item() == pytest.approx(0.1)
    assert (make_planner(optim_steps=20, smoothing=0.0)(free_state(4))["next", "plan"] == 0).any()


def test_width_is_the_entropy_of_the_probabilities():
    out = make_planner()(free_state(3))
    plan = out["next", "plan"]
    expected = torch.distributions.Categorical(plan).entropy().mean(-1, keepdim=True) / math.log(3)
    torch.testing.assert_close(out["plan_std"], expected)
    even = FreeEnv(OneHot(3), lambda action: torch.nan * action[..., :1])
    torch.testing.assert_close(make_planner(even)(free_state())["plan_std"], torch.ones(1))


def test_a_single_action_is_no_choice():
    env = FreeEnv(OneHot(1), lambda action: action.float())
    out = make_planner(env)(free_state(2))
    assert out["action"].all()
    assert (out["plan_std"] == 0).all()


def test_sample_draws_by_the_last_probabilities():
    out = make_planner(return_action="sample", smoothing=0.6, optim_steps=8)(free_state(5000))
    expected = out["next", "plan"][:, 0].mean(0)
    torch.testing.assert_close(out["action"].float().mean(0), expected, rtol=0, atol=0.03)
    assert expected[0] > 0.15


def test_a_plan_from_elsewhere_becomes_probabilities():
    planner = make_planner(FreeEnv(OneHot(3), lambda a: torch.nan * a[..., :1]), warm_smoothing=0.0)
    plan = torch.tensor([[5.0, 1.0, 2.0], [2.0, 0.0, 2.0], [0.0, 0.0, 0.0], [-1.0, 3.0, 1.0]])
    out = planner(free_state().set("plan", plan))["next", "plan"]
    expected = [[0.5, 0.0, 0.5], [1 / 3] * 3, [0.0, 0.75, 0.25], [1 / 3] * 3]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_the_second_step_counts_in_the_bandit():
    env = TwoStepBanditEnv(Categorical(3))
    planner = make_planner(env, planning_horizon=2, num_candidates=64)
    start = env.reset(TensorDict(batch_size=[]))
    plan = planner(start)["next", "plan"]
    assert plan[0].argmax() == 2 and plan[1].argmax() == 0


@pytest.mark.parametrize("spec", [OneHot(3), Categorical(3), Categorical(3, (1,))])
@pytest.mark.parametrize("num_particles", [None, 1])
def test_agrees_with_the_predictor_on_what_an_action_is(spec, num_particles):
    model = random_ensemble(3, 0, spec)
    env = PredictorEnv(
        IdentityEncoder(3), model, random_reward(model), spec, num_particles=num_particles
    )
    seen = []
    planner = make_planner(env, callback=seen.append)
    start = env.initial_state(TensorDict(observation=torch.randn(2, 3), batch_size=[2]))
    out = planner(start)
    assert out["action"].shape == (2, *spec.shape)
    assert seen[0]["action"].shape == (2, 16, 4, *spec.shape)


# ---- errors


@pytest.mark.parametrize(
    "spec",
    [
        Bounded(-1, 1, (2,)),
        Unbounded((2,)),
        Binary(3),
        MultiOneHot([2, 3]),
        MultiCategorical([2, 3]),
        Bounded(0, 3, (1,), dtype=torch.int64),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_refuses_other_kinds_of_actions(spec):
    message = f"plans a OneHot or a Categorical action, got {type(spec).__name__}"
    with pytest.raises(TypeError, match=message):
        make_planner(FreeEnv(spec))


@pytest.mark.parametrize("spec", [OneHot(3, (2, 3)), Categorical(3, (2,)), Categorical(3, (1, 1))])
def test_refuses_several_actions(spec):
    with pytest.raises(ValueError, match="plans a single action, of shape"):
        make_planner(FreeEnv(spec))


def test_refuses_masked_actions():
    spec = Categorical(3, mask=torch.tensor([True, True, False]))
    with pytest.raises(ValueError, match="knows of no masked actions"):
        make_planner(FreeEnv(spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 17}, "top_k=17 and num_candidates=16"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"warm_smoothing": 1.1}, r"warm_smoothing must be in \[0, 1\], got 1.1"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_planner(**options)
