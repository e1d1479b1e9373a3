"""The agent of the recipe: a predictor, a planner that plans in it, and exploration."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from layeredrl_trl import keys
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.planners import (
    CategoricalCrossEntropyPlanner,
    CrossEntropyPlanner,
    ICEMPlanner,
    PathIntegralPlanner,
    SamplingPlanner,
)
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.config import RecipeError, TrainConfig

_PLANNERS = {"icem": ICEMPlanner, "cem": CrossEntropyPlanner, "mppi": PathIntegralPlanner}


def make_predictor(config: TrainConfig, env: EnvBase) -> RewardPredictor:
    """Make a predictor for the spaces of ``env``."""
    obs_dim = env.observation_spec_unbatched[keys.OBSERVATION].shape[-1]
    action_spec = env.action_spec_unbatched
    net = {"hidden_sizes": (config.hidden_size, config.hidden_size)}
    rates = dict.fromkeys(("reward_lr", "model_lr", "value_lr"), config.learning_rate)
    return RewardPredictor(
        ProbabilisticEnsemble(obs_dim, 0, action_spec, n_models=config.n_models, **net),
        ValueNet(obs_dim, 0, **net),
        RewardNet(obs_dim, 0, action_spec.shape[-1], **net),
        IdentityEncoder(obs_dim),
        latent_state_dim=obs_dim,
        context_dim=0,
        gamma=config.gamma,
        tau=config.tau,
        n_steps=config.n_steps,
        learn_encoder=False,
        clip_grad_max_norm=config.clip_grad_max_norm,
        device=config.device,
        **rates,
    )


def make_policy(
    config: TrainConfig, predictor: RewardPredictor, action_spec: TensorSpec
) -> tuple[TensorDictSequential, SamplingPlanner]:
    """Make a policy that plans in the predictor's model, for actions of one real env.

    Returns:
        The policy for the real env, and the planner inside the policy. The planner's primer
        (``make_tensordict_primer``), appended to the env, keeps the plan from step to step.

    Raises:
        RecipeError: if the planner refuses an option.
    """
    env = predictor.env(action_spec, num_particles=config.num_particles)
    options = {
        "planning_horizon": config.planning_horizon,
        "optim_steps": config.optim_steps,
        "num_candidates": config.num_candidates,
        "return_action": config.return_action,
        "gamma": config.gamma,
        "terminal_value": predictor.val_func if config.terminal_value else None,
    }
    is_discrete = action_spec.domain == "discrete"
    planner_class = CategoricalCrossEntropyPlanner if is_discrete else _PLANNERS[config.planner]
    if planner_class is not PathIntegralPlanner:
        options["top_k"] = config.top_k
    try:
        planner = planner_class(env, **options)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return TensorDictSequential(env.initial_state, planner), planner


class Explorer(TensorDictModuleBase):
    """Act at random at first, then by a policy, with phases of random actions in between.

    Args:
        policy: chooses the actions outside of random phases.
        action_spec: random actions are drawn from it.
        init_random_steps: number of actions in the first random phase, at least 1.
        planned_steps: number of the policy's actions between two later random phases; 0 means that
            there are no later random phases.
        random_steps: number of actions in each later random phase.
        planner: the planner in ``policy``. A random phase clears its plan and writes NaN for its
            statistics, because a collector keeps only the entries that the first step has.

    Reads:
        The entries that ``policy`` reads.

    Writes:
        ``action`` ``[..., A]`` and ``planned`` ``[..., 1]`` bool, which is False in a random phase;
        outside of random phases also the entries that ``policy`` writes.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        action_spec: TensorSpec,
        init_random_steps: int,
        planned_steps: int = 0,
        random_steps: int = 0,
        planner: SamplingPlanner | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.planner = planner
        self.action_spec = action_spec
        self.init_random_steps = init_random_steps
        self.planned_steps = planned_steps
        self.random_steps = random_steps
        self.steps = 0
        self.in_keys = policy.in_keys
        self.out_keys = [*policy.out_keys, keys.PLANNED]

    def plans(self, step: int) -> bool:
        """Tell whether the policy chooses action number ``step``."""
        since_start = step - self.init_random_steps
        if since_start < 0:
            return False
        if not (self.planned_steps and self.random_steps):
            return True
        return since_start % (self.planned_steps + self.random_steps) < self.planned_steps

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every env of the batch."""
        planned = self.plans(self.steps)
        if planned:
            tensordict = self.policy(tensordict)
        else:
            tensordict.set(keys.ACTION, self.action_spec.rand(tensordict.batch_size))
            if self.planner is not None:
                self.planner.forget(tensordict)
                for key in self.planner.statistics_keys:
                    tensordict.set(key, _full(tensordict, torch.nan))
        self.steps += tensordict.numel()
        return tensordict.set(keys.PLANNED, _full(tensordict, planned))


def _full(tensordict: TensorDictBase, value: float) -> Tensor:
    return torch.full((*tensordict.batch_size, 1), value, device=tensordict.device)
