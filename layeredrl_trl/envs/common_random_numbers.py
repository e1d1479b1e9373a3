"""Envs that share random numbers, so that their outcomes can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from layeredrl_trl.checks import check_count
from layeredrl_trl.functional import CommonDraws, Draw


class CommonRandomNumbers:
    """An env of which several can share random numbers.

    A class that has it sets ``_draw`` to :func:`~layeredrl_trl.functional.draw_each` at
    construction, and draws all its random numbers by it.
    """

    _draw: Draw

    @contextmanager
    def common_random_numbers(self, n: int, tape: list[Tensor] | None = None) -> Iterator[None]:
        """Let every ``n`` consecutive envs of the flattened batch share random numbers.

        Within the context, envs ``k n`` to ``k n + n - 1`` draw the same noise, terminations and
        members in every step and rollout, so that their outcomes differ only by their states and
        actions. Planners compare the candidates of an env under it. Different particles and
        different groups of envs draw independently. Envs that hold different members, as the
        candidates of a planner may, keep doing so.

        Args:
            n: number of envs that share numbers; divides the number of envs that are imagined.
            tape: numbers that were drawn in former contexts, which are drawn again in their order;
                an empty list is filled. For contexts in which the same number of groups takes the
                same steps. ``None``: draw anew.

        Raises:
            TypeError: if ``n`` is no integer.
            ValueError: if it is below 1; when imagining, if it does not divide the number of envs,
                or the tape is of another number of groups.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from torchrl.data import Bounded
            >>> from layeredrl_trl.envs.predictor_env import PredictorEnv
            >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble
            >>> parts = IdentityEncoder(3), ProbabilisticEnsemble(3, 0, 1), None
            >>> env = PredictorEnv(*parts, Bounded(-1.0, 1.0, (1,)))
            >>> start = TensorDict(observation=torch.zeros(4, 3), batch_size=[4])
            >>> with env.common_random_numbers(2):
            ...     out = env.imagine(env.initial_state(start), torch.zeros(4, 5, 1))
            >>> latent = out["next", "latent"]
            >>> torch.allclose(latent[0], latent[1]), torch.allclose(latent[1], latent[2])
            (True, False)
        """
        check_count("n", n)
        before = self._draw
        if n > 1 or tape is not None:
            self._draw = CommonDraws(n, tape)
        try:
            yield
        finally:
            self._draw = before
