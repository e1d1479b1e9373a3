"""What specs say of their entries, without looking each of them up again and again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import NestedKey
from torchrl.data import Composite


class Entry(NamedTuple):
    """What a spec says of an entry.

    Attributes:
        shape: without batch dims.
        dtype: of it.
    """

    shape: torch.Size
    dtype: torch.dtype


def entries_of(spec: Composite) -> dict[NestedKey, Entry]:
    """Read all entries of a spec; to look one up in the spec takes as long as a small operation."""
    return {key: Entry(x.shape, x.dtype) for key, x in spec.items(True, True)}


class SpecReader:
    """Give the entries of specs, which are read again where these are others or may have changed.

    As an object of its own: what it remembers is no change of the env that asks it, for which a
    plan would have to be recorded anew (:func:`~layeredrl_trl.modules.fingerprint.fingerprint`).
    """

    def __init__(self) -> None:
        self._specs: tuple[Composite, ...] = ()
        self._entries: list[dict[NestedKey, Entry]] = []

    def __call__(self, *specs: Composite) -> list[dict[NestedKey, Entry]]:
        """Return the entries of each; not to be written to."""
        is_known = len(specs) == len(self._specs) and all(
            spec is own and spec.is_locked for spec, own in zip(specs, self._specs, strict=True)
        )
        if not is_known:
            self._specs, self._entries = specs, [entries_of(spec) for spec in specs]
        return self._entries
