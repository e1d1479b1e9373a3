"""model_report: what it says of models known to be right or wrong, on data of all kinds."""

import math
import re

import pytest
import torch
from gymnasium.spaces import Discrete
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.diagnostics import ModelReport, ModelReportHook, model_report
from layeredrl_trl.modules import (
    DynamicsModel,
    IdentityEncoder,
    LinearEncoder,
    MLPEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
)
from layeredrl_trl.predictors import RewardPredictor, StaticPredictor
from tests import oracles
from tests.diagnostics.systems import (
    SYSTEM,
    KnownReward,
    buffer_of,
    episodes_of,
    known_predictor,
    steps_of,
    transitions_buffer,
)
from tests.oracles_predictors import SplitEncoder

LEVELS = torch.tensor([0.5, 0.8, 0.95], dtype=torch.float64)
EVERYTHING = {"n_segments": 10**6, "n_transitions": 10**6}


def ensemble_predictor(obs_dim=3, encoder=None, action=2, rew_func=True, **options):
    encoder = encoder or IdentityEncoder(obs_dim)
    dims = encoder.latent_state_dim, encoder.context_dim
    model = ProbabilisticEnsemble(*dims, action, **{"hidden_sizes": (8,), **options})
    reward = RewardNet(*dims, model.action_dim, hidden_sizes=(8,)) if rew_func else None
    return RewardPredictor(model, None, reward, encoder, *dims)


