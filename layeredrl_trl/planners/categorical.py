"""The cross-entropy method for discrete actions."""

from __future__ import annotations

import math

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import Binary, Categorical, MultiCategorical, MultiOneHot, OneHot
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs import EnvBase

from layeredrl_trl.functional import draw_by_weight, elite_weights
from layeredrl_trl.planners.base import SamplingPlanner
from layeredrl_trl.planners.cem import check_elites


class CategoricalCrossEntropyPlanner(SamplingPlanner):
    """Plan discrete actions by the cross-entropy method; a policy.

    The actions of a step are drawn by their probabilities, independently of other steps; the
    probabilities are fitted to the ``top_k`` sequences with the highest returns; repeat. The first
    candidate of a round is the most likely sequence. Probabilities start even, or as the previous
    plan moved on by one step, with an even last step, mixed with even odds by ``warm_smoothing``.

    The plan is the last probabilities, whatever is returned: ``"mean"`` returns the most likely
    action, ``"best"`` that of the best candidate of all rounds, ``"sample"`` one drawn by the last
    probabilities (which ``smoothing`` keeps from being certain). Candidates whose return is not
    finite are no elites. All other edge rules, and what is read:
    see :class:`~layeredrl_trl.planners.SamplingPlanner`.

    For a subclass: the belief is a tensor, the probabilities of each step ``[*B, H, n]``, and
    candidates are indices ``[*B, N, H, 1]``.

    Args:
        env (EnvBase): the model, with one action of ``n`` kinds: ``OneHot``, or ``Categorical`` of
            shape ``()`` or ``(1,)``. The action is written in the form and dtype of that spec.
        num_candidates, top_k (int): action sequences N per environment and round, and how many of
            them are elites, at most N.
        momentum (float): weight of the old probabilities in a fit, in [0, 1).
        smoothing (float): part of the probability that is spread evenly after a fit, in [0, 1): no
            action gets below ``smoothing / n``.
        warm_smoothing (float): the same at a warm start, in [0, 1]; 1 forgets the previous plan.
        **options: the other arguments of :class:`~layeredrl_trl.planners.SamplingPlanner`.

    Reads:
        the state of ``env``; where they exist, ``plan`` ``[..., H, n]``, ``is_init`` ``[..., 1]``.

    Writes:
        ``action``, ``("next", "plan")`` ``[..., H, n]``, and ``plan_return`` (mean return of the
        last elites, or the best return), ``plan_spread``, ``plan_std`` (mean entropy of a step as a
        fraction of ``log n``) ``[..., 1]``.

    Raises:
        TypeError: if the action is not one-hot or categorical.
        ValueError: if the action is no single one or has a mask, ``top_k`` is not in [1,
            ``num_candidates``], ``momentum``, ``smoothing`` or ``warm_smoothing`` is out of range;
            and what :class:`~layeredrl_trl.planners.SamplingPlanner` raises.

    Reference:
        Botev, Kroese, Rubinstein, L'Ecuyer (2013), The cross-entropy method for optimization,
        algorithm 2.1 with Bernoulli replaced by categorical; ``momentum`` and ``smoothing`` are
        their two kinds of smoothing.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Categorical
        >>> from layeredrl_trl.envs import PredictorEnv
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
        >>> model = ProbabilisticEnsemble(3, 0, Categorical(2))
        >>> env = PredictorEnv(IdentityEncoder(3), model, RewardNet(3, 0, 2), Categorical(2))
        >>> planner = CategoricalCrossEntropyPlanner(
        ...     env, planning_horizon=5, optim_steps=2, num_candidates=32, top_k=6
        ... )
        >>> td = TensorDict(observation=torch.zeros(4, 3), batch_size=[4])
        >>> td = planner(env.initial_state(td))
        >>> td["action"].shape, td["action"].dtype, td["next", "plan"].shape
        (torch.Size([4]), torch.int64, torch.Size([4, 5, 2]))
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        num_candidates: int,
        top_k: int,
        momentum: float = 0.0,
        smoothing: float = 0.02,
        warm_smoothing: float = 0.5,
        **options,
    ) -> None:
        check_elites(top_k, num_candidates, momentum)
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}.")
        if not 0.0 <= warm_smoothing <= 1.0:
            raise ValueError(f"warm_smoothing must be in [0, 1], got {warm_smoothing}.")
        super().__init__(env, num_candidates=num_candidates, **options)
        self.top_k = top_k
        self.momentum = momentum
        self.smoothing = smoothing
        self.warm_smoothing = warm_smoothing

    def register_space(self, spec: TensorSpec) -> Tensor:
        """Check the action; the step that knows nothing is even probabilities ``[n]``."""
        planner = type(self).__name__
        several = isinstance(spec, Binary | MultiCategorical | MultiOneHot)
        if several or not isinstance(spec, OneHot | Categorical):
            raise TypeError(
                f"{planner} plans a OneHot or a Categorical action, got {type(spec).__name__} of "
                f"dtype {spec.dtype}."
            )
        n, self._is_one_hot = spec.space.n, isinstance(spec, OneHot)
        expected = [(n,)] if self._is_one_hot else [(), (1,)]
        if tuple(spec.shape) not in expected:
            raise ValueError(
                f"{planner} plans a single action, of shape {' or '.join(map(str, expected))}, got "
                f"shape {tuple(spec.shape)}."
            )
        if spec.mask is not None:
            raise ValueError(f"{planner} knows of no masked actions, got {spec}.")
        self._action_dtype = spec.dtype
        self.register_buffer("_labels", torch.arange(n, device=spec.device), persistent=False)
        return torch.full((n,), 1 / n, device=spec.device, dtype=torch.float32)

    def to_actions(self, samples: Tensor) -> Tensor:
        """Turn indices ``[..., 1]`` into actions in the form and dtype of the spec."""
        if self._is_one_hot:
            return (samples == self._labels).to(self._action_dtype)
        return (samples if self._action_shape else samples.squeeze(-1)).to(self._action_dtype)

    def start(self, carried: dict[NestedKey, Tensor]) -> Tensor:
        """Start from even probabilities or the previous plan; ``[*B, H, n]``."""
        plan, is_warm = self.initial_plan(carried)
        plan = plan.clamp_min(torch.finfo(plan.dtype).tiny)
        plan = plan / plan.sum(-1, keepdim=True)
        return torch.where(is_warm, plan.lerp(self.cold_step, self.warm_smoothing), plan)

    def draw(self, belief: Tensor, number: int) -> Tensor:
        """Draw indices ``[*B, N, H, 1]`` by the probabilities, the most likely ones first."""
        shape = (*belief.shape[:-2], self.num_candidates, *belief.shape[-2:])
        samples = draw_by_weight(belief.unsqueeze(-3).expand(shape), -1)
        samples[..., 0, :, :] = self.most_likely(belief)
        return samples

    def weigh(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the ``top_k`` candidates alike."""
        return elite_weights(returns, self.top_k)

    def fit(self, belief: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Fit probabilities ``[*B, H, n]`` to how often the candidates take each action."""
        share = (weights.unsqueeze(-1).to(belief.dtype) * (chosen == self._labels)).sum(-3)
        probs = belief.lerp(share, 1 - self.momentum).lerp(self.cold_step, self.smoothing)
        return torch.where(weights.sum(-2, keepdim=True) > 0, probs, belief)

    def most_likely(self, belief: Tensor) -> Tensor:
        """Return the most likely indices ``[*B, H, 1]``."""
        return belief.argmax(-1, keepdim=True)

    def sample_sequence(self, belief: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Draw indices ``[*B, H, 1]`` by the probabilities."""
        return draw_by_weight(belief, -1)

    def width(self, belief: Tensor) -> Tensor:
        """Return the mean entropy of a step as a fraction of ``log n``, ``[*B, 1]``."""
        n = self._labels.shape[0]
        entropy = torch.special.entr(belief).sum(-1).mean(-1, keepdim=True)
        return entropy / math.log(n) if n > 1 else torch.zeros_like(entropy)

    def carry_on(self, belief: Tensor, sequence: Tensor) -> dict[NestedKey, Tensor]:
        """Carry the probabilities, whatever is acted by."""
        return {self.plan_key: belief}
