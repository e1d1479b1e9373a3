"""The report suspects data whose observations after the ends of episodes are placeholders."""

import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, SerialEnv

from layeredrl_trl import keys
from layeredrl_trl.diagnostics import ModelReportHook, model_report
from layeredrl_trl.diagnostics.lost_observations import suspect_lost_observations
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble
from layeredrl_trl.predictors import StaticPredictor
from tests.diagnostics.systems import buffer_of, episodes_of, known_predictor

SAYS = r"After {} of {} ends of episodes all of the next observation is {}.*SerialEnv"


def transitions(n=200, every=20, terminated=0, lost=(), value=0.0):
    """Steps in episodes of ``every``; the first ends are terminations; ``lost`` numbers ends."""
    ended = torch.arange(n) % every == every - 1
    at = ended.nonzero().flatten()
    following = torch.randn(n, 3)
    following[at[list(lost)]] = value
    flag = torch.zeros(n, dtype=torch.bool)
    flag[at[:terminated]] = True
    entries = {"next_observation": following, "ended": ended, "terminated": flag}
    return TensorDict(entries, batch_size=[n])


def with_lost_ends(buffer, value):
    data = buffer.storage._storage
    data[keys.NEXT_OBSERVATION][data[keys.NEXT_DONE].squeeze(-1)] = value
    return buffer


# --- what is suspected


@pytest.mark.parametrize(("value", "what"), [(0.0, "0"), (-0.0, "0"), (torch.nan, "NaN")])
@pytest.mark.parametrize(
    ("terminated", "lost"),
    [
        pytest.param(0, range(10), id="all truncated"),
        pytest.param(10, range(10), id="all terminated"),
        pytest.param(4, range(10), id="both"),
        pytest.param(10, range(9), id="nearly all"),
        pytest.param(4, [0, 1, 2, 3, 7, 8, 9], id="besides the ends of collected batches"),
        pytest.param(0, [7, 8, 9], id="three truncated"),
    ],
)
def test_lost_observations_are_suspected(terminated, lost, value, what):
    text = suspect_lost_observations(
        transitions(terminated=terminated, lost=list(lost), value=value)
    )
    assert text.startswith(f"After {len(lost)} of 10 ends of episodes all of the next")
    assert f"observation is {what}," in text and "probably" in text
    assert ("do end in the zero state" in text) == (what == "0")


@pytest.mark.parametrize("shape", [(1,), (4, 4)])
def test_observations_of_any_shape(shape):
    data = transitions()
    data["next_observation"] = torch.randn(200, *shape)
    assert suspect_lost_observations(data) is None
    data["next_observation"][data["ended"]] = 0.0
    assert "10 of 10" in suspect_lost_observations(data)


def test_a_buffer_without_termination_flags():
    assert "10 of 10" in suspect_lost_observations(
        transitions(lost=range(10)).exclude("terminated")
    )


# --- false alarms


def one_dim_is_zero(data):
    data["next_observation"][:, 0] = 0.0


def zero_state_is_passed(data):
    data["next_observation"][3] = 0.0


def every_step_is_an_end(data):
    data["ended"][:] = True
    data["next_observation"][:] = 0.0


