"""The state of a module without what it shares with another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class OwnState:
    """Save and restore what a module holds beside the tensors of its ``owner``.

    A planner or an exploration policy holds the predictor's parts, whose tensors the predictor
    saves. Here it saves the rest: its own tensors, and the extra state of its own modules.

    Args:
        module: the module to save.
        owner: saves the tensors that both hold.
    """

    def __init__(self, module: nn.Module, owner: nn.Module) -> None:
        self.module = module
        self.owner = owner

    def state_dict(self) -> dict[str, Any]:
        """Return the module's own entries by name."""
        names = self._names()
        return {key: x for key, x in self.module.state_dict().items() if key in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if entries are missing, unknown, or of another shape; nothing is changed
                then.
        """
        names = self._names()
        if state.keys() != names:
            raise ValueError(
                f"{type(self.module).__name__}: expected the entries {sorted(names)}, got "
                f"{sorted(map(str, state))}."
            )
        own = self.module.state_dict()
        for key, x in state.items():
            shapes = [list(y.shape) if isinstance(y, Tensor) else None for y in (own[key], x)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{type(self.module).__name__}: expected {key!r} of shape {shapes[0]}, got "
                    f"{shapes[1]}."
                )
        self.module.load_state_dict({**own, **state})

    def _names(self) -> set[str]:
        """Name the entries of tensors and modules that are not the owner's."""
        parts = {id(part) for part in self.owner.modules()}
        tensors = {x.untyped_storage().data_ptr() for x in _tensors(self.owner)}
        extra = {
            f"{path}.{_EXTRA}" if path else _EXTRA
            for path, part in self.module.named_modules()
            if id(part) in parts
        }
        return {
            key
            for key, x in self.module.state_dict().items()
            if key not in extra
            and not (isinstance(x, Tensor) and x.untyped_storage().data_ptr() in tensors)
        }


_EXTRA = "_extra_state"


def _tensors(module: nn.Module) -> list[Tensor]:
    return [x for x in module.state_dict().values() if isinstance(x, Tensor)]
