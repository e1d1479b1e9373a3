"""Checks of what a part returned, for parts that a user may have written.

A tensor of another shape would be broadcast: a wrong number and no error. Only shapes are compared,
so no check waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

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


def broadcasts_to(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Tell whether a tensor of one shape broadcasts to another one."""
    sizes = zip(shape[::-1], expected[::-1], strict=False)
    return len(shape) <= len(expected) and all(size in (1, other) for size, other in sizes)