def the_same_goal(data):
    data["next_observation"][data["ended"]] = torch.tensor([0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("options", "change"),
    [
        pytest.param({}, None, id="nothing is lost"),
        pytest.param({"terminated": 10}, the_same_goal, id="one-hot goal"),
        pytest.param({"lost": range(10)}, zero_state_is_passed, id="a state like others"),
        pytest.param({"terminated": 10, "lost": range(8)}, None, id="8 of 10 terminations"),
        pytest.param({"terminated": 5, "lost": range(5)}, None, id="goal at 0, or a time limit"),
        pytest.param({"every": 100, "lost": range(2)}, None, id="two ends"),
        pytest.param({"lost": [0, 9]}, None, id="two of many truncated"),
        pytest.param({"lost": []}, one_dim_is_zero, id="a dim that is 0"),
        pytest.param({}, every_step_is_an_end, id="episodes of one step"),
    ],
)
def test_what_is_not_suspected(options, change):
    data = transitions(**options)
    if change is not None:
        change(data)
    assert suspect_lost_observations(data) is None


def test_nothing_is_known_of_ends():
    assert suspect_lost_observations(transitions(lost=range(10)).exclude("ended")) is None


# --- the report


@pytest.mark.parametrize(("value", "what"), [(0.0, "0"), (torch.nan, "NaN")])
@pytest.mark.parametrize("terminated", [False, True])
def test_the_report_warns_and_notes_it(terminated, value, what):
    buffer = buffer_of(episodes_of([6] * 8), terminated=terminated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = model_report(known_predictor(), buffer, 3)
    assert "Suspicious" not in clean.markdown()
    says = SAYS.format(8, 8, what)
    with pytest.warns(UserWarning, match=f"model_report: {says}") as caught:
        report = model_report(known_predictor(), with_lost_ends(buffer, value), 3)
    assert caught[0].filename == __file__
    (line,) = [x for x in report.markdown().splitlines() if x.startswith("**Suspicious data:**")]
    assert "SerialEnv or ParallelEnv of GymEnv" in line
    report.figure()


def test_a_hook_that_logs_scalars_warns_too():
    hook = ModelReportHook(known_predictor(), with_lost_ends(buffer_of(episodes_of([6] * 8)), 0), 3)
    with pytest.warns(UserWarning, match="model_report: After 8 of 8 ends"):
        hook(0)


def collected(env, **options):
    """Random steps ``[N, T]`` of an env, and a buffer that holds them."""
    env.set_seed(0)
    collector = Collector(
        env,
        None,
        frames_per_batch=160,
        total_frames=320,
        auto_register_policy_transforms=False,
        **options,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(320, ndim=2))
    for data in collector:
        buffer.extend(data)
    collector.shutdown()
    return buffer


def cart_pole_predictor():
    model = ProbabilisticEnsemble(4, 0, 2, n_models=2, hidden_sizes=(8,))
    return StaticPredictor(model, None, None, IdentityEncoder(4), 4, 0)


def test_a_gym_env_of_several_envs_is_suspected():
    """TorchRL 0.14.1 on Gymnasium 1.x; when this fails, docs/parts.md need not warn any more."""
    buffer = collected(GymEnv("CartPole-v1", num_envs=2))
    data = buffer.storage[:]
    done = data[keys.NEXT_DONE].squeeze(-1)
    lost = (data[keys.NEXT_OBSERVATION] == 0).all(-1)
    assert done.sum() > 4 and torch.equal(lost, done)
    # Unless the other env ends as well, the first step of the next episode leads from the last
    # state of this one to the reset.
    time, env = (done[:-1] & ~done[:-1].flip(1)).nonzero().unbind(-1)
    assert len(time) > 2
    after = data[time + 1, env]
    assert (after[keys.NEXT_REWARD] == 0).all()
    assert (after[keys.OBSERVATION].abs().amax(-1) > 0.2).all()  # no start of CartPole
    assert (after[keys.NEXT_OBSERVATION].abs() <= 0.05).all()  # one
    with pytest.warns(UserWarning, match="model_report: After"):
        model_report(cart_pole_predictor(), buffer, 3)


@pytest.mark.parametrize("set_truncated", [False, True])
def test_a_serial_env_is_not_suspected(set_truncated):
    env = SerialEnv(2, lambda: GymEnv("CartPole-v1"))
    buffer = collected(env, set_truncated=set_truncated)
    assert buffer.storage[:][keys.NEXT_DONE].sum() > 4
    report = model_report(cart_pole_predictor(), buffer, 3)
    assert "Suspicious" not in report.markdown()
