"""The agent of the recipe: a predictor, and a planner that plans in it."""

from __future__ import annotations

from typing import NamedTuple

from tensordict.nn import TensorDictSequential
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


class Spaces(NamedTuple):
    """The spaces of one env: dims of an observation, and the spec of an action."""

    obs_dim: int
    action_spec: TensorSpec

    @classmethod
    def of(cls, env: EnvBase) -> Spaces:
        """Return the spaces of ``env``."""
        obs_dim = env.observation_spec_unbatched[keys.OBSERVATION].shape[-1]
        return cls(obs_dim, env.action_spec_unbatched)


def make_predictor(config: TrainConfig, spaces: Spaces) -> RewardPredictor:
    """Make a predictor for the spaces of an environment."""
    obs_dim, action_spec = spaces
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
    # the variance of the members costs time: it is computed only where it is asked for
    options = {"uncertainty": True} if config.pessimism else {}
    env = predictor.env(action_spec, num_particles=config.num_particles, **options)
    options = {
        "planning_horizon": config.planning_horizon,
        "optim_steps": config.optim_steps,
        "num_candidates": config.num_candidates,
        "return_action": config.return_action,
        "gamma": config.gamma,
        "terminal_value": predictor.val_func if config.terminal_value else None,
        "disagreement": -config.pessimism,
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
