"""The steps of a search, which a planner brings, and checks of what they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.tensor_specs import TensorSpec

from layeredrl_trl.functional import draw_by_weight
from layeredrl_trl.planners.warm_start import PlanEntries


class SearchSteps(PlanEntries, ABC):
    """What a planner of your own brings to :class:`~layeredrl_trl.planners.SamplingPlanner`.

    ``[*B]`` are the environments, ``H`` is the horizon, ``W`` the width of a step of the plan that
    is carried over, and ``S`` that of a step of a candidate, whatever :meth:`to_actions` takes; by
    default both are ``A``. Methods must not change what they are given.
    """

    num_candidates: int
    _action_shape: torch.Size

    @abstractmethod
    def register_space(self, spec: TensorSpec) -> Tensor:
        """Check the action, and register what depends on it, such as its bounds, as buffers.

        The constructor calls it once, before the subclass's own attributes are set.

        Args:
            spec: of the action of one environment, without batch dims.

        Returns:
            a step ``[W]`` of a plan that knows nothing: :attr:`cold_step` from then on.
        """

    @abstractmethod
    def start(self, carried: dict[NestedKey, Tensor]) -> Any:
        """Make the belief of the first round, of any type.

        Args:
            carried: what the last step carried over, by key: ``plan`` ``[*B, H, W]``, and what was
                registered by :meth:`register_carried`; NaN where there is nothing. For the plan,
                :meth:`initial_plan` makes the most of it.
        """

    @abstractmethod
    def draw(self, belief: Any, number: int) -> Tensor:
        """Draw candidates ``[*B, N, H, S]`` for round ``number``, which counts from 0.

        ``N`` may be smaller than ``num_candidates``, but not larger.
        """

    @abstractmethod
    def weigh(self, returns: Tensor) -> tuple[Tensor | None, Tensor]:
        """Weigh the candidates of a round.

        Args:
            returns: ``[*B, N, 1]``, ``-inf`` for a candidate that must not count.

        Returns:
            Which candidates count, indices ``[*B, K, 1]``, or ``None`` for all of them (``K = N``);
            and their weights ``[*B, K, 1]``, which sum to 1 or, where no return is finite, are 0.
        """

    @abstractmethod
    def fit(self, belief: Any, chosen: Tensor, weights: Tensor) -> Any:
        """Fit the belief to the candidates that count, ``[*B, K, H, S]``, by their weights.

        ``weights`` are those of :meth:`weigh`; where all are 0, the belief must stay as it is.
        """

    @abstractmethod
    def most_likely(self, belief: Any) -> Tensor:
        """Return the most likely sequence ``[*B, H, S]``, which is acted by with ``"mean"``."""

    @abstractmethod
    def width(self, belief: Any) -> Tensor:
        """Return the width of the belief ``[*B, 1]``, 1 for that of a cold start."""

    def sample_sequence(self, belief: Any, chosen: Tensor, weights: Tensor) -> Tensor:
        """Draw the sequence ``[*B, H, S]`` that is acted by with ``return_action="sample"``.

        By default one of the candidates of the last round, drawn by its weight, or the most likely
        sequence where no weight is above 0. The arguments are those of the last :meth:`fit`.
        """
        index = draw_by_weight(weights, -2)
        drawn = chosen.take_along_dim(index.unsqueeze(-1), -3).squeeze(-3)
        return torch.where(weights.sum(-2, keepdim=True) > 0, drawn, self.most_likely(belief))

    def carry_on(self, belief: Any, sequence: Tensor) -> dict[NestedKey, Tensor]:
        """Return what the next step starts from, by key, not yet moved on; by default the plan.

        ``sequence`` ``[*B, H, S]`` is the one that is acted by or, with ``return_action="sample"``,
        the most likely one.
        """
        return {self.plan_key: sequence}

    def to_actions(self, samples: Tensor) -> Tensor:
        """Turn steps ``[..., S]`` into actions ``[..., A]``; by default they are the actions."""
        return samples

    # ---- what the search calls

    def _most_likely(self, belief: Any, rows: torch.Size) -> Tensor:
        """Call :meth:`most_likely` and check what it returns, ``[*rows, S]``."""
        sequence = self.most_likely(belief)
        width = sequence.shape[-1:] if isinstance(sequence, Tensor) else "S"
        return self._checked("most_likely", sequence, (*rows, *width))

    def _draw(self, belief: Any, number: int, shape: torch.Size) -> Tensor:
        """Call :meth:`draw` and check what it returns, sequences of ``shape``."""
        samples, (*batch, horizon, width) = self.draw(belief, number), shape
        n = self.num_candidates
        if isinstance(samples, Tensor) and samples.ndim > len(batch):
            n = min(n, samples.shape[len(batch)])
        return self._checked("draw", samples, (*batch, n, horizon, width))

    def _actions(self, samples: Tensor) -> Tensor:
        """Call :meth:`to_actions` and check what it returns."""
        expected = *samples.shape[:-1], *self._action_shape
        return self._checked("to_actions", self.to_actions(samples), expected)

    def _weigh(self, returns: Tensor) -> tuple[Tensor | None, Tensor]:
        """Call :meth:`weigh` and check what it returns."""
        out = self.weigh(returns)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"{type(self).__name__}.weigh must return a tuple (index, weights), got {out!r}."
            )
        index, weights = out
        rows = returns.shape
        if index is not None:
            n = index.shape[-2] if isinstance(index, Tensor) and index.ndim > 1 else rows[-2]
            rows = self._checked("weigh: index", index, (*rows[:-2], n, 1)).shape
        return index, self._checked("weigh: weights", weights, rows)

    def _carry_on(self, belief: Any, sequence: Tensor) -> dict[NestedKey, Tensor]:
        """Call :meth:`carry_on` and check what it returns."""
        carried, batch = self.carry_on(belief, sequence), sequence.shape[:-2]
        if carried.keys() != self._carried_shapes.keys():
            raise KeyError(
                f"{type(self).__name__}.carry_on must return {[*self._carried_shapes]}, got "
                f"{[*carried]}. Further entries are registered by register_carried."
            )
        for key, shape in self._carried_shapes.items():
            self._checked(f"carry_on: {key!r}", carried[key], (*batch, *shape))
        return carried

    def _checked(self, what: str, value: Any, shape: Sequence[int]) -> Tensor:
        """Check what a method returned: a tensor of another shape might be broadcast."""
        name = f"{type(self).__name__}.{what}"
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {value!r} ({type(value).__name__}).")
        if value.shape != tuple(shape):
            raise ValueError(f"{name} must have shape {[*shape]}, got {list(value.shape)}.")
        return value
