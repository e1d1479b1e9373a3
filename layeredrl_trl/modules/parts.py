"""Do encoder, dynamics, reward and value fit together?"""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey, unravel_key
from tensordict.nn import TensorDictModuleBase

from layeredrl_trl.modules.dynamics import DynamicsModel
from layeredrl_trl.modules.encoders import Encoder
from layeredrl_trl.modules.heads import LatentFunction


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


def check_parts(owner: str, encoder: Encoder, dynamics: DynamicsModel) -> None:
    """Check that encoder and dynamics of ``owner`` are such, and that their sizes are the same.

    Raises:
        TypeError: if ``encoder`` is no :class:`Encoder` or ``dynamics`` no :class:`DynamicsModel`.
        ValueError: naming the size that differs.
    """
    check_kinds(owner, encoder=(encoder, Encoder), dynamics=(dynamics, DynamicsModel))
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

    ``heads`` are given by name of the argument of ``owner``. Nothing is checked of ``None`` and of
    one that does not know its dims, such as a plain function.

    Raises:
        ValueError: naming the argument and both sizes.
    """
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
