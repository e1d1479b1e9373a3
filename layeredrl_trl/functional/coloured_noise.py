"""Noise whose power falls with frequency: smooth random action sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def colouring_matrix(
    beta: float,
    horizon: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Make the linear map that turns white noise into noise of power spectrum ``1 / f^beta``.

    The columns are the real Fourier basis of ``H`` steps. The sine and cosine of frequency
    ``f = k / H`` are scaled by ``f^{-beta/2}``, the constant like the lowest frequency ``1 / H``.
    The rows have length 1, so standard normal numbers stay standard normal at every step. The noise
    is one period of a periodic signal: the last step is as close to the first as to the one before.

    Args:
        beta: exponent; 0 is white, 1 pink and 2 brown noise.
        horizon: number of steps ``H``, at least 1.
        dtype: a floating point dtype; torch's default if ``None``.
        device: torch's default if ``None``.

    Returns:
        ``[H, H]``, for ``matrix @ white`` with white noise ``[..., H, A]``.

    Raises:
        ValueError: if ``horizon`` < 1 or ``beta`` is not finite.

    Reference:
        Timmer and König (1995), On generating power law noise, Astron. Astrophys. 300, 707-710.
        Deviation from the package ``colorednoise``: unit variance is exact. The package leaves the
        constant out of the variance by which it divides (1.33 remains for ``beta=2``, ``H=20``).
        Pinneri et al. (2020), arXiv:2008.06389, use such noise in a planner.

    Example:
        >>> colouring_matrix(2.0, 20).square().sum(-1).allclose(torch.ones(20))
        True
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}.")
    if not math.isfinite(beta):
        raise ValueError(f"beta must be a finite number, got {beta}.")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    real = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
    time = torch.arange(horizon, **real).unsqueeze(-1)
    frequency = torch.arange(1, (horizon - 1) // 2 + 1, **real) / horizon
    # Amplitudes are relative to that of the lowest frequency, so that no power overflows.
    scale = math.sqrt(2) * (frequency * horizon) ** (-beta / 2)
    angle = 2 * math.pi * time * frequency
    columns = [torch.ones_like(time), scale * angle.cos(), -scale * angle.sin()]
    if horizon % 2 == 0:  # the highest frequency has no sine
        columns.append((1 - 2 * (time % 2)) * (horizon / 2) ** (-beta / 2))
    matrix = torch.cat(columns, -1)
    return (matrix / matrix.square().sum(-1, keepdim=True).sqrt()).to(dtype)


def colour(white: Tensor, matrix: Tensor) -> Tensor:
    """Apply a :func:`colouring_matrix` ``[H, H]`` to white noise ``[..., H, A]``."""
    return (white.mT @ matrix.mT).mT