def random_buffer(obs_dim=3, action=None, n=60, length=12, **entries):
    """A random walk in episodes of ``length`` steps."""
    done = (torch.arange(n) % length == length - 1).unsqueeze(-1)
    path = torch.randn(n + 1, obs_dim).cumsum(0)
    following = {"observation": path[1:], "reward": torch.randn(n, 1), "done": done}
    following |= {"terminated": done & (torch.arange(n) < n // 2).unsqueeze(-1)}
    data = {"observation": path[:-1], "action": torch.randn(n, 2) if action is None else action(n)}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(TensorDict({**data, **entries, "next": following}, batch_size=[n]))
    return buffer


def section(report, name):
    return {key: x for key, x in report.metrics[name].items() if x.ndim == 0}


# --- contract


DISCRETE = {"action": Discrete(4)}
CASES = {
    "plain": ({"n_models": 3}, {}),
    "one member": ({"n_models": 1}, {}),
    "modes and particles": ({"n_models": 2, "n_modes": 2, "n_particles_per_model": 5}, {}),
    "more members than particles asked for": ({"n_models": 40}, {}),
    "one latent dim": ({"obs_dim": 1}, {"obs_dim": 1}),
    "categorical": (DISCRETE, {"action": lambda n: torch.randint(4, (n,))}),
    "categorical, trailing dim": (DISCRETE, {"action": lambda n: torch.randint(4, (n, 1))}),
    "one-hot": (DISCRETE, {"action": lambda n: torch.eye(4).long()[torch.randint(4, (n,))]}),
    "context": ({"encoder": SelectEncoder(3, [0, 1], [2]), "condition_on_context": True}, {}),
    "changing context": ({"encoder": SplitEncoder(), "condition_on_context": True}, {}),
    "MLP encoder": ({"encoder": MLPEncoder(3, 2, 1)}, {}),
    "linear encoder": ({"encoder": LinearEncoder(3, 2, 1)}, {}),
}


@pytest.mark.parametrize(("of_model", "of_data"), CASES.values(), ids=CASES.keys())
def test_keys_and_shapes_are_those_documented(of_model, of_data):
    predictor = ensemble_predictor(**of_model)
    report = model_report(predictor, random_buffer(**of_data), 4)
    row = re.compile(r"``(\w+), (\w+)``\s+(?:``\[(.*)\]``|scalar)")
    shapes = {(a, b): shape for a, b, shape in row.findall(ModelReport.__doc__)}
    sizes = {"H": 4, "D": predictor.latent_state_dim}
    sizes["S"] = report.metrics["reward", "real_return"].numel()
    assert set(report.metrics.keys(True, True)) == set(shapes)
    for key, shape in shapes.items():
        expected = [sizes.get(letter) or int(letter) for letter in shape.split(", ") if letter]
        assert list(report.metrics[key].shape) == expected, key
    finite = {key for key in shapes if report.metrics[key].isfinite().all()}
    assert {("open_loop", "error"), ("one_step", "nll"), ("reward", "return_correlation")} <= finite
    assert ("spread", "epistemic_correlation") in finite or predictor.model.n_models == 1
    assert all(isinstance(x, float | int) for x in report.scalars().values())
    assert report.horizon == 4


# --- oracle: a known system


def test_the_right_model_is_found_calibrated():
    report = model_report(known_predictor(KnownReward()), transitions_buffer(8000), 1)
    one_step = report.metrics["one_step"]
    torch.testing.assert_close(one_step["coverage"], LEVELS, atol=0.012, rtol=0)
    per_dim = LEVELS[:, None].expand(3, 2)
    torch.testing.assert_close(one_step["coverage_per_dim"], per_dim, atol=0.02, rtol=0)
    torch.testing.assert_close(
        one_step["pit_histogram"], torch.ones(20).double(), atol=0.15, rtol=0
    )
    assert one_step["nll"].item() == pytest.approx(SYSTEM.negative_log_likelihood / 2, abs=0.02)
    assert one_step["nll"] < one_step["nll_guess"] - 0.5
    assert report.metrics["spread", "spread_over_error"].item() == pytest.approx(1, abs=0.03)
    assert report.metrics["reward", "explained_variance"].item() == pytest.approx(1)
    assert report.metrics["reward", "return_correlation"].item() == pytest.approx(1)


def test_the_guess_is_the_best_gaussian_for_the_changes():
    report = model_report(known_predictor(), transitions_buffer(3000), 1)
    data = transitions_buffer(3000)[:]
    change = (data["next", "observation"] - data["observation"]).double()
    expected = 0.5 * (2 * math.pi * math.e * change.var(0)).log().mean()
    actual = report.metrics["one_step", "nll_guess"]
    assert actual.item() == pytest.approx(expected.item(), abs=0.05)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_std_is_found_out(factor):
    predictor = known_predictor(std_factor=factor)
    report = model_report(predictor, transitions_buffer(4000), 1, num_particles=256)
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = 2 * normal.cdf(factor * normal.icdf((1 + LEVELS) / 2)) - 1
    actual = report.metrics["one_step", "coverage"]
    torch.testing.assert_close(actual, expected.double(), atol=0.02, rtol=0)
    in_particles = report.metrics["open_loop", "coverage"][0]
    torch.testing.assert_close(in_particles, expected.double(), atol=0.04, rtol=0)
    spread = report.metrics["spread", "spread_over_error"].item()
    assert spread == pytest.approx(factor, rel=0.05)
    wrong = math.log(factor) + 0.5 / factor**2 - 0.5
    nll = report.metrics["one_step", "nll"].item()
    assert nll == pytest.approx(SYSTEM.negative_log_likelihood / 2 + wrong, abs=0.06)


def test_mixture_of_members_counts_and_not_each_member():
    buffer = transitions_buffer(2000)
    predictor = known_predictor(n_models=2, offset=0.5)
    report = model_report(predictor, buffer, 1)
    data = buffer[:]
    log_prob, _ = predictor.model.log_prob(
        data["observation"], torch.zeros(2000, 0), data["action"], data["next", "observation"]
    )
    nll = report.metrics["one_step", "nll"].item()
    assert nll == pytest.approx(-log_prob.mean().item() / 2, rel=1e-4)
    scale = report.metrics["dims", "scale"]
    expected = (0.25 / scale.square()).mean().sqrt()  # the members are 0.5 off, on both sides
    actual = report.metrics["spread", "epistemic_std"]
    torch.testing.assert_close(actual, expected.expand(10), rtol=1e-4, atol=0)
    total = ((0.25 + SYSTEM.noise.square()) / scale.square()).mean().sqrt()
    torch.testing.assert_close(
        report.metrics["spread", "total_std"], total.expand(10), rtol=1e-4, atol=0
    )
    assert report.metrics["one_step", "coverage"][0] > 0.6  # two peaks around the truth


def test_terminations_of_the_known_hazard():
    buffer = transitions_buffer(8000)
    report = model_report(known_predictor(), buffer, 1)
    found = section(report, "termination")
    data = buffer[:]
    prob = SYSTEM.hazard(data["observation"]).flatten()
    happened = data["next", "terminated"].flatten()
    assert found["actual"] == happened.sum()
    assert found["expected"].item() == pytest.approx(prob.sum().item(), rel=1e-4)
    assert abs(found["expected"] - found["actual"]) < 4 * (prob * (1 - prob)).sum().sqrt()
    predicted = prob > 0.5
    hits = (predicted & happened).sum()
    assert found["precision"].item() == pytest.approx((hits / predicted.sum()).item())
    assert found["recall"].item() == pytest.approx((hits / happened.sum()).item())
    part = slice(0, 500)
    auc = oracles.area_under_roc(prob[part].tolist(), happened[part].tolist())
    assert found["auc"].item() == pytest.approx(auc, abs=0.06)
    bins = report.metrics["termination"]
    there = bins["bin_count"] > 100
    torch.testing.assert_close(bins["bin_prob"][there], bins["bin_rate"][there], atol=0.08, rtol=0)


def test_particles_of_the_right_model_hold_the_truth_at_every_step():
    buffer = buffer_of(episodes_of([12] * 400))
    report = model_report(known_predictor(), buffer, 8, n_segments=3000)
    expected = LEVELS.expand(8, 3)
    actual = report.metrics["open_loop", "coverage"]
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0)


# --- oracle: segments


def layouts():
    """``(episodes that are stored, their buffer)`` for every way of storing them."""
    episodes = episodes_of([9, 1, 4, 12, 7])
    yield "plain", episodes, buffer_of(episodes)

    kept = [(obs[3:], act[3:]) for obs, act in episodes[:1]] + episodes[1:]
    yield "ring, full", kept, buffer_of(episodes, capacity=30)

    even = episodes_of([6] * 4)
    rows = [torch.cat([steps_of(even[i]), steps_of(even[i + 1])]) for i in (0, 2)]
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40, ndim=2))
    buffer.extend(torch.stack(rows))
    yield "two envs", even, buffer

    steps = torch.cat([steps_of(episode) for episode in episodes])
    garbage = torch.full_like(steps[:6], 0).apply(
        lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x
    )
    padded = torch.cat([steps[:10], garbage, steps[10:]])
    mask = torch.ones(len(padded), 1).bool()
    mask[10:16] = False
    padded.set(keys.MASK, mask)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(padded)))
    buffer.extend(padded)
    yield "stored padding that is NaN", episodes, buffer


