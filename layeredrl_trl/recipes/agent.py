"""The agent of the recipe: a predictor, a planner in it, and how it explores."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from layeredrl_trl import keys
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.planners import CrossEntropyPlanner
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.config import TrainConfig


def make_predictor(config: TrainConfig, env: EnvBase, writer: object = None) -> RewardPredictor:
    """Put a predictor together for the spaces of ``env``."""
    obs_dim = env.observation_spec_unbatched[keys.OBSERVATION].shape[-1]
    action_dim = env.action_spec_unbatched.shape[-1]
    hidden_sizes = (config.hidden_size, config.hidden_size)
    rate = config.learning_rate
    return RewardPredictor(
        ProbabilisticEnsemble(
            obs_dim, 0, action_dim, n_models=config.n_models, hidden_sizes=hidden_sizes
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
) -> tuple[TensorDictSequential, CrossEntropyPlanner]:
    """Plan in the model: a policy for the real env, and the planner in it.

    The planner's primer (``make_tensordict_primer``) lets an env carry the plan along.
    """
    env = predictor.env(action_spec, num_particles=config.num_particles)
    planner = CrossEntropyPlanner(
        env,
        planning_horizon=config.planning_horizon,
        optim_steps=config.optim_steps,
        num_candidates=config.num_candidates,
        top_k=config.top_k,
        gamma=config.gamma,
        terminal_value=predictor.val_func if config.terminal_value else None,
    )
    return TensorDictSequential(env.initial_state, planner), planner


class RandomThenPlanned(TensorDictModuleBase):
    """Act at random for the first steps, then by a policy.

    Args:
        policy: acts after the random phase.
        action_spec: random actions are drawn from.
        init_random_frames: env steps of the random phase.

    Reads:
        What ``policy`` reads.

    Writes:
        ``action`` ``[..., A]`` and ``planned`` ``[..., 1]`` bool, False in the random phase; after
        it also what ``policy`` writes.
    """

    def __init__(
        self, policy: TensorDictModuleBase, action_spec: TensorSpec, init_random_frames: int
    ) -> None:
        super().__init__()
        self.policy = policy
        self.action_spec = action_spec
        self.init_random_frames = init_random_frames
        self.frames = 0
        self.in_keys = policy.in_keys
        self.out_keys = [*policy.out_keys, keys.PLANNED]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every env of the batch."""
        planned = self.frames >= self.init_random_frames
        if planned:
            tensordict = self.policy(tensordict)
        else:
            tensordict.set(keys.ACTION, self.action_spec.rand(tensordict.batch_size))
        self.frames += tensordict.numel()
        flag = tensordict.get(keys.ACTION).new_full((*tensordict.batch_size, 1), planned)
        return tensordict.set(keys.PLANNED, flag.bool())
