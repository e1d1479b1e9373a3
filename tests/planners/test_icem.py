"""ICEMPlanner: CEM as a setting of it, a plain loop, elites that are kept, and smaller rounds."""

from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from layeredrl_trl.planners import CrossEntropyPlanner, ICEMPlanner
from tests.oracles import power_law_noise
from tests.planners.planning_envs import FastLQREnv, FreeEnv, free_state
from tests.problems import DOUBLE_INTEGRATOR, LQREnv

BATCH_SHAPES = [(), (3,), (2, 3)]
AS_CEM = {
    "noise_beta": 0.0,
    "keep_elites": 0.0,
    "population_decay": 1.0,
    "mean_candidate": "every",
    "momentum": 0.0,
    "return_action": "mean",
}
SIZES = {"planning_horizon": 4, "optim_steps": 3, "num_candidates": 16, "top_k": 4}


def lqr_env(env_class=FastLQREnv, **options):
    return env_class(**DOUBLE_INTEGRATOR, **options)


def make_planner(env=None, **options):
    return ICEMPlanner(env or lqr_env(bound=2.0), **{**SIZES, **options})


def lqr_state(*batch_size):
    return TensorDict({"latent": torch.rand(*batch_size, 2) * 2 - 1}, batch_size=batch_size)


# ---- contract


@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@pytest.mark.parametrize(("keep_elites", "kept"), [(0.25, 1), (0.3, 2), (1.0, 4)])
def test_writes_the_elites(keep_elites, kept, batch_size):
    planner = make_planner(keep_elites=keep_elites)
    out = planner(lqr_state(*batch_size))
    assert out["next", "elites"].shape == (*batch_size, kept, 4, 1)
    assert out["next", "elites"].isfinite().all()
    primer = planner.make_tensordict_primer()
    assert primer.primers["elites"].shape == (kept, 4, 1)
    out = planner(lqr_state(*batch_size).update(out["next"]))
    assert out["next", "elites"].isfinite().all()


def test_without_kept_elites_there_is_no_such_entry():
    planner = make_planner(keep_elites=0.0)
    assert "elites" not in planner.in_keys
    assert "elites" not in planner(lqr_state(3))["next"].keys()


# ---- oracle


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"return_action": "best"}, {"momentum": 0.3, "min_std": 0.1, "std": 0.7}]
)
def test_plain_cem_is_a_setting_of_it(options, batch_size, warm):
    env, tensordict = lqr_env(), lqr_state(*batch_size)
    if warm:
        tensordict["plan"] = torch.randn(*batch_size, 4, 1)
    outs = []
    for cls, settings in ((CrossEntropyPlanner, {}), (ICEMPlanner, AS_CEM)):
        torch.manual_seed(2)
        outs.append(cls(env, **{**SIZES, **settings, **options})(tensordict.clone()))
    assert set(outs[0].keys(True, True)) == set(outs[1].keys(True, True))
    for key in outs[0].keys(True, True):
        assert torch.equal(outs[0][key], outs[1][key])


def plain_icem(start, plan, elites, last, white, *, beta, kept, momentum, best):
    """One env, one candidate and one step at a time, with bounds of 2; rounds by ``white``."""
    horizon = 4
    mean, std = torch.zeros(horizon, 1), torch.full((horizon, 1), 2.0)
    if plan is not None:
        mean[:-1], std = plan[1:], std * 0.5
    again = []
    if elites is not None:
        for elite, new in zip(elites, last, strict=True):
            again.append(torch.cat([elite[1:], 2.0 * new]).clamp(-2, 2))
    record = (-float("inf"), mean)
    for number, round_white in enumerate(white):
        candidates = []
        for sample in round_white:
            noise = power_law_noise(beta, sample.flatten().tolist()).float().unsqueeze(-1)
            candidates.append((mean + std * noise).clamp(-2, 2))
        if number == len(white) - 1:
            candidates[0] = mean
        candidates[1 : 1 + len(again)] = again
        scored = []
        for actions in candidates:
            x, total = start, 0.0
            for action in actions:
                total -= x @ DOUBLE_INTEGRATOR["Q"] @ x + action @ DOUBLE_INTEGRATOR["R"] @ action
                x = DOUBLE_INTEGRATOR["A"] @ x + DOUBLE_INTEGRATOR["B"] @ action
            scored.append((float(total), actions))
        scored.sort(key=lambda pair: -pair[0])
        record = max(record, scored[0], key=lambda pair: pair[0])
        top = torch.stack([actions for _, actions in scored[:4]])
        mean = momentum * mean + (1 - momentum) * top.mean(0)
        std = momentum * std + (1 - momentum) * top.std(0, correction=0)
        again = [actions for _, actions in scored[:kept]]
    plan, plan_return = mean, sum(value for value, _ in scored[:4]) / 4
    if best:
        plan_return, plan = record
    return plan, plan_return, torch.stack(again)