@pytest.mark.parametrize("number", range(4), ids=["plain", "ring", "two envs", "padding"])
@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_errors_are_those_of_a_walk_through_the_episodes(number, horizon):
    _, episodes, buffer = list(layouts())[number]
    predictor = known_predictor(KnownReward(), std_factor=1e-6, hazard=1e-9)
    report = model_report(predictor, buffer, horizon, **EVERYTHING)
    expected = oracles.open_loop_errors(episodes, lambda s, a: SYSTEM.A @ s + SYSTEM.B @ a, horizon)
    found = report.metrics["open_loop"]
    for name, errors in zip(("error", "persistence_error"), expected, strict=True):
        torch.testing.assert_close(
            found[name], torch.tensor(errors).double(), rtol=1e-4, atol=1e-6, equal_nan=True
        )
    torch.testing.assert_close(
        found["error_ratio"], found["error"] / found["persistence_error"], equal_nan=True
    )
    lengths = [len(act) for _, act in episodes]
    segments = [sum(max(0, n - h) for n in lengths) for h in range(horizon)]
    assert found["segments"].tolist() == segments
    below = [a < b for a, b in zip(*expected, strict=True)] + [False]
    assert found["useful_steps"] == below.index(False)
    assert report.metrics["reward", "real_return"].numel() == segments[-1]  # whole ones only


