"""Extension points: the blocks of docs/extending.md run and do what the page says.

Each block stands on its own, so each runs in a namespace of its own.
"""

import importlib
import inspect
import pkgutil
import re
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

import layeredrl_trl
from layeredrl_trl import (
    CrossEntropyPlanner,
    DynamicsModel,
    Encoder,
    GaussianPlanner,
    IdentityEncoder,
    PredictorEnv,
    ProbabilisticEnsemble,
    RewardNet,
    RewardPredictor,
    SamplingPlanner,
    ValueNet,
    as_reward_module,
    as_value_module,
)
from tests.oracles_predictors import episodes, filled_buffer
from tests.pages import DOCS, blocks_of, namespace_of
from tests.planners.planning_envs import FastLQREnv
from tests.problems import DOUBLE_INTEGRATOR, LinearGaussian, TwoStepBanditEnv, riccati
from tests.small_predictors import learn, snapshot

PAGE = "extending.md"
BLOCKS = blocks_of(PAGE)
namespace = partial(namespace_of, PAGE)


# ---- the page


@pytest.mark.parametrize("title", BLOCKS)
def test_each_block_runs_by_itself(title):
    assert namespace(title)


@pytest.mark.parametrize("title", BLOCKS)
def test_all_names_are_at_the_top_level(title):
    imports = re.findall(r"^(?:from|import) (layeredrl_trl\S*)", BLOCKS[title][0], re.M)
    assert set(imports) <= {"layeredrl_trl"}


def test_the_table_names_methods_that_there_are():
    text = (DOCS / PAGE).read_text()
    for base in (Encoder, DynamicsModel, GaussianPlanner, SamplingPlanner):
        (row,) = re.findall(rf"^\|[^|]*\| `{base.__name__}` \|(.*)\|$", text, re.M)
        brings, may_bring = (re.findall(r"`(\w+)`", cell) for cell in row.split("|"))
        for name in (*brings, *may_bring):
            assert inspect.getdoc(getattr(base, name)), name
        if base is not Encoder:  # which one brings by either of two names
            assert set(brings) == base.__abstractmethods__
        assert not {*may_bring} & {*getattr(base, "__abstractmethods__", ())}


# ---- an encoder


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 5)])
def test_the_pixel_encoder_sees_each_image_in_any_batch(batch):
    encoder = namespace("An encoder")["PixelEncoder"](4)
    pixels = torch.randint(256, (*batch, 3, 64, 64), dtype=torch.uint8)
    data = encoder(TensorDict(pixels=pixels, batch_size=batch))
    assert data["latent"].shape == (*batch, 4) and data["context"].shape == (*batch, 0)
    one_by_one = [encoder.encode(image)[0] for image in pixels.reshape(-1, 3, 64, 64)]
    torch.testing.assert_close(data["latent"].reshape(-1, 4), torch.stack(one_by_one))


def test_a_predictor_learns_with_the_pixel_encoder():
    encoder = namespace("An encoder")["PixelEncoder"](4)
    model = ProbabilisticEnsemble(4, 0, 1, hidden_sizes=(8,))
    parts = model, ValueNet(4, 0, hidden_sizes=(8,)), RewardNet(4, 0, 1, hidden_sizes=(8,)), encoder
    predictor = RewardPredictor(*parts, 4, 0, encoder_warm_up=0)
    data = episodes(30, [(6, True), (9, False)])
    for part in (data, data["next"]):
        part["pixels"] = torch.randint(256, (30, 3, 64, 64), dtype=torch.uint8)
        del part["observation"]
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(30), batch_size=4)
    buffer.extend(data)
    before = snapshot(predictor)
    learn(predictor, buffer)
    after = snapshot(predictor)
    for name in ("encoder.net.0.weight", "encoder.net.3.weight", "model.net.weights.0"):
        (key,) = [key for key in before if key.endswith(name)]
        assert not torch.equal(before[key], after[key]), name
    assert predictor.predict_reward(data["pixels"], data["action"]).shape == (30,)


# ---- a dynamics model


