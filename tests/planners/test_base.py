"""What all planners promise, tried on each of them."""

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, ValueNet
from layeredrl_trl.planners import SamplingPlanner
from tests.changed_ensembles import Turned, Unchanged, as_kind
from tests.oracles import random_ensemble, random_reward
from tests.planners.planning_envs import FastPendulumModel, free_state
from tests.planners.small_planners import (
    BATCH_SHAPES,
    CONTINUOUS,
    PLANNERS,
    RETURN_ACTIONS,
    every_planner,
    every_return_action,
    make_env,
    make_planner,
    predictor_env,
)


def width(name):
    return 3 if name == "categorical" else 2


def random_plan(name, *batch_size):
    plan = torch.rand(*batch_size, 4, width(name))
    return plan / plan.sum(-1, keepdim=True) if name == "categorical" else plan


# ---- contract


@every_planner
@every_return_action
@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
def test_writes_action_plan_and_statistics(name, return_action, batch_size):
    planner = make_planner(name, return_action=return_action)
    tensordict = free_state(*batch_size)
    out = planner(tensordict)
    assert out is tensordict
    assert set(out.keys(True, True)) == {"latent", *planner.out_keys}
    assert out["next", "plan"].shape == (*batch_size, 4, width(name))
    for key in ("plan_return", "plan_spread", "plan_std"):
        assert out[key].shape == (*batch_size, 1)
        assert out[key].isfinite().all()
    assert (out["plan_spread"] >= 0).all() and (out["plan_std"] >= 0).all()
    spec = planner.env.action_spec_unbatched
    assert out["action"].dtype == spec.dtype
    for action in out["action"].reshape(-1, *spec.shape):
        assert spec.is_in(action)


@every_planner
def test_names_what_it_reads_and_writes(name):
    planner = make_planner(name)
    elites = ["elites"] if name == "iCEM" else []
    assert planner.in_keys == ["latent", "plan", "is_init", *elites]
    assert make_planner(name, warm_start=False).in_keys == ["latent"]
    statistics = ["plan_return", "plan_spread", "plan_std"]
    next_keys = [("next", key) for key in ("plan", *elites)]
    assert set(planner.out_keys) == {"action", *next_keys, *statistics}


@every_planner
def test_nested_keys(name):
    names = {
        f"{key}_key": ("agent", key) for key in ("plan", "plan_return", "plan_spread", "plan_std")
    }
    if name == "iCEM":
        names["elites_key"] = ("agent", "elites")
    planner = make_planner(name, action_key=("agent", "action"), **names)
    out = planner(free_state(2))
    assert set(out.keys(True, True)) == {"latent", *planner.out_keys}
    out = planner(free_state(2).set("agent", out["next", "agent"]))
    assert out["next", "agent", "plan"].shape == (2, 4, width(name))
    primed = planner.make_tensordict_primer().primers.keys(True, True)
    assert {("next", *key) for key in primed} == {
        key for key in planner.out_keys if key[0] == "next"
    }


@every_planner
@every_return_action
def test_same_seed_same_plan(name, return_action):
    planner = make_planner(name, return_action=return_action)
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(planner(free_state(3)))
    for key in outs[0].keys(True, True):
        assert torch.equal(outs[0][key], outs[1][key])


@every_planner
def test_planning_gives_the_action_and_leaves_the_tensordict_alone(name):
    planner = make_planner(name)
    tensordict = free_state(3).set("next", TensorDict({"a": torch.zeros(3)}, batch_size=[3]))
    before = set(tensordict.keys(True, True))
    torch.manual_seed(1)
    action = planner.planning(tensordict)
    assert set(tensordict.keys(True, True)) == before
    torch.manual_seed(1)
    assert torch.equal(action, planner(tensordict)["action"])


# ---- what a round is


@every_planner
def test_callback_sees_every_round_as_it_was_scored(name):
    seen = []
    planner = make_planner(name, callback=seen.append)
    tensordict = free_state(2)
    planner(tensordict)
    assert [td["round"] for td in seen] == [0, 1, 2]
    for td in seen:
        assert isinstance(td, TensorDictBase)
        n = td.shape[1]
        assert td.shape == (2, n) and n <= 16
        assert td["action"].shape == (2, n, 4, width(name))
        assert td["return"].shape == (2, n, 1)
        torch.testing.assert_close(
            planner.candidate_return(tensordict, td["action"]), td["return"], rtol=0, atol=0
        )


