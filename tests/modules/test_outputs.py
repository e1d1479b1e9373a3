"""Checks of what parts return: what passes, and what they say of the rest."""

import pytest
import torch
from torch import nn

from layeredrl_trl.modules import ParticlePrediction
from layeredrl_trl.modules.outputs import (
    as_float32,
    check_output,
    check_prediction,
    dtype_of,
    in_dtype_of,
)


def prediction(*rows, n_modes=2, dim=3):
    shapes = [(*rows, n_modes, dim), (*rows, n_modes, dim), (*rows, n_modes), (*rows, 1)]
    return ParticlePrediction(*map(torch.zeros, shapes))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_what_fits_passes(batch):
    check_output("x", torch.zeros(*batch, 4), (*batch, 4))
    check_prediction("Model", prediction(*batch, 5, 1), torch.Size((*batch, 5, 1)), 2, 3)


def test_an_output_of_another_shape_or_kind():
    with pytest.raises(ValueError, match=r"x must have shape \[4, 1\], got \[4\]"):
        check_output("x", torch.zeros(4), (4, 1))
    with pytest.raises(TypeError, match=r"x must be a tensor of shape \[4\], got 0.5 \(float\)"):
        check_output("x", 0.5, (4,))


@pytest.mark.parametrize("field", ParticlePrediction._fields)
def test_every_field_of_a_prediction_is_checked(field):
    wrong = prediction(5, 1)._replace(**{field: torch.zeros(7)})
    with pytest.raises(ValueError, match=rf"Model.predict_particles: {field} must .*got \[7\]"):
        check_prediction("Model", wrong, (5, 1), 2, 3)


class Indexed(nn.Linear):
    """Its first parameter holds integers."""

    def __init__(self):
        super().__init__(3, 2, dtype=torch.float64)
        weight, bias = self.weight, self.bias
        del self.weight, self.bias
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)
        self.weight, self.bias = weight, bias


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        (nn.Linear(3, 2), torch.float32),
        (nn.Linear(3, 2, dtype=torch.bfloat16), torch.bfloat16),
        (Indexed(), torch.float64),
        (nn.Tanh(), None),
        (lambda x: x, None),
    ],
)
def test_inputs_get_the_dtype_of_the_parameters(module, dtype):
    assert dtype_of(module) is dtype
    numbers, index = in_dtype_of(module, torch.zeros(2), torch.arange(2))
    assert numbers.dtype is (dtype or torch.float32) and index.dtype is torch.int64


def test_only_floats_become_float32():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert as_float32(torch.zeros(2, dtype=dtype)).dtype is torch.float32
    for dtype in (torch.int64, torch.bool):
        assert as_float32(torch.zeros(2, dtype=dtype)).dtype is dtype
