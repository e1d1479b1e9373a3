"""bootstrap_weights: values and moments, independence, an oracle in Python integers, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layeredrl_trl.functional import bootstrap_weights, fold_index

LOW = 2**32 - 1


def mix(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x31848BAB), (17, 0x21F0AAAD)):
        x = ((x ^ (x >> shift)) * factor) & LOW
    return x ^ (x >> 16)


def fold(x: int) -> int:
    return (x ^ (x >> 32)) & LOW


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.long, torch.int32])
def test_shape_and_values(shape, dtype):
    weights = bootstrap_weights(torch.randint(1000, shape, dtype=dtype), 4)
    assert weights.shape == (*shape, 4) and weights.dtype == torch.float32
    assert ((weights == 0) | (weights == 2)).all()


@given(index=st.integers(0, 2**62), keep=st.sampled_from([0.1, 0.5, 0.9]))
def test_like_python_integers(index, keep):
    weights = bootstrap_weights(torch.tensor(index), 3, keep=keep)
    for member, weight in enumerate(weights.tolist()):
        hashed = mix(mix(fold(index)) ^ mix(0x9E3779B9 + member))
        assert weight == pytest.approx(1 / keep if hashed < keep * 2**32 else 0.0)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("stride", [1, 64, 1000, 2**33])
def test_every_member_keeps_its_share_of_whatever_positions(keep, stride):
    n = 20_000
    weights = bootstrap_weights(stride * torch.arange(n), 5, keep=keep)
    error = 4 * ((1 - keep) / keep / n) ** 0.5
    torch.testing.assert_close(weights.mean(0), torch.ones(5), rtol=0, atol=error)


def test_members_and_neighbours_are_independent():
    n, members = 50_000, 6
    drawn = (bootstrap_weights(torch.arange(n), members) - 1).double()
    error = 4.5 / n**0.5
    between = drawn.mT @ drawn / n - torch.eye(members)
    assert between.abs().max() < error
    for lag in (1, 2, 8, 100):
        assert (drawn[lag:].mT @ drawn[:-lag] / n).abs().max() < error


def test_the_same_at_every_draw_and_for_any_number_of_members():
    index = torch.arange(100)
    few, many = bootstrap_weights(index, 2), bootstrap_weights(index.flip(0), 5)
    assert torch.equal(few, many.flip(0)[:, :2])


def test_keeping_all_weighs_all_alike():
    assert torch.equal(bootstrap_weights(torch.arange(9), 3, keep=1.0), torch.ones(9, 3))


def test_follows_no_random_state():
    state = torch.get_rng_state()
    bootstrap_weights(torch.arange(9), 3)
    assert torch.equal(state, torch.get_rng_state())


def test_positions_of_several_dims_are_told_apart():
    index = torch.cartesian_prod(torch.arange(300), torch.arange(100))
    folded = fold_index(index)
    assert folded.shape == (30_000,) and folded.unique().numel() > 29_990
    drawn = bootstrap_weights(folded, 3).reshape(300, 100, 3) - 1
    for dim in (0, 1):  # neither env nor time alone decides
        n = drawn.shape[dim]
        assert drawn.mean(dim).std().item() == pytest.approx(n**-0.5, rel=0.2)


def test_one_dim_folds_to_itself():
    index = torch.arange(5)
    assert torch.equal(fold_index(index.unsqueeze(-1)), index)


def test_captured_as_one_graph():
    index = torch.arange(50)
    compiled = torch.compile(bootstrap_weights, fullgraph=True, backend="eager")
    assert torch.equal(compiled(index, 3), bootstrap_weights(index, 3))


@pytest.mark.gpu
def test_the_same_on_the_gpu():
    index = torch.randint(2**62, (1000,))
    found = bootstrap_weights(index.cuda(), 4)
    assert found.is_cuda and torch.equal(found.cpu(), bootstrap_weights(index, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_positions_are_integers(dtype):
    for call in (lambda x: bootstrap_weights(x, 2), fold_index):
        with pytest.raises(TypeError, match="index: expected integers, got torch"):
            call(torch.zeros(3, 2, dtype=dtype))


@pytest.mark.parametrize(
    ("n_members", "keep", "message"),
    [(0, 0.5, "n_members must be at least 1"), (2, 0.0, "keep must be"), (2, 1.1, "keep must be")],
)
def test_options_out_of_range(n_members, keep, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_weights(torch.arange(3), n_members, keep)