@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("return_action", ["mean", "best"])
@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("env_class", [LQREnv, FastLQREnv])
def test_agrees_with_a_plain_loop(env_class, beta, return_action, warm, batch_size):
    planner = make_planner(
        lqr_env(env_class, bound=2.0),
        noise_beta=beta,
        keep_elites=0.5,
        population_decay=1.5,
        return_action=return_action,
    )
    tensordict = lqr_state(*batch_size)
    if warm:
        tensordict["plan"] = torch.rand(*batch_size, 4, 1) * 4 - 2
        tensordict["elites"] = torch.rand(*batch_size, 2, 4, 1) * 4 - 2
    torch.manual_seed(1)
    last = torch.randn(*batch_size, 2, 1, 1).reshape(-1, 2, 1, 1)
    white = [torch.randn(*batch_size, n, 4, 1).reshape(-1, n, 4, 1) for n in (16, 10, 8)]
    if beta == 0:  # the oracle's waves of white noise are another white noise
        waves = torch.tensor([power_law_noise(0.0, row).tolist() for row in torch.eye(4).tolist()])
        white = [(x.squeeze(-1) @ torch.linalg.inv(waves)).unsqueeze(-1) for x in white]
    torch.manual_seed(1)
    out = planner(tensordict)
    for i, td in enumerate(out.reshape(-1)):
        plan, plan_return, elites = plain_icem(
            td["latent"],
            td["plan"] if warm else None,
            td["elites"] if warm else None,
            last[i],
            [x[i] for x in white],
            beta=beta,
            kept=2,
            momentum=0.1,
            best=return_action == "best",
        )
        torch.testing.assert_close(td["next", "plan"], plan, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(td["next", "elites"], elites, rtol=1e-4, atol=1e-4)
        assert td["plan_return"].item() == pytest.approx(plan_return, rel=1e-4)


# ---- the parts


def test_rounds_get_smaller_but_not_below_twice_the_elites():
    sizes = []
    planner = make_planner(
        optim_steps=8,
        num_candidates=40,
        population_decay=1.5,
        callback=lambda td: sizes.append(td.shape[-1]),
    )
    planner(lqr_state(2))
    assert sizes == [40, 26, 17, 11, 8, 8, 8, 8]


def test_rounds_never_grow():
    sizes = []
    make_planner(num_candidates=6, callback=lambda td: sizes.append(td.shape[-1]))(lqr_state(2))
    assert sizes == [6, 6, 6]


@pytest.mark.parametrize("mean_candidate", ["last", "every"])
def test_the_mean_is_a_candidate_in_the_rounds_asked_for(mean_candidate):
    firsts = []
    planner = make_planner(
        mean_candidate=mean_candidate, callback=lambda td: firsts.append(td["action"][..., 0, :, :])
    )
    tensordict = lqr_state(2).set("plan", torch.full((2, 4, 1), 1.5))
    planner(tensordict)
    first = torch.tensor([1.5, 1.5, 1.5, 0.0]).reshape(4, 1).expand(2, 4, 1)
    assert torch.equal(firsts[0], first) == (mean_candidate == "every")


def test_elites_are_tried_again_one_step_later_with_a_new_last_action():
    seen = []
    planner = make_planner(keep_elites=0.5, callback=seen.append)
    out = planner(lqr_state(3))
    for before, after in pairwise(seen):
        best = before["return"].topk(2, dim=1).indices
        expected = before["action"].take_along_dim(best.unsqueeze(-1), 1)
        torch.testing.assert_close(after["action"][:, 1:3], expected, rtol=0, atol=0)
    elites = out["next", "elites"]
    seen.clear()
    planner(lqr_state(3).update(out["next"]))
    again = seen[0]["action"][:, 1:3]
    torch.testing.assert_close(again[:, :, :-1], elites[:, :, 1:], rtol=0, atol=0)
    assert (again[:, :, -1] != elites[:, :, -1]).all()


def test_a_kept_elite_is_not_lost_however_few_candidates_there_are():
    seen = []
    planner = make_planner(callback=seen.append, optim_steps=6)
    planner(lqr_state(10))
    best = torch.stack([td["return"].amax(1) for td in seen])
    assert (best.diff(dim=0) >= -1e-5).all()


def test_elites_that_blew_up_are_not_kept():
    def reward(action):
        return torch.where(action > -0.9, torch.nan, action).sum(-1, keepdim=True)

    planner = make_planner(
        FreeEnv(Bounded(-1, 1, (1,)), reward), planning_horizon=1, keep_elites=1.0, optim_steps=1
    )
    elites = planner(free_state(8))["next", "elites"]
    assert elites.isnan().any()
    assert (elites[elites.isfinite()] <= -0.9).all()
    out = planner(free_state(8).set("elites", elites))
    assert out["next", "plan"].isfinite().all()


def test_candidates_are_smooth():
    seen = []
    env = FreeEnv(Bounded(-1, 1, (1,)))
    options = {"planning_horizon": 20, "num_candidates": 500, "optim_steps": 1, "std": 0.1}
    for beta in (0.0, 2.0):
        make_planner(env, noise_beta=beta, callback=seen.append, **options)(free_state())
    white, smooth = (td["action"].diff(dim=-2).std().item() for td in seen)
    assert smooth < 0.5 * white
    assert seen[1]["action"].std().item() == pytest.approx(seen[0]["action"].std().item(), rel=0.1)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_elites": 1.1}, r"keep_elites must be in \[0, 1\], got 1.1"),
        ({"keep_elites": 1.0, "top_k": 16}, "leaves no room for new candidates"),
        ({"population_decay": 0.9}, "population_decay must be at least 1, got 0.9"),
        ({"mean_candidate": "first"}, "mean_candidate must be 'last' or 'every', got 'first'"),
        ({"noise_beta": float("nan")}, "beta must be a finite number"),
        ({"top_k": 17}, "top_k=17 and num_candidates=16"),
        ({"std": 0.0}, "std must be positive"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_planner(**options)


# ---- rounding


@pytest.mark.parametrize(
    ("keep_elites", "top_k", "kept"),
    [(0.07, 100, 7), (0.3, 10, 3), (0.29, 100, 29), (0.071, 100, 8), (0.001, 10, 1), (1.0, 7, 7)],
)
def test_a_fraction_of_the_elites_is_rounded_up_but_not_for_rounding_noise(
    keep_elites, top_k, kept
):
    """0.07 of 100 was 8."""
    planner = make_planner(keep_elites=keep_elites, top_k=top_k, num_candidates=2 * top_k)
    assert planner(lqr_state(1))["next", "elites"].shape == (1, kept, 4, 1)


@pytest.mark.parametrize(
    ("num_candidates", "decay", "expected"),
    [
        (125, 1.25, [125, 100, 80, 64, 51]),
        (1000, 1.1, [1000, 909, 826, 751, 683]),
        (1331, 1.1, [1331, 1210, 1100, 1000, 909]),
        (343, 1.4, [343, 245, 175, 125, 89]),
        (300, 1 / 0.3, [300, 90, 27, 8, 8]),
    ],
)
def test_sizes_of_rounds_that_are_whole_numbers(num_candidates, decay, expected):
    """``1331 * 1.1**-3`` was 999."""
    seen = []
    planner = make_planner(
        num_candidates=num_candidates,
        population_decay=decay,
        optim_steps=5,
        callback=lambda td: seen.append(td.shape[-1]),
    )
    planner(lqr_state())
    assert seen == expected


@pytest.mark.parametrize("value", [1, ("a", 0), None])
def test_a_key_of_another_kind_is_named(value):
    with pytest.raises(TypeError, match="elites_key must be"):
        make_planner(elites_key=value)
