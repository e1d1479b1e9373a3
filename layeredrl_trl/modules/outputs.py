"""Checks of what a part returned, for parts that a user may have written.

A tensor of another shape would be broadcast: a wrong number and no error. Only shapes are compared,
so no check waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_trl.modules.particles import ParticlePrediction


def check_output(what: str, x: Any, shape: Sequence[int]) -> None:
    """Check that an output, named ``what`` in the error, is a tensor of ``shape``.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if its shape is another one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{what} must be a tensor of shape {[*shape]}, got {x!r} ({type(x).__name__})."
        )
    if x.shape != tuple(shape):
        raise ValueError(f"{what} must have shape {[*shape]}, got {list(x.shape)}.")


def check_prediction(
    owner: str, prediction: Any, rows: Sequence[int], n_modes: int, latent_state_dim: int
) -> None:
    """Check the prediction that ``predict_particles`` of ``owner`` returned.

    Args:
        owner: name of the class, for the error.
        prediction: what was returned.
        rows: shape of the particles, ``[..., E, P]``, or ``[..., 1, P]`` with ``member``.
        n_modes: ``M``.
        latent_state_dim: ``D``.

    Raises:
        TypeError: if it is no :class:`ParticlePrediction` of tensors.
        ValueError: if the shape of one of these does not fit.
    """
    if not isinstance(prediction, ParticlePrediction):
        raise TypeError(
            f"{owner}.predict_particles must return a ParticlePrediction, got "
            f"{type(prediction).__name__}."
        )
    modes = (*rows, n_modes)
    gaussians = (*modes, latent_state_dim)
    expected = (gaussians, gaussians, modes, (*rows, 1))
    for name, x, shape in zip(prediction._fields, prediction, expected, strict=True):
        if not isinstance(x, Tensor) or x.shape != shape:
            check_output(f"{owner}.predict_particles: {name}", x, shape)


def dtype_of(module: Any) -> torch.dtype | None:
    """Return the dtype of a module's first floating-point parameter; ``None`` if there is none."""
    if not isinstance(module, nn.Module):
        return None
    # `parameters()` takes twice as long, and this is asked a dozen times in a step
    for p in module._parameters.values():
        if p is not None and p.is_floating_point():
            return p.dtype
    dtypes = (dtype_of(part) for part in module._modules.values())
    return next((dtype for dtype in dtypes if dtype is not None), None)


def in_dtype_of(module: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast floating-point tensors to the dtype of a module, which a user may have made."""
    dtype = dtype_of(module)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)


def as_float32(x: Tensor) -> Tensor:
    """Cast a floating-point output to float32, in which the library computes."""
    return x.to(torch.float32) if x.is_floating_point() else x


def check_std(name: str, std: Tensor, shape: Sequence[int]) -> None:
    """Check standard deviations that are to be broadcast.

    Raises:
        ValueError: if they do not broadcast to ``shape``, or one is not positive and finite.
    """
    if not broadcasts_to(std.shape, shape):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {list(shape)}, got {list(std.shape)}."
        )
    if not ((std > 0) & std.isfinite()).all():
        raise ValueError(f"{name}: every standard deviation must be positive and finite.")


def broadcasts_to(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Tell whether a tensor of one shape broadcasts to another one."""
    sizes = zip(shape[::-1], expected[::-1], strict=False)
    return len(shape) <= len(expected) and all(size in (1, other) for size, other in sizes)
