"""PathIntegralPlanner: a plain loop, temperatures, returns that are huge, and draws by weight."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

from layeredrl_trl.planners import PathIntegralPlanner
from tests.planners.planning_envs import FastLQREnv, FreeEnv, free_state
from tests.problems import DOUBLE_INTEGRATOR, LQREnv

BATCH_SHAPES = [(), (3,), (2, 3)]
SIZES = {"planning_horizon": 4, "optim_steps": 3, "num_candidates": 16}


def make_planner(env=None, **options):
    return PathIntegralPlanner(env or FastLQREnv(**DOUBLE_INTEGRATOR), **{**SIZES, **options})


def lqr_state(*batch_size):
    return TensorDict({"latent": torch.rand(*batch_size, 2) * 2 - 1}, batch_size=batch_size)


# ---- oracle


def plain_mppi(start, plan, noise, *, temperature, normalize, std_decay, warm_std):
    """One env, one candidate and one step at a time, with bounds of 2 and ``std=0.5``."""
    mean, std = torch.zeros(4, 1), 1.0
    if plan is not None:
        mean[:-1], std = plan[1:], warm_std
    record = (-math.inf, mean)
    for round_noise in noise:
        scored = []
        for number, sample in enumerate(round_noise):
            actions = (mean + std * (sample if number else 0 * sample)).clamp(-2, 2)
            x, total = start, 0.0
            for action in actions:
                total -= x @ DOUBLE_INTEGRATOR["Q"] @ x + action @ DOUBLE_INTEGRATOR["R"] @ action
                x = DOUBLE_INTEGRATOR["A"] @ x + DOUBLE_INTEGRATOR["B"] @ action
            scored.append((float(total), actions))
        returns = [value for value, _ in scored]
        average, unit = sum(returns) / len(returns), 1.0
        if normalize:
            unit = math.sqrt(sum((value - average) ** 2 for value in returns) / len(returns))
        terms = [math.exp((value - max(returns)) / unit / temperature) for value in returns]
        mean = sum(term * actions for term, (_, actions) in zip(terms, scored, strict=True))
        mean = mean / sum(terms)
        expected = sum(t * value for t, value in zip(terms, returns, strict=True)) / sum(terms)
        record = max(record, *scored, key=lambda pair: pair[0])
        std *= std_decay
    return mean, expected, record


@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("return_action", ["mean", "best"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "std_decay": 0.5, "warm_std": 0.3},
        {"temperature": 0.5, "normalize": False},
    ],
)
@pytest.mark.parametrize("env_class", [LQREnv, FastLQREnv])
def test_agrees_with_a_plain_loop(env_class, options, return_action, warm, batch_size):
    defaults = {"temperature": 0.1, "normalize": True, "std_decay": 1.0, "warm_std": 1.0}
    options = {**defaults, **options}
    planner = make_planner(
        env_class(**DOUBLE_INTEGRATOR, bound=2.0), return_action=return_action, std=0.5, **options
    )
    tensordict = lqr_state(*batch_size)
    if warm:
        tensordict["plan"] = torch.rand(*batch_size, 4, 1) * 4 - 2
    torch.manual_seed(1)
    noise = torch.stack([torch.randn(*batch_size, 16, 4, 1) for _ in range(3)])
    torch.manual_seed(1)
    out = planner(tensordict)
    noise = noise.reshape(3, -1, 16, 4, 1)
    for i, td in enumerate(out.reshape(-1)):
        plan, plan_return, record = plain_mppi(
            td["latent"], td["plan"] if warm else None, noise[:, i], **options
        )
        if return_action == "best":
            plan_return, plan = record
        torch.testing.assert_close(td["next", "plan"], plan, rtol=1e-3, atol=1e-4)
        assert td["plan_return"].item() == pytest.approx(plan_return, rel=1e-3)


# ---- temperatures and sizes of returns


def test_near_zero_the_best_candidate_alone_counts_and_at_infinity_all_alike():
    outs = {}
    for temperature in (1e-9, 1e9):
        seen = []
        planner = make_planner(temperature=temperature, optim_steps=1, callback=seen.append)
        outs[temperature] = planner(lqr_state(3))["next", "plan"], seen[0]
    plan, td = outs[1e-9]
    best = td["action"][torch.arange(3), td["return"].squeeze(-1).argmax(1)]
    torch.testing.assert_close(plan, best)
    plan, td = outs[1e9]
    torch.testing.assert_close(plan, td["action"].mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1e30, -1e30, 3e37])
@pytest.mark.parametrize("return_action", ["mean", "best", "sample"])
def test_huge_returns_neither_overflow_nor_give_nan(return_action, scale, normalize):
    env = FreeEnv(Unbounded((2,)), lambda action: scale * action.sum(-1, keepdim=True))
    planner = make_planner(env, normalize=normalize, return_action=return_action)
    out = planner(free_state(5))
    for key in ("action", ("next", "plan"), "plan_return", "plan_spread", "plan_std"):
        assert out[key].isfinite().all()
    assert (out["action"].mean() * scale) > 0


def test_normalized_weights_need_no_fitting_to_the_scale_of_the_reward():
    plans = []
    for scale in (1e-3, 1.0, 1e3):
        env = FreeEnv(
            Bounded(-1, 1, (2,)), lambda a, s=scale: -s * (a - 0.4).square().sum(-1, True)
        )
        torch.manual_seed(0)
        plans.append(make_planner(env, optim_steps=10)(free_state())["next", "plan"])
    torch.testing.assert_close(plans[0], plans[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plans[1], plans[2], rtol=1e-3, atol=1e-3)


def test_where_all_returns_are_equal_the_plan_is_the_plain_mean():
    seen = []
    env = FreeEnv(Bounded(-1, 1, (1,)), lambda action: torch.zeros_like(action))
    out = make_planner(env, optim_steps=1, callback=seen.append)(free_state(3))
    torch.testing.assert_close(out["next", "plan"], seen[0]["action"].mean(1))


# ---- sampling


def test_sample_draws_a_candidate_by_its_weight():
    """One candidate of two pays log(3) more: with temperature 1 it is drawn three times in four."""
    seen = []
    env = FreeEnv(Bounded(-1, 1, (1,)), lambda action: math.log(3) * (action > 0).float())
    planner = make_planner(
        env,
        planning_horizon=1,
        optim_steps=1,
        num_candidates=2,
        temperature=1.0,
        normalize=False,
        return_action="sample",
        callback=seen.append,
    )
    out = planner(free_state(4000))
    drawn = out["action"].unsqueeze(1).unsqueeze(1) == seen[0]["action"]
    assert drawn.any(1).all()
    higher = (seen[0]["action"][:, 1] > 0).flatten()  # the first one is the mean, 0
    share = (out["action"].flatten() > 0)[higher].float().mean().item()
    assert share == pytest.approx(0.75, abs=0.03)
    assert (out["action"].flatten() == 0)[~higher].float().mean().item() == pytest.approx(
        0.5, abs=0.05
    )


def test_std_decay_and_warm_std_are_what_is_left_of_the_width():
    planner = make_planner(std_decay=0.5, warm_std=0.3)
    out = planner(lqr_state(2))
    torch.testing.assert_close(out["plan_std"], torch.full((2, 1), 0.125))
    out = planner(lqr_state(2).update(out["next"]))
    torch.testing.assert_close(out["plan_std"], torch.full((2, 1), 0.3 * 0.125))


def test_smooth_noise():
    seen = []
    env = FreeEnv(Bounded(-1, 1, (1,)))
    for beta in (0.0, 2.0):
        make_planner(
            env,
            noise_beta=beta,
            planning_horizon=20,
            num_candidates=500,
            optim_steps=1,
            callback=seen.append,
        )(free_state())
    white, smooth = (td["action"].diff(dim=-2).std().item() for td in seen)
    assert smooth < 0.6 * white


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"std_decay": 0.0}, r"std_decay must be in \(0, 1\], got 0.0"),
        ({"std_decay": 1.5}, r"std_decay must be in \(0, 1\], got 1.5"),
        ({"warm_std": 0.0}, "warm_std must be positive"),
        ({"std": -1.0}, "std must be positive"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_planner(**options)


def test_refuses_top_k():
    with pytest.raises(TypeError, match="top_k"):
        make_planner(top_k=3)


def test_normalize_of_another_kind_is_named():
    with pytest.raises(TypeError, match="normalize must be True or False, got 'no'"):
        make_planner(normalize="no")
