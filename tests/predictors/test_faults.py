"""What learn says of data that it cannot learn from: which entry, how many rows, where."""

import re
import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import learn, small_predictor, snapshot

BAD = [torch.nan, torch.inf]


def plain_predictor() -> RewardPredictor:
    """With an encoder that lets everything through."""
    parts = ProbabilisticEnsemble(3, 0, 1, hidden_sizes=(8,)), ValueNet(3, 0), RewardNet(3, 0, 1)
    return RewardPredictor(*parts, IdentityEncoder(3), 3, 0, learn_encoder=False)


def buffer_with(bad: dict, n=200, ndim=1) -> TensorDictReplayBuffer:
    """A buffer in which ``bad`` gives ``{key: {position: value}}``."""
    buffer = filled_buffer(n, ndim=ndim).buffer
    for key, places in bad.items():
        for position, value in places.items():
            buffer.storage._storage[key][position] = value
    return buffer


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "key", ["observation", "action", ("next", "observation"), ("next", "reward")]
)
def test_the_first_skipped_batch_names_entry_count_and_positions(key, value):
    buffer = buffer_with({key: {17: value, 151: value}})
    with pytest.warns(UserWarning) as caught:
        _, info = learn(small_predictor(encoder_warm_up=0), buffer, n_steps=40, batch_size=16)
    assert 0 < info["skipped"] < 40
    text = str(caught[0].message)
    assert text.startswith("A batch gave non-finite gradients and was skipped")
    assert f"{key!r}: 2 of 200 rows are not finite, at storage positions 17, 151." in text


def test_positions_of_a_storage_of_two_dims():
    buffer = buffer_with({("next", "reward"): {(3, 1): torch.nan}}, n=20, ndim=2)
    with pytest.warns(UserWarning, match=r"1 of 40 rows is not finite, .* positions \(3, 1\)\."):
        learn(small_predictor(encoder_warm_up=0), buffer, n_steps=40, batch_size=16)


def test_many_positions_are_cut_short():
    places = {position: torch.nan for position in range(10, 110, 10)}
    with pytest.warns(UserWarning, match=r"10 of 200 rows .* 10, 20, 30, 40, 50, \.\.\.\."):
        learn(small_predictor(), buffer_with({"action": places}), n_steps=40, batch_size=16)


