"""Batches: entries are read as they are stored, flat samples cut where they were put together."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.keys import INDEX, MASK, WEIGHT
from layeredrl_trl.objectives import RewardPredictorLoss, SliceKeys, Slices
from layeredrl_trl.objectives.batch import NStepReturns, as_slices, flag, per_step
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import small_parts

NAMES = SliceKeys(
    observation=("deep", "obs"),
    action="move",
    reward="gain",
    terminated=("own", "fatal"),
    mask="real",
    planned=("plan", "made"),
)


def make_steps(*batch) -> TensorDict:
    """Every entry that is read, by the names above."""
    return TensorDict(
        {
            "deep": {"obs": torch.randn(*batch, 3)},
            "move": torch.randn(*batch, 2),
            "next": {
                "deep": {"obs": torch.randn(*batch, 3)},
                "gain": torch.randn(*batch, 1),
                "own": {"fatal": torch.rand(*batch, 1) < 0.5},
            },
            "real": torch.rand(*batch, 1) < 0.5,
            "plan": {"made": torch.rand(*batch, 1) < 0.5},
            WEIGHT: torch.rand(*batch, 1),
            INDEX: torch.randint(9, batch),
        },
        batch_size=batch,
    )


STORED_AS = {
    "observation": ("deep", "obs"),
    "action": "move",
    "next_observation": ("next", "deep", "obs"),
    "terminated": ("next", "own", "fatal"),
    "reward": ("next", "gain"),
    "mask": "real",
    "planned": ("plan", "made"),
    "weight": WEIGHT,
    "index": INDEX,
}


# --- reading


@pytest.mark.parametrize("batch", [(4,), (4, 2)])
def test_entries_are_read_by_their_names(batch):
    steps = make_steps(*batch)
    slices = Slices.read(steps, NAMES)
    for field, key in STORED_AS.items():
        assert torch.equal(getattr(slices, field), steps[key]), field
    assert slices.returns is None


def test_the_end_keys_are_beside_terminated():
    assert NAMES.end_keys == [
        ("next", "own", "fatal"),
        ("next", "own", "done"),
        ("next", "own", "truncated"),
    ]


@pytest.mark.parametrize("field", ["planned", "weight", "index"])
def test_what_is_not_stored_and_optional_is_none(field):
    slices = Slices.read(make_steps(4, 2).exclude(STORED_AS[field]), NAMES)
    assert getattr(slices, field) is None


@pytest.mark.parametrize("field", ["reward", "mask"])
def test_what_is_not_asked_for_need_not_be_there(field):
    steps = make_steps(4, 2)
    assert getattr(Slices.read(steps, NAMES, **{f"with_{field}": False}), field) is None
    without = steps.exclude(STORED_AS[field])
    assert getattr(Slices.read(without, NAMES, **{f"with_{field}": False}), field) is None
    with pytest.raises(KeyError, match=r"The batch has no .*; it has"):
        Slices.read(without, NAMES)


@pytest.mark.parametrize("field", ["observation", "action", "next_observation", "terminated"])
def test_a_missing_entry_is_named(field):
    key = STORED_AS[field]
    steps = make_steps(5).exclude(key)
    with pytest.raises(KeyError, match=r"batch has no .*; it has ") as error:
        Slices.read(steps, NAMES)
    missing, there = error.value.args[0].split("; it has ")
    assert str(key) in missing and there == f"{sorted(map(str, steps.keys(True, True)))}."


@pytest.mark.parametrize("field", ["terminated", "reward", "mask", "planned"])
def test_a_per_step_entry_without_its_trailing_one_is_refused(field):
    steps = make_steps(5, 2)
    key = STORED_AS[field]
    steps.set(key, steps[key].squeeze(-1))
    with pytest.raises(ValueError, match=r"expected shape \[5, 2, 1\] .*, got \[5, 2\]"):
        Slices.read(steps, NAMES)


@pytest.mark.parametrize("field", ["terminated", "mask", "planned"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flags_that_are_stored_as_numbers_are_read_as_flags(field, dtype):
    steps = make_steps(5, 2)
    key = STORED_AS[field]
    expected = steps[key]
    steps.set(key, expected.to(dtype))
    found = getattr(Slices.read(steps, NAMES), field)
    assert found.dtype == torch.bool and torch.equal(found, expected)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float64]
)
def test_rewards_of_less_than_32_bits_become_float32(dtype):
    steps = make_steps(4)
    steps.set(("next", "gain"), torch.ones(4, 1, dtype=dtype))
    reward = Slices.read(steps, NAMES).reward
    assert reward.dtype is (dtype if dtype is torch.float64 else torch.float32)
    assert (reward == 1).all()


def test_an_entry_of_the_right_shape_is_given_as_it_is():
    steps = make_steps(4, 2)
    assert per_step(steps, WEIGHT) is steps[WEIGHT]
    assert flag(steps, "real") is steps["real"]


# --- parts of a batch


def make_slices(*batch) -> Slices:
    returns = NStepReturns(
        total=torch.randn(*batch, 1),
        discount=torch.rand(*batch, 1),
        bootstraps=torch.rand(*batch, 1) < 0.5,
        observation=torch.randn(*batch, 3),
        action=None,
    )
    return Slices.read(make_steps(*batch), NAMES)._replace(returns=returns)


def assert_same(one, other):
    for name in one._fields:
        x, y = getattr(one, name), getattr(other, name)
        if isinstance(x, NStepReturns):
            assert_same(x, y)
        else:
            assert (x is None and y is None) or torch.equal(x, y), name


def test_the_first_steps_are_transitions():
    slices = make_slices(4, 2)._replace(returns=None, weight=None)
    steps = TensorDict(slices._asdict(), batch_size=[4, 2])
    assert_same(slices.first, Slices(**steps[:, 0].to_dict()))


@pytest.mark.parametrize("n", [1, 3])
def test_pieces_are_the_rows_in_order(n):
    slices = make_slices(6, 2)._replace(weight=None)
    pieces = list(slices.split(n))
    assert len(pieces) == n
    for i, piece in enumerate(pieces):
        assert isinstance(piece, Slices) and piece.weight is None
        rows = slice(i * 6 // n, (i + 1) * 6 // n)
        returns = NStepReturns(*(None if x is None else x[rows] for x in slices.returns))
        plain = slices._replace(returns=None)
        expected = Slices(*(None if x is None else x[rows] for x in plain))
        assert_same(piece, expected._replace(returns=returns))


@pytest.mark.parametrize("n", [1, 3])
def test_pieces_are_contiguous(n):
    """They are compiled and recorded for their strides, and copied together if these agree."""
    slices = make_slices(6)._replace(observation=torch.randn(6, 9)[:, 2:5])
    for piece in slices.split(n):
        tensors = [*piece._replace(returns=None), *piece.returns]
        assert all(x is None or x.is_contiguous() for x in tensors)


# --- from flat samples to slices


def sample(mask, index=None) -> TensorDict:
    data = {MASK: torch.tensor(mask).bool().unsqueeze(-1)}
    if index is not None:
        data["index"] = torch.tensor(index)
    return TensorDict(data, batch_size=[len(mask)])


def cut(slice_len, mask, index=None):
    return as_slices(sample(mask, index), slice_len, [MASK], SliceKeys())


@pytest.mark.parametrize(
    ("mask", "index"),
    [
        ([1, 1, 1, 1, 1, 1], None),
        ([1, 0, 0, 1, 1, 0], None),
        ([0, 0, 0, 1, 1, 1], None),
        ([1, 1, 1, 1, 1, 1], [4, 5, 6, 3, 4, 5]),
        ([1, 1, 0, 1, 0, 0], [4, 5, 5, 3, 3, 3]),
        ([1, 1, 1, 1, 1, 0], [8, 9, 0, 9, 0, 0]),  # a ring of 10
        ([1, 1, 1, 1, 1, 1], [[4, 0], [5, 0], [6, 0], [7, 1], [8, 1], [9, 1]]),
        ([1, 1, 1, 1, 1, 1], [[4, 0], [8, 0], [6, 0], [7, 1], [8, 1], [9, 1]]),  # not looked at
    ],
)
def test_slices_as_the_sampler_draws_them_are_cut(mask, index):
    assert cut(3, mask, index).batch_size == (2, 3)


@pytest.mark.parametrize(
    ("mask", "index"),
    [
        ([1, 0, 1, 1, 1, 1], None),
        ([1, 1, 0, 0, 1, 0], None),
        ([1, 1, 1, 1, 1, 1], [4, 5, 9, 10, 2, 3]),
        ([1, 1, 1, 1, 1, 1], [4, 5, 2, 3, 7, 8]),
        ([1, 1, 1, 1, 1, 1], [[4], [5], [2], [3], [7], [8]]),
    ],
)
def test_slices_of_another_length_were_joined_where_sizes_divide(mask, index):
    with pytest.raises(ValueError, match=r"slice_len=3 steps joins .* another slice length"):
        cut(3, mask, index)


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("capacity", [60, 37])
def test_no_sample_of_the_right_length_is_refused(ndim, capacity):
    sampler = TransitionSliceSampler(slice_len=4)
    toy = filled_buffer(60, capacity=capacity, ndim=ndim)
    buffer = TensorDictReplayBuffer(storage=toy.buffer.storage, sampler=sampler)
    for _ in range(20):
        drawn = buffer.sample(400)
        assert drawn["index"].shape == (400, ndim)
        assert as_slices(drawn, 4, [MASK], SliceKeys()).batch_size == (100, 4)


@pytest.mark.parametrize("slice_len", [2, 6])
@pytest.mark.parametrize("ends", [None, [(100, True)]])
def test_the_loss_refuses_slices_of_another_length(slice_len, ends):
    dynamics, value, reward, encoder = small_parts(None)
    loss = RewardPredictorLoss(encoder, dynamics, reward, value, n_steps=4)
    sampler = TransitionSliceSampler(slice_len=slice_len)
    toy = filled_buffer(60, ends, sampler=sampler)
    with pytest.raises(ValueError, match=r"Give the sampler slice_len=4 \(loss.slice_len\)"):
        loss(toy.buffer.sample(240))


@pytest.mark.parametrize("buffer", [ReplayBuffer, TensorDictReplayBuffer])
def test_a_sample_without_mask_is_told_of_the_sampler(buffer):
    dynamics, value, reward, encoder = small_parts(None)
    loss = RewardPredictorLoss(encoder, dynamics, reward, value, n_steps=3)
    plain = buffer(storage=LazyTensorStorage(60))
    plain.extend(filled_buffer().data.squeeze(1))
    with pytest.raises(KeyError, match=r"TransitionSliceSampler\(slice_len=3\).*the batch has no"):
        loss(plain.sample(30))


def test_padding_repeats_the_last_real_step():
    length = 4
    mask = torch.arange(length) < torch.tensor([[4], [2], [0]])
    steps = TensorDict({MASK: mask.unsqueeze(-1), "x": torch.randn(3, length, 2)}, [3, length])
    at = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1], [0, 1, 2, 3]])
    expected = steps["x"][torch.tensor([0, 1, 0])[:, None], at]
    expected[2] = steps["x"][0, 0]  # of another slice, as this one holds no real step
    steps["x"][~mask] = torch.nan
    real = as_slices(steps, length, [MASK, "x"], SliceKeys())
    assert torch.equal(real["x"], expected)
    assert torch.equal(real[MASK], steps[MASK])
    assert torch.equal(steps["x"].isnan().all(-1), ~mask)  # the sample itself stays


@pytest.mark.parametrize("shape", [(7,), (3, 2), (2, 3, 3)])
def test_what_is_no_slices_is_refused(shape):
    steps = TensorDict({MASK: torch.ones(*shape, 1).bool()}, batch_size=shape)
    with pytest.raises(ValueError, match=rf"slice_len=3 .*got batch size \[{shape[0]}"):
        as_slices(steps, 3, [MASK], SliceKeys())
