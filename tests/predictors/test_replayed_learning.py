"""Learning by replays is learning: on a CPU, by a stand-in for CUDA graphs.

It also shows that a step waits for nothing and has no shape that depends on data: the stand-in does
not record such a thing (``tests/replaying.py``).
"""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from layeredrl_trl.acceleration import cuda_graphs
from layeredrl_trl.modules import (
    IdentityEncoder,
    LinearEncoder,
    MLPEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    SymmetryBreakingStart,
    ValueNet,
)
from layeredrl_trl.objectives import RewardPredictorLoss
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.schedules import LinearSchedule
from tests.oracles_predictors import filled_buffer
from tests.replaying import replays  # noqa: F401
from tests.small_predictors import learn, small_predictor, snapshot

N_CALLS = 3
N_STEPS = 4

pytestmark = pytest.mark.usefixtures("replays")


def known_predictor(encoder, value="state", model=None, **options):
    """Of the library's parts only."""
    dims = encoder.latent_state_dim, encoder.context_dim
    values = {
        None: None,
        "state": ValueNet(*dims, hidden_sizes=(8,)),
        "q": ValueNet(*dims, action_dim=1, hidden_sizes=(8,)),
    }
    model = ProbabilisticEnsemble(*dims, 1, hidden_sizes=(8,), **{"n_models": 2, **(model or {})})
    reward = RewardNet(*dims, 1, hidden_sizes=(8,))
    return RewardPredictor(model, values[value], reward, encoder, *dims, **options)


def replayed(make):
    """A predictor that learns by replays, and the same one that does not."""
    own, plain = make(cudagraphs=True), make(cudagraphs=False)
    plain.load_state_dict(own.state_dict())
    return own, plain


@pytest.fixture
def losses(monkeypatch):
    """The losses that were computed in Python, one for each call."""
    forward, seen = RewardPredictorLoss.forward, []

    def noted(loss, *batches):
        seen.append(loss)
        return forward(loss, *batches)

    monkeypatch.setattr(RewardPredictorLoss, "forward", noted)
    return seen


def count(losses, predictor):
    """How often Python computed the loss of a predictor since it was last asked."""
    n = sum(loss is predictor.loss_module for loss in losses)
    losses.clear()
    return n


def assert_close(own, plain):
    torch.testing.assert_close(snapshot(own), snapshot(plain), rtol=1e-4, atol=1e-6)


def learn_both(own, plain, data, n_calls=N_CALLS, **options):
    for seed in range(n_calls):
        infos = [learn(p, data, n_steps=N_STEPS, seed=seed, **options)[1] for p in (own, plain)]
        assert_close(own, plain)
        for key, expected in infos[1].items():
            assert infos[0][key] == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True), key