@every_planner
def test_callback_cannot_corrupt_the_search(name):
    def corrupt(td):
        td["action"].zero_()
        td["return"].fill_(torch.nan)

    outs = []
    for callback in (None, corrupt):
        torch.manual_seed(2)
        outs.append(make_planner(name, callback=callback)(free_state(2))["next", "plan"])
    assert torch.equal(*outs)


@every_planner
def test_best_is_the_best_candidate_of_all_rounds(name):
    seen = []
    planner = make_planner(name, callback=seen.append, return_action="best")
    out = planner(free_state(3))
    rounds = torch.cat([td["return"] for td in seen], 1)
    actions = torch.cat([td["action"] for td in seen], 1)
    best, at = rounds.squeeze(-1).max(1)
    torch.testing.assert_close(out["plan_return"].squeeze(-1), best)
    assert torch.equal(out["action"], actions[torch.arange(3), at, 0])


@every_planner
def test_spread_is_that_of_the_last_returns(name):
    seen = []
    out = make_planner(name, callback=seen.append)(free_state(3))
    expected = seen[-1]["return"].std(1, correction=0)
    torch.testing.assert_close(out["plan_spread"], expected)


@every_planner
def test_width_shrinks_where_returns_agree_on_a_plan(name):
    options = {"std_decay": 0.5} if name == "MPPI" else {}
    planner = make_planner(name, optim_steps=10, num_candidates=64, **options)
    assert (planner(free_state(3))["plan_std"] < 0.2).all()
    one = make_planner(name, optim_steps=1, num_candidates=64, **options)
    assert (one(free_state(3))["plan_std"] > 0.2).all()


@every_planner
def test_sampled_actions_differ_and_the_plan_is_still_the_mean(name):
    mean, sample = (
        make_planner(name, optim_steps=1, return_action=option) for option in ("mean", "sample")
    )
    torch.manual_seed(0)
    mean = mean(free_state(50))
    torch.manual_seed(0)
    sample = sample(free_state(50))
    torch.testing.assert_close(sample["next", "plan"], mean["next", "plan"])
    assert not torch.equal(sample["action"], mean["action"])


# ---- the plan


@every_planner
def test_is_init_and_nan_reset_the_plans_of_their_envs_only(name):
    planner = make_planner(name, optim_steps=1)
    tensordict = planner(free_state(4).set("plan", random_plan(name, 4)))
    tensordict = free_state(4).update(tensordict["next"])
    flagged = torch.tensor([[True], [False], [True], [False]])

    def plan(td):
        torch.manual_seed(3)
        return planner(td)["next", "plan"]

    cold, warm = plan(free_state(4)), plan(tensordict.clone())
    mixed = plan(tensordict.clone().set("is_init", flagged))
    torch.testing.assert_close(mixed, torch.where(flagged.unsqueeze(-1), cold, warm))
    assert (cold != warm).any(-1).any(-1).all()
    broken = tensordict.clone()
    for key in planner._carried_shapes:
        broken[key][0] = torch.nan
        broken[key][2] = torch.nan
    torch.testing.assert_close(plan(broken), mixed)


@every_planner
def test_without_warm_start_the_plan_is_not_read(name):
    planner, outs = make_planner(name, warm_start=False), []
    for _ in range(2):
        tensordict = free_state(2).set("plan", random_plan(name, 2))
        torch.manual_seed(3)
        outs.append(planner(tensordict)["next", "plan"])
    assert torch.equal(*outs)


@every_planner
def test_a_good_plan_is_found_sooner_from_the_last_one(name):
    planner = make_planner(name, optim_steps=2, num_candidates=32)
    first = planner(free_state(100))
    again = planner(free_state(100).update(first["next"]))
    assert again["plan_return"].mean() >= first["plan_return"].mean()


