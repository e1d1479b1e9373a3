"""What ProbabilisticEnsemble learns on systems with known answers."""

import math

import pytest
import torch
from torch import nn

from layeredrl_trl.modules import ProbabilisticEnsemble
from tests.problems import FOUR_WAYS, LinearGaussian


def learn(model, data, n_steps, batch_size=256, lr=1e-2):
    """Minibatches as `learn` takes them; the rate falls to a hundredth along a cosine."""
    model.train()
    data = data.clone().set("index", torch.arange(len(data)))
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps, lr / 100)
    for _ in range(n_steps):
        batch = data[torch.randint(len(data), (batch_size,))]
        model.update_statistics(*arguments(batch), batch["next", "latent"])
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def arguments(data):
    return [data[key] for key in ("latent", "context", "action")]


def held_out_nll(model, data):
    nll, _ = model.negative_log_likelihood(*arguments(data), *data["next"].values())
    return nll.mean().item()


def perceptron(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 32), nn.Tanh(), nn.Linear(32, n_out))


ENSEMBLES = {
    "default": {},
    "four-modes": {"n_modes": 4},
    "bootstrap": {"bootstrap": True},
    "learned-bounds": {"learn_std_bounds": True},
    "own-network": {"network": perceptron},
}


@pytest.mark.parametrize("options", ENSEMBLES.values(), ids=ENSEMBLES.keys())
def test_reaches_the_true_likelihood_and_hazard_of_a_linear_gaussian_system(options):
    problem = LinearGaussian()
    data, unseen = problem.transitions(20_000), problem.transitions(5_000)
    model = ProbabilisticEnsemble(2, 0, 1, n_models=3, hidden_sizes=(32,), **options)
    learn(model, data, 1000)
    gap = (held_out_nll(model, unseen) - problem.negative_log_likelihood) / 2
    assert -0.02 < gap < 0.05
    predicted, hazard = model.predict(*arguments(unseen))[3], problem.hazard(unseen["latent"])
    for low in torch.arange(0.0, 0.8, 0.1):
        in_bin = (predicted >= low) & (predicted < low + 0.1)
        if in_bin.sum() >= 50:
            assert predicted[in_bin].mean().item() == pytest.approx(
                hazard[in_bin].mean().item(), abs=0.05
            )
    assert (predicted - hazard.squeeze(-1)).abs().mean() < 0.05


@pytest.mark.parametrize("problem", FOUR_WAYS.values(), ids=FOUR_WAYS.keys())
def test_four_modes_recover_four_outcomes(problem):
    data, unseen = problem.transitions(4_000), problem.transitions(2_000)
    dim = problem.outcomes.shape[-1]
    model = ProbabilisticEnsemble(dim, 0, 1, n_models=3, n_modes=4, hidden_sizes=(32,))
    learn(model, data, 400)
    mean, weights, std, _ = model.predict(*arguments(unseen))
    moves = (mean - unseen["latent"][:, None, None]).mean(0)
    for e in range(3):
        distance, mode = torch.cdist(problem.outcomes, moves[e]).min(-1)
        assert sorted(mode.tolist()) == [0, 1, 2, 3]
        assert distance.max() < problem.noise
        torch.testing.assert_close(weights.mean(0)[e, mode], problem.probs, rtol=0, atol=0.05)
    torch.testing.assert_close(std.median(), torch.tensor(problem.noise), rtol=0.2, atol=0)
    gap = held_out_nll(model, unseen) - problem.negative_log_likelihood
    assert -0.1 < gap < 0.05 * dim + 0.05


def test_bootstrapped_members_differ_more_where_there_is_little_data():
    """The same network in every member: only what they see can make them differ."""

    def same(n_in, n_out):
        torch.manual_seed(1)
        return perceptron(n_in, n_out)

    data = LinearGaussian().transitions(60)
    spread = {}
    for bootstrap in (False, True):
        model = ProbabilisticEnsemble(2, 0, 1, n_models=3, network=same, bootstrap=bootstrap)
        learn(model, data, 100, batch_size=60)
        spread[bootstrap] = model.predict(*arguments(data))[0].std(1).mean().item()
    assert spread[False] < 1e-4 < 1e-2 < spread[True]


def test_learned_bounds_end_where_the_noise_is():
    problem = LinearGaussian()
    model = ProbabilisticEnsemble(
        2, 0, 1, hidden_sizes=(32,), learn_std_bounds=True, std_bounds=(math.exp(-5), 2.0)
    )
    before = model.log_std_bounds.detach().clone()
    learn(model, problem.transitions(2000), 200)
    assert (model.log_std_bounds[1] < before[1]).all()
    assert (model.log_std_bounds[0] > before[0]).all()
