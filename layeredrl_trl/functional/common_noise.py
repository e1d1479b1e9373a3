"""Random numbers that several rows share, so that their outcomes can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Random = Callable[[Sequence[int]], Tensor]
"""Draws random numbers of a shape, such as ``torch.randn``."""

Draw = Callable[[Random, Sequence[int]], Tensor]
"""Draws random numbers ``[N, ...]`` of a given kind and shape, for ``N`` rows."""


def draw_each(random: Random, shape: Sequence[int]) -> Tensor:
    """Draw for each row of its own."""
    return random(shape)


class CommonDraws:
    """Draw random numbers that consecutive rows share, and possibly those of a former use.

    Args:
        rows_per_draw: number of consecutive rows that get the same numbers; must divide the number
            of rows of each draw.
        tape: numbers drawn before, which are taken again in their order; what is drawn beyond them
            is appended. ``None`` for numbers that are not kept.

    Example:
        >>> import torch
        >>> tape = []
        >>> x = CommonDraws(3, tape)(torch.randn, (6, 2))
        >>> (x == x[[0, 0, 0, 3, 3, 3]]).all().item(), (x[0] == x[3]).any().item()
        (True, False)
        >>> again = CommonDraws(2, tape)(torch.randn, (4, 2))
        >>> torch.equal(again[[0, 2]], x[[0, 3]])
        True
    """

    def __init__(self, rows_per_draw: int, tape: list[Tensor] | None = None) -> None:
        self.rows_per_draw = rows_per_draw
        self.tape = tape
        self._n_taken = 0

    def __call__(self, random: Random, shape: Sequence[int]) -> Tensor:
        """Draw numbers of shape ``[N, ...]``."""
        if shape[0] % self.rows_per_draw:
            raise ValueError(
                f"common random numbers: {shape[0]} rows cannot be divided into groups of "
                f"{self.rows_per_draw}."
            )
        groups = (shape[0] // self.rows_per_draw, *shape[1:])
        known = () if self.tape is None else self.tape[self._n_taken :]
        drawn = known[0] if known else random(groups)
        if drawn.shape != groups:
            raise ValueError(
                f"common random numbers: expected those of {[*groups]} from before, there are "
                f"{list(drawn.shape)}."
            )
        if self.tape is not None:
            self._n_taken += 1
            if not known:
                self.tape.append(drawn)
        each = drawn.unsqueeze(1).expand(-1, self.rows_per_draw, *shape[1:])
        return each.flatten(0, 1)
