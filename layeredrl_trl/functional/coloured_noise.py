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

    Its columns are the real Fourier basis of ``H`` steps, the pair of frequency ``f = k / H``
    scaled by ``f^{-beta/2}``, the constant by as much as the lowest frequency ``1 / H``. Its rows
    have length 1, so standard normal numbers stay standard normal at every step.

    Args:
        beta: exponent; 0 white, 1 pink, 2 brown.
        horizon: steps ``H``, at least 1.
        dtype: floating point. Default: torch's.
        device: default: torch's.

    Returns:
        ``[H, H]``, for ``matrix @ white`` with white noise ``[..., H, A]``.

    Raises:
        ValueError: if ``horizon`` < 1 or ``beta`` is not finite.

    Reference:
        Timmer and König (1995), On generating power law noise, Astron. Astrophys. 300, 707-710.
        Deviation from the package ``colorednoise``: unit variance is exact; the package leaves the
        constant out of the variance that it divides by (it gives 1.33 for ``beta=2``, ``H=20``).

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
    # Amplitudes relative to that of the lowest frequency, so that no exponent overflows.
    scale = math.sqrt(2) * (frequency * horizon) ** (-beta / 2)
    angle = 2 * math.pi * time * frequency
    parts = [torch.ones_like(time), scale * angle.cos(), -scale * angle.sin()]
    if horizon % 2 == 0:  # the highest frequency has no sine
        parts.append((1 - 2 * (time % 2)) * (horizon / 2) ** (-beta / 2))
    matrix = torch.cat(parts, -1)
    return (matrix / matrix.square().sum(-1, keepdim=True).sqrt()).to(dtype)


def coloured_noise(
    beta: float,
    shape: tuple[int, ...] | torch.Size,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw Gaussian noise of unit variance whose power spectrum over time is ``1 / f^beta``.

    Every sequence is one period: the last step is as close to the first as to the one before.

    Args:
        beta: exponent; 0 white, 1 pink, 2 brown.
        shape: ``[..., H, A]``, time second to last; sequences are independent of each other.
        dtype: floating point. Default: torch's.
        device: default: torch's. The numbers come from torch's generator there.

    Returns:
        ``[..., H, A]``, standard normal at every step.

    Raises:
        ValueError: if ``shape`` has fewer than 2 dims, and what :func:`colouring_matrix` raises.

    Reference:
        See :func:`colouring_matrix`. Pinneri et al. (2020), arXiv:2008.06389, for its use in a
        planner.

    Example:
        >>> coloured_noise(2.0, (64, 20, 3)).shape
        torch.Size([64, 20, 3])
    """
    if len(shape) < 2:
        raise ValueError(f"shape must be [..., H, A], got {tuple(shape)}.")
    matrix = colouring_matrix(beta, shape[-2], dtype=dtype, device=device)
    white = torch.randn(shape, dtype=dtype, device=device)
    return white if beta == 0 else colour(white, matrix)


def colour(white: Tensor, matrix: Tensor) -> Tensor:
    """Apply a :func:`colouring_matrix` to white noise, as one matrix product.

    Args:
        white: ``[..., H, A]``.
        matrix: ``[H, H]``.

    Returns:
        ``[..., H, A]``.
    """
    return (white.mT @ matrix.mT).mT
