"""The improved cross-entropy method (iCEM)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase

from layeredrl_trl.checks import check_finite, check_fraction, check_key
from layeredrl_trl.planners.base import ReturnAction
from layeredrl_trl.planners.cem import CrossEntropyPlanner
from layeredrl_trl.planners.gaussian import GaussianBelief

MeanCandidate = Literal["last", "every"]


class ICEMPlanner(CrossEntropyPlanner):
    """Plan by the improved cross-entropy method in a model-based environment; a policy.

    The cross-entropy method made to need fewer candidates:

    - candidates vary over time like coloured noise (``noise_beta``), so that they get somewhere;
    - the best are tried again in the next round and, moved on by one step with a last action drawn
      anew, in the next step of the environment (``keep_elites``);
    - rounds get smaller, round i having ``max(N * population_decay^-i, 2 * top_k)`` candidates,
      rounded down and at most N;
    - the mean is a candidate of the last round only;
    - the action is that of the best candidate of all rounds.

    With ``noise_beta=0, keep_elites=0, population_decay=1, mean_candidate="every", momentum=0,
    return_action="mean"`` it is :class:`~layeredrl_trl.planners.CrossEntropyPlanner`. Edge rules
    are those of that class; a candidate whose return is not finite is not kept.

    It is made for few candidates and steps of the environment that follow each other. Coloured
    noise hardly tries plans that jump: where one plan is to be refined in many rounds, less of it
    (and rounds that stay large) gets closer to the optimum.

    Args:
        env (EnvBase): the model, any environment with ``batch_locked=False``.
        num_candidates, top_k (int): action sequences N per environment in the first round, with
            those that are tried again, and how many are elites of a round, at most N.
        noise_beta (float): exponent of the noise: 0 white, 1 pink, 2 and more smooth. Higher where
            good actions change slowly against the horizon.
        keep_elites (float): fraction of the elites that are tried again, in [0, 1]; their number K
            is rounded up.
        population_decay (float): factor by which rounds get smaller, at least 1.
        mean_candidate ("last" or "every"): the rounds in which the mean is a candidate.
        momentum, return_action: as for the base class, with other defaults.
        elites_key (NestedKey): the elites kept. Read here, written under ``"next"``.
        **options: the other arguments of :class:`~layeredrl_trl.planners.CrossEntropyPlanner`.

    Reads:
        the state of ``env``; where they exist, ``plan`` ``[..., H, A]``, ``elites``
        ``[..., K, H, A]`` (NaN for none), ``is_init`` ``[..., 1]``.

    Writes:
        ``action`` ``[..., A]``, ``("next", "plan")`` ``[..., H, A]``, ``("next", "elites")``
        ``[..., K, H, A]`` unless K = 0, and ``plan_return`` (best return, or mean return of the
        last elites), ``plan_spread``, ``plan_std`` ``[..., 1]``.

    Raises:
        TypeError: if ``elites_key`` is no key.
        ValueError: if ``keep_elites`` is not in [0, 1] or leaves no room for new candidates,
            ``population_decay`` is below 1 or not finite, or ``mean_candidate`` is unknown; and
            what :class:`~layeredrl_trl.planners.CrossEntropyPlanner` raises.

    Reference:
        Pinneri, Sawant, Blaes, Achterhold, Stueckler, Rolinek, Martius (2020), arXiv:2008.06389,
        algorithm 1. Deviations: elites tried again and the mean take places of the N candidates
        instead of coming on top, and are scored anew; momentum is on the standard deviation too;
        with ``return_action="best"`` the plan is the best candidate, not the mean; the standard
        deviation of a warm start is ``warm_std`` times the first one, not the first one itself;
        the plan moved on ends mid-range, instead of repeating its last action.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from layeredrl_trl.envs import PredictorEnv
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
        >>> parts = IdentityEncoder(3), ProbabilisticEnsemble(3, 0, 1), RewardNet(3, 0, 1)
        >>> env = PredictorEnv(*parts, Bounded(-2.0, 2.0, (1,)))
        >>> planner = ICEMPlanner(
        ...     env, planning_horizon=5, optim_steps=2, num_candidates=32, top_k=6
        ... )
        >>> td = TensorDict(observation=torch.zeros(4, 3), batch_size=[4])
        >>> td = planner(env.initial_state(td))
        >>> td["action"].shape, td["next", "elites"].shape
        (torch.Size([4, 1]), torch.Size([4, 2, 5, 1]))
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        num_candidates: int,
        top_k: int,
        noise_beta: float = 2.0,
        keep_elites: float = 0.3,
        population_decay: float = 1.25,
        mean_candidate: MeanCandidate = "last",
        momentum: float = 0.1,
        return_action: ReturnAction = "best",
        elites_key: NestedKey = "elites",
        **options,
    ) -> None:
        check_fraction("keep_elites", keep_elites)
        check_key("elites_key", elites_key)
        check_finite("population_decay", population_decay)
        if not population_decay >= 1.0:
            raise ValueError(f"population_decay must be at least 1, got {population_decay}.")
        if mean_candidate not in get_args(MeanCandidate):
            raise ValueError(f"mean_candidate must be 'last' or 'every', got {mean_candidate!r}.")
        super().__init__(
            env,
            num_candidates=num_candidates,
            top_k=top_k,
            noise_beta=noise_beta,
            momentum=momentum,
            return_action=return_action,
            **options,
        )
        self.keep_elites = keep_elites
        self.population_decay = population_decay
        self.mean_candidate = mean_candidate
        self.elites_key = unravel_key(elites_key)
        kept = keep_elites * top_k
        self._num_kept = _without_rounding_error(kept) or math.ceil(kept)
        if self._num_kept >= num_candidates - 1 and self._num_kept:
            raise ValueError(
                f"keep_elites={keep_elites} of top_k={top_k} leaves no room for new candidates "
                f"beside the mean: num_candidates={num_candidates}."
            )
        if self._num_kept:
            plan_shape = self.planning_horizon, *self.cold_step.shape
            self.register_carried(self.elites_key, (self._num_kept, *plan_shape))

    def start(self, carried: dict[NestedKey, Tensor]) -> GaussianBelief:
        """Start as the base class does, with the elites of the last step moved on."""
        belief = super().start(carried)
        if not self._num_kept:
            return belief
        elites = carried[self.elites_key]
        new = torch.randn_like(elites[..., :1, :]) * (self.std * self.half_range) + self.cold_step
        kept = self.clip(torch.cat([elites[..., 1:, :], new], -2))
        known = kept.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        return belief._replace(kept=torch.where(known, kept, torch.nan))

    def round_size(self, number: int) -> int:
        """Return the size of a round, which shrinks from round to round."""
        decayed = self.num_candidates * self.population_decay**-number
        decayed = _without_rounding_error(decayed) or int(decayed)
        return min(self.num_candidates, max(decayed, 2 * self.top_k))

    def mean_is_candidate(self, number: int) -> bool:
        """Tell whether the mean is the first candidate of round ``number``."""
        return self.mean_candidate == "every" or number == self.optim_steps - 1

    def draw(self, belief: GaussianBelief, number: int) -> Tensor:
        """Draw as the base class does, with the elites kept among the candidates."""
        samples = super().draw(belief, number)
        if belief.kept is not None:
            places = samples[..., 1 : 1 + self._num_kept, :, :]  # the first may be the mean's
            places.copy_(torch.where(belief.kept.isnan(), places, belief.kept))
        return samples

    def fit(self, belief: GaussianBelief, chosen: Tensor, weights: Tensor) -> GaussianBelief:
        """Fit as the base class does, and keep the best elites."""
        belief = super().fit(belief, chosen, weights)
        if not self._num_kept:
            return belief
        best, weight = chosen[..., : self._num_kept, :, :], weights[..., : self._num_kept, :]
        return belief._replace(kept=torch.where(weight.unsqueeze(-1) > 0, best, torch.nan))

    def carry_on(self, belief: GaussianBelief, sequence: Tensor) -> dict[NestedKey, Tensor]:
        """Carry the plan and the elites kept."""
        carried = super().carry_on(belief, sequence)
        return carried if belief.kept is None else {**carried, self.elites_key: belief.kept}


def _without_rounding_error(x: float) -> int | None:
    """Return the whole number that ``x`` is but for rounding, as 0.07 * 100 is 7; else ``None``."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9) else None
