"""The observation that an imagined state shows, of an encoder that can decode."""

from __future__ import annotations

from torch import Tensor

from layeredrl_trl.modules import Encoder
from layeredrl_trl.modules.outputs import as_float32, in_dtype_of


def decode_first_particle(encoder: Encoder, latent: Tensor, context: Tensor) -> Tensor:
    """Decode the first particle of imagined states; a tensor of another shape would be broadcast.

    Args:
        encoder: can decode.
        latent: ``[..., E, P, D]``.
        context: ``[..., C]``.

    Returns:
        ``[..., *obs_shape]``.

    Raises:
        ValueError: if the encoder returns another shape.
    """
    observation = encoder.decode(*in_dtype_of(encoder, latent[..., 0, 0, :], context))
    expected = (*latent.shape[:-3], *encoder.obs_shape)
    if observation.shape != expected:
        raise ValueError(
            f"{type(encoder).__name__}.decode: expected observations {[*expected]}, got "
            f"{list(observation.shape)}."
        )
    return as_float32(observation)