def test_horizon_longer_than_every_episode():
    report = model_report(known_predictor(KnownReward()), buffer_of(episodes_of([3, 5])), 9)
    error = report.metrics["open_loop", "error"]
    assert error[:5].isfinite().all() and error[5:].isnan().all()
    assert report.scalars()["open_loop/error_last"] == error[4].item()
    assert report.metrics["reward", "real_return"].shape == (0,)
    assert "no segment in this buffer has 9 steps" in report.markdown()
    assert "error after 5 imagined steps" in report.markdown()


def test_returns_of_segments_that_a_termination_ended_count():
    """A reward of 1 per step: the return is how long it lasts, which only a hazard can tell."""
    torch.manual_seed(1)
    episodes = episodes_of([4] * 50)
    buffer = buffer_of(episodes, terminated=True)
    with torch.no_grad():
        buffer.storage._storage["next", "reward"].fill_(1.0)

    class One(nn.Module):
        def forward(self, latent, context, action):
            return torch.ones_like(latent[..., :1])

    report = model_report(known_predictor(One(), hazard=0.5), buffer, 6, **EVERYTHING)
    real = report.metrics["reward", "real_return"]
    assert sorted(real.unique().tolist()) == [1.0, 2.0, 3.0, 4.0] and len(real) == 200
    imagined = report.metrics["reward", "imagined_return"]
    expected = torch.full_like(imagined, sum(0.5**h for h in range(6)))
    torch.testing.assert_close(imagined, expected)  # also where the episode ended earlier
    assert report.metrics["reward", "explained_variance"].isnan()
    assert "the reward is constant in this buffer" in report.markdown()


def test_a_reward_that_is_not_finite_is_said_to_be_so():
    """It was reported as a constant reward."""
    buffer = buffer_of(episodes_of([20, 20]))
    buffer.storage._storage["next", "reward"][7] = torch.nan
    report = model_report(known_predictor(KnownReward()), buffer, 5, **EVERYTHING)
    assert report.missing["reward"] == "a reward in this buffer is not finite"
    assert "not finite" in report.markdown() and "is constant in" not in report.markdown()


@pytest.mark.parametrize("seed", range(4))
def test_padding_that_is_drawn_first_is_passed_over(seed):
    """It was taken for a buffer of nothing but padding."""
    steps = steps_of(episodes_of([10])[0])
    steps.set(keys.MASK, (torch.arange(10) < 2).unsqueeze(-1))
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    buffer.extend(steps)
    options = {"n_transitions": 1, "n_segments": 1, "seed": seed}
    report = model_report(known_predictor(KnownReward()), buffer, 1, **options)
    assert report.metrics["open_loop", "segments"].tolist() == [1]


# --- units


def test_units_of_the_dims_do_not_matter():
    class Rescaled(IdentityEncoder):
        factor = torch.tensor([1000.0, 0.01])

        def embed(self, observation):
            return observation / self.factor, observation[..., :0]

    episodes = episodes_of([10] * 20)
    factor = Rescaled.factor
    buffers = buffer_of(episodes), buffer_of([(obs * factor, act) for obs, act in episodes])
    reports = [
        model_report(StaticPredictor(known_predictor().model, None, None, encoder, 2, 0), buffer, 5)
        for encoder, buffer in zip((IdentityEncoder(2), Rescaled(2)), buffers, strict=True)
    ]
    for key in (("open_loop", "error"), ("one_step", "coverage"), ("spread", "total_error")):
        torch.testing.assert_close(*(r.metrics[key] for r in reports), rtol=1e-3, atol=1e-3)


class InUnits(DynamicsModel):
    """A model whose latent dims are in other units; less sure far from the origin."""

    def __init__(self, model, units):
        super().__init__()
        self.model, self.units = model, units
        self.n_models, self.n_modes, self.n_particles_per_model = model.n_models, model.n_modes, 1
        self.latent_state_dim, self.context_dim, self.action_dim = 2, 0, 1

    def predict_particles(self, latent, *others):
        latent = latent / self.units
        out = self.model.predict_particles(latent, *others)
        factor = self.units * (1 + latent.abs().unsqueeze(-2))
        return out._replace(mean=out.mean * factor, std=out.std * factor)


