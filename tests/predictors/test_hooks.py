"""What `learn` hands to the parts: progress, weights, bootstrap masks, encoder statistics."""

import pytest
import torch

from layeredrl_trl.modules import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    SymmetryBreakingStart,
)
from layeredrl_trl.predictors import RewardPredictor
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import learn, small_predictor


class CountingEncoder(IdentityEncoder):
    """Keeps the sum of what it was shown."""

    def __init__(self, obs_shape):
        super().__init__(obs_shape)
        self.register_buffer("seen", torch.zeros(()))

    def update_statistics(self, observation, next_observation, mask=None):
        assert observation.shape == next_observation.shape == (8, 3)
        self.seen += observation.sum()


def predictor_of(model, encoder=None, **options) -> RewardPredictor:
    encoder = encoder or IdentityEncoder(3)
    options = {"learn_encoder": False} | options
    return RewardPredictor(model, None, RewardNet(3, 0, 1), encoder, 3, 0, **options)


def test_learn_tells_the_model_how_far_training_is():
    model = SymmetryBreakingStart(ProbabilisticEnsemble(3, 0, 1), 100)
    predictor = predictor_of(model)
    learn(predictor, filled_buffer().buffer, env_steps=75)
    assert model.learned_share == 0.5
    assert not torch.equal(model.unwhiten, torch.eye(3))
    learn(predictor, filled_buffer().buffer, env_steps=100)
    assert model.learned_share == 1.0


def test_encoder_statistics_see_every_model_batch_in_training_mode_only():
    encoder = CountingEncoder(3)
    predictor = predictor_of(ProbabilisticEnsemble(3, 0, 1), encoder)
    buffer = filled_buffer().buffer
    batch = predictor.sample_model_batch(buffer, 8)
    assert {"observation", ("next", "observation")} <= set(batch.keys(True, True))
    targets = predictor.compute_targets(buffer, 8, 1, 1)
    predictor.eval()
    predictor.loss(targets, batch)
    assert encoder.seen == 0
    predictor.train()
    predictor.loss(targets, batch)
    torch.testing.assert_close(encoder.seen, batch["observation"].sum())


def test_encoder_statistics_of_a_skipped_batch_are_undone():
    encoder = CountingEncoder(3)
    predictor = predictor_of(ProbabilisticEnsemble(3, 0, 1), encoder)
    toy = filled_buffer()
    toy.buffer[:]["next", "reward"].fill_(torch.inf)
    with pytest.warns(UserWarning, match="non-finite"):
        _, info = learn(predictor, toy.buffer)
    assert info["skipped"] == 1 and encoder.seen == 0


def test_stored_weights_count_in_the_dynamics_once_and_relative_to_each_other():
    predictor = small_predictor(n_models=3)
    toy = filled_buffer()
    batch = predictor.sample_model_batch(toy.buffer, 8)
    targets = predictor.compute_targets(toy.buffer, 8, 1, 1)
    predictor.eval()
    _, plain = predictor.loss(targets, batch)
    _, doubled = predictor.loss(targets, batch.clone().set("weight", torch.full((8, 1), 2.0)))
    torch.testing.assert_close(plain["loss_consistency"], doubled["loss_consistency"])
    only_first = torch.zeros(8, 1)
    only_first[0] = 5.0
    _, one = predictor.loss(targets, batch.clone().set("weight", only_first))
    _, alone = predictor.loss(targets, batch[:1])
    torch.testing.assert_close(one["loss_consistency"], alone["loss_consistency"])
    assert torch.equal(one["loss_reward"], plain["loss_reward"])


def test_bootstrap_lets_members_see_different_transitions():
    torch.manual_seed(0)
    toy = filled_buffer()
    model = ProbabilisticEnsemble(3, 0, 1, n_models=2, bootstrap=True)
    predictor = predictor_of(model)
    batch = predictor.sample_model_batch(toy.buffer, 40)
    weight = model.joint_weight(batch.shape, index=batch["index"])
    assert weight.shape == (40, 2) and not torch.equal(weight[:, 0], weight[:, 1])
    batch["next", "latent"].requires_grad_()
    nll, bce = model.negative_log_likelihood(
        *(batch[key] for key in ("latent", "context", "action")),
        batch["next", "latent"],
        batch["next", "terminated"],
        weight,
    )
    (nll + bce).sum().backward()
    unseen = (weight == 0).all(-1)
    assert unseen.any() and (batch["next", "latent"].grad[unseen] == 0).all()
    assert (batch["next", "latent"].grad[~unseen] != 0).any(-1).all()


def test_learning_calls_the_loss_and_the_weights_of_a_model():
    """What somebody hooks or overrides is asked in each step."""

    class Weightless(ProbabilisticEnsemble):
        def transition_weights(self, index):
            asked.append(index.shape)
            return torch.zeros(*index.shape, 1)

    asked, seen = [], []
    predictor = predictor_of(Weightless(3, 0, 1, n_models=2))
    predictor.loss_module.register_forward_hook(lambda *_: seen.append(1))
    _, info = predictor.learn(filled_buffer().buffer, 3, 8, 8, 0)
    assert len(seen) == 3 and asked == [(8,)] * 3
    assert info["loss_consistency"] == 0
