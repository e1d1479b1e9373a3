"""Checks of what parts return: what passes, and what they say of the rest."""

import pytest
import torch

from layeredrl_trl.modules import ParticlePrediction
from layeredrl_trl.modules.outputs import check_output, check_prediction


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