def report_in_units(units, reward_unit):
    """On the same episodes, whatever the units. Powers of 2 change no rounding."""
    torch.manual_seed(0)
    buffer = buffer_of(episodes_of([10] * 20), terminated=True)
    data = buffer.storage._storage
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION):
        data[key].mul_(units)
    data[keys.NEXT_REWARD].mul_(reward_unit)
    model = InUnits(known_predictor(n_models=3, offset=0.1, std_factor=0.7).model, units)

    def reward(latent, context, action):
        return (latent[..., :1] / units[0] + action) * reward_unit

    return model_report(StaticPredictor(model, None, reward, IdentityEncoder(2), 2, 0), buffer, 5)


@pytest.mark.parametrize("reward_unit", [2.0**-14, 2.0**10, 2.0**40])
@pytest.mark.parametrize("units", [(2.0**-14,) * 2, (2.0**10,) * 2, (2.0**-30, 2.0**20)], ids=str)
def test_the_rows_of_the_report_are_the_same_in_every_unit(units, reward_unit):
    plain = report_in_units(torch.ones(2), 1.0)
    scaled = report_in_units(torch.tensor(units), reward_unit)
    assert plain.missing == scaled.missing == {}
    expected = plain.metrics.clone()
    expected["dims", "scale"] *= torch.tensor(units)
    for name in ("real_return", "imagined_return"):
        expected["reward", name] *= reward_unit
    for name in ("nll", "nll_guess"):  # a density is one per unit
        expected["one_step", name] += torch.tensor(units).log().mean()
    for key in expected.keys(True, True):
        pair = scaled.metrics[key], expected[key]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=0, equal_nan=True)
    changed = ("log-likelihood",)
    rows = [
        [row for row in report.markdown().splitlines() if not any(x in row for x in changed)]
        for report in (plain, scaled)
    ]
    assert rows[0] == rows[1] and len(rows[0]) > 15


@pytest.mark.parametrize("size", [0.0, 3.0, 1e4])
def test_constant_dims_count_for_nothing(size):
    buffer = random_buffer(4)
    data = buffer.storage._storage
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION):
        data[key][:, 1] = size  # always the same
        data[key][:, 2] = torch.arange(60) // 12  # the same in an episode
    report = model_report(ensemble_predictor(4, n_models=2), buffer, 4)
    dims = report.metrics["dims"]
    assert dims["varies"].tolist() == [True, False, True, True]
    assert dims["moves"].tolist() == [True, False, False, True]
    assert report.metrics["one_step", "coverage_per_dim"][0].isnan().tolist() == [0, 1, 1, 0]
    for name in ("error", "persistence_error", "coverage"):
        assert report.metrics["open_loop", name].isfinite().all()
    assert all(math.isfinite(x) for x in section(report, "one_step").values())
    assert "Latent dim 1 never varied" in report.markdown()
    assert "Latent dim 2 never changed within an episode" in report.markdown()


def test_discrete_dims_are_noted():
    buffer = random_buffer(3, n=120)
    data = buffer.storage._storage
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION):
        data[key][:, 1] = torch.randint(2, (120,)).float()
    assert (
        "Latent dim 1 took at most 10 values"
        in model_report(ensemble_predictor(), buffer, 2).markdown()
    )


def test_nothing_ever_changes():
    buffer = random_buffer(2)
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION):
        buffer.storage._storage[key].fill_(1.0)
    report = model_report(ensemble_predictor(2), buffer, 3)
    assert report.metrics["open_loop", "error"].isnan().all()
    assert report.metrics["one_step", "nll"].isnan()
    assert "no latent dim moves in this buffer" in report.markdown()
    report.figure()


# --- what the data cannot tell


def test_one_member_disagrees_with_nobody():
    report = model_report(ensemble_predictor(n_models=1), random_buffer(), 3)
    assert report.metrics["spread", "epistemic_std"].eq(0).all()
    assert report.metrics["spread", "epistemic_correlation"].isnan()
    assert "one member has nobody to disagree with" in report.markdown()


def test_no_terminations_in_the_buffer():
    report = model_report(known_predictor(hazard=0.9), buffer_of(episodes_of([5] * 4)), 2)
    found = section(report, "termination")
    assert found["actual"] == 0 and found["base_rate"] == 0
    assert found["expected"].item() == pytest.approx(0.9 * 20)
    assert all(found[name].isnan() for name in ("precision", "recall", "auc"))
    assert report.markdown().count("no terminations in this buffer") == 3


