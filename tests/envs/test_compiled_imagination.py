"""Imagining in generated code is imagining.

Most tests let torch trace steps but not generate code for them (``aot_eager``), which is faster.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from layeredrl_trl.acceleration import compiled, cuda_graphs
from layeredrl_trl.modules import ProbabilisticEnsemble, SymmetryBreakingStart
from tests.envs.imagined import (
    SplitEncoder,
    count_rollouts,
    make_env,
    observations,
    random_actions,
)
from tests.planners.small_planners import every_planner, make_planner, predictor_env
from tests.replaying import replays  # noqa: F401
from tests.small_predictors import small_predictor

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
compile = torch.compile


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


def start_anew():
    torch._dynamo.reset()
    compiled._compile.cache_clear()
    counters.clear()


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs have been traced."""
    start_anew()
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, backend="aot_eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    start_anew()


@pytest.fixture
def generates():
    start_anew()
    yield
    start_anew()


def both(make=make_env, **options):
    """Two envs of equal parts, the first of which takes compiled steps."""
    envs = []
    for compile_imagine in (True, False):
        torch.manual_seed(0)
        env = make(compile_imagine=compile_imagine, **options)
        envs.append(env)
        options.pop("cudagraphs", None)  # the other is plain
    return envs


def assert_same_imagination(own, plain, sizes=((4, 3), (7, 2), (5, 4))):
    for n_envs, horizon in sizes:
        state, actions = own.reset(observations(own, n_envs)), random_actions(own, n_envs, horizon)
        outs = []
        for env in (own, plain):
            torch.manual_seed(n_envs)
            outs.append(env.imagine(state, actions).to_dict())
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("termination", ["soft", "sample"])
def test_it_is_imagining(num_particles, propagation, termination, graphs):
    """By the same random numbers; in few graphs for all numbers of envs and all horizons."""
    options = {"propagation": propagation, "termination": termination}
    most = 4 if propagation == "expectation" and num_particles is None else 2
    for both_ways in (False, True):
        start_anew()
        own, plain = both(
            num_particles=num_particles, uncertainty=both_ways, deterministic=both_ways, **options
        )
        assert_same_imagination(own, plain, [(4, 3), (7, 2)])
        before = graphs()
        assert 0 < before <= most
        assert_same_imagination(own, plain, [(4, 5), (5, 2), (60, 7), (9, 4)])
        assert graphs() == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"deterministic": True, "num_particles": 1},
        {"propagation": "random_model", "termination": "sample", "num_particles": 1},
    ],
    ids=str,
)
@pytest.mark.usefixtures("generates")
def test_code_imagines_the_same(options):
    assert_same_imagination(*both(**options))


def test_a_termination_of_ones_own(graphs):
    for options in ({}, {"termination": "sample"}):
        own, plain = both(
            termination_fn=lambda s, c, a, s_next: s_next[..., :1] > 0.8,
            encoder=SplitEncoder(4),
            **options,
        )
        assert_same_imagination(own, plain)


class Network(nn.Sequential):
    """A member of one's own, of which no layers can be taken."""

    def __init__(self, in_dim, out_dim):
        super().__init__(nn.Linear(in_dim, 8), nn.LayerNorm(8), nn.Linear(8, out_dim))


def test_networks_of_ones_own(graphs):
    own, plain = both()
    model = ProbabilisticEnsemble(3, 0, 2, n_models=3, n_modes=2, network=Network)
    for env in (own, plain):
        env.world_model.dynamics = model
    assert_same_imagination(own, plain)
    assert graphs() > 0


def test_a_symmetry_breaking_start(graphs):
    own, plain = both()
    for env in (own, plain):
        env.world_model.dynamics = SymmetryBreakingStart(env.world_model.dynamics, 100)
    for env_steps in (0, 75, 100):
        for env in (own, plain):
            env.world_model.dynamics.advance(env_steps)
        plain.world_model.dynamics.load_state_dict(own.world_model.dynamics.state_dict())
        assert_same_imagination(own, plain)


def test_what_is_learned_is_imagined(graphs):
    own, plain = both()
    for factor in (1.0, 0.5):
        for env in (own, plain):
            for p in env.world_model.parameters():
                p.mul_(factor)
        assert_same_imagination(own, plain)


def test_many_rows_go_in_pieces_on_a_cpu(graphs):
    """Which is faster there than code for all of them; below that there is code."""
    own, plain = both(n_models=2)
    assert_same_imagination(own, plain, [(600, 2)])
    assert graphs() == 0
    assert_same_imagination(own, plain, [(500, 2)])
    assert graphs() == 1


def test_hooks_that_come_later_are_called(graphs):
    own, plain = both(propagation="random_model")
    assert_same_imagination(own, plain)
    handles = [
        env.world_model.dynamics.net.register_forward_hook(lambda _, x, out: 0.5 * out)
        for env in (own, plain)
    ]
    assert_same_imagination(own, plain)
    for handle in handles:
        handle.remove()
    assert_same_imagination(own, plain)


