"""The agent of the recipe: a predictor, a planner in it, and how it explores."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
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


def make_predictor(config: TrainConfig, env: EnvBase, writer: object = None) -> RewardPredictor:
    """Put a predictor together for the spaces of ``env``."""
    obs_dim = env.observation_spec_unbatched[keys.OBSERVATION].shape[-1]
    action_spec = env.action_spec_unbatched
    action_dim = action_spec.shape[-1]
    hidden_sizes = (config.hidden_size, config.hidden_size)
    rate = config.learning_rate
    return RewardPredictor(
        ProbabilisticEnsemble(
            obs_dim, 0, action_spec, n_models=config.n_models, hidden_sizes=hidden_sizes
        ),
        ValueNet(obs_dim, 0, hidden_sizes=hidden_sizes),
        RewardNet(obs_dim, 0, action_dim, hidden_sizes=hidden_sizes),
        IdentityEncoder(obs_dim),
        latent_state_dim=obs_dim,
        context_dim=0,
        gamma=config.gamma,
        tau=config.tau,
        n_steps=config.n_steps,
        learn_encoder=False,
        clip_grad_max_norm=config.clip_grad_max_norm,
        reward_lr=rate,
        model_lr=rate,
        value_lr=rate,
        device=config.device,
        writer=writer,
    )


def make_policy(
    config: TrainConfig, predictor: RewardPredictor, action_spec: TensorSpec
) -> tuple[TensorDictSequential, SamplingPlanner]:
    """Plan in the model: a policy for the real env, and the planner in it.

    The planner's primer (``make_tensordict_primer``) lets an env carry the plan along.

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
        policy: acts outside of random phases.
        action_spec: random actions are drawn from.
        init_random_steps: actions of the first random phase, at least 1.
        planned_steps: actions of the policy between two later random phases; 0 for none of these.
        random_steps: actions of each later random phase.
        planner: in ``policy``. In a random phase its plan is forgotten, and what it says of it is
            NaN (a collector keeps only what it sees from the first step on).

    Reads:
        What ``policy`` reads.

    Writes:
        ``action`` ``[..., A]`` and ``planned`` ``[..., 1]`` bool, False in a random phase; outside
        of it also what ``policy`` writes.
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
        """Whether action number ``step`` is the policy's."""
        if step < self.init_random_steps:
            return False
        period = self.planned_steps + self.random_steps
        if not (self.planned_steps and self.random_steps):
            return True
        return (step - self.init_random_steps) % period < self.planned_steps

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every env of the batch."""
        planned = self.plans(self.steps)
        if planned:
            tensordict = self.policy(tensordict)
        else:
            tensordict.set(keys.ACTION, self.action_spec.rand(tensordict.batch_size))
            if self.planner is not None:
                self.planner.forget(tensordict)
                nothing = torch.full((*tensordict.batch_size, 1), torch.nan)
                for key in self.planner.statistics_keys:
                    tensordict.set(key, nothing.to(tensordict.device))
        self.steps += tensordict.numel()
        flag = torch.full((*tensordict.batch_size, 1), planned, device=tensordict.device)
        return tensordict.set(keys.PLANNED, flag)