def test_no_termination_predicted_or_nothing_but_terminations():
    report = model_report(
        known_predictor(hazard=0.1), buffer_of(episodes_of([5] * 4), terminated=True), 2
    )
    assert report.metrics["termination", "recall"] == 0
    assert "no termination was predicted" in report.markdown()
    report = model_report(known_predictor(), buffer_of(episodes_of([1] * 9), terminated=True), 2)
    assert "every step in this buffer terminates" in report.markdown()


def test_without_reward_function_rewards_or_flags():
    buffer = random_buffer()
    for rew_func, text in ((False, "no reward function"), (True, "no rewards in this buffer")):
        report = model_report(ensemble_predictor(rew_func=rew_func), buffer, 3)
        assert all(x.isnan() for x in section(report, "reward").values())
        assert report.markdown().count(text) == 3
        assert report.metrics["reward", "real_return"].shape == (0,)
        data = buffer[:].exclude(keys.NEXT_REWARD, keys.NEXT_TERMINATED)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
        buffer.extend(data)
    assert "no termination flags in this buffer" in report.markdown()


def test_a_model_that_gives_nan_is_no_crash():
    predictor = ensemble_predictor(n_models=2)
    with torch.no_grad():
        next(predictor.model.parameters()).fill_(torch.nan)
    report = model_report(predictor, random_buffer(), 3)
    assert report.metrics["open_loop", "error"].isnan().all()
    assert "not a number" in report.markdown()
    report.figure()


# --- names


def test_renamed_entries_are_found():
    predictor = ensemble_predictor()
    predictor.set_keys(observation=("agent", "obs"), reward="pay", terminated="over")
    data = random_buffer()[:]
    for nest in ((), ("next",)):
        data.rename_key_((*nest, "observation"), (*nest, "agent", "obs"))
    data.rename_key_(keys.NEXT_REWARD, ("next", "pay"))
    data.rename_key_(keys.NEXT_TERMINATED, ("next", "over"))
    data = data.exclude(keys.NEXT_DONE)  # so that "over" alone says where an episode ends
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
    buffer.extend(data)
    report = model_report(predictor, buffer, 3)
    assert report.metrics["termination", "actual"] == 2
    assert report.metrics["reward", "explained_variance"].isfinite()


# --- state


class Noisy(IdentityEncoder):
    def __init__(self):
        super().__init__(3)
        self.drop = nn.Dropout(0.5)

    def embed(self, observation):
        return self.drop(observation), observation[..., :0]


def test_nothing_is_disturbed():
    predictor = ensemble_predictor(encoder=Noisy(), n_models=3, bootstrap=True)
    predictor.train()
    predictor.rew_func.eval()
    modes = {name: m.training for name, m in predictor.named_modules()}
    state = {k: x.clone() for k, x in predictor.state_dict().items() if isinstance(x, torch.Tensor)}
    buffer = random_buffer()
    stored, sampler = buffer[:].clone(), buffer.sampler
    rng = torch.get_rng_state()
    first = model_report(predictor, buffer, 4)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: m.training for name, m in predictor.named_modules()} == modes
    assert predictor.loss_module.training
    for key, x in state.items():
        assert torch.equal(predictor.state_dict()[key], x)
    assert buffer.sampler is sampler and len(buffer) == 60
    assert (buffer[:] == stored).all()
    torch.rand(3)
    again = model_report(predictor.eval(), buffer, 4)
    for key, x in first.metrics.items(True, True):
        assert torch.equal(x.nan_to_num(), again.metrics[key].nan_to_num()), key
    other = model_report(predictor, buffer, 4, seed=1)
    assert not torch.equal(other.metrics["open_loop", "error"], first.metrics["open_loop", "error"])


