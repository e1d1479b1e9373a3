"""One optimisation step in a trainer is the step of ``predictor.learn``."""

import re
from types import SimpleNamespace

import pytest
import torch
from torchrl.trainers import ReplayBufferTrainer, Trainer

from layeredrl_trl.predictors import StaticPredictor
from layeredrl_trl.schedules import LinearSchedule
from layeredrl_trl.trainers import PredictorStepper
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import small_predictor, snapshot
from tests.trainers.small_trainers import make_buffer


def sample_of(predictor, n_slices=8):
    """A buffer of the predictor's slices, and one flat sample of it."""
    buffer = make_buffer(predictor)
    buffer.extend(filled_buffer().buffer[:])
    return buffer, buffer.sample(n_slices * predictor.loss_module.slice_len)


def equal(one, other):
    return all(torch.equal(x, other[key]) for key, x in one.items())


def two_alike(**options):
    return tuple(_seeded(**options) for _ in range(2))


def _seeded(**options):
    torch.manual_seed(3)
    return small_predictor(**options)


AT = SimpleNamespace(collected_frames=100)


@pytest.mark.parametrize("value", [None, "state", "q"])
def test_takes_the_step_that_learn_takes(value):
    one, other = two_alike(value=value, n_steps=2)
    _, sample = sample_of(one)
    other.set_learning_rates(100)
    expected = other.update(sample)
    out = PredictorStepper(one).step(AT, sample)
    assert equal(snapshot(one), snapshot(other))
    assert out["loss"] == expected["loss"] and not out.requires_grad


def test_further_slices_train_the_dynamics_only():
    one, other = two_alike(n_steps=2)
    _, sample = sample_of(one, n_slices=12)
    length = one.loss_module.slice_len
    slices = sample.reshape(12, length)
    other.set_learning_rates(100)
    other.update(slices[:8].reshape(-1), slices[8:, 0])
    PredictorStepper(one, model_batch_size=4).step(AT, sample)
    assert equal(snapshot(one), snapshot(other))


def test_learning_rates_follow_the_frames_of_the_trainer():
    predictor = small_predictor(model_lr=LinearSchedule(1.0, 0.0, 200))
    _, sample = sample_of(predictor)
    PredictorStepper(predictor).step(AT, sample)
    rates = {group["name"]: group["lr"] for group in predictor.update.optimizer.param_groups}
    assert rates["model"] == pytest.approx(0.5)


def test_the_model_hears_of_the_progress():
    predictor = small_predictor()
    told = []
    predictor.model.advance = lambda *arguments: told.append(arguments)
    _, sample = sample_of(predictor)
    PredictorStepper(predictor).step(AT, sample)
    ((frames, whitening),) = told
    assert frames == 100 and torch.equal(whitening, predictor.standardizer.matrix)


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted():
    predictor = small_predictor()
    _, sample = sample_of(predictor)
    sample["next", "reward"][:] = torch.nan
    before, stepper = snapshot(predictor), PredictorStepper(predictor)
    with pytest.warns(UserWarning, match="non-finite"):
        out = stepper.step(AT, sample)
    assert equal(snapshot(predictor), before)
    assert out["skipped"] == 1 and stepper.steps == 1


def test_a_predictor_in_evaluation_mode_learns_and_stays_in_it():
    predictor = small_predictor().eval()
    _, sample = sample_of(predictor)
    before = snapshot(predictor)
    PredictorStepper(predictor).step(AT, sample)
    assert not predictor.training and not equal(snapshot(predictor), before)


def test_works_in_a_trainer_of_torchrl():
    predictor = small_predictor()
    buffer, _ = sample_of(predictor)
    stepper = PredictorStepper(predictor)
    batch = buffer[:].clone()
    collector = SimpleNamespace(
        __iter__=None, init_random_frames=0, shutdown=lambda: None, state_dict=dict
    )
    trainer = Trainer(
        collector=collector,
        total_frames=2 * len(batch),
        frame_skip=1,
        optim_steps_per_batch=3,
        loss_module=predictor.loss_module,
        optimizer=None,
        optimization_stepper=stepper,
        progress_bar=False,
    )
    size = 4 * predictor.loss_module.slice_len
    # its register() warns of a stage that is deprecated
    feed = ReplayBufferTrainer(buffer, batch_size=size)
    trainer.register_op("process_optim_batch", feed.sample)
    before = snapshot(predictor)
    trainer.optim_steps(batch)
    assert stepper.steps == predictor.update.steps == 3
    assert stepper.optimizer_step_count == 3
    assert not equal(snapshot(predictor), before)


def test_its_state_is_the_number_of_steps():
    predictor = small_predictor()
    _, sample = sample_of(predictor)
    stepper, other = PredictorStepper(predictor), PredictorStepper(predictor)
    stepper.step(AT, sample)
    other.load_state_dict(stepper.state_dict())
    assert other.steps == 1
    with pytest.raises(TypeError, match="state_dict: steps must be an integer"):
        other.load_state_dict({"steps": "3"})


def test_bad_arguments():
    with pytest.raises(TypeError, match="expected a RewardPredictor, got StaticPredictor"):
        PredictorStepper(StaticPredictor.__new__(StaticPredictor))
    with pytest.raises(ValueError, match="model_batch_size must be at least 1"):
        PredictorStepper(small_predictor(), model_batch_size=0)


@pytest.mark.parametrize("n_slices", [1, 4])
def test_a_sample_without_slices_for_the_value(n_slices):
    predictor = small_predictor()
    _, sample = sample_of(predictor, n_slices)
    with pytest.raises(ValueError, match=re.escape("more than model_batch_size=4 slices of 1")):
        PredictorStepper(predictor, model_batch_size=4).step(AT, sample)
