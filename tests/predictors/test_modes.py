"""Training and evaluation mode: put back as they were, and nothing hidden behind."""

import pytest
import torch
from torchrl.data import Bounded

from layeredrl_trl.predictors.modes import in_mode
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import small_predictor


def counts(predictor) -> tuple[int, int]:
    return int(predictor.model.input_moments.count), int(predictor.standardizer.moments.count)


def modes(predictor) -> dict[str, bool]:
    return {name: module.training for name, module in predictor.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_every_part_is_in_its_own_mode_again(training):
    predictor = small_predictor()
    predictor.rew_func.eval()
    before = modes(predictor)
    with pytest.raises(RuntimeError, match="stop"), in_mode(predictor, training):
        assert set(modes(predictor).values()) == {training}
        assert predictor.loss_module.training is training
        raise RuntimeError("stop")
    assert modes(predictor) == before and predictor.loss_module.training


def test_learn_after_eval_left_the_statistics_alone():
    predictor, toy = small_predictor().eval(), filled_buffer()
    before = counts(predictor)
    predictor.learn(toy.buffer, 2, 8, 8, 0)
    after = counts(predictor)
    assert all(now > then for now, then in zip(after, before, strict=True))
    assert not any(modes(predictor).values()) and not predictor.loss_module.training


def test_an_environment_in_evaluation_mode_had_stopped_the_statistics():
    """It shares dynamics and encoder with the predictor."""
    predictor, toy = small_predictor(), filled_buffer()
    predictor.env(Bounded(-1.0, 1.0, (1,))).eval()
    assert not predictor.model.training and predictor.training
    before = counts(predictor)
    predictor.learn(toy.buffer, 1, 8, 8, 0)
    predictor.loss(
        predictor.compute_targets(toy.buffer, 8, 1, 1), predictor.sample_model_batch(toy.buffer, 8)
    )
    assert counts(predictor) == tuple(count + 2 for count in before)
    assert not predictor.model.training and predictor.training


def test_statistics_follow_the_parts_and_not_a_flag_of_the_loss():
    """Whoever puts modules back one by one does not know of the loss."""
    predictor, toy = small_predictor(), filled_buffer()
    before = {module: module.training for module in predictor.modules()}
    predictor.eval()
    for module, training in before.items():
        module.training = training
    then = counts(predictor)
    batch = predictor.compute_targets(toy.buffer, 8, 1, 1)
    predictor.loss(batch, predictor.sample_model_batch(toy.buffer, 8))
    assert all(a > b for a, b in zip(counts(predictor), then, strict=True))
    assert torch.is_grad_enabled()
