import pytest
import torch

from layeredrl_trl.functional import rows_with_data, zero_where_not


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("features", [(), (1,), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.long, torch.bool])
def test_what_counts_stays_and_the_rest_is_zero(shape, features, dtype):
    mask = torch.rand(shape) < 0.5
    x = torch.ones((*shape, *features), dtype=dtype)
    out = zero_where_not(mask, x)
    assert out.dtype == dtype and out.shape == x.shape
    assert torch.equal(out.reshape(*shape, -1).all(-1), mask)


def test_a_gradient_is_finite_behind_garbage():
    mask = torch.tensor([True, False])
    x = torch.tensor([2.0, torch.nan], requires_grad=True)
    (gradient,) = torch.autograd.grad(zero_where_not(mask, x).square().sum(), x)
    assert gradient.tolist() == [4.0, 0.0]


@pytest.mark.parametrize(
    ("has_data", "expected"),
    [([1, 1, 1], [0, 1, 2]), ([0, 1, 0, 1], [1, 1, 1, 3]), ([0, 0], [0, 0])],
)
def test_slices_of_padding_are_read_from_another(has_data, expected):
    mask = torch.tensor(has_data).bool()[:, None] & torch.tensor([True, False])
    assert rows_with_data(mask).tolist() == expected
