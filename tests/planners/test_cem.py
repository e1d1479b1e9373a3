"""CrossEntropyPlanner: keys and shapes, a plain CEM loop, problems with known answers, errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Unbounded
from torchrl.envs import (
    GymEnv,
    InitTracker,
    RewardScaling,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)

from layeredrl_trl.planners import CrossEntropyPlanner
from tests.planners.planning_envs import (
    CliffEnv,
    FastLQREnv,
    FastPendulumModel,
    FreeEnv,
    free_state,
    quadratic_value,
)
from tests.problems import DOUBLE_INTEGRATOR, LQREnv, PendulumModel, TwoStepBanditEnv, riccati

BATCH_SHAPES = [(), (3,), (2, 3)]


def lqr_env(env_class=FastLQREnv, **options):
    return env_class(**DOUBLE_INTEGRATOR, **options)


def make_planner(env, **options):
    defaults = {"planning_horizon": 4, "optim_steps": 3, "num_candidates": 16, "top_k": 4}
    return CrossEntropyPlanner(env, **{**defaults, **options})


def lqr_state(*batch_size):
    return TensorDict({"latent": torch.rand(*batch_size, 2) * 2 - 1}, batch_size=batch_size)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- contract


@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@pytest.mark.parametrize("env_class", [LQREnv, FastLQREnv])
def test_writes_action_plan_and_return(env_class, batch_size):
    planner = make_planner(lqr_env(env_class))
    tensordict = lqr_state(*batch_size)
    out = planner(tensordict)
    assert out is tensordict
    assert set(out.keys(True, True)) == {"latent", *planner.out_keys}
    assert out["action"].shape == (*batch_size, 1)
    assert out["next", "plan"].shape == (*batch_size, 4, 1)
    assert out["plan_return"].shape == (*batch_size, 1)
    torch.testing.assert_close(out["action"], out["next", "plan"][..., 0, :])
    assert not out["action"].requires_grad


def test_in_keys_name_the_state_and_the_plan():
    assert make_planner(lqr_env()).in_keys == ["latent", "plan", "is_init"]
    assert make_planner(lqr_env(), warm_start=False).in_keys == ["latent"]


def test_other_entries_stay_as_they_are_and_do_not_reach_the_model():
    class Watching(LQREnv):
        def _step(self, tensordict):
            seen.update(tensordict.keys(True, True))
            return super()._step(tensordict)

    seen = set()
    tensordict = lqr_state(3)
    tensordict["observation"] = torch.full((3, 7), torch.nan)
    tensordict["step_count"] = torch.zeros(3, 1, dtype=torch.int64)
    tensordict["done"] = torch.ones(3, 1, dtype=torch.bool)
    before = tensordict.clone()
    make_planner(lqr_env(Watching))(tensordict)
    assert not seen & {"observation", "step_count", "plan"}
    for key in before.keys():
        torch.testing.assert_close(tensordict[key], before[key], equal_nan=True)


def test_nested_keys():
    planner = make_planner(
        lqr_env(),
        action_key=("agent", "action"),
        plan_key=("agent", "plan"),
        plan_return_key=("agent", "plan_return"),
    )
    out = planner(lqr_state(2))
    assert out["agent", "action"].shape == (2, 1)
    assert out["next", "agent", "plan"].shape == (2, 4, 1)
    out["agent", "plan"] = out["next", "agent", "plan"]
    assert planner(out)["agent", "plan_return"].shape == (2, 1)


@pytest.mark.parametrize("return_action", ["mean", "best"])
def test_same_seed_same_plan(return_action):
    planner, tensordict = make_planner(lqr_env(), return_action=return_action), lqr_state(3)
    plans = []
    for _ in range(2):
        torch.manual_seed(5)
        plans.append(planner(tensordict.clone())["next", "plan"])
    torch.testing.assert_close(plans[0], plans[1], rtol=0, atol=0)


# ---- oracle


def plain_cem(start, plan, noise, *, bound, cold_std, warm_std, top_k, momentum, min_std, best):
    """CEM for one env, one candidate and one step at a time."""
    horizon = noise.shape[2]
    if plan is None:
        mean, std = torch.zeros(horizon, 1), torch.full((horizon, 1), cold_std)
    else:
        mean = torch.zeros(horizon, 1)
        for t in range(horizon - 1):
            mean[t] = plan[t + 1]
        std = torch.full((horizon, 1), cold_std * warm_std)
    record = (-float("inf"), mean)
    for round_noise in noise:
        scored = []
        for number, sample in enumerate(round_noise):
            actions = mean + std * (sample if number else 0 * sample)
            actions = actions.clamp(-bound, bound)
            x, total = start, 0.0
            for action in actions:
                total -= x @ DOUBLE_INTEGRATOR["Q"] @ x + action @ DOUBLE_INTEGRATOR["R"] @ action
                x = DOUBLE_INTEGRATOR["A"] @ x + DOUBLE_INTEGRATOR["B"] @ action
            scored.append((float(total), actions))
        scored.sort(key=lambda pair: -pair[0])
        record = max(record, scored[0], key=lambda pair: pair[0])
        elites = torch.stack([actions for _, actions in scored[:top_k]])
        mean = momentum * mean + (1 - momentum) * elites.mean(0)
        std = momentum * std + (1 - momentum) * elites.std(0, correction=0)
        std = std.clamp(min=min_std * cold_std)
    elite_return = sum(value for value, _ in scored[:top_k]) / top_k
    return (record[1], record[0]) if best else (mean, elite_return)


@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_action": "best"},
        {"momentum": 0.3, "min_std": 0.2, "warm_std": 0.1},
        {"top_k": 1},
    ],
)
@pytest.mark.parametrize("env_class", [LQREnv, FastLQREnv])
def test_agrees_with_a_plain_loop(env_class, options, warm, batch_size):
    options = {"momentum": 0.0, "min_std": 0.0, "warm_std": 0.5, "top_k": 4, **options}
    planner = make_planner(lqr_env(env_class, bound=2.0), **options)
    tensordict = lqr_state(*batch_size)
    if warm:
        tensordict["plan"] = torch.rand(*batch_size, 4, 1) * 4 - 2
    torch.manual_seed(1)
    noise = torch.stack([torch.randn(*batch_size, 16, 4, 1) for _ in range(3)])
    torch.manual_seed(1)
    out = planner(tensordict)
    best = options.pop("return_action", None) == "best"
    flat, noise = out.reshape(-1), noise.reshape(3, -1, 16, 4, 1)
    for i, td in enumerate(flat):
        plan, plan_return = plain_cem(
            td["latent"],
            td["plan"] if warm else None,
            noise[:, i],
            bound=2.0,
            cold_std=2.0,
            best=best,
            **options,
        )
        torch.testing.assert_close(td["next", "plan"], plan, rtol=1e-4, atol=1e-5)
        assert td["plan_return"].item() == pytest.approx(plan_return, rel=1e-4)


# ---- known answers


@pytest.mark.parametrize("return_action", ["mean", "best"])
def test_lqr_plan_costs_little_more_than_the_riccati_optimum(return_action):
    planner = make_planner(
        lqr_env(),
        planning_horizon=20,
        optim_steps=40,
        num_candidates=400,
        top_k=40,
        return_action=return_action,
    )
    tensordict = lqr_state(4)
    x = tensordict["latent"]
    optimum = -((x @ riccati(**DOUBLE_INTEGRATOR, horizon=20)[0][0]) * x).sum(-1)
    plan = planner(tensordict)["next", "plan"]
    achieved = planner.candidate_return(tensordict, plan.unsqueeze(1)).flatten()
    assert (achieved <= optimum + 1e-4).all()
    assert (achieved >= 1.05 * optimum).all()


def test_chooses_the_patient_arm_and_ignores_what_comes_after_the_end():
    env = TwoStepBanditEnv()
    tensordict = env.reset(TensorDict(batch_size=[5]))
    planner = make_planner(env, num_candidates=64, return_action="best")
    out = planner(tensordict)
    assert (out["action"] > 0.5).all()
    torch.testing.assert_close(out["plan_return"], torch.full((5, 1), env.best_return))


@pytest.mark.parametrize(
    ("terminal_value", "expected"),
    [
        (None, TwoStepBanditEnv.greedy_return),
        (
            TensorDictModule(lambda x: (x > 0).float(), ["latent"], ["state_value"]),
            TwoStepBanditEnv.best_return,
        ),
    ],
)
def test_one_step_plan_is_greedy_unless_it_knows_the_value(terminal_value, expected):
    env = TwoStepBanditEnv()
    planner = make_planner(
        env,
        planning_horizon=1,
        num_candidates=64,
        gamma=1.0,
        terminal_value=terminal_value,
        return_action="best",
    )
    out = planner(env.reset(TensorDict(batch_size=[5])))
    torch.testing.assert_close(out["plan_return"], torch.full((5, 1), expected))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_three_steps_and_the_exact_value_are_as_good_as_thirty(gamma):
    P, K = riccati(**DOUBLE_INTEGRATOR, horizon=30, gamma=gamma)
    options = {"num_candidates": 400, "top_k": 20, "gamma": gamma}
    short = make_planner(
        lqr_env(),
        planning_horizon=3,
        terminal_value=quadratic_value(P[3]),
        optim_steps=40,
        **options,
    )
    long = make_planner(lqr_env(), planning_horizon=30, optim_steps=120, momentum=0.7, **options)
    tensordict = lqr_state(4)
    x = tensordict["latent"]
    optimum = -((x @ P[0]) * x).sum(-1, keepdim=True)
    out_short, out_long = short(tensordict.clone()), long(tensordict.clone())
    torch.testing.assert_close(out_short["plan_return"], optimum, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out_short["action"], -x @ K[0].T, rtol=0.02, atol=0.02)
    assert out_long["plan_return"].sum() > 1.1 * out_short["plan_return"].sum()


def test_three_steps_without_value_are_short_sighted():
    K = riccati(**DOUBLE_INTEGRATOR, horizon=30)[1]
    planner = make_planner(
        lqr_env(), planning_horizon=3, optim_steps=40, num_candidates=400, top_k=20
    )
    tensordict = lqr_state(4)
    error = planner(tensordict)["action"] + tensordict["latent"] @ K[0].T
    assert error.abs().max() > 0.5


def closed_loop_cost(planner, start, steps):
    tensordict, cost = start.clone(), 0.0
    for _ in range(steps):
        plan = planner(tensordict)["next", "plan"]
        following = planner.env.step(tensordict)["next"]
        cost -= following["reward"].sum().item()
        tensordict = following.select("latent").set("plan", plan)
    return cost


@pytest.mark.parametrize("return_action", ["mean", "best"])
def test_warm_start_beats_cold_start_at_equal_compute(return_action):
    options = {"planning_horizon": 15, "optim_steps": 2, "num_candidates": 64, "top_k": 6}
    start = lqr_state(32)
    warm, cold = (
        closed_loop_cost(
            make_planner(lqr_env(), warm_start=warm_start, return_action=return_action, **options),
            start,
            15,
        )
        for warm_start in (True, False)
    )
    assert warm < 0.95 * cold


# ---- the plan


def test_is_init_resets_the_plan_of_the_flagged_envs_only():
    planner = make_planner(lqr_env(), optim_steps=1)
    tensordict = lqr_state(4).set("plan", torch.full((4, 4, 1), 3.0))
    flagged = torch.tensor([[True], [False], [True], [False]])

    def plan(td):
        torch.manual_seed(3)
        return planner(td)["next", "plan"]

    cold = plan(tensordict.exclude("plan"))
    warm = plan(tensordict.clone())
    mixed = plan(tensordict.clone().set("is_init", flagged))
    torch.testing.assert_close(mixed, torch.where(flagged.unsqueeze(-1), cold, warm))
    assert (cold != warm).any(-1).any(-1).all()


def test_plan_with_nan_is_a_cold_start_for_that_env_only():
    planner = make_planner(lqr_env(), optim_steps=1)
    plan = torch.full((2, 4, 1), 3.0)
    plan[0, 2] = torch.nan
    outs = []
    for td in (lqr_state(2).set("plan", plan), lqr_state(2)):
        td["latent"] = torch.ones(2, 2)
        torch.manual_seed(3)
        outs.append(planner(td)["next", "plan"])
    torch.testing.assert_close(outs[0][0], outs[1][0])
    assert (outs[0][1] != outs[1][1]).any()


def test_without_warm_start_the_plan_is_not_read():
    planner = make_planner(lqr_env(), warm_start=False)
    outs = []
    for td in (lqr_state(2), lqr_state(2)):
        td["latent"] = torch.ones(2, 2)
        td["plan"] = torch.randn(2, 4, 1)
        torch.manual_seed(3)
        outs.append(planner(td)["next", "plan"])
    torch.testing.assert_close(outs[0], outs[1])


def test_previous_plan_is_moved_on_by_one_step_and_ends_mid_range():
    spec = Bounded(torch.tensor([0.0, -4.0]), torch.tensor([2.0, 0.0]), (2,))
    planner = make_planner(FreeEnv(spec), num_candidates=1, top_k=1)  # the mean alone
    plan = torch.rand(3, 4, 2) * torch.tensor([2.0, -4.0])
    out = planner(free_state(3).set("plan", plan))["next", "plan"]
    torch.testing.assert_close(out[:, :-1], plan[:, 1:])
    torch.testing.assert_close(out[:, -1], torch.tensor([1.0, -2.0]).expand(3, 2))


# ---- scores


@pytest.mark.parametrize("with_value", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.8, 0.0])
def test_certain_soft_termination_scores_as_hard_termination(gamma, with_value):
    value = TensorDictModule(
        lambda latent, context: 5 * latent + context, ["latent", "context"], ["state_value"]
    )
    options = {"gamma": gamma, "terminal_value": value if with_value else None}
    hard = make_planner(CliffEnv("terminated"), **options)
    soft = make_planner(CliffEnv("soft"), **options)
    actions, context = torch.rand(2, 64, 6, 1) * 2 - 1, torch.tensor([[0.3], [-2.0]])
    bare = TensorDict({"latent": torch.zeros(2, 1), "context": context}, batch_size=[2])
    particles = {"latent": torch.zeros(2, 2, 3, 1), "alive": torch.ones(2, 2, 3, 1)}
    particles = TensorDict({**particles, "context": context}, batch_size=[2])

    expected = torch.zeros(2, 64, 1)
    for b in range(2):
        for n in range(64):
            x, alive = 0.0, True
            for t in range(6):
                x += actions[b, n, t].item()
                expected[b, n] += gamma**t * (x + context[b].item()) * alive
                alive = alive and x <= 1
            expected[b, n] += gamma**6 * (5 * x + context[b].item()) * alive * with_value
    assert (expected.std(1) > 0.1).all()
    torch.testing.assert_close(hard.candidate_return(bare, actions), expected)
    torch.testing.assert_close(soft.candidate_return(particles, actions), expected)


def test_soft_termination_weights_the_value_by_alive():
    value = TensorDictModule(lambda latent: latent * 0 + 10, ["latent"], ["state_value"])
    planner = make_planner(CliffEnv("soft", prob=0.25), gamma=0.5, terminal_value=value)
    state = {"latent": torch.full((2, 3, 1), 2.0), "context": torch.full((1,), -2.0)}
    alive = torch.linspace(0, 1, 6).reshape(2, 3, 1)
    tensordict = TensorDict({**state, "alive": alive})
    score = planner.candidate_return(tensordict, torch.zeros(1, 2, 1))
    assert score.item() == pytest.approx(0.5**2 * 10 * 0.5 * 0.75**2)


def test_truncation_bootstraps_from_the_state_it_happened_in():
    value = TensorDictModule(lambda latent: 10 * latent, ["latent"], ["state_value"])
    planner = make_planner(CliffEnv("truncated"), gamma=0.5, terminal_value=value)
    tensordict = TensorDict({"latent": torch.ones(1), "context": torch.zeros(1)})
    actions = torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]).unsqueeze(-1)
    scores = planner.candidate_return(tensordict, actions).flatten().tolist()
    assert scores[0] == pytest.approx(1 + 0.5 * 1.5 + 0.25 * 15)
    assert scores[1] == pytest.approx(1 + 0.5 + 0.25 + 0.125 + 0.0625 * 10)


def test_dead_particles_may_have_any_value():
    value = TensorDictModule(lambda latent: 1 / latent, ["latent"], ["state_value"])
    planner = make_planner(CliffEnv("soft"), gamma=1.0, terminal_value=value)
    state = {"latent": torch.zeros(2, 3, 1), "context": torch.zeros(1)}
    state["alive"] = torch.zeros(2, 3, 1)
    score = planner.candidate_return(TensorDict(state), torch.zeros(1, 4, 1))
    assert score.item() == 0.0


def test_candidates_that_blow_up_are_no_elites():
    def reward(action):
        return torch.where(action > 0, torch.nan, action).sum(-1, keepdim=True)

    planner = make_planner(FreeEnv(Bounded(-1, 1, (1,)), reward), top_k=16, planning_horizon=1)
    out = planner(free_state(8))
    assert out["plan_return"].isfinite().all()
    assert (out["action"] < 0).all()


@pytest.mark.parametrize("return_action", ["mean", "best"])
def test_where_all_candidates_blow_up_the_initial_plan_stays(return_action):
    env = FreeEnv(Bounded(0, 1, (1,)), lambda action: action * torch.inf)
    planner = make_planner(env, return_action=return_action)
    out = planner(free_state(2))
    torch.testing.assert_close(out["next", "plan"], torch.full((2, 4, 1), 0.5))
    assert (out["plan_return"] == -torch.inf).all()


def test_imagine_is_not_used_when_transforms_would_be_skipped():
    scaled = make_planner(TransformedEnv(lqr_env(), RewardScaling(loc=0.0, scale=2.0)))
    plain = make_planner(lqr_env())
    tensordict, actions = lqr_state(3), torch.randn(3, 5, 4, 1)
    torch.testing.assert_close(
        scaled.candidate_return(tensordict, actions),
        2 * plain.candidate_return(tensordict, actions),
    )


# ---- bounds


def test_bounds_hold_in_each_dim():
    low = torch.tensor([-1.0, 0.0, -torch.inf, 2.0])
    high = torch.tensor([1.0, 0.5, torch.inf, torch.inf])
    seen = []

    def reward(action):
        seen.append(action)
        return action.sum(-1, keepdim=True)  # wants out at the top

    planner = make_planner(FreeEnv(Bounded(low, high, (4,)), reward), num_candidates=256)
    out = planner(free_state(2))
    actions = torch.stack(seen).flatten(0, -2)
    assert (actions >= low).all() and (actions <= high).all()
    plan = out["next", "plan"]
    assert (plan >= low).all() and (plan <= high).all()
    first = torch.stack(seen[:4])
    assert first[..., 0].std() > 0.5 and first[..., 1].std() < 0.3
    assert first[..., 2].std() == pytest.approx(1.0, abs=0.1)


def test_unbounded_actions_start_from_a_standard_normal():
    seen = []

    def reward(action):
        seen.append(action)
        return action.sum(-1, keepdim=True)

    env = FreeEnv(Unbounded((2,)), reward)
    make_planner(env, num_candidates=1000, optim_steps=1)(free_state())
    actions = torch.stack(seen)
    assert actions.mean().item() == pytest.approx(0.0, abs=0.1)
    assert actions.std().item() == pytest.approx(1.0, abs=0.1)


def test_plan_from_elsewhere_is_clipped_to_the_bounds():
    planner = make_planner(lqr_env(bound=1.0), num_candidates=1, top_k=1)
    out = planner(lqr_state(2).set("plan", torch.full((2, 4, 1), 7.0)))
    torch.testing.assert_close(out["action"], torch.ones(2, 1))


# ---- properties


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), warm=st.booleans())
def test_flattening_the_batch_changes_nothing(seed, warm):
    planner = make_planner(lqr_env())
    torch.manual_seed(seed)
    tensordict = lqr_state(2, 3)
    if warm:
        tensordict["plan"] = torch.randn(2, 3, 4, 1)
    torch.manual_seed(seed)
    out = planner(tensordict.clone())
    torch.manual_seed(seed)
    flat = planner(tensordict.reshape(-1).clone())
    torch.testing.assert_close(out["next", "plan"].flatten(0, 1), flat["next", "plan"])


def test_one_env_and_many_envs_find_the_same_plan():
    planner = make_planner(lqr_env(), optim_steps=30, num_candidates=300, top_k=20)
    start = lqr_state()
    one = planner(start.clone())
    many = planner(start.expand(4).clone())
    torch.testing.assert_close(
        many["next", "plan"], one["next", "plan"].expand(4, 4, 1), rtol=0.02, atol=0.02
    )


# ---- as a policy


def pendulum_policy(env_class=PendulumModel, **options):
    to_state = TensorDictModule(lambda obs: obs, ["observation"], ["x"])
    return TensorDictSequential(to_state, make_planner(env_class(), **options))


def pendulums(max_steps=5):
    env = SerialEnv(2, lambda: GymEnv("Pendulum-v1"))
    return TransformedEnv(env, StepCounter(max_steps=max_steps))


def check_plan_is_carried(data, resets):
    """``data [2, T]``: the plan of the last step, or NaN after a reset."""
    for t in range(data.shape[1]):
        if t in resets:
            assert data["plan"][:, t].isnan().all()
        else:
            torch.testing.assert_close(data["plan"][:, t], data["next", "plan"][:, t - 1])
    torch.testing.assert_close(data["action"], data["next", "plan"][..., 0, :])


@pytest.mark.parametrize("init_tracker", [False, True])
def test_rollout_carries_the_plan_with_the_primer(init_tracker):
    policy = pendulum_policy()
    env = pendulums().append_transform(policy[-1].make_tensordict_primer())
    if init_tracker:
        env.append_transform(InitTracker())
    data = env.rollout(12, policy, break_when_any_done=False)
    check_plan_is_carried(data, resets=(0, 5, 10))


def test_collector_carries_the_plan_of_real_envs():
    policy = pendulum_policy()
    collector = Collector(
        pendulums(),
        policy,
        frames_per_batch=24,
        total_frames=24,
        auto_register_policy_transforms=True,
    )
    (data,) = list(collector)
    collector.shutdown()
    assert data.shape == (2, 12)
    assert data["observation"].shape == (2, 12, 3)
    check_plan_is_carried(data, resets=(0, 5, 10))


def test_rollout_without_the_primer_starts_cold_every_step():
    policy = pendulum_policy(optim_steps=1)
    data = pendulums().rollout(4, policy)
    assert "plan" not in data.keys()
    assert data["next", "plan"].shape == (2, 4, 4, 1)


def test_swings_the_real_pendulum_up():
    policy = pendulum_policy(
        FastPendulumModel, planning_horizon=20, optim_steps=4, num_candidates=64, top_k=8
    )
    env = pendulums(100).append_transform(policy[-1].make_tensordict_primer())
    data = env.rollout(100, policy)
    assert (data["next", "observation"][:, -10:, 0] > 0.9).all()


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planning_horizon": 0}, "planning_horizon must be at least 1, got 0"),
        ({"num_candidates": 0, "top_k": 0}, "top_k must be in"),
        ({"top_k": 17}, "top_k=17 and num_candidates=16"),
        ({"top_k": 0}, "top_k=0"),
        ({"optim_steps": 0}, "optim_steps must be at least 1"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"min_std": -1.0}, "min_std must not be negative"),
        ({"warm_std": 0.0}, "warm_std must be positive"),
        (
            {"return_action": "first"},
            "return_action must be 'mean', 'best' or 'sample', got 'first'",
        ),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_planner(lqr_env(), **options)


def test_refuses_unknown_options():
    with pytest.raises(TypeError, match="horizon_steps"):
        make_planner(lqr_env(), horizon_steps=3)


def test_refuses_a_batch_locked_env():
    with pytest.raises(ValueError, match="GymEnv is batch-locked"):
        make_planner(GymEnv("Pendulum-v1"))


def test_refuses_what_is_no_env():
    with pytest.raises(TypeError, match="needs a torchrl EnvBase, got Linear"):
        make_planner(nn.Linear(1, 1))


@pytest.mark.parametrize("spec", [Categorical(3), Bounded(0, 3, (2,), dtype=torch.int64)])
def test_refuses_discrete_actions(spec):
    with pytest.raises(TypeError, match="discrete actions are not supported by it"):
        make_planner(FreeEnv(spec))


def test_refuses_actions_that_are_no_vector():
    with pytest.raises(ValueError, match=r"shape \[A\], got shape \(2, 3\)"):
        make_planner(FreeEnv(Bounded(-1, 1, (2, 3))))


def test_refuses_a_terminal_value_without_keys():
    with pytest.raises(TypeError, match=r"must be a TensorDictModule.*got Linear"):
        make_planner(lqr_env(), gamma=1.0, terminal_value=nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("in_keys", "out_key", "error", "message"),
    [
        (["latent", "action"], "state_value", ValueError, "must be a state value, but it reads"),
        (["latent"], "state_action_value", ValueError, "must write 'state_value'"),
        (["latent", "goal"], "state_value", KeyError, r"reads \['goal'\].*has \['latent'\]"),
    ],
)
def test_refuses_a_terminal_value_that_does_not_fit(in_keys, out_key, error, message):
    module = TensorDictModule(lambda *args: args[0], in_keys, [out_key])
    with pytest.raises(error, match=message):
        make_planner(lqr_env(), gamma=1.0, terminal_value=module)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latent": None}, KeyError, r"state entry 'latent' of FastLQREnv.*\['observation'\]"),
        ({"latent": torch.zeros(3, 5)}, ValueError, r"'latent' must have shape \(3, 2\), got"),
        ({"plan": torch.zeros(3, 5, 1)}, ValueError, r"'plan' must have shape \(3, 4, 1\), got"),
        (
            {"plan": torch.zeros(3, 4, 1), "is_init": torch.zeros(3, dtype=torch.bool)},
            ValueError,
            r"'is_init' must have shape \(3, 1\), got \(3,\)",
        ),
    ],
)
def test_refuses_a_tensordict_that_does_not_fit_and_leaves_it_alone(change, error, message):
    tensordict = lqr_state(3).set("observation", torch.zeros(3, 1))
    for key, value in change.items():
        tensordict = tensordict.exclude(key) if value is None else tensordict.set(key, value)
    before = set(tensordict.keys(True, True))
    with pytest.raises(error, match=message):
        make_planner(lqr_env())(tensordict)
    assert set(tensordict.keys(True, True)) == before


@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (5, 4, 1), (2, 5, 4, 1), (4, 1)])
def test_candidate_return_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"actions must have shape \[\*\[3\], N, H, 1\]"):
        make_planner(lqr_env()).candidate_return(lqr_state(3), torch.zeros(shape))


# ---- state


def test_a_copy_plans_alike_and_the_value_is_in_the_state_dict():
    value = TensorDictModule(nn.Linear(2, 1), ["latent"], ["state_value"])
    planner = make_planner(lqr_env(), gamma=1.0, terminal_value=value)
    assert {key.rsplit(".", 1)[-1] for key in planner.state_dict()} == {"weight", "bias"}
    assert len(list(planner.parameters())) == 2
    other = copy.deepcopy(planner)
    nn.init.zeros_(other.get_parameter("score.terminal_value.module.weight"))
    other.load_state_dict(planner.state_dict())
    tensordict, plans = lqr_state(2), []
    for module in (planner, other):
        torch.manual_seed(0)
        plans.append(module(tensordict.clone())["next", "plan"])
    torch.testing.assert_close(plans[0], plans[1])


def test_planning_leaves_no_gradient():
    value = TensorDictModule(nn.Linear(2, 1), ["latent"], ["state_value"])
    out = make_planner(lqr_env(), gamma=1.0, terminal_value=value)(lqr_state(2))
    assert not any(x.requires_grad for x in out.values(True, True))
