"""CandidateReturn: what disagreement and termination add to the return, against plain loops."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import ModelBasedEnvBase, RewardScaling, TransformedEnv

from layeredrl_trl.envs import PessimismPenalty, PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, as_reward_module
from layeredrl_trl.planners import CandidateReturn, CrossEntropyPlanner
from tests.changed_ensembles import Unchanged, as_kind
from tests.oracles import random_ensemble, random_reward
from tests.planners.planning_envs import CliffEnv, FastLQREnv
from tests.problems import DOUBLE_INTEGRATOR
from tests.small_predictors import small_predictor

BATCH_SHAPES = [(), (3,), (2, 3)]


SPEC = Bounded(-1, 1, (2,))


def predictor_env(spec=None, *, n_particles=1, **options):
    spec = SPEC if spec is None else spec
    model = random_ensemble(3, 0, spec, n_particles_per_model=n_particles)
    options = {"deterministic": True, "uncertainty": True, **options}
    return PredictorEnv(IdentityEncoder(3), model, random_reward(model), spec, **options)


def starts(env, *batch_size):
    observation = torch.randn(*batch_size, 3)
    state = env.initial_state(TensorDict(observation=observation, batch_size=batch_size))
    state["alive"] = torch.rand_like(state["alive"])
    return state


class UncertainCliff(ModelBasedEnvBase):
    """Hard: walk on, uncertain as far as one is; beyond 1 it is over."""

    def __init__(self):
        def step(latent, action):
            latent = latent + action
            return latent, latent, latent > 1, torch.cat([latent, 0 * latent], -1).square()

        out_keys = ["latent", "reward", "terminated", "epistemic_var"]
        super().__init__(TensorDictModule(step, ["latent", "action"], out_keys))
        self.observation_spec = Composite(latent=Unbounded((1,)), epistemic_var=Unbounded((2,)))
        self.state_spec = Composite(latent=Unbounded((1,)))
        self.action_spec = Bounded(-1.0, 1.0, (1,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict, **kwargs):
        return self.observation_spec.zero(tensordict.batch_size)


# ---- oracle


@pytest.mark.parametrize("batch_size", BATCH_SHAPES)
@pytest.mark.parametrize("gamma", [1.0, 0.8, 0.0])
@pytest.mark.parametrize(
    ("penalty", "weight"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.7), (-1.0, -0.7), (5.0, 0.3)]
)
@pytest.mark.parametrize("options", [{}, {"num_particles": 1}, {"num_particles": 6}])
def test_soft_terms_agree_with_a_plain_loop(options, penalty, weight, gamma, batch_size):
    env = predictor_env(**options)
    value = TensorDictModule(lambda x: x.sum(-1, keepdim=True), ["latent"], ["state_value"])
    score = CandidateReturn(
        env,
        gamma=gamma,
        terminal_value=value,
        terminal_penalty=penalty,
        disagreement=weight,
    )
    state, actions = starts(env, *batch_size), torch.rand(*batch_size, 4, 2) * 2 - 1
    returns = score(state, actions)
    steps = env.imagine(state, actions)
    for i in range(math.prod(batch_size)):
        td, total = steps.reshape(-1, 4)[i], 0.0
        for t in range(4):
            before, after = td["alive"][t].mean().item(), td["next", "alive"][t].mean().item()
            distance = math.sqrt(td["next", "epistemic_var"][t].mean().item())
            reward = td["next", "reward"][t].item()
            reward += weight * before * distance - penalty * (before - after)
            total += gamma**t * reward
        last = td["next"][3]
        values = last["latent"].sum(-1, keepdim=True)
        total += gamma**4 * (last["alive"] * values).mean().item()
        assert returns.reshape(-1)[i].item() == pytest.approx(total, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize(("penalty", "weight"), [(2.0, 0.0), (0.0, 0.7), (5.0, -0.3)])
def test_hard_terms_agree_with_a_plain_loop(penalty, weight, gamma):
    score = CandidateReturn(
        UncertainCliff(), gamma=gamma, terminal_penalty=penalty, disagreement=weight
    )
    actions = torch.rand(64, 5, 1) * 2 - 1
    returns = score(TensorDict({"latent": torch.zeros(64, 1)}, batch_size=[64]), actions)
    ended = 0
    for n in range(64):
        x, total = 0.0, 0.0
        for t in range(5):
            x += actions[n, t].item()
            over = x > 1
            total += gamma**t * (x + weight * math.sqrt(x**2 / 2) - penalty * over)
            if over:
                ended += 1
                break
        assert returns[n].item() == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert 5 < ended < 60


# ---- property


def test_truncation_is_not_punished():
    env = CliffEnv("truncated")
    state = TensorDict({"latent": torch.ones(1), "context": torch.zeros(1)})
    actions = torch.tensor([[0.0], [0.5], [1.0]])
    plain = CandidateReturn(env)(state, actions)
    punished = CandidateReturn(env, terminal_penalty=100.0)(state, actions)
    torch.testing.assert_close(punished, plain)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_certain_soft_termination_is_punished_as_hard_termination(gamma):
    hard = CandidateReturn(CliffEnv("terminated"), gamma=gamma, terminal_penalty=3.0)
    soft = CandidateReturn(CliffEnv("soft"), gamma=gamma, terminal_penalty=3.0)
    actions, context = torch.rand(64, 6, 1) * 2 - 1, torch.zeros(64, 1)
    bare = TensorDict({"latent": torch.zeros(64, 1), "context": context}, batch_size=[64])
    particles = {"latent": torch.zeros(64, 2, 3, 1), "alive": torch.ones(64, 2, 3, 1)}
    particles = TensorDict({**particles, "context": context}, batch_size=[64])
    torch.testing.assert_close(hard(bare, actions), soft(particles, actions))


def test_an_open_loop_that_never_terminates_is_not_punished():
    env = FastLQREnv(**DOUBLE_INTEGRATOR)
    state, actions = TensorDict({"latent": torch.rand(5, 2)}, batch_size=[5]), torch.rand(5, 4, 1)
    punished = CandidateReturn(env, terminal_penalty=100.0)(state, actions)
    torch.testing.assert_close(punished, CandidateReturn(env)(state, actions))


def test_the_undiscounted_penalty_is_the_probability_not_to_survive():
    env = predictor_env()
    state, actions = starts(env, 5), torch.rand(5, 6, 2)
    plain, punished = (
        CandidateReturn(env, terminal_penalty=penalty)(state, actions) for penalty in (0.0, 1.0)
    )
    left = env.imagine(state, actions)["next", "alive"][:, -1].mean((1, 2))
    torch.testing.assert_close(plain - punished, state["alive"].mean((1, 2)) - left)


@pytest.mark.parametrize("spec", [OneHot(3), Categorical(3), Categorical(3, (1,))])
def test_open_loop_and_step_by_step_score_alike(spec):
    class StepByStep(PredictorEnv):
        imagine = None

    fast = predictor_env(spec)
    slow = predictor_env(spec)
    slow.__class__ = StepByStep
    slow.load_state_dict(fast.state_dict())
    options = {"terminal_penalty": 1.0, "disagreement": 0.5, "gamma": 0.9}
    state, actions = starts(fast, 4), spec.rand((4, 5))
    torch.testing.assert_close(
        CandidateReturn(fast, **options)(state, actions),
        CandidateReturn(slow, **options)(state, actions),
    )


def test_a_bonus_leads_to_where_members_disagree_and_a_penalty_away():
    env = UncertainCliff()
    places = []
    for weight in (30.0, -30.0):
        planner = CrossEntropyPlanner(
            env,
            planning_horizon=3,
            optim_steps=8,
            num_candidates=128,
            top_k=12,
            disagreement=weight,
            terminal_penalty=1000.0,
        )
        start = TensorDict({"latent": torch.full((10, 1), -0.5)}, batch_size=[10])
        places.append((start["latent"] + planner(start)["action"]).abs())
    assert (places[0] > 0.8).all()
    assert (places[1] < 0.2).all()


# ---- the dead


def dead_and_living(env, reward_of_the_dead, n=2):
    """States of which particle 0 of row 0 is dead, at a place that earns something else."""
    state = starts(env, n)
    state["latent"] = torch.rand_like(state["latent"])
    state["latent"][:, 0, 0] = reward_of_the_dead
    state["alive"][:] = 1.0
    state["alive"][:, 0, 0] = 0.0
    return state


@pytest.mark.parametrize("termination", ["soft", "sample"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("fast", [True, False])
def test_what_the_dead_would_earn_does_not_make_a_plan_worthless(fast, bad, termination):
    """0 * inf made the return NaN, which counts as -inf."""
    env = predictor_env(n_particles=2, termination=termination)
    if not fast:
        env.world_model.dynamics = as_kind(Unchanged, env.world_model.dynamics)
    env.world_model.reward = as_reward_module(lambda s, c, a: s[..., :1] + a[..., :1])
    value = TensorDictModule(lambda x: x.sum(-1, keepdim=True), ["latent"], ["state_value"])
    options = {"gamma": 0.9, "terminal_value": value, "terminal_penalty": 1.0, "disagreement": 0.1}
    score, actions = CandidateReturn(env, **options), torch.rand(2, 4, 2)
    returns = []
    for place in (0.0, bad):
        torch.manual_seed(0)
        returns.append(score(dead_and_living(env, place), actions))
    assert returns[1].isfinite().all()
    without = CandidateReturn(env, **{**options, "disagreement": 0.0})
    same = []
    for place in (0.0, bad):  # all but the variance, which finite states of the dead count in
        torch.manual_seed(0)
        same.append(without(dead_and_living(env, place), actions))
    torch.testing.assert_close(*same)
    alive = env.imagine(dead_and_living(env, bad), actions)["next", "alive"]
    assert (alive[:, :, 0, 0] == 0).all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["reward", "value", "alive"])
def test_what_is_not_finite_of_the_living_counts_as_minus_infinity(where, bad):
    """A living particle of unknown `alive` was taken for a dead one by the terminal value."""
    env = predictor_env()
    state, actions = starts(env, 2), torch.rand(2, 3, 2)
    state["alive"][:] = 1.0
    places = torch.tensor([0.0, bad])[:, None, None, None]
    if where == "reward":
        each = places.expand(2, 3, 1, 1).flatten(0, 1).unsqueeze(1)  # of all steps at once
        env.world_model.reward = as_reward_module(lambda s, c, a: s[..., :1] * 0 + each)
    if where == "alive":  # in the last step only, whose reward is not lost
        roll = env.world_model.rollout

        def rollout(*args, **options):
            out = roll(*args, **options)
            out.alive[1, -1] = math.nan
            return out

        env.world_model.__dict__["rollout"] = rollout

    def worth(latent):
        return latent.sum(-1, keepdim=True) * 0 + (places if where == "value" else 1.0)

    value = TensorDictModule(worth, ["latent"], ["state_value"])
    returns = CandidateReturn(env, gamma=0.9, terminal_value=value)(state, actions)
    assert returns[0].isfinite() and returns[1] == -math.inf


def test_disagreement_weighted_by_an_unknown_alive_is_unknown():
    env = Shaped(epistemic_var=torch.ones(4, 3, 2))
    state, actions = env.state_spec.zero((4,)), torch.zeros(4, 3, 2)
    state["alive"][1:] = math.nan
    returns = CandidateReturn(env, disagreement=1.0)(state, actions).flatten()
    assert returns[0] == 0 and (returns[1:] == -math.inf).all()


# ---- gamma


def test_the_discount_is_the_predictors_unless_another_is_given():
    value = TensorDictModule(lambda x: x[..., :1], ["latent"], ["state_value"])
    predictor, spec = small_predictor(gamma=0.9), Bounded(-1, 1, (1,))
    for env in (predictor.env(spec), TransformedEnv(predictor.env(spec), RewardScaling(0.0, 1.0))):
        assert CandidateReturn(env, terminal_value=value).gamma == 0.9
        assert CandidateReturn(env).gamma == 0.9
        assert CandidateReturn(env, gamma=0.5, terminal_value=value).gamma == 0.5
    assert CandidateReturn(predictor.env(spec, gamma=0.8)).gamma == 0.8
    unknown = predictor.env(spec, gamma=None)
    with pytest.raises(TypeError, match="terminal_value needs gamma"):
        CandidateReturn(unknown, terminal_value=value)
    assert CandidateReturn(unknown).gamma == 1.0


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_a_discount_out_of_range(gamma):
    for make in (CandidateReturn, lambda env, gamma: predictor_env(gamma=gamma)):
        with pytest.raises(ValueError, match="gamma must be"):
            make(predictor_env(), gamma=gamma)


# ---- shapes and dtypes


class Shaped(ModelBasedEnvBase):
    """Gives any entry of a step in any shape and dtype, by ``imagine``."""

    def __init__(self, **entries):
        super().__init__(nn.Identity())
        self.entries = entries
        shapes = {"latent": (2,), "alive": (1, 1, 1), "epistemic_var": (2,)}
        spec = Composite({key: Unbounded(shape) for key, shape in shapes.items()})
        self.observation_spec, self.state_spec = spec, spec.clone()
        self.action_spec, self.reward_spec = SPEC, Unbounded((1,))

    def _reset(self, tensordict, **kwargs):
        return self.observation_spec.zero(tensordict.batch_size)

    def imagine(self, tensordict, actions):
        batch = actions.shape[:-1]
        trailing = {"latent": (2,), "alive": (1, 1, 1), "epistemic_var": (2,)}
        flags = dict.fromkeys(("reward", "done", "terminated"), (1,))
        entries = {key: torch.zeros(*batch, *x) for key, x in {**trailing, **flags}.items()}
        entries |= {key: entries[key].bool() for key in ("done", "terminated")} | self.entries
        return {("next", key): x for key, x in entries.items()}


SHAPED = {
    "reward": ((4, 3), (4, 3, 2), (3, 1), (4, 4, 1)),
    "done": ((4, 3), (3, 1)),
    "terminated": ((4, 3), (4, 1)),
    "alive": ((4, 3), (4, 3, 1), (4, 3, 2, 1, 1), (1, 3, 1, 1, 1)),
    "epistemic_var": ((4, 3), (4, 2), (4, 3, 2, 1)),
}


@pytest.mark.parametrize(
    ("key", "shape"), [(key, shape) for key, shapes in SHAPED.items() for shape in shapes]
)
def test_an_entry_of_another_shape_is_named(key, shape):
    """A reward ``[N, H]`` was summed over the candidates."""
    dtype = torch.bool if key in ("done", "terminated") else torch.float32
    env = Shaped(**{key: torch.zeros(shape, dtype=dtype)})
    score = CandidateReturn(env, disagreement=1.0, terminal_penalty=1.0)
    state, actions = env.state_spec.zero((4,)), torch.zeros(4, 3, 2)
    message = rf"entry \('next', '{key}'\) of Shaped must have shape .*, got"
    with pytest.raises(ValueError, match=message):
        score(state, actions)
    good = CandidateReturn(Shaped(), disagreement=1.0, terminal_penalty=1.0)
    assert good(state, actions).shape == (4, 1)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("kept", [(-1,), (1, 2)], ids=["[N]", "[..., 2]"])
def test_a_terminal_value_of_another_shape_is_named(kept, soft):
    """It was broadcast to all candidates, or averaged over."""
    value = TensorDictModule(
        lambda x: x.sum(-1) if kept == (-1,) else x[..., :2], ["latent"], ["state_value"]
    )
    env = predictor_env() if soft else FastLQREnv(**DOUBLE_INTEGRATOR)
    state = starts(env, 4) if soft else TensorDict({"latent": torch.rand(4, 2)}, batch_size=[4])
    actions = torch.zeros(4, 3, 2 if soft else 1)
    expected = r"\[4, 3, 1, 1\]" if soft else r"\[4, 1\]"
    with pytest.raises(ValueError, match=f"terminal_value must write .* of shape {expected}, got"):
        CandidateReturn(env, gamma=0.9, terminal_value=value)(state, actions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rewards_of_half_precision_are_summed_in_float32(dtype):
    env = Shaped(reward=torch.full((4, 3000, 1), 0.1).to(dtype))
    state, actions = env.state_spec.zero((4,)), torch.zeros(4, 3000, 2)
    value = TensorDictModule(lambda x: x[..., :1].to(dtype), ["latent"], ["state_value"])
    returns = CandidateReturn(env, gamma=1.0, terminal_value=value)(state, actions)
    assert returns.dtype == torch.float32
    expected = 3000 * torch.tensor(0.1).to(dtype).item()
    torch.testing.assert_close(returns, torch.full((4, 1), expected), rtol=1e-4, atol=0)
    env = Shaped(reward=torch.zeros(4, 3000, 1), alive=torch.ones(4, 3000, 1, 1, 1))
    value = TensorDictModule(lambda x: x[..., :1].to(dtype) + 1, ["latent"], ["state_value"])
    returns = CandidateReturn(env, gamma=0.999, terminal_value=value)(state, actions)
    torch.testing.assert_close(returns, torch.full((4, 1), 0.999**3000), rtol=1e-4, atol=0)


# ---- errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward_key", 3),
        ("value_key", ["a", "b"]),
        ("alive_key", None),
        ("epistemic_var_key", ("a", 1)),
        ("state_keys", "latent"),
        ("gamma", "0.9"),
    ],
)
def test_arguments_of_another_kind_are_named(name, value):
    with pytest.raises(TypeError, match=f"{name} must be"):
        CandidateReturn(predictor_env(), **{name: value})


def test_disagreement_needs_an_env_that_knows_it():
    message = r"disagreement=0.5 needs the entry 'epistemic_var'.*uncertainty=True"
    with pytest.raises(ValueError, match=message):
        CandidateReturn(predictor_env(uncertainty=False), disagreement=0.5)
    with pytest.raises(ValueError, match=r"entry \('a', 'var'\)"):
        CandidateReturn(predictor_env(), disagreement=0.5, epistemic_var_key=("a", "var"))


@pytest.mark.parametrize("name", ["terminal_penalty", "disagreement"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_weights_that_are_not_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        CandidateReturn(predictor_env(), **{name: value})


def test_a_terminal_value_needs_the_discount_that_it_was_learned_with():
    """Of the loss it is 0.99; a default of 1 here was another one without a word."""
    value = TensorDictModule(lambda x: x[..., :1], ["latent"], ["state_value"])
    with pytest.raises(TypeError, match="terminal_value needs gamma, the discount"):
        CandidateReturn(predictor_env(), terminal_value=value)
    assert CandidateReturn(predictor_env(), gamma=0.9, terminal_value=value).gamma == 0.9


def test_without_a_terminal_value_nothing_is_discounted_unless_asked_for():
    env = predictor_env()
    score = CandidateReturn(env)
    assert score.gamma == 1.0
    state, actions = starts(env, 4), torch.zeros(4, 3, 2)
    torch.manual_seed(0)
    returns = score(state, actions)
    torch.manual_seed(0)
    reward = env.imagine(state, actions)["next", "reward"]
    torch.testing.assert_close(returns, reward.sum(1))


def test_refuses_a_q_function():
    value = TensorDictModule(
        lambda latent, action: latent, ["latent", "action"], ["state_action_value"]
    )
    with pytest.raises(ValueError, match="must be a state value, but it reads"):
        CandidateReturn(predictor_env(), gamma=0.9, terminal_value=value)


@pytest.mark.parametrize("transformed", [False, True])
def test_refuses_a_value_of_what_only_the_first_particle_saw(transformed):
    """A critic over `observation` valued all particles by the first one's."""
    critic = TensorDictModule(lambda x: x[..., :1], ["observation"], ["state_value"])
    env, one = predictor_env(), predictor_env(num_particles=1)
    if transformed:
        env, one = (TransformedEnv(e, RewardScaling(0.0, 1.0)) for e in (env, one))
    with pytest.raises(ValueError, match="of its first particle only"):
        CandidateReturn(env, gamma=0.9, terminal_value=critic)
    state, score = starts(one, 4), CandidateReturn(one, gamma=0.9, terminal_value=critic)
    assert score(state, torch.zeros(4, 2, 2)).shape == (4, 1)


@pytest.mark.parametrize("transformed", [False, True])
def test_candidates_are_spread_over_the_members(transformed):
    """Under a transform all candidates of a state were one arbitrary member's."""
    env = predictor_env(num_particles=1)
    state = starts(env, 2)
    if transformed:
        env = TransformedEnv(env, PessimismPenalty(0.1))
    planner = CrossEntropyPlanner(env, planning_horizon=2, optim_steps=1, num_candidates=9, top_k=2)
    member = planner._repeat(planner._state(state), 9)["member"].squeeze(-1)
    assert [row.bincount(minlength=3).tolist() for row in member] == [[3, 3, 3]] * 2