@every_planner
@pytest.mark.parametrize("return_action", RETURN_ACTIONS)
def test_where_all_candidates_blow_up_the_initial_plan_stays(name, return_action):
    env = make_env(name, lambda action: action[..., :1] * torch.nan)
    options = {"std_decay": 0.5} if name == "MPPI" else {}
    planner = make_planner(name, env, return_action=return_action, **options)
    out = planner(free_state(2))
    torch.testing.assert_close(out["plan_std"], torch.ones(2, 1))
    cold = planner.cold_step.expand(2, 4, -1)
    torch.testing.assert_close(out["next", "plan"], cold)
    assert (out["plan_return"] == -torch.inf).all()
    assert (out["plan_spread"] == 0).all()
    out = planner(free_state(2).update(out["next"]))
    torch.testing.assert_close(out["next", "plan"], cold)


@every_planner
def test_candidates_that_blow_up_count_for_nothing(name):
    def reward(action):
        first = action[..., :1].float()
        return torch.where(first > 0, torch.nan, first)

    out = make_planner(name, make_env(name, reward), planning_horizon=1)(free_state(8))
    assert out["plan_return"].isfinite().all()
    assert (out["action"][..., 0].float() <= 0).all()
    assert out["next", "plan"].isfinite().all()


@every_planner
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_returns_of_any_size(name, scale):
    base = make_env(name).world_model.module

    def reward(action):
        return scale * base(torch.zeros(1), action)[1]

    planner = make_planner(name, make_env(name, reward), num_candidates=64, planning_horizon=1)
    out = planner(free_state(20))
    assert not any(value.isnan().any() for value in out.values(True, True))
    torch.manual_seed(0)
    plain = make_planner(name, num_candidates=64, planning_horizon=1)
    torch.testing.assert_close(out["plan_std"], plain(free_state(20))["plan_std"], rtol=1, atol=0.1)


# ---- properties


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), warm=st.booleans(), name=st.sampled_from(list(PLANNERS)))
def test_flattening_the_batch_changes_nothing(seed, warm, name):
    planner = make_planner(name)
    torch.manual_seed(seed)
    tensordict = free_state(2, 3)
    if warm:
        tensordict["plan"] = random_plan(name, 2, 3)
    outs = []
    for td in (tensordict.clone(), tensordict.reshape(-1).clone()):
        torch.manual_seed(seed)
        outs.append(planner(td).reshape(-1))
    for key in outs[0].keys(True, True):
        torch.testing.assert_close(outs[0][key], outs[1][key])


# ---- as a policy


def pendulums(max_steps=5):
    env = SerialEnv(2, lambda: GymEnv("Pendulum-v1"))
    return TransformedEnv(env, StepCounter(max_steps=max_steps))


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("in_collector", [False, True])
def test_real_envs_carry_what_the_planner_carries(name, in_collector):
    planner = make_planner(name, FastPendulumModel())
    policy = TensorDictSequential(
        TensorDictModule(lambda obs: obs, ["observation"], ["x"]), planner
    )
    if in_collector:
        collector = Collector(
            pendulums(),
            policy,
            frames_per_batch=24,
            total_frames=24,
            auto_register_policy_transforms=True,
        )
        (data,) = list(collector)
        collector.shutdown()
    else:
        env = pendulums().append_transform(planner.make_tensordict_primer())
        data = env.rollout(12, policy, break_when_any_done=False)
    for key in planner._carried_shapes:
        for t in range(12):
            if t in (0, 5, 10):
                assert data[key][:, t].isnan().all()
            else:
                assert torch.equal(data[key][:, t], data["next", key][:, t - 1])
    assert data["plan_std"].shape == (2, 12, 1)


