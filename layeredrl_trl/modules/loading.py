"""Load a saved state as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_SHOWN = 5
"""Number of entries that an error names."""


class LoadsWhole(nn.Module):
    """A module that a state which cannot be loaded leaves as it was.

    ``nn.Module`` loads entry by entry and reports at the end what did not fit. Here all entries are
    compared before the first one is loaded, and what fails then, or is interrupted, is undone. A
    part with extra state may bring ``check_extra_state(state)``, which raises an error for a state
    that ``set_extra_state`` would refuse.

    Numbers must be finite. A buffer, such as a mask, may be infinite or NaN where that of the
    module is. A part may name further buffers of its own, such as a minimum so far, in a class
    attribute ``may_be_non_finite``.
    """

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state as from ``state_dict()``; an error changes nothing.

        Args:
            state_dict: the state; float32 and float64 are cast to another precision.
            strict: whether it must have the entries of this module and no others.
            assign: take the tensors of the state instead of their numbers; of the same dtype.

        Returns:
            The names of missing and of unexpected entries, as ``nn.Module.load_state_dict`` does.

        Raises:
            RuntimeError: if an entry is missing or unexpected (if ``strict``), no tensor, of
                another shape or dtype, or not finite.
            ValueError, TypeError: if an extra state does not fit, or ``state_dict`` is no mapping.
        """
        if isinstance(state_dict, Mapping):  # torch refuses anything else
            check_state(self, state_dict, strict=strict, assign=assign)
        with self._undone_on_error():
            return super().load_state_dict(state_dict, strict, assign)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Restore all tensors and extra states if an error is raised, also an interruption."""
        slots = [
            (tensors, name, x)
            for part in self.modules()
            if not isinstance(part, TensorDictParams)  # loaded in place
            for tensors in (part._parameters, part._buffers)
            for name, x in tensors.items()
        ]
        before = deepcopy(self.state_dict())
        try:
            yield
        except BaseException:
            for tensors, name, x in slots:
                tensors[name] = x
            super().load_state_dict(before)
            raise


def check_state(
    module: nn.Module, state: Mapping[str, Any], *, strict: bool = True, assign: bool = False
) -> None:
    """Check that a state can be loaded into a module, without changing it.

    Entries of parts that change a state while they load it, for example by hooks that rename
    entries of older versions, are not compared. The arguments are those of ``load_state_dict``.

    Raises:
        RuntimeError: as :meth:`LoadsWhole.load_state_dict`.
        ValueError, TypeError: from ``check_extra_state`` of a part.
    """
    own, ignored, free = module.state_dict(keep_vars=True), [], set()
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if _adapts(part):
            ignored.append(prefix)
        free |= {prefix + name for name in getattr(part, "may_be_non_finite", ())}
        check, key = getattr(part, "check_extra_state", None), f"{prefix}_extra_state"
        if check is not None and key in state:
            check(state[key])
    expected, given = (
        {name: x for name, x in entries.items() if not name.startswith(tuple(ignored))}
        for entries in (own, state)
    )
    faults = {
        "missing": [name for name in expected if name not in given] if strict else [],
        "unexpected": [name for name in given if name not in expected] if strict else [],
        "different": [
            f"{name} ({text})"
            for name, x in expected.items()
            if name in given and (text := _difference(x, given[name], assign, name in free))
        ],
    }
    if any(faults.values()):
        texts = [f"{what}: {_listed(names)}" for what, names in faults.items() if names]
        raise RuntimeError(
            f"load_state_dict: the state is not one of this {type(module).__name__}, so nothing "
            f"was changed. Entries that are {'; '.join(texts)}."
        )


def _adapts(part: nn.Module) -> bool:
    """Tell whether a part may change a state while it loads it."""
    own = type(part)._load_from_state_dict
    plain = (nn.Module._load_from_state_dict, TensorDictParams._load_from_state_dict)
    return own not in plain or bool(part._load_state_dict_pre_hooks)


def is_castable(given: torch.dtype, own: torch.dtype) -> bool:
    """Whether saved numbers may be loaded as those of dtype ``own``.

    A predictor may have been saved in float32 and be loaded in float64, or the other way round.
    Half precision that was not asked for, like integers in place of floats, is a fault.
    """
    if given is own:
        return True
    if not own.is_floating_point:
        return own.is_complex and given in (torch.complex64, torch.complex128)
    return given in (torch.float32, torch.float64)


def _difference(own: Any, given: Any, assign: bool, is_free: bool) -> str | None:
    """Say why an entry cannot be loaded in the place of another one."""
    if not isinstance(own, Tensor) or is_lazy(own):
        return None
    if not isinstance(given, Tensor):
        return f"expected a tensor, got {type(given).__name__}"
    if own.shape != given.shape:
        return f"expected shape {list(own.shape)}, got {list(given.shape)}"
    if given.dtype is not own.dtype and (assign or not is_castable(given.dtype, own.dtype)):
        return f"expected {own.dtype}, got {given.dtype}"
    if is_free or given.is_meta:
        return None
    is_finite = given.to(own.dtype).isfinite()  # float64 may be too large for float32
    if not isinstance(own, nn.Parameter) and not own.is_meta:
        is_finite = is_finite | ~own.isfinite().to(is_finite.device)
    n_wrong = int((~is_finite).sum())
    return f"expected finite numbers, got {n_wrong} that are not" if n_wrong else None


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
