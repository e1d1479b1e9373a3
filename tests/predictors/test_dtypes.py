"""The library computes in float32, whatever torch's default dtype is and whoever made a network."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, OneHot, TensorDictReplayBuffer

from layeredrl_trl.diagnostics import model_report
from layeredrl_trl.modules import (
    DynamicsModel,
    Encoder,
    LearnedEncoder,
    LinearEncoder,
    MLPEncoder,
    ParticlePrediction,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
    SymmetryBreakingStart,
    ValueNet,
)
from layeredrl_trl.planners import (
    CategoricalCrossEntropyPlanner,
    CrossEntropyPlanner,
    ICEMPlanner,
    PathIntegralPlanner,
)
from layeredrl_trl.predictors import RewardPredictor, StaticPredictor
from tests.default_dtype import default_dtype
from tests.small_predictors import learn, small_parts, small_predictor, snapshot

F32, F64 = torch.float32, torch.float64
SMALL = {"hidden_sizes": (8,)}


def draw(*shape, dtype=F32) -> torch.Tensor:
    return torch.randn(shape, dtype=F32).to(dtype)


def filled(dtype=F32, discrete=False) -> TensorDictReplayBuffer:
    """90 steps, in episodes of 15 that terminate and are truncated by turns."""
    n = 90
    observation, action = draw(n + 1, 3), draw(n, 1).tanh()
    if discrete:
        action = nn.functional.one_hot((action[:, 0] > 0).long(), 2)
    terminated, truncated = torch.zeros(2, n, 1, dtype=torch.bool)
    terminated[14::30] = True
    truncated[29::30] = True
    reached = {"observation": observation[1:].to(dtype), "reward": draw(n, 1, dtype=dtype)}
    reached |= {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
    data = {"observation": observation[:-1].to(dtype), "next": reached}
    data["action"] = action if discrete else action.to(dtype)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(TensorDict(data, batch_size=[n]))
    return buffer


# --- parts of the library


def library_parts(kind: str):
    """``(model, val_func, rew_func, encoder)``, all of the library."""
    options = {"n_models": 3} | SMALL
    encoders = {
        "linear": lambda: LinearEncoder(3, 2, 1),
        "mlp": lambda: MLPEncoder(3, 2, 1, **SMALL, activation=nn.PReLU),
    }
    encoder = encoders.get(kind, lambda: SelectEncoder(3, [0, 1], [2]))()
    options |= {
        "linear": {"n_modes": 2, "bootstrap": True},
        "mlp": {"activation": nn.PReLU},
        "q": {"learn_std_bounds": True},
    }.get(kind, {})
    space = OneHot(2) if kind == "discrete" else 1
    model = ProbabilisticEnsemble(2, 1, space, **options)
    if kind == "start":
        model = SymmetryBreakingStart(model, 150)
    value = ValueNet(2, 1, action_dim=1 if kind == "q" else None, **SMALL)
    return model, value, RewardNet(2, 1, 2 if kind == "discrete" else 1, **SMALL), encoder


ENV_OPTIONS = [
    {},
    {"uncertainty": True},
    {"termination": "sample", "propagation": "random_model"},
    {"num_particles": 1, "propagation": "random_model"},
]


def results(kind, make, dtype=F32):
    """Do all that a predictor can do, and yield what comes out by name."""
    torch.manual_seed(0)
    discrete = kind == "discrete"
    predictor = RewardPredictor(*make(kind), 2, 1, k_steps=2, n_steps=3)
    buffer = filled(dtype, discrete)
    obs, act = draw(4, 3, dtype=dtype), draw(4, 1, dtype=dtype)
    actions, spec = draw(4, 5, 1, dtype=dtype), Bounded(-1, 1, (1,), dtype=dtype)
    if discrete:
        act, actions = (nn.functional.one_hot((x[..., 0] > 0).long(), 2) for x in (act, actions))
        spec = OneHot(2)
    yield "learn", predictor.learn(buffer, 2, 8, 8, 100)[0]
    yield "parts", snapshot(predictor)
    yield "predict", predictor.predict(obs, act)
    yield "value", predictor.value(obs, act)
    yield "rollout", predictor.rollout(obs, actions)[0]
    yield "targets", predictor.compute_targets(buffer, 4, 2, 3)
    entries = draw(4, 2), draw(4, 1), act, draw(4, 2), torch.tensor(0.5, dtype=F32)
    yield "log prob", predictor.get_standardized_log_prob(*entries)
    state = TensorDict({"observation": obs}, batch_size=[4])
    for options in ENV_OPTIONS:
        env = predictor.env(spec, **options)
        start = env.initial_state(state.clone())
        yield f"rollout {options}", env.rollout(3, tensordict=start.clone(), auto_reset=False)
        yield f"reset {options}", env.reset(TensorDict(batch_size=[4]))
        yield f"imagine {options}", env.imagine(start, actions)
    env, elite = predictor.env(spec), {"top_k": 4}
    planners = [CrossEntropyPlanner, ICEMPlanner, PathIntegralPlanner]
    for planner in [CategoricalCrossEntropyPlanner] if discrete else planners:
        for return_action in ("mean", "best", "sample") if kind != "q" else ():
            plan = planner(
                env,
                planning_horizon=3,
                optim_steps=2,
                num_candidates=8,
                return_action=return_action,
                terminal_value=predictor.val_func,
                gamma=0.9,
                **({} if planner is PathIntegralPlanner else elite),
            )
            once = plan(env.initial_state(state.clone()))
            again = once.exclude("action").set("plan", once["next", "plan"])
            again["is_init"] = torch.zeros(4, 1, dtype=torch.bool)
            yield f"{planner.__name__} {return_action}", (once.clone(), plan(again))
    yield "report", vars(model_report(predictor, buffer, 3))


def tensors(x) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x.detach()]
    if isinstance(x, TensorDict):
        return [x[key] for key in sorted(x.keys(True, True), key=str)]
    if isinstance(x, dict):
        return [y for key in sorted(x, key=str) for y in tensors(x[key])]
    return [z for y in x for z in tensors(y)] if isinstance(x, (tuple, list)) else []


@pytest.mark.parametrize("kind", ["linear", "mlp", "select", "q", "start", "discrete"])
def test_in_a_process_of_float64_everything_is_the_same(kind):
    """Parts were made of float64, while what they read was cast to float32."""
    expected = dict(results(kind, library_parts))
    with default_dtype(F64):
        found = dict(results(kind, library_parts))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        for one, other in zip(tensors(x), tensors(found[name]), strict=True):
            assert one.dtype is other.dtype, name
            tolerance = 1e-6 if name == "report" else 0.0  # some of it is of the default dtype
            torch.testing.assert_close(
                other, one, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
            )


# --- networks of the user


class Layer(nn.Linear):
    """A layer over all that it is given."""

    def __init__(self, dim: int, out: int = 1):
        super().__init__(dim, out)

    def forward(self, *inputs):
        return super().forward(torch.cat(inputs, -1))


class OwnEncoder(Encoder):
    def __init__(self):
        super().__init__(3, 2, 1)
        self.net, self.back = nn.Linear(3, 3), Layer(3, 3)

    def embed(self, observation):
        return self.net(observation).split((2, 1), -1)

    def decode(self, latent, context):
        return self.back(latent, context)


class OwnDynamics(DynamicsModel):
    n_models = n_modes = n_particles_per_model = action_dim = context_dim = 1
    latent_state_dim = 2
    accepts_indices = False

    def __init__(self):
        super().__init__()
        self.net = Layer(3, 5)

    def predict_particles(self, latent, context, action, member=None):
        action = action[..., None, None, :].expand(*latent.shape[:-1], 1)
        change, std, term_logit = self.net(latent, action).tanh().split((2, 2, 1), -1)
        mean, std = (x.unsqueeze(-2) for x in (latent + change, std.exp()))
        return ParticlePrediction(mean, std, torch.zeros_like(mean[..., 0]), term_logit)


def own_parts(kind: str):
    """Parts made of a user's networks, of the default dtype."""
    if kind == "classes":
        value = TensorDictModule(Layer(3), ["latent", "context"], ["state_value"])
        reward = TensorDictModule(Layer(4), ["latent", "context", "action"], ["reward"])
        return OwnDynamics(), value, reward, OwnEncoder()

    def network(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, n_out))

    model = ProbabilisticEnsemble(2, 1, 1, n_models=3, n_modes=2, network=network)
    encoder = LearnedEncoder(3, 2, 1, nn.Linear, standardize=kind == "networks")
    return model, StateValue(), Layer(4), encoder