@pytest.mark.parametrize("as_index", [False, True])
def test_a_real_env_of_discrete_actions_carries_the_probabilities(as_index):
    def make():
        return GymEnv("CartPole-v1", categorical_action_encoding=as_index)

    env = SerialEnv(2, make)
    spec = env.action_spec_unbatched
    model = random_ensemble(4, 0, spec)
    imagined = PredictorEnv(IdentityEncoder(4), model, random_reward(model), spec)
    planner = make_planner("categorical", imagined)
    collector = Collector(
        env,
        TensorDictSequential(imagined.initial_state, planner),
        frames_per_batch=24,
        total_frames=24,
        auto_register_policy_transforms=True,
    )
    (data,) = list(collector)
    collector.shutdown()
    assert data["action"].dtype == spec.dtype
    assert data["action"].shape == (2, 12, *spec.shape)
    assert data["plan"][:, 0].isnan().all()
    assert torch.equal(data["plan"][:, 1], data["next", "plan"][:, 0])


@every_planner
@pytest.mark.parametrize("n_models", [1, 5])
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("n_modes", [1, 2])
def test_plans_in_a_predictor(name, n_models, num_particles, n_modes):
    spec = Categorical(3) if name == "categorical" else Bounded(-1, 1, (2,), dtype=torch.float32)
    model = random_ensemble(3, 0, spec, n_models=n_models, n_modes=n_modes)
    env = PredictorEnv(
        IdentityEncoder(3),
        model,
        random_reward(model),
        spec,
        num_particles=num_particles,
        uncertainty=True,
    )
    planner = make_planner(name, env, gamma=0.9, terminal_penalty=1.0, disagreement=0.5)
    start = env.initial_state(TensorDict(observation=torch.randn(2, 3, 3), batch_size=[2, 3]))
    out = planner(start)
    assert out["action"].shape == (2, 3, *spec.shape)
    assert out["plan_return"].isfinite().all()
    out = planner(env.step_mdp(env.step(out)))
    assert out["plan_return"].isfinite().all()


@every_planner
@pytest.mark.parametrize("num_particles", [None, 1])
def test_a_subclass_of_the_ensemble_is_planned_with_as_it_predicts(name, num_particles):
    """The fast rollout of its base would not ask for its predictions."""
    env = predictor_env(name, num_particles=num_particles, deterministic=True)
    env.world_model.dynamics = as_kind(Turned, env.world_model.dynamics)
    planner = make_planner(name, env, gamma=0.9)
    start = env.initial_state(TensorDict(observation=torch.randn(2, 3), batch_size=[2]))
    actions = env.action_spec.expand(2, 6, 4, *env.action_spec.shape).rand()
    torch.manual_seed(1)
    returns = planner.candidate_return(start, actions)
    torch.manual_seed(1)
    state, expected = env.repeat_state(start, 6), torch.zeros(2, 6, 1)
    for t, action in enumerate(actions.unbind(2)):
        out = env.step(state.set("action", action))
        expected += 0.9**t * out["next", "reward"]
        state = env.step_mdp(out)
    torch.testing.assert_close(returns, expected, rtol=1e-4, atol=1e-5)


@every_planner
def test_a_subclass_that_changes_nothing_is_planned_with_alike(name):
    env, plans = predictor_env(name), []
    start = env.initial_state(TensorDict(observation=torch.randn(2, 3), batch_size=[2]))
    actions = env.action_spec.expand(2, 6, 4, *env.action_spec.shape).rand()
    for kind in (ProbabilisticEnsemble, Unchanged):
        env.world_model.dynamics = as_kind(kind, env.world_model.dynamics)
        planner = make_planner(name, env)
        torch.manual_seed(1)
        returns = planner.candidate_return(start, actions)
        plans.append((returns, planner(start.clone())["next", "plan"]))
    torch.testing.assert_close(*plans, rtol=1e-4, atol=1e-4)


# ---- options


@every_planner
def test_python_says_which_options_are_missing(name):
    cls, defaults = PLANNERS[name]
    text = "missing 2 required keyword-only arguments: 'planning_horizon' and 'optim_steps'"
    with pytest.raises(TypeError, match=text):
        cls(make_env(name), num_candidates=16, **defaults)


def test_the_signature_shows_what_is_required():
    options = inspect.signature(SamplingPlanner).parameters
    named = {name: x for name, x in options.items() if x.kind is x.KEYWORD_ONLY}
    required = {name for name, x in named.items() if x.default is x.empty}
    assert required == {"planning_horizon", "optim_steps", "num_candidates"}


