"""RunningMoments: exact averages of the first batches, masks, non-finite batches, constant dims."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layeredrl_trl.acceleration.host_reads import without_reading
from layeredrl_trl.modules import RunningMoments
from tests.oracles import moments_of

NAN = float("nan")


def state_of(moments):
    return {key: x.clone() for key, x in moments.state_dict().items()}


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_batch_shape(batch):
    moments = RunningMoments(4)
    samples = torch.randn(*batch, 4)
    moments.update(samples)
    assert moments.count == 1 and moments.mean.shape == moments.var.shape == (4,)
    torch.testing.assert_close(moments.mean, samples.reshape(-1, 4).mean(0))
    assert moments.standardize(samples).shape == samples.shape
    assert moments.std(floor=1e-4).shape == (4,)


def test_float64_samples_leave_the_buffers_in_float32():
    moments = RunningMoments(2)
    moments.update(torch.randn(5, 2, dtype=torch.float64))
    assert moments.mean.dtype == moments.var.dtype == torch.float32


def test_before_the_first_batch_nothing_is_scaled():
    x = torch.randn(5, 2)
    assert torch.equal(RunningMoments(2).standardize(x), x)


@pytest.mark.parametrize("n_batches", [1, 2, 7, 10])
def test_first_batches_are_averaged_exactly(n_batches):
    batches = 5 + 3 * torch.randn(n_batches, 6, 3) + torch.randn(n_batches, 1, 3)
    moments = RunningMoments(3, rate=0.1)
    for batch in batches:
        moments.update(batch)
    mean, var = moments_of(batches.flatten(0, 1))
    torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.var.double(), var, rtol=1e-5, atol=1e-5)


def test_later_batches_are_averaged_exponentially():
    rate, moments = 0.25, RunningMoments(1, rate=0.25)
    batches = torch.randn(12, 6, 1)
    for batch in batches:
        moments.update(batch)
    weights = [(1 - rate) ** 8 / 4] * 4 + [rate * (1 - rate) ** (7 - i) for i in range(8)]
    assert sum(weights) == pytest.approx(1)
    mean = sum(w * b.double().mean() for w, b in zip(weights, batches, strict=True))
    square = sum(w * b.double().square().mean() for w, b in zip(weights, batches, strict=True))
    assert moments.mean.item() == pytest.approx(mean.item(), abs=1e-6)
    assert moments.var.item() == pytest.approx((square - mean**2).item(), rel=1e-5)


def test_far_from_0_no_digits_are_lost():
    moments = RunningMoments(1)
    for _ in range(20):
        moments.update(1000 + torch.randn(4000, 1))
    assert moments.var.item() == pytest.approx(1, rel=0.02)


@given(seed=st.integers(0, 1000), garbage=st.sampled_from([NAN, float("inf"), 1e30]))
def test_masked_garbage_changes_nothing(seed, garbage):
    torch.manual_seed(seed)
    samples, mask = torch.randn(4, 5, 2), torch.rand(4, 5) < 0.6
    mask[0, 0] = True
    masked, only = RunningMoments(2), RunningMoments(2)
    masked.update(torch.where(mask[..., None], samples, garbage), mask)
    only.update(samples[mask])
    torch.testing.assert_close(masked.mean, only.mean)
    torch.testing.assert_close(masked.var, only.var)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_a_non_finite_batch_changes_nothing(bad):
    moments = RunningMoments(2)
    moments.update(torch.randn(5, 2))
    before = state_of(moments)
    batch = torch.randn(5, 2)
    batch[3, 1] = bad
    moments.update(batch)
    assert all(torch.equal(x, before[key]) for key, x in moments.state_dict().items())


def test_a_batch_without_real_steps_changes_nothing():
    moments = RunningMoments(2)
    before = state_of(moments)
    moments.update(torch.randn(5, 2), torch.zeros(5).bool())
    assert all(torch.equal(x, before[key]) for key, x in moments.state_dict().items())


def test_standardized_samples_have_mean_0_and_deviation_1():
    samples = torch.tensor([3.0, -10.0]) + torch.tensor([0.01, 50.0]) * torch.randn(500, 2)
    moments = RunningMoments(2)
    moments.update(samples)
    mean, var = moments_of(moments.standardize(samples))
    torch.testing.assert_close(mean, torch.zeros(2).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(var, torch.ones(2).double(), rtol=1e-3, atol=0)


def test_a_constant_dim_is_shifted_but_not_blown_up():
    moments = RunningMoments(2)
    moments.update(torch.tensor([[7.0, 0.0], [7.0, 2.0]]))
    out = moments.standardize(torch.tensor([[7.0, 1.0], [7.5, 3.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0], [0.5, 2.0]]))
    assert moments.std(floor=0.1).tolist() == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("constant", [0.1, 1000.1, 3333333.33, -1e-7])
def test_what_never_changes_has_no_variance_at_all(constant, masked):
    """The mean of equal numbers is off by a bit, its square may be above the floor of scales."""
    moments = RunningMoments(1)
    for n in (257, 64, 1, 131, 300):
        samples, mask = torch.full((n, 1), constant), None
        if masked:
            mask = torch.arange(n) % 3 != 1
            samples[~mask] = NAN
        moments.update(samples, mask)
        assert moments.var == 0 and moments.mean == samples[0]
    assert moments.divisor() == 1


@pytest.mark.parametrize("masked", [False, True])
def test_variance_far_from_0(masked):
    samples = 1e5 + 0.1 * torch.randn(500, 3)
    mask = torch.rand(500) < 0.5 if masked else None
    moments = RunningMoments(3)
    moments.update(samples, mask)
    _, var = moments_of(samples if mask is None else samples[mask])
    torch.testing.assert_close(moments.var.double(), var, rtol=1e-4, atol=0)


def test_statistics_carry_no_gradient_but_standardize_does():
    moments, x = RunningMoments(2), torch.randn(5, 2, requires_grad=True)
    moments.update(x)
    assert not moments.mean.requires_grad and not moments.var.requires_grad
    moments.standardize(x).sum().backward()
    torch.testing.assert_close(x.grad, (1 / moments.var.sqrt()).expand(5, 2))


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]"):
        RunningMoments(2, rate=rate)


@pytest.mark.parametrize("rate", [True, "0.1", None, float("nan")])
def test_a_rate_that_is_no_number(rate):
    error = ValueError if isinstance(rate, float) else TypeError
    with pytest.raises(error, match="RunningMoments: rate must be"):
        RunningMoments(2, rate=rate)


@pytest.mark.parametrize("dim", [True, 2.0, 0])
def test_a_number_of_dims_that_is_none(dim):
    error = TypeError if type(dim) is not int else ValueError
    with pytest.raises(error, match="RunningMoments: dim must be"):
        RunningMoments(dim)


@pytest.mark.parametrize(
    ("samples", "mask", "message"),
    [
        ((5, 1), None, r"samples: expected shape \[5, 4\], got \[5, 1\]"),
        ((5, 3), None, r"samples: expected shape \[5, 4\], got \[5, 3\]"),
        ((5, 4), (1,), r"mask: expected shape \[5\], got \[1\]"),
        ((5, 4), (5, 1), r"mask: expected shape \[5\], got \[5, 1\]"),
    ],
)
def test_no_broadcasting(samples, mask, message):
    moments = RunningMoments(4)
    with pytest.raises(ValueError, match=message):
        moments.update(torch.zeros(samples), None if mask is None else torch.ones(mask).bool())
    assert moments.count == 0


def test_state_dict_round_trip():
    moments, other = RunningMoments(2), RunningMoments(2)
    moments.update(torch.randn(5, 2))
    other.load_state_dict(moments.state_dict())
    batch = torch.randn(5, 2)
    moments.update(batch)
    other.update(batch)
    assert all(torch.equal(x, other.state_dict()[key]) for key, x in moments.state_dict().items())


@pytest.mark.parametrize("unit", [2.0**-40, 3e-5, 1.0, 2.0**40])
def test_a_small_unit_is_not_taken_for_a_constant(unit):
    moments, plain = RunningMoments(2), RunningMoments(2)
    for _ in range(3):
        samples = torch.randn(50, 2)
        moments.update(samples * unit)
        plain.update(samples)
    torch.testing.assert_close(moments.divisor() / unit, plain.divisor())
    torch.testing.assert_close(moments.standardize(samples * unit), plain.standardize(samples))


def test_rounding_of_a_large_number_is_no_change():
    """Numbers next to 1e6 in float32 are 0.06 apart."""
    moments, large = RunningMoments(1), torch.tensor(1e6)
    neighbours = torch.stack([large, torch.nextafter(large, 2 * large)])
    moments.update(neighbours.repeat(50)[:, None])
    assert moments.divisor() == 1 and moments.spread(unchanged=0.5) == 0.5


FAULTS = [1e6, -1e8, 1e12]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
def test_one_huge_value_in_1000_rows_does_not_hide_what_the_others_vary_by(first, fault, masked):
    data = torch.randn(1000, 2) * torch.tensor([0.3, 3.0]) + torch.tensor([5.0, 0.0])
    _, var = moments_of(data)
    data[17, 0] = fault
    moments = RunningMoments(2)
    if not first:
        moments.update(data[100:200])
    for i in range(50):
        rows = torch.cat([torch.tensor([17]), torch.randint(1000, (255,))])
        rows = rows if i == 0 or i % 4 == 1 else rows[rows != 17]
        mask = torch.rand(len(rows)) < 0.9 if masked else None
        moments.update(data[rows], mask)
    assert moments.count == 50 + (not first)
    torch.testing.assert_close(moments.var.double(), var, rtol=0.1, atol=0)


def test_a_stream_that_really_changes_is_followed():
    moments = RunningMoments(1)
    moments.update(1e-6 * torch.randn(256, 1))
    samples = torch.where(torch.rand(256, 1) < 0.1, torch.randn(256, 1), 0.0)
    moments.update(samples)
    assert moments.var.item() == pytest.approx(samples.var(correction=0).item() / 2, rel=0.1)


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
def test_a_rare_event_in_a_dim_that_is_constant_otherwise_counts(first):
    """A sparse reward, say: nothing tells how large its usual values are."""
    moments, samples = RunningMoments(1), torch.zeros(256, 1)
    if not first:
        moments.update(samples)
    samples[3] = 1e6
    moments.update(samples)
    assert moments.var.item() > 1e12 / 256 / 2.1


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
def test_a_batch_whose_mean_is_huge_does_not_stop_all_later_ones(first):
    moments = RunningMoments(1)
    if not first:
        moments.update(torch.randn(50, 1))
    for huge in (1e20, 3e19, -1e38):
        before = state_of(moments)
        moments.update(torch.full((50, 1), huge))
        assert all(torch.equal(x, before[key]) for key, x in moments.state_dict().items())
    moments.update(torch.randn(50, 1))
    assert 0.5 < moments.var.item() < 2 and moments.count == 1 + (not first)


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
def test_moments_are_the_same_where_nothing_may_be_read(first):
    read, unread = RunningMoments(3), RunningMoments(3)
    batches = torch.randn(4, 200, 3)
    batches[1:, 7, 0] = 1e9
    start = [] if first else [batches[0]]
    for moments in (read, unread):
        for batch in start:
            moments.update(batch)
    for batch in batches[1:]:
        read.update(batch)
        with without_reading():
            unread.update(batch)
    for key, x in read.state_dict().items():
        torch.testing.assert_close(unread.state_dict()[key], x)


def test_loaded_moments_go_on_from_where_they_were():
    moments, other = RunningMoments(1), RunningMoments(1)
    moments.update(torch.randn(100, 1))
    assert not other.has_started
    other.load_state_dict(moments.state_dict())
    assert other.has_started
    other.load_state_dict(RunningMoments(1).state_dict())
    assert not other.has_started


@pytest.mark.parametrize("share", [0.006, 0.01])
def test_rare_events_that_recur_are_no_faults(share):
    """A reward of 1 in 0.6% of the steps, 1e6 times larger than the others, was never learned."""
    moments = RunningMoments(1)
    for _ in range(60):
        events = torch.rand(256, 1) < share
        moments.update(torch.where(events, 1.0, 1e-6 * torch.randn(256, 1)))
    assert moments.var.item() > 0.3 * share


def test_a_row_that_is_drawn_again_and_again_stays_a_fault():
    data, moments = torch.randn(1000, 1), RunningMoments(1)
    data[17] = 1e8
    for _ in range(400):
        moments.update(data[torch.randint(1000, (64,))])
    assert moments.var.item() < 2 and moments.n_far > 5


def test_a_first_batch_that_was_undone_is_the_first_one_again():
    """The host went on believing that moments had been seen."""
    moments = RunningMoments(1)
    before = {key: x.clone() for key, x in moments.named_buffers()}
    for _ in range(2):
        moments.update(1e-6 * torch.randn(50, 1))
        assert moments.has_started
    for key, x in moments.named_buffers():
        x.copy_(before[key])
    assert not moments.has_started


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_identically(how):
    moments = RunningMoments(2)
    moments.update(torch.randn(9, 2))
    other, batch = how(moments).double().float(), torch.randn(9, 2)
    moments.update(batch)
    other.update(batch)
    assert all(torch.equal(x, other.state_dict()[key]) for key, x in moments.state_dict().items())