@pytest.mark.parametrize("options", [{}, {"termination": "sample"}], ids=str)
def test_impossible_terminations_raise(options, graphs):
    own, plain = both(termination_fn=lambda s, c, a, s_next: s_next[..., :1] * 0 + 1.7, **options)
    for env in (own, plain):
        state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 3)
        with pytest.raises(ValueError, match="termination_fn: expected probabilities or bools"):
            env.imagine(state, actions)


@every_planner
def test_it_is_planning(name, graphs):
    own, plain = both(lambda **options: predictor_env(name, **options), deterministic=True)
    state = plain.reset(observations(plain, 2))
    outs = []
    for env in (own, plain):
        torch.manual_seed(3)
        outs.append(make_planner(name, env)(state.clone()).to_dict())
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)
    assert 0 < graphs() <= 2


@pytest.mark.parametrize(
    "options", [{}, {"propagation": "random_model", "termination": "sample"}], ids=str
)
def test_envs_share_random_numbers(options, graphs):
    own, plain = both(num_particles=1, **options)
    state, actions = plain.reset(observations(plain, 12)), random_actions(plain, 12, 4)
    outs = []
    for env in (own, plain):
        torch.manual_seed(0)
        with env.common_random_numbers(6):
            outs.append(env.imagine(state, actions).to_dict())
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    state, actions = (x[:1].expand(12, *x.shape[1:]).clone() for x in (state, actions))
    with own.common_random_numbers(6):
        latent = own.imagine(state, actions)["next", "latent"]
    torch.testing.assert_close(latent, latent[[0] * 6 + [6] * 6], rtol=1e-4, atol=1e-5)
    assert (latent[0] != latent[6]).all() and graphs() > 0


def test_gradients_are_not_compiled(graphs):
    own, _ = both(deterministic=True)
    state, actions = own.reset(observations(own, 4)), random_actions(own, 4, 5)
    with torch.enable_grad():
        own.imagine(state, actions.requires_grad_())["next", "reward"].sum().backward()
    assert graphs() == 0


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model"])
def test_compiled_steps_are_recorded(propagation, graphs, monkeypatch):
    """They are compiled while warming up, and not again while they are recorded."""
    own, plain = both(cudagraphs=True, propagation=propagation)
    calls, made = count_rollouts(own), []
    record = cuda_graphs.record

    def noted(*args):
        made.append(graphs())
        try:
            return record(*args)
        finally:
            made.append(graphs())

    monkeypatch.setattr(cuda_graphs, "record", noted)
    assert_same_imagination(own, plain, [(4, 3), (6, 3)] * 6)
    assert len(calls) == 8
    assert made[0] == made[1] == made[2] == made[3] > 0


@pytest.mark.parametrize("propagation", ["fixed_model", "random_model"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_take_compiled_steps_too(copied, propagation, graphs):
    own, plain = both(propagation=propagation)
    assert_same_imagination(copied(own), plain, [(4, 3)])
    assert graphs() > 0


# --- where code cannot be made


class NoCompiler:
    def __init__(self):
        self.n_asked = 0

    def __call__(self, function, **_):
        self.n_asked += 1

        def fail(*_, **__):
            raise TorchDynamoException("no compiler here\nat all")

        return fail


@pytest.fixture
def no_compiler(monkeypatch):
    start_anew()
    fake = NoCompiler()
    monkeypatch.setattr(torch, "compile", fake)
    yield fake
    start_anew()


def test_what_must_be_compiled_raises(no_compiler):
    own, plain = both()
    state, actions = own.reset(observations(own, 4)), random_actions(own, 4, 3)
    for _ in range(2):
        with pytest.raises(TorchDynamoException, match="no compiler here"):
            own.imagine(state, actions)
    plain.imagine(state, actions)
    assert no_compiler.n_asked == 1


def test_nothing_is_compiled_unless_it_is_asked_for(no_compiler):
    env = make_env()
    env.imagine(env.reset(observations(env, 4)), random_actions(env, 4, 3))
    for asked in (False, True):  # that is for learning
        predictor = small_predictor(compile=asked)
        n_asked = no_compiler.n_asked
        predictor.rollout(torch.randn(2, 3), torch.randn(2, 4, 1))
        assert no_compiler.n_asked == n_asked
    assert n_asked == 1


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("cudagraphs", [False, True])
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("termination", ["soft", "sample"])
def test_cuda_code_imagines_the_same(cudagraphs, num_particles, propagation, termination):
    own, plain = both(
        num_particles=num_particles,
        propagation=propagation,
        termination=termination,
        cudagraphs=cudagraphs,
    )
    own, plain = own.to("cuda"), plain.to("cuda")
    calls = count_rollouts(own)
    state = plain.reset(observations(plain, 4).to("cuda"))
    for seed in range(8):
        actions, outs = random_actions(plain, 4, 5), []
        for env in (own, plain):
            torch.manual_seed(seed)
            outs.append(env.imagine(state, actions).to_dict())
        torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)
    assert len(calls) == (4 if cudagraphs else 8)