@pytest.mark.parametrize("name", ["planning_horizon", "optim_steps", "num_candidates", "top_k"])
@pytest.mark.parametrize("value", [2.5, 4.0, "4"])
def test_counts_that_are_no_integers(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be an integer, got {value!r}"):
        make_planner("iCEM", **{name: value})


@pytest.mark.parametrize(
    "name", ["std", "warm_std", "min_std", "noise_beta", "population_decay", "disagreement"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_were_accepted(name, value):
    with pytest.raises(ValueError, match=r"(finite|must be at least)"):
        make_planner("iCEM", **{name: value})


@every_planner
def test_a_terminal_value_needs_gamma(name):
    env = predictor_env(name)
    with pytest.raises(TypeError, match="terminal_value needs gamma"):
        make_planner(name, env, terminal_value=ValueNet(3, 0))
    planner = make_planner(name, env, terminal_value=ValueNet(3, 0), gamma=0.9)
    assert planner.score.gamma == 0.9 and make_planner(name, env).score.gamma == 1.0


# ---- errors


@every_planner
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"planning_horizon": 0}, ValueError, "planning_horizon must be at least 1, got 0"),
        ({"optim_steps": 0}, ValueError, "optim_steps must be at least 1, got 0"),
        ({"return_action": "first"}, ValueError, "'mean', 'best' or 'sample', got 'first'"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
        ({"gamma": -0.1}, ValueError, r"gamma must be in \[0, 1\], got -0.1"),
        ({"horizon": 3}, TypeError, "unexpected keyword argument 'horizon'"),
    ],
)
def test_refuses_options_out_of_range(name, options, error, message):
    with pytest.raises(error, match=message):
        make_planner(name, **options)


@every_planner
@pytest.mark.parametrize("key", ["plan", "elites"])
def test_refuses_a_plan_of_another_shape(name, key):
    planner = make_planner(name)
    if key not in planner._carried_shapes:
        return
    with pytest.raises(ValueError, match=rf"plan '{key}' must have shape \(2, .*got \(2, 3\)"):
        planner(free_state(2).set(key, torch.zeros(2, 3)))


# ---- state


@every_planner
def test_a_copy_plans_alike_and_a_planner_has_no_state(name):
    planner = make_planner(name)
    assert planner.state_dict() == {}
    plans = []
    for module in (planner, copy.deepcopy(planner)):
        torch.manual_seed(0)
        plans.append(module(free_state(2))["next", "plan"])
    assert torch.equal(*plans)


@every_planner
@every_return_action
@pytest.mark.gpu
@pytest.mark.parametrize("cudagraphs", [True, False])
def test_plans_on_the_gpu_without_waiting_for_it(name, return_action, cudagraphs):
    spec = Categorical(3) if name == "categorical" else Bounded(-1, 1, (2,), dtype=torch.float32)
    model = random_ensemble(3, 0, spec)
    env = PredictorEnv(IdentityEncoder(3), model, random_reward(model), spec, uncertainty=True)
    options = {"terminal_penalty": 1.0, "disagreement": 0.5, "return_action": return_action}
    options["cudagraphs"] = cudagraphs
    planner = make_planner(name, env, **options).to("cuda")
    start = TensorDict(observation=torch.randn(4, 3), batch_size=[4]).to("cuda")
    start = env.initial_state(start)
    for _ in range(3):  # whatever is recorded is recorded here
        out = planner(start.clone())
        planner(start.clone().update(out["next"]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = planner(start.clone())
        out = planner(start.clone().update(out["next"]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out["action"].is_cuda and out["next", "plan"].is_cuda
    assert out["plan_return"].isfinite().all()


@every_planner
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("warm_start", "cuda"),
        ("warm_start", 1),
        ("cudagraphs", "auto"),
        ("plan_key", 3),
        ("plan_return_key", ["a"]),
        ("plan_spread_key", None),
        ("plan_std_key", ()),
        ("is_init_key", ("a", 1)),
        ("action_key", 0),
    ],
)
def test_flags_and_keys_of_another_kind_are_named(argument, value, name):
    with pytest.raises(TypeError, match=f"{argument} must be"):
        make_planner(name, **{argument: value})