class StateValue(Layer):
    def __init__(self):
        super().__init__(3)

    def forward(self, latent, context):
        return super().forward(latent, context)


@pytest.mark.parametrize("data", [F32, F64])
@pytest.mark.parametrize("kind", ["classes", "networks", "unscaled networks"])
def test_networks_of_float64_failed_in_matrix_products(kind, data):
    with default_dtype(F64):
        parts = own_parts(kind)
        assert any(p.dtype is F64 for part in parts for p in part.parameters())
        found = dict(results(kind, own_parts, data))
    for name in ("predict", "value", "log prob"):
        assert all(x.dtype is F32 for x in tensors(found[name]))
    for name in ("latent", "alive", "reward", "term_prob", "particle_reward"):
        assert found["rollout"]["next", name].dtype is F32
    assert found["learn"].isfinite()


@pytest.mark.parametrize("kind", ["classes", "networks", "unscaled networks"])
def test_networks_of_float64_predict_what_those_of_float32_do(kind):
    parts = own_parts(kind)
    with default_dtype(F64):
        wide = own_parts(kind)
    for one, other in zip(parts, wide, strict=True):
        other.load_state_dict(one.state_dict())
    narrow, wide = (RewardPredictor(*x, 2, 1, encoder_warm_up=0) for x in (parts, wide))
    wide.target_val_params.load_state_dict(narrow.target_val_params.state_dict())
    buffer, obs, act = filled(), draw(4, 3), draw(4, 1)
    losses = []
    for predictor in (narrow, wide):
        torch.manual_seed(0)
        losses.append(predictor.learn(buffer, 3, 16, 16, 0)[0].to(F32))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for ask in (
        lambda p: p.predict(obs, act),
        lambda p: (p.value(obs), p.predict_reward(obs, act)),
    ):
        for x, y in zip(ask(wide), ask(narrow), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_what_learns_in_float64_stays_in_float64():
    with default_dtype(F64):
        predictor = RewardPredictor(*own_parts("networks"), 2, 1, encoder_warm_up=0)
    before = snapshot(predictor)
    predictor.learn(filled(), 2, 8, 8, 0)
    for part in ("model.net", "val_func", "rew_func", "encoder.latent_net", "target_val_params"):
        names = [name for name in before if name.startswith(part)]
        assert names
        for name in names:
            now = predictor.state_dict()[name]
            assert now.dtype is F64 and not torch.equal(now, before[name])


# --- conversion of a predictor

CONVERSIONS = {
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to float16": lambda x: x.to(torch.float16),
    "type float64": lambda x: x.type(F64),
    "type float32": lambda x: x.type(F32),
}


def static() -> StaticPredictor:
    model, val_func, rew_func, encoder = small_parts()
    return StaticPredictor(model, val_func, rew_func, encoder, 2, 1)


@pytest.mark.parametrize("make", [small_predictor, static])
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_after_a_conversion_predicting_went_on_and_learning_failed(make, convert):
    predictor = make()
    before, name = snapshot(predictor), type(predictor).__name__
    with pytest.raises(TypeError, match=rf"{name} computes in float32: .*torch\.autocast"):
        convert(predictor)
    for key, x in snapshot(predictor).items():
        assert x.dtype is before[key].dtype and torch.equal(x, before[key])
    learn(predictor)


@pytest.mark.parametrize("kind", ["linear", "mlp", "select", "q", "start", "discrete"])
@pytest.mark.parametrize("data", [F32, F64])
def test_a_predictor_in_double_precision_learned_nothing_but_an_error(kind, data, monkeypatch):
    """Its networks and statistics are of float64, what it says of float32."""
    learned = RewardPredictor.learn

    def learn(predictor, *args):
        return learned(predictor.double(), *args)

    monkeypatch.setattr(RewardPredictor, "learn", learn)
    found = dict(results(kind, library_parts, data))
    parts = found["parts"]
    assert all(x.dtype is F64 for x in parts.values() if x.is_floating_point())
    assert found["learn"].isfinite()
    for name in ("predict", "value", "log prob"):
        assert all(x.dtype is F32 for x in tensors(found[name]))
    for name in ("latent", "alive", "reward", "term_prob", "particle_reward"):
        assert found["rollout"]["next", name].dtype is F32


@pytest.mark.parametrize(
    "keep",
    [
        lambda x: x.double().float(),
        lambda x: x.float(),
        lambda x: x.to("cpu"),
        lambda x: x.to(F32),
        lambda x: x.share_memory(),
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
)
def test_what_keeps_the_dtype_is_allowed(keep):
    predictor = small_predictor()
    before = snapshot(predictor)
    kept = keep(predictor)
    for key, x in snapshot(kept).items():
        assert x.dtype is before[key].dtype and torch.equal(x, before[key])
    learn(kept)


def test_the_way_out_to_lower_precision_works():
    predictor, obs, act = small_predictor(), draw(4, 3), draw(4, 1)
    expected = predictor.predict(obs, act)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = predictor.predict(obs, act)[0]
        assert predictor.rollout(obs, draw(4, 5, 1))[0]["next", "latent"].dtype is F32
        assert predictor.value(obs).dtype is F32
        learn(predictor)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert all(x.dtype is not torch.bfloat16 for x in snapshot(predictor).values())
