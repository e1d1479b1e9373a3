"""Learning reads the batches of many steps at once, and nobody can tell."""

import pytest
import torch
from torchrl.envs import Transform

from layeredrl_trl.predictors import read_ahead
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import learn, small_predictor


class Counting(Transform):
    """Notes for how many steps it is asked."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, tensordict):
        self.sizes.append(tensordict.numel())
        return tensordict


@pytest.mark.parametrize("value", ["state", "q", None])
def test_every_step_gets_a_batch_of_its_own(value, monkeypatch):
    """Four steps read in one go, in two, or one by one: as many, all full, none twice."""
    for ahead in (10_000, 70, 1):
        monkeypatch.setattr(read_ahead, "READ_AHEAD", ahead)
        predictor, seen = small_predictor(value), []
        update = predictor.update

        def spy(slices, transitions, update=update, seen=seen):
            seen.append((slices.index.flatten().tolist(), transitions.index.tolist()))
            return update(slices, transitions)

        spy.steps, spy.skipped, spy.optimizer = 0, 0, update.optimizer
        predictor.update = spy
        learn(predictor, filled_buffer().buffer, n_steps=4)
        assert [len(model) for _, model in seen] == [8] * 4
        assert len({tuple(slices) for slices, _ in seen}) == 4


def test_transforms_of_the_buffer_are_asked_anew_for_every_step():
    """A bonus that a transform computes with the model would be that of a model of long ago."""
    toy, counting = filled_buffer(), Counting()
    learn(small_predictor(), toy.buffer, n_steps=1)
    toy.buffer.append_transform(counting)
    learn(small_predictor(), toy.buffer, n_steps=1)
    once = list(counting.sizes)
    counting.sizes.clear()
    learn(small_predictor(), toy.buffer, n_steps=5)
    assert counting.sizes == once * 5


def test_a_step_is_aimed_at_the_target_network_of_the_step_before():
    """Targets of slices that were read together must not be of one and the same network."""
    torch.manual_seed(0)
    predictor, seen = small_predictor("state", tau=1.0, value_lr=0.1, encoder_warm_up=0), []
    loss, update = predictor.loss_module, predictor.update

    def spy(slices, transitions):
        # in evaluation mode the value's unit stays the same
        terms, returns = loss.eval()(slices, transitions), slices.returns
        with torch.no_grad():
            latent, context = predictor.encode(slices.observation)
            behind, _ = predictor.encode(returns.observation)
            tail = returns.bootstraps * returns.discount * predictor.val_func(behind, context)
            error = (predictor.val_func(latent, context) - returns.total - tail).square()
        seen.append(terms["loss_value"].item() == pytest.approx(error.mean().item(), rel=1e-4))
        return terms

    update.target_updater.step()
    update.compute = spy
    learn(predictor, filled_buffer().buffer, n_steps=6)
    assert seen == [True] * 6


@pytest.mark.parametrize("value", ["state", "q", None])
def test_padding_is_masked_in_every_batch_that_learns(value):
    """Past the end of an episode the last step repeats; only the mask tells."""
    predictor, padded = small_predictor(value, k_steps=4), 0
    update = predictor.update

    def spy(slices, transitions):
        nonlocal padded
        repeats = slices.index[:, 1:] == slices.index[:, :-1]
        if repeats.any():
            assert not slices.mask[:, 1:][repeats].any()
        padded += int(repeats.sum())
        return update(slices, transitions)

    spy.steps, spy.skipped, spy.optimizer = 0, 0, update.optimizer
    predictor.update = spy
    learn(predictor, filled_buffer().buffer, n_steps=4)
    assert padded > 0