def test_the_linear_dynamics_learn_a_linear_system():
    system = LinearGaussian()
    model = namespace("A dynamics model")["LinearDynamics"](2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    data = system.transitions(4000)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(data).backward()
        optimizer.step()
    inputs = data["latent"], data["context"], data["action"]
    mean, _, std, _ = model.predict(*inputs)
    expected = data["latent"] @ system.A.T + data["action"] @ system.B.T
    assert (mean[:, 0, 0] - expected).abs().max() < 0.1
    torch.testing.assert_close(std[:, 0, 0].mean(0), system.noise, rtol=0.15, atol=0.0)


def test_a_planner_searches_in_the_linear_dynamics():
    scope = namespace("A dynamics model")
    env = PredictorEnv(
        IdentityEncoder(3),
        scope["dynamics"],
        scope["env"].world_model.reward,
        scope["env"].action_spec,
    )
    planner = CrossEntropyPlanner(env, planning_horizon=3, optim_steps=2, num_candidates=8, top_k=2)
    state = env.initial_state(TensorDict(observation=torch.randn(5, 3), batch_size=[5]))
    assert planner(state)["action"].shape == (5, 1)
    assert scope["rollout"]["next", "reward"].shape == (7, 1)


# ---- the network of a member


def test_members_with_the_residual_network_learn_each_for_itself():
    network = namespace("The network of a member")["Residual"]
    model = ProbabilisticEnsemble(2, 0, 1, n_models=3, network=network)
    data = LinearGaussian().transitions(256)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        model.update_statistics(
            data["latent"], data["context"], data["action"], data["next", "latent"]
        )
        losses.append(model.loss(data))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    mean, *_ = model.predict(data["latent"], data["context"], data["action"])
    assert mean.shape == (256, 3, 1, 2)
    assert mean.std(1).min() > 0


# ---- reward, value and termination


def test_the_known_reward_is_predicted_and_the_value_learned():
    scope = namespace("Reward, value and termination")
    predictor, toy = scope["predictor"], filled_buffer()
    obs, act = torch.randn(5, 3), torch.randn(5, 1)
    expected = -obs.square().sum(-1) - 0.1 * act.square().sum(-1)
    torch.testing.assert_close(predictor.predict_reward(obs, act), expected)
    weight = next(p for p in predictor.val_func.parameters())
    before = weight.detach().clone()
    learn(predictor, toy, n_steps=22)  # the value does not learn in the first 20
    assert not torch.equal(before, weight)


def test_functions_of_your_own_become_modules():
    scope = namespace("Reward, value and termination")
    reward = as_reward_module(scope["reward"])
    value = as_value_module(scope["QuadraticValue"](3))
    assert reward.in_keys == ["latent", "context", "action"] and reward.out_keys == ["reward"]
    assert value.in_keys == ["latent", "context"] and value.out_keys == ["state_value"]


# ---- planners

PLANNERS = {
    "A planner with other weights": "BetterHalf",
    "A planner with another search": "LocalSearch",
}


@pytest.mark.parametrize(("title", "name"), PLANNERS.items(), ids=PLANNERS.values())
@pytest.mark.parametrize("return_action", ["mean", "best"])
def test_a_planner_of_your_own_comes_close_to_the_riccati_optimum(title, name, return_action):
    planner = namespace(title)[name](
        FastLQREnv(**DOUBLE_INTEGRATOR),
        planning_horizon=8,
        optim_steps=40,
        num_candidates=300,
        return_action=return_action,
    )
    latent = torch.rand(8, 2) * 2 - 1
    state = TensorDict(latent=latent, batch_size=[8])
    P, _ = riccati(**DOUBLE_INTEGRATOR, horizon=8)
    optimum = -((latent @ P[0]) * latent).sum(-1)
    plan = planner(state)["next", "plan"]
    achieved = planner.candidate_return(state, plan.unsqueeze(1)).flatten()
    idle = planner.candidate_return(state, torch.zeros(8, 1, 8, 1)).flatten()
    assert (achieved <= optimum * 0.9999).all() and achieved.sum() >= 1.02 * optimum.sum()
    assert idle.sum() < 1.3 * optimum.sum()


@pytest.mark.parametrize(("title", "name"), PLANNERS.items(), ids=PLANNERS.values())
def test_a_planner_of_your_own_chooses_the_patient_arm(title, name):
    env = TwoStepBanditEnv()
    sizes = {"planning_horizon": 4, "optim_steps": 5, "num_candidates": 128}
    planner = namespace(title)[name](env, return_action="best", **sizes)
    out = planner(env.reset(TensorDict(batch_size=[20])))
    assert (out["action"] > 0.5).all()
    torch.testing.assert_close(out["plan_return"], torch.full((20, 1), env.best_return))


@pytest.mark.parametrize(("title", "name"), PLANNERS.items(), ids=PLANNERS.values())
@pytest.mark.parametrize("return_action", ["mean", "best", "sample"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_planner_of_your_own_plans_in_an_imagined_env(title, name, return_action, batch):
    scope = namespace(title)
    options = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 64}
    planner = scope[name](scope["env"], return_action=return_action, **options)
    td = TensorDict(observation=torch.randn(*batch, 3), batch_size=batch)
    out = planner(scope["env"].initial_state(td.clone()))
    again = planner(scope["env"].initial_state(td.clone()).update(out["next"].select("plan")))
    for each in (out, again):
        assert each["action"].shape == (*batch, 1) and each["action"].abs().max() <= 2
        assert each["next", "plan"].shape == (*batch, 3, 1)
        assert each["plan_return"].isfinite().all()
    assert again["plan_std"].mean() < out["plan_std"].mean()  # a warm start is narrower


def test_the_weights_of_the_better_half():
    planner = namespace("A planner with other weights")["planner"]
    returns = torch.tensor([[1.0, 4.0, -torch.inf, 3.0], [-torch.inf] * 4]).unsqueeze(-1)
    _, weights = planner.weigh(returns)
    expected = torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3], [0] * 4])
    torch.testing.assert_close(weights.squeeze(-1), expected)


def test_the_cart_is_pushed_to_where_it_belongs():
    scope = namespace("A model to plan in")
    assert (scope["action"] < -0.5).all() and scope["planner"].gamma == 0.95


# ---- signatures

PACKAGES = [
    layeredrl_trl,
    *(
        importlib.import_module(f"layeredrl_trl.{module.name}")
        for module in pkgutil.iter_modules(layeredrl_trl.__path__)
        if module.ispkg
    ),
]
CLASSES = {
    f"{cls.__module__}.{cls.__name__}": cls
    for package in PACKAGES
    for cls in (getattr(package, name) for name in package.__all__)
    if inspect.isclass(cls) and not issubclass(cls, BaseException)
}


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_help_shows_the_arguments_of_every_class(cls):
    shown = inspect.signature(cls).parameters
    constructor = cls.__new__ if issubclass(cls, tuple) else cls.__init__
    taken = list(inspect.signature(constructor).parameters.values())[1:]
    if constructor in (object.__init__, nn.Module.__init__):
        taken = []
    named = [x.name for x in taken if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
    assert list(shown)[: len(named)] == named
    assert "args" not in shown
    if issubclass(cls, SamplingPlanner):
        assert "planning_horizon" in shown and "options" not in shown


def test_every_package_lists_what_is_public():
    assert len(CLASSES) > 50
    for package in PACKAGES:
        assert len(set(package.__all__)) == len(package.__all__)
        assert all(hasattr(package, name) for name in package.__all__)
