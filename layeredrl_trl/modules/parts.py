"""Do encoder, dynamics, reward and value fit together?"""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey, unravel_key
from tensordict.nn import TensorDictModuleBase

from layeredrl_trl.modules.dynamics import DynamicsModel
from layeredrl_trl.modules.encoders import Encoder
from layeredrl_trl.modules.heads import LatentFunction


def check_kinds(owner: str, **parts: tuple[Any, type]) -> None:
    """Check the classes of parts.

    Args:
        owner: what they were handed to.
        parts: by the name of the argument, each with the class that it must be of.

    Raises:
        TypeError: naming the first of another class.
    """
    for name, (part, kind) in parts.items():
        if not isinstance(part, kind):
            raise TypeError(
                f"{owner}: {name}: expected a {kind.__name__}, got {type(part).__name__}."
            )


def check_parts(owner: str, encoder: Encoder, dynamics: DynamicsModel) -> None:
    """Check that encoder and dynamics are such, and that their sizes are the same.

    Args:
        owner: what they were handed to.
        encoder: of observations.
        dynamics: the model.

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

    Args:
        owner: what they were handed to.
        encoder: names the latent state and the context.
        dynamics: the model; names the action.
        heads: by the name of the argument, or ``None``. Of one that does not know its dims, as of
            a plain function, nothing is checked.

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
        for key, dim in _known_dims(head).items():
            name, size = sizes.get(key, ("", dim))
            if dim != size:
                raise ValueError(
                    f"{owner}: {argument} reads {dim} {name} dims, the dynamics have {size}."
                )


def _known_dims(head: TensorDictModuleBase | None) -> dict[NestedKey, int]:
    """Last dims of the entries that a reward or value reads, as far as it knows them."""
    dims = head.dims if isinstance(head, LatentFunction) else None
    if head is None or dims is None:
        return {}
    return dict(zip(map(unravel_key, head.in_keys), dims, strict=False))