CASES = {
    "state value": lambda **o: small_predictor("state", encoder_warm_up=0, **o),
    "q-function": lambda **o: small_predictor("q", encoder_warm_up=0, k_steps=2, n_steps=3, **o),
    "no value": lambda **o: small_predictor(None, encoder_warm_up=0, **o),
    "warm-up": lambda **o: small_predictor(encoder_warm_up=10, **o),  # ends between replays
    "clipped": lambda **o: small_predictor(encoder_warm_up=0, clip_grad_max_norm=0.05, **o),
    "not clipped": lambda **o: small_predictor(encoder_warm_up=0, clip_grad_max_norm=None, **o),
    "no standardizer": lambda **o: small_predictor(delta_standardizer=False, **o),
    "modes, one member": lambda **o: known_predictor(
        IdentityEncoder(3), model={"n_models": 1, "n_modes": 3}, **o
    ),
    "bootstrap": lambda **o: known_predictor(
        IdentityEncoder(3), model={"bootstrap": True, "learn_std_bounds": True}, **o
    ),
    "linear encoder": lambda **o: known_predictor(LinearEncoder(3, 2, 1), "q", n_steps=2, **o),
    "encoder of layers": lambda **o: known_predictor(MLPEncoder(3, 2, 1), encoder_warm_up=5, **o),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("data", [{}, {"planned": True}, {"capacity": 40}], ids=str)
def test_it_is_learning(case, data, losses):
    own, plain = replayed(CASES[case])
    learn_both(own, plain, filled_buffer(**data))
    # Two steps that start statistics, three to warm up, one to record. Where the warm-up of the
    # encoder ends, all begins anew, after a step in which the optimiser makes new moments.
    ends = own.update.plain.warm_up
    assert count(losses, own) == {5: 2 + 3 + 1 + 4, 10: 2 + 4 + 2}.get(ends, 2 + 4)
    assert own.update.steps == plain.update.steps == N_CALLS * N_STEPS


def test_after_the_start_nothing_is_recorded_again(losses):
    own, _ = replayed(CASES["state value"])
    data = filled_buffer()
    learn(own, data, n_steps=8)
    assert count(losses, own) == 6
    for seed in range(3):
        learn(own, data, n_steps=5, seed=seed)
    learn(own, data, n_steps=50)
    assert count(losses, own) == 0


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("case", ["state value", "q-function"])
def test_nothing_is_compiled_anew_while_it_is_recorded(case, monkeypatch):
    """That would fail on a GPU. What is compiled is not recorded by the stand-in, but run here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with_graph = []

    def run(work, device):
        with_graph.append(1)
        with torch.compiler.set_stance("fail_on_recompile"):
            return (lambda: None), work()

    monkeypatch.setattr(cuda_graphs, "record", run)
    torch.compiler.reset()
    predictor = CASES[case](compile=True, cudagraphs=True)
    assert learn(predictor, filled_buffer(), n_steps=12)[1]["skipped"] == 0
    assert with_graph == [1]


def test_a_start_that_goes_on_is_recorded_once(losses):
    model = SymmetryBreakingStart(ProbabilisticEnsemble(3, 0, 1, hidden_sizes=(8,)), 100)
    reward = RewardNet(3, 0, 1, hidden_sizes=(8,))
    predictor = RewardPredictor(
        model, None, reward, IdentityEncoder(3), 3, 0, encoder_warm_up=0, cudagraphs=True
    )
    for env_steps in range(0, 90, 10):
        learn(predictor, n_steps=4, env_steps=env_steps)
    assert count(losses, predictor) == 6
    for env_steps in range(90, 150, 10):
        learn(predictor, n_steps=4, env_steps=env_steps)
    assert count(losses, predictor) == 4  # once more for what comes after the start


def test_what_does_not_learn_any_more_stays():
    own, plain = replayed(CASES["state value"])
    data = filled_buffer()
    learn_both(own, plain, data)
    for p in (own, plain):
        p.model.requires_grad_(False)
    before = snapshot(own)
    learn_both(own, plain, data)
    after = snapshot(own)
    frozen = {key for key in before if key.startswith("model.net.")}
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)


def test_learning_rates_are_those_of_the_call():
    schedule = LinearSchedule(1e-2, 0.0, 100)
    own, plain = replayed(
        lambda **o: small_predictor(encoder_warm_up=0, model_lr=schedule, value_lr=1e-2, **o)
    )
    data = filled_buffer()
    for env_steps in (0, 50, 100):
        learn_both(own, plain, data, n_calls=2, env_steps=env_steps)
    before = snapshot(own)
    learn(own, data, n_steps=3)
    after = snapshot(own)
    frozen = {key for key in before if key.startswith("model.net.")}
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    assert all(isinstance(g["lr"], float) for g in own.update.optimizer.param_groups)
    assert not any(g["capturable"] for g in own.update.optimizer.param_groups)


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted():
    own, plain = replayed(CASES["state value"])
    good, bad = filled_buffer(), filled_buffer()
    bad.buffer.storage[:]["next", "reward"].fill_(torch.nan)
    learn_both(own, plain, good)
    before = snapshot(own)
    with pytest.warns(UserWarning, match="non-finite gradients"):
        loss, info = learn(own, bad, n_steps=3)
    assert math.isnan(loss) and info["skipped"] == own.update.skipped == 3
    torch.testing.assert_close(snapshot(own), before, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="non-finite gradients"):
        learn(plain, bad, n_steps=3)
    learn_both(own, plain, good)
    assert own.update.skipped == 3


def test_other_batch_sizes():
    own, plain = replayed(CASES["state value"])
    data = filled_buffer()
    for batch_size in (8, 5, 8, 5):
        learn_both(own, plain, data, n_calls=2, batch_size=batch_size)


def test_what_is_loaded_in_between_is_learned_on():
    """New parameters, or new memory of the optimiser."""
    own, plain = replayed(CASES["q-function"])
    other, data = CASES["q-function"](), filled_buffer()
    learn(other, data, n_steps=5)
    learn_both(own, plain, data)
    for p in (own, plain):
        p.load_state_dict(other.state_dict())
    learn_both(own, plain, data)
    for p in (own, plain):
        p.update.optimizer.load_state_dict(copy.deepcopy(other.update.optimizer.state_dict()))
    learn_both(own, plain, data)


def plain_update(predictor):
    return getattr(predictor.update, "plain", predictor.update)


def change_moments(predictor):
    predictor.update.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def change_bound(predictor):
    plain_update(predictor).clip_grad_max_norm = 0.05


def change_tau(predictor):
    plain_update(predictor).target_updater.eps = 0.5


def change_weight(predictor):
    predictor.loss_module.rew_loss_weight = 2.0


def change_discount(predictor):
    predictor.loss_module.gamma = 0.5


def change_normalisation(predictor):
    predictor.model.target_moments.rate = 0.5


@pytest.mark.parametrize(
    "change",
    [
        change_moments,
        change_bound,
        change_tau,
        change_weight,
        change_discount,
        change_normalisation,
    ],
)
def test_an_option_that_is_changed_in_between_counts(change):
    own, plain = replayed(CASES["state value"])
    data = filled_buffer()
    learn_both(own, plain, data)
    for p in (own, plain):
        change(p)
    learn_both(own, plain, data)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_learn_on_their_own(copied):
    own, plain = replayed(CASES["state value"])
    data = filled_buffer()
    learn_both(own, plain, data)
    twin, before = copied(own), snapshot(own)
    learn_both(twin, plain, data)
    torch.testing.assert_close(snapshot(own), before, rtol=0, atol=0)


def test_an_error_in_a_step_leaves_everything_as_it_was(monkeypatch):
    own, _ = replayed(CASES["warm-up"])
    data = filled_buffer()
    learn(own, data, n_steps=2)
    for _ in range(5):
        before = snapshot(own)
        with monkeypatch.context() as patch:
            patch.setattr(own.standardizer, "residual", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                learn(own, data, batch_size=6)  # of a size that has not been recorded
        torch.testing.assert_close(snapshot(own), before, rtol=0, atol=0)
        learn(own, data, n_steps=2)
    assert own.update.steps == 12


def test_nothing_is_replayed_unless_it_is_asked_for(losses):
    predictor = known_predictor(IdentityEncoder(3))
    learn(predictor, n_steps=10)
    assert count(losses, predictor) == 10


def test_graphs_need_cuda(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"cudagraphs: they need CUDA, got .*cpu"):
        small_predictor(cudagraphs=True)


class Strange(nn.Module):
    """Reads a number in every step."""

    def forward(self, latent, context, action):
        return latent[..., :1] * latent.sum().item()


def test_what_cannot_be_recorded_raises_and_changes_nothing():
    parts = small_predictor("state")
    predictor = RewardPredictor(
        parts.model, None, Strange(), parts.encoder, 2, 1, encoder_warm_up=0, cudagraphs=True
    )
    learn(predictor, n_steps=5)
    before = snapshot(predictor)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            learn(predictor, n_steps=2)
    torch.testing.assert_close(snapshot(predictor), before, rtol=0, atol=0)
    assert predictor.update.steps == 5
