"""Small PredictorEnvs, and the observations and actions to imagine from."""

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import Encoder, IdentityEncoder
from tests.oracles import random_ensemble, random_reward

CONTINUOUS = Bounded(-1.0, 1.0, (2,))
ACTION_SPECS = {
    "continuous": CONTINUOUS,
    "one-hot": OneHot(4),
    "categorical": Categorical(4),
    "categorical-1": Categorical(4, shape=(1,)),
}
BATCH_SHAPES = [(), (3,), (2, 3)]


class SplitEncoder(Encoder):
    """Lossy: the last dim of the observation is the context, the others the latent state."""

    def __init__(self, obs_dim, **keys):
        super().__init__(obs_dim, obs_dim - 1, 1, **keys)

    def embed(self, observation):
        return observation[..., :-1], observation[..., -1:]


def make_env(
    action_spec=CONTINUOUS,
    *,
    encoder=None,
    n_models=3,
    particles=2,
    with_reward=True,
    model_options=None,
    **options,
):
    encoder = IdentityEncoder(3) if encoder is None else encoder
    model = random_ensemble(
        encoder.latent_state_dim,
        encoder.context_dim,
        action_spec,
        n_models=n_models,
        n_particles_per_model=particles,
        n_modes=2,
        condition_on_context=True,
        **(model_options or {}),
    )
    with torch.no_grad():  # most particles live on for some steps
        model.termination_net.biases[-1] -= 2.0
    reward = random_reward(model) if with_reward else None
    return PredictorEnv(encoder, model, reward, action_spec, **options)


def observations(env, *batch):
    (key,) = env.initial_state.in_keys
    shape = env.initial_state.encoder.obs_shape
    return TensorDict({key: torch.randn(*batch, *shape)}, batch_size=batch)


def random_actions(env, *batch):
    return env.action_spec.expand(*batch, *env.action_spec.shape).rand()


def count_rollouts(env):
    """Let an env note how often Python imagines in it."""
    rollout, calls = env.world_model.rollout, []

    def noted(*args, **kwargs):
        calls.append(1)
        return rollout(*args, **kwargs)

    env.world_model.__dict__["rollout"] = noted
    return calls
