"""Terms of the loss, added up over the steps of a call of ``learn``."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

_AT_ONCE = 64
"""Steps that are added up at once: each on its own would take four operations."""


class TermSums:
    """Sums over steps of scalars by name, without the steps that were skipped.

    Attributes:
        names: of the scalars.

    Example:
        >>> from tensordict import TensorDict
        >>> sums = TermSums()
        >>> sums.add(TensorDict({"loss": 1.0, "grad_norm": 2.0}))
        >>> sums.add(TensorDict({"loss": 5.0, "grad_norm": torch.inf}))
        >>> sums.names, sums.total()
        (['loss', 'grad_norm'], tensor([1., 2.]))
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._waiting: list[Tensor] = []
        self._total: Tensor | None = None

    def add(self, terms: TensorDictBase) -> None:
        """Take the terms ``[]`` of a step in, the same ones in every step.

        Args:
            terms: with ``grad_norm``, which is not finite if the step was skipped.
        """
        self.names = [*map(str, terms.keys())]
        self._waiting += terms.values()
        if len(self._waiting) >= _AT_ONCE * len(self.names):
            self._fold()

    def total(self) -> Tensor:
        """Return the sums, in the order of :attr:`names`, on the device of the terms."""
        if self._waiting:
            self._fold()
        return torch.zeros(0) if self._total is None else self._total

    def _fold(self) -> None:
        steps = torch.stack(self._waiting).unflatten(0, (-1, len(self.names)))
        was_taken = steps[:, [self.names.index("grad_norm")]].isfinite()
        total = torch.where(was_taken, steps, 0.0).sum(0)
        self._total = total if self._total is None else self._total + total
        self._waiting = []