@pytest.mark.parametrize("through_hook", [False, True])
def test_running_statistics_go_on_after_a_report(through_hook):
    """The report left the loss in evaluation mode: no count moved ever after."""
    predictor, buffer = ensemble_predictor(), random_buffer()
    if through_hook:
        ModelReportHook(predictor, buffer, 4)(0)
    else:
        model_report(predictor, buffer, 4)
    assert predictor.loss_module.training
    moments = (predictor.model.input_moments, predictor.standardizer.moments)
    before = [int(m.count) for m in moments]
    terms = predictor.loss(
        predictor.compute_targets(buffer, 8, 1, 1), predictor.sample_model_batch(buffer, 8)
    )
    assert terms[0].isfinite()
    between = [int(m.count) for m in moments]
    predictor.learn(buffer, 1, 8, 8, 0)
    after = [int(m.count) for m in moments]
    assert all(a < b < c for a, b, c in zip(before, between, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_rewards_that_are_no_floats(dtype):
    buffer, other = random_buffer(), TensorDictReplayBuffer(storage=LazyTensorStorage(60))
    data = buffer[:].exclude("index")
    data["next", "reward"] = data["next", "reward"] > 0
    reports = []
    for to in (dtype, torch.float32):
        data["next", "reward"] = data["next", "reward"].to(to)
        other = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
        other.extend(data.clone())
        torch.manual_seed(0)
        reports.append(model_report(ensemble_predictor(), other, 4))
    for key, x in reports[0].metrics["reward"].items():
        assert torch.equal(x.nan_to_num(), reports[1].metrics["reward", key].nan_to_num()), key


def test_printing_a_report_shows_its_table():
    report = model_report(ensemble_predictor(), random_buffer(), 4)
    assert repr(report) == report.markdown()


def test_modes_are_restored_after_an_error():
    predictor = ensemble_predictor(encoder=Noisy())
    buffer = random_buffer(action=lambda n: torch.randn(n, 5))
    with pytest.raises(ValueError, match="action"):
        model_report(predictor, buffer, 4)
    assert predictor.encoder.drop.training


def test_each_step_is_drawn_at_most_once():
    buffer = random_buffer()
    report = model_report(ensemble_predictor(), buffer, 1, n_segments=20, n_transitions=30)
    assert report.metrics["open_loop", "segments"].tolist() == [20]
    assert report.metrics["termination", "bin_count"].sum() == 30
    report = model_report(ensemble_predictor(), buffer, 1, **EVERYTHING)
    assert report.metrics["termination", "actual"] == 2
    assert report.metrics["termination", "bin_count"].sum() == 60


# --- errors


def test_bad_input():
    predictor, buffer = ensemble_predictor(), random_buffer()
    empty = TensorDictReplayBuffer(storage=LazyTensorStorage(5))
    for wrong in ("env", buffer[:]):
        with pytest.raises(TypeError, match="buffer: expected a TorchRL replay buffer, got"):
            model_report(predictor, wrong, 3)
        with pytest.raises(TypeError, match="buffer: expected a TorchRL replay buffer, got"):
            ModelReportHook(predictor, wrong, 3)
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        model_report(predictor, empty, 3)
    for name in ("horizon", "n_segments", "n_transitions", "num_particles"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            model_report(predictor, buffer, **{"horizon": 3, name: 0})
    lacking = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
    lacking.extend(buffer[:].exclude("action"))
    with pytest.raises(KeyError, match="no entry 'action'"):
        model_report(predictor, lacking, 3)
    wide = random_buffer()[:]
    wide["next", "reward"] = torch.randn(60, 2)
    lacking.empty()
    lacking = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
    lacking.extend(wide)
    with pytest.raises(ValueError, match=r"one number per step, \[60, 1, 1\], got \[60, 1, 2\]"):
        model_report(predictor, lacking, 3)


@pytest.mark.gpu
def test_on_a_gpu_it_says_the_same():
    buffer = random_buffer()
    predictor = ensemble_predictor(n_models=3)
    expected = model_report(predictor, buffer, 4)
    state = torch.cuda.get_rng_state()
    actual = model_report(predictor.to("cuda"), buffer, 4)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert actual.metrics["dims", "scale"].device.type == "cpu"
    for key in (("one_step", "nll"), ("one_step", "coverage"), ("reward", "explained_variance")):
        torch.testing.assert_close(actual.metrics[key], expected.metrics[key], rtol=1e-3, atol=1e-3)
