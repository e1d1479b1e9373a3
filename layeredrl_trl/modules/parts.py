"""Do encoder, dynamics, reward and value fit together?"""

from __future__ import annotations

from itertools import chain
from typing import Any

from tensordict import NestedKey, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import nn

from layeredrl_trl.checks import check_count
from layeredrl_trl.modules.dynamics import DynamicsModel
from layeredrl_trl.modules.encoders import Encoder
from layeredrl_trl.modules.heads import LatentFunction

_COUNTS = (
    "n_models",
    "n_modes",
    "n_particles_per_model",
    "latent_state_dim",
    "context_dim",
    "action_dim",
)
"""Attributes that every dynamics model has."""


def check_kinds(owner: str, **parts: tuple[Any, type]) -> None:
    """Check the classes of parts, given by name of the argument with the class it must be of.

    Raises:
        TypeError: naming ``owner``, what they were handed to, and the first of another class.
    """
    for name, (part, kind) in parts.items():
        if not isinstance(part, kind):
            raise TypeError(
                f"{owner}: {name}: expected a {kind.__name__}, got {type(part).__name__}."
            )


def check_counts_of(owner: str, dynamics: DynamicsModel) -> None:
    """Check the numbers that a dynamics model, maybe a user's own, has as attributes.

    Raises:
        TypeError: if one is missing or no integer.
        ValueError: if one is below 1 (``context_dim``: below 0).
    """
    kind = type(dynamics).__name__
    for name in _COUNTS:
        if not hasattr(dynamics, name):
            raise TypeError(f"{owner}: {kind} must set {name}, see layeredrl_trl.DynamicsModel.")
        least = 0 if name == "context_dim" else 1
        check_count(f"{owner}: {name} of {kind}", getattr(dynamics, name), least)


def check_precision_of(owner: str, **parts: Any) -> None:
    """Check that no part of ``owner``, given by name of the argument, is of half precision.

    Only modules of this library are looked at: what a user's own modules read is cast to the dtype
    of their parameters.

    Raises:
        TypeError: naming the argument, the tensor and its dtype.
    """
    for argument, part in parts.items():
        modules = part.named_modules() if isinstance(part, nn.Module) else ()
        for path, module in modules:
            if type(module).__module__.partition(".")[0] != __name__.partition(".")[0]:
                continue
            for name, x in chain(module._parameters.items(), module._buffers.items()):
                if x is not None and x.is_floating_point() and x.dtype.itemsize < 4:
                    raise TypeError(
                        f"{owner}: {argument} must be of float32 or float64, but "
                        f"{f'{path}.{name}'.lstrip('.')} is of {x.dtype}; convert it by float()."
                    )


def check_parts(owner: str, encoder: Encoder, dynamics: DynamicsModel) -> None:
    """Check that encoder and dynamics of ``owner`` are such, and that their sizes are the same.

    Raises:
        TypeError: if ``encoder`` is no :class:`Encoder` or ``dynamics`` no :class:`DynamicsModel`.
        TypeError, ValueError: if a number that ``dynamics`` has as attribute is none.
        ValueError: naming the size that differs.
    """
    check_kinds(owner, encoder=(encoder, Encoder), dynamics=(dynamics, DynamicsModel))
    check_counts_of(owner, dynamics)
    for name in ("latent_state_dim", "context_dim"):
        given, expected = getattr(encoder, name), getattr(dynamics, name)
        if given != expected:
            what = name.split("_")[0]
            raise ValueError(f"{owner}: encoder has {given} {what} dims, dynamics {expected}.")


def check_heads(
    owner: str,
    encoder: Encoder,
    dynamics: DynamicsModel,
    **heads: TensorDictModuleBase | None,
) -> None:
    """Check that rewards and values read latent states, contexts and actions of the right size.

    ``heads`` are given by name of the argument of ``owner``. No size is checked of ``None`` and of
    one that does not know its dims, such as a plain function. No part may be of half precision.

    Raises:
        TypeError: if a part is, see :func:`check_precision_of`.
        ValueError: naming the argument and both sizes.
    """
    check_precision_of(owner, encoder=encoder, dynamics=dynamics, **heads)
    latent, context = encoder.out_keys
    sizes: dict[NestedKey, tuple[str, int]] = {
        unravel_key(latent): ("latent", dynamics.latent_state_dim),
        unravel_key(("next", latent)): ("latent", dynamics.latent_state_dim),
        unravel_key(context): ("context", dynamics.context_dim),
        unravel_key(dynamics.in_keys[2]): ("action", dynamics.action_dim),
    }
    for argument, head in heads.items():
        dims = head.dims if isinstance(head, LatentFunction) else None
        for key, dim in zip(head.in_keys, dims, strict=False) if dims else ():
            name, size = sizes.get(unravel_key(key), ("", dim))
            if dim != size:
                raise ValueError(
                    f"{owner}: {argument} reads {dim} {name} dims, the dynamics have {size}."
                )