def test_it_is_said_when_nothing_is_learned_any_more():
    """One bad row of 200 and large batches: after the first warning it was silent for ever."""
    buffer, predictor = buffer_with({("next", "reward"): {17: torch.nan}}), small_predictor()
    before = snapshot(predictor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(35):
            _, info = learn(predictor, buffer, n_steps=3, batch_size=4000)
    assert info["skipped"] == 105
    texts = [str(x.message) for x in caught]
    assert len(texts) == 3
    starts = "A batch gave", *(f"Nothing is learned any more: the last {n}" for n in (10, 100))
    for text, start in zip(texts, starts, strict=True):
        assert text.startswith(start)
        assert "('next', 'reward'): 1 of 200 rows is not finite, at storage positions 17." in text
    torch.testing.assert_close(snapshot(predictor), before, rtol=0, atol=0)


def test_a_few_more_skipped_batches_are_only_counted():
    buffer, predictor = buffer_with({"action": {17: torch.nan}}), small_predictor()
    with pytest.warns(UserWarning, match="gave non-finite gradients"):
        learn(predictor, buffer, n_steps=40, batch_size=16)
    before = predictor.update.skipped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(predictor, buffer, n_steps=40, batch_size=4)
    assert predictor.update.skipped > before


def test_values_whose_square_overflows_are_named():
    buffer = buffer_with({("next", "observation"): {17: 1e20}})
    predictor = plain_predictor()
    with pytest.warns(UserWarning, match=r"\('next', 'observation'\): 1 of 200 rows is too large"):
        learn(predictor, buffer, n_steps=40, batch_size=16)
    clean = filled_buffer(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = predictor.update.skipped
        learn(predictor, clean, n_steps=10)
    assert predictor.update.skipped == before


def test_one_batch_of_huge_states_does_not_stop_learning_for_ever():
    """The variance after the update was not looked at: every clean batch was skipped."""
    predictor, buffer = plain_predictor(), filled_buffer(40).buffer
    learn(predictor, filled_buffer(200))
    buffer.storage._storage["next", "observation"].fill_(1e20)
    with pytest.warns(UserWarning, match=r"'observation'\): 40 of 40 rows are too large"):
        learn(predictor, buffer, n_steps=3)
    assert all(x.isfinite().all() for x in snapshot(predictor).values())
    before = predictor.update.skipped
    learn(predictor, filled_buffer(200), n_steps=5)
    assert predictor.update.skipped == before


def test_parameters_that_are_to_blame_are_named():
    predictor = small_predictor()
    with torch.no_grad():
        next(predictor.model.parameters()).fill_(torch.nan)
    with pytest.warns(UserWarning, match=r"entries .* are finite, but parameters of \['model'\]"):
        learn(predictor)


def linear_buffer(n=1000) -> TensorDictReplayBuffer:
    observation, action = torch.randn(n, 3), torch.rand(n, 1)
    flags = {key: torch.zeros(n, 1).bool() for key in ("terminated", "truncated")}
    flags["done"] = torch.arange(n)[:, None] % 50 == 49
    flags["truncated"] = flags["done"].clone()
    following = 0.9 * observation + 0.3 * action
    data = {
        "observation": observation,
        "action": action,
        "next": {"observation": following, "reward": following[:, :1], **flags},
    }
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(TensorDict(data, [n]))
    return buffer


@pytest.mark.parametrize("value", [1e8, -1e6])
@pytest.mark.parametrize("key", [("next", "observation"), ("next", "reward")])
def test_one_huge_value_in_1000_rows_spoiled_all_scales_without_a_word(key, value):
    buffer, scales = linear_buffer(), []
    clean = buffer.storage._storage[key][17].clone()
    for bad in (clean, torch.full_like(clean, value)):
        buffer.storage._storage[key][17] = bad
        predictor = plain_predictor()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in range(4):
                learn(predictor, buffer, n_steps=30, batch_size=64, seed=seed)
        parts = predictor.model, predictor.rew_func, predictor.val_func
        scales.append(torch.cat([part.target_scale for part in parts]))
    assert len(caught) == 1
    text = re.escape(f"{key!r}: 1 of 1000 rows is more than 100,000 times the usual spread")
    assert re.search(text + r" from the median, at storage positions 17\.", str(caught[0].message))
    torch.testing.assert_close(scales[1], scales[0], rtol=0.2, atol=0)


@pytest.mark.parametrize("rows", [[4], [4, 9, 13], list(range(0, 60, 6))])
def test_values_that_moments_take_in_are_named_too(rows):
    """Of 60 rows one is no rare one; a warning said that it was left out, or nothing."""
    buffer = linear_buffer(60)
    for row in rows:
        buffer.storage._storage["next", "observation"][row] = 1e8 * (1 + row)
    with pytest.warns(UserWarning, match=rf"{len(rows)} of 60 rows (is|are) more than 100,000 tim"):
        learn(plain_predictor(), buffer, n_steps=5, batch_size=64)


def test_everything_that_is_wrong_is_named():
    bad = {"action": {3: torch.inf}, ("next", "reward"): {5: torch.nan}}
    buffer = buffer_with(bad | {("next", "observation"): {7: 1e33}})
    with pytest.warns(UserWarning) as caught:
        learn(plain_predictor(), buffer, n_steps=9, batch_size=200)
    text = str(caught[0].message)
    assert "'action': 1 of 200 rows is not finite, at storage positions 3." in text
    assert "reward'): 1 of 200 rows is not finite, at storage positions 5." in text
    assert "observation'): 1 of 200 rows is too large, at storage positions 7." in text
