"""The symmetry-breaking start: random linear predictions that give way to the learned model."""

from functools import partial

import pytest
import torch

from layeredrl_trl.acceleration import EnsembleRollout, promised
from layeredrl_trl.modules import (
    DeltaStandardizer,
    ProbabilisticEnsemble,
    SymmetryBreakingStart,
)
from tests.oracles import roll_out


def start(latent_dim=2, action_dim=3, duration=100, **options) -> SymmetryBreakingStart:
    model = ProbabilisticEnsemble(latent_dim, 1, action_dim, n_models=2, n_modes=4)
    return SymmetryBreakingStart(model, duration, **options)


def inputs(model, *batch):
    return (
        torch.randn(*batch, model.latent_state_dim),
        torch.randn(*batch, 1),
        torch.randn(*batch, model.action_dim),
    )


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("latent_dim", "action_dim"), [(1, 1), (1, 4), (3, 2), (2, 5)])
def test_shapes_with_fewer_and_with_more_actions_than_latent_dims(batch, latent_dim, action_dim):
    model = start(latent_dim, action_dim)
    mean, weights, std, term_prob = model.predict(*inputs(model, *batch))
    assert mean.shape == std.shape == (*batch, 2, 4, latent_dim)
    assert weights.shape == (*batch, 2, 4) and term_prob.shape == batch


def test_predictions_of_the_start_are_linear_in_the_action_and_nothing_else():
    model = start(factor=2.0, std=0.5)
    latent, context, action = inputs(model, 5)
    mean, weights, std, term_prob = model.predict(latent, context, action)
    change = mean - latent[:, None, None]
    expected = torch.stack([model.direction @ a for a in action])
    torch.testing.assert_close(change, expected[:, None, None].expand_as(change))
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))
    torch.testing.assert_close(std, torch.full_like(std, 0.5))
    assert (term_prob < 1e-5).all()
    gram = model.direction @ model.direction.mT  # more actions than latent dims: orthonormal rows
    torch.testing.assert_close(gram, 4 * torch.eye(2))


def test_the_inverse_standardizer_brings_changes_to_the_scale_of_real_ones():
    model = start(factor=1.0, std=1.0)
    matrix = torch.tensor([[2.0, 0.5], [0.5, 4.0]])
    model.advance(0, matrix)
    latent, context, action = inputs(model, 5)
    mean, _, std, _ = model.predict(latent, context, action)
    change = (mean - latent[:, None, None])[:, 0, 0]
    torch.testing.assert_close(change @ matrix.mT, action @ model.direction.mT)
    torch.testing.assert_close(std[0, 0, 0], matrix.inverse().square().sum(1).sqrt())


@pytest.mark.parametrize("units", [(1e5, 1e-5), (1e-10, 1e10), (1.0, 2.0**-14)], ids=str)
def test_a_dim_of_a_small_unit_moves_too(units):
    """In float32, the pseudo-inverse took the larger of two units for rounding error."""
    scale = torch.tensor(units)
    standardizer = DeltaStandardizer(2)
    with torch.no_grad():
        standardizer.raw.add_(torch.tensor([[0.0, 0.4], [-0.2, 0.1]]))
    standardizer.moments.var.copy_(scale.square())
    model, plain = start(), start()
    plain.direction.copy_(model.direction)
    latent, context, action = inputs(model, 5)
    latent = torch.zeros_like(latent)
    model.advance(0, standardizer.matrix)
    matrix = standardizer.matrix.double()
    change, _, std, _ = model.predict(latent, context, action)
    expected = action.double() @ (matrix.inverse() @ model.direction.double()).mT
    change = change[:, 0, 0].double()
    torch.testing.assert_close(change / scale, expected / scale, rtol=1e-4, atol=1e-4)
    relative = std[0, 0, 0] / scale
    assert ((relative > 0.1) & (relative < 1)).all()


