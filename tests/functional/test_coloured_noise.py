"""Coloured noise: shapes, the package `colorednoise` on the same numbers, moments and spectrum."""

import colorednoise
import numpy as np
import pytest
import torch

from layeredrl_trl.functional import colour, colouring_matrix
from tests.oracles import power_law_noise

BETAS = [0.0, 0.5, 1.0, 2.0, 3.5]
HORIZONS = [1, 2, 3, 4, 7, 20, 31]

# ---- contract


def coloured_noise(beta, shape, **like):
    return colour(torch.randn(shape, **like), colouring_matrix(beta, shape[-2], **like))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("horizon", [1, 2, 5, 6])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_shape_and_dtype(lead, horizon, beta, dtype):
    noise = coloured_noise(beta, (*lead, horizon, 2), dtype=dtype)
    assert noise.shape == (*lead, horizon, 2) and noise.dtype == dtype
    assert noise.isfinite().all()


@pytest.mark.parametrize("horizon", HORIZONS)
def test_the_matrix_of_white_noise_is_a_rotation(horizon):
    matrix = colouring_matrix(0.0, horizon, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(horizon, dtype=torch.float64))


@pytest.mark.gpu
def test_on_the_gpu():
    noise = coloured_noise(2.0, (1000, 20, 3), device="cuda")
    assert noise.is_cuda
    assert noise.std().item() == pytest.approx(1.0, abs=0.03)


# ---- oracle


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("horizon", HORIZONS)
def test_agrees_with_a_sum_of_waves(horizon, beta):
    white = torch.randn(3, horizon, 2, dtype=torch.float64)
    noise = colour(white, colouring_matrix(beta, horizon, dtype=torch.float64))
    for i in range(3):
        for a in range(2):
            expected = power_law_noise(beta, white[i, :, a].tolist())
            torch.testing.assert_close(noise[i, :, a], expected)


class Scripted(np.random.RandomState):
    """Draws given numbers: real parts first, then imaginary parts."""

    def __init__(self, numbers):
        super().__init__(0)
        self.numbers = numbers

    def normal(self, loc=0.0, scale=1.0, size=None):
        return scale * np.reshape(self.numbers.pop(0), size)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("horizon", [2, 3, 4, 7, 20, 31])
def test_is_the_package_on_the_same_numbers_up_to_its_error_of_scale(horizon, beta):
    white = torch.randn(horizon, 1, dtype=torch.float64)
    noise = colour(white, colouring_matrix(beta, horizon, dtype=torch.float64)).flatten()
    numbers, pairs = white.flatten().numpy(), (horizon - 1) // 2
    real = np.concatenate([numbers[: 1 + pairs], numbers[1 + 2 * pairs :]])
    imaginary = np.zeros_like(real)
    imaginary[1 : 1 + pairs] = numbers[1 + pairs : 1 + 2 * pairs]
    package = colorednoise.powerlaw_psd_gaussian(
        beta, horizon, random_state=Scripted([real, imaginary])
    )
    # It divides by the standard deviation of all waves but the constant, the highest counted half.
    scale = [(k / horizon) ** (-beta / 2) for k in range(1, horizon // 2 + 1)]
    power = [4 * s**2 for s in scale]
    if horizon % 2 == 0:
        power[-1] /= 2
    true = sum(power) + 2 * scale[0] ** 2
    if horizon % 2 == 0:
        power[-1] /= 2
    torch.testing.assert_close(
        noise, torch.from_numpy(package) * (sum(power) / true) ** 0.5, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_variance_and_spectrum_of_many_draws(beta):
    noise = coloured_noise(beta, (20000, 32, 1), dtype=torch.float64).squeeze(-1)
    torch.testing.assert_close(
        noise.var(0), torch.ones(32, dtype=torch.float64), rtol=0.06, atol=0.0
    )
    package = colorednoise.powerlaw_psd_gaussian(beta, (20000, 32), random_state=0)
    power, package_power = (
        torch.fft.rfft(x).abs().square().mean(0)[1:-1] for x in (noise, torch.from_numpy(package))
    )
    frequency = torch.arange(1, 16, dtype=torch.float64) / 32
    slope = np.polyfit(frequency.log().numpy(), power.log().numpy(), 1)[0]
    assert slope == pytest.approx(-beta, abs=0.05)
    torch.testing.assert_close(
        power / power.sum(), package_power / package_power.sum(), rtol=0.08, atol=0.0
    )


# ---- property


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("horizon", [*HORIZONS, 500])
def test_covariance_is_that_of_a_stationary_process_of_unit_variance(horizon, beta):
    matrix = colouring_matrix(beta, horizon, dtype=torch.float64)
    covariance = matrix @ matrix.T
    torch.testing.assert_close(covariance.diagonal(), torch.ones(horizon, dtype=torch.float64))
    torch.testing.assert_close(covariance, covariance.roll((1, 1), (0, 1)))


@pytest.mark.parametrize("beta", [200.0, -20.0])
@pytest.mark.parametrize("horizon", [2, 20])
def test_extreme_exponents_do_not_overflow(horizon, beta):
    matrix = colouring_matrix(beta, horizon)
    assert matrix.isfinite().all()


def test_sequences_and_dims_are_independent():
    noise = coloured_noise(2.0, (2, 3, 4000, 5, 2)).movedim(2, 0).flatten(1)
    correlation = torch.corrcoef(noise.T).unflatten(1, (6, 5, 2)).unflatten(0, (6, 5, 2))
    for i in range(6):
        for j in range(6):
            for a in range(2):
                for b in range(2):
                    if (i, a) != (j, b):
                        assert correlation[i, :, a, j, :, b].abs().max() < 0.08


# ---- errors


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        colouring_matrix(1.0, 0)
    with pytest.raises(ValueError, match="beta must be a finite number, got nan"):
        colouring_matrix(float("nan"), 4)
