"""LayeredRL's ensemble: what it makes of the outputs of its networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from layeredrl_trl.modules import ProbabilisticEnsemble

_LOG_STD_BOUND = 10.0
"""LayeredRL clamps the logarithm of a standard deviation to plus and minus this."""

_LEAST_TERM_LOGIT = -20.0
"""LayeredRL clamps the logit of the termination from below."""


class LayeredRLEnsemble(ProbabilisticEnsemble):
    """An ensemble whose standard deviations and terminations are those of LayeredRL.

    The standard deviation, in units of the targets, is ``exp`` of the output, clamped to
    ``[-10, 10]``; the logit of the termination is at least -20. So ``std_bounds`` are without
    effect.

    Args:
        latent_state_space, context_space, action_space: of the base class.
        options: of the base class; ``network`` must be given.

    Reference:
        LayeredRL's ``ProbFCDynamics``, commit 248fb87.
    """

    score_members = ProbabilisticEnsemble.score_members  # it calls the methods below

    def _run(self, inputs: Tensor, member: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raw, term_logit = super()._run(inputs, member)
        return raw, term_logit.clamp_min(_LEAST_TERM_LOGIT)

    def _gaussians(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gaussians, logits = self.split_output(raw)
        mean, log_std = gaussians.unbind(-3)
        std = log_std.clamp(-_LOG_STD_BOUND, _LOG_STD_BOUND).exp()
        return mean, std, torch.log_softmax(logits, -1)


def perceptron(
    n_in: int, n_out: int, hidden_sizes: Sequence[int], activation: type[nn.Module]
) -> nn.Sequential:
    """Make the network of one member."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise((n_in, *hidden_sizes)):
        layers += [nn.Linear(size_in, size_out, dtype=torch.float32), activation()]
    return nn.Sequential(*layers, nn.Linear((n_in, *hidden_sizes)[-1], n_out, dtype=torch.float32))
