"""Candidates under common random numbers: returns differ by what is done and not by luck."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical
from torchrl.envs import TransformedEnv

from layeredrl_trl.envs import DisagreementBonus, PredictorEnv
from layeredrl_trl.modules import DynamicsModel, IdentityEncoder, ParticlePrediction
from layeredrl_trl.planners import CrossEntropyPlanner, ICEMPlanner
from tests.changed_ensembles import Unchanged, as_kind
from tests.oracles import random_ensemble
from tests.planners.small_planners import every_planner, make_planner
from tests.problems import TWO_MOTORS

WAYS = ["fast", "slow", "transformed", "compiled"]
OPTIONS = [
    {},
    {"termination": "sample"},
    {"propagation": "random_model", "termination": "sample"},
    {"num_particles": 6},
]


def indifferent_env(name, way="fast", **options):
    """It does not matter what is done: reward and dynamics ignore the action."""
    spec = Categorical(3) if name == "categorical" else Bounded(-1, 1, (2,), dtype=torch.float32)
    model = random_ensemble(3, 0, spec, n_models=3, n_modes=2)
    with torch.no_grad():
        for net in (model.net, model.termination_net):
            net.weights[0][:, 3:] = 0.0
        model.termination_net.biases[-1] -= 2.0
    if way == "slow":
        model = as_kind(Unchanged, model)
    options = {"compile_imagine": way == "compiled", "uncertainty": True, **options}
    env = PredictorEnv(IdentityEncoder(3), model, lambda s, c, a: s[..., :1], spec, **options)
    return TransformedEnv(env, DisagreementBonus(0.3)) if way == "transformed" else env


def starts(env, n=4):
    start = TensorDict(observation=torch.randn(n, 3), batch_size=[n])
    return getattr(env, "base_env", env).initial_state(start)


@every_planner
@pytest.mark.parametrize("return_action", ["mean", "best"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_what_does_not_matter_has_equal_returns(options, way, return_action, name, monkeypatch):
    """Candidates of a round differed by the noise that each drew."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, backend="eager"))
    env, seen = indifferent_env(name, way, **options), []
    planner = make_planner(name, env, callback=seen.append, return_action=return_action)
    out = planner(starts(env))
    assert out["plan_spread"].max() < 1e-4 and len(seen) == 3
    for td in seen:
        torch.testing.assert_close(td["return"], td["return"][:, :1].expand_as(td["return"]))
    returns = torch.stack([td["return"][:, 0, 0] for td in seen])
    assert (returns[0].diff() != 0).all()  # of other states
    if return_action == "best":  # all rounds are compared
        torch.testing.assert_close(returns, returns[:1].expand_as(returns))
    else:
        assert (returns.diff(dim=0) != 0).all()


@pytest.mark.parametrize("way", ["fast", "slow", "transformed"])
def test_environments_draw_independently(way):
    """The same start of several environments."""
    env, seen = indifferent_env("CEM", way), []
    start = starts(env, 1).expand(5).clone()
    make_planner("CEM", env, callback=seen.append)(start)
    for td in seen:
        assert len(td["return"][:, 0].unique()) == 5


def test_few_particles_stay_spread_over_members():
    """Then candidates of one member are alike, and those of others are not."""
    env, seen = indifferent_env("CEM", num_particles=1), []
    make_planner("CEM", env, callback=seen.append, num_candidates=9)(starts(env))
    for td in seen:
        for returns in td["return"].squeeze(-1):
            sizes = (returns[:, None] - returns).abs().lt(1e-4).sum(1)
            assert sizes.tolist() == [3] * 9


class NoisyMotors(DynamicsModel):
    """``TWO_MOTORS`` with noise, and five particles."""

    latent_state_dim, context_dim, action_dim = 3, 0, 2
    n_models, n_modes, n_particles_per_model = 1, 1, 5

    def predict_particles(self, latent, context, action, member=None):
        change = (action @ TWO_MOTORS["B"].T)[..., None, None, :]
        mean = (latent @ TWO_MOTORS["A"].T + change).unsqueeze(-2)
        std, logit = torch.full_like(mean, 0.2), torch.full_like(latent[..., :1], -50.0)
        return ParticlePrediction(mean, std, torch.zeros_like(mean[..., 0]), logit)


def cost_of(state, action):
    parts = (state @ TWO_MOTORS["Q"]) * state, (action @ TWO_MOTORS["R"]) * action
    return -sum(part.sum(-1, keepdim=True) for part in parts)


def control(kind, deterministic, is_fair=True):
    """The mean return of 30 steps of planning in a noisy model of two motors."""
    env = PredictorEnv(
        IdentityEncoder(3),
        NoisyMotors(),
        lambda latent, context, action: cost_of(latent, action),
        Bounded(-3.0, 3.0, (2,)),
        deterministic=deterministic,
    )
    sizes = {"planning_horizon": 8, "optim_steps": 4, "num_candidates": 64, "top_k": 8}
    planner = kind(env, **sizes)
    if not is_fair:
        planner.score._common_random_numbers = lambda *_: env.common_random_numbers(1)
    torch.manual_seed(0)
    state, total, plan = torch.randn(16, 3), torch.zeros(16, 1), {}
    for _ in range(12):
        td = env.initial_state(TensorDict(observation=state, batch_size=[16]))
        out = planner(td.update(plan))
        plan = out["next"].clone()
        total += cost_of(state, out["action"])
        state = state @ TWO_MOTORS["A"].T + out["action"] @ TWO_MOTORS["B"].T
    return total.mean().item()


@pytest.mark.parametrize("kind", [CrossEntropyPlanner, ICEMPlanner])
def test_planning_in_noise_is_worth_most_of_planning_without(kind):
    """Independent noise cost two to four times as much."""
    best = control(kind, deterministic=True)
    lost, lost_by_luck = (best - control(kind, False, is_fair) for is_fair in (True, False))
    assert lost < 0.6 * lost_by_luck
    assert lost < 0.15 * abs(best)