def test_a_direction_that_is_whitened_to_nothing_does_not_move():
    model = start()
    model.advance(0, torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert model.unwhiten.tolist() == [[0.5, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("steps", "share"), [(0, 0.0), (49, 0.0), (50, 0.0), (75, 0.5), (100, 1.0), (999, 1.0)]
)
def test_the_learned_model_is_blended_in_over_the_second_half(steps, share):
    model = start()
    random = model.predict(*(entries := inputs(model, 5)))
    learned = model.model.predict(*entries)
    model.advance(steps)
    assert model.learned_share == share
    for got, a, b in zip(model.predict(*entries), random, learned, strict=True):
        torch.testing.assert_close(got, (1 - share) * a + share * b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("with_member", [False, True])
@pytest.mark.parametrize("steps", [0, 75, 100])
def test_rollouts_are_the_learned_models_in_the_end(steps, with_member, deterministic):
    model = start()
    model.advance(steps)
    latent = torch.randn(5, 1, 1, 2).expand(5, 1 if with_member else 2, 3, 2)
    member = torch.randint(2, (5, 1)) if with_member else None
    given = latent, torch.randn(5, 1), torch.randn(5, 4, 3), member
    fast = [] if model.fast_rollout() is None else [model.fast_rollout()]
    assert len(fast) == (steps == 100)
    outcomes = []
    for roll in (partial(roll_out, model), partial(roll_out, model.model), *fast):
        torch.manual_seed(0)
        outcomes.append(roll(*given, deterministic=deterministic))
    own, learned, *fast = outcomes
    for other in fast:
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert torch.allclose(own[0], learned[0]) == (steps == 100)


def test_a_rollout_that_is_fast_is_promised_once_the_start_is_over():
    model = start()
    model.advance(99)
    assert promised(model, "fast_rollout")() is None
    model.advance(100)
    assert isinstance(promised(model, "fast_rollout")(), EnsembleRollout)


def test_no_rollout_is_promised_for_a_model_that_promises_none():
    class Changed(ProbabilisticEnsemble):
        pass

    model = SymmetryBreakingStart(Changed(2, 1, 3), 0)
    assert promised(model, "fast_rollout")() is None


def test_a_subclass_that_predicts_otherwise_does_so_in_rollouts_too():
    class Still(SymmetryBreakingStart):
        def predict_particles(self, latent, context, action, member=None):
            prediction = super().predict_particles(latent, context, action, member)
            return prediction._replace(mean=latent.unsqueeze(-2).expand_as(prediction.mean))

    model = Still(ProbabilisticEnsemble(2, 1, 3, n_models=2), 0)
    assert promised(model, "fast_rollout") is None
    given = torch.ones(5, 2, 1, 2), torch.zeros(5, 1), torch.zeros(5, 4, 3)
    assert (roll_out(model, *given, deterministic=True)[0] == 1).all()


def test_the_loss_is_always_that_of_the_learned_model():
    model = start()
    latent, context, action = inputs(model, 5)
    transition = (latent, context, action, latent + 1, torch.zeros(5, 1).bool())
    expected = model.model.negative_log_likelihood(*transition)
    for got, want in zip(model.negative_log_likelihood(*transition), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    model.update_statistics(latent, context, action, latent + 1)
    assert model.model.target_moments.count == 1


def test_the_random_map_gets_no_gradient_and_stays():
    model = start()
    assert all("direction" not in name for name, _ in model.named_parameters())
    before = model.direction.clone()
    model.advance(70, torch.eye(2))
    torch.testing.assert_close(model.direction, before, rtol=0, atol=0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "options",
    [
        *({"sb_start_duration": -1}, {"factor": 0.0}, {"std": -1.0}),
        *({"factor": NAN}, {"std": NAN}, {"factor": INF}, {"std": INF}),
    ],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"SymmetryBreakingStart: {next(iter(options))} must be"):
        SymmetryBreakingStart(ProbabilisticEnsemble(2, 0, 1), **{"sb_start_duration": 1} | options)


@pytest.mark.parametrize(
    "options", [{"sb_start_duration": NAN}, {"factor": "1"}, {"std": True}], ids=str
)
def test_options_of_another_kind(options):
    with pytest.raises(TypeError, match=f"SymmetryBreakingStart: {next(iter(options))} must be"):
        SymmetryBreakingStart(ProbabilisticEnsemble(2, 0, 1), **{"sb_start_duration": 1} | options)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="model must be a DynamicsModel, got Linear"):
        SymmetryBreakingStart(torch.nn.Linear(2, 2), 10)


def test_a_state_dict_restores_where_the_start_is():
    model, other = start(), start()
    model.advance(75, 2 * torch.eye(2))
    other.load_state_dict(model.state_dict())
    entries = inputs(model, 5)
    for got, want in zip(other.predict(*entries), model.predict(*entries), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [0, 75])
def test_float64_states_are_cast_to_the_dtype_of_the_model(steps):
    model = SymmetryBreakingStart(ProbabilisticEnsemble(3, 0, 2, n_models=2), 100)
    model.advance(steps)
    inputs = torch.randn(4, 3), torch.zeros(4, 0), torch.randn(4, 2)
    wide = model.predict(*(x.double() for x in inputs))
    for found, expected in zip(wide, model.predict(*inputs), strict=True):
        assert found.dtype is torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("state", "error"),
    [({}, ValueError), (None, ValueError), ({"n_total_env_steps": 1.5}, TypeError)],
)
def test_a_progress_that_is_none_changes_nothing(state, error):
    model = SymmetryBreakingStart(ProbabilisticEnsemble(3, 0, 2), 100)
    before = {name: x for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
    before = {name: x.clone() for name, x in before.items()}
    other = SymmetryBreakingStart(ProbabilisticEnsemble(3, 0, 2), 100)
    with pytest.raises(error, match=r"state_dict: .*n_total_env_steps"):
        model.load_state_dict(other.state_dict() | {"_extra_state": state})
    after = model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert model.n_total_env_steps == 0
